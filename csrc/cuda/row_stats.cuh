// Rows of logits whose columns lie on several ranks: what a rank says of its columns, the merge, and the gradient of
// its columns. Free of torch.
//
// A block reads a row once, in vectors of 16 bytes, and merges the sums of its threads in one order; what a row gives
// depends on its columns and where in 16 bytes they begin. The gradient is another read and one write, maybe in place.
#pragma once

#include "core/row_stats.h"
#include "row.cuh"

namespace fusedpo {

constexpr int kStatsThreads = 256;

// Where the rows of a tensor [width], or [any, width], of rows start, in elements.
struct RowStarts {
  int64_t width, outer_stride, stride;
  FUSEDPO_DEVICE int64_t operator[](int64_t row) const { return row / width * outer_stride + row % width * stride; }
};

// Arguments that the kernels of rows share: python/fusedpo/ops/row_stats.py and token_logprobs.py.
struct ShardRows {
  const void* logits;
  RowStarts from;
  int64_t num_rows;
  int size;  // columns, from vocab_start on
  const int64_t* token_ids;
  int64_t num_ids, vocab_start;
  const float* temperature;
  bool temperature_per_row;
  const uint8_t* mask;

  FUSEDPO_DEVICE float temperature_of(int64_t row) const { return temperature[temperature_per_row ? row : 0]; }
  FUSEDPO_DEVICE bool is_kept(int64_t row) const { return mask == nullptr || mask[row] != 0; }
};

struct RowStatsCall {
  ShardRows rows;
  int64_t width, vocab_size;
  bool entropy;
  float* parts;  // [1 + num_rows, (entropy ? 3 : 2) + num_ids]
};

struct MergeCall {
  Parts parts;
  const float* temperature;
  bool temperature_per_row;
  const uint8_t* mask;
  float *logprobs, *entropy, *stats;
};

struct ShardGradientCall {
  ShardRows rows;
  const float *grad_logprobs, *grad_entropy;  // either may be null
  const float* stats;                         // [num_rows, 3]
  float* at_ids;                              // [num_rows, num_ids]: room for the gradients of columns that were taken
  void* gradient;
  RowStarts to;
};

// The element of row[0, size) with which the vectors of 16 bytes begin: at 0, or before it.
template <class T>
__device__ int first_vector(const T* row) {
  return -(int)((uintptr_t)row % kVectorBytes / sizeof(T));
}

// Known to all threads of the block.
__device__ inline Sums merge_over_block(const Sums& mine, float scale) {
  __shared__ Sums of_warps[kStatsThreads / 32];
  const Sums own = merge_over_warp(mine, scale);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = own;
  __syncthreads();
  Sums all;
  for (int warp = 0; warp < (int)blockDim.x / 32; ++warp) all = merge(all, of_warps[warp], scale);
  __syncthreads();  // the next row writes there again
  return all;
}

template <class T>
__global__ void __launch_bounds__(kStatsThreads) row_stats_kernel(const __grid_constant__ RowStatsCall c) {
  constexpr int kVector = Vector<T>::kSize;
  const ShardRows& rows = c.rows;
  const int triple = c.entropy ? 3 : 2;
  const int64_t columns = triple + rows.num_ids;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    for (int64_t i = 0; i < columns; ++i)
      c.parts[i] = (float)(i == 0 ? rows.vocab_start : i == 1 ? c.width : i == 2 ? c.vocab_size : 0);
  }
  for (int64_t row = blockIdx.x; row < rows.num_rows; row += gridDim.x) {
    float* out = c.parts + (1 + row) * columns;
    if (!rows.is_kept(row)) {
      for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) out[i] = 0;
      continue;
    }
    const T* x = (const T*)rows.logits + rows.from[row];
    const float scale = kLog2e / rows.temperature_of(row);
    Sums mine;
    for (int j = first_vector(x) + (int)threadIdx.x * kVector; j < rows.size; j += (int)blockDim.x * kVector) {
      const Vector<T> v = load(x, rows.size, j);
      float elements[1][kVector];
#pragma unroll
      for (int e = 0; e < kVector; ++e) elements[0][e] = to_float(v.element[e]);
      add(mine, elements, scale);
    }
    const Sums sums = merge_over_block(mine, scale);
    if (threadIdx.x == 0) {
      out[0] = reference_of(sums.top);
      out[1] = sums.top == -kInfinity ? sums.rest - 1 : sums.rest;  // nan stays nan
      if (c.entropy) out[2] = sums.weighted * kLn2;
    }
    for (int64_t k = threadIdx.x; k < rows.num_ids; k += blockDim.x) {
      const int64_t id = rows.token_ids[row * rows.num_ids + k] - rows.vocab_start;
      out[triple + k] = id >= 0 && id < rows.size ? to_float(x[id]) : -kInfinity;
    }
  }
}

