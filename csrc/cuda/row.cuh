// One row of logits in the shared memory of a cluster of thread blocks: how it gets there, how it is reduced, and how
// its gradient is written. Free of torch.
//
// The row is cut into slices of 2 KiB, which the warps of the cluster take in turn. A warp asks for its slices, reads
// them, and asks for those of the next row in their place: it waits for nobody but in the reductions. Slices begin at
// multiples of 16 bytes of device memory, as the copies want it; where a row does not, the vectors of 16 bytes at its
// ends, which it shares with its neighbours, are read and written element by element.
#pragma once

#include <cmath>
#include <cstring>

#include "cluster.cuh"
#include "core/math.h"
#include "core/team.h"

namespace fusedpo {

constexpr int kSliceBytes = 2048;
constexpr int kVectorBytes = 16;
constexpr int kLaneVectors = kSliceBytes / kVectorBytes / 32;  // vectors of a slice that a lane has
constexpr int kMaxClusterBlocks = 8;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLowest = -200.0f;  // 2^-200 is 0; -inf is moved here so that 0 * -inf never arises

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <class T>
struct alignas(kVectorBytes) Vector {
  static constexpr int kSize = kVectorBytes / sizeof(T);
  T element[kSize];
};

// The elements of a vector as floats, and back. Of two in a word, a shift and a mask make float32 of bfloat16.
template <class T>
__device__ void unpack(const Vector<T>& v, float* x) {
#pragma unroll
  for (int e = 0; e < Vector<T>::kSize; ++e) x[e] = to_float(v.element[e]);
}
template <>
__device__ inline void unpack(const Vector<__nv_bfloat16>& v, float* x) {
#pragma unroll
  for (int e = 0; e < Vector<__nv_bfloat16>::kSize; e += 2) {
    uint32_t word;
    memcpy(&word, &v.element[e], sizeof word);
    const uint32_t bits[2] = {word << 16, word & 0xffff0000u};
    memcpy(&x[e], bits, sizeof bits);
  }
}

template <class T>
__device__ Vector<T> pack(const float* x) {
  Vector<T> v;
#pragma unroll
  for (int e = 0; e < Vector<T>::kSize; e += 2) {
    const uint32_t word = two_rounded<T>(x[e], x[e + 1]);
    memcpy(&v.element[e], &word, sizeof word);
  }
  return v;
}
template <>
__device__ inline Vector<float> pack(const float* x) {
  return {x[0], x[1], x[2], x[3]};
}

template <class T>
__device__ bool is_inside(int j, int size) {
  return j >= 0 && j + Vector<T>::kSize <= size;
}

// The elements of row[0, size) from j on, and -inf for what is not in it.
template <class T>
__device__ Vector<T> load(const T* row, int size, int j) {
  if (is_inside<T>(j, size) && (uintptr_t)(row + j) % kVectorBytes == 0) return *(const Vector<T>*)(row + j);
  Vector<T> v;
#pragma unroll
  for (int e = 0; e < Vector<T>::kSize; ++e)
    v.element[e] = j + e >= 0 && j + e < size ? row[j + e] : from_float<T>(-kInfinity);
  return v;
}

// Writes the elements of `v` that lie in out[0, size), the first one at j.
template <class T>
__device__ void store(T* out, int size, int j, const Vector<T>& v) {
  if (is_inside<T>(j, size) && (uintptr_t)(out + j) % kVectorBytes == 0) {
    *(Vector<T>*)(out + j) = v;
    return;
  }
#pragma unroll
  for (int e = 0; e < Vector<T>::kSize; ++e)
    if (j + e >= 0 && j + e < size) out[j + e] = v.element[e];
}

// ----------------------------------------------------------------------------------------------------------- reduction

// Of some elements of a row: the largest, `top`, and of all but that one the sums of e_j = 2^t_j and of e_j t_j, where
// t_j = (x_j - top) * log2(e) / T. Others that are as large are in the sums.
struct Sums {
  float top = -kInfinity, rest = 0, weighted = 0;
};

template <class T, class Op>
__device__ T over_warp(T x, Op op) {
  for (int distance = 16; distance > 0; distance /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

__device__ inline float sum_over_warp(float x) {
  return over_warp(x, [](float a, float b) { return a + b; });
}

// What the exponents of a row are relative to: its largest element, or 0 where there is nothing but -inf.
__device__ inline float reference_of(float top) { return top == -kInfinity ? 0 : top; }

__device__ inline float exponent(float x, float reference, float scale) {
  return max_or_nan((x - reference) * scale, kLowest);
}

// The same sums relative to a larger `top`.
__device__ inline Sums moved(const Sums& s, float top, float scale) {
  const float shift = exponent(s.top, reference_of(top), scale), factor = exp2_approx(shift);
  return {top, s.rest * factor, fmaf(shift, s.rest, s.weighted) * factor};
}

// Adds an element that is not larger than `top`.
__device__ inline void add(Sums& s, float x, float scale) {
  const float t = exponent(x, reference_of(s.top), scale), power = exp2_approx(t);
  s.rest += power;
  s.weighted = fmaf(power, t, s.weighted);
}

__device__ inline Sums merge(const Sums& a, const Sums& b, float scale) {
  const float top = fmaxf(a.top, b.top);
  const Sums x = moved(a, top, scale), y = moved(b, top, scale);
  Sums s = {top, x.rest + y.rest, x.weighted + y.weighted};
  add(s, fminf(a.top, b.top), scale);
  return s;
}

// Adds elements. The largest so far changes places with each of them that is larger; what is in `x` then are all but
// the largest one, and are summed: none has to be told from it, and it hides none of their digits. A nan stays in `x`.
template <int kChains, int kLength>
__device__ void add(Sums& s, float (&x)[kChains][kLength], float scale) {
  float top = s.top;
#pragma unroll
  for (int c = 0; c < kChains; ++c) {
    float largest = x[c][0];
#pragma unroll
    for (int e = 1; e < kLength; ++e) {
      const float other = x[c][e];
      x[c][e] = min_or_nan(largest, other);
      largest = fmaxf(largest, other);
    }
    x[c][0] = min_or_nan(top, largest);
    top = fmaxf(top, largest);
  }
  s = moved(s, top, scale);
  const float reference = reference_of(top);
  float rest[2] = {}, weighted[2] = {};
#pragma unroll
  for (int c = 0; c < kChains; ++c) {
#pragma unroll
    for (int e = 0; e < kLength; ++e) {
      const float t = exponent(x[c][e], reference, scale), power = exp2_approx(t);
      rest[e % 2] += power;
      weighted[e % 2] = fmaf(power, t, weighted[e % 2]);
    }
  }
  s.rest += rest[0] + rest[1];
  s.weighted += weighted[0] + weighted[1];
}

// Known to all lanes. The largest element goes to lane 0, and every other lane is left with another one.
__device__ inline Sums merge_over_warp(const Sums& mine, float scale) {
  const int lane = threadIdx.x % 32;
  float x = mine.top;
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, x, distance);
    x = lane & distance ? fminf(x, other) : fmaxf(x, other);
  }
  const float top = __shfl_sync(0xffffffffu, x, 0);
  Sums s = moved(mine, top, scale);
  if (lane > 0) add(s, x, scale);
  return {top, sum_over_warp(s.rest), sum_over_warp(s.weighted)};
}

// ------------------------------------------------------------------------------------------------------ shared memory

// How a row lies in the shared memory of a cluster.
struct Geometry {
  int blocks;  // of a cluster; 0: a row is too large
  int warps;   // of a block
  int slices;  // of a warp

