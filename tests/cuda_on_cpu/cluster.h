// The names of csrc/cuda/cluster.cuh, in C++. To be included before all else. A copy destroys what its target holds at
// once, and arrives when it is waited for: who reads too long or too early sees nan, or is in a data race.
#pragma once

#include <map>

#include "cuda_on_cpu.h"

#define FUSEDPO_HAS_CLUSTERS 1

using std::max;
using std::min;

using __half = _Float16;
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half x) { return (float)x; }
inline __half __float2half_rn(float x) { return (__half)x; }
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>((uint32_t)x.bits << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

namespace fusedpo {

inline float exp2_approx(float x) { return std::exp2(x); }
inline float max_or_nan(float a, float b) { return std::isnan(a) || a > b ? a : b; }
inline float min_or_nan(float a, float b) { return std::isnan(a) || a < b ? a : b; }

template <class T>
uint32_t two_rounded(float low, float high);
template <>
inline uint32_t two_rounded<__half>(float low, float high) {
  return std::bit_cast<uint16_t>(__float2half_rn(low)) | (uint32_t)std::bit_cast<uint16_t>(__float2half_rn(high)) << 16;
}
template <>
inline uint32_t two_rounded<__nv_bfloat16>(float low, float high) {
  return __float2bfloat16_rn(low).bits | (uint32_t)__float2bfloat16_rn(high).bits << 16;
}

struct Cluster {
  int rank() const { return (int)cuda_on_cpu::self().rank; }
  int size() const { return (int)cuda_on_cpu::self().cluster->blocks.size(); }

  void sync() const {
    cuda_on_cpu::self().cluster->barrier.arrive_and_wait();
    cuda_on_cpu::self().has_met_cluster = true;
  }

  template <class T>
  T* in_block(T* mine, int rank) const {
    if (!cuda_on_cpu::self().has_met_cluster) std::abort();
    const ptrdiff_t offset = (char*)mine - (char*)cuda_on_cpu::self().block->shared.data();
    return (T*)((char*)cuda_on_cpu::self().cluster->blocks[rank].shared.data() + offset);
  }
};

class Arrival {
 public:
  void init() { state().store(0); }
  static void publish() {}

  void expect(unsigned bytes) {
    if (bytes == 0) finish_phase();
  }

  void copy(void* shared, const void* global, unsigned bytes) {
    if ((uintptr_t)shared % 16 != 0 || (uintptr_t)global % 16 != 0 || bytes % 16 != 0) std::abort();
    std::memset(shared, 0xff, bytes);
    const std::lock_guard lock(mutex);
    on_their_way[this] = {shared, global, bytes};
  }

  void wait(unsigned parity) {
    while (state().load() % 2 == parity)
      if (!finish_copy()) cuda_on_cpu::yield();
  }

 private:
  struct Copy {
    void* shared;
    const void* global;
    unsigned bytes;
  };
  static inline std::mutex mutex;
  static inline std::map<Arrival*, Copy> on_their_way;

  bool finish_copy() {
    const std::lock_guard lock(mutex);
    const auto copy = on_their_way.find(this);
    if (copy == on_their_way.end()) return false;
    std::memcpy(copy->second.shared, copy->second.global, copy->second.bytes);
    on_their_way.erase(copy);
    finish_phase();
    return true;
  }

  std::atomic_ref<uint64_t> state() { return std::atomic_ref<uint64_t>(phases_); }
  void finish_phase() { state().fetch_add(1); }

  uint64_t phases_;
};

}  // namespace fusedpo
