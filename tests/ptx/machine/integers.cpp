// Moves, bits, predicates and integers; and which file has the rest.
#include <algorithm>

#include "machine.h"
#include "numbers.h"

namespace ptx {

void Machine::execute(Warp& w, const Instruction& i, u32 mask) {
  if (i.type == Type::kPred) return predicates(w, i, mask);
  switch (i.op) {
    case Op::kNop:
      return;
    case Op::kTrap:
      fail("trap", std::countr_zero(mask));
    case Op::kMov:
    case Op::kPack:
    case Op::kUnpack:
    case Op::kSelp:
    case Op::kCvta:
    case Op::kMapa:
    case Op::kCreatepolicy:
    case Op::kActivemask:
      return move(w, i, mask);
    case Op::kPrmt:
    case Op::kLop3:
    case Op::kShf:
    case Op::kBfi:
      return permute(w, i, mask);
    case Op::kCvt:
      return convert(w, i, mask);
    case Op::kLd:
      return load(w, i, mask);
    case Op::kSt:
      return store(w, i, mask);
    case Op::kAtom:
      return atomic(w, i, mask);
    case Op::kMbarrierInit:
      return init_mbarrier(w, i, mask);
    case Op::kMbarrierExpect:
      return expect(w, i, mask);
    case Op::kBulkCopy:
      return bulk_copy(w, i, mask);
    default:
      break;
  }
  if (i.type == Type::F32x2) return pairs(w, i, mask);
  if (i.type == Type::F32 && i.from != Type::F32) return mixed(w, i, mask);
  switch (i.type) {
    case Type::F32:
      return floats<float>(w, i, mask);
    case Type::F64:
      return floats<double>(w, i, mask);
    case Type::F16:
    case Type::BF16:
      return halves(w, i, mask);
    case Type::S16:
      return integers<s16>(w, i, mask);
    case Type::U16:
    case Type::B16:
      return integers<u16>(w, i, mask);
    case Type::S32:
      return integers<s32>(w, i, mask);
    case Type::U32:
    case Type::B32:
      return integers<u32>(w, i, mask);
    case Type::S64:
      return integers<s64>(w, i, mask);
    case Type::U64:
    case Type::B64:
      return integers<u64>(w, i, mask);
    default:
      unknown();
  }
}

void Machine::predicates(Warp& w, const Instruction& i, u32 mask) {
  const u32 a = i.source >= 0 ? source(w, i) : operand(w, i, 0)[0] ? ~0u : 0;
  const u32 b = i.other_source >= 0 ? w.predicates[i.other_source] : 0;
  switch (i.op) {
    case Op::kMov:
      return set_predicate(w, i.predicate, mask, a);
    case Op::kNot:
      return set_predicate(w, i.predicate, mask, ~a);
    case Op::kAnd:
      return set_predicate(w, i.predicate, mask, a & b);
    case Op::kOr:
      return set_predicate(w, i.predicate, mask, a | b);
    case Op::kXor:
      return set_predicate(w, i.predicate, mask, a ^ b);
    default:
      unknown();
  }
}

void Machine::move(Warp& w, const Instruction& i, u32 mask) {
  u64* const to = result(w, i);
  const u64* const x = i.num_operands ? operand(w, i, 0) : nowhere_;
  const u64 whole = low_bits(8 * bytes_of(i.type));
  switch (i.op) {
    case Op::kMov:
      return each(mask, [&](int lane) { to[lane] = x[lane] & whole; });
    case Op::kPack: {
      const int width = 8 * bytes_of(i.type) / i.num_operands;
      return each(mask, [&](int lane) {
        u64 packed = 0;
        for (int n = 0; n < i.num_operands; ++n) packed |= (operand(w, i, n)[lane] & low_bits(width)) << n * width;
        to[lane] = packed;
      });
    }
    case Op::kUnpack: {
      const int width = 8 * bytes_of(i.type) / i.num_results;
      return each(mask, [&](int lane) {
        const u64 packed = x[lane];
        for (int n = 0; n < i.num_results; ++n) result(w, i, n)[lane] = packed >> n * width & low_bits(width);
      });
    }
    case Op::kSelp: {
      const u32 first = source(w, i);
      const u64* const y = operand(w, i, 1);
      return each(mask, [&](int lane) { to[lane] = (first >> lane & 1 ? x : y)[lane] & whole; });
    }
    case Op::kCvta: {
      const u64 window = i.space == Space::kShared  ? kSharedWindow | (u64)w.block << 32
                         : i.space == Space::kParam ? kParamWindow
                                                    : 0;
      const auto in_cluster = [](u64 generic) { return ((generic >> 32 & 0xff) + 1) << kClusterShift | (u32)generic; };
      if (i.space == Space::kCluster) return each(mask, [&](int lane) { to[lane] = in_cluster(x[lane]); });
      if (i.space == Space::kGlobal) return each(mask, [&](int lane) { to[lane] = x[lane]; });
      return each(mask, [&](int lane) { to[lane] = (x[lane] & low_bits(32)) | (i.to ? 0 : window); });
    }
    case Op::kMapa: {
      const u64* const rank = operand(w, i, 1);
      if (i.space == Space::kCluster)
        return each(mask, [&](int lane) { to[lane] = ((u64)(u32)rank[lane] + 1) << kClusterShift | (u32)x[lane]; });
      return each(mask,
                  [&](int lane) { to[lane] = kSharedWindow | (u64)(u32)rank[lane] << 32 | (x[lane] & low_bits(32)); });
    }
    case Op::kActivemask:
      return each(mask, [&](int lane) { to[lane] = mask; });
    default:
      return each(mask, [&](int lane) { to[lane] = 0; });  // a cache policy, which nothing reads
  }
}

// Bits of three operands.
void Machine::permute(Warp& w, const Instruction& i, u32 mask) {
  u64* const to = result(w, i);
  const u64 *const x = operand(w, i, 0), *const y = operand(w, i, 1), *const z = operand(w, i, 2);
  switch (i.op) {
    case Op::kPrmt:
      return each(mask, [&](int lane) {
        const u64 bytes = (u32)x[lane] | y[lane] << 32;
        u32 r = 0;
        for (int n = 0; n < 4; ++n) {
          const int selector = z[lane] >> 4 * n & 15;
          const u32 byte = bytes >> 8 * (selector & 7) & 255;
          r |= (selector & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * n;  // 8: its sign, repeated
        }
        to[lane] = r;
      });
    case Op::kLop3: {
      const u32 table = (u32)operand(w, i, 3)[0];
      return each(mask, [&](int lane) {
        u32 r = 0;
        for (int n = 0; n < 32; ++n)
          r |= (table >> ((x[lane] >> n & 1) << 2 | (y[lane] >> n & 1) << 1 | (z[lane] >> n & 1)) & 1) << n;
        to[lane] = r;
      });
    }
    case Op::kShf:
      return each(mask, [&](int lane) {
        const u64 both = (u32)x[lane] | y[lane] << 32;
        const u32 by = i.wrap ? z[lane] & 31 : std::min<u32>((u32)z[lane], 32);
        to[lane] = i.mode == Mode::kRight ? (u32)(both >> by) : (u32)(both << by >> 32);
      });
    default: {  // bfi
      const int width = 8 * bytes_of(i.type);
      const u64* const length = operand(w, i, 3);
      return each(mask, [&](int lane) {
        const int position = z[lane] & 255, n = length[lane] & 255;
        const u64 field = position >= width ? 0 : low_bits(n) << position & low_bits(width);
        to[lane] = position >= width ? y[lane] & low_bits(width)
                                     : ((y[lane] & ~field) | (x[lane] << position & field)) & low_bits(width);
      });
    }
  }
}

template <class T>
void Machine::integers(Warp& w, const Instruction& i, u32 mask) {
  using U = std::make_unsigned_t<T>;
  constexpr int kWidth = 8 * sizeof(T);
  constexpr bool kSigned = std::is_signed_v<T>;
  u64* const to = result(w, i);
  const u64* const x = operand(w, i, 0);
  const u64* const y = i.num_operands > 1 ? operand(w, i, 1) : x;
  const u64* const z = i.num_operands > 2 ? operand(w, i, 2) : x;
  // Unsigned arithmetic wraps around; in 64 bits, lest narrow types become int.
  const auto put = [&](auto f) {
    each(mask, [&](int lane) { to[lane] = (u64)(f((u64)(U)x[lane], (u64)(U)y[lane], (u64)(U)z[lane])); });
  };
  switch (i.op) {
    case Op::kAdd:
      return put([](u64 a, u64 b, u64) { return (U)(a + b); });
    case Op::kSub:
      return put([](u64 a, u64 b, u64) { return (U)(a - b); });
    case Op::kMul:
      return put([](u64 a, u64 b, u64) { return (U)(a * b); });
    case Op::kMad:
      return put([](u64 a, u64 b, u64 c) { return (U)(a * b + c); });
    case Op::kMulHi:
      return put([](u64 a, u64 b, u64) { return (U)((__int128)(T)a * (__int128)(T)b >> kWidth); });
    case Op::kMulWide:
    case Op::kMadWide: {
      const bool adds = i.op == Op::kMadWide;
      return each(mask, [&](int lane) {
        const u64 product = kSigned ? (u64)((s64)(T)x[lane] * (s64)(T)y[lane]) : (u64)(U)x[lane] * (u64)(U)y[lane];
        to[lane] = (product + (adds ? z[lane] : 0)) & low_bits(2 * kWidth);
      });
    }
    // What divisions by 0 give is not specified; this is what devices give.
    case Op::kDiv:
      return put([](u64 a, u64 b, u64) {
        if (b == 0) return (U)-1;
        return kSigned && (T)b == (T)-1 ? (U)(0 - a) : (U)((T)a / (T)b);
      });
    case Op::kRem:
      return put([](u64 a, u64 b, u64) {
        if (b == 0) return (U)a;
        return kSigned && (T)b == (T)-1 ? (U)0 : (U)((T)a % (T)b);
      });
    case Op::kMin:
      return put([](u64 a, u64 b, u64) { return (U)std::min((T)a, (T)b); });
    case Op::kMax:
      return put([](u64 a, u64 b, u64) { return (U)std::max((T)a, (T)b); });
    case Op::kAbs:
      return put([](u64 a, u64, u64) { return (T)a < 0 ? (U)(0 - a) : (U)a; });
    case Op::kNeg:
      return put([](u64 a, u64, u64) { return (U)(0 - a); });
    case Op::kNot:
      return put([](u64 a, u64, u64) { return (U)~a; });
    case Op::kAnd:
      return put([](u64 a, u64 b, u64) { return (U)(a & b); });
    case Op::kOr:
      return put([](u64 a, u64 b, u64) { return (U)(a | b); });
    case Op::kXor:
      return put([](u64 a, u64 b, u64) { return (U)(a ^ b); });
    case Op::kPopc:
      return put([](u64 a, u64, u64) { return (U)std::popcount(a); });
    case Op::kClz:
      return put([](u64 a, u64, u64) { return (U)std::countl_zero((U)a); });
    case Op::kBrev:
      return put([](u64 a, u64, u64) {
        u64 r = 0;
        for (int n = 0; n < kWidth; ++n) r |= (a >> n & 1) << (kWidth - 1 - n);
        return (U)r;
      });
    // The second operand of a shift has 32 bits, whatever the type.
    case Op::kShl:
      return each(mask, [&](int lane) {
        const u32 by = (u32)y[lane];
        to[lane] = by >= kWidth ? 0 : (u64)((U)((u64)(U)x[lane] << by));
      });
    case Op::kShr:
      return each(mask, [&](int lane) {
        const u32 by = (u32)y[lane];
        const U sign = kSigned && (T)x[lane] < 0 ? (U)-1 : 0;
        to[lane] = (u64)(by >= kWidth ? sign : (U)((T)x[lane] >> by));
      });
    case Op::kBfe:
      return each(mask, [&](int lane) {
        const int position = y[lane] & 255, length = z[lane] & 255;
        const u64 a = (U)x[lane];
        const int last = std::min(position + length - 1, kWidth - 1);
        const u64 sign = kSigned && length > 0 && a >> last & 1 ? ~0ull : 0;
        const u64 field = position >= kWidth ? sign : a >> position;
        const int kept = std::min(length, std::max(0, kWidth - position));
        to[lane] = (u64)((U)((field & low_bits(kept)) | (sign & ~low_bits(kept))));
      });
    case Op::kSetp: {
      u32 true_of = 0;
      each(mask, [&](int lane) { true_of |= (u32)compared(i.compare, (T)x[lane], (T)y[lane]) << lane; });
      return compare(w, i, mask, true_of);
    }
    default:
      unknown();
  }
}

void Machine::compare(Warp& w, const Instruction& i, u32 mask, u32 true_of) {
  u32 false_of = ~true_of;
  if (i.combine != Mode::kNone) {
    const u32 other = source(w, i);
    for (u32* x : {&true_of, &false_of})
      *x = i.combine == Mode::kAnd ? *x & other : i.combine == Mode::kOr ? *x | other : *x ^ other;
  }
  set_predicate(w, i.predicate, mask, true_of);
  set_predicate(w, i.other_predicate, mask, false_of);
}

}  // namespace ptx
