// Where the sequences of a batch lie in its flat tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arguments.h"
#include "core/tokens.h"

namespace fusedpo::cpu {

// The start of each sequence, and then the number of tokens. Throws std::invalid_argument where cu_seqlens are no
// offsets.
inline std::vector<int64_t> offsets_of(const Batch& batch) {
  std::vector<int64_t> offsets;
  for (int64_t s = 0; s <= batch.num_sequences; ++s)
    offsets.push_back(batch.cu_seqlens ? batch.cu_seqlens[s] : s * batch.width);
  if (offsets.empty() || offsets.front() != 0 || offsets.back() != batch.num_tokens ||
      !std::is_sorted(offsets.begin(), offsets.end()))
    fail("cu_seqlens must start with 0, never decrease and end with the number of tokens ", batch.num_tokens);
  return offsets;
}

}  // namespace fusedpo::cpu
