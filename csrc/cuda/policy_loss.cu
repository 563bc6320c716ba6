// Launchers of the kernels of policy_loss.cuh, and their registration.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "batch_arguments.h"
#include "launch.h"
#include "policy_loss.cuh"

namespace fusedpo::cuda {
namespace {

auto launcher(const Launch& launch) {
  return [&launch](auto kernel, int64_t blocks, int threads, const auto& arguments) {
    kernel<<<(unsigned)blocks, threads, 0, launch.stream()>>>(arguments);
    launch.check();
  };
}

// Memory on the device of `tensor`, which `memory` keeps.
auto allocator(const Tensor& tensor, std::vector<Tensor>& memory) {
  return [&](int64_t bytes) {
    memory.push_back(torch::stable::new_empty(tensor, {bytes}, ScalarType::Byte));
    return memory.back().data_ptr();
  };
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(const PolicyLossInputs& in) {
  const PolicyLossArguments a(in);
  const Tensor& logprobs = in.logprobs;
  const PolicyLossResults results(logprobs, a.objective, in.per_token);
  PolicyLoss p{a.objective,
               a.batch,
               a.denominator,
               a.loss_scale,
               in.per_token,
               results.of_tokens,
               results.data(results.loss),
               results.data(results.metrics)};
  const Launch launch(logprobs);
  std::vector<Tensor> memory;
  reserve(p, allocator(logprobs, memory));
  launch_policy_loss(p, launcher(launch));
  return {results.loss, results.metrics, results.grad_logprobs, results.grad_entropy, results.grad_log_trace};
}

Tensor token_scale(Tensor logprobs, OptionalTensor mask, OptionalTensor cu_seqlens, OptionalTensor denominator,
                   Tensor loss_scale, int64_t aggregation, double length_norm) {
  const TokenScaleArguments a(logprobs, mask, cu_seqlens, denominator, loss_scale, aggregation, length_norm);
  PolicyLoss p{};
  p.objective = a.objective;
  p.batch = a.batch;
  p.denominator = a.denominator;
  p.loss_scale = a.loss_scale;
  const Launch launch(logprobs);
  std::vector<Tensor> memory;
  reserve(p, allocator(logprobs, memory));
  launch_token_scale({p, a.data}, launcher(launch));
  return a.result;
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
  using Spread = fusedpo::Spread<&fusedpo::cuda::policy_loss, fusedpo::PolicyLossTypes>;
  m.impl("policy_loss.native", TORCH_BOX(&Spread::call));
  m.impl("token_scale.native", TORCH_BOX(&fusedpo::cuda::token_scale));
  m.impl("policy_loss_backward.native", TORCH_BOX(&fusedpo::cuda::policy_loss_backward));
}
