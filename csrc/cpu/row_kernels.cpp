// The row kernels of token log-probs. Compiled once per instruction set; see row_kernels.h for the contract and vec.h
// for the rest.
//
// Bytes: reduce reads V elements, gradient reads V and writes V. The reduction is one sweep: exponentials are taken
// relative to a reference that is the maximum of the first block, and moved (with the block done again) only if a later
// logit puts it 2^8 times higher. The order of every sum depends on V and the instruction set alone.

#include "row_kernels.h"

#include <cmath>
#include <type_traits>

#include "vec.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace fusedpo::FUSEDPO_ISA {
namespace {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLowest = -200.0f;  // 2^-200 is 0; -inf is moved here so that 0 * -inf never arises
constexpr float kMove = 8.0f;
constexpr int64_t kBlock = 64 * kChunk;  // up to 128 additions in float32, then sums are carried on in float64
constexpr float kInfinity = __builtin_inff();

// The degrees of the exponentials that are summed, where the logits are T, and of those that are rounded to T.
template <class T>
constexpr int kDegreeOfSum = sizeof(T) == 4 ? 6 : 5;
template <class T>
constexpr int kDegreeOfGradient = sizeof(T) == 4 ? 6 : 4;

// Rows that are as long go past the cache where they are written into memory of their own.
constexpr size_t kLong = 32768;
using InCache = std::integral_constant<Target, Target::kCache>;
using InMemory = std::integral_constant<Target, Target::kMemory>;

// A copy of an incomplete chunk of a row; the missing elements are -inf and contribute exactly nothing.
template <class T>
struct Tail {
  T element[kChunk];

  Tail(const T* row, int64_t count) {
    const T filler = from_float<T>(-kInfinity);
    for (int64_t i = 0; i < kChunk; ++i) element[i] = i < count ? row[i] : filler;
  }
};

// Calls visit(chunk) for every chunk of row[0, size). Meanwhile half as much of `next` is fetched, unless it is null.
template <class T, class Visit>
FUSEDPO_INLINE void for_each_chunk(const T* row, const T* next, int64_t size, Visit visit) {
  int64_t i = 0;
  for (; i + kChunk <= size; i += kChunk) {
    if (next != nullptr) fetch<kChunk / 2>(next + i / 2);
    visit(row + i);
  }
  if (i < size) {
    const Tail<T> tail(row + i, size - i);
    visit(tail.element);
  }
}

// Calls step(chunk, result, target) for every chunk of from[0, size), to write the result into to[0, size), which may
// be `from`: then the result stays in the cache. Meanwhile half as much of `next` is fetched, unless it is null.
template <class T, class Step>
FUSEDPO_INLINE void map_chunks(const T* from, T* to, const T* next, int64_t size, Step step) {
  const auto part = [&](int64_t i, int64_t count) {
    Tail<T> tail(from + i, count);
    step(tail.element, tail.element, InCache());
    std::memcpy(to + i, tail.element, count * sizeof(T));
  };
  int64_t i = 0;
  const auto whole = [&](auto target) {
    for (; i + kChunk <= size; i += kChunk) {
      if (next != nullptr) fetch<kChunk / 2>(next + i / 2);
      step(from + i, to + i, target);
    }
  };
  if (kStreams && from != to && size * sizeof(T) >= kLong) {
    i = -reinterpret_cast<uintptr_t>(to) % kBytes / sizeof(T);
    if (i > 0) part(0, i);
    whole(InMemory());
    store_fence();
  } else {
    whole(InCache());
  }
  if (i < size) part(i, size - i);
}

template <class T>
float maximum(const T* row, int64_t size) {
  Vec top = splat(-kInfinity);
  for_each_chunk<T>(row, nullptr, size, [&](const T* chunk) {
    Vecs x;
    load(chunk, x);
    for (const Vec& v : x) top = max(v, top);
  });
  return reduce_max(top);
}

// Exponents in units of log 2, relative to a reference logit: t = (x - reference) * scale with scale = log2(e) / T.
// Fused, it is one instruction, x * scale - origin. The origin is a float: it lies by `shift` beside reference * scale,
// which is known, and taken out of the sums. It does not serve where logits are so large that the shift is.
template <bool kFused>
struct Exponents {
  Exponents(float reference, float temperature) : scale(splat(kLog2e / temperature)) {
    const double exact = (double)reference * scale[0];
    origin = kFused ? (float)exact : exact;
    shift = kFused ? exact - origin : 0;
    minus = splat(kFused ? (float)-exact : -reference);
  }

