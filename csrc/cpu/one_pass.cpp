// Bytes: every evaluated row is read once and its gradient written once; between the two it stays in the core's L2.
//
// Every sequence is walked from its end, so that the log-ratios after a token, which its trace needs, are known when
// its row is there. The evaluated rows are cut into segments of equal numbers, one per thread. Where the windows of a
// segment reach beyond its end, the rows there are reduced before any thread starts to walk: in place, they are about
// to be overwritten. What a row gives depends on the segments in no way.

#include "one_pass.h"

#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "logits.h"
#include "sequences.h"

namespace fusedpo::cpu {
namespace {

struct Walk : BatchArguments {
  Walk(const Tensor& logits, const Tensor& grad_logits, const Tensor& logprobs_, const Tensor& entropy_,
       const OptionalTensor& rows_, const Tensor& token_ids_, const Tensor& temperature_,
       const OptionalTensor& old_logprobs, const Tensor& advantages, const OptionalTensor& mask,
       const OptionalTensor& cu_seqlens, const OptionalTensor& ref_logprobs, const OptionalTensor& is_weights,
       const Tensor& scale_, const std::vector<int64_t>& parts, const std::vector<double>& values)
      : BatchArguments(logprobs_, old_logprobs, mask, cu_seqlens),
        objective(objective_of(parts, values)),
        tokens(batch.tokens),
        from("logits", logits),
        to("logits", grad_logits),
        kernels(row_kernels_for("logits", logits)),
        offsets(offsets_of(batch)),
        token_ids(read<int64_t>("token_ids", token_ids_, shape)),
        temperatures(*this, temperature_, shape),
        scale(read<float>("scale", scale_, shape)),
        logprobs(write<float>("logprobs", logprobs_, shape)),
        entropy(write<float>("entropy", entropy_, shape)),
        stats(from.count),
        grad_logprobs(batch.num_tokens),
        grad_entropy(batch.num_tokens) {
    expect_one_pass(objective);
    expect_device("logits", logits);
    expect_shape("logits", logits, logits_shape(logits, shape, rows_));
    tokens.advantages = per_token_or_sequence("advantages", advantages);
    tokens.ref_logprobs = per_token("ref_logprobs", ref_logprobs);
    tokens.is_weights = per_token_or_sequence("is_weights", is_weights);
    find_rows(read<int64_t>("rows", rows_, {from.count}));
    if (objective.ratio == kTrace && objective.ahead > kMaxReach) remember_log_ratios();
  }

  void run() {
    const auto segments = cut();
    std::vector<int64_t> after;
    for (const Segment& segment : segments) add_rows_after(segment, after);
    std::vector<char> known(from.count, 0);
    for_each_row(after, from.size, [&](int64_t row) {
      reduce(row);
      known[row] = 1;
    });
    parallel_for(0, (int64_t)segments.size(), 1, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        for (int64_t i = segments[s].end - 1; i >= segments[s].begin; --i) {
          if (!known[evaluated[i]]) reduce(evaluated[i]);
          write_gradient(evaluated[i]);
        }
      }
    });
    const auto skipped = rows_where(token_of.empty() ? from.count : 0, [&](int64_t row) { return !is_kept(row); });
    for_each_row(skipped, from.size, [&](int64_t row) { clear(to[row], to.bytes_per_row()); });
  }

 private:
  // evaluated[begin, end).
  struct Segment {
    int64_t begin, end;
  };

  int64_t token(int64_t row) const { return token_of.empty() ? row : token_of[row]; }
  bool is_kept(int64_t token) const { return tokens.mask == nullptr || tokens.mask[token] != 0; }

  int64_t sequence_of(int64_t token) const {
    return std::upper_bound(offsets.begin(), offsets.end(), token) - offsets.begin() - 1;
  }

  void find_rows(const int64_t* rows) {
    if (rows != nullptr) {
      token_of.assign(rows, rows + from.count);
      for (int64_t row = 0; row < from.count; ++row) {
        const int64_t t = rows[row], before = row == 0 ? -1 : rows[row - 1];
        if (t <= before || t >= batch.num_tokens || !is_kept(t))
          fail("rows must be ascending positions of kept tokens, got ", t);
      }
      evaluated = rows_where(from.count, [](int64_t) { return true; });
    } else {
      evaluated = rows_where(from.count, [&](int64_t row) { return is_kept(row); });
    }
    for (const int64_t row : evaluated) {
      const int64_t t = token(row);
      if (token_ids[t] < 0 || token_ids[t] >= from.size)
        fail("token_ids must be in [0, ", from.size, ") at kept rows, got ", token_ids[t], " at flat position ", t);
      if (!(temperatures[t] > 0 && temperatures[t] < INFINITY))
        fail("temperature must be positive and finite, got ", std::to_string(temperatures[t]), " at row ", t);
    }
  }

  std::vector<Segment> cut() const {
    const int64_t count = evaluated.size(), grain = grain_of(from.size);
    const int64_t wanted = std::min<int64_t>(torch::stable::get_num_threads(), (count + grain - 1) / grain);
    std::vector<Segment> segments;
    for (int64_t s = 0; s < wanted; ++s) segments.push_back({count * s / wanted, count * (s + 1) / wanted});
    return segments;
  }

