#include "policy_loss.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/window.h"
#include "dispatch.h"
#include "tensors.h"

namespace fusedpo::cpu {
namespace {

using torch::headeronly::ScalarType;

// Where each sequence starts in the flat tokens, and their number.
std::vector<int64_t> offsets_of(const Tensor& logprobs, const std::optional<Tensor>& cu_seqlens) {
  std::vector<int64_t> offsets;
  if (!cu_seqlens) {
    const int64_t rows = logprobs.dim() == 2 ? logprobs.size(0) : 1;
    for (int64_t row = 0; row <= rows; ++row) offsets.push_back(row * logprobs.size(logprobs.dim() - 1));
    return offsets;
  }
  const Tensor ends = torch::stable::contiguous(*cu_seqlens);
  offsets.assign(data<int64_t>(ends), data<int64_t>(ends) + ends.numel());
  if (offsets.front() != 0 || offsets.back() != logprobs.numel() || !std::is_sorted(offsets.begin(), offsets.end()))
    throw std::invalid_argument("cu_seqlens must start with 0, never decrease and end with the number of tokens " +
                                std::to_string(logprobs.numel()));
  return offsets;
}

// The tokens of a batch in tiles. The first tile of a sequence starts with it, so that the sums over a sequence do not
// depend on what stands before it; sums over tiles are taken in their order, whatever thread computed them.
class Tiling {
 public:
  Tiling(const Tensor& logprobs, const std::optional<Tensor>& cu_seqlens)
      : offsets_(offsets_of(logprobs, cu_seqlens)), first_tile_{0} {
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
    torch::stable::parallel_for(0, num_tiles(), grain, [&](int64_t begin, int64_t end) {
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
    torch::stable::parallel_for(0, num_sequences(), grain, [&](int64_t begin, int64_t end) {
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

Floats places(const Tiling& tiling, const bool* mask) {
  Floats result(tiling.num_tokens());
  tiling.for_each_sequence([&](int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t t = begin; t < end; ++t) {
      count += mask == nullptr || mask[t];
      result[t] = (float)std::max<int64_t>(count, 1);
    }
  });
  return result;
}

void sum_windows(const float* x, float* out, int64_t begin, int64_t end, int64_t back, int64_t ahead) {
  add_window_sums(x + begin, out + begin, end - begin, ahead, 1);
  add_window_sums(x + end - 1, out + end - 1, end - begin, back, -1);
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
      const bool kept = tokens.mask == nullptr || tokens.mask[t];
      if (kept && log_ratio_live(tokens.logprobs.data[t], tokens.old_logprobs.data[t])) grad_logprobs[t] += reaching[t];
    }
  });
}

// ------------------------------------------------------------------------------------------------------- aggregation

// What the loss of each token is multiplied by, per sequence.
std::vector<double> scales_of(const Objective& o, const Tiling& tiling, const std::vector<int64_t>& kept,
                              const float* denominator, double loss_scale, bool per_token) {
  int64_t tokens = 0, sequences = 0, longest = 1;
  for (int64_t s = 0; s < tiling.num_sequences(); ++s) {
    tokens += kept[s];
    sequences += kept[s] > 0;
    longest = std::max(longest, tiling.length(s));
  }
  const double count = denominator ? *denominator : o.aggregation == kTokenMean ? (double)tokens : (double)sequences;
  const double divided = loss_scale / (count == 0 ? 1 : count);
  const double norm = o.length_norm > 0 ? o.length_norm : (double)longest;
  std::vector<double> scales;
  for (const int64_t length : kept) {
    double scale = divided;
    if (per_token || o.aggregation == kTokenSum)
      scale = loss_scale;
    else if (o.aggregation == kSeqMeanTokenMean)
      scale /= (double)std::max<int64_t>(length, 1);
    else if (o.aggregation == kSeqMeanTokenSumNorm)
      scale /= norm;
    scales.push_back(scale);
  }
  return scales;
}

Objective decode_checked(const std::vector<int64_t>& parts, const std::vector<double>& values) {
  STD_TORCH_CHECK((int64_t)parts.size() == kNumParts && (int64_t)values.size() >= kNumValues &&
                      (int64_t)values.size() <= kNumValues + kMaxBounds,
                  "parts and values do not encode an objective");
  return decode(parts.data(), values.data(), (int64_t)values.size());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(
    Tensor logprobs_, std::optional<Tensor> old_logprobs_, Tensor advantages_, std::optional<Tensor> mask_,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> ref_logprobs_, std::optional<Tensor> entropy_,
    std::optional<Tensor> is_weights_, std::optional<Tensor> denominator, Tensor loss_scale, std::vector<int64_t> parts,
    std::vector<double> values, bool per_token) {
  const Objective o = decode_checked(parts, values);
  const Tensor logprobs = torch::stable::contiguous(logprobs_), advantages = torch::stable::contiguous(advantages_);
  const auto old_logprobs = contiguous(old_logprobs_), mask = contiguous(mask_);
  const auto ref_logprobs = contiguous(ref_logprobs_), entropy = contiguous(entropy_);
  const auto is_weights = contiguous(is_weights_);
  const auto shape = logprobs.sizes();
  const auto is_per_token = [&](const Tensor& x) {
    return x.dim() == logprobs.dim() && std::equal(shape.begin(), shape.end(), x.sizes().begin());
  };

  Tokens tokens;
  tokens.logprobs = {data<float>(logprobs)};
  tokens.old_logprobs = old_logprobs ? Values{data<float>(*old_logprobs)} : tokens.logprobs;
  tokens.ref_logprobs = {data<float>(ref_logprobs)};
  tokens.entropy = {data<float>(entropy)};
  tokens.advantages = {data<float>(advantages), is_per_token(advantages)};
  if (is_weights) tokens.is_weights = {data<float>(*is_weights), is_per_token(*is_weights)};
  tokens.mask = data<bool>(mask);

  const TokenKernels& kernels = token_kernels();
  const Tiling tiling(logprobs, cu_seqlens);
  const auto kept =
      tiling.sum_per_sequence<int64_t>([&](const Tile& tile) { return kernels.count(tokens.mask, tile); });
  const auto scales = scales_of(o, tiling, kept, data<float>(denominator), *data<float>(loss_scale), per_token);
  const Context context(o, tiling, kept, tokens);

  const auto floats = [&](bool wanted) {
    return wanted ? torch::stable::new_empty(logprobs, shape) : torch::stable::new_empty(logprobs, {0});
  };
  const Tensor grad_logprobs = floats(true), grad_entropy = floats(o.entropy_coef != 0);
  Tensor grad_log_trace = floats(o.differentiate);
  const Tensor loss = per_token ? floats(true) : torch::stable::new_empty(logprobs, {});
  const Tensor metrics = torch::stable::new_empty(logprobs, {kNumMetrics});
  const TokenOutputs outputs{per_token ? mutable_data<float>(loss) : nullptr, mutable_data<float>(grad_logprobs),
                             o.entropy_coef != 0 ? mutable_data<float>(grad_entropy) : nullptr,
                             o.differentiate ? mutable_data<float>(grad_log_trace) : nullptr};

  std::vector<Statistics<double>> of_tile(tiling.num_tiles());
  tiling.for_each_tile([&](int64_t i, const Tile& tile) {
    const double scale = scales[tile.sequence];
    of_tile[i] = kernels.evaluate(o, tokens, tile, (float)scale, outputs);
    of_tile[i].sum[kLoss] *= scale;
  });
  Statistics<double> total = no_statistics(0.0, -(double)kInfinity);
  for (const Statistics<double>& statistics : of_tile) add(total, statistics);
  write_metrics(total, mutable_data<float>(metrics));
  if (!per_token) {
    *mutable_data<float>(loss) = (float)total.sum[kLoss];
    if (o.differentiate)
      add_through_traces(tiling, tokens, data<float>(grad_log_trace), mutable_data<float>(grad_logprobs), o.back,
                         o.ahead);
    grad_log_trace = floats(false);
  }
  return {loss, metrics, grad_logprobs, grad_entropy, grad_log_trace};
}

Tensor policy_loss_backward(Tensor grad_loss_, Tensor grad_logprobs, Tensor grad_log_trace, Tensor logprobs_,
                            std::optional<Tensor> old_logprobs_, std::optional<Tensor> mask_,
                            std::optional<Tensor> cu_seqlens, int64_t back, int64_t ahead) {
  const Tensor grad_loss = torch::stable::contiguous(grad_loss_), logprobs = torch::stable::contiguous(logprobs_);
  const auto old_logprobs = contiguous(old_logprobs_), mask = contiguous(mask_);
  Tokens tokens;
  tokens.logprobs = {data<float>(logprobs)};
  tokens.old_logprobs = old_logprobs ? Values{data<float>(*old_logprobs)} : tokens.logprobs;
  tokens.mask = data<bool>(mask);

  const Tensor result = torch::stable::new_empty(logprobs, logprobs.sizes());
  Floats through(logprobs.numel());
  const float *upstream = data<float>(grad_loss), *own = data<float>(grad_logprobs);
  const float* own_log_trace = data<float>(grad_log_trace);
  float* grad = mutable_data<float>(result);
  for (size_t t = 0; t < through.size(); ++t) {
    grad[t] = upstream[t] * own[t];
    through[t] = upstream[t] * own_log_trace[t];
  }
  add_through_traces(Tiling(logprobs, cu_seqlens), tokens, through.data(), grad, back, ahead);
  return result;
}

}  // namespace fusedpo::cpu