  // The shared memory of a block: its slices, what all warps say of this row and of the one before, and arrivals.
  FUSEDPO_DEVICE int cluster_warps() const { return blocks * warps; }
  FUSEDPO_DEVICE int sums_at() const { return warps * slices * kSliceBytes; }
  FUSEDPO_DEVICE int arrivals_at() const { return sums_at() + 2 * cluster_warps() * (int)sizeof(Sums); }
  FUSEDPO_DEVICE int shared_bytes() const { return arrivals_at() + warps * slices * (int)sizeof(uint64_t); }
};

// The smallest cluster that has room for a row, with blocks of so many warps and bytes of shared memory.
inline Geometry geometry_for(int64_t row_bytes, int warps, int64_t shared_limit) {
  const int64_t slices = (row_bytes + kVectorBytes - 1) / kSliceBytes + 1;  // wherever in a vector the row begins
  for (int blocks = 1; blocks <= kMaxClusterBlocks; blocks *= 2) {
    const int64_t of_a_warp = (slices - 1) / (blocks * warps) + 1;
    if (of_a_warp > shared_limit / kSliceBytes) continue;
    const Geometry g{blocks, warps, (int)of_a_warp};
    if (g.shared_bytes() <= shared_limit) return g;
  }
  return {0, warps, 0};
}

#if FUSEDPO_HAS_CLUSTERS

// The slices of one warp.
template <class T>
class Slices {
 public:
  static constexpr int kVector = Vector<T>::kSize, kSlice = kSliceBytes / sizeof(T);

