// The policy loss on the CPU: tiles of tokens over threads, each tile through a token kernel.
#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "batch_arguments.h"
#include "core/aggregation.h"
#include "core/window.h"
#include "dispatch.h"
#include "parallel.h"
#include "sequences.h"

namespace fusedpo::cpu {
namespace {

// The tokens of a batch in tiles. The first tile of a sequence starts with it, so that the sums over a sequence do not
// depend on what stands before it; sums over tiles are taken in their order, whatever thread computed them.
class Tiling {
 public:
  explicit Tiling(const Batch& batch) : offsets_(offsets_of(batch)), first_tile_{0} {
    for (int64_t s = 0; s < num_sequences(); ++s)
      first_tile_.push_back(first_tile_.back() + (length(s) + kTileSize - 1) / kTileSize);
  }

  int64_t num_tokens() const { return offsets_.back(); }
  int64_t num_sequences() const { return (int64_t)offsets_.size() - 1; }
  int64_t num_tiles() const { return first_tile_.back(); }
  int64_t length(int64_t sequence) const { return offsets_[sequence + 1] - offsets_[sequence]; }

  // visit(index, tile) on several threads.
  template <class Visit>
  void for_each_tile(Visit visit) const {
    const int64_t grain = 16;  // below some thousand tokens a thread is not worth waking
    parallel_for(0, num_tiles(), grain, [&](int64_t begin, int64_t end) {
      int64_t s = std::upper_bound(first_tile_.begin(), first_tile_.end(), begin) - first_tile_.begin() - 1;
      for (int64_t i = begin; i < end; ++i) {
        while (first_tile_[s + 1] <= i) ++s;
        const int64_t start = offsets_[s] + (i - first_tile_[s]) * kTileSize;
        visit(i, Tile{start, std::min(start + kTileSize, offsets_[s + 1]), s, offsets_[s], offsets_[s + 1]});
      }
    });
  }

  // visit(begin, end) of each sequence, on several threads.
  template <class Visit>
  void for_each_sequence(Visit visit) const {
    const int64_t grain = 1 + 8192 * num_sequences() / (num_tokens() + 1);
    parallel_for(0, num_sequences(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) visit(offsets_[s], offsets_[s + 1]);
    });
  }

  // The sum over the tiles of each sequence of value(tile).
  template <class T, class Value>
  std::vector<T> sum_per_sequence(Value value) const {
    std::vector<T> of_tile(num_tiles()), sums;
    for_each_tile([&](int64_t i, const Tile& tile) { of_tile[i] = value(tile); });
    for (int64_t s = 0; s < num_sequences(); ++s) {
      T sum = 0;
      for (int64_t i = first_tile_[s]; i < first_tile_[s + 1]; ++i) sum += of_tile[i];
      sums.push_back(sum);
    }
    return sums;
  }

 private:
  std::vector<int64_t> offsets_, first_tile_;
};

// ---------------------------------------------------------------------------- what a token must know of its sequence

using Floats = std::vector<float>;

// A value per token; write(tile, out) fills in those of a tile and returns their sum.
template <class Write>
Floats per_token(const Tiling& tiling, Write write) {
  Floats values(tiling.num_tokens());
  tiling.for_each_tile([&](int64_t, const Tile& tile) { write(tile, &values[tile.begin]); });
  return values;
}

// The mean of such values over the kept tokens of each sequence.
template <class Write>
Floats means(const Tiling& tiling, const std::vector<int64_t>& kept, Write write) {
  const auto sums = tiling.sum_per_sequence<double>([&](const Tile& tile) {
    float values[kTileSize];
    return write(tile, values);
  });
  Floats result;
  for (size_t s = 0; s < sums.size(); ++s) result.push_back((float)(sums[s] / (double)std::max<int64_t>(kept[s], 1)));
  return result;
}

Floats places(const Tiling& tiling, const uint8_t* mask) {
  Floats result(tiling.num_tokens());
  tiling.for_each_sequence([&](int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t t = begin; t < end; ++t) {
      count += mask == nullptr || mask[t] != 0;
      result[t] = (float)std::max<int64_t>(count, 1);
    }
  });
  return result;
}