// A thread per row.
__global__ void __launch_bounds__(kStatsThreads) merge_row_stats_kernel(const __grid_constant__ MergeCall c) {
  const int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, num_ids = c.parts.num_ids();
  if (row >= c.parts.rows) return;
  const bool kept = c.mask == nullptr || c.mask[row] != 0;
  const float T = kept ? c.temperature[c.temperature_per_row ? row : 0] : 1;
  const MergedRow<float> merged(c.parts, row, T);
  const float poison = c.parts.agree() ? 0.0f : NAN, log_sum = log1pf(merged.rest) + poison;
  for (int64_t k = 0; k < num_ids; ++k) {
    const float logit = MergedRow<float>::logit(c.parts, row, k);
    c.logprobs[row * num_ids + k] = kept ? (logit - merged.reference) / T - log_sum : 0;
  }
  if (c.parts.entropy) c.entropy[row] = kept ? log_sum - merged.weighted / (1 + merged.rest) : 0;
  const float triple[3] = {merged.reference, merged.rest, merged.weighted};
  for (int i = 0; i < 3; ++i) c.stats[3 * row + i] = kept ? triple[i] + poison : 0;
}

// With p_j = e_j / (1 + rest), G the sum of grad_logprobs, E the gradient of the entropy H:
//   grad x_j = (grad_logprobs at j - G p_j - E p_j (log p_j + H)) / T
// Columns whose log-prob was taken are computed apart, before any is overwritten, with 1 - p through expm1.
template <class T>
__global__ void __launch_bounds__(kStatsThreads) shard_gradient_kernel(const __grid_constant__ ShardGradientCall c) {
  constexpr int kVector = Vector<T>::kSize;
  const ShardRows& rows = c.rows;
  for (int64_t row = blockIdx.x; row < rows.num_rows; row += gridDim.x) {
    const T* x = (const T*)rows.logits + rows.from[row];
    T* out = (T*)c.gradient + c.to[row];
    const int64_t* ids = rows.token_ids + row * rows.num_ids;
    const float* g = c.grad_logprobs == nullptr ? nullptr : c.grad_logprobs + row * rows.num_ids;
    const bool kept = rows.is_kept(row);
    const float E = kept && c.grad_entropy != nullptr ? c.grad_entropy[row] : 0;
    float total = 0;
    bool reached = E != 0;
    for (int64_t k = 0; kept && g != nullptr && k < rows.num_ids; ++k) {
      total += g[k];
      reached = reached || g[k] != 0;
    }
    if (!reached) {
      Vector<T> zeros;
      for (int e = 0; e < kVector; ++e) zeros.element[e] = from_float<T>(0);
      for (int j = first_vector(out) + (int)threadIdx.x * kVector; j < rows.size; j += (int)blockDim.x * kVector)
        store(out, rows.size, j, zeros);
      continue;
    }
    const float temperature = rows.temperature_of(row), scale = kLog2e / temperature;
    const float reference = c.stats[3 * row], rest = c.stats[3 * row + 1];
    const float log_sum = log1pf(rest), sum = rest > -1 ? 1 + rest : NAN;  // a row of -inf has no softmax
    const float mean = c.stats[3 * row + 2] / sum, normaliser = 1 / (temperature * sum);
    for (int64_t k = threadIdx.x; g != nullptr && k < rows.num_ids; k += blockDim.x) {
      const int64_t id = ids[k] - rows.vocab_start;
      if (id < 0 || id >= rows.size) continue;
      float here = 0, others = 0;
      for (int64_t l = 0; l < rows.num_ids; ++l) (ids[l] == ids[k] ? here : others) += g[l];
      const float logprob = (to_float(x[id]) - reference) / temperature - log_sum, p = expf(logprob);
      float value = -here * expm1f(logprob) - others * p;
      if (E != 0 && logprob != -kInfinity) value -= E * p * (logprob + log_sum - mean);
      c.at_ids[row * rows.num_ids + k] = value / temperature;
    }
    __syncthreads();
    const float constant = normaliser * (E * mean - total), slope = normaliser * -E * kLn2;
    for (int j = first_vector(x) + (int)threadIdx.x * kVector; j < rows.size; j += (int)blockDim.x * kVector) {
      Vector<T> v = load(x, rows.size, j);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const float t = exponent(to_float(v.element[e]), reference, scale);
        v.element[e] = from_float<T>(exp2_approx(t) * fmaf(slope, t, constant));
      }
      store(out, rows.size, j, v);
    }
    __syncthreads();
    for (int64_t k = threadIdx.x; g != nullptr && k < rows.num_ids; k += blockDim.x) {
      const int64_t id = ids[k] - rows.vocab_start;
      if (id >= 0 && id < rows.size) out[id] = from_float<T>(c.at_ids[row * rows.num_ids + k]);
    }
  }
}

}  // namespace fusedpo
