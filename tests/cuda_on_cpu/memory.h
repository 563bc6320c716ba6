// Memory for kernels: what they may access is known.
#pragma once

#include <cstdint>
#include <map>
#include <new>
#include <vector>

namespace cuda_on_cpu {

inline std::map<uint64_t, uint64_t> regions;  // bytes, by address

template <class T>
struct Allocator {
  using value_type = T;
  Allocator() = default;
  template <class U>
  Allocator(const Allocator<U>&) {}

  static constexpr std::align_val_t kAligned{256};  // as memory of a GPU is

  T* allocate(size_t count) {
    T* p = static_cast<T*>(::operator new(count * sizeof(T), kAligned));
    regions[(uint64_t)p] = count * sizeof(T);
    return p;
  }
  void deallocate(T* p, size_t count) {
    regions.erase((uint64_t)p);
    ::operator delete(p, kAligned);
  }
  bool operator==(const Allocator&) const { return true; }
};

template <class T>
using Memory = std::vector<T, Allocator<T>>;

}  // namespace cuda_on_cpu