  __device__ Slices(const Geometry& g, const Cluster& cluster, char* shared)
      : stride_(g.cluster_warps()),
        warp_(cluster.rank() * g.warps + (int)threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        memory_(shared + threadIdx.x / 32 * g.slices * kSliceBytes),
        arrivals_((Arrival*)(shared + g.arrivals_at()) + threadIdx.x / 32 * g.slices) {
    if (lane_ == 0) {
      for (int i = 0; i < g.slices; ++i) arrivals_[i].init();
      Arrival::publish();
    }
    __syncwarp();
  }

  // Asks for slice i of a row, once all lanes have read what was there before.
  __device__ void request(const T* row, int size, int i) {
    __syncwarp();
    if (lane_ > 0) return;
    char* memory = memory_ + i * kSliceBytes;
    const int first = first_of(row, i);
    if (is_whole(first, size)) {
      arrivals_[i].expect(kSliceBytes);
      arrivals_[i].copy(memory, row + first, kSliceBytes);
      return;
    }
    // Whole vectors of it: from the first one that begins in the row to the last one that ends there.
    const int from = max(first, (kVector - lead(row)) % kVector), end = size - (size + lead(row)) % kVector;
    const int count = min(first + kSlice, end) - from, bytes = count > 0 ? count * (int)sizeof(T) : 0;
    arrivals_[i].expect(bytes);
    if (bytes > 0) arrivals_[i].copy(memory + (from - first) * sizeof(T), row + from, bytes);
  }

  __device__ void wait(int i, unsigned parity) const { arrivals_[i].wait(parity); }

  // Which element of the row is the first one of this lane's q-th vector; negative, or beyond the row, at its ends.
  __device__ int position(const T* row, int i, int q) const { return first_of(row, i) + (q * 32 + lane_) * kVector; }

  // That vector, as load() has it.
  __device__ Vector<T> load(const T* row, int size, int i, int q) const {
    const int j = position(row, i, q);
    return is_inside<T>(j, size) ? vector(i, q) : fusedpo::load(row, size, j);
  }

  // Adds this lane's vectors of a slice.
  __device__ void reduce(Sums& s, const T* row, int size, int i, float scale) const {
    const int first = first_of(row, i);
    if (is_whole(first, size)) {
      float x[kLaneVectors][kVector];
#pragma unroll
      for (int q = 0; q < kLaneVectors; ++q) unpack(vector(i, q), x[q]);
      add(s, x, scale);
    } else if (first < size) {
#pragma unroll 1
      for (int q = 0; q < kLaneVectors; ++q) {
        float x[1][kVector];
        unpack(load(row, size, i, q), x[0]);
        add(s, x, scale);
      }
    }
  }

  // Writes to `out` what `of` makes of this lane's vectors of a slice.
  template <class Of>
  __device__ void write(T* out, const T* row, int size, int i, Of of) const {
    const int first = first_of(row, i);
    if (is_whole(first, size) && lead(out) == lead(row)) {
      Vector<T>* to = (Vector<T>*)(out + position(row, i, 0));
#pragma unroll
      for (int q = 0; q < kLaneVectors; ++q) to[q * 32] = of(vector(i, q));
    } else if (first < size) {
#pragma unroll 1
      for (int q = 0; q < kLaneVectors; ++q) store(out, size, position(row, i, q), of(load(row, size, i, q)));
    }
  }

  // Whether element j is in one of this lane's vectors.
  __device__ bool has(const T* row, int j) const {
    const int place = j + lead(row);
    return place / kSlice % stride_ == warp_ && place / kVector % 32 == lane_;
  }

 private:
  // Which element of the row is the first one of slice i.
  __device__ int first_of(const T* row, int i) const { return (i * stride_ + warp_) * kSlice - lead(row); }

  // Whether all of the slice from `first` on is of the row.
  __device__ static bool is_whole(int first, int size) { return first >= 0 && first + kSlice <= size; }

  __device__ const Vector<T>& vector(int i, int q) const {
    return ((const Vector<T>*)(memory_ + i * kSliceBytes))[q * 32 + lane_];
  }

  // Elements between the multiple of 16 bytes and the row.
  __device__ static int lead(const T* row) { return (int)((uintptr_t)row % kVectorBytes / sizeof(T)); }

  const int stride_, warp_, lane_;
  char* const memory_;
  Arrival* const arrivals_;
};

// Known to all threads of the cluster. `odd` alternates from call to call: what a warp of the slowest block still reads
// is not what the fastest one writes next. In between lies the barrier of the call.
__device__ inline Sums merge_over_cluster(const Geometry& g, const Cluster& cluster, const Sums& mine, float scale,
                                          char* shared, unsigned odd) {
  const int warps = g.cluster_warps(), lane = threadIdx.x % 32;
  Sums* of_warps = (Sums*)(shared + g.sums_at()) + odd * warps;
  const Sums own = merge_over_warp(mine, scale);
  if (lane < g.blocks) cluster.in_block(of_warps, lane)[cluster.rank() * g.warps + threadIdx.x / 32] = own;
  cluster.sync();
  Sums all;
#pragma unroll 1
  for (int i = lane; i < warps; i += 32) all = merge(all, of_warps[i], scale);
  return merge_over_warp(all, scale);
}

// ------------------------------------------------------------------------------------------------------------ gradient

// What the sums say of a row: log p_y and the entropy as in cpu/row_kernels.h.
struct RowStats {
  float reference, rest, weighted, log_sum;

