// The kernels of csrc/cuda/row_stats.cuh. A call has the arguments of an operator in python/fusedpo/ops/row_stats.py,
// or of the backward in token_logprobs.py, and what their shapes say; rows are contiguous from `begin` on, `stride`
// elements from one another.
#include "cuda/row_stats.cuh"

#include "calls.h"
#include "core/array.h"

using namespace fusedpo;
using cuda_on_cpu::Calls;
using cuda_on_cpu::Memory;

namespace {

constexpr unsigned kFewThreads = 64, kFewBlocks = 3;

template <class T>
T* data(cuda_on_cpu::Tensor* tensor) {
  return tensor ? (T*)tensor->data() : nullptr;
}

// Calls visit with a pointer to the type of the elements.
void dispatch(const cuda_on_cpu::Tensor& tensor, auto visit) {
  using advantages::DType;
  if (tensor.dtype == (int64_t)DType::kFloat32) return visit((float*)nullptr);
  if (tensor.dtype == (int64_t)DType::kFloat16) return visit((__half*)nullptr);
  visit((__nv_bfloat16*)nullptr);
}

struct Shard {
  explicit Shard(Calls& calls) : logits(calls.tensor()), begin(calls.integer()) {
    const int64_t stride = calls.integer();
    rows.num_rows = calls.integer();
    rows.from = {std::max<int64_t>(1, rows.num_rows), 0, stride};
    rows.size = (int)calls.integer();
    rows.token_ids = data<int64_t>(calls.tensor());
    rows.num_ids = calls.integer();
    rows.vocab_start = calls.integer();
    cuda_on_cpu::Tensor* temperature = calls.tensor();
    rows.temperature = data<float>(temperature);
    rows.temperature_per_row = temperature->bytes.size() > sizeof(float);
    rows.mask = data<uint8_t>(calls.tensor());
  }

  cuda_on_cpu::Tensor* logits;
  int64_t begin;
  ShardRows rows{};
};

void row_stats(Calls& calls) {
  Shard shard(calls);
  RowStatsCall c{shard.rows, calls.integer(), calls.integer(), calls.integer() != 0, nullptr};
  Memory<float> parts((1 + c.rows.num_rows) * ((c.entropy ? 3 : 2) + c.rows.num_ids), NAN);
  c.parts = parts.data();
  dispatch(*shard.logits, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    c.rows.logits = data<T>(shard.logits) + shard.begin;
    cuda_on_cpu::launch(row_stats_kernel<T>, cuda_on_cpu::Grid{kFewBlocks, kFewThreads, 0, 1}, c);
  });
  calls.result(parts);
}

void merge(Calls& calls) {
  MergeCall c{};
  const float* parts = data<float>(calls.tensor());
  c.parts = {parts, calls.integer(), calls.integer(), calls.integer(), calls.integer() != 0};
  cuda_on_cpu::Tensor* temperature = calls.tensor();
  c.temperature = data<float>(temperature);
  c.temperature_per_row = temperature->bytes.size() > sizeof(float);
  c.mask = data<uint8_t>(calls.tensor());
  const int64_t rows = c.parts.rows;
  Memory<float> logprobs(rows * c.parts.num_ids(), NAN), entropy(c.parts.entropy ? rows : 0, NAN), stats(3 * rows, NAN);
  c.logprobs = logprobs.data(), c.entropy = entropy.data(), c.stats = stats.data();
  const unsigned blocks = (unsigned)((rows + kFewThreads - 1) / kFewThreads);
  cuda_on_cpu::launch(merge_row_stats_kernel, cuda_on_cpu::Grid{std::max(1u, blocks), kFewThreads, 0, 1}, c);
  calls.result(logprobs);
  calls.result(entropy);
  calls.result(stats);
}

void gradient(Calls& calls) {
  ShardGradientCall c{};
  c.grad_logprobs = data<float>(calls.tensor());
  c.grad_entropy = data<float>(calls.tensor());
  Shard shard(calls);
  c.rows = shard.rows;
  c.stats = data<float>(calls.tensor());
  c.to = shard.rows.from;
  Memory<float> at_ids(std::max<int64_t>(1, c.rows.num_rows * c.rows.num_ids), NAN);
  c.at_ids = at_ids.data();
  dispatch(*shard.logits, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    c.rows.logits = c.gradient = data<T>(shard.logits) + shard.begin;  // in place
    cuda_on_cpu::launch(shard_gradient_kernel<T>, cuda_on_cpu::Grid{kFewBlocks, kFewThreads, 0, 1}, c);
  });
  calls.result(shard.logits->bytes);
}

}  // namespace

int main(int, char** argv) {
  Calls calls(argv[1], argv[2]);
  void (*operators[])(Calls&) = {row_stats, merge, gradient};
  while (calls.more()) operators[calls.integer()](calls);
}
