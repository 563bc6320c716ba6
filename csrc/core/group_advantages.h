// Advantages of the samples of one group, by a team of threads. Mirrors python/fusedpo/reference/advantages/{group,
// order}.py, which says where the formulas come from.
#pragma once

#include "array.h"
#include "team.h"

namespace fusedpo::advantages {

// Names and numbers are those of GROUP_ESTIMATORS in python/fusedpo/ops/advantages.py; their order means nothing.
enum class Estimator : int32_t {
  kRAFT,
  kReMax,
  kReinforceRej,
  kDrGRPO,
  kGRPO,
  kRLOO,
  kOPO,
  kGPG,
  kLead,
  kNormalisedLead,
  kMaxPO,
  kPkpoS,
  kPkpoSloo,
  kPkpoSloo1,
  kPassK,
  kMaxAtK,
  kOrderStatistic,
};
constexpr int64_t kNumEstimators = 17;

struct GroupParams {
  Estimator estimator;
  int64_t k;
  bool unbiased;  // kMaxPO, kOrderStatistic: times k / n
  double number;  // kGRPO, kNormalisedLead: what is added to the standard deviation; kGPG: the divisor
  double alpha;   // kGPG
};

struct Samples {
  Array rewards, mask;
  Array other;           // kOPO: lengths; kReMax: baselines, one per label; kOrderStatistic: k weights
  int64_t num_other;     // how many of these
  const int64_t* order;  // the sample at each position, or null where that is the position
  int64_t count;
  Result advantages;

  FUSEDPO_DEVICE bool kept(int64_t sample) const { return !mask || mask[sample] != 0; }
};

// The samples at `size` positions from `start`.
struct Group {
  const Samples& samples;
  int64_t start, size, label;

  FUSEDPO_DEVICE int64_t sample(int64_t i) const {
    if (!samples.order) return start + i;
    const int64_t sample = samples.order[start + i];
    return sample >= 0 && sample < samples.count ? sample : 0;
  }
  FUSEDPO_DEVICE bool kept(int64_t i) const { return samples.kept(sample(i)); }
  FUSEDPO_DEVICE double reward(int64_t i) const { return samples.rewards[sample(i)]; }
  FUSEDPO_DEVICE void set(int64_t i, double advantage) const { samples.advantages.set(sample(i), advantage); }
};

FUSEDPO_DEVICE bool compares_ranks(Estimator estimator) {
  switch (estimator) {
    case Estimator::kMaxPO:
    case Estimator::kPkpoS:
    case Estimator::kPkpoSloo:
    case Estimator::kPkpoSloo1:
    case Estimator::kPassK:
    case Estimator::kMaxAtK:
    case Estimator::kOrderStatistic:
      return true;
    default:
      return false;
  }
}

// How far the best sample is above the second.
FUSEDPO_DEVICE bool is_lead(Estimator estimator) {
  return estimator == Estimator::kLead || estimator == Estimator::kNormalisedLead;
}

// For these a nan, which has no rank, makes the whole group nan.
FUSEDPO_DEVICE bool needs_order(Estimator estimator) { return compares_ranks(estimator) || is_lead(estimator); }

// Whether the mean of the group, or what is made of it, enters.
FUSEDPO_DEVICE bool needs_mean(Estimator estimator) {
  switch (estimator) {
    case Estimator::kRAFT:
    case Estimator::kReMax:
    case Estimator::kReinforceRej:
    case Estimator::kLead:
      return false;
    default:
      return true;
  }
}

// How many more kept samples than k a group needs.
FUSEDPO_DEVICE int64_t spare_samples(Estimator estimator) {
  return estimator == Estimator::kMaxPO || estimator == Estimator::kPkpoSloo || estimator == Estimator::kOrderStatistic;
}

// The fewest kept samples with which the estimator is defined.
FUSEDPO_DEVICE int64_t smallest_group(const GroupParams& params) {
  if (compares_ranks(params.estimator)) return params.k + spare_samples(params.estimator);
  return is_lead(params.estimator) ? 2 : 1;
}

// --------------------------------------------------------------------------------------------------- the whole group

// A nan is neither lowest nor highest.
struct Census {
  int64_t kept, nans;
  double lowest, highest, second;
};

struct AddCensus {
  FUSEDPO_DEVICE Census operator()(const Census& a, const Census& b) const {
    const double between = a.highest < b.highest ? a.highest : b.highest;
    const double below = a.second < b.second ? b.second : a.second;
    return {a.kept + b.kept, a.nans + b.nans, b.lowest < a.lowest ? b.lowest : a.lowest,
            a.highest < b.highest ? b.highest : a.highest, below < between ? between : below};
  }
};

template <class Team>
FUSEDPO_DEVICE Census census(Team& team, const Group& group) {
  const double infinity = INFINITY;
  const Census nobody{0, 0, infinity, -infinity, -infinity};
  Census mine = nobody;
  for (int64_t i = team.rank(); i < group.size; i += team.size()) {
    if (!group.kept(i)) continue;
    const double r = group.reward(i);
    mine = AddCensus{}(mine, r == r ? Census{1, 0, r, r, -infinity} : Census{1, 1, infinity, -infinity, -infinity});
  }
  return reduce(team, mine, nobody, AddCensus{});
}

// GPG's alpha: kept samples over those of them with a reward other than 0, in the whole batch.
template <class Team>
FUSEDPO_DEVICE double kept_per_nonzero(Team& team, const Samples& samples, int64_t count) {
  const double kept = sum(team, count, [&](int64_t i) { return samples.kept(i) ? 1.0 : 0.0; });
  const double nonzero =
      sum(team, count, [&](int64_t i) { return samples.kept(i) && samples.rewards[i] != 0 ? 1.0 : 0.0; });
  return kept / (nonzero > 1 ? nonzero : 1);
}

// ------------------------------------------------------------------------------------------------ baseline of a group

// r - sum(w r) / sum(w), from the differences to the lowest reward: equal rewards give exactly 0.
struct Centred {
  double lowest, mean;
  bool defined;

