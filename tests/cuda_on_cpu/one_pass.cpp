// The kernels of csrc/cuda/one_pass.cuh. A call has the warps of a block, the bytes of its shared memory and the number
// of clusters, the arguments of the operator in python/fusedpo/ops_one_pass.py and what their shapes say, or a factor
// to scale by, or the bytes of a row and of the shared memory of a device. The results of the first are blocks per
// cluster and slices per warp, the gradient with all that lies between its rows, log-probs and entropy.
#include "cuda/one_pass.cuh"

#include "calls.h"
#include "core/array.h"

using namespace fusedpo;
using cuda_on_cpu::Calls;
using cuda_on_cpu::Memory;

namespace {

constexpr int kFewThreads = 64;  // for kernels that do with any number

void launch(auto kernel, const GridShape& shape, const auto&... arguments) {
  const bool of_rows = shape.cluster > 0;
  const cuda_on_cpu::Grid grid = {(unsigned)shape.blocks, (unsigned)(of_rows ? shape.threads : kFewThreads),
                                  (size_t)shape.shared_bytes, (unsigned)(of_rows ? shape.cluster : 1)};
  cuda_on_cpu::launch(kernel, grid, arguments...);
}

template <class T>
T* data(cuda_on_cpu::Tensor* tensor) {
  return tensor ? (T*)tensor->data() : nullptr;
}

RowOffsets offsets(Calls& calls) { return {calls.integer(), calls.integer(), calls.integer()}; }

// Calls visit with a pointer to the type of the elements.
void dispatch(const cuda_on_cpu::Tensor& tensor, auto visit) {
  using advantages::DType;
  if (tensor.dtype == (int64_t)DType::kFloat32) return visit((float*)nullptr);
  if (tensor.dtype == (int64_t)DType::kFloat16) return visit((__half*)nullptr);
  visit((__nv_bfloat16*)nullptr);
}

void one_pass(Calls& calls) {
  const int warps = (int)calls.integer();
  const int64_t shared_limit = calls.integer();
  OnePass p{};
  p.num_clusters = calls.integer();
  cuda_on_cpu::Tensor *logits = calls.tensor(), *other = calls.tensor();  // none: in place
  const int64_t from_begin = calls.integer();
  p.from = offsets(calls);
  const int64_t to_begin = calls.integer();
  p.to = offsets(calls);
  p.num_rows = calls.integer();
  p.size = (int)calls.integer();
  cuda_on_cpu::Tensor* logprobs = calls.tensor();
  p.logprobs = data<float>(logprobs);
  Memory<float> entropy(logprobs->bytes.size() / sizeof(float), 0);
  p.entropy = entropy.data();
  p.rows = data<int64_t>(calls.tensor());
  p.token_ids = data<int64_t>(calls.tensor());
  cuda_on_cpu::Tensor* temperature = calls.tensor();
  p.temperature = data<float>(temperature);
  p.temperature_per_token = temperature->bytes.size() > sizeof(float);
  Tokens& tokens = p.batch.tokens;
  tokens.old_logprobs.data = data<float>(calls.tensor());
  tokens.advantages.data = data<float>(calls.tensor());
  tokens.mask = data<uint8_t>(calls.tensor());
  p.batch.cu_seqlens = data<int64_t>(calls.tensor());
  tokens.ref_logprobs.data = data<float>(calls.tensor());
  tokens.is_weights.data = data<float>(calls.tensor());
  p.scale = data<float>(calls.tensor());
  cuda_on_cpu::Tensor *parts = calls.tensor(), *values = calls.tensor();
  p.objective = decode(data<int64_t>(parts), data<double>(values), values->bytes.size() / sizeof(double));
  p.batch.num_tokens = entropy.size();
  p.batch.num_sequences = calls.integer();
  p.batch.width = calls.integer();
  tokens.advantages.per_token = calls.integer();
  tokens.is_weights.per_token = calls.integer();

  cuda_on_cpu::Tensor* gradient = other ? other : logits;
  Memory<Row> order(p.num_rows, {-1, -1, -1, -1, -1});
  Memory<int64_t> num_live(1, -1);
  p.order = order.data();
  p.num_live = num_live.data();
  p.order_threads = kFewThreads;
  dispatch(*logits, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    p.logits = data<T>(logits) + from_begin;
    p.gradient = data<T>(gradient) + to_begin;
    p.geometry = geometry_for(p.size * (int64_t)sizeof(T), warps, shared_limit);
    if (p.geometry.blocks == 0) std::abort();
    launch_one_pass<T>(p, [](auto... arguments) { launch(arguments...); });
  });
  calls.result(std::vector<int64_t>{p.geometry.blocks, p.geometry.slices});
  calls.result(gradient->bytes);
  calls.result(logprobs->bytes);
  calls.result(entropy);
}

void scale(Calls& calls) {
  cuda_on_cpu::Tensor* gradient = calls.tensor();
  const int64_t begin = calls.integer();
  Scaling s{nullptr, offsets(calls), calls.integer(), (int)calls.integer(), data<float>(calls.tensor())};
  dispatch(*gradient, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    s.gradient = data<T>(gradient) + begin;
    launch_scale<T>(s, [](auto... arguments) { launch(arguments...); });
  });
  calls.result(gradient->bytes);
}

void geometry(Calls& calls) {
  const int64_t row_bytes = calls.integer(), shared_limit = calls.integer();
  const Geometry g = geometry_for(row_bytes, kRowThreads / 32, shared_limit);
  calls.result(std::vector<int64_t>{g.blocks, g.slices, g.shared_bytes()});
}

}  // namespace

int main(int, char** argv) {
  Calls calls(argv[1], argv[2]);
  void (*operators[])(Calls&) = {one_pass, scale, geometry};
  while (calls.more()) operators[calls.integer()](calls);
}
