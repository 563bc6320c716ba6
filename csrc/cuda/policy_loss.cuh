// The policy loss on a GPU, in two kernels. One goes over sequences: how many of their tokens are kept, and what else a
// token must know of its sequence. The other goes over tiles of tokens: losses, gradients and statistics, which its
// last block adds up. A third one follows where a gradient goes through traces. Free of torch.
//
// All sums have a fixed order: results are the same in every run.
#pragma once

#include "block.cuh"
#include "core/aggregation.h"
#include "core/statistics.h"
#include "core/window.h"
#include "tokens.cuh"

namespace fusedpo {

constexpr int kSequenceThreads = 512, kTileThreads = 256;
constexpr int64_t kTileSize = 4 * kTileThreads;
constexpr int64_t kMaxReach = 64;     // windows of more positions than this are summed by the first kernel
constexpr int64_t kMaxBlocks = 1024;  // more would make the last sum, which is that of one block, a long one
constexpr int kNumStatistics = (int)kNumSums + (int)kNumLargest;

FUSEDPO_DEVICE int64_t blocks_for(int64_t work, int64_t most) { return work < 1 ? 1 : work < most ? work : most; }

// The arguments of the kernels: `batch`, `out` and others as the operator has them, memory as reserve() hands it out.
struct PolicyLoss {
  Objective objective;
  Batch batch;
  const float *denominator, *loss_scale;  // the first may be null
  bool per_token;
  TokenOutputs out;
  float *loss, *metrics;  // loss: not if per_token
  int64_t tile_size = kTileSize, max_blocks = kMaxBlocks;

  int64_t* kept;      // per sequence
  Totals* totals;     // per block of the first kernel
  double* partial;    // [kNumStatistics, tile_blocks()]
  unsigned* arrived;  // blocks of the second kernel that are done
  float *log_trace, *place, *sequence_sum, *scratch;

  // At least the tiles that there are: each sequence begins one.
  FUSEDPO_DEVICE int64_t num_tiles() const { return batch.num_tokens / tile_size + batch.num_sequences; }
  FUSEDPO_DEVICE int64_t tile_blocks() const { return blocks_for(num_tiles(), max_blocks); }
  FUSEDPO_DEVICE int64_t sequence_blocks() const { return blocks_for(batch.num_sequences, max_blocks); }

