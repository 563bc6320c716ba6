// The policy loss on the CPU: tiles of tokens over threads, each tile through a token kernel.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace fusedpo::cpu {

using torch::stable::Tensor;

// Arguments and results as the schema in python/fusedpo/ops_policy_loss.py says. Throws std::invalid_argument, which
// becomes a ValueError, where cu_seqlens are no offsets.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(
    Tensor logprobs, std::optional<Tensor> old_logprobs, Tensor advantages, std::optional<Tensor> mask,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> ref_logprobs, std::optional<Tensor> entropy,
    std::optional<Tensor> is_weights, std::optional<Tensor> denominator, Tensor loss_scale, std::vector<int64_t> parts,
    std::vector<double> values, bool per_token);

Tensor policy_loss_backward(Tensor grad_loss, Tensor grad_logprobs, Tensor grad_log_trace, Tensor logprobs,
                            std::optional<Tensor> old_logprobs, std::optional<Tensor> mask,
                            std::optional<Tensor> cu_seqlens, int64_t back, int64_t ahead);

}  // namespace fusedpo::cpu
