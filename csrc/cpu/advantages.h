// Advantages on the CPU: groups, sequences or chunks over threads. The order of every sum is that of a single thread.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fusedpo::cpu {

using torch::stable::Tensor;

// What the arguments mean is said in python/fusedpo/ops_advantages.py. Values that it forbids throw
// std::invalid_argument, which becomes a ValueError.
Tensor group_advantages(Tensor rewards, std::optional<Tensor> ids, std::optional<Tensor> order, int64_t group_size,
                        std::optional<Tensor> other, std::optional<Tensor> mask, int64_t estimator, int64_t k,
                        bool unbiased, double number, bool wide);

std::tuple<Tensor, Tensor> token_advantages(Tensor rewards, std::optional<Tensor> values,
                                            std::optional<Tensor> logprobs, std::optional<Tensor> old_logprobs,
                                            std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                                            std::optional<Tensor> per_sequence, int64_t estimator, double gamma,
                                            double lam, double rho_bar, double c_bar, bool wide);

Tensor step_advantages(Tensor values, Tensor step_rewards, Tensor step_ids, bool wide);

Tensor whiten(Tensor x, std::optional<Tensor> lengths, std::optional<Tensor> mask, bool wide);

}  // namespace fusedpo::cpu
