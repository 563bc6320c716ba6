// Rows of logits whose columns lie on several ranks: from what each rank says of a row to what is true of it. The
// formulas are in python/fusedpo/reference/row_stats.py. Free of torch.
//
// Parts [ranks, 1 + rows, columns]: a header of each rank, then of each row (reference, rest, weighted, logits...), or
// without weighted where the entropy is not wanted.
#pragma once

#include "team.h"

namespace fusedpo {

struct Parts {
  const float* data;
  int64_t ranks, rows, columns;
  bool entropy;

  FUSEDPO_DEVICE int64_t first_logit() const { return entropy ? 3 : 2; }
  FUSEDPO_DEVICE int64_t num_ids() const { return columns - first_logit(); }
  FUSEDPO_DEVICE const float* header(int64_t rank) const { return data + rank * (1 + rows) * columns; }
  FUSEDPO_DEVICE const float* at(int64_t rank, int64_t row) const { return header(rank) + (1 + row) * columns; }

  // Columns follow each other from 0 on, and all ranks name one vocabulary that is not larger.
  FUSEDPO_DEVICE bool agree() const {
    float end = 0;
    bool same = true;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const float* h = header(rank);
      same = same && h[0] == end && h[2] == header(0)[2];
      end += h[1];
    }
    return same && header(0)[2] <= end;
  }
};

// In F: double on the CPU, float on a GPU.
template <class F>
struct MergedRow {
  F reference = 0, rest = -1, weighted = 0;

  FUSEDPO_DEVICE MergedRow(const Parts& parts, int64_t row, float temperature) {
    int64_t first = -1;
    bool some = false;
    F top = -(F)__builtin_huge_valf();
    for (int64_t rank = 0; rank < parts.ranks; ++rank) {
      const float* of = parts.at(rank, row);
      if (of[1] == -1) continue;
      some = true;
      if (first < 0 || of[0] > top) {
        top = of[0] > top ? (F)of[0] : top;
        first = rank;
      }
    }
    if (!some) return;
    reference = top;
    rest = 0;
    for (int64_t rank = 0; rank < parts.ranks; ++rank) {
      const float* of = parts.at(rank, row);
      if (of[1] == -1) continue;
      const F distance = ((F)of[0] - top) / temperature, factor = exp(distance), sum = 1 + (F)of[1];
      rest += rank == first ? (F)of[1] : sum * factor;
      if (parts.entropy) weighted += factor * ((F)of[2] + sum * distance);
    }
  }

  // Of the k-th token; the ranks that do not own it say -inf.
  FUSEDPO_DEVICE static float logit(const Parts& parts, int64_t row, int64_t k) {
    float largest = parts.at(0, row)[parts.first_logit() + k];
    for (int64_t rank = 1; rank < parts.ranks; ++rank) {
      const float x = parts.at(rank, row)[parts.first_logit() + k];
      largest = x > largest || x != x ? x : largest;
    }
    return largest;
  }
};

}  // namespace fusedpo
