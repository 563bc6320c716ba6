// Advantages of the tokens of one sequence, by a team of threads that walks it backwards. Mirrors
// python/fusedpo/reference/advantages/{step, whitening}.py, which says where the formulas come from.
#pragma once

#include "array.h"
#include "team.h"

namespace fusedpo::advantages {

// Names and numbers are those of TOKEN_ESTIMATORS in python/fusedpo/ops/advantages.py; their order means nothing.
enum class TokenEstimator : int32_t { kToTokens, kRewardToGo, kGAE, kVTrace };
constexpr int64_t kNumTokenEstimators = 4;

struct TokenParams {
  TokenEstimator estimator;
  double gamma, lam, rho_bar, c_bar;
};

struct Tokens {
  Array rewards, values, logprobs, old_logprobs, mask;
  Array per_sequence;   // kToTokens: advantages; else what follows the end of a sequence, 0 without it
  Integers cu_seqlens;  // null: all sequences have `length` tokens
  int64_t length, num_tokens;
  Result advantages, returns;  // kGAE and kVTrace alone have returns
};

// ------------------------------------------------------------------------------------------------------- recurrences

// y = x + c * (y of what follows). Where c is 0 nothing follows, nan and inf included.
struct Step {
  double x, c;
};

struct Chain {
  FUSEDPO_DEVICE Step operator()(const Step& a, const Step& following) const {
    if (a.c == 0) return a;
    return {a.x + a.c * following.x, a.c * following.c};
  }
};

FUSEDPO_DEVICE double importance_ratio(const Tokens& tokens, int64_t t) {
  const double log_ratio = tokens.logprobs[t] - tokens.old_logprobs[t];
  return exp(log_ratio > 20 ? 20 : log_ratio < -20 ? -20 : log_ratio);
}

// A token left out passes on what follows it, and gets 0.
template <class Team>
FUSEDPO_DEVICE void token_advantages(Team& team, const Tokens& tokens, const TokenParams& params, int64_t sequence) {
  const auto offset = [&](int64_t s) {
    if (!tokens.cu_seqlens) return s * tokens.length;
    const int64_t t = tokens.cu_seqlens[s];
    return t < 0 ? 0 : t < tokens.num_tokens ? t : tokens.num_tokens;
  };
  const int64_t begin = offset(sequence), end = offset(sequence + 1);
  const Step pass_on{0, 1};
  const double at_end = tokens.per_sequence ? tokens.per_sequence[sequence] : 0;
  const bool to_go = params.estimator == TokenEstimator::kRewardToGo;
  Step next_value{at_end, 0}, next{to_go ? at_end : 0, 0};

  const int64_t width = team.size();
  for (int64_t tile = (end - begin - 1) / width; begin < end && tile >= 0; --tile) {
    const int64_t t = begin + tile * width + team.rank();
    const bool inside = t < end, kept = inside && (!tokens.mask || tokens.mask[t] != 0);
    if (params.estimator == TokenEstimator::kToTokens) {
      if (inside) tokens.advantages.set(t, kept ? at_end : 0);
      continue;
    }
    const double r = kept ? tokens.rewards[t] : 0;
    if (to_go) {
      const Step mine = kept ? Step{r, params.gamma} : pass_on;
      const Step following = team.after(mine, next, Chain{});
      if (inside) tokens.advantages.set(t, kept ? Chain{}(mine, following).x : 0);
      continue;
    }
    const double v = kept ? tokens.values[t] : 0;
    const double following_v = team.after(kept ? Step{v, 0} : pass_on, next_value, Chain{}).x;
    double rho = 1, decay = params.gamma * params.lam;
    if (params.estimator == TokenEstimator::kVTrace && kept) {
      const double ratio = importance_ratio(tokens, t);
      rho = ratio > params.rho_bar ? params.rho_bar : ratio;
      decay *= ratio > params.c_bar ? params.c_bar : ratio;
    }
    const double delta = rho * (r + params.gamma * following_v - v);
    const Step mine = kept ? Step{delta, decay} : pass_on;
    const Step following = team.after(mine, next, Chain{});
    const double y = Chain{}(mine, following).x;  // GAE's advantage; V-trace's correction of the value
    if (!inside) continue;
    if (params.estimator == TokenEstimator::kVTrace)
      tokens.advantages.set(t, kept ? rho * (r + params.gamma * (following_v + following.x) - v) : 0);
    else
      tokens.advantages.set(t, kept ? y : 0);
    tokens.returns.set(t, kept ? y + v : 0);
  }
}

// ------------------------------------------------------------------------------------------------- steps of reasoning

struct Steps {
  Array values, rewards;  // [B, S + 1] and [B, S]
  Integers ids;           // [B, T]
  int64_t num_steps, num_tokens;
};

// Writes the advantage r_s + V_{s+1} - V_s of its step to each token of a row, 0 to a token without step and nan for a
// step that is not there. A value that is missing (nan) is that of the next step and its reward, and its step's
// advantage is 0; missing at the end it is 0. `of_steps` has room for each step of the row, which is walked once,
// backwards.
template <class Team>
FUSEDPO_DEVICE void step_advantages(Team& team, const Steps& steps, int64_t row, double* of_steps,
                                    const Result& result) {
  const int64_t num_steps = steps.num_steps, first_value = row * (num_steps + 1), first_reward = row * num_steps;
  const double last = steps.values[first_value + num_steps];
  const auto known_or_passed_on = [&](int64_t s) {
    const double value = steps.values[first_value + s];
    return value == value ? Step{value, 0} : Step{steps.rewards[first_reward + s], 1};
  };
  suffix_scan(team, num_steps, Step{0, 1}, Step{last == last ? last : 0, 0}, known_or_passed_on, Chain{},
              [&](int64_t s, const Step& mine, const Step& following) {
                of_steps[s] = mine.c == 0 ? steps.rewards[first_reward + s] + following.x - mine.x : 0;
              });
  team.sync();
  const int64_t begin = row * steps.num_tokens;
  for (int64_t t = begin + team.rank(); t < begin + steps.num_tokens; t += team.size()) {
    const int64_t step = steps.ids[t];
    result.set(t, step < 0 ? 0 : step < num_steps ? of_steps[step] : (double)NAN);
  }
}

// --------------------------------------------------------------------------------------------------------- whitening

struct Moments {
  double weight, mean, squares;  // `squares`: weighted sum of the squared differences to the mean
};

struct AddMoments {
  FUSEDPO_DEVICE Moments operator()(const Moments& a, const Moments& b) const {
    if (a.weight == 0) return b;
    if (b.weight == 0) return a;
    const double weight = a.weight + b.weight, distance = b.mean - a.mean, share = b.weight / weight;
    return {weight, a.mean + distance * share, a.squares + b.squares + distance * distance * a.weight * share};
  }
};

// An element counts `lengths` times, once without them; not where the mask is 0.
struct Whitening {
  Array x, lengths, mask;
  Result result;