  FUSEDPO_DEVICE double operator()(double reward) const { return defined ? (reward - lowest) - mean : 0; }
};

template <class Team>
FUSEDPO_DEVICE Centred centre(Team& team, const Group& group, bool weighted, const Census& all) {
  const auto weight = [&](int64_t i) {
    return !group.kept(i) ? 0.0 : weighted ? group.samples.other[group.sample(i)] : 1.0;
  };
  const double weights = weighted ? sum(team, group.size, weight) : (double)all.kept;
  const auto weigh = [&](int64_t i) {
    const double w = weight(i);
    return w > 0 ? w * (group.reward(i) - all.lowest) : 0.0;
  };
  return {all.lowest, sum(team, group.size, weigh) / weights, weights > 0};
}

template <class Team>
FUSEDPO_DEVICE void compare_with_baseline(Team& team, const Group& group, const GroupParams& params,
                                          const Census& all) {
  const Estimator estimator = params.estimator;
  const double n = (double)all.kept, others = n > 1 ? n - 1 : 1;
  const bool equal = all.lowest == all.highest && all.nans == 0 && all.kept > 1;
  Centred centred{};
  if (needs_mean(estimator)) centred = centre(team, group, estimator == Estimator::kOPO, all);
  double deviation = 0;
  if (estimator == Estimator::kGRPO || estimator == Estimator::kNormalisedLead) {
    const auto square = [&](int64_t i) {
      const double x = group.kept(i) ? centred(group.reward(i)) : 0;
      return x * x;
    };
    deviation = sqrt(sum(team, group.size, square) / others) + params.number;
  }
  const bool labelled = group.label >= 0 && group.label < group.samples.num_other;

  const auto advantage = [&](int64_t i) {
    const double reward = group.reward(i);
    switch (estimator) {
      case Estimator::kRAFT:
        return reward < 0 ? 0 : reward;
      case Estimator::kReMax:
        return reward - (labelled ? group.samples.other[group.label] : (double)NAN);
      case Estimator::kReinforceRej:
        return equal ? 0 : reward;
      case Estimator::kGRPO:
        return centred(reward) / deviation;
      case Estimator::kRLOO:
        return centred(reward) * n / others;
      case Estimator::kGPG:
        return params.alpha * centred(reward) / params.number;
      case Estimator::kLead:
        return reward == all.highest ? reward - all.second : 0;
      case Estimator::kNormalisedLead:
        return (reward == all.highest ? reward - all.second : 0) / deviation;
      default:
        return centred(reward);
    }
  };
  for (int64_t i = team.rank(); i < group.size; i += team.size()) group.set(i, group.kept(i) ? advantage(i) : 0);
}

// --------------------------------------------------------------------------------------------------------- best of k

// Room for each sample of a group. `weights_for` is the number of samples that `below` and `above` were computed for.
struct RankScratch {
  double *sorted, *sums, *below, *above;
  int32_t* source;
  int64_t weights_for;
};

// Samples up to which comparing each with each is the fastest sort.
template <class Team>
FUSEDPO_DEVICE int64_t few_samples(const Team& team) {
  return team.size() > 1 ? 256 : 64;
}

// The rank of each kept sample is the number of those before it; nan, which no kept sample has here, marks the others.
template <class Team>
FUSEDPO_DEVICE void sort_by_counting(Team& team, const Group& group, RankScratch& s) {
  const int64_t n = group.size;
  double* rewards = s.sums;
  for (int64_t i = team.rank(); i < n; i += team.size()) rewards[i] = group.kept(i) ? group.reward(i) : (double)NAN;
  team.sync();
  for (int64_t i = team.rank(); i < n; i += team.size()) {
    const double mine = rewards[i];
    if (mine != mine) continue;
    int64_t rank = 0;
    for (int64_t j = 0; j < i; ++j) rank += rewards[j] <= mine;
    for (int64_t j = i + 1; j < n; ++j) rank += rewards[j] < mine;
    s.sorted[rank] = mine;
    s.source[rank] = (int32_t)i;
  }
  team.sync();
}

// A bitonic network in which all comparisons point the same way, since the first of each merge meets its second half in
// reverse order. So what lies beyond the end counts as larger than all else, and is passed over.
template <class Team>
FUSEDPO_DEVICE void sort_by_network(Team& team, const Group& group, RankScratch& s) {
  const int64_t n = group.size;
  for (int64_t i = team.rank(); i < n; i += team.size()) {
    s.sorted[i] = group.kept(i) ? group.reward(i) : (double)NAN;
    s.source[i] = (int32_t)i;
  }
  team.sync();
  const auto order = [&](int64_t i, int64_t j) {
    const double a = s.sorted[i], b = s.sorted[j];
    const int32_t from = s.source[i], to = s.source[j];
    if (!(b < a || (b == a && to < from) || (a != a && b == b))) return;
    s.sorted[i] = b;
    s.sorted[j] = a;
    s.source[i] = to;
    s.source[j] = from;
  };
  int64_t padded = 1;
  while (padded < n) padded *= 2;
  for (int64_t half = 1; half < padded; half *= 2) {
    for (int64_t distance = half; distance > 0; distance /= 2) {
      for (int64_t pair = team.rank(); pair < padded / 2; pair += team.size()) {
        const int64_t offset = pair & (distance - 1), start = 2 * (pair - offset);
        const int64_t i = start + offset, j = distance == half ? start + 2 * half - 1 - offset : i + distance;
        if (j < n) order(i, j);
      }
      team.sync();
    }
  }
}

// With alpha_g a weight between 0 and 1 and d_g the gap below rank g, the advantage at rank p is `scale` times
//   sum_{g <= p} below alpha_g d_g + sum_{g > p} alpha_g (above - slope (n - 1 - g)) / g d_g + share r_(n-1).
struct GapFormula {
  int64_t k;  // of alpha
  double below, above, slope, share, scale;
};

FUSEDPO_DEVICE GapFormula gap_formula(const GroupParams& params, int64_t samples) {
  const double n = (double)samples, k = (double)params.k;
  switch (params.estimator) {
    case Estimator::kPkpoS:
      return {params.k, 0, k - n, 0, 1, k / n};
    case Estimator::kPkpoSloo:
      return {params.k, n, -k, n, -1, k / (n * (n - 1))};
    case Estimator::kPkpoSloo1:
      return {params.k - 1, 1, 0, 0, 0, k / n};
    default:  // each gap adds 0 to the sum over the group
      return {params.k, 1, -1, 1, 0, params.unbiased ? k / n : 1};
  }
}

// sum_b w_b P(b), where P is the probability that b of k - 1 samples, drawn from the n - 2 not next to gap g, lie below
// it: products of the ratios of neighbours from the mode outwards, divided by their sum.
FUSEDPO_DEVICE double mean_weight(const Array& weights, int64_t g, int64_t n, int64_t k) {
  const auto up = [=](int64_t b) { return (double)(g - 1 - b) * (double)(k - 1 - b); };
  const auto down = [=](int64_t b) { return (double)(b + 1) * (double)(n - g - k + 1 + b); };  // P(b+1)/P(b) = up/down
  const int64_t mode = k * g / n;
  double total = 1, mean = weights[mode], p = 1;
  for (int64_t b = mode; b < k - 1 && p > 0; ++b) {
    p *= up(b) / down(b);
    total += p;
    mean += p * weights[b + 1];
  }
  p = 1;
  for (int64_t b = mode - 1; b >= 0 && p > 0; --b) {
    p *= down(b) / up(b);
    total += p;
    mean += p * weights[b];
  }
  return mean / total;
}

// What gaps are multiplied with. alpha_g = C(g, k) / C(n - 1, k), by alpha_{n-1} = 1, alpha_{g-1} = alpha_g (g - k) /
// g; for an order statistic g / (n - 1) times its mean weight.
template <class Team>
FUSEDPO_DEVICE void weigh_gaps(Team& team, const Group& group, const GroupParams& params, const GapFormula& f,
                               int64_t n, RankScratch& s) {
  if (s.weights_for == n) return;
  s.weights_for = n;
  const auto set = [&](int64_t g, double alpha) {
    s.below[g] = f.below * alpha;
    s.above[g] = g > 0 ? alpha * (f.above - f.slope * (double)(n - 1 - g)) / (double)g : 0.0;
  };
  if (params.estimator == Estimator::kOrderStatistic) {
    for (int64_t g = team.rank(); g < n; g += team.size())
      set(g, g > 0 ? (double)g / (double)(n - 1) * mean_weight(group.samples.other, g, n, params.k) : 0.0);
  } else {
    const auto ratio = [&](int64_t g) { return g > f.k ? (double)(g - f.k) / (double)g : 0.0; };
    suffix_scan(team, n, 1.0, 1.0, ratio, Multiply{}, [&](int64_t g, double, double alpha) { set(g, alpha); });
  }
  team.sync();
}

// The two sums over gaps at each rank, in `sums`; returns the first for the highest rank.
template <class Team>
FUSEDPO_DEVICE double sum_gaps(Team& team, int64_t n, RankScratch& s) {
  const auto gap = [&](int64_t g) { return g > 0 ? s.sorted[g] - s.sorted[g - 1] : 0.0; };
  suffix_scan(
      team, n, 0.0, 0.0, [&](int64_t g) { return s.above[g] * gap(g); }, Add{},
      [&](int64_t g, double, double later) { s.sums[g] = later; });
  team.sync();
  const auto mirrored = [&](int64_t i) { return s.below[n - 1 - i] * gap(n - 1 - i); };
  const double total = suffix_scan(team, n, 0.0, 0.0, mirrored, Add{}, [&](int64_t i, double mine, double earlier) {
    s.sums[n - 1 - i] += mine + earlier;
  });
  team.sync();
  return total;
}

// The first rank with the reward of rank p.
FUSEDPO_DEVICE int64_t first_equal(const double* sorted, int64_t p) {
  int64_t low = 0, high = p;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sorted[middle] < sorted[p])
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

template <class Team>
FUSEDPO_DEVICE void compare_ranks(Team& team, const Group& group, const GroupParams& params, int64_t n,
                                  RankScratch& s) {
  if (group.size <= few_samples(team))
    sort_by_counting(team, group, s);
  else
    sort_by_network(team, group, s);
  GapFormula formula = gap_formula(params, n);
  weigh_gaps(team, group, params, formula, n, s);
  const double total = sum_gaps(team, n, s), highest = s.sorted[n - 1];
  const double rest = (double)(n - params.k) / (double)n;
  if (params.estimator == Estimator::kPassK) {
    const double failure = rest * total, deviation = sqrt(failure * (1 - failure));
    formula.scale = deviation > 0 ? rest / deviation : 0;
  }
  for (int64_t p = team.rank(); p < n; p += team.size()) {
    // Equal rewards take the value at the first of them: a team may round the same sum differently at each rank.
    double sum = s.sums[team.size() > 1 ? first_equal(s.sorted, p) : p];
    if (formula.share != 0) sum += formula.share * highest;
    group.set(s.source[p], params.estimator == Estimator::kMaxAtK ? highest - rest * total : formula.scale * sum);
  }
}

// ---------------------------------------------------------------------------------------------------------- one group

// Writes the advantages of a group, 0 where a sample is left out; returns how many are kept. With fewer of them than
// smallest_group() they are nan. `s` is null for estimators that do not compare ranks.
template <class Team>
FUSEDPO_DEVICE int64_t group_advantages(Team& team, const Group& group, const GroupParams& params, RankScratch* s) {
  const Census all = census(team, group);
  const bool defined =
      all.kept > 0 && all.kept >= smallest_group(params) && !(all.nans > 0 && needs_order(params.estimator));
  if (defined && !s) {
    compare_with_baseline(team, group, params, all);
    return all.kept;
  }
  if (defined) compare_ranks(team, group, params, all.kept, *s);
  for (int64_t i = team.rank(); i < group.size; i += team.size()) {
    const bool kept = group.kept(i);
    if (!kept || !defined) group.set(i, kept ? (double)NAN : 0);
  }
  return all.kept;
}

}  // namespace fusedpo::advantages
