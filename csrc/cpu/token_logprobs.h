// Token log-probs and entropy on the CPU: rows over threads, each row through a row kernel.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fusedpo::cpu {

using torch::stable::Tensor;

// logits [..., V] (16-bit or 32-bit floats, any strides but 1 along V), token_ids [...] or [..., K] int64,
// temperature [] or [...] float32, mask [...] bool -> logprobs like token_ids, entropy [...] (or [0] if not asked for),
// stats [..., 3] for the backward; all float32. Throws std::invalid_argument, which becomes a
// ValueError, for a bad id or temperature at a kept row.
std::tuple<Tensor, Tensor, Tensor> token_logprobs(Tensor logits, Tensor token_ids, Tensor temperature,
                                                  std::optional<Tensor> mask, bool return_entropy);

// The gradient of the logits, contiguous. Either upstream gradient may be absent.
Tensor token_logprobs_backward(std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy, Tensor logits,
                               Tensor token_ids, Tensor temperature, std::optional<Tensor> mask, Tensor stats);

// The same, written over the logits.
void token_logprobs_backward_(std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy, Tensor logits,
                              Tensor token_ids, Tensor temperature, std::optional<Tensor> mask, Tensor stats);

}  // namespace fusedpo::cpu
