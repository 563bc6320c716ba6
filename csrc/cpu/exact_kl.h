// The KL divergence over the vocabulary, and its gradient, on the CPU: rows over threads.
#pragma once

#include <tuple>

#include "arguments.h"

namespace fusedpo::cpu {

// logits and ref_logits [..., V] of one dtype (16-bit or 32-bit floats, any strides but 1 along V), temperatures [] or
// [...] float32, mask [...] bool, scale [...] float32 -> kl [...] float32, 0 where masked, and the gradient of its sum,
// each row times its scale (empty if not asked for). `forward`: KL(q || p), q from ref_logits; otherwise KL(p || q).
std::tuple<Tensor, Tensor> exact_kl(Tensor logits, Tensor ref_logits, Tensor temperature, Tensor ref_temperature,
                                    OptionalTensor mask, Tensor scale, bool forward, bool gradient);

// The gradient is written over the logits.
Tensor exact_kl_(Tensor logits, Tensor ref_logits, Tensor temperature, Tensor ref_temperature, OptionalTensor mask,
                 Tensor scale, bool forward);

}  // namespace fusedpo::cpu
