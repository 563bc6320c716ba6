// Launchers of the kernels of row_stats.cuh, and their registration.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <climits>
#include <tuple>

#include "arguments.h"
#include "launch.h"
#include "row_stats.cuh"

namespace fusedpo::cuda {
namespace {

constexpr int64_t kMaxBlocks = 1 << 16;

// Calls visit with a null pointer to the type of the elements.
template <class Visit>
void dispatch(const Tensor& logits, Visit visit) {
  const ScalarType dtype = logits.scalar_type();
  expect(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
         "logits must be float16, bfloat16 or float32, got ", dtype);
  if (dtype == ScalarType::Float) return visit((float*)nullptr);
  if (dtype == ScalarType::BFloat16) return visit((__nv_bfloat16*)nullptr);
  visit((__half*)nullptr);
}

RowStarts starts_of(const char* name, const Tensor& x) {
  expect_dims(name, x, 1, 3);
  const int64_t dims = x.dim() - 1, size = x.size(dims);
  expect(size <= 1 || x.stride(dims) == 1, name, " must have stride 1 along the last dimension, got ", x.stride(dims));
  expect(size <= INT_MAX / 2, name, " must have shorter rows than ", size);
  if (dims == 0) return {1, 0, 0};
  return {std::max<int64_t>(1, x.size(dims - 1)), dims == 2 ? x.stride(0) : 0, x.stride(dims - 1)};
}

struct RowArguments : Arguments {
  RowArguments(const Tensor& logits, const Tensor& token_ids, const Tensor& temperature, const OptionalTensor& mask,
               int64_t vocab_start)
      : Arguments("logits", logits), rows{} {
    rows.from = starts_of("logits", logits);
    shape = {logits.sizes().begin(), logits.sizes().end() - 1};
    ids_shape = shape;
    if (token_ids.dim() > (int64_t)shape.size()) ids_shape.push_back(token_ids.size(token_ids.dim() - 1));
    rows.num_ids = ids_shape.size() > shape.size() ? ids_shape.back() : 1;
    rows.num_rows = 1;
    for (const int64_t size : shape) rows.num_rows *= size;
    rows.logits = logits.data_ptr();
    rows.size = (int)logits.size(logits.dim() - 1);
    rows.token_ids = read<int64_t>("token_ids", token_ids, ids_shape);
    rows.vocab_start = vocab_start;
    rows.temperature_per_row = temperature.dim() > 0;
    rows.temperature = read<float>("temperature", temperature, rows.temperature_per_row ? shape : Shape{});
    rows.mask = read<uint8_t>("mask", mask, shape);
  }

