// Arithmetic of PTX where it is not that of C++.
#pragma once

#include <bit>
#include <cfenv>
#include <cmath>
#include <limits>
#include <type_traits>

#include "program.h"

namespace ptx {

constexpr u64 kNan32 = 0x7fffffff;  // what arithmetic on float32 gives for NaN

inline float as_f32(u64 x) { return std::bit_cast<float>((u32)x); }
inline double as_f64(u64 x) { return std::bit_cast<double>(x); }
inline u64 bits(float x) { return std::bit_cast<u32>(x); }
inline u64 bits(double x) { return std::bit_cast<u64>(x); }

// Subnormal numbers become zeros of their sign.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float saturated(float x) { return x > 0 ? std::fmin(x, 1.0f) : 0.0f; }  // NaN too becomes 0

// A float of 16 bits: its places behind the point and its smallest normal exponent.
template <int kPlaces, int kMinExponent>
struct Half {
  static constexpr int kExponents = 15 - kPlaces, kBias = 1 - kMinExponent;
  static constexpr u16 kInfinity = (u16)low_bits(kExponents) << kPlaces;

  static float widened(u16 x) {
    const int exponent = x >> kPlaces & (int)low_bits(kExponents), places = x & (int)low_bits(kPlaces);
    float value;
    if (exponent == (int)low_bits(kExponents))
      value = places ? NAN : INFINITY;
    else if (exponent == 0)
      value = std::ldexp((float)places, kMinExponent - kPlaces);
    else
      value = std::ldexp((float)(places | 1 << kPlaces), exponent - kBias - kPlaces);
    return x & 0x8000 ? -value : value;
  }

  // To nearest (n) or towards zero (z).
  static u16 rounded(double x, char round) {
    if (std::isnan(x)) return 0x7fff;
    const u16 sign = std::signbit(x) ? 0x8000 : 0;
    const double size = std::fabs(x);
    if (std::isinf(size)) return sign | kInfinity;
    if (size == 0) return sign;
    const int exponent = std::max(std::ilogb(size), kMinExponent);
    const double places = std::ldexp(size, kPlaces - exponent);
    const u32 whole = (u32)(round == 'z' ? std::trunc(places) : std::nearbyint(places));
    // a carry out of the places, or a subnormal number, moves the exponent by itself
    const u32 result = ((u32)(exponent + kBias - 1) << kPlaces) + whole;
    const u32 largest = round == 'z' ? kInfinity - 1u : kInfinity;
    return sign | (u16)std::min(result, largest);
  }
};
using F16 = Half<10, -14>;
using BF16 = Half<7, -126>;

inline float from_bf16(u64 x) { return std::bit_cast<float>((u32)x << 16); }
inline u16 to_bf16(float x) {  // to nearest: the common case, and fast
  if (std::isnan(x)) return 0x7fff;
  const u32 b = std::bit_cast<u32>(x);
  return (u16)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

inline float widened(Type type, u64 x) { return type == Type::BF16 ? from_bf16(x) : F16::widened((u16)x); }
inline u16 narrowed(Type type, double x, char round) {
  const bool bf16 = type == Type::BF16 || type == Type::BF16x2;
  if (bf16 && round == 'n' && x == (double)(float)x) return to_bf16((float)x);
  return bf16 ? BF16::rounded(x, round) : F16::rounded(x, round);
}

// f(a, b, c) in a rounding mode other than to nearest. What is volatile stays between the calls that set the mode.
template <class Result, class T, class F>
[[gnu::noinline]] Result in_directed_mode(char round, F f, T a, T b, T c) {
  volatile T x = a, y = b, z = c;
  std::fesetround(round == 'z' ? FE_TOWARDZERO : round == 'm' ? FE_DOWNWARD : FE_UPWARD);
  volatile Result result = f((T)x, (T)y, (T)z);
  std::fesetround(FE_TONEAREST);
  return result;
}
template <class Result, class T, class F>
Result in_mode(char round, F f, T a, T b = 0, T c = 0) {
  return round == 'z' || round == 'm' || round == 'p' ? in_directed_mode<Result>(round, f, a, b, c) : f(a, b, c);
}

template <class T>
T maximum(T a, T b, bool propagates_nan) {
  if (std::isnan(a) || std::isnan(b))
    return propagates_nan ? std::numeric_limits<T>::quiet_NaN() : std::isnan(a) ? b : a;
  return a == b ? (std::signbit(a) ? b : a) : a > b ? a : b;
}
template <class T>
T minimum(T a, T b, bool propagates_nan) {
  return -maximum(-a, -b, propagates_nan);
}

template <class T>
bool compared(Compare compare, T a, T b) {
  bool unordered = false;
  if constexpr (std::is_floating_point_v<T>) unordered = std::isnan(a) || std::isnan(b);
  switch (compare) {
    case Compare::kEq:
      return a == b;
    case Compare::kNe:
      return !unordered && a != b;
    case Compare::kLt:
      return a < b;
    case Compare::kLe:
      return a <= b;
    case Compare::kGt:
      return a > b;
    case Compare::kGe:
      return a >= b;
    case Compare::kEqu:
      return unordered || a == b;
    case Compare::kNeu:
      return unordered || a != b;
    case Compare::kLtu:
      return unordered || a < b;
    case Compare::kLeu:
      return unordered || a <= b;
    case Compare::kGtu:
      return unordered || a > b;
    case Compare::kGeu:
      return unordered || a >= b;
    case Compare::kNum:
      return !unordered;
    case Compare::kNan:
      return unordered;
  }
  return false;
}

}  // namespace ptx
