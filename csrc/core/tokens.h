// The tokens of a batch as arrays, and what is computed for each of them. Free of torch.
#pragma once

#include <cstdint>

namespace fusedpo {

// Values per token or per sequence; zero where there are none.
struct Values {
  const float* data = nullptr;
  bool per_token = true;
};

// The tokens of a batch, all sequences one after the other. The names are those of Token in core/objective.h.
struct Tokens {
  Values logprobs, old_logprobs, ref_logprobs, advantages, is_weights, entropy;
  Values log_trace;  // for kTrace only where the window is a long one
  Values place, length, sequence_sum;
  const uint8_t* mask = nullptr;  // 0 leaves a token out; null: all are kept
};

// Tokens and where their sequences begin.
struct Batch {
  Tokens tokens;
  int64_t num_tokens, num_sequences;
  const int64_t* cu_seqlens;  // null: all sequences have `width` positions
  int64_t width;
};

// Results per token, masked ones 0; null where not wanted.
struct TokenOutputs {
  float *loss, *grad_logprobs, *grad_entropy, *grad_log_trace;
};

}  // namespace fusedpo
