// Tokens of a batch (core/tokens.h) as a CUDA thread reads them.
#pragma once

#include "core/objective.h"
#include "core/team.h"
#include "core/tokens.h"

namespace fusedpo {

// A position in [0, count], or the nearest one.
__device__ inline int64_t position_in(int64_t count, int64_t position) {
  return position < 0 ? 0 : position < count ? position : count;
}

// Where a sequence begins; that of the number of sequences: where the last one ends. Offsets that are none give results
// without meaning, of tokens of the batch.
__device__ inline int64_t begin_of(const Batch& batch, int64_t sequence) {
  return batch.cu_seqlens ? position_in(batch.num_tokens, batch.cu_seqlens[sequence]) : sequence * batch.width;
}

__device__ inline bool is_kept(const Batch& batch, int64_t t) {
  return batch.tokens.mask == nullptr || batch.tokens.mask[t] != 0;
}

__device__ inline float load(const Values& values, int64_t t, int64_t sequence) {
  return values.data == nullptr ? 0 : values.data[values.per_token ? t : sequence];
}

// All but log_trace and sequence_sum.
__device__ inline Token<float> load_token(const Tokens& tokens, int64_t t, int64_t sequence, int64_t kept) {
  Token<float> token{};
  token.logprob = load(tokens.logprobs, t, sequence);
  token.old_logprob = load(tokens.old_logprobs, t, sequence);
  token.ref_logprob = load(tokens.ref_logprobs, t, sequence);
  token.advantage = load(tokens.advantages, t, sequence);
  token.is_weight = tokens.is_weights.data == nullptr ? 1 : load(tokens.is_weights, t, sequence);
  token.entropy = load(tokens.entropy, t, sequence);
  token.place = load(tokens.place, t, sequence);
  token.length = (float)(kept > 1 ? kept : 1);
  return token;
}

}  // namespace fusedpo
