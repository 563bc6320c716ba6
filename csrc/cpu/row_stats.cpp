// Rows of logits whose columns lie on several ranks, on the CPU: what a rank says of its columns, and the merge.
#include "core/row_stats.h"

#include <cmath>
#include <limits>
#include <tuple>

#include "logits.h"

namespace fusedpo::cpu {
namespace {

// Arguments as python/fusedpo/ops/row_stats.py says. Ids of other columns are no error: the logit here is -inf.
Tensor row_stats(Tensor logits, Tensor token_ids, Tensor temperature, OptionalTensor mask, int64_t vocab_start,
                 int64_t width, int64_t vocab_size, bool return_entropy) {
  Arguments arguments("logits", logits);
  const Rows rows("logits", logits);
  const RowKernels& kernels = row_kernels_for("logits", logits);
  const Shape shape{logits.sizes().begin(), logits.sizes().end() - 1};
  Shape ids_shape = shape;
  if (token_ids.dim() > (int64_t)shape.size()) ids_shape.push_back(token_ids.size(token_ids.dim() - 1));
  const int64_t num_ids = ids_shape.size() > shape.size() ? ids_shape.back() : 1;
  const int64_t* ids = arguments.read<int64_t>("token_ids", token_ids, ids_shape);
  const Temperatures temperatures(arguments, temperature, shape);
  const uint8_t* kept = arguments.read<uint8_t>("mask", mask, shape);
  const int64_t triple = return_entropy ? 3 : 2, columns = triple + num_ids;
  expect(num_ids > 0, "token_ids must hold at least one id per row");
  expect(vocab_start >= 0 && width >= rows.size && vocab_size >= 0,
         "vocab_start and vocab_size must not be negative, and width not less than the columns of logits, got ",
         vocab_start, ", ", vocab_size, " and ", width);

  const Tensor parts = torch::stable::new_empty(logits, {1 + rows.count, columns}, ScalarType::Float);
  float* out = static_cast<float*>(parts.data_ptr());
  std::fill(out, out + (mask ? (1 + rows.count) * columns : columns), 0.0f);  // masked rows are visited by nobody
  out[0] = (float)vocab_start, out[1] = (float)width, out[2] = (float)vocab_size;

  const auto evaluated = rows_where(rows.count, [&](int64_t row) { return !kept || kept[row] != 0; });
  for (const int64_t row : evaluated)
    if (!(temperatures[row] > 0 && temperatures[row] < INFINITY))
      fail("temperature must be positive and finite, got ", std::to_string(temperatures[row]), " at row ", row);
  for_each_row(evaluated, rows.size, [&](int64_t row) {
    const char* x = rows[row];
    const RowStats stats = kernels.reduce(x, rows.size, temperatures[row], return_entropy, nullptr);
    float* of = out + (1 + row) * columns;
    of[0] = stats.reference, of[1] = stats.rest;
    if (return_entropy) of[2] = stats.weighted;
    for (int64_t k = 0; k < num_ids; ++k) {
      const int64_t id = ids[row * num_ids + k] - vocab_start;
      of[triple + k] = id >= 0 && id < rows.size ? kernels.value(x, id) : -INFINITY;
    }
  });
  return parts;
}

std::tuple<Tensor, Tensor, Tensor> merge_row_stats(Tensor parts_, Tensor temperature, OptionalTensor mask,
                                                   bool return_entropy) {
  expect_dims("parts", parts_, 3, 3);
  Arguments arguments("parts", parts_);
  const Parts parts{arguments.read<float>("parts", parts_, shape_of(parts_)), parts_.size(0), parts_.size(1) - 1,
                    parts_.size(2), return_entropy};
  expect(parts.ranks > 0 && parts.rows >= 0 && parts.num_ids() > 0 && parts.columns >= 3,
         "parts must have shape [P, 1 + R, ", parts.first_logit(), " + K], got ", text_of(parts_.sizes()));
  const Shape shape{parts.rows};
  const Temperatures temperatures(arguments, temperature, shape);
  const uint8_t* kept = arguments.read<uint8_t>("mask", mask, shape);
  const Tensor logprobs = torch::stable::new_empty(parts_, {parts.rows, parts.num_ids()});
  const Tensor entropy = torch::stable::new_empty(parts_, {return_entropy ? parts.rows : 0});
  const Tensor stats = torch::stable::new_empty(parts_, {parts.rows, 3});
  float* logprob_out = static_cast<float*>(logprobs.data_ptr());
  float* entropy_out = static_cast<float*>(entropy.data_ptr());
  float* stats_out = static_cast<float*>(stats.data_ptr());
  const double poison = parts.agree() ? 0.0 : std::numeric_limits<double>::quiet_NaN();

  parallel_for(0, parts.rows, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const bool is_kept = !kept || kept[row] != 0;
      const double T = is_kept ? temperatures[row] : 1;
      const MergedRow<double> merged(parts, row, (float)T);
      const double log_sum = std::log1p(merged.rest) + poison;
      for (int64_t k = 0; k < parts.num_ids(); ++k) {
        const double logprob = (MergedRow<double>::logit(parts, row, k) - merged.reference) / T - log_sum;
        logprob_out[row * parts.num_ids() + k] = is_kept ? (float)logprob : 0;
      }
      if (return_entropy) entropy_out[row] = is_kept ? (float)(log_sum - merged.weighted / (1 + merged.rest)) : 0;
      const double triple[3] = {merged.reference, merged.rest, merged.weighted};
      for (int i = 0; i < 3; ++i) stats_out[3 * row + i] = is_kept ? (float)(triple[i] + poison) : 0;
    }
  });
  return {logprobs, entropy, stats};
}

}  // namespace
}  // namespace fusedpo::cpu

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CPU, m) {
  using namespace fusedpo;
  m.impl("row_stats.native", FUSEDPO_BOX(cpu::row_stats));
  m.impl("merge_row_stats.native", FUSEDPO_BOX(cpu::merge_row_stats));
}