  FUSEDPO_DEVICE bool through_traces() const { return objective.differentiate && !per_token; }
  FUSEDPO_DEVICE bool long_windows() const {
    return objective.ratio == kTrace && (objective.back > kMaxReach || objective.ahead > kMaxReach - objective.back);
  }
};

// Points `p` to memory: take(bytes) gives some.
template <class Take>
void reserve(PolicyLoss& p, Take take) {
  const auto floats = [&](int64_t count) { return (float*)take(count * sizeof(float)); };
  const Objective& o = p.objective;
  const int64_t tokens = p.batch.num_tokens, sequences = p.batch.num_sequences;
  const int64_t partial = kNumStatistics * p.tile_blocks();
  p.kept = (int64_t*)take((sequences + partial + 1) * 8 + p.sequence_blocks() * sizeof(Totals));
  p.totals = (Totals*)(p.kept + sequences);
  p.partial = (double*)(p.totals + p.sequence_blocks());
  p.arrived = (unsigned*)(p.partial + partial);
  Tokens& known = p.batch.tokens;
  if (o.ratio == kSequenceRatio || p.long_windows()) {
    p.log_trace = floats(o.ratio == kSequenceRatio ? sequences : tokens);
    known.log_trace = {p.log_trace, o.ratio != kSequenceRatio};
  }
  if (needs_place(o)) known.place.data = p.place = floats(tokens);
  if (needs_mean(o) || needs_prefix(o)) {
    p.sequence_sum = floats(needs_mean(o) ? sequences : tokens);
    known.sequence_sum = {p.sequence_sum, !needs_mean(o)};
  }
  if (p.long_windows() || p.through_traces()) p.scratch = floats(2 * tokens);
  if (p.through_traces()) p.out.grad_log_trace = floats(tokens);
}

// 0 at a masked token.
__device__ inline float log_ratio_of(const Batch& batch, int64_t t) {
  const Tokens& tokens = batch.tokens;
  return is_kept(batch, t) ? log_ratio(tokens.logprobs.data[t], tokens.old_logprobs.data[t]) : 0;
}

// ------------------------------------------------------------------------------------------------------- long windows

// A sum that goes on with what follows it, unless `open` is 0.
struct Run {
  double sum, open;
};

struct AddRuns {
  __device__ Run operator()(const Run& a, const Run& following) const {
    return a.open == 0 ? a : Run{a.sum + following.sum, following.open};
  }
};

// add_window_sums of core/window.h by a team, for the values of a sequence that begins at `begin`. Where windows end in
// another block than they start in, `prefix` holds the sums from the start of a block to each of its positions.
template <class Team, class Value>
__device__ void add_window_sums(Team& team, int64_t begin, int64_t length, int64_t count, bool ahead, Value value,
                                float* prefix, float* out) {
  const Run nothing{0, 1}, end{0, 0};
  const int64_t block = count < length ? count : length;
  if (block == 0) return;
  if (block < length || !ahead) {
    const auto mirrored = [&](int64_t i) { return length - 1 - i; };
    suffix_scan(
        team, length, nothing, end,
        [&](int64_t i) { return Run{value(begin + mirrored(i)), mirrored(i) % block != 0 ? 1.0 : 0.0}; }, AddRuns{},
        [&](int64_t i, const Run& mine, const Run& before) {
          prefix[begin + mirrored(i)] = (float)AddRuns{}(mine, before).sum;
        });
    team.sync();
  }
  if (block < length || ahead) {
    const int64_t first = ahead ? 1 : -block;  // the window of t starts at t + first
    suffix_scan(
        team, length, nothing, end, [&](int64_t i) { return Run{value(begin + i), (i + 1) % block != 0 ? 1.0 : 0.0}; },
        AddRuns{},
        [&](int64_t i, const Run& mine, const Run& following) {
          const int64_t t = i - first, next_block = (i / block + 1) * block;
          if (t < 0 || t >= length) return;
          out[begin + t] += (float)AddRuns{}(mine, following).sum;
          if (i % block == 0 || next_block >= length) return;
          out[begin + t] += prefix[begin + (i + block < length ? i + block : length) - 1];
        });
  }
  if (!ahead)  // windows that would start before the sequence
    for (int64_t t = 1 + team.rank(); t < block; t += team.size()) out[begin + t] += prefix[begin + t - 1];
  team.sync();
}

// out[t], for begin <= t < end: the sum of value(t + 1), ..., value(t + ahead) and value(t - back), ..., value(t - 1).
template <class Team, class Value>
__device__ void window_sums(Team& team, int64_t begin, int64_t end, int64_t back, int64_t ahead, Value value,
                            float* prefix, float* out) {
  for (int64_t t = begin + team.rank(); t < end; t += team.size()) out[t] = 0;
  team.sync();
  add_window_sums(team, begin, end - begin, ahead, true, value, prefix, out);
  add_window_sums(team, begin, end - begin, back, false, value, prefix, out);
}

// ---------------------------------------------------------------------------------------------------------- sequences

// Writes what the tokens of a sequence must know of it; returns how many are kept.
template <class Team>
__device__ int64_t look_at_sequence(Team& team, const PolicyLoss& p, int64_t sequence) {
  const Objective& o = p.objective;
  const Batch& batch = p.batch;
  const int64_t begin = begin_of(batch, sequence), end = begin_of(batch, sequence + 1), length = end - begin;
  const auto plus = [](auto a, auto b) { return a + b; };
  int64_t kept = length;
  if (batch.tokens.mask != nullptr) {
    int64_t mine = 0;
    for (int64_t t = begin + team.rank(); t < end; t += team.size()) mine += is_kept(batch, t);
    kept = reduce(team, mine, (int64_t)0, plus);
  }
  const double divisor = (double)(kept > 1 ? kept : 1);
  const auto summand_at = [&](int64_t t) {
    return is_kept(batch, t) ? summand(o, load_token(batch.tokens, t, sequence, kept)) : 0;
  };

  if (o.ratio == kSequenceRatio) {
    const double total = sum(team, length, [&](int64_t i) { return log_ratio_of(batch, begin + i); });
    if (team.rank() == 0) p.log_trace[sequence] = (float)(total / divisor);
  } else if (p.long_windows()) {
    window_sums(
        team, begin, end, o.back, o.ahead, [&](int64_t t) { return log_ratio_of(batch, t); }, p.scratch, p.log_trace);
  }
  if (needs_place(o)) {
    suffix_scan(
        team, length, (int64_t)0, (int64_t)0, [&](int64_t i) { return (int64_t)is_kept(batch, end - 1 - i); }, plus,
        [&](int64_t i, int64_t mine, int64_t before) { p.place[end - 1 - i] = (float)(mine + before); });
    team.sync();
  }
  if (needs_mean(o)) {
    const double total = sum(team, length, [&](int64_t i) { return summand_at(begin + i); });
    if (team.rank() == 0) p.sequence_sum[sequence] = (float)(total / divisor);
  } else if (needs_prefix(o)) {
    suffix_scan(
        team, length, 0.0, 0.0, [&](int64_t i) { return (double)summand_at(end - 1 - i); }, plus,
        [&](int64_t i, double mine, double before) { p.sequence_sum[end - 1 - i] = (float)(mine + before); });
  }
  if (team.rank() == 0) p.kept[sequence] = kept;
  return kept;
}

__global__ void __launch_bounds__(kSequenceThreads, 1) sequence_kernel(const __grid_constant__ PolicyLoss p) {
  advantages::Block block;
  Totals totals = no_totals();
  for (int64_t s = blockIdx.x; s < p.batch.num_sequences; s += gridDim.x) {
    const int64_t kept = look_at_sequence(block, p, s);
    totals = add(totals, {kept, kept > 0, begin_of(p.batch, s + 1) - begin_of(p.batch, s)});
  }
  if (threadIdx.x > 0) return;
  p.totals[blockIdx.x] = totals;
  if (blockIdx.x == 0) *p.arrived = 0;
}

// -------------------------------------------------------------------------------------------------------------- tiles

// The number of a sequence's first tile is that of the sequences and of the full tiles before it: at least the number
// of tiles before it, and known without a sum over sequences.
__device__ inline int64_t first_tile(const PolicyLoss& p, int64_t sequence) {
  return begin_of(p.batch, sequence) / p.tile_size + sequence;
}

// The last sequence whose first tile is not after `tile`, found by each warp for itself, 32 candidates at a time.
__device__ inline int64_t sequence_of_tile(const PolicyLoss& p, int64_t tile) {
  int64_t first = 0;
  for (int64_t size = p.batch.num_sequences; size > 1;) {
    const int64_t step = (size + 31) / 32, offset = threadIdx.x % 32 * step;
    const bool reached = offset < size && first_tile(p, first + offset) <= tile;
    const int64_t num_reached = __popc(__ballot_sync(0xffffffffu, reached));
    const int64_t chosen = num_reached > 0 ? (num_reached - 1) * step : 0;
    first += chosen;
    size = size - chosen < step ? size - chosen : step;
  }
  return first;
}

// Positions [begin, end) of one sequence.
struct Tile {
  int64_t sequence, sequence_begin, sequence_end, begin, end;
};

__device__ inline Tile find_tile(const PolicyLoss& p, int64_t tile) {
  const int64_t sequence = sequence_of_tile(p, tile);
  const int64_t sequence_begin = begin_of(p.batch, sequence), sequence_end = begin_of(p.batch, sequence + 1);
  const int64_t begin =
      position_in(p.batch.num_tokens, sequence_begin + (tile - first_tile(p, sequence)) * p.tile_size);
  const int64_t end = begin + p.tile_size < sequence_end ? begin + p.tile_size : sequence_end;
  return {sequence, sequence_begin, sequence_end, begin, end};
}

// Of all sequences, in every thread.
__device__ inline Totals totals_of(const PolicyLoss& p) {
  advantages::Block block;
  Totals totals = no_totals();
  for (int64_t i = threadIdx.x; i < p.sequence_blocks(); i += blockDim.x) totals = add(totals, p.totals[i]);
  return reduce(block, totals, no_totals(), [](const Totals& a, const Totals& b) { return add(a, b); });
}

// Sums and maxima over value(i, j) for 0 <= j < count: a warp for each statistic i calls store(i, result).
template <class Value, class Store>
__device__ void reduce_statistics(int64_t count, Value value, Store store) {
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < kNumStatistics; i += blockDim.x / 32) {
    const auto both = [i](double a, double b) { return i < kNumSums ? a + b : larger(a, b); };
    double x = i < kNumSums ? 0 : -(double)kInfinity;
    for (int64_t j = lane; j < count; j += 32) x = both(x, value(i, j));
    for (int distance = 16; distance > 0; distance /= 2) x = both(x, advantages::shuffle_down(x, distance));
    if (lane == 0) store(i, x);
  }
}

