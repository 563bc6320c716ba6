// The policy objective of one token, in four steps: log-ratio -> ratio and trace -> term -> coefficient. It mirrors
// python/fusedpo/reference/losses.py, function by function, with derivatives. Free of torch and of containers; F is a
// float or a vector of floats (math.h).
#pragma once

#include "math.h"

namespace fusedpo {

constexpr float kLogRatioClamp = 20.0f;
constexpr float kLargest = 3.402823466e38f;
constexpr float kSequenceLogRatioMax = 10.0f;
constexpr float kVespoLogWeightMin = -18.420681f;  // log(1e-8)

// ------------------------------------------------------------------------------------------------------- the objective

// The numbers of ratios and trust regions are those of _RATIOS and _TRUST_REGIONS in python/fusedpo/ops/policy_loss.py.

enum Ratio : int32_t { kTokenRatio, kSequenceRatio, kTrace, kOnPolicy };
enum TrustRegion : int32_t {
  kNoTrustRegion,
  kPPOClip,
  kLogClip,
  kCISPO,
  kBinaryTV,
  kBinaryKL,
  kCPPO,
  kSAPO,
  kVESPO,
  kGMPO,
  kDRO
};
enum KL : int32_t { kNoKL, kK1, kK2, kK3, kK3Plus };  // and kK3Plus more where it is weighted
enum Aggregation : int32_t { kTokenMean, kTokenSum, kSeqMeanTokenMean, kSeqMeanTokenSum, kSeqMeanTokenSumNorm };

constexpr int kMaxBounds = 5;

struct Objective {
  Ratio ratio;
  int64_t back, ahead;  // the window of kTrace
  bool differentiate;
  TrustRegion trust_region;
  KL kl;
  bool kl_weighted;
  Aggregation aggregation;
  float kl_coef, kl_clamp, entropy_coef;
  float length_norm;         // 0: the longest sequence
  float bounds[kMaxBounds];  // the fields of the trust region's dataclass, in their order; infinity for None
};

constexpr int kNumParts = 7, kNumValues = 4;

// The largest float32 stands for infinity, which AOTInductor cannot write.
FUSEDPO_HD float to_float(double value) { return value >= 0x1.fffffep127 ? kInfinity : (float)value; }

// `parts` holds kNumParts numbers, `values` kNumValues and then up to kMaxBounds bounds.
FUSEDPO_HD Objective decode(const int64_t* parts, const double* values, int64_t num_values) {
  Objective o{};
  o.ratio = (Ratio)parts[0];
  o.back = parts[1];
  o.ahead = parts[2];
  o.differentiate = parts[3] != 0;
  o.trust_region = (TrustRegion)parts[4];
  o.kl_weighted = parts[5] > kK3Plus;
  o.kl = (KL)(o.kl_weighted ? parts[5] - kK3Plus : parts[5]);
  o.aggregation = (Aggregation)parts[6];
  o.kl_coef = (float)values[0];
  o.kl_clamp = to_float(values[1]);
  o.entropy_coef = (float)values[2];
  o.length_norm = (float)values[3];
  for (int64_t i = kNumValues; i < num_values; ++i) o.bounds[i - kNumValues] = to_float(values[i]);
  return o;
}

// What the trust region needs to know of the sequence beside the token.
FUSEDPO_HD bool needs_place(const Objective& o) { return o.trust_region == kLogClip || o.trust_region == kCPPO; }
FUSEDPO_HD bool needs_mean(const Objective& o) { return o.trust_region == kGMPO; }
FUSEDPO_HD bool needs_prefix(const Objective& o) { return o.trust_region == kCPPO; }

// ----------------------------------------------------------------------------------------------------------- one token

// A masked token is all zeros but for `place`, `length` and what is known of its sequence.
template <class F>
struct Token {
  F logprob, old_logprob, ref_logprob, advantage, is_weight, entropy;
  F log_trace;     // kTrace: sum of the log-ratios in the window; kSequenceRatio: their mean over the kept tokens
  F place;         // needs_place: which of the kept tokens of its sequence this is, from 1
  F length;        // how many they are, at least 1
  F sequence_sum;  // of `summand`. needs_mean: mean over the kept tokens; needs_prefix: sum up to this token
};

// The ratio with its forward trace; `live` where no clamp stops the gradient.
template <class F>
struct Weight {
  F log_ratio, own_ratio;  // of the token, clamped; and its exponential
  F ratio, trace;
  F log_of_ratio, log_weight;                // log(ratio), log(ratio * trace)
  Mask<F> own_live, ratio_live, trace_live;  // where no clamp of log_ratio, of the sequence's ratio, of the trace acts
  Mask<F> clamped;
};

// The policy term and its derivatives. `low` and `high`: the lower or the upper bound cut the gradient (or the weight).
template <class F>
struct Term {
  F loss;
  F d_log_ratio;
  F d_logprob;  // beside the way through the log-ratio
  Mask<F> low, high;
};

// d_logprob is the gradient coefficient of the token: what its row of logits needs to know. What reaches a log-prob
// through the traces of its neighbours is the adjoint of the window sum, applied to their d_log_trace.
template <class F>
struct TokenResult {
  F loss, d_logprob, d_log_trace;
  Weight<F> weight;
  F kl;
  Mask<F> low, high;
};

template <class F>
FUSEDPO_HD F log_ratio(F logprob, F old_logprob) {
  return clamp(logprob - old_logprob, -kLogRatioClamp, kLogRatioClamp);
}

template <class F>
FUSEDPO_HD Mask<F> log_ratio_live(F logprob, F old_logprob) {
  return absolute(logprob - old_logprob) <= kLogRatioClamp;
}

// ----------------------------------------------------------------------------------------------------- ratio and trace

template <class F>
FUSEDPO_HD Weight<F> weight_of(const Objective& o, const Token<F>& x) {
  using M = Math<F>;
  const F own = log_ratio(x.logprob, x.old_logprob);
  Weight<F> w;
  w.log_ratio = own;
  w.ratio = w.own_ratio = M::exp(own);
  w.own_live = log_ratio_live(x.logprob, x.old_logprob);
  w.ratio_live = w.trace_live = own == own;
  w.clamped = absolute(x.logprob - x.old_logprob) > kLogRatioClamp;
  w.trace = M::splat(1);
  w.log_of_ratio = w.log_weight = own;
  if (o.ratio == kSequenceRatio) {
    const F log_s = own - own + x.log_trace;  // NaN where the token's own ratio is
    w.log_of_ratio = w.log_weight = log_s > kSequenceLogRatioMax ? M::splat(kSequenceLogRatioMax) : log_s;
    w.ratio = M::exp(w.log_weight);
    w.ratio_live = log_s <= kSequenceLogRatioMax;
    w.clamped = w.clamped | (log_s > kSequenceLogRatioMax);
  }
  if (o.ratio == kTrace) {
    const F log_trace = clamp(x.log_trace, -kLogRatioClamp, kLogRatioClamp);
    w.trace = M::exp(log_trace);
    w.trace_live = absolute(x.log_trace) <= kLogRatioClamp;
    w.clamped = w.clamped | (absolute(x.log_trace) > kLogRatioClamp);
    w.log_weight = own + log_trace;
  }
  return w;
}

// ------------------------------------------------------------------------------------------------------- trust regions

// Their argument p holds the fields of the dataclass of the same name, in their order.

// A token that is cut has no gradient.
template <class F>
FUSEDPO_HD Term<F> through_ratio(const Weight<F>& w, F loss, F d_log_ratio, Mask<F> low, Mask<F> high) {
  const F zero = Math<F>::splat(0);
  return {loss, low | high | !w.ratio_live ? zero : d_log_ratio, zero, low, high};
}

// -A * weight * lp with the weight detached.
template <class F>
FUSEDPO_HD Term<F> through_logprob(const Token<F>& x, F weight, Mask<F> low, Mask<F> high) {
  const F coefficient = -x.advantage * weight;
  return {times(coefficient, x.logprob), Math<F>::splat(0), coefficient, low, high};
}

template <class F>
FUSEDPO_HD Term<F> no_trust_region(const Token<F>& x, const Weight<F>& w) {
  const F loss = -x.advantage * w.ratio * w.trace;
  return through_ratio(w, loss, loss, Mask<F>{}, Mask<F>{});
}

// PPO's pessimistic clip of `ratio` to [lower, upper], and to `dual` where A < 0; the loss is multiplied by `weight`.
// At a tie the gradient is that of -A ratio.
template <class F>
FUSEDPO_HD Term<F> clip(const Weight<F>& w, F advantage, F ratio, F weight, F lower, F upper, F dual) {
  const Mask<F> low = (advantage < 0.0f) & (ratio < lower);
  Mask<F> high = (advantage > 0.0f) & (ratio > upper);
  F clipped = low ? lower : high ? upper : ratio;
  const Mask<F> dual_clipped = (advantage < 0.0f) & (clipped > dual);
  clipped = dual_clipped ? dual : clipped;
  high = high | dual_clipped;
  return through_ratio(w, -advantage * clipped * weight, -advantage * ratio * weight, low, high);
}

template <class F>
FUSEDPO_HD Term<F> ppo_clip(const float* p, const Token<F>& x, const Weight<F>& w) {
  using M = Math<F>;
  const float low = p[0], high = p[1], dual = p[2], cap = p[3];
  const bool on_product = p[4] != 0;
  const F most = cap / w.ratio;
  const F trace = w.trace > most ? most : w.trace;
  return clip(w, x.advantage, on_product ? w.ratio * trace : w.ratio, on_product ? M::splat(1) : trace,
              M::splat(1 - low), M::splat(1 + high), M::splat(dual));
}

template <class F>
FUSEDPO_HD Term<F> log_clip(const float* p, const Token<F>& x, const Weight<F>& w) {
  using M = Math<F>;
  const F low = M::splat(p[0]), high = M::splat(p[1]), dual = M::splat(p[2]), power = M::splat(p[3]);
  const F scale = M::exp(power * M::log(x.place));  // 0 or infinite for a large power
  return clip(w, x.advantage, w.ratio * w.trace, M::splat(1), M::exp(-times(low, scale)), M::exp(times(high, scale)),
              M::exp(dual == kInfinity ? dual : times(dual, scale)));
}

template <class F>
FUSEDPO_HD Term<F> cispo(const float* p, const Token<F>& x, const Weight<F>& w) {
  const float lower = 1 - p[0], upper = 1 + p[1];
  const Mask<F> low = w.ratio < lower;
  const Mask<F> high = w.ratio > upper;
  return through_logprob(x, clamp(w.ratio, lower, upper) * w.trace, low, high);
}

// Drops a token with A > 0 where it is too high, another one where it is too low.
template <class F>
FUSEDPO_HD Term<F> binary(float cap, const Token<F>& x, const Weight<F>& w, Mask<F> too_low, Mask<F> too_high) {
  using M = Math<F>;
  const Mask<F> positive = x.advantage > 0.0f;
  const Mask<F> low = (!positive) & too_low, high = positive & too_high;
  const F weight = w.ratio * w.trace;
  Term<F> term = through_logprob(x, weight > cap ? M::splat(cap) : weight, low, high);
  term.loss = low | high ? M::splat(0) : term.loss;
  term.d_logprob = low | high ? M::splat(0) : term.d_logprob;
  return term;
}

template <class F>
FUSEDPO_HD Term<F> binary_tv(const float* p, const Token<F>& x, const Weight<F>& w) {
  const float low = p[0], high = p[1], cap = p[2];
  const F moved = Math<F>::exp(x.logprob) - Math<F>::exp(x.old_logprob);
  const Mask<F> too_low = moved < -low;
  const Mask<F> too_high = moved > high;
  return binary(cap, x, w, too_low, too_high);
}

template <class F>
FUSEDPO_HD Term<F> binary_kl(const float* p, const Token<F>& x, const Weight<F>& w) {
  using M = Math<F>;
  const float low = p[0], high = p[1], cap = p[2];
  const F now = M::exp(x.logprob), old = M::exp(x.old_logprob);
  const F other_now = clamp(-exp_minus_1(x.logprob, now), 0.0f, 1.0f);  // 1 - p has no digits left where p is near 1
  const F other_old = clamp(-exp_minus_1(x.old_logprob, old), 0.0f, 1.0f);
  const F moved = clamp(x.old_logprob - x.logprob, -kLogRatioClamp, kLargest);  // infinite where one of them is 0
  const F divergence = old * moved + other_old * M::log((other_old + 1e-8f) / (other_now + 1e-8f));
  return binary<F>(cap, x, w, (divergence > low) & (now < old), (divergence > high) & (now > old));
}

// The weighted divergence that CPPO sums.
template <class F>
struct CPPOWeight {
  F slope, divergence;
};

template <class F>
FUSEDPO_HD CPPOWeight<F> cppo_weight(const float* p, const Token<F>& x) {
  const float min_weight = p[2];
  const F rest = x.length - 1.0f;
  const F slope = (1 - min_weight) / (rest < 1.0f ? Math<F>::splat(1) : rest);
  const F moved = Math<F>::exp(x.logprob) - Math<F>::exp(x.old_logprob);
  return {slope, (1.0f - slope * (x.place - 1.0f)) * absolute(moved)};
}

template <class F>
FUSEDPO_HD Term<F> cppo(const float* p, const Token<F>& x, const Weight<F>& w) {
  const float threshold = p[0], budget = p[1];
  const CPPOWeight<F> own = cppo_weight(p, x);
  const F before = x.place - 1.0f;
  const F weight_before = before - own.slope * before * (before - 1.0f) * 0.5f;
  const Mask<F> outside = (own.divergence > threshold) | (x.sequence_sum > threshold + budget * weight_before);
  const Mask<F> low = (x.advantage < 0.0f) & (w.ratio < 1.0f) & outside;
  const Mask<F> high = (x.advantage > 0.0f) & (w.ratio > 1.0f) & outside;
  const F loss = -x.advantage * w.ratio * w.trace;
  return through_ratio(w, low | high ? Math<F>::splat(0) : loss, loss, low, high);
}

template <class F>
FUSEDPO_HD Term<F> sapo(const float* p, const Token<F>& x, const Weight<F>& w) {
  using M = Math<F>;
  const F tau = x.advantage > 0.0f ? M::splat(p[0]) : M::splat(p[1]);
  const F z = tau * exp_minus_1(w.log_of_ratio, w.ratio);
  const F decay = M::exp(-absolute(z)), inverse = 1.0f / (1.0f + decay);  // decay is at most 1
  const F gate = z < 0.0f ? decay * inverse : inverse;
  const F loss = -x.advantage * (4.0f / tau) * gate * w.trace;
  const F d_log_ratio = -x.advantage * 4.0f * (decay * inverse * inverse) * w.ratio * w.trace;
  return through_ratio(w, loss, d_log_ratio, Mask<F>{}, Mask<F>{});
}

template <class F>
FUSEDPO_HD Term<F> vespo(const float* p, const Token<F>& x, const Weight<F>& w) {
  using M = Math<F>;
  const Mask<F> negative = x.advantage < 0.0f;
  const F k = negative ? M::splat(p[2]) : M::splat(p[0]);
  const F lambda = negative ? M::splat(p[3]) : M::splat(p[1]);
  const F log_weight = clamp(w.log_weight, kVespoLogWeightMin, kLogRatioClamp);
  const F exp_weight = M::exp(log_weight);
  // near 1 the two terms nearly cancel where k is near lambda
  const F near = (k - lambda) * log_weight - lambda * exp_minus_1_minus(log_weight, exp_weight);
  const F far = k * log_weight - lambda * (exp_weight - 1.0f);
  const F log_phi = absolute(log_weight) < 1.0f ? near : far;
  return through_logprob(x, M::exp(clamp(log_phi, -kInfinity, kLogRatioClamp)), Mask<F>{}, Mask<F>{});
}

template <class F>
FUSEDPO_HD Mask<F> gmpo_low(const float* p, const Token<F>& x, F log_ratio) {
  return (x.advantage < 0.0f) & (log_ratio < -p[0]);
}

template <class F>
FUSEDPO_HD Mask<F> gmpo_high(const float* p, const Token<F>& x, F log_ratio) {
  return (x.advantage > 0.0f) & (log_ratio > p[1]);
}

template <class F>
FUSEDPO_HD Term<F> gmpo(const float* p, const Token<F>& x, const Weight<F>& w) {
  const F zero = Math<F>::splat(0), loss = -x.advantage * Math<F>::exp(w.log_ratio - w.log_ratio + x.sequence_sum);
  const Mask<F> low = gmpo_low(p, x, w.log_ratio), high = gmpo_high(p, x, w.log_ratio);
  return {loss, low | high ? zero : loss, zero, low, high};
}

template <class F>
FUSEDPO_HD Term<F> dro(const float* p, const Token<F>& x, const Weight<F>&) {
  const float beta = p[0];
  const F moved = x.logprob - x.old_logprob;
  Term<F> term = through_logprob(x, Math<F>::splat(1), Mask<F>{}, Mask<F>{});
  term.loss += beta / 2 * moved * moved;
  term.d_logprob += beta * moved;
  return term;
}

// What the trust region sums over a sequence, 0 at masked tokens.
template <class F>
FUSEDPO_HD F summand(const Objective& o, const Token<F>& x) {
  const float* p = o.bounds;
  if (o.trust_region == kCPPO) return cppo_weight(p, x).divergence;
  const F own = log_ratio(x.logprob, x.old_logprob);
  return gmpo_low(p, x, own) ? Math<F>::splat(-p[0]) : gmpo_high(p, x, own) ? Math<F>::splat(p[1]) : own;
}

template <class F>
FUSEDPO_HD Term<F> trust_region(const Objective& o, const Token<F>& x, const Weight<F>& w) {
  const float* p = o.bounds;
  switch (o.trust_region) {
    case kPPOClip:
      return ppo_clip(p, x, w);
    case kLogClip:
      return log_clip(p, x, w);
    case kCISPO:
      return cispo(p, x, w);
    case kBinaryTV:
      return binary_tv(p, x, w);
    case kBinaryKL:
      return binary_kl(p, x, w);
    case kCPPO:
      return cppo(p, x, w);
    case kSAPO:
      return sapo(p, x, w);
    case kVESPO:
      return vespo(p, x, w);
    case kGMPO:
      return gmpo(p, x, w);
    case kDRO:
      return dro(p, x, w);
    case kNoTrustRegion:
      break;
  }
  return o.ratio == kOnPolicy ? through_logprob(x, Math<F>::splat(1), Mask<F>{}, Mask<F>{}) : no_trust_region(x, w);
}

// ------------------------------------------------------------------------------------------------------------------ KL

// The estimate, its derivative, and the sum of both: the derivative of exp(lp) times the estimate, over exp(lp).
template <class F>
struct KLValue {
  F value, d_logprob, d_weighted;
};

template <class F>
FUSEDPO_HD KLValue<F> kl_of(const Objective& o, F d) {
  using M = Math<F>;
  KLValue<F> kl{M::splat(0), M::splat(0), M::splat(0)};
  if (o.kl == kNoKL) return kl;
  if (o.kl == kK1) {
    kl = {d, M::splat(1), 1.0f + d};
  } else if (o.kl == kK2) {
    kl = {d * d * 0.5f, d, d * (1.0f + d * 0.5f)};
  } else {
    const F x = clamp(-d, -kLogRatioClamp, kLogRatioClamp), exp_x = M::exp(x);
    const F k3 = exp_minus_1_minus(x, exp_x);
    const Mask<F> live = absolute(d) <= kLogRatioClamp;
    if (o.kl == kK3) {
      kl = {k3, live ? -exp_minus_1(x, exp_x) : M::splat(0), live ? d : k3};
    } else {
      kl = {k3, d, d + k3};
    }
  }
  const Mask<F> beyond = absolute(kl.value) > o.kl_clamp;
  kl.value = clamp(kl.value, -o.kl_clamp, o.kl_clamp);
  kl.d_logprob = beyond ? M::splat(0) : kl.d_logprob;
  kl.d_weighted = beyond ? kl.value : kl.d_weighted;
  return kl;
}

// ----------------------------------------------------------------------------------------------------------- the token

// Loss and derivatives of a token: is_weight * policy term + kl_coef * KL - entropy_coef * entropy. The derivative with
// respect to the entropy is -entropy_coef.
template <class F>
FUSEDPO_HD TokenResult<F> evaluate(const Objective& o, const Token<F>& x) {
  using M = Math<F>;
  const F zero = M::splat(0);
  const Weight<F> w = weight_of(o, x);
  Term<F> term = trust_region(o, x, w);
  F d_log_trace = zero;
  if (o.differentiate) {
    const Mask<F> cut = term.low | term.high;
    term.loss = cut ? zero : -x.advantage * exp_minus_1(w.log_ratio, w.own_ratio) * w.trace;
    term.d_log_ratio = cut ? zero : -x.advantage * w.ratio * w.trace;
    term.d_logprob = zero;
    d_log_trace = w.trace_live ? times(x.is_weight, term.loss) : zero;
  }
  const F d_policy = (w.own_live ? term.d_log_ratio : zero) + term.d_logprob;
  const F kl_coef = M::splat(o.kl_coef);
  KLValue<F> kl = kl_of(o, x.logprob - x.ref_logprob);
  if (o.kl_weighted) {
    kl.d_logprob = w.own_ratio * (w.own_live ? kl.d_weighted : kl.d_logprob);
    kl.value = kl.value * w.own_ratio;
  }
  const F bonus = o.entropy_coef != 0 ? o.entropy_coef * x.entropy : zero;
  const F loss = times(x.is_weight, term.loss) + times(kl_coef, kl.value) - bonus;
  const F d_logprob = times(x.is_weight, d_policy) + times(kl_coef, kl.d_logprob);
  return {loss, d_logprob, d_log_trace, w, kl.value, term.low, term.high};
}

}  // namespace fusedpo
