// Advantages on the CPU: groups, sequences or chunks over threads. The order of every sum is that of a single thread.
// What the arguments mean is said in python/fusedpo/ops/advantages.py. Values that it forbids throw
// std::invalid_argument, which becomes a ValueError.
#include <algorithm>
#include <atomic>
#include <string>
#include <tuple>
#include <vector>

#include "advantage_arguments.h"
#include "parallel.h"

namespace fusedpo::cpu {
namespace {

using namespace fusedpo::advantages;

constexpr int64_t kGrain = 4096;  // elements below which a thread is not worth waking

void check_lengths(const Array& lengths, const Array& mask, int64_t count) {
  for (int64_t i = 0; lengths && i < count; ++i)
    if ((!mask || mask[i] != 0) && !(lengths[i] >= 0)) fail("lengths must be >= 0, got ", lengths[i]);
}

void check_values(const GroupArguments& a) {
  const Samples& samples = a.samples;
  if (a.params.estimator == Estimator::kOPO) check_lengths(samples.other, samples.mask, a.count);
  for (int64_t i = 0; a.params.estimator == Estimator::kPassK && i < a.count; ++i)
    if (samples.kept(i) && samples.rewards[i] != 0 && samples.rewards[i] != 1)
      fail("rewards must be 0 or 1 for passk, got ", std::to_string(samples.rewards[i]));
  for (int64_t i = 0; a.params.estimator == Estimator::kReMax && a.ids && i < a.count; ++i)
    if (samples.kept(i) && (a.ids[i] < 0 || a.ids[i] >= samples.num_other))
      fail("group_ids must be 0 to ", samples.num_other - 1, ", as baselines, got ", a.ids[i]);
  std::vector<bool> seen(samples.order ? a.count : 0);
  for (int64_t i = 0; samples.order && i < a.count; ++i) {
    const int64_t sample = samples.order[i];
    if (sample < 0 || sample >= a.count || seen[sample])
      fail("order must hold each of the ", a.count, " samples once, got ", sample, " at position ", i);
    seen[sample] = true;
  }
}

void check_offsets(const Integers& cu_seqlens, int64_t num_sequences, int64_t num_tokens) {
  bool good = num_sequences >= 0 && cu_seqlens[0] == 0 && cu_seqlens[num_sequences] == num_tokens;
  for (int64_t s = 0; good && s < num_sequences; ++s) good = cu_seqlens[s] <= cu_seqlens[s + 1];
  if (!good) fail("cu_seqlens must start with 0, never decrease and end with the number of tokens ", num_tokens);
}

[[noreturn]] void fail_for_size(const GroupParams& params, int64_t label, int64_t size) {
  if (!compares_ranks(params.estimator))
    fail("every group must have at least 2 samples, but group ", label, " has size ", size);
  fail("k must be at most the size of the group", spare_samples(params.estimator) ? " - 1" : "", ", got k=", params.k,
       ", but group ", label, " has size ", size);
}

struct Scratch : RankScratch {
  explicit Scratch(int64_t size) : RankScratch{}, numbers(4 * size), sources(size) {
    sorted = numbers.data();
    sums = sorted + size;
    below = sums + size;
    above = below + size;
    source = sources.data();
  }
  std::vector<double> numbers;
  std::vector<int32_t> sources;
};

Tensor group_advantages(Tensor rewards, OptionalTensor ids, OptionalTensor order, int64_t group_size,
                        OptionalTensor other, OptionalTensor mask, int64_t estimator, int64_t k, bool unbiased,
                        double number, bool wide) {
  GroupArguments a(rewards, ids, order, group_size, other, mask, estimator, k, unbiased, number, wide);
  check_values(a);
  OneThread team;
  if (a.params.estimator == Estimator::kGPG) a.params.alpha = kept_per_nonzero(team, a.samples, a.count);

  std::vector<int64_t> starts;
  for (int64_t i = 0; i < a.count; i += a.ids ? 1 : group_size)
    if (!a.ids || i == 0 || a.ids[i] != a.ids[i - 1]) starts.push_back(i);
  const int64_t num_groups = (int64_t)starts.size();
  starts.push_back(a.count);
  int64_t largest = 0;
  for (int64_t g = 0; g < num_groups; ++g) largest = std::max(largest, starts[g + 1] - starts[g]);
  const auto label = [&](int64_t g) { return a.ids ? a.ids[starts[g]] : g; };

  std::atomic<int64_t> too_small{num_groups};  // the first such group: a throw inside parallel_for loses its message
  const bool ranks = compares_ranks(a.params.estimator);
  const int64_t average = num_groups > 0 ? a.count / num_groups : 1;
  parallel_for(0, num_groups, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, average)),
               [&](int64_t g, int64_t end) {
                 Scratch scratch(ranks ? largest : 0);
                 for (; g < end; ++g) {
                   const Group group{a.samples, starts[g], starts[g + 1] - starts[g], label(g)};
                   const int64_t kept = advantages::group_advantages(team, group, a.params, ranks ? &scratch : nullptr);
                   if (kept == 0 || kept >= smallest_group(a.params)) continue;
                   int64_t first = too_small;
                   while (g < first && !too_small.compare_exchange_weak(first, g)) {
                   }
                 }
               });
  if (const int64_t g = too_small; g < num_groups) {
    const Group group{a.samples, starts[g], starts[g + 1] - starts[g], label(g)};
    fail_for_size(a.params, label(g), census(team, group).kept);
  }
  return a.advantages;
}

