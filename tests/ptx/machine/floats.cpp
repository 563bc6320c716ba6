// Floating point, and conversions.
#include <algorithm>

#include "machine.h"
#include "numbers.h"

namespace ptx {

// An approximate instruction is off by some units in the last place, always the same for the same operand. Exact
// results of 0, 1 and beyond the range stay what they are.
float Machine::approximate(double exact, u64 operand) const {
  const float x = (float)exact;
  if (!options_.noise || !std::isfinite(x) || std::fabs(x) < 0x1p-125f || x == 1) return x;
  u64 hash = (operand + 0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9;
  hash = (hash ^ hash >> 29) * 0x94d049bb133111eb;
  hash = hash >> 32 ^ hash >> 17;
  const int off = (int)((u32)hash % (2 * options_.noise + 1)) - options_.noise;
  return std::bit_cast<float>(std::bit_cast<u32>(x) + off);
}

template <class T>
void Machine::floats(Warp& w, const Instruction& i, u32 mask) {
  constexpr bool kSingle = std::is_same_v<T, float>;
  u64* const to = result(w, i);
  const u64* const x = operand(w, i, 0);
  const u64* const y = i.num_operands > 1 ? operand(w, i, 1) : x;
  const u64* const z = i.num_operands > 2 ? operand(w, i, 2) : x;
  const auto get = [flush = i.flush](u64 bits) -> T {
    if constexpr (!kSingle)
      return as_f64(bits);
    else
      return flush ? flushed(as_f32(bits)) : as_f32(bits);
  };
  const auto encoded = [&](T value) {
    if constexpr (kSingle) {
      if (i.flush) value = flushed(value);
      if (i.saturate) value = saturated(value);
      if (std::isnan(value)) return kNan32;
    }
    return bits(value);
  };
  const auto put = [&](auto f) {
    each(mask, [&](int lane) { to[lane] = encoded(f(get(x[lane]), get(y[lane]), get(z[lane]))); });
  };
  const auto put_rounded = [&](auto f) {
    if (i.round == 0 || i.round == 'n') return put(f);
    put([&](T a, T b, T c) { return in_directed_mode<T>(i.round, f, a, b, c); });
  };
  const auto put_approximate = [&](auto f) {
    counters_[kPtxSpecial] += std::popcount(mask);
    each(mask, [&](int lane) {
      to[lane] = encoded(approximate(f((double)get(x[lane]), (double)get(y[lane])), x[lane] + y[lane] * 31));
    });
  };
  switch (i.op) {
    case Op::kAdd:
      return put_rounded([](T a, T b, T) { return a + b; });
    case Op::kSub:
      return put_rounded([](T a, T b, T) { return a - b; });
    case Op::kMul:
      return put_rounded([](T a, T b, T) { return a * b; });
    case Op::kFma:
      return put_rounded([](T a, T b, T c) { return std::fma(a, b, c); });
    case Op::kDiv:
      if (i.approx) return put_approximate([](double a, double b) { return a / b; });
      return put_rounded([](T a, T b, T) { return a / b; });
    case Op::kRcp:
      if (i.approx) return put_approximate([](double a, double) { return 1 / a; });
      return put_rounded([](T a, T, T) { return 1 / a; });
    case Op::kSqrt:
      if (i.approx) return put_approximate([](double a, double) { return std::sqrt(a); });
      return put_rounded([](T a, T, T) { return std::sqrt(a); });
    case Op::kRsqrt:
      return put_approximate([](double a, double) { return 1 / std::sqrt(a); });
    case Op::kEx2:
      counters_[kPtxExponentials] += std::popcount(mask);
      return put_approximate([](double a, double) { return std::exp2(a); });
    case Op::kLg2:
      return put_approximate([](double a, double) { return std::log2(a); });
    case Op::kMin:
    case Op::kMax: {
      const auto of_two = [&](T a, T b) { return i.op == Op::kMin ? minimum(a, b, i.nan) : maximum(a, b, i.nan); };
      if (i.num_operands == 2) return put([&](T a, T b, T) { return of_two(a, b); });
      return put([&](T a, T b, T c) { return of_two(of_two(a, b), c); });
    }
    case Op::kAbs:
      return each(mask, [&](int lane) { to[lane] = bits(std::fabs(get(x[lane]))); });
    case Op::kNeg:
      return each(mask, [&](int lane) { to[lane] = bits(-get(x[lane])); });
    case Op::kCopysign:
      return each(mask, [&](int lane) { to[lane] = bits(std::copysign(get(y[lane]), get(x[lane]))); });
    case Op::kSetp: {
      u32 true_of = 0;
      each(mask, [&](int lane) { true_of |= (u32)compared(i.compare, get(x[lane]), get(y[lane])) << lane; });
      return compare(w, i, mask, true_of);
    }
    default:
      unknown();
  }
}
template void Machine::floats<float>(Warp&, const Instruction&, u32);
template void Machine::floats<double>(Warp&, const Instruction&, u32);

namespace {

// One addition, or another operation of float32 that rounds.
float calculated(const Instruction& i, float a, float b, float c, bool flush) {
  if (flush) a = flushed(a), b = flushed(b), c = flushed(c);
  const float r = in_mode<float>(
      i.round,
      [&](float p, float q, float s) {
        return i.op == Op::kAdd ? p + q : i.op == Op::kSub ? p - q : i.op == Op::kMul ? p * q : std::fma(p, q, s);
      },
      a, b, c);
  return flush ? flushed(r) : r;
}

u64 as_result(float x) { return std::isnan(x) ? kNan32 : bits(x); }

}  // namespace

// Two float32 in a register.
void Machine::pairs(Warp& w, const Instruction& i, u32 mask) {
  u64* const to = result(w, i);
  const u64 *const x = operand(w, i, 0), *const y = operand(w, i, 1), *const z = operand(w, i, i.num_operands - 1);
  each(mask, [&](int lane) {
    const auto half = [&](int shift) {
      const float a = as_f32(x[lane] >> shift), b = as_f32(y[lane] >> shift), c = as_f32(z[lane] >> shift);
      return as_result(calculated(i, a, b, c, i.flush));
    };
    to[lane] = half(0) | half(32) << 32;
  });
}

// Sums in float32 whose first operand, and of products the second, is a float of 16 bits.
void Machine::mixed(Warp& w, const Instruction& i, u32 mask) {
  u64* const to = result(w, i);
  const u64 *const x = operand(w, i, 0), *const y = operand(w, i, 1), *const z = operand(w, i, i.num_operands - 1);
  each(mask, [&](int lane) {
    const float b = i.op == Op::kFma ? widened(i.from, y[lane]) : as_f32(y[lane]);
    const float r = calculated(i, widened(i.from, x[lane]), b, as_f32(z[lane]), false);
    to[lane] = i.saturate ? bits(saturated(r)) : as_result(r);
  });
}

// Floats of 16 bits are compared; there is no arithmetic on them.
void Machine::halves(Warp& w, const Instruction& i, u32 mask) {
  if (i.op != Op::kSetp) unknown();
  const u64 *const x = operand(w, i, 0), *const y = operand(w, i, 1);
  u32 true_of = 0;
  each(mask, [&](int lane) {
    true_of |= (u32)compared(i.compare, widened(i.type, x[lane]), widened(i.type, y[lane])) << lane;
  });
  compare(w, i, mask, true_of);
}

// ----------------------------------------------------------------------------------------------------------
// conversions

namespace {

double to_whole(double x, char round) {
  switch (round) {
    case 'N':
      return std::nearbyint(x);
    case 'Z':
      return std::trunc(x);
    case 'M':
      return std::floor(x);
    case 'P':
      return std::ceil(x);
    default:
      return x;
  }
}

// Of a whole number; what is out of range becomes the nearest that is not. NaN becomes 0, of 64 bits the smallest.
u64 whole_to_integer(double x, Type type, Type from) {
  const int width = 8 * bytes_of(type);
  if (std::isnan(x)) return width == 64 && from == Type::F64 ? 1ull << 63 : 0;
  if (!is_signed(type)) return x <= 0 ? 0 : x >= std::ldexp(1.0, width) ? low_bits(width) : (u64)x;
  const double bound = std::ldexp(1.0, width - 1);
  const u64 value = x >= bound ? low_bits(width - 1) : x < -bound ? ~low_bits(width - 1) : (u64)(s64)x;
  return value & low_bits(width);
}

u64 saturated_integer(u64 x, Type from, Type type) {
  const bool negative = is_signed(from) && (s64)x < 0;
  const int width = 8 * bytes_of(type);
  if (!is_signed(type)) return negative ? 0 : std::min(x, low_bits(width));
  if (negative) return (u64)std::max((s64)x, (s64)~low_bits(width - 1));
  return std::min(x, low_bits(width - 1));
}

u64 integer_to_float(u64 x, const Instruction& i) {
  const auto converted = [&]<class F>(F) -> F {
    if (is_signed(i.from)) return in_mode<F>(i.round, [](s64 a, s64, s64) { return (F)a; }, (s64)x);
    return in_mode<F>(i.round, [](u64 a, u64, u64) { return (F)a; }, x);
  };
  if (i.type == Type::F64) return bits(converted(0.0));
  if (i.type == Type::F32) return bits(i.saturate ? saturated(converted(0.0f)) : converted(0.0f));
  throw Error("PTX that the machine does not know: " + i.text);
}

}  // namespace

void Machine::convert(Warp& w, const Instruction& i, u32 mask) {
  u64* const to = result(w, i);
  const u64* const x = operand(w, i, 0);
  if (i.type == Type::BF16x2 || i.type == Type::F16x2) {  // the first operand becomes the upper half
    const u64* const y = operand(w, i, 1);
    return each(mask, [&](int lane) {
      const u64 upper = narrowed(i.type, as_f32(x[lane]), i.round), lower = narrowed(i.type, as_f32(y[lane]), i.round);
      to[lane] = upper << 16 | lower;
    });
  }
  each(mask, [&](int lane) {
    if (!is_float(i.from)) {
      const u64 value = extended(i.from, x[lane]);
      if (is_float(i.type))
        to[lane] = integer_to_float(value, i);
      else
        to[lane] = extended(i.type, i.saturate ? saturated_integer(value, i.from, i.type) : value);
      return;
    }
    double value = i.from == Type::F64   ? as_f64(x[lane])
                   : i.from == Type::F32 ? as_f32(x[lane])
                                         : widened(i.from, x[lane]);
    if (i.flush && i.from == Type::F32) value = flushed((float)value);
    value = to_whole(value, i.round);
    if (i.saturate && is_float(i.type)) value = value > 0 ? std::fmin(value, 1.0) : 0;
    if (i.type == Type::F64) {
      to[lane] = bits(value);
    } else if (i.type == Type::F32) {
      float single = in_mode<float>(i.round, [](double a, double, double) { return (float)a; }, value);
      if (i.flush) single = flushed(single);
      to[lane] = as_result(single);
    } else if (is_float(i.type)) {
      to[lane] = narrowed(i.type, value, i.round);
    } else {
      to[lane] = extended(i.type, whole_to_integer(value, i.type, i.from));
    }
  });
}

}  // namespace ptx
