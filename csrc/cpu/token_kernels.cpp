// The token kernels, a vector of tokens at a time. Compiled once per instruction set; see token_kernels.h for the
// contract.
//
// A token's results do not depend on its lane, and the sums of a tile run over its positions in order: padded and
// packed batches agree bit for bit.

#include "token_kernels.h"

#include "core/window.h"
#include "vec_math.h"

namespace fusedpo::FUSEDPO_ISA {
namespace {

using M = Math<Vec>;

FUSEDPO_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Up to kLanes tokens of a tile, from `begin` on.
struct Group {
  int64_t begin, count, sequence;
  Int kept;
};

FUSEDPO_INLINE Group group_at(const Tokens& tokens, const Tile& tile, int64_t begin) {
  Group group{begin, smaller(kLanes, tile.end - begin), tile.sequence, Int{} == 0};
  if (group.count == kLanes) {
    if (tokens.mask != nullptr) group.kept = M::load(tokens.mask + begin);
  } else {
    uint8_t kept[kLanes] = {};
    for (int64_t i = 0; i < group.count; ++i) kept[i] = tokens.mask == nullptr || tokens.mask[begin + i] != 0;
    group.kept = M::load(kept);
  }
  return group;
}

FUSEDPO_INLINE Vec load(const Values& values, const Group& group) {
  if (values.data == nullptr) return Vec{};
  if (!values.per_token) return splat(values.data[group.sequence]);
  const float* p = values.data + group.begin;
  if (group.count == kLanes) return M::load(p);
  Vec x{};
  for (int64_t i = 0; i < group.count; ++i) x[i] = p[i];
  return x;
}

FUSEDPO_INLINE Vec load_kept(const Values& values, const Group& group) {
  return group.kept ? load(values, group) : Vec{};
}

FUSEDPO_INLINE void store(float* p, int64_t count, Vec x) {
  if (count == kLanes)
    std::memcpy(p, &x, sizeof x);
  else
    for (int64_t i = 0; i < count; ++i) p[i] = x[i];
}

FUSEDPO_INLINE void store_kept(float* p, const Group& group, Vec x) {
  if (p != nullptr) store(p + group.begin, group.count, group.kept ? x : Vec{});
}

FUSEDPO_INLINE Token<Vec> load_token(const Tokens& tokens, const Group& group) {
  Token<Vec> token;
  token.logprob = load_kept(tokens.logprobs, group);
  token.old_logprob = load_kept(tokens.old_logprobs, group);
  token.ref_logprob = load_kept(tokens.ref_logprobs, group);
  token.advantage = load_kept(tokens.advantages, group);
  token.is_weight = tokens.is_weights.data == nullptr ? splat(1) : load_kept(tokens.is_weights, group);
  token.entropy = load_kept(tokens.entropy, group);
  token.log_trace = load(tokens.log_trace, group);
  token.place = load(tokens.place, group);
  token.length = load(tokens.length, group);
  token.sequence_sum = load(tokens.sequence_sum, group);
  return token;
}

int64_t count(const uint8_t* mask, const Tile& tile) {
  if (mask == nullptr) return tile.end - tile.begin;
  constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7f;  // all bits of a byte but the highest
  int64_t total = 0, i = tile.begin;
  for (uint64_t eight; i + 8 <= tile.end; i += 8) {
    std::memcpy(&eight, mask + i, sizeof eight);
    total += __builtin_popcountll((((eight & kLow) + kLow) | eight) & ~kLow);  // the highest bit: is the byte not 0
  }
  for (; i < tile.end; ++i) total += mask[i] != 0;
  return total;
}

template <class Value>
FUSEDPO_INLINE double write_and_sum(const Tokens& tokens, const Tile& tile, float* out, Value value) {
  Vec sum{};
  for (int64_t i = tile.begin; i < tile.end; i += kLanes) {
    const Group group = group_at(tokens, tile, i);
    const Vec x = value(group);
    store(out + (i - tile.begin), group.count, x);
    sum += x;
  }
  return reduce_add(sum);
}

double log_ratios(const Tokens& tokens, const Tile& tile, float* out) {
  return write_and_sum(tokens, tile, out, [&](const Group& group) {
    return log_ratio(load_kept(tokens.logprobs, group), load_kept(tokens.old_logprobs, group));
  });
}

double summands(const Objective& o, const Tokens& tokens, const Tile& tile, float* out) {
  return write_and_sum(tokens, tile, out,
                       [&](const Group& group) { return group.kept ? summand(o, load_token(tokens, group)) : Vec{}; });
}

Statistics<double> reduce(const Statistics<Vec>& s) {
  Statistics<double> result;
  for (int i = 0; i < kNumSums; ++i) result.sum[i] = reduce_add(s.sum[i]);
  for (int i = 0; i < kNumLargest; ++i) {
    float top = s.largest[i][0];
    for (int lane = 1; lane < kLanes; ++lane) top = larger(top, (float)s.largest[i][lane]);
    result.largest[i] = top;
  }
  return result;
}

Statistics<double> evaluate_tile(const Objective& o, const Tokens& tokens, const Tile& tile, float scale,
                                 const TokenOutputs& out) {
  // The log-ratios of the tile and of what its windows reach, 0 beyond the sequence.
  float log_ratio_buffer[kTileSize + kMaxReach + kLanes];
  const float* window = nullptr;
  if (o.ratio == kTrace && tokens.log_trace.data == nullptr) {
    const int64_t back = smaller(o.back, tile.begin - tile.sequence_begin);
    const int64_t ahead = smaller(o.ahead, tile.sequence_end - tile.end);
    std::memset(log_ratio_buffer, 0, sizeof log_ratio_buffer);
    Tile reached = tile;
    reached.begin -= back;
    reached.end += ahead;
    log_ratios(tokens, reached, log_ratio_buffer + o.back - back);
    window = log_ratio_buffer + o.back;
  }

  Statistics<Vec> statistics = no_statistics(Vec{}, splat(-kInfinity));
  for (int64_t i = tile.begin; i < tile.end; i += kLanes) {
    const Group group = group_at(tokens, tile, i);
    Token<Vec> token = load_token(tokens, group);
    if (window != nullptr) token.log_trace = sum_of_window<Vec>(window + (i - tile.begin), o.back, o.ahead);
    const TokenResult<Vec> result = evaluate(o, token);
    add_token(statistics, result, token.entropy, group.kept);
    store_kept(out.loss, group, scale * result.loss);
    store_kept(out.grad_logprobs, group, scale * result.d_logprob);
    store_kept(out.grad_entropy, group, splat(-scale * o.entropy_coef));
    store_kept(out.grad_log_trace, group, scale * result.d_log_trace);
  }
  return reduce(statistics);
}

}  // namespace

extern const TokenKernels kTokenKernels = {count, log_ratios, summands, evaluate_tile};

}  // namespace fusedpo::FUSEDPO_ISA
