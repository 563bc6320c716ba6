// Sums over equal ids. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fusedpo::cpu {

// out[k]: the sum of x[l] over all l with ids[l] == ids[k], in the order of l. About count log2(count) comparisons;
// `order` has room for `count` numbers.
template <class Id>
void sum_over_equal(const Id* ids, const float* x, int64_t count, int64_t* order, double* out) {
  for (int64_t k = 0; k < count; ++k) order[k] = k;
  std::sort(order, order + count, [&](int64_t a, int64_t b) { return ids[a] < ids[b] || (ids[a] == ids[b] && a < b); });
  for (int64_t first = 0, last = 0; first < count; first = last) {
    double sum = 0;
    for (; last < count && ids[order[last]] == ids[order[first]]; ++last) sum += x[order[last]];
    for (int64_t i = first; i < last; ++i) out[order[i]] = sum;
  }
}

}  // namespace fusedpo::cpu
