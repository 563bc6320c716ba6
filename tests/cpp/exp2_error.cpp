// Prints the largest error of exp2 in vec.h, in units in the last place, over [-126, 64], and whether its corners are right.
#include <cmath>
#include <cstdint>
#include <cstdio>

#include "cpu/vec.h"

using namespace fusedpo::FUSEDPO_ISA;

int main() {
  double worst = 0;
  const auto visit = [&](float low, float high, uint32_t step) {  // floats of one sign, by their bits
    for (uint32_t bits = float_to_bits(low); bits <= float_to_bits(high); bits += step * kLanes) {
      Vec t;
      for (int i = 0; i < kLanes; ++i) t[i] = bits_to_float(bits + step * i);
      const Vec got = fusedpo::FUSEDPO_ISA::exp2(t);
      for (int i = 0; i < kLanes; ++i) {
        const double want = std::exp2((double)t[i]);
        const double ulp = std::nextafterf((float)want, INFINITY) - (float)want;
        worst = std::fmax(worst, std::fabs(got[i] - want) / ulp);
      }
    }
  };
  visit(0.0f, 63.9f, 509);
  visit(-0.0f, -125.9f, 509);
  const bool corners = fusedpo::FUSEDPO_ISA::exp2(splat(0.0f))[0] == 1.0f && fusedpo::FUSEDPO_ISA::exp2(splat(-200.0f))[0] == 0.0f &&
                       std::isnan(fusedpo::FUSEDPO_ISA::exp2(splat(NAN))[0]);
  std::printf("%f %d\n", worst, corners);
}
