// Token log-probs and entropy on the CPU: rows over threads, each row through a row kernel.
#include <atomic>
#include <tuple>
#include <vector>

#include "upstream.h"

namespace fusedpo::cpu {
namespace {

// `out`: the gradient of the logits, which may overwrite them. Either upstream gradient may be absent. With
// `vocab_start`, the logits are columns of a larger vocabulary, from this one on.
void token_logprobs_backward_out(OptionalTensor grad_logprobs, OptionalTensor grad_entropy, Tensor logits,
                                 Tensor token_ids, Tensor temperature, OptionalTensor mask, Tensor stats, Tensor out,
                                 std::optional<int64_t> vocab_start) {
  const Upstream upstream(logits, grad_logprobs, grad_entropy, token_ids, temperature, mask, stats);
  const Rows from("logits", logits), to = output_rows(upstream.arguments, logits, out);
  const RowKernels& kernels = row_kernels_for("logits", logits);
  const auto evaluated = rows_where(from.count, [&](int64_t row) { return upstream.reaches(row); });
  if (!vocab_start) upstream.check_ids(evaluated);
  for_each_row(evaluated, from.size, upstream.scratch(), [&](int64_t row, Upstream::Scratch& scratch) {
    for (int64_t k = 0; k < upstream.ids.count; ++k) scratch.places[k] = upstream.ids[row][k] - vocab_start.value_or(0);
    kernels.gradient(from[row], to[row], from.size, upstream.stats(row),
                     upstream.gradient(row, scratch.places.data(), scratch), nullptr);
  });
  const auto skipped = rows_where(from.count, [&](int64_t row) { return !upstream.reaches(row); });
  for_each_row(skipped, from.size, [&](int64_t row) { clear(to[row], to.bytes_per_row()); });
}

// logits [..., V] (16-bit or 32-bit floats, any strides but 1 along V), token_ids [...] or [..., K] int64,
// temperature [] or [...] float32, mask [...] bool -> logprobs like token_ids, entropy [...] (or [0] if not asked for),
// stats [..., 3] for the backward; all float32. Throws std::invalid_argument, which becomes a
// ValueError, for a bad id or temperature at a kept row.
std::tuple<Tensor, Tensor, Tensor> token_logprobs(Tensor logits, Tensor token_ids, Tensor temperature,
                                                  OptionalTensor mask, bool return_entropy) {
  const Shape shape = rows_of(logits);
  Arguments arguments("logits", logits);
  const Rows rows("logits", logits);
  const RowKernels& kernels = row_kernels_for("logits", logits);
  const Ids ids(arguments, token_ids, shape);
  const Temperatures temperatures(arguments, temperature, shape);
  const uint8_t* kept = arguments.read<uint8_t>("mask", mask, shape);
  const auto filled = [&](const Shape& shape) {
    Tensor result = torch::stable::new_empty(logits, shape, ScalarType::Float);
    if (mask) torch::stable::zero_(result);  // masked rows are visited by nobody
    return result;
  };
  const Tensor logprobs = filled(ids.shape);
  const Tensor entropy = filled(return_entropy ? shape : Shape{0});
  const Tensor stats = filled(with(shape, 3));

  float* logprob_out = static_cast<float*>(logprobs.data_ptr());
  float* entropy_out = static_cast<float*>(entropy.data_ptr());
  float* stats_out = static_cast<float*>(stats.data_ptr());
  std::atomic<int64_t> bad_id{-1}, bad_row{-1};  // a throw inside parallel_for would lose its message

  for_each_row(rows_where(rows.count, [&](int64_t row) { return !kept || kept[row] != 0; }), rows.size,
               [&](int64_t row) {
                 const float temperature = temperatures[row];
                 if (!(temperature > 0 && temperature < INFINITY)) bad_row = row;
                 const char* x = rows[row];
                 const RowStats row_stats = kernels.reduce(x, rows.size, temperature, return_entropy, nullptr);
                 const RowSummary summary(row_stats, temperature);
                 for (int64_t k = row * ids.count; k < (row + 1) * ids.count; ++k) {
                   const int64_t id = ids.data[k];
                   if (id >= 0 && id < rows.size)
                     logprob_out[k] = summary.logprob(kernels.value(x, id));
                   else
                     bad_id = k;
                 }
                 if (return_entropy) entropy_out[row] = summary.entropy();
                 stats_out[3 * row] = row_stats.reference;
                 stats_out[3 * row + 1] = row_stats.rest;
                 stats_out[3 * row + 2] = row_stats.weighted;
               });
  if (const int64_t k = bad_id; k >= 0)
    fail("token_ids must be in [0, ", rows.size, ") at kept rows, got ", ids.data[k], " at flat position ", k);
  if (const int64_t row = bad_row; row >= 0)
    fail("temperature must be positive and finite, got ", std::to_string(temperatures[row]), " at row ", row);
  return {logprobs, entropy, stats};
}

}  // namespace
}  // namespace fusedpo::cpu

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CPU, m) {
  using namespace fusedpo;
  m.impl("token_logprobs.native", FUSEDPO_BOX(cpu::token_logprobs));
  m.impl("token_logprobs_backward_out.native", FUSEDPO_BOX(cpu::token_logprobs_backward_out));
}
