// Advantages on a GPU: a thread block per group, per sequence or per chunk. Free of torch.
#pragma once

#include "block.cuh"
#include "core/group_advantages.h"
#include "core/token_advantages.h"

namespace fusedpo::advantages {

constexpr int kThreads = 256;
constexpr int64_t kSharedSamples = 512;  // groups of up to so many are sorted in shared memory

// The numbers of threads that suit so many elements.
inline int threads_for(int64_t elements) {
  return elements >= kThreads ? kThreads : elements <= 32 ? 32 : (int)(elements + 31) / 32 * 32;
}

// The end of the run of equal ids from `start`.
template <class Team>
FUSEDPO_DEVICE int64_t end_of_run(Team& team, const Integers& ids, int64_t start, int64_t count) {
  const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t label = ids[start];
  for (int64_t first = start + 1; first < count; first += team.size()) {
    const int64_t i = first + team.rank();
    const int64_t end = reduce(team, i < count && ids[i] != label ? i : count, count, smaller);
    if (end < count) return end;
  }
  return count;
}

// The group of this block: one of `group_size`, or, where there are ids, that of the position whose number the block
// has. Of those blocks only the first of each run of ids has one, the others have an empty group.
template <class Team>
FUSEDPO_DEVICE Group group_of_block(Team& team, int64_t block, const Samples& samples, const Integers& ids,
                                    int64_t count, int64_t group_size) {
  const int64_t start = ids ? block : block * group_size;
  if (ids && start > 0 && ids[start] == ids[start - 1]) return {samples, start, 0, 0};
  const int64_t end = ids ? end_of_run(team, ids, start, count) : start + group_size;
  return {samples, start, (end < count ? end : count) - start, ids ? ids[start] : block};
}

__global__ void __launch_bounds__(kThreads, 2)
    baseline_kernel(const __grid_constant__ Samples samples, const __grid_constant__ Integers ids, int64_t count,
                    int64_t group_size, GroupParams params) {
  Block block;
  const Group group = group_of_block(block, blockIdx.x, samples, ids, count, group_size);
  if (group.size == 0) return;
  if (params.estimator == Estimator::kGPG) params.alpha = kept_per_nonzero(block, samples, count);
  group_advantages(block, group, params, (RankScratch*)nullptr);
}

// `numbers` and `sources` have room for 4 and 1 per sample, or are null where no group has more than kSharedSamples.
__global__ void __launch_bounds__(kThreads, 2)
    ranks_kernel(const __grid_constant__ Samples samples, const __grid_constant__ Integers ids, int64_t count,
                 int64_t group_size, const __grid_constant__ GroupParams params, double* numbers, int32_t* sources) {
  __shared__ double shared_numbers[4 * kSharedSamples];
  __shared__ int32_t shared_sources[kSharedSamples];
  Block block;
  const Group group = group_of_block(block, blockIdx.x, samples, ids, count, group_size);
  if (group.size == 0) return;
  const bool small = group.size <= kSharedSamples;
  double* memory = small ? shared_numbers : numbers + 4 * group.start;
  RankScratch scratch{memory,
                      memory + group.size,
                      memory + 2 * group.size,
                      memory + 3 * group.size,
                      small ? shared_sources : sources + group.start,
                      0};
  group_advantages(block, group, params, &scratch);
}

__global__ void __launch_bounds__(kThreads)
    token_advantages_kernel(const __grid_constant__ Tokens tokens, const __grid_constant__ TokenParams params) {
  Block block;
  token_advantages(block, tokens, params, blockIdx.x);
}

__global__ void __launch_bounds__(kThreads)
    step_advantages_kernel(const __grid_constant__ Steps steps, double* of_steps, Result result) {
  Block block;
  step_advantages(block, steps, blockIdx.x, of_steps + blockIdx.x * steps.num_steps, result);
}

__global__ void __launch_bounds__(kThreads)
    moments_kernel(const __grid_constant__ Whitening whitening, int64_t count, Moments* partial) {
  Block block;
  const int64_t begin = blockIdx.x * kWhiteningChunk, end = begin + kWhiteningChunk;
  const Moments mine = moments(block, whitening, begin, end < count ? end : count);
  if (threadIdx.x == 0) partial[blockIdx.x] = mine;
}

__global__ void __launch_bounds__(kThreads)
    whiten_kernel(const __grid_constant__ Whitening whitening, int64_t count, const Moments* partial, int64_t chunks) {
  Block block;
  const Moments none{0, 0, 0};
  Moments mine = none;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) mine = AddMoments{}(mine, partial[chunk]);
  const Standardise standardise(reduce(block, mine, none, AddMoments{}));
  const int64_t begin = blockIdx.x * kWhiteningChunk, end = begin + kWhiteningChunk;
  for (int64_t i = begin + threadIdx.x; i < end && i < count; i += blockDim.x) standardise(whitening, i);
}

}  // namespace fusedpo::advantages
