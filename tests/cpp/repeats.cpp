// How many comparisons of ids sum_over_equal makes, for one id, few and many of them: one line for each number.
#include "cpu/repeats.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

int64_t comparisons = 0;

struct Id {
  int64_t value;
  bool operator<(const Id& other) const { return ++comparisons, value < other.value; }
  bool operator==(const Id& other) const { return ++comparisons, value == other.value; }
};

}  // namespace

int main() {
  for (const int64_t count : {1, 2, 100, 32000}) {
    for (const int64_t distinct : {int64_t(1), int64_t(7), count}) {
      std::vector<Id> ids(count);
      std::vector<float> x(count, 1);
      std::vector<int64_t> order(count), times(distinct, 0);
      std::vector<double> sums(count);
      for (int64_t k = 0; k < count; ++k) ++times[(ids[k].value = k * 7919 % distinct)];
      comparisons = 0;
      fusedpo::cpu::sum_over_equal(ids.data(), x.data(), count, order.data(), sums.data());
      std::printf("%ld %ld\n", (long)count, (long)comparisons);
      for (int64_t k = 0; k < count; ++k)
        if (sums[k] != (double)times[ids[k].value]) std::abort();
    }
  }
}