  Vec operator()(Vec x) const { return kFused ? fma(x, scale, minus) : (x + minus) * scale; }

  bool serves() const { return !kFused || std::fabs(shift) < 1; }

  // The factor that takes the shift out of 2^t.
  double unshift() const { return std::exp2(-shift); }

  Vec scale, minus;
  double origin, shift;
};

struct BlockSums {
  float sum, weighted, squares, top;
  float at_reference;
};

// Sums 2^t, 2^t t and 4^t. In the block that holds the reference, elements equal to it are counted apart: what lies
// beside a dominant logit keeps its digits. Exponents are moved up to kLowest where kClamp.
template <bool kEntropy, bool kSquares, bool kHoldsReference, bool kClamp, bool kFused, class T>
BlockSums sum_block(const T* row, const T* next, int64_t size, float reference, Exponents<kFused> exponents) {
  Vec sum[2]{}, weighted[2]{}, squares[2]{}, at_reference{}, top = splat(-kInfinity);
  const Exp2Polynomial<kDegreeOfSum<T>> polynomial(1.0f);
  const Vec itself = exponents(splat(reference)), lowest = splat(kLowest), zero{}, one = splat(1.0f);
  for_each_chunk(row, next, size, [&](const T* chunk) {
    Vecs t, e;
    load(chunk, t);
    for (Vec& x : t) {
      x = exponents(x);
      top = max(x, top);
      if constexpr (kClamp) x = max(lowest, x);
    }
    exp2(t, polynomial, e);
    for (int k = 0; k < kVecs; ++k) {
      if constexpr (kHoldsReference) {
        at_reference += t[k] == itself ? one : zero;
        e[k] = t[k] == itself ? zero : e[k];
      }
      sum[k % 2] += e[k];
      if constexpr (kEntropy) weighted[k % 2] = fma(e[k], t[k], weighted[k % 2]);
      if constexpr (kSquares) squares[k % 2] = fma(e[k], e[k], squares[k % 2]);
    }
  });
  return {reduce_add(sum[0] + sum[1]), kEntropy ? reduce_add(weighted[0] + weighted[1]) : 0.0f,
          kSquares ? reduce_add(squares[0] + squares[1]) : 0.0f, reduce_max(top),
          kHoldsReference ? reduce_add(at_reference) : 0.0f};
}

// Clamps where that is needed: 0 * -inf is NaN, and once a block has shown that, the rest of the row is clamped.
template <bool kEntropy, bool kSquares, bool kHoldsReference, bool kFused, class T>
BlockSums sums_of(const T* block, const T* next, int64_t size, float reference, Exponents<kFused> exponents,
                  bool& clamp) {
  if (kExp2TakesInfinity && !clamp) {
    const BlockSums sums =
        sum_block<kEntropy, kSquares, kHoldsReference, false>(block, next, size, reference, exponents);
    clamp = sums.weighted != sums.weighted;
    if (!clamp) return sums;
  }
  return sum_block<kEntropy, kSquares, kHoldsReference, true>(block, next, size, reference, exponents);
}

// The reference of a block: its maximum, or 0 where that is -inf (then every exponential is 0, and a NaN still shows).
template <class T>
float block_reference(const T* row, int64_t size) {
  const float top = maximum(row, size);
  return top == -kInfinity ? 0.0f : top;
}

// The sum of the logits of a block as they are, and whether the one at `id` is still the first maximum.
template <class T>
struct AsTheyAre {
  double sum = 0;
  bool is_first_maximum = true;

