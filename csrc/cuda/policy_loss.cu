// Launchers of the kernels of policy_loss.cuh, and their registration.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "launch.h"
#include "policy_loss.cuh"
#include "policy_loss_arguments.h"

namespace fusedpo::cuda {
namespace {

auto launcher(const Launch& launch) {
  return [&launch](auto kernel, int64_t blocks, int threads, const auto& arguments) {
    kernel<<<(unsigned)blocks, threads, 0, launch.stream()>>>(arguments);
    launch.check();
  };
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(
    Tensor logprobs, OptionalTensor old_logprobs, Tensor advantages, OptionalTensor mask, OptionalTensor cu_seqlens,
    OptionalTensor ref_logprobs, OptionalTensor entropy, OptionalTensor is_weights, OptionalTensor denominator,
    Tensor loss_scale, std::vector<int64_t> parts, std::vector<double> values, bool per_token) {
  const PolicyLossArguments a(logprobs, old_logprobs, advantages, mask, cu_seqlens, ref_logprobs, entropy, is_weights,
                              denominator, loss_scale, parts, values);
  const PolicyLossResults results(logprobs, a.objective, per_token);
  PolicyLoss p{a.objective,
               a.batch,
               a.denominator,
               a.loss_scale,
               per_token,
               results.of_tokens,
               results.data(results.loss),
               results.data(results.metrics)};
  const Launch launch(logprobs);
  std::vector<Tensor> memory;
  reserve(p, [&](int64_t bytes) {
    memory.push_back(torch::stable::new_empty(logprobs, {bytes}, ScalarType::Byte));
    return memory.back().data_ptr();
  });
  launch_policy_loss(p, launcher(launch));
  return {results.loss, results.metrics, results.grad_logprobs, results.grad_entropy, results.grad_log_trace};
}

Tensor policy_loss_backward(Tensor grad_loss, Tensor grad_logprobs, Tensor grad_log_trace, Tensor logprobs,
                            OptionalTensor old_logprobs, OptionalTensor mask, OptionalTensor cu_seqlens, int64_t back,
                            int64_t ahead) {
  BatchArguments a(logprobs, old_logprobs, mask, cu_seqlens);
  expect_in("back", back, 0, kWhole);
  expect_in("ahead", ahead, 0, kWhole);
  const float* upstream = a.read<float>("grad_loss", grad_loss, a.shape);
  const float* own = a.read<float>("grad_logprobs", grad_logprobs, a.shape);
  const float* own_log_trace = a.read<float>("grad_log_trace", grad_log_trace, a.shape);
  const Launch launch(logprobs);
  const Tensor result = torch::stable::new_empty(logprobs, logprobs.sizes());
  const Tensor scratch = torch::stable::new_empty(logprobs, {2 * a.batch.num_tokens});
  launch_trace_gradient({a.batch, back, ahead, upstream, own, own_log_trace, static_cast<float*>(result.data_ptr()),
                         static_cast<float*>(scratch.data_ptr())},
                        launcher(launch));
  return result;
}

}  // namespace
}  // namespace fusedpo::cuda

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CUDA, m) {
  m.impl("policy_loss.native", TORCH_BOX(&fusedpo::cuda::policy_loss));
  m.impl("policy_loss_backward.native", TORCH_BOX(&fusedpo::cuda::policy_loss_backward));
}
