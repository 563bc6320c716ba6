// From logits to the gradient of the loss on the CPU, each row of logits read and written once.
#pragma once

#include <cstdint>
#include <vector>

#include "policy_loss_arguments.h"

namespace fusedpo::cpu {

// Arguments as the schema in python/fusedpo/ops_one_pass.py says. Throws std::invalid_argument, which becomes a
// ValueError, for a bad id or temperature at an evaluated row, and where cu_seqlens or rows are none; nothing is
// overwritten then.
Tensor one_pass(Tensor logits, Tensor logprobs, Tensor entropy, OptionalTensor rows, Tensor token_ids,
                Tensor temperature, OptionalTensor old_logprobs, Tensor advantages, OptionalTensor mask,
                OptionalTensor cu_seqlens, OptionalTensor ref_logprobs, OptionalTensor is_weights, Tensor scale,
                std::vector<int64_t> parts, std::vector<double> values);

void one_pass_(Tensor logits, Tensor logprobs, Tensor entropy, OptionalTensor rows, Tensor token_ids,
               Tensor temperature, OptionalTensor old_logprobs, Tensor advantages, OptionalTensor mask,
               OptionalTensor cu_seqlens, OptionalTensor ref_logprobs, OptionalTensor is_weights, Tensor scale,
               std::vector<int64_t> parts, std::vector<double> values);

void scale_(Tensor gradient, Tensor factor);

}  // namespace fusedpo::cpu
