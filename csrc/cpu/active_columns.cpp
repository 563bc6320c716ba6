// The gradient of a chunk of logits where it is not small, on the CPU.
//
// Bytes: active_columns reads every row that a gradient reaches once, gradient_at_ the lines in which a column of it is
// active, and writes the active columns alone. Results depend on the threads in no way.
#include <cmath>
#include <cstring>
#include <mutex>

#include "upstream.h"

namespace fusedpo::cpu {
namespace {

constexpr double kNothing = 0x1p-64;  // of the largest element of a row that its gradient could have

// The logit above which an element of a row's gradient may be larger than threshold * (|G| + |E|) / T, at columns whose
// log-prob was not taken: it is p (G + E (log p + H)) / T there, with the sum G of the gradients of the log-probs, that
// of the entropy, E, and the entropy H. nan where the row has no finite gradient.
float threshold_of(const RowStats& stats, float temperature, float grad_entropy, double threshold) {
  if (!(stats.rest > -1 && stats.rest < INFINITY)) return NAN;
  const double log_sum = std::log1p((double)stats.rest);
  double log_p = std::log(threshold);
  if (grad_entropy != 0) {
    // p |log p + H| <= threshold, too, for every p up to the one that is found: the second step is below the solution
    const double entropy = log_sum - stats.weighted / (1.0 + stats.rest);
    for (int step = 0; step < 2; ++step) log_p = std::log(threshold) - std::log1p(std::fabs(log_p + entropy));
  }
  return std::nextafter((float)(stats.reference + temperature * (log_p + log_sum)), -INFINITY);
}

// What a gradient is of at most, in magnitude, at the columns whose log-prob was not taken: |G| + |E|, over T.
double size_of(const Upstream& upstream, int64_t row) {
  double sum = 0;
  for (int64_t k = 0; k < upstream.ids.count; ++k) sum += upstream.grad_logprobs(row)[k];
  return (std::fabs(sum) + std::fabs(upstream.grad_entropy(row))) / upstream.temperature(row);
}

Tensor active_columns(OptionalTensor grad_logprobs, OptionalTensor grad_entropy, Tensor logits, Tensor token_ids,
                      Tensor temperature, Tensor stats, double threshold) {
  const Upstream upstream(logits, grad_logprobs, grad_entropy, token_ids, temperature, std::nullopt, stats);
  expect(threshold >= kNothing && threshold < 1, "threshold must be at least 2^-64, and less than 1, got ", threshold);
  const Rows rows("logits", logits);
  const RowKernels& kernels = row_kernels_for("logits", logits);
  const auto reached = rows_where(rows.count, [&](int64_t row) { return upstream.reaches(row); });
  upstream.check_ids(reached);

  const Tensor result = torch::stable::new_empty(logits, Shape{rows.size}, ScalarType::Bool);
  uint8_t* active = static_cast<uint8_t*>(result.data_ptr());
  std::fill_n(active, rows.size, 0);
  std::mutex adding;
  parallel_for(0, (int64_t)reached.size(), grain_of(rows.size), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> own(rows.size, 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = reached[i];
      for (int64_t k = 0; k < upstream.ids.count; ++k) own[upstream.ids[row][k]] = 1;
      const float least =
          threshold_of(upstream.stats(row), upstream.temperature(row), upstream.grad_entropy(row), threshold);
      if (std::isfinite(least) && std::isfinite(size_of(upstream, row)))
        kernels.mark(rows[row], rows.size, least, own.data());
      else
        std::fill(own.begin(), own.end(), 1);
    }
    const std::lock_guard<std::mutex> lock(adding);
    for (int64_t j = 0; j < rows.size; ++j) active[j] |= own[j];
  });
  return result;
}

// columns[k] >= k: no element is overwritten before it is read.
template <class Word>
void move_to_front(void* row, const int64_t* columns, int64_t count) {
  for (int64_t k = 0; k < count; ++k) static_cast<Word*>(row)[k] = static_cast<const Word*>(row)[columns[k]];
}

// Zeros in place of elements that are smaller than `bound`, in magnitude: their products would be subnormal numbers,
// each of which costs a processor a hundred times as much. Bits of magnitudes are ordered as these are.
template <class Word>
void drop_below(float bound, void* row, int64_t count) {
  uint32_t bits;
  std::memcpy(&bits, &bound, sizeof bits);
  constexpr int kShift = 8 * (sizeof bits - sizeof(Word));
  const Word least = bits >> kShift, magnitude = 0x7fffffff >> kShift;
  for (int64_t k = 0; k < count; ++k) {
    Word& x = static_cast<Word*>(row)[k];
    x = (x & magnitude) < least ? 0 : x;
  }
}

std::tuple<Tensor, Tensor> gradient_at_(OptionalTensor grad_logprobs, OptionalTensor grad_entropy, Tensor logits,
                                        Tensor token_ids, Tensor temperature, Tensor stats, Tensor active_,
                                        int64_t most) {
  Upstream upstream(logits, grad_logprobs, grad_entropy, token_ids, temperature, std::nullopt, stats);
  const Rows rows("logits", logits);
  const RowKernels& kernels = row_kernels_for("logits", logits);
  const uint8_t* active = upstream.arguments.read<uint8_t>("active", active_, {rows.size});
  expect(most >= 0 && most <= rows.size, "most must be 0 to ", rows.size, ", got ", most);
  const auto reached = rows_where(rows.count, [&](int64_t row) { return upstream.reaches(row); });
  upstream.check_ids(reached);
  for (const int64_t row : reached)
    for (int64_t k = 0; k < upstream.ids.count; ++k)
      if (!active[upstream.ids[row][k]])
        fail("active must hold every token id at which a gradient arrives, not ", upstream.ids[row][k]);

  const Tensor columns_ = torch::stable::new_empty(logits, Shape{most}, ScalarType::Long);
  int64_t* columns = static_cast<int64_t*>(columns_.data_ptr());
  std::fill_n(columns, most, -1);
  int64_t count = 0;
  for (int64_t j = 0; j < rows.size; ++j) {
    if (!active[j]) continue;
    if (count < most) columns[count] = j;
    ++count;
  }
  Tensor dropped = torch::stable::new_empty(logits, rows_of(logits), ScalarType::Float);
  torch::stable::zero_(dropped);
  if (count > most) return {columns_, dropped};

  float* dropped_of = static_cast<float*>(dropped.data_ptr());
  const ScalarType dtype = logits.scalar_type();
  for_each_row(reached, count, upstream.scratch(), [&](int64_t row, Upstream::Scratch& scratch) {
    char* x = rows[row];
    (dtype == ScalarType::Float ? move_to_front<uint32_t> : move_to_front<uint16_t>)(x, columns, count);
    for (int64_t k = 0; k < upstream.ids.count; ++k)
      scratch.places[k] = std::lower_bound(columns, columns + count, upstream.ids[row][k]) - columns;

    const RowStats whole = upstream.stats(row);
    const float t = upstream.temperature(row);
    const RowStats here = kernels.reduce(x, count, t, false, nullptr);
    const double shift = ((double)here.reference - whole.reference) / t;
    const double kept = (1.0 + here.rest) / (1.0 + whole.rest) * std::exp(shift);
    dropped_of[row] = (float)(kept > 1 ? 0 : 1 - kept);  // nan stays
    kernels.gradient(x, x, count, whole, upstream.gradient(row, scratch.places.data(), scratch), nullptr);
    const float bound = (float)(kNothing * size_of(upstream, row));
    if (dtype == ScalarType::Float) drop_below<uint32_t>(bound, x, count);
    if (dtype == ScalarType::BFloat16) drop_below<uint16_t>(bound, x, count);
  });
  const auto skipped = rows_where(rows.count, [&](int64_t row) { return !upstream.reaches(row); });
  for_each_row(skipped, count, [&](int64_t row) { std::memset(rows[row], 0, count * logits.element_size()); });
  return {columns_, dropped};
}

}  // namespace
}  // namespace fusedpo::cpu

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CPU, m) {
  using namespace fusedpo;
  m.impl("active_columns.native", FUSEDPO_BOX(cpu::active_columns));
  m.impl("gradient_at_.native", FUSEDPO_BOX(cpu::gradient_at_));
}
