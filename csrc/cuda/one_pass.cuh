// From logits to the gradient of the loss on a GPU that has clusters: every row is read from device memory once, and
// its gradient is written once. Free of torch.
//
// A first kernel puts the rows in the order of the walk: those that are evaluated, from the last to the first, so that
// the log-ratios after a token, which its trace needs, are known when its row is there. Each cluster walks over a
// segment of equally many of them; while the gradient of a row is written, the next row is on its way. Where windows
// reach rows of the segment before, which in place are about to be overwritten, another launch reduces those first.
// What a row gives depends on the segments in no way.
#pragma once

#include "block.cuh"
#include "row.cuh"
#include "tokens.cuh"

namespace fusedpo {

constexpr int kRowThreads = 512, kOrderThreads = 1024, kScaleThreads = 256;

// Where the rows of a tensor [width], or [any, width], of rows start, in elements.
struct RowOffsets {
  int64_t width, outer_stride, stride;
  FUSEDPO_DEVICE int64_t operator[](int64_t row) const { return row / width * outer_stride + row % width * stride; }
};

// A row: where its logits start and where its gradient does, the token it belongs to, and the number and the end of
// that token's sequence.
struct Row {
  int64_t from, to, token, sequence, end;
};

// The arguments of the kernels, as the operator in python/fusedpo/ops/one_pass.py has them.
struct OnePass {
  Objective objective;
  Batch batch;  // without log-probs and entropy; old log-probs may be absent
  const int64_t *rows, *token_ids;
  const float* temperature;
  bool temperature_per_token;
  const float* scale;
  float *logprobs, *entropy;
  const void* logits;
  void* gradient;
  RowOffsets from, to;
  int64_t num_rows;
  int size;  // V

  Geometry geometry;
  int64_t num_clusters;
  int order_threads = kOrderThreads;
  Row* order;              // [num_rows]: first the rows that are evaluated, in the order of the walk
  int64_t* num_evaluated;  // how many these are