  // While the block is in the first-level cache.
  void add(const T* row, int64_t begin, int64_t count, int64_t id) {
    const T* block = row + begin;
    Vec total[2]{};
    int64_t i = 0;
    for (; i + kChunk <= count; i += kChunk) {
      Vecs x;
      load(block + i, x);
      for (int k = 0; k < kVecs; ++k) total[k % 2] += x[k];
    }
    sum += reduce_add(total[0] + total[1]);
    for (; i < count; ++i) sum += to_float(block[i]);

    const int64_t before = id <= begin ? 0 : id - begin < count ? id - begin : count;
    const float chosen = to_float(row[id]);
    if (before > 0 && maximum(block, before) >= chosen) is_first_maximum = false;
    if (before < count && maximum(block + before, count - before) > chosen) is_first_maximum = false;
  }
};

// `id` matters where kStatistics.
template <bool kEntropy, bool kStatistics, bool kFused, class T>
RowStatistics reduce_row(const T* row, const T* next, int64_t size, float temperature, int64_t id) {
  float reference = 0;
  Exponents<kFused> exponents(reference, temperature);
  bool clamp = false;
  AsTheyAre<T> logits;
  double at_reference = 0, sum = 0, weighted = 0, squares = 0;  // of blocks: their order of summation costs no accuracy
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const T *block = row + begin, *ahead = next == nullptr ? nullptr : next + begin / 2;
    const int64_t count = size - begin < kBlock ? size - begin : kBlock;
    const bool nothing_yet = at_reference + sum == 0;
    BlockSums sums{};
    if (!nothing_yet) sums = sums_of<kEntropy, kStatistics, false>(block, ahead, count, reference, exponents, clamp);
    if (nothing_yet || sums.top > kMove) {
      const Exponents<kFused> before = exponents;
      reference = block_reference(block, count);
      exponents = Exponents<kFused>(reference, temperature);
      if (!exponents.serves()) return reduce_row<kEntropy, kStatistics, false>(row, next, size, temperature, id);
      if (!nothing_yet) {
        sum += at_reference * std::exp2(before.shift);
        weighted += at_reference * before.shift;
        squares += at_reference * std::exp2(2 * before.shift);
        const double step = before.origin - exponents.origin, factor = std::exp2(step);
        weighted = (weighted + step * sum) * factor;
        sum *= factor;
        squares *= factor * factor;
        at_reference = 0;
      }
      sums = sums_of<kEntropy, kStatistics, true>(block, ahead, count, reference, exponents, clamp);
    }
    at_reference += sums.at_reference;
    sum += sums.sum;
    weighted += sums.weighted;
    squares += sums.squares;
    if constexpr (kStatistics) logits.add(row, begin, count, id);
  }
  const double unshift = exponents.unshift();
  const RowStats stats{reference, (float)(at_reference - 1 + sum * unshift),
                       (float)((weighted - exponents.shift * sum) * unshift * kLn2)};
  return {stats, at_reference - 1 + squares * unshift * unshift, logits.sum, logits.is_first_maximum};
}

// Results that are subnormal become 0, for the lifetime of this object and in its thread. In sums next to a 1 they are
// nothing, and each costs a processor a hundred times as much as another number.
class FlushesSubnormals {
 public:
  FlushesSubnormals() {
#if defined(__SSE2__)
    before_ = _mm_getcsr();
    _mm_setcsr(before_ | 0x8000);
#endif
  }
  ~FlushesSubnormals() {
#if defined(__SSE2__)
    _mm_setcsr(before_);
#endif
  }
  FlushesSubnormals(const FlushesSubnormals&) = delete;

 private:
  unsigned before_ = 0;
};

template <class T>
RowStats reduce(const void* logits, int64_t size, float temperature, bool entropy, const void* next) {
  const FlushesSubnormals mode;
  const T *row = static_cast<const T*>(logits), *ahead = static_cast<const T*>(next);
  return entropy ? reduce_row<true, false, kFmaRoundsOnce>(row, ahead, size, temperature, 0).stats
                 : reduce_row<false, false, kFmaRoundsOnce>(row, ahead, size, temperature, 0).stats;
}