  Shape shape, ids_shape;
  ShardRows rows;
};

unsigned blocks_for(int64_t rows) { return (unsigned)std::clamp<int64_t>(rows, 1, kMaxBlocks); }

Tensor row_stats(Tensor logits, Tensor token_ids, Tensor temperature, OptionalTensor mask, int64_t vocab_start,
                 int64_t width, int64_t vocab_size, bool return_entropy) {
  RowArguments a(logits, token_ids, temperature, mask, vocab_start);
  expect(a.rows.num_ids > 0, "token_ids must hold at least one id per row");
  expect(vocab_start >= 0 && width >= a.rows.size && vocab_size >= 0,
         "vocab_start and vocab_size must not be negative, and width not less than the columns of logits, got ",
         vocab_start, ", ", vocab_size, " and ", width);
  const int64_t columns = (return_entropy ? 3 : 2) + a.rows.num_ids;
  const Tensor parts = torch::stable::new_empty(logits, {1 + a.rows.num_rows, columns}, ScalarType::Float);
  const RowStatsCall call{a.rows, width, vocab_size, return_entropy, static_cast<float*>(parts.data_ptr())};
  const Launch launch(logits);
  dispatch(logits, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    row_stats_kernel<T><<<blocks_for(a.rows.num_rows), kStatsThreads, 0, launch.stream()>>>(call);
  });
  launch.check();
  return parts;
}

std::tuple<Tensor, Tensor, Tensor> merge_row_stats(Tensor parts, Tensor temperature, OptionalTensor mask,
                                                   bool return_entropy) {
  expect_dims("parts", parts, 3, 3);
  Arguments arguments("parts", parts);
  MergeCall c{};
  c.parts = {arguments.read<float>("parts", parts, shape_of(parts)), parts.size(0), parts.size(1) - 1, parts.size(2),
             return_entropy};
  const int64_t rows = c.parts.rows, num_ids = c.parts.num_ids();
  expect(c.parts.ranks > 0 && rows >= 0 && num_ids > 0, "parts must have shape [P, 1 + R, ", c.parts.first_logit(),
         " + K], got ", text_of(parts.sizes()));
  c.temperature_per_row = temperature.dim() > 0;
  c.temperature = arguments.read<float>("temperature", temperature, c.temperature_per_row ? Shape{rows} : Shape{});
  c.mask = arguments.read<uint8_t>("mask", mask, {rows});
  const Tensor logprobs = torch::stable::new_empty(parts, {rows, num_ids});
  const Tensor entropy = torch::stable::new_empty(parts, {return_entropy ? rows : 0});
  const Tensor stats = torch::stable::new_empty(parts, {rows, 3});
  c.logprobs = static_cast<float*>(logprobs.data_ptr());
  c.entropy = static_cast<float*>(entropy.data_ptr());
  c.stats = static_cast<float*>(stats.data_ptr());
  if (rows > 0) {
    const Launch launch(parts);
    const unsigned blocks = (unsigned)((rows + kStatsThreads - 1) / kStatsThreads);
    merge_row_stats_kernel<<<blocks, kStatsThreads, 0, launch.stream()>>>(c);
    launch.check();
  }
  return {logprobs, entropy, stats};
}

void token_logprobs_backward_out(OptionalTensor grad_logprobs, OptionalTensor grad_entropy, Tensor logits,
                                 Tensor token_ids, Tensor temperature, OptionalTensor mask, Tensor stats, Tensor out,
                                 std::optional<int64_t> vocab_start) {
  RowArguments a(logits, token_ids, temperature, mask, vocab_start.value_or(0));
  a.expect_device("out", out);
  expect_shape("out", out, shape_of(logits));
  expect(out.scalar_type() == logits.scalar_type(), "out must have dtype ", logits.scalar_type(), ", got ",
         out.scalar_type());
  ShardGradientCall c{};
  c.rows = a.rows;
  c.grad_logprobs = a.read<float>("grad_logprobs", grad_logprobs, a.ids_shape);
  if (grad_entropy && grad_entropy->numel() == 0) grad_entropy.reset();  // a graph passes it for one not asked for
  c.grad_entropy = a.read<float>("grad_entropy", grad_entropy, a.shape);
  Shape of_stats = a.shape;
  of_stats.push_back(3);
  c.stats = a.read<float>("stats", stats, of_stats);
  c.gradient = out.data_ptr();
  c.to = starts_of("out", out);
  if (a.rows.num_rows == 0) return;
  const Tensor at_ids =
      torch::stable::new_empty(logits, {a.rows.num_rows * std::max<int64_t>(1, a.rows.num_ids)}, ScalarType::Float);
  c.at_ids = static_cast<float*>(at_ids.data_ptr());
  const Launch launch(logits);
  dispatch(logits, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    shard_gradient_kernel<T><<<blocks_for(a.rows.num_rows), kStatsThreads, 0, launch.stream()>>>(c);
  });
  launch.check();
}

}  // namespace
}  // namespace fusedpo::cuda

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CUDA, m) {
  m.impl("row_stats.native", TORCH_BOX(&fusedpo::cuda::row_stats));
  m.impl("merge_row_stats.native", TORCH_BOX(&fusedpo::cuda::merge_row_stats));
  m.impl("token_logprobs_backward_out.native", TORCH_BOX(&fusedpo::cuda::token_logprobs_backward_out));
}
