// CUDA kernels run by host threads, one per CUDA thread and one block, or cluster of blocks, after the other: slow, but
// with the sanitizers of the host compiler. To be included before all else. A thread that returns early drops out of
// the barriers to come.
#pragma once

#include <math.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>
#include <type_traits>
#include <vector>

#ifdef CUDA_AS_COMPILED
#include "as_compiled.h"
#endif

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other; in clusters there is dynamic memory alone

namespace cuda_on_cpu {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

constexpr unsigned kWarpSize = 32;

#if defined(__SANITIZE_THREAD__)
// In libstdc++ all barriers share counters, from which the sanitizer would conclude that threads that wait at different
// barriers, as those of two warps do, are in order.
class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads), missing_(threads) {}

  void arrive_and_wait() {
    std::unique_lock lock(mutex_);
    const unsigned phase = phase_;
    arrive();
    complete_.wait(lock, [&] { return phase_ != phase; });
  }

  void arrive_and_drop() {
    const std::lock_guard lock(mutex_);
    --threads_;
    arrive();
  }

 private:
  void arrive() {
    if (--missing_ > 0) return;
    missing_ = threads_;
    ++phase_;
    complete_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable complete_;
  unsigned threads_, missing_, phase_ = 0;
};
#else
using Barrier = std::barrier<>;
#endif

struct Warp {
  explicit Warp(unsigned lanes) : barrier(lanes) {}
  Barrier barrier;
  uint64_t slots[2][kWarpSize] = {};
};

// What the threads of one block share.
struct Block {
  Block(unsigned threads, size_t shared_bytes) : barrier(threads), shared(shared_bytes / sizeof(double) + 1, NAN) {
    for (unsigned first = 0; first < threads; first += kWarpSize)
      warps.emplace_back(std::min(threads - first, kWarpSize));
  }
  Barrier barrier;
  std::deque<Warp> warps;
  std::vector<double> shared;
};

// What the threads of one cluster share.
struct Cluster {
  Cluster(unsigned count, unsigned threads, size_t shared_bytes) : barrier(count * threads) {
    for (unsigned rank = 0; rank < count; ++rank) blocks.emplace_back(threads, shared_bytes);
  }
  Barrier barrier;
  std::deque<Block> blocks;
};

inline thread_local Index thread_index, block_index;
inline thread_local unsigned rank_in_cluster;
inline thread_local bool has_met_cluster;  // before its first barrier, other blocks may not have begun
inline thread_local Cluster* cluster;
inline thread_local Block* block;
inline thread_local Warp* warp;
inline thread_local unsigned turn;  // which of the slots the next shuffle uses
inline Index block_size, grid_size;

struct Grid {
  unsigned blocks, threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks
};

// kernel<<<blocks, threads, shared_bytes>>>(arguments...), in clusters. By host threads; with CUDA_AS_COMPILED what
// nvcc made of the kernel, see as_compiled.h.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Grid& grid, const std::type_identity_t<Parameters>&... arguments) {
#ifdef CUDA_AS_COMPILED
  launch_compiled(kernel, grid, arguments...);
#else
  const auto [blocks, threads, shared_bytes, cluster_size] = grid;
  block_size = {threads, 1, 1};
  grid_size = {blocks, 1, 1};
  std::optional<Cluster> current(std::in_place, cluster_size, threads, shared_bytes);
  std::barrier between_clusters(cluster_size * threads,
                                [&]() noexcept { current.emplace(cluster_size, threads, shared_bytes); });
  std::vector<std::thread> team;
  for (unsigned member = 0; member < cluster_size * threads; ++member)
    team.emplace_back([&, member] {
      thread_index = {member % threads, 0, 0};
      rank_in_cluster = member / threads;
      for (unsigned first = 0; first < blocks; first += cluster_size) {
        block_index = {first + rank_in_cluster, 0, 0};
        cluster = &*current;
        block = &cluster->blocks[rank_in_cluster];
        warp = &block->warps[thread_index.x / kWarpSize];
        turn = 0;
        has_met_cluster = false;
        kernel(arguments...);
        warp->barrier.arrive_and_drop();
        block->barrier.arrive_and_drop();
        cluster->barrier.arrive_and_drop();
        between_clusters.arrive_and_wait();
      }
    });
  for (std::thread& thread : team) thread.join();
#endif
}

// The value of another lane of the warp; its own where there is no such lane. One barrier will do, since the slots that
// lanes may still be reading are not those that the next shuffle writes.
template <class T>
T shuffle(T value, unsigned lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t* slots = warp->slots[turn];
  turn = 1 - turn;
  std::memcpy(&slots[thread_index.x % kWarpSize], &value, sizeof value);
  warp->barrier.arrive_and_wait();
  if (lane < kWarpSize) std::memcpy(&value, &slots[lane], sizeof value);
  return value;
}

}  // namespace cuda_on_cpu

#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::block_index
#define blockDim cuda_on_cpu::block_size
#define gridDim cuda_on_cpu::grid_size
#define DYNAMIC_SHARED(type, name) type* name = (type*)cuda_on_cpu::block->shared.data()

inline void __syncthreads() { cuda_on_cpu::block->barrier.arrive_and_wait(); }
inline void __syncwarp(unsigned = ~0u) { cuda_on_cpu::warp->barrier.arrive_and_wait(); }
inline void __threadfence() {}  // blocks run one after the other

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
// Lane i votes with bit i.
inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned votes = (unsigned)vote << threadIdx.x % cuda_on_cpu::kWarpSize;
  for (unsigned distance = 1; distance < cuda_on_cpu::kWarpSize; distance *= 2)
    votes |= __shfl_xor_sync(~0u, votes, distance);
  return votes;
}
inline int __popc(unsigned bits) { return std::popcount(bits); }

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