  FUSEDPO_DEVICE int64_t ahead() const { return objective.ratio == kTrace ? objective.ahead : 0; }
};

// --------------------------------------------------------------------------------------------------- order of the walk

// The last sequence that begins at `t` or before.
__device__ inline int64_t sequence_of(const Batch& batch, int64_t t) {
  if (batch.cu_seqlens == nullptr) return t / batch.width;
  int64_t first = 0, end = batch.num_sequences;
  while (end - first > 1) {
    const int64_t middle = (first + end) / 2;
    (batch.cu_seqlens[middle] <= t ? first : end) = middle;
  }
  return first;
}

// A thread per row. A block counts for itself what comes after its rows.
__global__ void __launch_bounds__(kOrderThreads, 1) order_kernel(const __grid_constant__ OnePass p) {
  const auto plus = [](int64_t a, int64_t b) { return a + b; };
  const auto token_of = [&](int64_t row) {
    return p.rows == nullptr ? row : position_in(p.batch.num_tokens - 1, p.rows[row]);
  };
  const auto is_evaluated = [&](int64_t row) { return is_kept(p.batch, token_of(row)); };
  const advantages::Block block;
  const int64_t first = (int64_t)blockIdx.x * blockDim.x, row = first + threadIdx.x;
  int64_t mine = 0;
  for (int64_t i = row + blockDim.x; i < p.num_rows; i += blockDim.x) mine += is_evaluated(i);
  int64_t following = reduce(block, mine, (int64_t)0, plus);
  const bool evaluated = row < p.num_rows && is_evaluated(row);
  const int64_t later = block.after((int64_t)evaluated, following, plus);
  if (row < p.num_rows) {
    const int64_t token = token_of(row), sequence = sequence_of(p.batch, token);
    p.order[evaluated ? later : row + later] = {p.from[row], p.to[row], token, sequence,
                                                begin_of(p.batch, sequence + 1)};
  }
  if (row == 0) *p.num_evaluated = following;
}

// ------------------------------------------------------------------------------------------------------------ the walk

// The first position that the window of a row does not reach.
__device__ inline int64_t reach_of(const OnePass& p, const Row& at) {
  return p.ahead() < at.end - at.token ? at.token + 1 + p.ahead() : at.end;
}

// The log-ratios in the window of a row, summed by a warp. That of the row before it in the walk, at position `before`,
// is not in memory yet.
__device__ inline float log_trace_of(const OnePass& p, const Row& at, int64_t before, float log_ratio_before) {
  if (p.ahead() == 0) return 0;
  const float* old_logprobs = p.batch.tokens.old_logprobs.data;
  const int64_t reach = reach_of(p, at);
  float sum = 0;
  for (int64_t t = at.token + 1 + threadIdx.x % 32; t < reach; t += 32) {
    if (t == before)
      sum += log_ratio_before;
    else if (is_kept(p.batch, t))
      sum += log_ratio(p.logprobs[t], old_logprobs == nullptr ? p.logprobs[t] : old_logprobs[t]);
  }
  return sum_over_warp(sum);
}

#if FUSEDPO_HAS_CLUSTERS

// Evaluates order[begin, end); `halo`: their log-probs alone. Those of tokens before `known` are in memory already, and
// other clusters may be reading them.
template <class T>
__device__ void walk(const OnePass& p, const Cluster& cluster, int64_t begin, int64_t end, int64_t known, bool halo) {
  DYNAMIC_SHARED(char, shared);
  const Geometry& g = p.geometry;
  const bool has_old = p.batch.tokens.old_logprobs.data != nullptr;
  const auto row_at = [&](int64_t k) { return (const T*)p.logits + p.order[k].from; };

  Slices<T> slices(g, cluster, shared);
  for (int i = 0; i < g.slices; ++i) slices.request(row_at(begin), p.size, i);
  cluster.sync();  // all blocks have begun: their shared memory is there
  int64_t before = -1;
  float log_ratio_before = 0;
  for (int64_t k = begin; k < end; ++k) {
    const Row at = p.order[k];
    const bool is_last = k + 1 == end;
    const T *x = row_at(k), *next = is_last ? nullptr : row_at(k + 1);

    // While the row is on its way: what is known of the token.
    const float temperature = p.temperature[p.temperature_per_token ? at.token : 0];
    const float exponent_scale = kLog2e / temperature;
    const int64_t id = p.token_ids[at.token];
    const float chosen = id >= 0 && id < p.size ? to_float(x[id]) : NAN;
    const float scale = halo ? 0 : p.scale[at.token];
    Token<float> token = load_token(p.batch.tokens, at.token, at.sequence, 1);
    if (!halo) token.log_trace = log_trace_of(p, at, before, log_ratio_before);

    const unsigned odd = (k - begin) % 2;
    Sums sums;
    for (int i = 0; i < g.slices; ++i) {
      slices.wait(i, odd);
      slices.reduce(sums, x, p.size, i, exponent_scale);
      if (halo && !is_last) slices.request(next, p.size, i);
    }
    const RowStats stats(merge_over_cluster(g, cluster, sums, exponent_scale, shared, odd));
    token.logprob = stats.logprob(chosen, temperature);
    token.entropy = stats.entropy();
    if (!has_old) token.old_logprob = token.logprob;
    before = at.token;
    log_ratio_before = log_ratio(token.logprob, token.old_logprob);
    if (cluster.rank() == 0 && threadIdx.x == 0 && at.token >= known) {
      p.logprobs[at.token] = token.logprob;
      p.entropy[at.token] = token.entropy;
    }
    if (halo) continue;

    const float grad_logprob = scale * evaluate(p.objective, token).d_logprob;
    const float grad_entropy = p.objective.entropy_coef != 0 ? -scale * p.objective.entropy_coef : 0;
    const bool is_zero = grad_logprob == 0 && grad_entropy == 0;
    const RowGradient gradient(stats, temperature, token.logprob, grad_logprob, grad_entropy);
    T* out = (T*)p.gradient + at.to;
    const auto write = [&](auto of) {
      for (int i = 0; i < g.slices; ++i) {
        slices.write(out, x, p.size, i, of);
        if (!is_last) slices.request(next, p.size, i);
      }
    };
    using V = Vector<T>;
    if (is_zero) {
      write([](const V&) { return V{}; });
      continue;
    }
    if (grad_entropy == 0)
      write([&](const V& v) { return gradient.template of<false>(v); });
    else
      write([&](const V& v) { return gradient.template of<true>(v); });
    if (id >= 0 && id < p.size && slices.has(x, (int)id)) out[id] = from_float<T>(gradient.at_target);
  }
}

// Zeros in place of order[number], order[number + step], ..., by all threads of a cluster.
template <class T>
__device__ void write_zeros(const OnePass& p, int64_t number, int64_t step, int thread, int num_threads) {
  for (int64_t k = number; k < p.num_rows; k += step) {
    T* out = (T*)p.gradient + p.order[k].to;
    const int lead = (int)((uintptr_t)out % kVectorBytes / sizeof(T));
    for (int j = thread * Vector<T>::kSize - lead; j < p.size; j += num_threads * Vector<T>::kSize)
      store(out, p.size, j, Vector<T>{});
  }
}

#endif  // FUSEDPO_HAS_CLUSTERS

// Two launches: with `halo`, a cluster reduces the rows before its segment that windows of its own rows reach; without,
// it walks over its segment, and rows that are not evaluated get their zeros.
template <class T>
__global__ void __launch_bounds__(kRowThreads, 1) row_kernel(const __grid_constant__ OnePass p, bool halo) {
#if FUSEDPO_HAS_CLUSTERS
  const Cluster cluster;
  const int64_t evaluated = *p.num_evaluated, segments = evaluated < p.num_clusters ? evaluated : p.num_clusters;
  const int64_t number = blockIdx.x / p.geometry.blocks;
  const auto begin_of_segment = [&](int64_t s) { return evaluated * s / segments; };
  if (number < segments) {
    int64_t begin = begin_of_segment(number), end = begin_of_segment(number + 1), known = 0;
    if (halo) {
      // What is reached beyond the segment before is reached from there too.
      const int64_t reach = reach_of(p, p.order[begin]), most = number == 0 ? begin : begin_of_segment(number - 1);
      end = begin;
      while (begin > most && p.order[begin - 1].token < reach) --begin;
    } else if (end < evaluated) {
      known = reach_of(p, p.order[end]);
    }
    if (begin < end) walk<T>(p, cluster, begin, end, known, halo);
  }
  if (!halo)
    write_zeros<T>(p, evaluated + number, p.num_clusters, cluster.rank() * blockDim.x + threadIdx.x,
                   p.geometry.blocks * blockDim.x);
#endif
}

// ------------------------------------------------------------------------------------------------------------- scaling

// A stored gradient, and what it is to be multiplied by.
struct Scaling {
  void* gradient;
  RowOffsets rows;
  int64_t num_rows;
  int size;
  const float* factor;
};

template <class T>
__global__ void __launch_bounds__(kScaleThreads) scale_kernel(const __grid_constant__ Scaling s) {
  const float factor = *s.factor;
  if (factor == 1) return;
  for (int64_t row = blockIdx.x; row < s.num_rows; row += gridDim.x) {
    T* x = (T*)s.gradient + s.rows[row];
    const int lead = (int)((uintptr_t)x % kVectorBytes / sizeof(T));
    for (int j = (int)threadIdx.x * Vector<T>::kSize - lead; j < s.size; j += (int)blockDim.x * Vector<T>::kSize) {
      Vector<T> v = load(x, s.size, j);
      for (T& element : v.element) element = from_float<T>(to_float(element) * factor);
      store(x, s.size, j, v);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ launches

// What launch(kernel, shape, arguments...) is told of a grid: so many blocks, in clusters of `cluster` if that is not
// 0.
struct Grid {
  int64_t blocks;
  int threads, cluster = 0, shared_bytes = 0;
};

template <class T, class Launch>
void launch_one_pass(const OnePass& p, Launch launch) {
  if (p.num_rows == 0) return;
  const Geometry& g = p.geometry;
  const Grid clusters{p.num_clusters * g.blocks, 32 * g.warps, g.blocks, g.shared_bytes()};
  launch(order_kernel, Grid{(p.num_rows - 1) / p.order_threads + 1, p.order_threads}, p);
  if (p.ahead() > 0) launch(row_kernel<T>, clusters, p, true);
  launch(row_kernel<T>, clusters, p, false);
}

template <class T, class Launch>
void launch_scale(const Scaling& s, Launch launch) {
  constexpr int64_t kMostBlocks = 1 << 16;
  if (s.num_rows > 0)
    launch(scale_kernel<T>, Grid{s.num_rows < kMostBlocks ? s.num_rows : kMostBlocks, kScaleThreads}, s);
}

}  // namespace fusedpo