template <class T>
RowStatistics statistics(const void* logits, int64_t size, float temperature, int64_t id) {
  const T *row = static_cast<const T*>(logits), *none = nullptr;
  return reduce_row<true, true, kFmaRoundsOnce>(row, none, size, temperature, id);
}

#if defined(__AVX2__) && !defined(__AVX512BF16__)
// Writes constant * 2^t in bfloat16 with fewer instructions: the constant is moved into the exponents. False, and
// nothing is written, where they do not take it: where it costs digits, or exponents up to 64 more leave the range.
bool gradient_sweep_by_exponents(const BFloat16* row, BFloat16* grad, const BFloat16* next, int64_t size,
                                 Exponents<true> exponents, float constant, float least) {
  const double power = std::log2(std::fabs((double)constant)), exact = power - exponents.origin;
  const float minus = (float)exact;
  if (!(power > -62 && power < 62 && std::fabs(exact - minus) < 0x1p-17)) return false;
  exponents.minus = splat(minus);
  const Exp2ToBFloat16 exp2_to(constant < 0, (float)std::fmax(std::log2((double)least), -127.0));
  map_chunks(row, grad, next, size, [&](const BFloat16* from, BFloat16* to, auto target) {
    Vecs t;
    load(from, t);
    for (Vec& x : t) x = exponents(x);
    exp2_to.template store<target()>(to, t);
  });
  return true;
}
#endif

template <bool kFused, class T>
bool gradient_sweep_by_exponents(const T*, T*, const T*, int64_t, Exponents<kFused>, float, float) {
  return false;
}

// Writes constant * 2^t, 0 where that is below `least`; nan everywhere if the constant is, for AVX-512 makes
// nan * 2^-inf 0.
template <bool kFused, class T>
void gradient_sweep(const T* row, T* grad, const T* next, int64_t size, Exponents<kFused> exponents, float least_,
                    float constant) {
  if (constant != constant) {
    for (int64_t i = 0; i < size; ++i) grad[i] = from_float<T>(constant);
    return;
  }
  if (gradient_sweep_by_exponents(row, grad, next, size, exponents, constant, least_)) return;
  const Exp2Polynomial<kDegreeOfGradient<T>> times_constant(constant);
  const Vec lowest = splat(kLowest), least = splat(least_);
  map_chunks(row, grad, next, size, [&](const T* from, T* to, auto target) {
    Vecs t, e;
    load(from, t);
    for (Vec& x : t) {
      x = exponents(x);
      if constexpr (!kExp2TakesInfinity) x = max(lowest, x);
    }
    exp2(t, times_constant, e);
    for (Vec& x : e) x = without_tiny(x, least);
    store<target()>(to, e);
  });
}

// Writes (constant + slope * t) * 2^t, 0 where that is below `least`.
template <bool kFused, class T>
void gradient_sweep(const T* row, T* grad, const T* next, int64_t size, Exponents<kFused> exponents, float least_,
                    float constant_, float slope_) {
  const Exp2Polynomial<kDegreeOfGradient<T>> polynomial(1.0f);
  const Vec constant = splat(constant_), slope = splat(slope_), lowest = splat(kLowest), least = splat(least_);
  map_chunks(row, grad, next, size, [&](const T* from, T* to, auto target) {
    Vecs t, e;
    load(from, t);
    for (Vec& x : t) x = max(lowest, exponents(x));
    exp2(t, polynomial, e);
    for (int k = 0; k < kVecs; ++k) e[k] = without_tiny(e[k] * fma(slope, t[k], constant), least);
    store<target()>(to, e);
  });
}

