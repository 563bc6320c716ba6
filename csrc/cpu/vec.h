// Vectors of floats for the row kernels: one source, compiled once per instruction set (FUSEDPO_ISA names the variant).
//
// Everything here lives in a namespace of its own per variant, and nothing from torch or the standard containers is
// instantiated: a template shared between variants could be merged by the linker, and AVX-512 code would run
// everywhere.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef FUSEDPO_ISA
#error "compile with -DFUSEDPO_ISA=portable|avx2|avx512|avx512_bf16"
#endif

namespace fusedpo::FUSEDPO_ISA {

#if defined(__AVX512F__)
inline constexpr int kBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kBytes = 32;
#else
inline constexpr int kBytes = 16;
#endif
inline constexpr int kLanes = kBytes / 4;

typedef float Vec __attribute__((vector_size(kBytes)));
typedef int32_t Int __attribute__((vector_size(kBytes)));
typedef uint32_t UInt __attribute__((vector_size(kBytes)));

// What one step of a row kernel holds: as many vectors as there are registers for. They go through every operation side
// by side, for the chain of multiply-adds of a single one is longer than a processor looks ahead.
#if defined(__AVX512F__)
inline constexpr int kVecs = 4;
#else
inline constexpr int kVecs = 2;
#endif
inline constexpr int kChunk = kVecs * kLanes;
typedef Vec Vecs[kVecs];

#define FUSEDPO_INLINE static inline __attribute__((always_inline))

FUSEDPO_INLINE Vec splat(float x) { return Vec{} + x; }

// a > b ? a : b, so a NaN in a is dropped and one in b stays.
FUSEDPO_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

#if defined(__AVX2__)
inline constexpr bool kFmaRoundsOnce = true;
#else
inline constexpr bool kFmaRoundsOnce = false;
#endif

FUSEDPO_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

#if defined(__AVX2__)
// t - floor(t); 0 for -inf where kExp2TakesInfinity.
FUSEDPO_INLINE Vec above_floor(Vec t) {
#if defined(__AVX512F__)
  return (Vec)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  return t - (Vec)_mm256_round_ps((__m256)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#endif
}
#endif

FUSEDPO_INLINE float reduce_add(Vec v) {
  // A tree of fixed shape: the order of the sum depends on the instruction set alone.
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

FUSEDPO_INLINE float reduce_max(Vec v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// What is smaller in a gradient whose elements are up to about `size` is written as 0. Gradients enter matrix products,
// and those of such numbers would be subnormal: each costs a processor a hundred times as much.
FUSEDPO_INLINE float tiny_beside(float size) { return 0x1p-90f * (size < 0 ? -size : size); }

// 0 where |x| < least, which is not negative; NaN stays.
FUSEDPO_INLINE Vec without_tiny(Vec x, Vec least) {
  const Int magnitude = (Int)x & 0x7fffffff;
  return magnitude < (Int)least ? Vec{} : x;
}

// factor * 2^f for f in [0, 1]: the minimax polynomial with constant term 1. Its relative error before rounding
// is 2.1e-9 at degree 6, 8.5e-8 at degree 5, and 2.9e-6 at degree 4, for results that are rounded to 11 bits or fewer.
template <int kDegree>
struct Exp2Polynomial {
  Vec c[kDegree + 1];

  explicit Exp2Polynomial(float factor) {
    static_assert(kDegree >= 4 && kDegree <= 6);
    constexpr float kUnit[3][7] = {
        {1.0f, 0.693044841f, 0.241280198f, 0.0522424728f, 0.0134266838f},
        {1.0f, 0.693151295f, 0.240164474f, 0.0557999089f, 0.00901703071f, 0.00186713005f},
        {1.0f, 0.693147063f, 0.240229085f, 0.0554861836f, 0.00967377517f, 0.00124822895f, 0.000215659718f}};
    for (int i = 0; i <= kDegree; ++i) c[i] = splat(factor * kUnit[kDegree - 4][i]);
  }
};

#if defined(__AVX512F__)
inline constexpr bool kExp2TakesInfinity = true;
#else
inline constexpr bool kExp2TakesInfinity = false;
#endif

// factor * 2^t, the factor being that of the polynomial, for -200 <= t <= 64, or any t <= 64 where kExp2TakesInfinity.
// Within 1.6 ulp at degree 6, 3 at degree 5; results below 2^-126 may be flushed to 0; NaN stays NaN.
template <int kDegree>
FUSEDPO_INLINE void exp2(const Vecs& t, const Exp2Polynomial<kDegree>& polynomial, Vecs& result) {
  Vecs f, p;
#if defined(__AVX512F__)
  for (int k = 0; k < kVecs; ++k) f[k] = above_floor(t[k]);
#else
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  Int biased[kVecs];
  for (int k = 0; k < kVecs; ++k) {
    const Vec shifted = (t[k] - 0.5f) + magic;
    f[k] = t[k] - (shifted - magic);  // shifted - magic: floor(t), or the integer below where t is one: then f = 1
    biased[k] = (Int)shifted - (Int)magic + 127;
  }
#endif
  for (int k = 0; k < kVecs; ++k) p[k] = polynomial.c[kDegree];
  for (int i = kDegree - 1; i >= 0; --i)
    for (int k = 0; k < kVecs; ++k) p[k] = fma(p[k], f[k], polynomial.c[i]);
  for (int k = 0; k < kVecs; ++k) {
#if defined(__AVX512F__)
    result[k] = (Vec)_mm512_scalef_ps((__m512)p[k], (__m512)t[k]);  // p * 2^floor(t)
#else
    const Int exponent = biased[k] > 0 ? biased[k] : Int{};  // 2^n below the normal range becomes 0
    result[k] = p[k] * (Vec)(exponent << 23);
#endif
  }
}

// ---------------------------------------------------------------------------------- storage types
// load2 and store2 move two vectors, load and store a chunk. Which lane holds which element is theirs to choose: the
// row kernels only ever combine lanes with symmetric reductions and write a lane back where it was read.

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

FUSEDPO_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

FUSEDPO_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

FUSEDPO_INLINE float to_float(float x) { return x; }
FUSEDPO_INLINE float to_float(BFloat16 x) { return bits_to_float((uint32_t)x.bits << 16); }

// The exponent is re-based by a multiplication, which is right for subnormals too.
FUSEDPO_INLINE float to_float(Half x) {
  const uint32_t magnitude = (uint32_t)(x.bits & 0x7fff) << 13;
  const float value = bits_to_float(magnitude) * 0x1p112f;
  const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : float_to_bits(value);
  return bits_to_float(bits | (uint32_t)(x.bits & 0x8000) << 16);
}

template <class T>
T from_float(float x);

template <>
inline __attribute__((always_inline)) float from_float<float>(float x) {
  return x;
}

template <>
inline __attribute__((always_inline)) BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return {(uint16_t)(bits >> 16 | 0x40)};
  return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline __attribute__((always_inline)) Half from_float<Half>(float x) {
  const uint32_t sign = float_to_bits(x) >> 16 & 0x8000;
  const uint32_t magnitude = float_to_bits(x) & 0x7fffffff;
  if (magnitude > 0x7f800000u) return {(uint16_t)(sign | 0x7e00)};
  if (magnitude >= 0x477ff000u) return {(uint16_t)(sign | 0x7c00)};  // rounds to more than 65504
  if (magnitude < 0x38800000u)  // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
    return {(uint16_t)(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u))};
  return {(uint16_t)(sign | ((magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}

FUSEDPO_INLINE void load2(const float* p, Vec& a, Vec& b) {
  std::memcpy(&a, p, kBytes);
  std::memcpy(&b, p + kLanes, kBytes);
}

// Where a store goes: into the cache, or past it to memory, aligned and without reading the line that it overwrites.
enum class Target { kCache, kMemory };

#if defined(__AVX2__)
inline constexpr bool kStreams = true;
FUSEDPO_INLINE void store_fence() { _mm_sfence(); }  // before another thread may see what went to memory
#else
inline constexpr bool kStreams = false;
FUSEDPO_INLINE void store_fence() {}
#endif

template <Target kTarget, class V>
FUSEDPO_INLINE void put(void* p, V v) {
#if defined(__AVX2__)
  if constexpr (kTarget == Target::kMemory) {
    if constexpr (sizeof v == 64)
#if defined(__AVX512F__)
      return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#else
      static_assert(sizeof v < 64);
#endif
    else if constexpr (sizeof v == 32)
      return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
    else
      return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
  }
#endif
  std::memcpy(p, &v, sizeof v);
}

template <Target kTarget>
FUSEDPO_INLINE void store2(float* p, Vec a, Vec b) {
  put<kTarget>(p, a);
  put<kTarget>(p + kLanes, b);
}

// A 32-bit word holds two bfloat16: the even element moved up, the odd one with its neighbour masked off.
FUSEDPO_INLINE void load2(const BFloat16* p, Vec& a, Vec& b) {
  UInt words;
  std::memcpy(&words, p, kBytes);
  a = (Vec)(words << 16);
  b = (Vec)(words & 0xffff0000u);
}

FUSEDPO_INLINE UInt round_to_bfloat16(Vec x) {
  const UInt bits = (UInt)x;
  const UInt rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  return x == x ? rounded : (bits | 0x400000u);
}

template <Target kTarget>
FUSEDPO_INLINE void store2(BFloat16* p, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  // One instruction rounds both (subnormal results to 0) and puts b behind a; the permutation brings them together.
  const UInt together = {0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                         0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  const UInt words = (UInt)_mm512_permutexvar_epi16((__m512i)together, rounded);
#else
  const UInt words = round_to_bfloat16(a) >> 16 | (round_to_bfloat16(b) & 0xffff0000u);
#endif
  put<kTarget>(p, words);
}

FUSEDPO_INLINE void load2(const Half* p, Vec& a, Vec& b) {
#if defined(__AVX512F__)
  a = (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  b = (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + kLanes)));
#elif defined(__AVX2__)
  a = (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  b = (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + kLanes)));
#else
  float lanes[2 * kLanes];
  for (int i = 0; i < 2 * kLanes; ++i) lanes[i] = to_float(p[i]);
  load2(lanes, a, b);
#endif
}

template <Target kTarget>
FUSEDPO_INLINE void store2(Half* p, Vec a, Vec b) {
#if defined(__AVX512F__)
  put<kTarget>(p, _mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT));
  put<kTarget>(p + kLanes, _mm512_cvtps_ph((__m512)b, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  put<kTarget>(p, _mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT));
  put<kTarget>(p + kLanes, _mm256_cvtps_ph((__m256)b, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<Half>(a[i]), p[kLanes + i] = from_float<Half>(b[i]);
#endif
}

#if defined(__AVX2__)
// Stores +-2^t in bfloat16, rounded to the nearest, for t < 128; 0 where t < least, which is -127 or more.
//
// The exponent and the seven digits of a bfloat16 lie side by side: with t = n + f, 0 <= f < 1, its word is the number
// 127 + n + (2^f - 1) in units of 2^-7. Here it is 127 + (t + (2^f - 1 - f)), as the last bits of a float between 2^16
// and 2^17, so that the addition of 127 both rounds and puts the word together.
struct Exp2ToBFloat16 {
  Exp2ToBFloat16(bool negative, float least_)
      : polynomial(1.0f), bias(splat(98304.0f + (negative ? 256 + 127 : 127))), least(splat(least_)) {
    polynomial.c[1] -= 1.0f;
  }

  template <Target kTarget>
  inline __attribute__((always_inline)) void store(BFloat16* result, const Vecs& exponents) const {
    Vecs t, f, p;
    for (int k = 0; k < kVecs; ++k) {
      t[k] = exponents[k] < least ? lowest : exponents[k];
      f[k] = above_floor(t[k]);
      p[k] = polynomial.c[4];
    }
    for (int i = 3; i > 0; --i)
      for (int k = 0; k < kVecs; ++k) p[k] = fma(p[k], f[k], polynomial.c[i]);
    for (int k = 0; k < kVecs; ++k) p[k] = fma(p[k], f[k], t[k]) + bias;
    for (int k = 0; k < kVecs; k += 2) {
      const UInt words = ((UInt)p[k] & 0xffffu) | (UInt)p[k + 1] << 16;
      put<kTarget>(result + k * kLanes, words);
    }
  }

  Exp2Polynomial<4> polynomial;
  const Vec bias, least, lowest = splat(-127.0f);
};
#endif

// Fetches [p, p + kCount) into the L2.
template <int kCount, class T>
FUSEDPO_INLINE void fetch(const T* p) {
  for (int byte = 0; byte < kCount * (int)sizeof(T); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 2);
}

template <class T>
FUSEDPO_INLINE void load(const T* p, Vecs& x) {
  for (int k = 0; k < kVecs; k += 2) load2(p + k * kLanes, x[k], x[k + 1]);
}

template <Target kTarget = Target::kCache, class T>
FUSEDPO_INLINE void store(T* p, const Vecs& x) {
  for (int k = 0; k < kVecs; k += 2) store2<kTarget>(p + k * kLanes, x[k], x[k + 1]);
}

}  // namespace fusedpo::FUSEDPO_ISA
