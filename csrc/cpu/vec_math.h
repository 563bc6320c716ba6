// The arithmetic of core/math.h on vectors of floats.
#pragma once

#include "core/math.h"
#include "vec.h"

namespace fusedpo {

template <>
struct Math<FUSEDPO_ISA::Vec> {
  using Vec = FUSEDPO_ISA::Vec;
  using Int = FUSEDPO_ISA::Int;
  using Mask = Int;

  FUSEDPO_HD Vec splat(float x) { return FUSEDPO_ISA::splat(x); }

  FUSEDPO_HD Vec load(const float* p) {
    Vec x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }

  FUSEDPO_HD Vec fma(Vec a, Vec b, Vec c) { return FUSEDPO_ISA::fma(a, b, c); }

  // kLanes bytes as a mask: where they are not 0.
  FUSEDPO_HD Int load(const uint8_t* p) {
#if defined(__AVX512F__)
    return (Int)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)) != 0;
#elif defined(__AVX2__)
    return (Int)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)) != 0;
#else
    return Int{p[0], p[1], p[2], p[3]} != 0;
#endif
  }

  // Within 1.1 units in the last place; 0 below -104, infinity above 89; NaN stays NaN.
  FUSEDPO_HD Vec exp(Vec x) {
    x = clamp(x, -104.0f, 89.0f);
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    const Vec shifted = fma(x, splat(1.44269504f), magic), n = shifted - magic;
    // log 2 in two parts: the products with the first, of 9 bits, are exact.
    const Vec r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
    // exp(r) = 1 + r + r^2 q(r) for |r| <= log(2) / 2, q the minimax polynomial of degree 4: relative error 3e-9.
    Vec q = splat(1.3950602e-3f);
    q = fma(q, r, splat(8.3689535e-3f));
    q = fma(q, r, splat(4.1666204e-2f));
    q = fma(q, r, splat(1.6666518e-1f));
    q = fma(q, r, splat(0.5f));
    const Vec p = 1.0f + fma(q * r, r, r);
#if defined(__AVX512F__)
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const Int exponent = (Int)shifted - (Int)magic, half = exponent >> 1;  // 2^n may lie outside the range of floats
    return p * (Vec)((half + 127) << 23) * (Vec)((exponent - half + 127) << 23);
#endif
  }

  // Within 2 units in the last place for normal numbers; 0 gives -infinity, less than 0 gives NaN.
  FUSEDPO_HD Vec log(Vec x) {
    const Int exponent = ((Int)x - 0x3f3504f3) >> 23;       // x = 2^exponent * m
    const Vec m = (Vec)((Int)x - (exponent << 23)) - 1.0f;  // m - 1, in [sqrt(1/2) - 1, sqrt(2) - 1)
    const Vec s = m / (2.0f + m), z = s * s;                // log m = 2 atanh(s), |s| < 0.172
    Vec q = splat(1.0f / 9);
    q = fma(q, z, splat(1.0f / 7));
    q = fma(q, z, splat(1.0f / 5));
    q = fma(q, z, splat(1.0f / 3));
    const Vec n = __builtin_convertvector(exponent, Vec), twice = s + s;
    const Vec value = fma(n, splat(0.693359375f), fma(n, splat(-2.12194440e-4f), fma(twice * z, q, twice)));
    return x > 0.0f ? value : x == 0.0f ? splat(-kInfinity) : splat(__builtin_nanf(""));
  }
};

}  // namespace fusedpo
