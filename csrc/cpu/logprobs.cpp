// The row kernels of token log-probs. Compiled once per instruction set; see rows.h for the contract and vec.h for the
// rest.
//
// Bytes: reduce reads V elements, gradient reads V and writes V. The reduction is one sweep: exponentials are taken
// relative to a reference that is the maximum of the first block, and moved (with the block done again) only if a later
// logit puts it 2^8 times higher. The order of every sum depends on V and the instruction set alone.

#include <cmath>

#include "rows.h"
#include "vec.h"

namespace fusedpo::FUSEDPO_ISA {
namespace {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLowest = -200.0f;  // 2^-200 is 0; -inf is moved here so that 0 * -inf never arises
constexpr float kMove = 8.0f;
constexpr int64_t kBlock = 64 * kChunk;  // 64 additions in float32 per lane, then sums are carried on in float64
constexpr float kInfinity = __builtin_inff();

// A copy of the last, incomplete chunk of a row; the missing elements are -inf and contribute exactly nothing.
template <class T>
struct Tail {
  T element[kChunk];

  Tail(const T* row, int64_t count) {
    const T filler = from_float<T>(-kInfinity);
    for (int64_t i = 0; i < kChunk; ++i) element[i] = i < count ? row[i] : filler;
  }
};

// Calls visit(chunk) for every chunk of row[0, size).
template <class T, class Visit>
FUSEDPO_INLINE void for_each_chunk(const T* row, int64_t size, Visit visit) {
  int64_t i = 0;
  for (; i + kChunk <= size; i += kChunk) visit(row + i);
  if (i < size) {
    const Tail<T> tail(row + i, size - i);
    visit(tail.element);
  }
}

// Calls step(chunk, result) for every chunk of from[0, size), to write the result into to[0, size), which may be
// `from`.
template <class T, class Step>
FUSEDPO_INLINE void map_chunks(const T* from, T* to, int64_t size, Step step) {
  int64_t i = 0;
  for (; i + kChunk <= size; i += kChunk) step(from + i, to + i);
  if (i < size) {
    Tail<T> tail(from + i, size - i);
    step(tail.element, tail.element);
    std::memcpy(to + i, tail.element, (size - i) * sizeof(T));
  }
}

template <class T>
float maximum(const T* row, int64_t size) {
  Vec top = splat(-kInfinity);
  for_each_chunk(row, size, [&](const T* chunk) {
    Vec a, b;
    load2(chunk, a, b);
    top = max(b, max(a, top));
  });
  return reduce_max(top);
}

struct BlockSums {
  float sum, weighted, top;
  float at_reference;
};

// Exponents in units of log 2: t = (x - reference) * scale with scale = log2(e) / T. In the block that holds the
// reference, elements equal to it are counted apart: what lies beside a dominant logit keeps its digits.
template <bool kEntropy, bool kHoldsReference, class T>
BlockSums sum_block(const T* row, int64_t size, float reference, float scale) {
  Vec sum_a{}, sum_b{}, weighted_a{}, weighted_b{}, at_reference{}, top = splat(-kInfinity);
  const Vec offset = splat(reference), factor = splat(scale), lowest = splat(kLowest);
  const Vec zero{}, one = splat(1.0f);
  for_each_chunk(row, size, [&](const T* chunk) {
    Vec a, b;
    load2(chunk, a, b);
    a = max(lowest, (a - offset) * factor);
    b = max(lowest, (b - offset) * factor);
    top = max(b, max(a, top));
    Vec ea = exp2(a), eb = exp2(b);
    if constexpr (kHoldsReference) {
      at_reference += (a == zero ? one : zero) + (b == zero ? one : zero);
      ea = a == zero ? zero : ea;
      eb = b == zero ? zero : eb;
    }
    sum_a += ea;
    sum_b += eb;
    if constexpr (kEntropy) {
      weighted_a = fma(ea, a, weighted_a);
      weighted_b = fma(eb, b, weighted_b);
    }
  });
  return {reduce_add(sum_a + sum_b), kEntropy ? reduce_add(weighted_a + weighted_b) : 0.0f, reduce_max(top),
          kHoldsReference ? reduce_add(at_reference) : 0.0f};
}

// The reference of a block: its maximum, or 0 where that is -inf (then every exponential is 0, and a NaN still shows).
template <class T>
float block_reference(const T* row, int64_t size) {
  const float top = maximum(row, size);
  return top == -kInfinity ? 0.0f : top;
}

template <bool kEntropy, class T>
RowStats reduce_row(const T* row, int64_t size, float temperature) {
  const float scale = kLog2e / temperature;
  double rest = -1, weighted = 0;  // of blocks: their order of summation costs no accuracy
  float reference = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const T* block = row + begin;
    const int64_t count = size - begin < kBlock ? size - begin : kBlock;
    const bool nothing_yet = rest == -1;
    BlockSums sums{};
    if (!nothing_yet) sums = sum_block<kEntropy, false>(block, count, reference, scale);
    if (nothing_yet || sums.top > kMove) {
      const float moved = block_reference(block, count);
      if (!nothing_yet) {
        const double shift = (double)(reference - moved) * scale, factor = std::exp2(shift);
        weighted = (weighted + shift * (1 + rest)) * factor;
        rest = (1 + rest) * factor - 1;
      }
      reference = moved;
      sums = sum_block<kEntropy, true>(block, count, reference, scale);
    }
    rest += sums.at_reference;
    rest += sums.sum;
    weighted += sums.weighted;
  }
  return {reference, (float)rest, (float)(weighted * kLn2)};
}

template <class T>
RowStats reduce(const void* logits, int64_t size, float temperature, bool entropy) {
  const T* row = static_cast<const T*>(logits);
  return entropy ? reduce_row<true>(row, size, temperature) : reduce_row<false>(row, size, temperature);
}

// With p_j = e_j / (1 + rest), G the sum of grad_logprobs and E the grad of the entropy H:
//   grad x_j = (grad_logprobs at j - G p_j - E p_j (log p_j + H)) / T
// where the last two terms are e_j * (constant + slope * t_j) over the whole row. Columns whose log-prob was taken are
// computed apart, with 1 - p taken through expm1, and rounded once.
template <bool kEntropy, class T>
void gradient_row(const T* row, T* grad, int64_t size, const RowStats& stats, const RowGradient& up) {
  const float scale = kLog2e / up.temperature;
  const double log_sum = std::log1p((double)stats.rest);
  const double entropy = kEntropy ? log_sum - stats.weighted / (1.0 + stats.rest) : 0.0;
  double total = 0;
  for (int64_t k = 0; k < up.num_ids; ++k) total += up.grad_logprobs[k];

  for (int64_t k = 0; k < up.num_ids; ++k) {
    double here = 0;
    for (int64_t l = 0; l < up.num_ids; ++l) here += up.token_ids[l] == up.token_ids[k] ? up.grad_logprobs[l] : 0.0f;
    const double x = to_float(row[up.token_ids[k]]);
    const double logprob = (x - stats.reference) / up.temperature - log_sum;
    double value = (here - total) - total * std::expm1(logprob);
    if (kEntropy && logprob != -kInfinity) value -= up.grad_entropy * std::exp(logprob) * (logprob + entropy);
    up.scratch[k] = (float)(value / up.temperature);
  }

  const float normaliser = (float)(1 / (up.temperature * (1.0 + stats.rest)));
  const Vec constant = splat(normaliser * (float)(-total - up.grad_entropy * (entropy - log_sum)));
  const Vec slope = splat(normaliser * -up.grad_entropy * kLn2);
  const Vec offset = splat(stats.reference), factor = splat(scale), lowest = splat(kLowest);
  map_chunks(row, grad, size, [&](const T* from, T* to) {
    Vec a, b;
    load2(from, a, b);
    a = max(lowest, (a - offset) * factor);
    b = max(lowest, (b - offset) * factor);
    const Vec weight_a = kEntropy ? fma(slope, a, constant) : constant;
    const Vec weight_b = kEntropy ? fma(slope, b, constant) : constant;
    store2(to, exp2(a) * weight_a, exp2(b) * weight_b);
  });
  for (int64_t k = 0; k < up.num_ids; ++k) grad[up.token_ids[k]] = from_float<T>(up.scratch[k]);
}

template <class T>
void gradient(const void* logits, void* grad, int64_t size, const RowStats& stats, const RowGradient& up) {
  const T* row = static_cast<const T*>(logits);
  T* out = static_cast<T*>(grad);
  if (up.grad_entropy != 0)
    gradient_row<true>(row, out, size, stats, up);
  else
    gradient_row<false>(row, out, size, stats, up);
}

template <class T>
float value(const void* logits, int64_t index) {
  return to_float(static_cast<const T*>(logits)[index]);
}

template <class T>
void scale(void* elements, int64_t size, float factor) {
  T* row = static_cast<T*>(elements);
  map_chunks(row, row, size, [&](const T* from, T* to) {
    Vec a, b;
    load2(from, a, b);
    store2(to, a * factor, b * factor);
  });
}

template <class T>
constexpr RowKernels kernels_for() {
  return {reduce<T>, gradient<T>, value<T>, scale<T>};
}

}  // namespace

extern const RowKernelTable kRowKernels = {kernels_for<float>(), kernels_for<BFloat16>(), kernels_for<Half>()};

}  // namespace fusedpo::FUSEDPO_ISA
