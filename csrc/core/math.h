// Arithmetic on F: a float, or a vector of floats (cpu/vec_math.h). What is written once with it serves a CUDA thread,
// a row of the CPU and a vector of tokens. Comparisons of F give a Math<F>::Mask, `mask ? a : b` chooses, and & | !
// combine masks (a bool or a vector of integers, so never ~).
#pragma once

#include <math.h>

#include <cstdint>

// Internal linkage and always inlined: files that are compiled for different instruction sets share no code.
#if defined(__CUDACC__)
#define FUSEDPO_HD static __host__ __device__ __forceinline__
#else
#define FUSEDPO_HD static inline __attribute__((always_inline))
#endif

namespace fusedpo {

constexpr float kInfinity = __builtin_huge_valf();

template <class F>
struct Math;

template <>
struct Math<float> {
  using Mask = bool;
  FUSEDPO_HD float splat(float x) { return x; }
  FUSEDPO_HD float load(const float* p) { return *p; }
  FUSEDPO_HD float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
  FUSEDPO_HD float exp(float x) { return ::expf(x); }
  FUSEDPO_HD float log(float x) { return ::logf(x); }
};

template <class F>
using Mask = typename Math<F>::Mask;

template <class F>
FUSEDPO_HD F absolute(F x) {
  return x < 0.0f ? -x : x;
}

// NaN stays NaN, as in torch.clamp.
template <class F>
FUSEDPO_HD F clamp(F x, float low, float high) {
  const F bottom = Math<F>::splat(low), top = Math<F>::splat(high);
  return x < bottom ? bottom : x > top ? top : x;
}

// exp(x) - 1 - x without cancellation, given exp(x). Below 1 in magnitude it is x^2 times the minimax polynomial of
// degree 7 (relative error 4e-9).
template <class F>
FUSEDPO_HD F exp_minus_1_minus(F x, F exp_x) {
  using M = Math<F>;
  F p = M::splat(2.7722833e-6f);
  p = M::fma(p, x, M::splat(2.5354830e-5f));
  p = M::fma(p, x, M::splat(1.9844024e-4f));
  p = M::fma(p, x, M::splat(1.3885452e-3f));
  p = M::fma(p, x, M::splat(8.3333103e-3f));
  p = M::fma(p, x, M::splat(4.1666735e-2f));
  p = M::fma(p, x, M::splat(1.6666667e-1f));
  p = M::fma(p, x, M::splat(0.5f));
  return absolute(x) < 1.0f ? x * x * p : exp_x - 1.0f - x;
}

// exp(x) - 1 without cancellation, given exp(x).
template <class F>
FUSEDPO_HD F exp_minus_1(F x, F exp_x) {
  return absolute(x) < 1.0f ? exp_minus_1_minus(x, exp_x) + x : exp_x - 1.0f;
}

// factor * x, 0 where the factor is 0, whatever x is.
template <class F>
FUSEDPO_HD F times(F factor, F x) {
  return factor == 0.0f ? Math<F>::splat(0) : factor * x;
}

}  // namespace fusedpo
