// What is summed over the kept tokens of a batch, and the metrics that come of it.
#pragma once

#include "objective.h"

namespace fusedpo {

enum Sum {
  kLoss,
  kTokens,
  kClippedLow,
  kClippedHigh,
  kRatioSum,
  kTraceSum,
  kLogRatioSum,
  kK3Sum,
  kKLSum,
  kEntropySum,
  kWeightSum,  // of ratio * trace: at most e^40, so that not even the square overflows
  kSquaredWeightSum,
  kClampedSum,
  kNumSums
};
enum Largest { kRatioMax, kMinusRatioMax, kTraceMax, kMinusTraceMax, kNumLargest };

template <class F>
struct Statistics {
  F sum[kNumSums];
  F largest[kNumLargest];
};

template <class F>
FUSEDPO_HD Statistics<F> no_statistics(F zero, F minus_infinity) {
  Statistics<F> s;
  for (int i = 0; i < kNumSums; ++i) s.sum[i] = zero;
  for (int i = 0; i < kNumLargest; ++i) s.largest[i] = minus_infinity;
  return s;
}

// NaN wins, as in torch.amax.
template <class F>
FUSEDPO_HD F larger(F a, F b) {
  return (b > a) | (b != b) ? b : a;
}

template <class F>
FUSEDPO_HD void add_token(Statistics<F>& s, const TokenResult<F>& result, F entropy, Mask<F> kept) {
  using M = Math<F>;
  const F zero = M::splat(0), one = M::splat(1);
  const Weight<F>& w = result.weight;
  const F weight = w.ratio * w.trace;
  const F values[kNumSums] = {result.loss,
                              one,
                              result.low ? one : zero,
                              result.high ? one : zero,
                              w.ratio,
                              w.trace,
                              w.log_ratio,
                              exp_minus_1_minus(w.log_ratio, w.own_ratio),
                              result.kl,
                              entropy,
                              weight,
                              weight * weight,
                              w.clamped ? one : zero};
  for (int i = 0; i < kNumSums; ++i) s.sum[i] += kept ? values[i] : zero;
  const F largest[kNumLargest] = {w.ratio, -w.ratio, w.trace, -w.trace};
  for (int i = 0; i < kNumLargest; ++i) s.largest[i] = larger(s.largest[i], kept ? largest[i] : s.largest[i]);
}

template <class F>
FUSEDPO_HD void add(Statistics<F>& s, const Statistics<F>& other) {
  for (int i = 0; i < kNumSums; ++i) s.sum[i] += other.sum[i];
  for (int i = 0; i < kNumLargest; ++i) s.largest[i] = larger(s.largest[i], other.largest[i]);
}

constexpr int kNumMetrics = 16;

// In the order of METRICS in python/fusedpo/reference/losses.py; all 0 where no token is kept.
FUSEDPO_HD void write_metrics(const Statistics<double>& s, float* out) {
  const double tokens = s.sum[kTokens], squares = tokens * s.sum[kSquaredWeightSum];
  const auto mean = [&](Sum i) { return (float)(tokens > 0 ? s.sum[i] / tokens : 0.0); };
  const auto largest = [&](Largest i) { return (float)(tokens > 0 ? s.largest[i] : 0.0); };
  const float low = mean(kClippedLow), high = mean(kClippedHigh);
  const float metrics[kNumMetrics] = {(float)tokens,
                                      low + high,
                                      low,
                                      high,
                                      mean(kRatioSum),
                                      -largest(kMinusRatioMax),
                                      largest(kRatioMax),
                                      mean(kTraceSum),
                                      -largest(kMinusTraceMax),
                                      largest(kTraceMax),
                                      -mean(kLogRatioSum),
                                      mean(kK3Sum),
                                      mean(kKLSum),
                                      mean(kEntropySum),
                                      (float)(tokens > 0 ? s.sum[kWeightSum] * s.sum[kWeightSum] / squares : 0.0),
                                      mean(kClampedSum)};
  for (int i = 0; i < kNumMetrics; ++i) out[i] = metrics[i];
}

}  // namespace fusedpo
