// Launchers of the kernels of advantages.cuh, and their registration.
#include <torch/csrc/stable/library.h>

#include "advantage_arguments.h"
#include "advantages.cuh"
#include "launch.h"

namespace fusedpo::cuda {
namespace {

using namespace fusedpo::advantages;

Tensor group_advantages(Tensor rewards, OptionalTensor ids, OptionalTensor order, int64_t group_size,
                        OptionalTensor other, OptionalTensor mask, int64_t estimator, int64_t k, bool unbiased,
                        double number, bool wide) {
  const GroupArguments a(rewards, ids, order, group_size, other, mask, estimator, k, unbiased, number, wide);
  if (a.count == 0) return a.advantages;
  const int64_t blocks = a.ids ? a.count : (a.count - 1) / group_size + 1;
  const int threads = a.ids ? 128 : threads_for(group_size);
  const Launch launch(rewards);
  if (compares_ranks(a.params.estimator)) {
    const int64_t room = (a.ids ? a.count : group_size) > kSharedSamples ? a.count : 0;
    const Tensor numbers = torch::stable::new_empty(rewards, {4 * room}, ScalarType::Double);
    const Tensor sources = torch::stable::new_empty(rewards, {room}, ScalarType::Int);
    ranks_kernel<<<blocks, threads, 0, launch.stream()>>>(a.samples, a.ids, a.count, group_size, a.params,
                                                          (double*)numbers.data_ptr(), (int32_t*)sources.data_ptr());
  } else {
    baseline_kernel<<<blocks, threads, 0, launch.stream()>>>(a.samples, a.ids, a.count, group_size, a.params);
  }
  launch.check();
  return a.advantages;
}

std::tuple<Tensor, Tensor> token_advantages(Tensor rewards, OptionalTensor values, OptionalTensor logprobs,
                                            OptionalTensor old_logprobs, OptionalTensor mask, OptionalTensor cu_seqlens,
                                            OptionalTensor per_sequence, int64_t estimator, double gamma, double lam,
                                            double rho_bar, double c_bar, bool wide) {
  const TokenArguments a(rewards, values, logprobs, old_logprobs, mask, cu_seqlens, per_sequence, estimator, gamma, lam,
                         rho_bar, c_bar, wide);
  if (a.advantages.numel() == 0) return {a.advantages, a.returns};
  const Launch launch(rewards);
  const int threads = threads_for(a.advantages.numel() / a.num_sequences);
  token_advantages_kernel<<<a.num_sequences, threads, 0, launch.stream()>>>(a.tokens, a.params);
  launch.check();
  return {a.advantages, a.returns};
}

Tensor step_advantages(Tensor values, Tensor step_rewards, Tensor step_ids, bool wide) {
  const StepArguments a(values, step_rewards, step_ids, wide);
  if (a.count == 0) return a.advantages;
  const int64_t rows = step_ids.size(0), num_steps = a.steps.num_steps, num_tokens = a.steps.num_tokens;
  const Tensor of_steps = torch::stable::new_empty(values, {rows, num_steps}, ScalarType::Double);
  const int threads = threads_for(num_steps > num_tokens ? num_steps : num_tokens);
  const Launch launch(values);
  step_advantages_kernel<<<rows, threads, 0, launch.stream()>>>(a.steps, (double*)of_steps.data_ptr(), a.result);
  launch.check();
  return a.advantages;
}

Tensor whiten(Tensor x, OptionalTensor lengths, OptionalTensor mask, bool wide) {
  const WhiteningArguments a(x, lengths, mask, wide);
  if (a.count == 0) return a.whitened;
  const Tensor partial = torch::stable::new_empty(x, {a.chunks, 3}, ScalarType::Double);
  static_assert(sizeof(Moments) == 3 * sizeof(double));
  Moments* moments = (Moments*)partial.data_ptr();
  const Launch launch(x);
  moments_kernel<<<a.chunks, kThreads, 0, launch.stream()>>>(a.whitening, a.count, moments);
  whiten_kernel<<<a.chunks, kThreads, 0, launch.stream()>>>(a.whitening, a.count, moments, a.chunks);
  launch.check();
  return a.whitened;
}

}  // namespace
}  // namespace fusedpo::cuda

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CUDA, m) {
  m.impl("group_advantages.native", TORCH_BOX(&fusedpo::cuda::group_advantages));
  m.impl("token_advantages.native", TORCH_BOX(&fusedpo::cuda::token_advantages));
  m.impl("step_advantages.native", TORCH_BOX(&fusedpo::cuda::step_advantages));
  m.impl("whiten.native", TORCH_BOX(&fusedpo::cuda::whiten));
}