// Adds up the statistics of all threads of all blocks. Whichever block comes last adds in the same order.
__device__ inline void finish(const PolicyLoss& p, const Statistics<float>& mine) {
  __shared__ float of_threads[kNumStatistics * kTileThreads];
  __shared__ double total[kNumStatistics];
  __shared__ bool last;
  for (int i = 0; i < kNumSums; ++i) of_threads[i * blockDim.x + threadIdx.x] = mine.sum[i];
  for (int i = 0; i < kNumLargest; ++i) of_threads[(kNumSums + i) * blockDim.x + threadIdx.x] = mine.largest[i];
  __syncthreads();
  reduce_statistics(
      blockDim.x, [&](int i, int64_t j) { return of_threads[i * blockDim.x + j]; },
      [&](int i, double x) { p.partial[i * gridDim.x + blockIdx.x] = x; });
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(p.arrived, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  reduce_statistics(
      gridDim.x, [&](int i, int64_t j) { return p.partial[i * gridDim.x + j]; },
      [&](int i, double x) { total[i] = x; });
  __syncthreads();
  if (threadIdx.x > 0) return;
  Statistics<double> statistics;
  for (int i = 0; i < kNumSums; ++i) statistics.sum[i] = total[i];
  for (int i = 0; i < kNumLargest; ++i) statistics.largest[i] = total[kNumSums + i];
  write_metrics(statistics, p.metrics);
  if (!p.per_token) *p.loss = (float)statistics.sum[kLoss];
}

__global__ void __launch_bounds__(kTileThreads) tile_kernel(const __grid_constant__ PolicyLoss p) {
  __shared__ float log_ratios[kTileSize + kMaxReach];  // of the tile and of what its windows reach
  __shared__ float scale;
  const Objective& o = p.objective;
  const Batch& batch = p.batch;
  const bool windows = o.ratio == kTrace && !p.long_windows();

  const Totals totals = totals_of(p);
  Statistics<float> statistics = no_statistics(0.0f, -kInfinity);
  for (int64_t tile = blockIdx.x; tile < p.num_tiles(); tile += gridDim.x) {
    const auto [sequence, sequence_begin, sequence_end, begin, end] = find_tile(p, tile);
    const int64_t kept = p.kept[sequence];

    __syncthreads();  // the tile before is done with what is shared
    if (threadIdx.x == 0) scale = (float)scale_of(o, totals, kept, p.denominator, *p.loss_scale, p.per_token);
    if (windows)
      for (int64_t t = begin - o.back + threadIdx.x; t < end + o.ahead; t += blockDim.x)
        log_ratios[t - (begin - o.back)] = t >= sequence_begin && t < sequence_end ? log_ratio_of(batch, t) : 0;
    __syncthreads();

    for (int64_t t = begin + threadIdx.x; t < end; t += blockDim.x) {
      float loss = 0, grad_logprob = 0, grad_entropy = 0, grad_log_trace = 0;
      if (is_kept(batch, t)) {
        Token<float> token = load_token(batch.tokens, t, sequence, kept);
        token.log_trace = windows ? sum_of_window<float>(log_ratios + o.back + (t - begin), o.back, o.ahead)
                                  : load(batch.tokens.log_trace, t, sequence);
        token.sequence_sum = load(batch.tokens.sequence_sum, t, sequence);
        TokenResult<float> result = evaluate(o, token);
        result.loss *= scale;
        add_token(statistics, result, token.entropy, true);
        loss = result.loss;
        grad_logprob = scale * result.d_logprob;
        grad_entropy = -scale * o.entropy_coef;
        grad_log_trace = scale * result.d_log_trace;
      }
      if (p.out.loss != nullptr) p.out.loss[t] = loss;
      p.out.grad_logprobs[t] = grad_logprob;
      if (p.out.grad_entropy != nullptr) p.out.grad_entropy[t] = grad_entropy;
      if (p.out.grad_log_trace != nullptr) p.out.grad_log_trace[t] = grad_log_trace;
    }
  }
  finish(p, statistics);
}

// What the loss of each token is multiplied by, 0 where it is masked.
struct TokenScale {
  PolicyLoss p;  // all but an aggregation, its batch and its numbers at rest
  float* scale;
};

__global__ void __launch_bounds__(kTileThreads) token_scale_kernel(const __grid_constant__ TokenScale s) {
  const PolicyLoss& p = s.p;
  const Totals totals = totals_of(p);
  for (int64_t i = blockIdx.x; i < p.num_tiles(); i += gridDim.x) {
    const Tile tile = find_tile(p, i);
    const int64_t kept = p.kept[tile.sequence];
    const float scale = (float)scale_of(p.objective, totals, kept, p.denominator, *p.loss_scale, false);
    for (int64_t t = tile.begin + threadIdx.x; t < tile.end; t += blockDim.x)
      s.scale[t] = is_kept(p.batch, t) ? scale : 0;
  }
}

// ------------------------------------------------------------------------------------------- gradients through traces

// grad_logprobs[t] = upstream[t] * own[t] plus what comes through the traces of the tokens whose windows hold t.
struct TraceGradient {
  Batch batch;
  int64_t back, ahead;                // the windows
  const float* upstream;              // null: 1
  const float *own, *grad_log_trace;  // per token, as the forward wrote them
  float *grad_logprobs, *scratch;     // scratch: two per token
};

__global__ void __launch_bounds__(kSequenceThreads, 1) trace_gradient_kernel(const __grid_constant__ TraceGradient g) {
  advantages::Block block;
  const Batch& batch = g.batch;
  const auto times_upstream = [&](const float* x, int64_t t) {
    return !is_kept(batch, t) ? 0 : g.upstream == nullptr ? x[t] : g.upstream[t] * x[t];
  };
  float* through = g.scratch + batch.num_tokens;
  for (int64_t s = blockIdx.x; s < batch.num_sequences; s += gridDim.x) {
    const int64_t begin = begin_of(batch, s), end = begin_of(batch, s + 1);
    window_sums(
        block, begin, end, g.ahead, g.back, [&](int64_t t) { return times_upstream(g.grad_log_trace, t); }, g.scratch,
        through);
    for (int64_t t = begin + threadIdx.x; t < end; t += blockDim.x) {
      const Tokens& tokens = batch.tokens;
      const bool passes = is_kept(batch, t) && log_ratio_passes(tokens.logprobs.data[t], tokens.old_logprobs.data[t]);
      g.grad_logprobs[t] = times_upstream(g.own, t) + (passes ? through[t] : 0);
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- launches

// All call launch(kernel, blocks, threads, arguments) for each kernel, in their order.

template <class Launch>
void launch_trace_gradient(const TraceGradient& g, Launch launch) {
  launch(trace_gradient_kernel, blocks_for(g.batch.num_sequences, kMaxBlocks), kSequenceThreads, g);
}

template <class Launch>
void launch_policy_loss(const PolicyLoss& p, Launch launch) {
  launch(sequence_kernel, p.sequence_blocks(), kSequenceThreads, p);
  launch(tile_kernel, p.tile_blocks(), kTileThreads, p);
  if (p.through_traces())
    launch_trace_gradient({p.batch, p.objective.back, p.objective.ahead, nullptr, p.out.grad_logprobs,
                           p.out.grad_log_trace, p.out.grad_logprobs, p.scratch},
                          launch);
}

template <class Launch>
void launch_token_scale(const TokenScale& s, Launch launch) {
  launch(sequence_kernel, s.p.sequence_blocks(), kSequenceThreads, s.p);
  launch(token_scale_kernel, s.p.tile_blocks(), kTileThreads, s);
}

}  // namespace fusedpo
