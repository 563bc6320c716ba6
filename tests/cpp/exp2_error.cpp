// Prints the largest error of exp2 in vec.h over [-126, 64] with a factor of 1 and of 0.3: in units in the last place
// at degrees 6 and 5, relative at degree 4; and whether its corners are right.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "cpu/vec.h"

using namespace fusedpo::FUSEDPO_ISA;

struct Errors {
  double ulps = 0, relative = 0;
  bool corners = true;
};

template <int kDegree>
Errors errors() {
  Errors worst;
  const Exp2Polynomial<kDegree> one(1.0f), other(0.3f);
  const auto visit = [&](float low, float high, uint32_t step) {  // floats of one sign, by their bits
    for (uint32_t bits = float_to_bits(low); bits <= float_to_bits(high); bits += step * kChunk) {
      Vecs t, got;
      for (int i = 0; i < kChunk; ++i) t[i / kLanes][i % kLanes] = bits_to_float(bits + step * i);
      for (const Exp2Polynomial<kDegree>& polynomial : {one, other}) {
        fusedpo::FUSEDPO_ISA::exp2(t, polynomial, got);
        for (int i = 0; i < kChunk; ++i) {
          const double want = polynomial.c[0][0] * std::exp2((double)t[i / kLanes][i % kLanes]);
          if (want < 1.2e-38) continue;
          const double error = std::fabs(got[i / kLanes][i % kLanes] - want);
          worst.ulps = std::fmax(worst.ulps, error / (std::nextafterf((float)want, INFINITY) - (float)want));
          worst.relative = std::fmax(worst.relative, error / want);
        }
      }
    }
  };
  visit(0.0f, 63.9f, 509);
  visit(-0.0f, -125.9f, 509);
  const auto value = [&](float x) {
    Vecs t, result;
    for (Vec& v : t) v = splat(x);
    fusedpo::FUSEDPO_ISA::exp2(t, one, result);
    return result[kVecs - 1][kLanes - 1];
  };
  worst.corners = value(0) == 1 && std::fabs(value(1) - 2) <= 1e-5 && std::fabs(value(-1) - 0.5) <= 3e-6 &&
                  value(-200) == 0 && std::isnan(value(NAN));
  if (kDegree == 6) worst.corners = worst.corners && value(1) == 2 && value(-1) == 0.5;
  if (kExp2TakesInfinity) worst.corners = worst.corners && value(-INFINITY) == 0;
  return worst;
}

int main() {
  const Errors full = errors<6>(), less = errors<5>(), half = errors<4>();
  std::printf("%f %f %g %d\n", full.ulps, less.ulps, half.relative, full.corners && less.corners && half.corners);
}
