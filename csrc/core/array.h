// Arrays of any real dtype, read as double and written as float or double.
#pragma once

#include <cstring>

#include "team.h"

namespace fusedpo::advantages {

enum class DType : int32_t { kBool, kUInt8, kInt8, kInt16, kInt32, kInt64, kFloat16, kBFloat16, kFloat32, kFloat64 };

FUSEDPO_DEVICE float float_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The exponent is re-based by a multiplication, which is right for subnormals too.
FUSEDPO_DEVICE float float_from_half(uint16_t half) {
  const uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
  const float value =
      magnitude >= 0x0f800000u ? float_from_bits(magnitude | 0x7f800000u) : float_from_bits(magnitude) * 0x1p112f;
  return half & 0x8000 ? -value : value;
}

struct Array {
  const void* data;  // may be null: an argument that was not given
  DType dtype;

  FUSEDPO_DEVICE explicit operator bool() const { return data != nullptr; }

  FUSEDPO_DEVICE double operator[](int64_t i) const {
    if (dtype == DType::kFloat32) return ((const float*)data)[i];
    if (dtype == DType::kBool) return ((const uint8_t*)data)[i] != 0;
    switch (dtype) {
      case DType::kUInt8:
        return ((const uint8_t*)data)[i];
      case DType::kInt8:
        return ((const int8_t*)data)[i];
      case DType::kInt16:
        return ((const int16_t*)data)[i];
      case DType::kInt32:
        return ((const int32_t*)data)[i];
      case DType::kInt64:
        return (double)((const int64_t*)data)[i];
      case DType::kFloat16:
        return float_from_half(((const uint16_t*)data)[i]);
      case DType::kBFloat16:
        return float_from_bits((uint32_t)((const uint16_t*)data)[i] << 16);
      default:
        return ((const double*)data)[i];
    }
  }
};

// An array of int32 or int64.
struct Integers {
  const void* data;
  bool wide;

  FUSEDPO_DEVICE explicit operator bool() const { return data != nullptr; }
  FUSEDPO_DEVICE int64_t operator[](int64_t i) const {
    return wide ? ((const int64_t*)data)[i] : ((const int32_t*)data)[i];
  }
};

// A result: float32, or float64.
struct Result {
  void* data;
  bool wide;

  FUSEDPO_DEVICE void set(int64_t i, double value) const {
    if (wide)
      ((double*)data)[i] = value;
    else
      ((float*)data)[i] = (float)value;
  }
};

}  // namespace fusedpo::advantages
