// The kernels of csrc/cuda/policy_loss.cuh. A call has the sizes of blocks,
// tiles and grids, the arguments of the operator in
// python/fusedpo/ops/policy_loss.py, what their shapes say, and the upstream
// gradient of losses per token. Its results are loss, metrics, the gradients of
// log-probs and entropy, as autograd gives them, and what the loss of each
// token is multiplied by where losses are aggregated.
#include "cuda/policy_loss.cuh"

#include "calls.h"

using namespace fusedpo;
using cuda_on_cpu::Calls;
using cuda_on_cpu::Memory;

namespace {

struct Sizes {
  unsigned threads;
  int64_t tile_size, max_blocks;

  // As launchers of a GPU are called, but for the number of threads.
  template <class Kernel, class Arguments>
  void operator()(Kernel kernel, int64_t blocks, int, const Arguments& arguments) const {
    cuda_on_cpu::launch(kernel, {(unsigned)blocks, threads}, arguments);
  }
};

template <class T>
const T* data(cuda_on_cpu::Tensor* tensor) {
  return tensor ? (const T*)tensor->data() : nullptr;
}

// A result that nothing was written to is nan.
Memory<float> result(bool wanted, int64_t size) { return Memory<float>(wanted ? size : 0, NAN); }

void policy_loss(Calls& calls, const Sizes& sizes) {
  PolicyLoss p{};
  p.tile_size = sizes.tile_size;
  p.max_blocks = sizes.max_blocks;
  Tokens& tokens = p.batch.tokens;
  tokens.logprobs.data = data<float>(calls.tensor());
  tokens.entropy.data = data<float>(calls.tensor());
  tokens.old_logprobs.data = data<float>(calls.tensor());
  if (tokens.old_logprobs.data == nullptr) tokens.old_logprobs = tokens.logprobs;
  tokens.advantages.data = data<float>(calls.tensor());
  tokens.mask = data<uint8_t>(calls.tensor());
  p.batch.cu_seqlens = data<int64_t>(calls.tensor());
  tokens.ref_logprobs.data = data<float>(calls.tensor());
  tokens.is_weights.data = data<float>(calls.tensor());
  p.denominator = data<float>(calls.tensor());
  p.loss_scale = data<float>(calls.tensor());
  cuda_on_cpu::Tensor *parts = calls.tensor(), *values = calls.tensor();
  p.objective = decode(data<int64_t>(parts), data<double>(values), values->bytes.size() / sizeof(double));
  p.per_token = calls.integer();
  p.batch.num_tokens = calls.integer();
  p.batch.num_sequences = calls.integer();
  p.batch.width = calls.integer();
  tokens.advantages.per_token = calls.integer();
  tokens.is_weights.per_token = calls.integer();

  const float* upstream = data<float>(calls.tensor());

  const int64_t count = p.batch.num_tokens;
  const bool through_traces = p.per_token && p.objective.differentiate;
  Memory<float> loss = result(true, p.per_token ? count : 1), metrics = result(true, kNumMetrics);
  Memory<float> gradient = result(true, count), grad_entropy = result(p.objective.entropy_coef != 0, count);
  Memory<float> grad_log_trace = result(through_traces, count), scratch = result(through_traces, 2 * count);
  p.loss = loss.data();
  p.metrics = metrics.data();
  p.out = {p.per_token ? loss.data() : nullptr, gradient.data(),
           p.objective.entropy_coef != 0 ? grad_entropy.data() : nullptr,
           through_traces ? grad_log_trace.data() : nullptr};
  std::list<Memory<char>> memory;
  reserve(p, [&](int64_t bytes) { return memory.emplace_back(bytes, (char)0xff).data(); });
  launch_policy_loss(p, sizes);

  if (through_traces) {
    const Memory<float> own = gradient;
    const Objective& o = p.objective;
    launch_trace_gradient(
        {p.batch, o.back, o.ahead, upstream, own.data(), grad_log_trace.data(), gradient.data(), scratch.data()},
        sizes);
  } else if (upstream != nullptr) {
    for (int64_t t = 0; t < count; ++t) gradient[t] *= upstream[t];
  }
  if (upstream != nullptr)
    for (size_t t = 0; t < grad_entropy.size(); ++t) grad_entropy[t] *= upstream[t];

  Memory<float> scale = result(true, count);
  TokenScale s{{}, scale.data()};
  s.p.tile_size = sizes.tile_size;
  s.p.max_blocks = sizes.max_blocks;
  s.p.objective.aggregation = p.objective.aggregation;
  s.p.objective.length_norm = p.objective.length_norm;
  s.p.batch = p.batch;
  s.p.denominator = p.denominator;
  s.p.loss_scale = p.loss_scale;
  reserve(s.p, [&](int64_t bytes) { return memory.emplace_back(bytes, (char)0xff).data(); });
  launch_token_scale(s, sizes);
  for (const Memory<float>* written : {&loss, &metrics, &gradient, &grad_entropy, &scale}) calls.result(*written);
}

}  // namespace

int main(int, char** argv) {
  Calls calls(argv[1], argv[2]);
  while (calls.more()) policy_loss(calls, {(unsigned)calls.integer(), calls.integer(), calls.integer()});
}
