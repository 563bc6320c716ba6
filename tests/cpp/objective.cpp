// Prints the largest errors of exp and log of cpu/vec_math.h, in units in the last place, and the largest difference,
// relative to the largest value, between the objective of single floats and that of vectors of them.
#include "core/objective.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "cpu/vec_math.h"

using namespace fusedpo;
using FUSEDPO_ISA::kLanes;
using FUSEDPO_ISA::Vec;
using M = Math<Vec>;

static double ulps(float got, double want) {
  const float nearest = (float)std::fabs(want);
  return std::fabs(got - want) / (std::nextafterf(nearest, INFINITY) - nearest);
}

static double uniform() {  // in [-1, 1)
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (double)(int64_t)state / 9223372036854775808.0;
}

// Sets a number both in a token and in a lane of a vector of tokens.
static void set(float& x, Vec& v, int lane, double value) { v[lane] = x = (float)value; }

static double worst_difference(const Objective& o) {
  double difference = 0, size = 1e-9;
  for (int round = 0; round < 50; ++round) {
    Token<float> one[kLanes];
    Token<Vec> all;
    for (int i = 0; i < kLanes; ++i) {
      const double lp = -0.1 - 2 * std::fabs(uniform());
      set(one[i].logprob, all.logprob, i, lp);
      set(one[i].old_logprob, all.old_logprob, i, std::min(lp + 0.4 * uniform(), -0.01));
      set(one[i].ref_logprob, all.ref_logprob, i, lp + uniform());
      set(one[i].advantage, all.advantage, i, 2 * uniform());
      set(one[i].is_weight, all.is_weight, i, 1 + uniform());
      set(one[i].entropy, all.entropy, i, 1 + uniform());
      set(one[i].log_trace, all.log_trace, i, uniform());
      set(one[i].place, all.place, i, 1 + i);
      set(one[i].length, all.length, i, kLanes);
      set(one[i].sequence_sum, all.sequence_sum, i, 0.3 * (1 + uniform()));
    }
    const TokenResult<Vec> together = evaluate(o, all);
    for (int i = 0; i < kLanes; ++i) {
      const TokenResult<float> alone = evaluate(o, one[i]);
      const float pairs[][2] = {{alone.loss, together.loss[i]},
                                {alone.d_logprob, together.d_logprob[i]},
                                {alone.d_log_trace, together.d_log_trace[i]},
                                {alone.kl, together.kl[i]},
                                {summand(o, one[i]), summand(o, all)[i]}};
      for (const auto& pair : pairs) {
        difference = std::max(difference, (double)std::fabs(pair[0] - pair[1]));
        size = std::max(size, (double)std::fabs(pair[0]));
        if (!(std::fabs(pair[0] - pair[1]) < INFINITY)) return INFINITY;
      }
    }
  }
  return difference / size;
}

int main() {
  double exp_error = 0, log_error = 0, difference = 0;
  for (int i = 0; i < 200000; ++i) {
    const float x = (float)(i % 2 ? uniform() : 87 * uniform());
    exp_error = std::max(exp_error, ulps(M::exp(M::splat(x))[0], std::exp((double)x)));
    const float y = (float)std::exp(i % 2 ? 0.5 * uniform() : 80 * uniform());
    if (y != 1) log_error = std::max(log_error, ulps(M::log(M::splat(y))[0], std::log((double)y)));
  }
  const auto at = [](float x) { return M::exp(M::splat(x))[0]; };
  const auto log_at = [](float x) { return M::log(M::splat(x))[0]; };
  const bool corners = at(0) == 1 && at(-INFINITY) == 0 && at(INFINITY) == INFINITY && std::isnan(at(NAN)) &&
                       at(-200) == 0 && at(89) == INFINITY && log_at(1) == 0 && log_at(0) == -INFINITY &&
                       std::isnan(log_at(-1)) && std::isnan(log_at(NAN));

  const Ratio ratios[] = {kTokenRatio, kSequenceRatio, kTrace, kOnPolicy};
  for (const Ratio ratio : ratios)
    for (int region = 0; region < kNumTrustRegions; ++region)
      for (int kl = 0; kl < kNumKLs + kWeighted; ++kl) {
        const int64_t parts[kNumParts] = {ratio, 0, 2, ratio == kTrace && kl % 2, region, kl, kTokenMean};
        const double values[] = {0.3, 2.0, 0.1, 0, 0.2, 0.3, 1.5, 0.9, 1};
        difference = std::max(difference, worst_difference(decode(parts, values, kNumValues + kMaxBounds)));
      }
  std::printf("%f %f %g %d\n", exp_error, log_error, difference, corners);
}