void sum_windows(const float* x, float* out, int64_t begin, int64_t end, int64_t back, int64_t ahead) {
  add_window_sums(x + begin, out + begin, end - begin, ahead, true);
  add_window_sums(x + begin, out + begin, end - begin, back, false);
}

// Holds what `tokens` then points to.
struct Context {
  Floats log_trace, place, length, sequence_sum;

  Context(const Objective& o, const Tiling& tiling, const std::vector<int64_t>& kept, Tokens& tokens) {
    const TokenKernels& kernels = token_kernels();
    const auto log_ratios = [&](const Tile& tile, float* out) { return kernels.log_ratios(tokens, tile, out); };
    const auto summands = [&](const Tile& tile, float* out) { return kernels.summands(o, tokens, tile, out); };

    if (o.ratio == kSequenceRatio) {
      log_trace = means(tiling, kept, log_ratios);
      tokens.log_trace = {log_trace.data(), false};
    } else if (o.ratio == kTrace && (o.back > kMaxReach || o.ahead > kMaxReach - o.back)) {
      const Floats x = per_token(tiling, log_ratios);
      log_trace.resize(x.size());
      tiling.for_each_sequence(
          [&](int64_t begin, int64_t end) { sum_windows(x.data(), log_trace.data(), begin, end, o.back, o.ahead); });
      tokens.log_trace = {log_trace.data(), true};
    }
    if (needs_place(o)) {
      place = places(tiling, tokens.mask);
      tokens.place = {place.data(), true};
      for (const int64_t count : kept) length.push_back((float)std::max<int64_t>(count, 1));
      tokens.length = {length.data(), false};
    }
    if (needs_mean(o)) {
      sequence_sum = means(tiling, kept, summands);
      tokens.sequence_sum = {sequence_sum.data(), false};
    } else if (needs_prefix(o)) {
      sequence_sum = per_token(tiling, summands);
      tiling.for_each_sequence([&](int64_t begin, int64_t end) {
        double sum = 0;
        for (int64_t t = begin; t < end; ++t) sequence_sum[t] = (float)(sum += sequence_sum[t]);
      });
      tokens.sequence_sum = {sequence_sum.data(), true};
    }
  }
};

// The gradient that goes through the traces of other tokens: a token is in the windows of those that reach it.
void add_through_traces(const Tiling& tiling, const Tokens& tokens, const float* grad_log_trace, float* grad_logprobs,
                        int64_t back, int64_t ahead) {
  Floats reaching(tiling.num_tokens());
  tiling.for_each_sequence([&](int64_t begin, int64_t end) {
    sum_windows(grad_log_trace, reaching.data(), begin, end, ahead, back);
    for (int64_t t = begin; t < end; ++t) {
      const bool kept = tokens.mask == nullptr || tokens.mask[t] != 0;
      if (kept && log_ratio_passes(tokens.logprobs.data[t], tokens.old_logprobs.data[t]))
        grad_logprobs[t] += reaching[t];
    }
  });
}

std::vector<int64_t> num_kept(const Tiling& tiling, const uint8_t* mask) {
  return tiling.sum_per_sequence<int64_t>([&](const Tile& tile) { return token_kernels().count(mask, tile); });
}

// What the loss of each token is multiplied by, per sequence.
std::vector<double> scales_of(const AggregationArguments& a, const Tiling& tiling, const std::vector<int64_t>& kept,
                              bool per_token) {
  Totals totals = no_totals();
  for (size_t s = 0; s < kept.size(); ++s) totals = add(totals, {kept[s], kept[s] > 0, tiling.length(s)});
  std::vector<double> scales;
  for (const int64_t count : kept)
    scales.push_back(scale_of(a.objective, totals, count, a.denominator, *a.loss_scale, per_token));
  return scales;
}