  FUSEDPO_DEVICE double weight(int64_t i) const {
    const double w = mask && mask[i] == 0 ? 0 : lengths ? lengths[i] : 1;
    return w > 0 ? w : 0;
  }
};

constexpr int64_t kWhiteningChunk = 4096;  // elements that one team sums up

template <class Team>
FUSEDPO_DEVICE Moments moments(Team& team, const Whitening& w, int64_t begin, int64_t end) {
  double weight = 0, total = 0, squares = 0;
  for (int64_t i = begin + team.rank(); i < end; i += team.size()) {
    const double mine = w.weight(i);
    weight += mine;
    if (mine > 0) total += mine * w.x[i];
  }
  weight = reduce(team, weight, 0.0, Add{});
  const double mean = weight > 0 ? reduce(team, total, 0.0, Add{}) / weight : 0;
  for (int64_t i = begin + team.rank(); i < end; i += team.size()) {
    const double mine = w.weight(i);
    if (mine > 0) squares += mine * (w.x[i] - mean) * (w.x[i] - mean);
  }
  return {weight, mean, reduce(team, squares, 0.0, Add{})};
}

struct Standardise {
  double mean, scale;

  FUSEDPO_DEVICE explicit Standardise(const Moments& all)
      : mean(all.mean), scale(1 / sqrt(all.squares / (all.weight > 2 ? all.weight - 1 : 1) + 1e-8)) {}

  FUSEDPO_DEVICE void operator()(const Whitening& w, int64_t i) const {
    w.result.set(i, w.weight(i) > 0 ? (w.x[i] - mean) * scale : 0);
  }
};

}  // namespace fusedpo::advantages
