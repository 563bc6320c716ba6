// The interface of the token kernels: the objective over one tile of tokens. Free of torch.
#pragma once

#include "core/statistics.h"
#include "core/tokens.h"

namespace fusedpo {

constexpr int64_t kTileSize = 512;  // sums are carried in float within a tile, in double beyond
constexpr int64_t kMaxReach = 16;   // windows of more positions than this come from a pass of their own

// Positions [begin, end) of one sequence, which reaches from sequence_begin to sequence_end.
struct Tile {
  int64_t begin, end, sequence, sequence_begin, sequence_end;
};

struct TokenKernels {
  int64_t (*count)(const uint8_t* mask, const Tile&);
  // Writes the clamped log-ratios of the tile, or the summands of its trust region, 0 at masked tokens; returns the
  // sum.
  double (*log_ratios)(const Tokens&, const Tile&, float* out);
  double (*summands)(const Objective&, const Tokens&, const Tile&, float* out);
  // Losses and gradients are multiplied by `scale`, statistics are not.
  Statistics<double> (*evaluate)(const Objective&, const Tokens&, const Tile&, float scale, const TokenOutputs&);
};

namespace portable {
extern const TokenKernels kTokenKernels;
}
namespace avx2 {
extern const TokenKernels kTokenKernels;
}
namespace avx512 {
extern const TokenKernels kTokenKernels;
}

}  // namespace fusedpo
