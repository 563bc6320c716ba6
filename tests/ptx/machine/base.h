// What every file of the machine needs: types of PTX, and the error that ends a launch.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

constexpr int kLanes = 32;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Type : u8 {
  kNone,
  B8,
  B16,
  B32,
  B64,
  U8,
  U16,
  U32,
  U64,
  S8,
  S16,
  S32,
  S64,
  F16,
  BF16,
  F32,
  F64,
  kPred,
  F16x2,
  BF16x2,
  F32x2
};

// By its name in PTX, without the dot; kNone if it is none.
inline Type type_named(const std::string& name) {
  static const char* names[] = {"",    "b8",  "b16", "b32",  "b64", "u8",  "u16",  "u32",   "u64",    "s8",   "s16",
                                "s32", "s64", "f16", "bf16", "f32", "f64", "pred", "f16x2", "bf16x2", "f32x2"};
  for (int i = 1; i <= (int)Type::F32x2; ++i)
    if (name == names[i]) return (Type)i;
  return Type::kNone;
}

constexpr int bytes_of(Type type) {
  switch (type) {
    case Type::B8:
    case Type::U8:
    case Type::S8:
      return 1;
    case Type::B16:
    case Type::U16:
    case Type::S16:
    case Type::F16:
    case Type::BF16:
      return 2;
    case Type::B64:
    case Type::U64:
    case Type::S64:
    case Type::F64:
    case Type::F32x2:
      return 8;
    default:
      return 4;
  }
}

constexpr bool is_float(Type t) { return t == Type::F16 || t == Type::BF16 || t == Type::F32 || t == Type::F64; }
constexpr bool is_signed(Type t) { return t == Type::S8 || t == Type::S16 || t == Type::S32 || t == Type::S64; }

constexpr u64 low_bits(int n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

// The value of a type in a register of 64 bits: with its sign, or without what lies above.
constexpr u64 extended(Type type, u64 x) {
  switch (type) {
    case Type::S8:
      return (u64)(s64)(int8_t)x;
    case Type::S16:
      return (u64)(s64)(s16)x;
    case Type::S32:
      return (u64)(s64)(s32)x;
    default:
      return x & low_bits(8 * bytes_of(type));
  }
}

}  // namespace ptx
