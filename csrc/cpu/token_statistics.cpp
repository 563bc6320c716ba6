// Token log-probs, entropy and the statistics of each row of logits on the CPU: rows over threads, each read once.
#include <atomic>
#include <tuple>

#include "logits.h"

namespace fusedpo::cpu {
namespace {

// logits [..., V] as token_logprobs takes them, token_ids [...] int64, temperature [] or [...] float32, mask [...] bool
// -> logprobs, entropy, stats [..., 3] for the backward of token_logprobs, the log of the sum of the squared
// probabilities, the mean of logits / temperature, all float32, and whether the token is the first of the likeliest,
// bool.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_statistics(Tensor logits, Tensor token_ids,
                                                                            Tensor temperature, OptionalTensor mask) {
  expect(logits.dim() > 0, "logits must have at least one dimension");
  const Shape shape(logits.sizes().begin(), logits.sizes().end() - 1);
  Arguments arguments("logits", logits);
  const Rows rows("logits", logits);
  const RowKernels& kernels = row_kernels_for("logits", logits);
  const int64_t* ids = arguments.read<int64_t>("token_ids", token_ids, shape);
  const Temperatures temperatures(arguments, temperature, shape);
  const uint8_t* kept = arguments.read<uint8_t>("mask", mask, shape);
  const auto result = [&](Shape size, ScalarType dtype) {
    Tensor tensor = torch::stable::new_empty(logits, size, dtype);
    torch::stable::zero_(tensor);  // masked rows are visited by nobody
    return tensor;
  };
  Shape three = shape;
  three.push_back(3);
  const Tensor logprobs = result(shape, ScalarType::Float), entropy = result(shape, ScalarType::Float),
               stats = result(three, ScalarType::Float), log_sum_sq_probs = result(shape, ScalarType::Float),
               mean_logits = result(shape, ScalarType::Float), is_top1 = result(shape, ScalarType::Bool);
  const auto floats = [](const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); };

  std::atomic<int64_t> bad_id{-1}, bad_row{-1};  // a throw inside parallel_for would lose its message
  for_each_row(rows_where(rows.count, [&](int64_t row) { return !kept || kept[row] != 0; }), rows.size,
               [&](int64_t row) {
                 const float T = temperatures[row];
                 if (!(T > 0 && T < INFINITY)) bad_row = row;
                 if (ids[row] < 0 || ids[row] >= rows.size) {
                   bad_id = row;
                   return;
                 }
                 const RowStatistics found = kernels.statistics(rows[row], rows.size, T, ids[row]);
                 const RowSummary summary(found.stats, T);
                 const float logprob = summary.logprob(kernels.value(rows[row], ids[row]));
                 floats(logprobs)[row] = logprob;
                 floats(entropy)[row] = summary.entropy();
                 floats(stats)[3 * row] = found.stats.reference;
                 floats(stats)[3 * row + 1] = found.stats.rest;
                 floats(stats)[3 * row + 2] = found.stats.weighted;
                 floats(log_sum_sq_probs)[row] = (float)(std::log1p(found.squares) - 2 * summary.log_sum);
                 floats(mean_logits)[row] = (float)(found.sum / rows.size / T);
                 static_cast<bool*>(is_top1.data_ptr())[row] = found.is_first_maximum && logprob == logprob;
               });
  if (const int64_t row = bad_id; row >= 0)
    fail("token_ids must be in [0, ", rows.size, ") at kept rows, got ", ids[row], " at flat position ", row);
  if (const int64_t row = bad_row; row >= 0)
    fail("temperature must be positive and finite, got ", std::to_string(temperatures[row]), " at row ", row);
  return {logprobs, entropy, stats, log_sum_sq_probs, mean_logits, is_top1};
}

}  // namespace
}  // namespace fusedpo::cpu

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CPU, m) {
  m.impl("token_statistics.native", FUSEDPO_BOX(fusedpo::cpu::token_statistics));
}