std::tuple<Tensor, Tensor> token_advantages(Tensor rewards, OptionalTensor values, OptionalTensor logprobs,
                                            OptionalTensor old_logprobs, OptionalTensor mask, OptionalTensor cu_seqlens,
                                            OptionalTensor per_sequence, int64_t estimator, double gamma, double lam,
                                            double rho_bar, double c_bar, bool wide) {
  const TokenArguments a(rewards, values, logprobs, old_logprobs, mask, cu_seqlens, per_sequence, estimator, gamma, lam,
                         rho_bar, c_bar, wide);
  if (cu_seqlens) check_offsets(a.tokens.cu_seqlens, a.num_sequences, a.advantages.numel());
  const int64_t average = a.advantages.numel() / std::max<int64_t>(1, a.num_sequences);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, average));
  parallel_for(0, a.num_sequences, grain, [&](int64_t sequence, int64_t end) {
    OneThread team;
    for (; sequence < end; ++sequence) advantages::token_advantages(team, a.tokens, a.params, sequence);
  });
  return {a.advantages, a.returns};
}

Tensor step_advantages(Tensor values, Tensor step_rewards, Tensor step_ids, bool wide) {
  const StepArguments a(values, step_rewards, step_ids, wide);
  int64_t last = -1;
  for (int64_t t = 0; t < a.count; ++t) last = std::max(last, a.steps.ids[t]);
  if (last >= a.steps.num_steps)
    fail("step_ids must be less than the number of steps ", a.steps.num_steps, ", got ", last);
  if (a.count == 0) return a.advantages;
  const int64_t grain = std::max<int64_t>(1, kGrain / (a.steps.num_steps + a.steps.num_tokens));
  parallel_for(0, step_ids.size(0), grain, [&](int64_t row, int64_t end) {
    OneThread team;
    std::vector<double> of_steps(a.steps.num_steps);
    for (; row < end; ++row) advantages::step_advantages(team, a.steps, row, of_steps.data(), a.result);
  });
  return a.advantages;
}

Tensor whiten(Tensor x, OptionalTensor lengths, OptionalTensor mask, bool wide) {
  const WhiteningArguments a(x, lengths, mask, wide);
  check_lengths(a.whitening.lengths, a.whitening.mask, a.count);
  const auto for_each_chunk = [&](auto visit) {
    parallel_for(0, a.chunks, 1, [&](int64_t chunk, int64_t end) {
      for (; chunk < end; ++chunk)
        visit(chunk, chunk * kWhiteningChunk, std::min(a.count, (chunk + 1) * kWhiteningChunk));
    });
  };
  std::vector<Moments> partial(a.chunks);
  for_each_chunk([&](int64_t chunk, int64_t begin, int64_t end) {
    OneThread team;
    partial[chunk] = moments(team, a.whitening, begin, end);
  });
  Moments all{0, 0, 0};
  for (const Moments& chunk : partial) all = AddMoments{}(all, chunk);
  const Standardise standardise(all);
  for_each_chunk([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) standardise(a.whitening, i);
  });
  return a.whitened;
}

}  // namespace
}  // namespace fusedpo::cpu

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CPU, m) {
  using namespace fusedpo;
  m.impl("group_advantages.native", FUSEDPO_BOX(cpu::group_advantages));
  m.impl("token_advantages.native", FUSEDPO_BOX(cpu::token_advantages));
  m.impl("step_advantages.native", FUSEDPO_BOX(cpu::step_advantages));
  m.impl("whiten.native", FUSEDPO_BOX(cpu::whiten));
}