  __device__ RowStats(const Sums& s)
      : reference(reference_of(s.top)),
        rest(s.top == -kInfinity ? -1 : s.rest),
        weighted(s.weighted * kLn2),
        log_sum(log1pf(rest)) {}
  __device__ float logprob(float x, float temperature) const { return (x - reference) / temperature - log_sum; }
  __device__ float entropy() const { return log_sum - weighted / (1 + rest); }
};

// With g and E the gradients of log p_y and of the entropy H:
//   grad x_j = (g [j = y] - g p_j - E p_j (log p_j + H)) / T
// where the last two terms are e_j * (constant + slope * t_j). At y, 1 - p is taken through expm1.
struct RowGradient {
  float reference, scale, constant, slope, at_target;

  __device__ RowGradient(const RowStats& s, float temperature, float logprob, float g, float E)
      : reference(s.reference), scale(kLog2e / temperature) {
    const float normaliser = 1 / (temperature * (1 + s.rest));
    constant = normaliser * (E * (s.weighted / (1 + s.rest)) - g);
    slope = normaliser * -E * kLn2;
    at_target = -g * expm1f(logprob);
    if (E != 0 && logprob != -kInfinity) at_target -= E * expf(logprob) * (logprob + s.entropy());
    at_target /= temperature;
  }

  // Of all but y. Without the gradient of the entropy nothing is multiplied by t, which may be -inf then.
  template <bool kEntropy, class T>
  __device__ Vector<T> of(const Vector<T>& v) const {
    float x[Vector<T>::kSize];
    unpack(v, x);
#pragma unroll
    for (float& y : x) {
      const float t = kEntropy ? exponent(y, reference, scale) : (y - reference) * scale;
      y = exp2_approx(t) * (kEntropy ? fmaf(slope, t, constant) : constant);
    }
    return pack<T>(x);
  }
};

#endif  // FUSEDPO_HAS_CLUSTERS

}  // namespace fusedpo
