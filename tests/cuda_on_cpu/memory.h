// Memory for kernels: what they may access is known.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace cuda_on_cpu {

inline std::map<uint64_t, uint64_t> regions;  // bytes, by address

template <class T>
struct Allocator {
  using value_type = T;
  Allocator() = default;
  template <class U>
  Allocator(const Allocator<U>&) {}

  T* allocate(size_t count) {
    T* p = std::allocator<T>().allocate(count);
    regions[(uint64_t)p] = count * sizeof(T);
    return p;
  }
  void deallocate(T* p, size_t count) {
    regions.erase((uint64_t)p);
    std::allocator<T>().deallocate(p, count);
  }
  bool operator==(const Allocator&) const { return true; }
};

template <class T>
using Memory = std::vector<T, Allocator<T>>;

}  // namespace cuda_on_cpu
