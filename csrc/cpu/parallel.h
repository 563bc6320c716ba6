// Work on several threads, in one arithmetic: that of IEEE 754, with subnormal numbers. Whether a processor takes them
// for 0 is a mode of each thread, and torch.set_flush_denormal changes it for the calling one alone, so results would
// depend on which thread computes what.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <utility>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace fusedpo::cpu {

// Subnormal numbers are numbers, for the lifetime of this object and in its thread.
class IeeeArithmetic {
 public:
  IeeeArithmetic() : before_(mode()) {
    if (before_ & kFlushes) set_mode(before_ & ~kFlushes);
  }
  ~IeeeArithmetic() {
    if (before_ & kFlushes) set_mode(before_);
  }
  IeeeArithmetic(const IeeeArithmetic&) = delete;

 private:
#if defined(__SSE2__)
  static constexpr uint64_t kFlushes = 0x8040;  // results, and operands
  static uint64_t mode() { return _mm_getcsr(); }
  static void set_mode(uint64_t mode) { _mm_setcsr((unsigned)mode); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlushes = 1 << 24;
  static uint64_t mode() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set_mode(uint64_t mode) { asm volatile("msr fpcr, %0" ::"r"(mode)); }
#else
  static constexpr uint64_t kFlushes = 0;
  static uint64_t mode() { return 0; }
  static void set_mode(uint64_t) {}
#endif

  const uint64_t before_;
};

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    const IeeeArithmetic mode;
    f(first, last);
  });
}

// An operator as it is registered: what it does in the calling thread is done in the same arithmetic.
template <auto kOperator>
struct InIeeeArithmetic;

template <class Result, class... Arguments, Result (*kOperator)(Arguments...)>
struct InIeeeArithmetic<kOperator> {
  static Result call(Arguments... arguments) {
    const IeeeArithmetic mode;
    return kOperator(std::move(arguments)...);
  }
};

}  // namespace fusedpo::cpu

#define FUSEDPO_BOX(name) TORCH_BOX(&fusedpo::cpu::InIeeeArithmetic<&name>::call)
