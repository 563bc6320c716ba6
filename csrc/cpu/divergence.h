// The interface of the kernels of two rows: the KL divergence between their distributions, and its gradient. Free of
// torch.
#pragma once

#include <cstdint>

namespace fusedpo {

// log2 of a probability is (x - reference) * scale - log_sum, with log_sum = log2(sum of 2^((x - reference) * scale)).
// What the float log_sum lacks of the exact one is `lack`.
struct LogProbs {
  float reference, scale, log_sum, lack;
};

// Of one dtype; `size` is V.
struct DivergenceKernels {
  // The sum of p (log2 p - log2 q), p from x, q from y; reads both rows once. Columns where p is 0 add nothing.
  double (*divergence)(const void* x, const void* y, int64_t size, LogProbs p, LogProbs q);
  // Writes constant * p * (log2 p - log2 q - divergence); `grad` may be x.
  void (*of_reverse)(const void* x, const void* y, void* grad, int64_t size, LogProbs p, LogProbs q, float divergence,
                     float constant);
  // Writes constant * (p - q); `grad` may be x.
  void (*of_forward)(const void* x, const void* y, void* grad, int64_t size, LogProbs p, LogProbs q, float constant);
};

struct DivergenceKernelTable {
  DivergenceKernels float32, bfloat16, float16;
};

namespace portable {
extern const DivergenceKernelTable kDivergenceKernels;
}
namespace avx2 {
extern const DivergenceKernelTable kDivergenceKernels;
}
namespace avx512 {
extern const DivergenceKernelTable kDivergenceKernels;
}
namespace avx512_bf16 {
extern const DivergenceKernelTable kDivergenceKernels;
}

}  // namespace fusedpo
