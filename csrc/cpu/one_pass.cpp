// From logits to the gradient of the loss on the CPU, each row of logits read and written once.
//
// Bytes: every evaluated row is read once and its gradient written once; between the two it stays in the core's L2.
//
// Every sequence is walked from its end, so that the log-ratios after a token, which its trace needs, are known when
// its row is there. The evaluated rows are cut into segments of equal numbers, one per thread. Where the windows of a
// segment reach beyond its end, the rows there are reduced before any thread starts to walk: in place, they are about
// to be overwritten. What a row gives depends on the segments in no way.

#include <algorithm>
#include <cstring>
#include <vector>

#include "batch_arguments.h"
#include "dispatch.h"
#include "logits.h"
#include "sequences.h"

namespace fusedpo::cpu {
namespace {

struct Walk : BatchArguments {
  explicit Walk(const OnePassInputs& in)
      : BatchArguments(in.logprobs, in.batch),
        objective(objective_of(in.parts, in.values)),
        tokens(batch.tokens),
        from("logits", in.logits),
        to(output_rows(*this, in.logits, in.out)),
        kernels(row_kernels_for("logits", in.logits)),
        offsets(offsets_of(batch)),
        token_ids(read<int64_t>("token_ids", in.token_ids, shape)),
        temperatures(*this, in.temperature, shape),
        scale(read<float>("scale", in.scale, shape)),
        logprobs(write<float>("logprobs", in.logprobs, shape)),
        entropy(write<float>("entropy", in.entropy, shape)),
        stats(from.count),
        grad_logprobs(batch.num_tokens),
        grad_entropy(batch.num_tokens) {
    expect_one_pass(objective);
    expect_device("logits", in.logits);
    expect_shape("logits", in.logits, logits_shape(in.logits, shape, in.rows));
    find_rows(read<int64_t>("rows", in.rows, {from.count}));
    if (objective.ratio == kTrace && objective.ahead > kMaxReach) remember_log_ratios();
  }

  void run() {
    const auto segments = cut();
    std::vector<int64_t> after;
    for (const Segment& segment : segments) add_rows_after(segment, after);
    std::vector<char> known(from.count, 0);
    for_each_row(after, from.size, [&](int64_t row) {
      reduce(row, nullptr);
      known[row] = 1;
    });
    parallel_for(0, (int64_t)segments.size(), 1, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        for (int64_t i = segments[s].end - 1; i >= segments[s].begin; --i) {
          const char* next = i > segments[s].begin ? from[evaluated[i - 1]] : nullptr;
          if (!known[evaluated[i]]) reduce(evaluated[i], next);
          write_gradient(evaluated[i], next);
        }
      }
    });
    const auto skipped = rows_where(from.count, [&](int64_t row) { return !is_kept(token(row)); });
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
        if (t <= before || t >= batch.num_tokens) fail("rows must be ascending positions of tokens, got ", t);
      }
    }
    evaluated = rows_where(from.count, [&](int64_t row) { return is_kept(token(row)); });
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

  void reduce(int64_t row, const char* next) {
    const int64_t t = token(row);
    const char* x = from[row];
    stats[row] = kernels.reduce(x, from.size, temperatures[t], true, next);
    const RowSummary summary(stats[row], temperatures[t]);
    logprobs[t] = summary.logprob(kernels.value(x, token_ids[t]));
    entropy[t] = summary.entropy();
    if (!log_ratios.empty()) log_ratios[t] = log_ratio_at(t);
  }

  void write_gradient(int64_t row, const char* next) {
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
                       {token_ids + t, &grad_logprobs[t], &at_id, &scratch, 1, grad_entropy[t], temperatures[t]}, next);
  }

  // A window too long for the token kernels is summed here, from log-ratios that are kept.
  void remember_log_ratios() {
    log_ratios.resize(batch.num_tokens);
    log_traces.resize(batch.num_tokens);
    tokens.log_trace = {log_traces.data(), true};
    if (token_of.empty()) return;
    for (int64_t t = token_of.front() + 1; t < batch.num_tokens; ++t) log_ratios[t] = is_kept(t) ? log_ratio_at(t) : 0;
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

// Arguments as the schema in python/fusedpo/ops/one_pass.py says. Throws std::invalid_argument, which becomes a
// ValueError, for a bad id or temperature at an evaluated row, and where cu_seqlens or rows are none; nothing is
// overwritten then.
void one_pass(const OnePassInputs& in) { Walk(in).run(); }

void scale_(Tensor gradient, Tensor factor_) {
  const float factor = *Arguments("gradient", gradient).read<float>("factor", factor_, {});
  const Rows rows("gradient", gradient);
  const RowKernels& kernels = row_kernels_for("gradient", gradient);
  if (factor == 1) return;
  for_each_row(rows_where(rows.count, [](int64_t) { return true; }), rows.size,
               [&](int64_t row) { kernels.scale(rows[row], rows.size, factor); });
}

}  // namespace
}  // namespace fusedpo::cpu

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CPU, m) {
  using namespace fusedpo;
  using Spread = fusedpo::Spread<&cpu::one_pass, OnePassTypes>;
  m.impl("one_pass.native", FUSEDPO_BOX(Spread::call));
  m.impl("scale_.native", FUSEDPO_BOX(cpu::scale_));
}
