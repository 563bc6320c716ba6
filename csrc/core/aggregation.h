// From the losses of tokens to the loss of the batch. Mirrors python/fusedpo/reference/aggregation.py.
#pragma once

#include "objective.h"

namespace fusedpo {

// Kept tokens, sequences with any, and positions of the longest sequence.
struct Totals {
  int64_t tokens, sequences, longest;
};

FUSEDPO_HD Totals no_totals() { return {0, 0, 1}; }

FUSEDPO_HD Totals add(const Totals& a, const Totals& b) {
  return {a.tokens + b.tokens, a.sequences + b.sequences, a.longest > b.longest ? a.longest : b.longest};
}

// What the loss of each token of a sequence is multiplied by, of which `kept` are kept. `denominator` may be null.
FUSEDPO_HD double scale_of(const Objective& o, const Totals& totals, int64_t kept, const float* denominator,
                           double loss_scale, bool per_token) {
  if (per_token || o.aggregation == kTokenSum) return loss_scale;
  const double count =
      denominator ? *denominator : (double)(o.aggregation == kTokenMean ? totals.tokens : totals.sequences);
  const double scale = loss_scale / (count == 0 ? 1 : count);
  if (o.aggregation == kSeqMeanTokenMean) return scale / (double)(kept > 1 ? kept : 1);
  if (o.aggregation == kSeqMeanTokenSumNorm)
    return scale / (o.length_norm > 0 ? o.length_norm : (double)totals.longest);
  return scale;
}

}  // namespace fusedpo
