// The kernels of csrc/cuda/advantages.cuh. Arguments are those of the operators in python/fusedpo/ops_advantages.py,
// before them the number of the operator and of the threads in a block.
#include "cuda/advantages.cuh"

#include "calls.h"

using namespace fusedpo::advantages;
using cuda_on_cpu::Calls;
using cuda_on_cpu::launch;
using cuda_on_cpu::Memory;

namespace {

constexpr int64_t kInt64 = (int64_t)DType::kInt64;

Array array(cuda_on_cpu::Tensor* tensor) {
  return tensor ? Array{tensor->data(), (DType)tensor->dtype} : Array{nullptr, DType::kFloat32};
}

Integers integers(cuda_on_cpu::Tensor* tensor) {
  return {tensor ? tensor->data() : nullptr, tensor && tensor->dtype == kInt64};
}

// A result that nothing was written to is nan; a sanitizer sees what is written beyond it.
struct Written {
  Written(int64_t size, bool wide_) : wide(wide_), bytes(size * (wide ? 8 : 4), (char)0xff) {}
  Result result() { return {bytes.data(), wide}; }
  bool wide;
  Memory<char> bytes;
};

void group_advantages(Calls& calls, unsigned threads) {
  Samples samples{};
  const int64_t count = calls.integer();
  samples.count = count;
  samples.rewards = array(calls.tensor());
  const Integers ids = integers(calls.tensor());
  samples.order = (const int64_t*)integers(calls.tensor()).data;
  const int64_t group_size = calls.integer();
  samples.num_other = calls.integer();
  samples.other = array(calls.tensor());
  samples.mask = array(calls.tensor());
  const auto estimator = (Estimator)calls.integer();
  const int64_t k = calls.integer();
  const bool unbiased = calls.integer();
  const GroupParams params{estimator, k, unbiased, calls.number(), 1};
  Written advantages(count, calls.integer());
  samples.advantages = advantages.result();

  const unsigned blocks = ids ? count : (count - 1) / group_size + 1;
  Memory<double> numbers(4 * count, NAN);
  Memory<int32_t> sources(count, -1);
  if (compares_ranks(estimator))
    launch(ranks_kernel, {blocks, threads}, samples, ids, count, group_size, params, numbers.data(), sources.data());
  else
    launch(baseline_kernel, {blocks, threads}, samples, ids, count, group_size, params);
  calls.result(advantages.bytes);
}

void token_advantages(Calls& calls, unsigned threads) {
  Tokens tokens{};
  const int64_t count = calls.integer(), sequences = calls.integer();
  tokens.length = calls.integer();
  tokens.num_tokens = count;
  tokens.rewards = array(calls.tensor());
  tokens.values = array(calls.tensor());
  tokens.logprobs = array(calls.tensor());
  tokens.old_logprobs = array(calls.tensor());
  tokens.mask = array(calls.tensor());
  tokens.cu_seqlens = integers(calls.tensor());
  tokens.per_sequence = array(calls.tensor());
  TokenParams params{};
  params.estimator = (TokenEstimator)calls.integer();
  for (double* number : {&params.gamma, &params.lam, &params.rho_bar, &params.c_bar}) *number = calls.number();
  const bool wide = calls.integer();
  Written advantages(count, wide), returns(tokens.values ? count : 0, wide);
  tokens.advantages = advantages.result();
  tokens.returns = returns.result();
  launch(token_advantages_kernel, {(unsigned)sequences, threads}, tokens, params);
  calls.result(advantages.bytes);
  calls.result(returns.bytes);
}

void step_advantages(Calls& calls, unsigned threads) {
  Steps steps{};
  const int64_t count = calls.integer();
  steps.num_steps = calls.integer();
  steps.num_tokens = calls.integer();
  steps.values = array(calls.tensor());
  steps.rewards = array(calls.tensor());
  steps.ids = integers(calls.tensor());
  Written advantages(count, calls.integer());
  const int64_t rows = count / steps.num_tokens;
  Memory<double> of_steps(rows * steps.num_steps, NAN);
  launch(step_advantages_kernel, {(unsigned)rows, threads}, steps, of_steps.data(), advantages.result());
  calls.result(advantages.bytes);
}

void whiten(Calls& calls, unsigned threads) {
  Whitening whitening{};
  const int64_t count = calls.integer();
  whitening.x = array(calls.tensor());
  whitening.lengths = array(calls.tensor());
  whitening.mask = array(calls.tensor());
  Written whitened(count, calls.integer());
  whitening.result = whitened.result();
  const int64_t chunks = (count - 1) / kWhiteningChunk + 1;
  Memory<Moments> partial(chunks);
  launch(moments_kernel, {(unsigned)chunks, threads}, whitening, count, partial.data());
  launch(whiten_kernel, {(unsigned)chunks, threads}, whitening, count, partial.data(), chunks);
  calls.result(whitened.bytes);
}

}  // namespace

int main(int, char** argv) {
  Calls calls(argv[1], argv[2]);
  void (*operators[])(Calls&, unsigned) = {group_advantages, token_advantages, step_advantages, whiten};
  while (calls.more()) {
    const auto run = operators[calls.integer()];
    run(calls, (unsigned)calls.integer());
  }
}
