// The policy loss on the CPU: tiles of tokens over threads, each tile through a token kernel.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "policy_loss_arguments.h"

namespace fusedpo::cpu {

// Arguments and results as the schema in python/fusedpo/ops_policy_loss.py says. Throws std::invalid_argument, which
// becomes a ValueError, where cu_seqlens are no offsets.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(
    Tensor logprobs, OptionalTensor old_logprobs, Tensor advantages, OptionalTensor mask, OptionalTensor cu_seqlens,
    OptionalTensor ref_logprobs, OptionalTensor entropy, OptionalTensor is_weights, OptionalTensor denominator,
    Tensor loss_scale, std::vector<int64_t> parts, std::vector<double> values, bool per_token);

Tensor policy_loss_backward(Tensor grad_loss, Tensor grad_logprobs, Tensor grad_log_trace, Tensor logprobs,
                            OptionalTensor old_logprobs, OptionalTensor mask, OptionalTensor cu_seqlens, int64_t back,
                            int64_t ahead);

}  // namespace fusedpo::cpu
