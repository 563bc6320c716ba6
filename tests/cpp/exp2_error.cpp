// Prints the largest error of exp2 in vec.h, in units in the last place, over [-126, 64] with a factor of 1 and of 0.3,
// and whether its corners are right.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "cpu/vec.h"

using namespace fusedpo::FUSEDPO_ISA;

int main() {
  double worst = 0;
  const Exp2Polynomial one(1.0f), other(0.3f);
  const auto visit = [&](float low, float high, uint32_t step) {  // floats of one sign, by their bits
    for (uint32_t bits = float_to_bits(low); bits <= float_to_bits(high); bits += step * kLanes) {
      Vec t;
      for (int i = 0; i < kLanes; ++i) t[i] = bits_to_float(bits + step * i);
      for (const Exp2Polynomial& polynomial : {one, other}) {
        const Vec got = fusedpo::FUSEDPO_ISA::exp2(t, polynomial);
        for (int i = 0; i < kLanes; ++i) {
          const double want = polynomial.c[0][0] * std::exp2((double)t[i]);
          if (want < 1.2e-38) continue;
          const double ulp = std::nextafterf((float)want, INFINITY) - (float)want;
          worst = std::fmax(worst, std::fabs(got[i] - want) / ulp);
        }
      }
    }
  };
  visit(0.0f, 63.9f, 509);
  visit(-0.0f, -125.9f, 509);
  const auto value = [&](float t) { return fusedpo::FUSEDPO_ISA::exp2(splat(t), one)[0]; };
  bool corners = value(0) == 1 && value(1) == 2 && value(-1) == 0.5 && value(-200) == 0 && std::isnan(value(NAN));
  if (kExp2TakesInfinity) corners = corners && value(-INFINITY) == 0;
  std::printf("%f %d\n", worst, corners);
}
