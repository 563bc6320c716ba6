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

// out[t] += x[t+1] + ... + x[t+count] for every position t of a sequence, at most 3 additions per position however long
// the window. Windows of `count` positions that start in one block of that length end in the next one: each is a suffix
// of the first and a prefix of the second. Both are summed in double, so the error is that of rounding them and of
// adding them, at most 2 u sum|x|. `step` is 1, or -1 with x and out at the last position: then the window lies behind.
FUSEDPO_HD void add_window_sums(const float* x, float* out, int64_t length, int64_t count, int64_t step) {
  for (int64_t begin = 0; begin < length && count > 0; begin += count) {
    const int64_t end = count < length - begin ? begin + count : length;
    double sum = 0;
    for (int64_t i = end - 1; i >= begin && i >= 1; --i) {
      sum += x[i * step];
      out[(i - 1) * step] += (float)sum;
    }
    sum = 0;
    for (int64_t i = begin + 1; i < end && end < length; ++i) {
      const int64_t last = end + (i - begin) - 1;
      if (last < length) sum += x[last * step];
      out[(i - 1) * step] += (float)sum;
    }
  }
}

}  // namespace fusedpo