  // The evaluated rows that windows of the segment reach beyond its end, if they are not among `rows` yet.
  void add_rows_after(const Segment& segment, std::vector<int64_t>& rows) const {
    const int64_t last = token(evaluated[segment.end - 1]), end = offsets[sequence_of(last) + 1];
    for (size_t i = segment.end; i < evaluated.size(); ++i) {
      const int64_t t = token(evaluated[i]);
      if (t >= end || t > last + objective.ahead) break;
      if (rows.empty() || rows.back() < evaluated[i]) rows.push_back(evaluated[i]);
    }
  }

  void reduce(int64_t row) {
    const int64_t t = token(row);
    const char* x = from[row];
    stats[row] = kernels.reduce(x, from.size, temperatures[t], true);
    const RowSummary summary(stats[row], temperatures[t]);
    logprobs[t] = summary.logprob(kernels.value(x, token_ids[t]));
    entropy[t] = summary.entropy();
    if (!log_ratios.empty()) log_ratios[t] = log_ratio_at(t);
  }

  void write_gradient(int64_t row) {
    const int64_t t = token(row), sequence = sequence_of(t), end = offsets[sequence + 1];
    if (!log_ratios.empty()) {
      double sum = 0;
      for (int64_t i = t + 1; i < end && i <= t + objective.ahead; ++i) sum += log_ratios[i];
      log_traces[t] = (float)sum;
    }
    const TokenOutputs out{nullptr, grad_logprobs.data(), objective.entropy_coef != 0 ? grad_entropy.data() : nullptr,
                           nullptr};
    token_kernels().evaluate(objective, tokens, {t, t + 1, sequence, offsets[sequence], end}, scale[t], out);
    const double at_id = grad_logprobs[t];
    float scratch;
    if (grad_logprobs[t] == 0 && grad_entropy[t] == 0)
      std::memset(to[row], 0, to.bytes_per_row());  // in the cache, where the row was just read
    else
      kernels.gradient(from[row], to[row], from.size, stats[row],
                       {token_ids + t, &grad_logprobs[t], &at_id, &scratch, 1, grad_entropy[t], temperatures[t]});
  }

  // A window too long for the token kernels is summed here, from log-ratios that are kept.
  void remember_log_ratios() {
    log_ratios.resize(batch.num_tokens);
    log_traces.resize(batch.num_tokens);
    tokens.log_trace = {log_traces.data(), true};
    if (token_of.empty()) return;
    for (int64_t t = token_of.back() + 1; t < batch.num_tokens; ++t) log_ratios[t] = is_kept(t) ? log_ratio_at(t) : 0;
  }

  float log_ratio_at(int64_t t) const { return log_ratio(tokens.logprobs.data[t], tokens.old_logprobs.data[t]); }

  const Objective objective;
  Tokens tokens;
  const Rows from, to;
  const RowKernels& kernels;
  const std::vector<int64_t> offsets;
  const int64_t* token_ids;
  const Temperatures temperatures;
  const float* scale;
  float *logprobs, *entropy;
  std::vector<RowStats> stats;                     // per row
  std::vector<float> grad_logprobs, grad_entropy;  // per token
  std::vector<float> log_ratios, log_traces;       // per token; empty unless the window is a long one
  std::vector<int64_t> token_of;                   // of each row; empty: row r is token r
  std::vector<int64_t> evaluated;                  // the rows that are evaluated
};

}  // namespace

Tensor one_pass(Tensor logits, Tensor logprobs, Tensor entropy, OptionalTensor rows, Tensor token_ids,
                Tensor temperature, OptionalTensor old_logprobs, Tensor advantages, OptionalTensor mask,
                OptionalTensor cu_seqlens, OptionalTensor ref_logprobs, OptionalTensor is_weights, Tensor scale,
                std::vector<int64_t> parts, std::vector<double> values) {
  const Tensor grad_logits = torch::stable::new_empty(logits, logits.sizes());
  ask_for_huge_pages(grad_logits);
  Walk(logits, grad_logits, logprobs, entropy, rows, token_ids, temperature, old_logprobs, advantages, mask, cu_seqlens,
       ref_logprobs, is_weights, scale, parts, values)
      .run();
  return grad_logits;
}

void one_pass_(Tensor logits, Tensor logprobs, Tensor entropy, OptionalTensor rows, Tensor token_ids,
               Tensor temperature, OptionalTensor old_logprobs, Tensor advantages, OptionalTensor mask,
               OptionalTensor cu_seqlens, OptionalTensor ref_logprobs, OptionalTensor is_weights, Tensor scale,
               std::vector<int64_t> parts, std::vector<double> values) {
  Walk(logits, logits, logprobs, entropy, rows, token_ids, temperature, old_logprobs, advantages, mask, cu_seqlens,
       ref_logprobs, is_weights, scale, parts, values)
      .run();
}

void scale_(Tensor gradient, Tensor factor_) {
  const float factor = *Arguments("gradient", gradient).read<float>("factor", factor_, {});
  const Rows rows("gradient", gradient);
  const RowKernels& kernels = row_kernels_for("gradient", gradient);
  if (factor == 1) return;
  for_each_row(rows_where(rows.count, [](int64_t) { return true; }), rows.size,
               [&](int64_t row) { kernels.scale(rows[row], rows.size, factor); });
}

}  // namespace fusedpo::cpu
