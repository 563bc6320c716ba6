// The interface of the row kernels: reductions of one row of logits, and the gradient of one row. Free of torch.
//
// A row is reduced to (reference, rest, weighted) with e_j = exp((x_j - reference) / T): 1 + rest is the sum of e_j,
// and weighted the sum of e_j (x_j - reference) / T where the entropy is wanted. The reference is a logit of the row,
// close enough to the maximum for the sums to stay in range; its own e is the 1, so that nothing is lost beside a
// dominant logit. (A row that is -inf everywhere has rest = -1.) Everything else follows:
//   log p_y = (x_y - reference) / T - log1p(rest),   entropy = log1p(rest) - weighted / (1 + rest).
#pragma once

#include <cstdint>

namespace fusedpo {

struct RowStats {
  float reference;
  float rest;
  float weighted;
};

// Of all kinds: 1 + squares is the sum of e_j^2, sum that of the logits as they are, and the logit of one id is the
// first maximum or not.
struct RowStatistics {
  RowStats stats;
  double squares;
  double sum;
  bool is_first_maximum;
};

// What reaches the log-probs and the entropy of one row from above.
struct RowGradient {
  const int64_t* token_ids;    // [num_ids], the ids whose log-probs were taken; repeats are fine, and other columns too
  const float* grad_logprobs;  // [num_ids]
  const double* grad_at_ids;   // [num_ids], the sum of grad_logprobs over all places of that id
  float* scratch;              // [num_ids]
  int64_t num_ids;
  float grad_entropy;
  float temperature;

  // Other columns are those of other ranks.
  bool is_here(int64_t k, int64_t size) const { return token_ids[k] >= 0 && token_ids[k] < size; }
};

// The kernels of one dtype. Pointers are to elements of that dtype; `size` is V. A reduction and a gradient each fetch
// half of `next`, the row that is read after this one: memory is never idle while a core computes. It may be null.
struct RowKernels {
  // Reads the row once.
  RowStats (*reduce)(const void* logits, int64_t size, float temperature, bool entropy, const void* next);
  // As `reduce`, with the entropy and the other statistics; `id` is in [0, size).
  RowStatistics (*statistics)(const void* logits, int64_t size, float temperature, int64_t id);
  // Reads `logits` once and writes `grad` once; the two may be the same memory.
  void (*gradient)(const void* logits, void* grad, int64_t size, const RowStats&, const RowGradient&, const void* next);
  float (*value)(const void* logits, int64_t index);
  // Multiplies a row.
  void (*scale)(void* row, int64_t size, float factor);
  // Sets active[j], bytes, to 1 where logits[j] > threshold. Reads the row once; it holds no NaN.
  void (*mark)(const void* logits, int64_t size, float threshold, uint8_t* active);
};

struct RowKernelTable {
  RowKernels float32, bfloat16, float16;
};

namespace portable {
extern const RowKernelTable kRowKernels;
}
namespace avx2 {
extern const RowKernelTable kRowKernels;
}
namespace avx512 {
extern const RowKernelTable kRowKernels;
}
namespace avx512_bf16 {
extern const RowKernelTable kRowKernels;
}

}  // namespace fusedpo