// With p_j = e_j / (1 + rest), G the sum of grad_logprobs and E the grad of the entropy H:
//   grad x_j = (grad_logprobs at j - G p_j - E p_j (log p_j + H)) / T
// where the last two terms are e_j * (constant + slope * t_j) over the whole row. Columns whose log-prob was taken are
// computed apart, with 1 - p taken through expm1, and rounded once.
template <bool kEntropy, bool kFused, class T>
void gradient_row(const T* row, T* grad, const T* next, int64_t size, const RowStats& stats, const RowGradient& up) {
  const Exponents<kFused> exponents(stats.reference, up.temperature);
  if (!exponents.serves()) return gradient_row<kEntropy, false>(row, grad, next, size, stats, up);
  const double log_sum = std::log1p((double)stats.rest);
  const double entropy = kEntropy ? log_sum - stats.weighted / (1.0 + stats.rest) : 0.0;
  double total = 0;
  for (int64_t k = 0; k < up.num_ids; ++k) total += up.grad_logprobs[k];

  for (int64_t k = 0; k < up.num_ids; ++k) {
    if (!up.is_here(k, size)) continue;
    const double x = to_float(row[up.token_ids[k]]);
    const double logprob = (x - stats.reference) / up.temperature - log_sum;
    double value = (up.grad_at_ids[k] - total) - total * std::expm1(logprob);
    if (kEntropy && logprob != -kInfinity) value -= up.grad_entropy * std::exp(logprob) * (logprob + entropy);
    up.scratch[k] = (float)(value / up.temperature);
  }

  const double sum = stats.rest > -1 ? 1.0 + stats.rest : NAN;  // a row of -inf has no softmax
  const double normaliser = exponents.unshift() / (up.temperature * sum);
  const float least = tiny_beside((float)((std::fabs(total) + std::fabs((double)up.grad_entropy)) / up.temperature));
  if constexpr (kEntropy) {
    const double slope = -up.grad_entropy * kLn2;
    const double constant = -total - up.grad_entropy * (entropy - log_sum) - slope * exponents.shift;
    gradient_sweep(row, grad, next, size, exponents, least, (float)(normaliser * constant),
                   (float)(normaliser * slope));
  } else {
    gradient_sweep(row, grad, next, size, exponents, least, (float)(normaliser * -total));
  }
  for (int64_t k = 0; k < up.num_ids; ++k)
    if (up.is_here(k, size)) grad[up.token_ids[k]] = from_float<T>(up.scratch[k]);
}

template <class T>
void gradient(const void* logits, void* grad, int64_t size, const RowStats& stats, const RowGradient& up,
              const void* next) {
  const T* row = static_cast<const T*>(logits);
  const T* ahead = next == nullptr ? nullptr : static_cast<const T*>(next) + size / 2;
  T* out = static_cast<T*>(grad);
  if (up.grad_entropy != 0)
    gradient_row<true, kFmaRoundsOnce>(row, out, ahead, size, stats, up);
  else
    gradient_row<false, kFmaRoundsOnce>(row, out, ahead, size, stats, up);
}

template <class T>
float value(const void* logits, int64_t index) {
  return to_float(static_cast<const T*>(logits)[index]);
}

template <class T>
void scale(void* elements, int64_t size, float factor) {
  T* row = static_cast<T*>(elements);
  map_chunks<T>(row, row, nullptr, size, [&](const T* from, T* to, auto target) {
    Vecs x;
    load(from, x);
    for (Vec& v : x) v *= factor;
    store<target()>(to, x);
  });
}

// Most stretches of the row of a policy have nothing above the threshold, and are left after a comparison of maxima.
template <class T>
void mark(const void* logits, int64_t size, float threshold, uint8_t* active) {
  constexpr int64_t kStretch = 8 * kChunk;
  const T* row = static_cast<const T*>(logits);
  for (int64_t begin = 0; begin < size; begin += kStretch) {
    const int64_t end = begin + kStretch < size ? begin + kStretch : size;
    if (!(maximum(row + begin, end - begin) > threshold)) continue;
    for (int64_t i = begin; i < end; ++i) active[i] |= to_float(row[i]) > threshold;
  }
}

template <class T>
constexpr RowKernels kernels_for() {
  return {reduce<T>, statistics<T>, gradient<T>, value<T>, scale<T>, mark<T>};
}

}  // namespace

extern const RowKernelTable kRowKernels = {kernels_for<float>(), kernels_for<BFloat16>(), kernels_for<Half>()};

}  // namespace fusedpo::FUSEDPO_ISA
