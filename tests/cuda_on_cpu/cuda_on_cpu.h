// CUDA kernels run on the host, each CUDA thread as a fiber, one block or cluster of blocks after the other: slow, but
// with the sanitizers of the host compiler, to which fibers are threads. To be included before all else. A thread that
// returns early drops out of the barriers to come.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

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

void yield();

// Counters are atomic for the thread sanitizer: who leaves knows what all others did before they arrived.
class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads), missing_(threads) {}

  void arrive_and_wait() {
    const unsigned phase = phase_;
    arrive();
    while (phase_ == phase) yield();
  }

  void arrive_and_drop() {
    --threads_;
    arrive();
  }

 private:
  void arrive() {
    if (--missing_ > 0) return;
    missing_ = threads_.load();
    ++phase_;
  }

  std::atomic<unsigned> threads_, missing_, phase_ = 0;
};

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

// Where a fiber, or the host, goes on.
struct Place {
  ucontext_t context;
  void* sanitizer;
};

struct Thread {
  Index index, block_index;
  unsigned rank = 0;             // of its block in the cluster
  bool has_met_cluster = false;  // before its first barrier, other blocks may not have begun
  Cluster* cluster = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned turn = 0;  // which of the slots the next shuffle uses
};

struct Fiber {
  Fiber();
  static constexpr size_t kStackBytes = 1 << 18;
  Place place;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Thread thread;
  std::atomic<bool> done = true;  // also tells the thread sanitizer that the host goes before and after each kernel
};

inline Index block_size, grid_size;
inline std::function<void()> body;  // of the threads of a launch
inline std::deque<Fiber> fibers;    // of all launches
inline Place host;
inline std::atomic<Fiber*> running;

inline Thread& self() { return running.load(std::memory_order_relaxed)->thread; }

// The thread sanitizer learns of no order between the two.
inline void go_on(Place& from, Place& to) {
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(to.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&from.context, &to.context);
}

inline void yield() { go_on(running.load(std::memory_order_relaxed)->place, host); }

inline void run_bodies() {
  for (;;) {
    Fiber& fiber = *running.load(std::memory_order_relaxed);
    if (fiber.done) std::abort();
    body();
    fiber.thread.warp->barrier.arrive_and_drop();
    fiber.thread.block->barrier.arrive_and_drop();
    fiber.thread.cluster->barrier.arrive_and_drop();
    fiber.done = true;
    yield();
  }
}

inline Fiber::Fiber() {
  getcontext(&place.context);
  place.context.uc_stack = {stack.get(), 0, kStackBytes};
  place.context.uc_link = nullptr;
  makecontext(&place.context, run_bodies, 0);
  place.context.uc_stack.ss_size = 0;  // the address sanitizer would forget its marks on this stack in every switch
#ifdef __SANITIZE_THREAD__
  place.sanitizer = __tsan_create_fiber(0);
#endif
}

struct Grid {
  unsigned blocks, threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks
};

// kernel<<<blocks, threads, shared_bytes>>>(arguments...), in clusters. By fibers; with CUDA_AS_COMPILED what nvcc made
// of the kernel, see as_compiled.h.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Grid& grid, const std::type_identity_t<Parameters>&... arguments) {
#ifdef CUDA_AS_COMPILED
  launch_compiled(kernel, grid, arguments...);
#else
  const auto [blocks, threads, shared_bytes, cluster_size] = grid;
  block_size = {threads, 1, 1};
  grid_size = {blocks, 1, 1};
  body = [&] { kernel(arguments...); };
#ifdef __SANITIZE_THREAD__
  if (fibers.empty()) host.sanitizer = __tsan_get_current_fiber();
#endif
  const unsigned team = cluster_size * threads;
  while (fibers.size() < team) fibers.emplace_back();
  for (unsigned first = 0; first < blocks; first += cluster_size) {
    Cluster cluster(cluster_size, threads, shared_bytes);
    for (unsigned member = 0; member < team; ++member) {
      const unsigned rank = member / threads, index = member % threads;
      Block& block = cluster.blocks[rank];
      fibers[member].thread = {{index}, {first + rank}, rank, false, &cluster, &block, &block.warps[index / kWarpSize]};
      fibers[member].done = false;
    }
    for (bool alive = true; alive;) {
      alive = false;
      for (unsigned member = 0; member < team; ++member) {
        if (fibers[member].done) continue;
        running = &fibers[member];
        go_on(host, fibers[member].place);
        alive = true;
      }
    }
  }
#endif
}

// The value of another lane of the warp; its own where there is no such lane. One barrier will do, since the slots that
// lanes may still be reading are not those that the next shuffle writes.
template <class T>
T shuffle(T value, unsigned lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Thread& thread = self();
  uint64_t* slots = thread.warp->slots[thread.turn];
  thread.turn = 1 - thread.turn;
  std::memcpy(&slots[thread.index.x % kWarpSize], &value, sizeof value);
  thread.warp->barrier.arrive_and_wait();
  if (lane < kWarpSize) std::memcpy(&value, &slots[lane], sizeof value);
  return value;
}

}  // namespace cuda_on_cpu

#define threadIdx cuda_on_cpu::self().index
#define blockIdx cuda_on_cpu::self().block_index
#define blockDim cuda_on_cpu::block_size
#define gridDim cuda_on_cpu::grid_size
#define DYNAMIC_SHARED(type, name) type* name = (type*)cuda_on_cpu::self().block->shared.data()

inline void __syncthreads() { cuda_on_cpu::self().block->barrier.arrive_and_wait(); }
inline void __syncwarp(unsigned = ~0u) { cuda_on_cpu::self().warp->barrier.arrive_and_wait(); }
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