// Arguments and results as the schema in python/fusedpo/ops/policy_loss.py says. Throws std::invalid_argument, which
// becomes a ValueError, where cu_seqlens are no offsets.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(const PolicyLossInputs& in) {
  const PolicyLossArguments a(in);
  const bool per_token = in.per_token;
  const Objective& o = a.objective;
  const PolicyLossResults results(in.logprobs, o, per_token);
  const TokenKernels& kernels = token_kernels();
  const Tiling tiling(a.batch);
  Tokens tokens = a.batch.tokens;
  const auto kept = num_kept(tiling, tokens.mask);
  const auto scales = scales_of(a, tiling, kept, per_token);
  const Context context(o, tiling, kept, tokens);

  const bool through_traces = o.differentiate && !per_token;
  Floats grad_log_trace(through_traces ? tiling.num_tokens() : 0);
  TokenOutputs out = results.of_tokens;
  if (through_traces) out.grad_log_trace = grad_log_trace.data();
  std::vector<Statistics<double>> of_tile(tiling.num_tiles());
  tiling.for_each_tile([&](int64_t i, const Tile& tile) {
    const double scale = scales[tile.sequence];
    of_tile[i] = kernels.evaluate(o, tokens, tile, (float)scale, out);
    of_tile[i].sum[kLoss] *= scale;
  });
  Statistics<double> total = no_statistics(0.0, -(double)kInfinity);
  for (const Statistics<double>& statistics : of_tile) add(total, statistics);
  write_metrics(total, results.data(results.metrics));
  if (!per_token) *results.data(results.loss) = (float)total.sum[kLoss];
  if (through_traces) add_through_traces(tiling, tokens, out.grad_log_trace, out.grad_logprobs, o.back, o.ahead);
  return {results.loss, results.metrics, results.grad_logprobs, results.grad_entropy, results.grad_log_trace};
}

Tensor token_scale(Tensor logprobs, OptionalTensor mask, OptionalTensor cu_seqlens, OptionalTensor denominator,
                   Tensor loss_scale, int64_t aggregation, double length_norm) {
  const TokenScaleArguments a(logprobs, mask, cu_seqlens, denominator, loss_scale, aggregation, length_norm);
  const Tiling tiling(a.batch);
  const uint8_t* kept = a.batch.tokens.mask;
  const auto scales = scales_of(a, tiling, num_kept(tiling, kept), false);
  tiling.for_each_tile([&](int64_t, const Tile& tile) {
    for (int64_t t = tile.begin; t < tile.end; ++t)
      a.data[t] = kept == nullptr || kept[t] != 0 ? (float)scales[tile.sequence] : 0;
  });
  return a.result;
}

Tensor policy_loss_backward(Tensor grad_loss, Tensor grad_logprobs, Tensor grad_log_trace, Tensor logprobs,
                            OptionalTensor old_logprobs, OptionalTensor mask, OptionalTensor cu_seqlens, int64_t back,
                            int64_t ahead) {
  BatchArguments a(logprobs, old_logprobs, mask, cu_seqlens);
  expect_in("back", back, 0, kWhole);
  expect_in("ahead", ahead, 0, kWhole);
  const float* upstream = a.read<float>("grad_loss", grad_loss, a.shape);
  const float* own = a.read<float>("grad_logprobs", grad_logprobs, a.shape);
  const float* own_log_trace = a.read<float>("grad_log_trace", grad_log_trace, a.shape);
  const Tiling tiling(a.batch);
  const Tensor result = torch::stable::new_empty(logprobs, logprobs.sizes());
  float* grad = static_cast<float*>(result.data_ptr());
  Floats through(a.batch.num_tokens);
  for (size_t t = 0; t < through.size(); ++t) {
    grad[t] = upstream[t] * own[t];
    through[t] = upstream[t] * own_log_trace[t];
  }
  add_through_traces(tiling, a.batch.tokens, through.data(), grad, back, ahead);
  return result;
}

}  // namespace
}  // namespace fusedpo::cpu

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CPU, m) {
  using namespace fusedpo;
  using Spread = fusedpo::Spread<&cpu::policy_loss, PolicyLossTypes>;
  m.impl("policy_loss.native", FUSEDPO_BOX(Spread::call));
  m.impl("token_scale.native", FUSEDPO_BOX(cpu::token_scale));
  m.impl("policy_loss_backward.native", FUSEDPO_BOX(cpu::policy_loss_backward));
}
