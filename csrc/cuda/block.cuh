// A thread block as a team (core/team.h). It has a multiple of 32 threads, at most 1,024, in one dimension.
#pragma once

#include <cstring>
#include <type_traits>

#include "core/team.h"

namespace fusedpo::advantages {

// `x` of the thread `by` lanes further on; its own where there is none.
template <class T>
__device__ T shuffle_down(const T& x, unsigned by) {
  using Word = std::conditional_t<sizeof(T) % sizeof(double) == 0, double, int>;
  static_assert(sizeof(T) % sizeof(Word) == 0);
  Word words[sizeof(T) / sizeof(Word)];
  memcpy(words, &x, sizeof x);
  for (Word& word : words) word = __shfl_down_sync(0xffffffffu, word, by);
  T result;
  memcpy(&result, words, sizeof result);
  return result;
}

struct Block {
  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
  __device__ void sync() const { __syncthreads(); }

  template <class T, class Op>
  __device__ T after(T mine, T& carry, Op op) const {
    static_assert(sizeof(T) % sizeof(double) == 0);
    __shared__ double memory[32 * sizeof(T) / sizeof(double)];
    T* warps = (T*)memory;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
    T suffix = mine;  // of the warp, from this lane on
    for (int distance = 1; distance < 32; distance *= 2) {
      const T other = shuffle_down(suffix, distance);
      if (lane + distance < 32) suffix = op(suffix, other);
    }
    const T next = shuffle_down(suffix, 1);
    if (lane == 0) warps[warp] = suffix;
    __syncthreads();
    T beyond = carry;  // this warp
    for (int w = num_warps - 1; w > warp; --w) beyond = op(warps[w], beyond);
    carry = beyond;
    for (int w = warp; w >= 0; --w) carry = op(warps[w], carry);
    __syncthreads();  // the next call writes there again
    return lane < 31 ? op(next, beyond) : beyond;
  }
};

}  // namespace fusedpo::advantages
