// A team of threads that works on one group or one sequence: a thread of the CPU by itself, or a thread block. What is
// written once for a team is compiled by the C++ compiler for the host and by nvcc for the device.
//
// A team has rank(), size(), sync() and
//
//   T after(T mine, T& carry, op)   what `op` makes of the values of the members of higher rank, in order of rank, and
//                                   then of `carry`; `carry` becomes the same with all members in it, for all of them.
//
// `op` is associative. The order of its arguments, and so every rounding, depends on the size of the team alone.
#pragma once

#include <math.h>

#include <cstdint>

#if defined(__CUDACC__)
#define FUSEDPO_DEVICE __host__ __device__ inline
#else
#define FUSEDPO_DEVICE inline
#endif

namespace fusedpo::advantages {

struct OneThread {
  FUSEDPO_DEVICE int rank() const { return 0; }
  FUSEDPO_DEVICE int size() const { return 1; }
  FUSEDPO_DEVICE void sync() const {}

  template <class T, class Op>
  FUSEDPO_DEVICE T after(T mine, T& carry, Op op) const {
    const T later = carry;
    carry = op(mine, later);
    return later;
  }
};

template <class Team, class T, class Op>
FUSEDPO_DEVICE T reduce(Team& team, T mine, T identity, Op op) {
  team.after(mine, identity, op);
  return identity;
}

// Goes from the last index to the first: store(i, value(i), later), `later` being what `op` makes of the values at
// i + 1, i + 2, ... and then of `carry`. Returns the same for the whole range. Each index has one member of the team.
template <class Team, class T, class Value, class Op, class Store>
FUSEDPO_DEVICE T suffix_scan(Team& team, int64_t size, T identity, T carry, Value value, Op op, Store store) {
  const int64_t width = team.size();
  for (int64_t first = (size - 1) / width * width; size > 0 && first >= 0; first -= width) {
    const int64_t i = first + team.rank();
    const T mine = i < size ? value(i) : identity;
    const T later = team.after(mine, carry, op);
    if (i < size) store(i, mine, later);
  }
  return carry;
}

struct Add {
  FUSEDPO_DEVICE double operator()(double a, double b) const { return a + b; }
};

struct Multiply {
  FUSEDPO_DEVICE double operator()(double a, double b) const { return a * b; }
};

// A sum with twice the digits of a double: what comes in which order does not show in value().
struct Sum {
  double high = 0, low = 0;

  FUSEDPO_DEVICE Sum operator+(const Sum& other) const {
    const double sum = high + other.high, added = sum - high;
    return {sum, ((high - (sum - added)) + (other.high - added)) + (low + other.low)};
  }
  FUSEDPO_DEVICE double value() const { return isfinite(high) ? high + low : high; }
};

struct AddSums {
  FUSEDPO_DEVICE Sum operator()(const Sum& a, const Sum& b) const { return a + b; }
};

// The sum of term(i) for i in [0, size), known to all members.
template <class Team, class Term>
FUSEDPO_DEVICE double sum(Team& team, int64_t size, Term term) {
  Sum mine;
  for (int64_t i = team.rank(); i < size; i += team.size()) mine = mine + Sum{term(i), 0};
  return reduce(team, mine, Sum{}, AddSums{}).value();
}

}  // namespace fusedpo::advantages
