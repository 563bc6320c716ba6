// CUDA kernels run by host threads, one per CUDA thread and one block after the other: slow, but with the sanitizers of
// the host compiler. To be included before all else. A thread that returns early drops out of the barriers to come.
#pragma once

#include <math.h>

#include <atomic>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

namespace cuda_on_cpu {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

constexpr unsigned kWarpSize = 32;

struct Warp {
  explicit Warp(unsigned lanes) : barrier(lanes) {}
  std::barrier<> barrier;
  uint64_t slots[kWarpSize] = {};
};

inline thread_local Index thread_index, block_index;
inline thread_local Warp* warp;
inline thread_local std::barrier<>* block_barrier;
inline Index block_size, grid_size;
inline std::vector<double> dynamic_shared;

// kernel<<<blocks, threads, shared_bytes>>>, where `kernel` is a call of it.
inline void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel, size_t shared_bytes = 0) {
  block_size = {threads, 1, 1};
  grid_size = {blocks, 1, 1};
  dynamic_shared.assign(shared_bytes / sizeof(double) + 1, NAN);
  for (unsigned block = 0; block < blocks; ++block) {
    std::barrier<> barrier(threads);
    std::vector<std::unique_ptr<Warp>> warps;
    for (unsigned first = 0; first < threads; first += kWarpSize)
      warps.push_back(std::make_unique<Warp>(threads - first < kWarpSize ? threads - first : kWarpSize));
    std::vector<std::thread> team;
    for (unsigned thread = 0; thread < threads; ++thread)
      team.emplace_back([&, thread] {
        thread_index = {thread, 0, 0};
        block_index = {block, 0, 0};
        warp = warps[thread / kWarpSize].get();
        block_barrier = &barrier;
        kernel();
        warp->barrier.arrive_and_drop();
        barrier.arrive_and_drop();
      });
    for (std::thread& thread : team) thread.join();
  }
}

// The value of another lane of the warp; its own where there is no such lane.
template <class T>
T shuffle(T value, unsigned lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned mine = thread_index.x % kWarpSize;
  std::memcpy(&warp->slots[mine], &value, sizeof value);
  warp->barrier.arrive_and_wait();
  if (lane < kWarpSize) std::memcpy(&value, &warp->slots[lane], sizeof value);
  warp->barrier.arrive_and_wait();
  return value;
}

}  // namespace cuda_on_cpu

#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::block_index
#define blockDim cuda_on_cpu::block_size
#define gridDim cuda_on_cpu::grid_size
#define DYNAMIC_SHARED(type, name) type* name = (type*)cuda_on_cpu::dynamic_shared.data()

inline void __syncthreads() { cuda_on_cpu::block_barrier->arrive_and_wait(); }
inline void __syncwarp(unsigned = ~0u) { cuda_on_cpu::warp->barrier.arrive_and_wait(); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <class T>
T __shfl_sync(unsigned, T value, unsigned lane) {
  return cuda_on_cpu::shuffle(value, lane % cuda_on_cpu::kWarpSize);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned by) {
  return cuda_on_cpu::shuffle(value, threadIdx.x % cuda_on_cpu::kWarpSize + by);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned by) {
  return cuda_on_cpu::shuffle(value, threadIdx.x % cuda_on_cpu::kWarpSize - by);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  return cuda_on_cpu::shuffle(value, (threadIdx.x % cuda_on_cpu::kWarpSize) ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned votes = 0;
  for (unsigned lane = 0; lane < cuda_on_cpu::kWarpSize; ++lane)
    votes |= (unsigned)__shfl_sync(~0u, (unsigned)vote, lane) << lane;
  return votes;
}

template <class T>
T atomicAdd(T* address, T value) {
  return std::atomic_ref<T>(*address).fetch_add(value);
}
template <class T>
T atomicMax(T* address, T value) {
  std::atomic_ref<T> target(*address);
  T old = target.load();
  while (old < value && !target.compare_exchange_weak(old, value)) {
  }
  return old;
}
