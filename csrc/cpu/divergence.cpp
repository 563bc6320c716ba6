// Sweeps over two rows of logits. Compiled once per instruction set; see divergence.h for the contract, vec.h for the
// rest.
//
// Bytes: divergence reads 2 V elements, a gradient reads 2 V and writes V. Both rows stay in the cache between the
// reductions before (row_kernels.h) and these sweeps. The order of the sum depends on V and the instruction set alone.

#include "divergence.h"

#include "vec.h"

namespace fusedpo::FUSEDPO_ISA {
namespace {

constexpr float kLowest = -200.0f;       // 2^-200 is 0; what is below, -inf too, is moved here
constexpr int64_t kBlock = 64 * kChunk;  // summed in float32, then in float64

template <class T>
constexpr int kDegree = sizeof(T) == 4 ? 6 : 5;

// Copies of the last, incomplete chunks of two rows; the missing elements are -inf, of probability 0.
template <class T>
struct Tails {
  T x[kChunk], y[kChunk];

  Tails(const T* x_, const T* y_, int64_t count) {
    const T filler = from_float<T>(-__builtin_inff());
    for (int64_t i = 0; i < kChunk; ++i) {
      x[i] = i < count ? x_[i] : filler;
      y[i] = i < count ? y_[i] : filler;
    }
  }
};

FUSEDPO_INLINE Vec log2_of(Vec x, const LogProbs& p) {
  return fma(x - splat(p.reference), splat(p.scale), splat(-p.log_sum));
}

// Probabilities, and a - b where they are not 0; there both logarithms may be -inf.
template <int kDegree>
FUSEDPO_INLINE void terms(const Vecs& x, const Vecs& y, const LogProbs& p, const LogProbs& q,
                          const Exp2Polynomial<kDegree>& polynomial, Vecs& probability, Vecs& difference) {
  Vecs a;
  const Vec lowest = splat(kLowest), zero{};
  for (int k = 0; k < kVecs; ++k) {
    a[k] = max(lowest, log2_of(x[k], p));
    difference[k] = a[k] - log2_of(y[k], q);
  }
  exp2(a, polynomial, probability);
  for (int k = 0; k < kVecs; ++k) difference[k] = probability[k] == zero ? zero : difference[k];
}

template <class T>
double divergence(const void* x_, const void* y_, int64_t size, LogProbs p, LogProbs q) {
  const T *x = static_cast<const T*>(x_), *y = static_cast<const T*>(y_);
  const Exp2Polynomial<kDegree<T>> polynomial(1.0f);
  double total = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = size - begin < kBlock ? size : begin + kBlock;
    Vec sum[2]{};
    const auto add = [&](const T* from_x, const T* from_y) {
      Vecs u, v, probability, difference;
      load(from_x, u);
      load(from_y, v);
      terms(u, v, p, q, polynomial, probability, difference);
      for (int k = 0; k < kVecs; ++k) sum[k % 2] = fma(probability[k], difference[k], sum[k % 2]);
    };
    int64_t i = begin;
    for (; i + kChunk <= end; i += kChunk) add(x + i, y + i);
    if (i < end) {
      const Tails<T> tails(x + i, y + i, end - i);
      add(tails.x, tails.y);
    }
    total += reduce_add(sum[0] + sum[1]);
  }
  return total - p.lack + q.lack;
}

// Calls step(chunk of x, chunk of y, result) for every chunk of the rows.
template <class T, class Step>
FUSEDPO_INLINE void map_chunks(const T* x, const T* y, T* to, int64_t size, Step step) {
  int64_t i = 0;
  for (; i + kChunk <= size; i += kChunk) step(x + i, y + i, to + i);
  if (i < size) {
    Tails<T> tails(x + i, y + i, size - i);
    step(tails.x, tails.y, tails.x);
    std::memcpy(to + i, tails.x, (size - i) * sizeof(T));
  }
}

template <class T>
void of_reverse(const void* x, const void* y, void* grad, int64_t size, LogProbs p, LogProbs q, float divergence,
                float constant_) {
  const Exp2Polynomial<kDegree<T>> polynomial(1.0f);
  const Vec mean = splat(divergence + (p.lack - q.lack)), constant = splat(constant_);
  const Vec least = splat(tiny_beside(constant_));
  map_chunks(static_cast<const T*>(x), static_cast<const T*>(y), static_cast<T*>(grad), size,
             [&](const T* from_x, const T* from_y, T* to) {
               Vecs u, v, probability, difference;
               load(from_x, u);
               load(from_y, v);
               terms(u, v, p, q, polynomial, probability, difference);
               for (int k = 0; k < kVecs; ++k)
                 u[k] = without_tiny(constant * probability[k] * (difference[k] - mean), least);
               store(to, u);
             });
}

template <class T>
void of_forward(const void* x, const void* y, void* grad, int64_t size, LogProbs p, LogProbs q, float constant_) {
  const Exp2Polynomial<kDegree<T>> polynomial(1.0f);
  const Vec constant = splat(constant_), lowest = splat(kLowest), least = splat(tiny_beside(constant_));
  map_chunks(static_cast<const T*>(x), static_cast<const T*>(y), static_cast<T*>(grad), size,
             [&](const T* from_x, const T* from_y, T* to) {
               Vecs u, v, a, b;
               load(from_x, u);
               load(from_y, v);
               for (int k = 0; k < kVecs; ++k) {
                 u[k] = max(lowest, log2_of(u[k], p));
                 v[k] = max(lowest, log2_of(v[k], q));
               }
               exp2(u, polynomial, a);
               exp2(v, polynomial, b);
               for (int k = 0; k < kVecs; ++k) a[k] = without_tiny(constant * (a[k] - b[k]), least);
               store(to, a);
             });
}

template <class T>
constexpr DivergenceKernels kernels_for() {
  return {divergence<T>, of_reverse<T>, of_forward<T>};
}

}  // namespace

extern const DivergenceKernelTable kDivergenceKernels = {kernels_for<float>(), kernels_for<BFloat16>(),
                                                         kernels_for<Half>()};

}  // namespace fusedpo::FUSEDPO_ISA
