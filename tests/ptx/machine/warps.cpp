// Instructions that lanes of a warp execute together.
#include <cstring>

#include "machine.h"
#include "numbers.h"

namespace ptx {

void Machine::together(Warp& w, const Instruction& i, u32 mask) {
  switch (i.op) {
    case Op::kShfl:
      return shuffle(w, i, mask);
    case Op::kRedux:
      return reduce(w, i, mask);
    case Op::kVote:
      return vote(w, i, mask);
    case Op::kBarWarp:
      progress_ = true;
      return tick(w);
    default:
      return matrix(w, i);
  }
}

void Machine::shuffle(Warp& w, const Instruction& i, u32 mask) {
  ++counters_[kPtxShuffles];
  const u64 *const x = operand(w, i, 0), *const lanes = operand(w, i, 1), *const clamp = operand(w, i, 2);
  u64 values[kLanes];
  u32 inside = 0;
  each(mask, [&](int lane) {
    const int by = lanes[lane] & 31, bound = clamp[lane] & 31, segment = clamp[lane] >> 8 & 31;
    const int least = lane & segment, most = least | (bound & ~segment);
    int from = lane;
    bool in = false;
    switch (i.mode) {
      case Mode::kUp:
        from = lane - by, in = from >= most;
        break;
      case Mode::kDown:
        from = lane + by, in = from <= most;
        break;
      case Mode::kBfly:
        from = lane ^ by, in = from <= most;
        break;
      default:
        from = least | (by & ~segment), in = from <= most;
    }
    if (!in) from = lane;
    if (!(mask >> from & 1)) fail("a shuffle from a lane that does not take part", lane);
    values[lane] = (u32)x[from];
    inside |= (u32)in << lane;
  });
  u64* to = result(w, i);
  each(mask, [&](int lane) { to[lane] = values[lane]; });
  set_predicate(w, i.predicate, mask, inside);
}

void Machine::reduce(Warp& w, const Instruction& i, u32 mask) {
  const u64* x = operand(w, i, 0);
  u64 total = extended(i.type, x[std::countr_zero(mask)]);
  each(mask & (mask - 1), [&](int lane) {
    const u64 a = total, b = extended(i.type, x[lane]);
    const bool less = is_signed(i.type) ? (s64)a < (s64)b : a < b;
    switch (i.mode) {
      case Mode::kAdd:
        total = extended(i.type, a + b);
        break;
      case Mode::kAnd:
        total = a & b;
        break;
      case Mode::kOr:
        total = a | b;
        break;
      case Mode::kXor:
        total = a ^ b;
        break;
      case Mode::kMin:
        total = i.type == Type::F32 ? bits(minimum(as_f32(a), as_f32(b), i.nan)) : less ? a : b;
        break;
      default:
        total = i.type == Type::F32 ? bits(maximum(as_f32(a), as_f32(b), i.nan)) : less ? b : a;
    }
  });
  if (i.type == Type::F32 && std::isnan(as_f32(total))) total = kNan32;
  u64* to = result(w, i);
  each(mask, [&](int lane) { to[lane] = (u32)total; });
}

void Machine::vote(Warp& w, const Instruction& i, u32 mask) {
  const u32 votes = source(w, i) & mask;
  if (i.mode == Mode::kBallot) {
    u64* to = result(w, i);
    return each(mask, [&](int lane) { to[lane] = votes; });
  }
  const bool yes = i.mode == Mode::kAny   ? votes != 0
                   : i.mode == Mode::kAll ? votes == mask
                                          : votes == 0 || votes == mask;
  set_predicate(w, i.predicate, mask, yes ? ~0u : 0);
}

// Matrices of 8 x 8 elements of 2 bytes: lanes 8n to 8n+7 have the addresses of the rows of the n-th, and each lane
// holds two elements of a row.
void Machine::matrix(Warp& w, const Instruction& i) {
  const u64* base = value(w, i.base);
  const bool is_store = i.op == Op::kStmatrix;
  for (int n = 0; n < (is_store ? i.num_operands : i.num_results); ++n) {
    Place rows[kLanes];
    u64* const to = is_store ? nowhere_ : result(w, i, n);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = 8 * n + lane / 4, part = lane % 4 * 4;
      Place p = place(w, Space::kShared, base[row] + i.offset, 16, is_store, row);
      rows[lane / 4] = p;
      p.data += part, p.written += part, p.offset += part;
      if (p.shadow) p.shadow += part;
      u32 x = is_store ? (u32)operand(w, i, n)[lane] : 0;
      touch(w, p, 4, lane, is_store ? (const u8*)&x : nullptr);
      if (is_store)
        memcpy(p.data, &x, 4);
      else
        memcpy(&x, p.data, 4), to[lane] = x;
    }
    count(0xff, rows, 16, is_store);
  }
}

}  // namespace ptx
