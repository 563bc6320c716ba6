// What devices of compute capability 9.0 and later have: clusters of thread blocks that reach each other's shared
// memory, and copies into shared memory that run by themselves. Also the floats of 16 bits and the instructions of the
// special-function unit. Tests bring a C++ version of all this, tests/cuda_on_cpu/cluster.h.
#pragma once

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// Code for older devices has nothing in the place of what clusters do.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FUSEDPO_HAS_CLUSTERS 1
#else
#define FUSEDPO_HAS_CLUSTERS 0
#endif

#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(128) type name[]

namespace fusedpo {

// 2^x within 2 ulp; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger one, or the smaller one; NaN if one of them is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
__device__ __forceinline__ float min_or_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// Two floats rounded to 16 bits, side by side in a word.
template <class T>
__device__ uint32_t two_rounded(float low, float high);
template <>
__device__ __forceinline__ uint32_t two_rounded<__half>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
__device__ __forceinline__ uint32_t two_rounded<__nv_bfloat16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

#if FUSEDPO_HAS_CLUSTERS

// A cluster of thread blocks, in one dimension.
struct Cluster {
  __device__ int rank() const { return (int)__clusterRelativeBlockRank(); }
  __device__ int size() const { return (int)__clusterSizeInBlocks(); }

  // A barrier of all threads of the cluster. What they wrote before it, also to global memory, they all see after it.
  __device__ void sync() const {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
  }

  // The place in the shared memory of another block that `mine` is in that of this block.
  template <class T>
  __device__ T* in_block(T* mine, int rank) const {
    return (T*)__cluster_map_shared_rank(mine, (unsigned)rank);
  }
};

// The arrival of copies in shared memory, one phase after the other: a thread says how many bytes it asks for, asks for
// them, and whoever waits for the phase, whose parity alternates from 0 on, sees them.
class Arrival {
 public:
  __device__ void init() { asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&state_)) : "memory"); }

  // Between init() and the first copy, by the thread that called init().
  __device__ static void publish() {
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
  }

  // To be called once per phase, before its copy; with 0 bytes the phase is over.
  __device__ void expect(unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(&state_)), "r"(bytes)
                 : "memory");
  }

  // Both addresses and the size are multiples of 16 bytes.
  __device__ void copy(void* shared, const void* global, unsigned bytes) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(address(&state_))
                 : "memory");
  }

  __device__ void wait(unsigned parity) const {
    unsigned over = 0;
    while (!over)
      asm volatile(
          "{\n"
          ".reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n"
          "}"
          : "=r"(over)
          : "r"(address(&state_)), "r"(parity)
          : "memory");
  }

 private:
  __device__ static unsigned address(const void* shared) { return (unsigned)__cvta_generic_to_shared(shared); }

  uint64_t state_;
};

#endif  // FUSEDPO_HAS_CLUSTERS

}  // namespace fusedpo

#endif  // __CUDACC__
