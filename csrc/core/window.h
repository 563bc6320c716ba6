// Sums over the neighbours of each position of a sequence. Nothing is ever subtracted, so nothing cancels and a NaN
// stays in the windows that hold it. With u = 2^-24 the unit roundoff, and |x| summed over the window:
#pragma once

#include "math.h"

namespace fusedpo {

// The sum of x[1..ahead] and x[-back..-1], afresh for each token. Error at most (back + ahead - 1) u sum|x|.
template <class F>
FUSEDPO_HD F sum_of_window(const float* x, int64_t back, int64_t ahead) {
  F total = Math<F>::splat(0);
  for (int64_t k = 1; k <= ahead; ++k) total += Math<F>::load(x + k);
  for (int64_t k = 1; k <= back; ++k) total += Math<F>::load(x - k);
  return total;
}

// out[t] += x[t+1] + ... + x[t+count], or x[t-count] + ... + x[t-1] where not `ahead`, for every position t of a
// sequence: about 4 additions per position however long the window. In blocks of `count` positions from the start of
// the sequence on, a window is a suffix of one block and a prefix of the next. Both are summed in double, so the error
// is that of rounding them and of adding them: at most 2 u sum|x| where `out` was 0.
FUSEDPO_HD void add_window_sums(const float* x, float* out, int64_t length, int64_t count, bool ahead) {
  const int64_t first = ahead ? 1 : -count;  // the window of t starts at t + first
  for (int64_t begin = 0; begin < length && count > 0; begin += count) {
    double suffix = 0, prefix = 0;
    for (int64_t i = (count < length - begin ? begin + count : length) - 1; i >= begin; --i) {
      const int64_t t = i - first;
      suffix += x[i];
      if (t >= 0 && t < length) out[t] += (float)suffix;
    }
    int64_t t = begin - count - first + 1;
    if (t < 0) continue;  // no window ends in the first block and starts before it
    for (; t < begin - first && t < length; ++t) {
      const int64_t last = t + first + count - 1;
      if (last < length) prefix += x[last];
      out[t] += (float)prefix;
    }
  }
}

}  // namespace fusedpo
