// The rows of a tensor of logits, and work on many of them over threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "arguments.h"
#include "dispatch.h"
#include "parallel.h"

namespace fusedpo::cpu {

// The row kernels for the dtype of `tensor`, the argument `name`, of the best instruction set.
const RowKernels& row_kernels_for(const char* name, const Tensor& tensor);

// Makes the memory of a tensor that is about to be overwritten ready for it. A fresh one of hundreds of megabytes costs
// more in page faults than in arithmetic, with pages of 4 KiB; and the pages that the kernel clears in the middle of a
// row take the place of that row in the cache.
void prepare_to_overwrite(const Tensor& tensor);

// Zeros in a row that is not in the cache. Those of a long row go past it: no line is read only to be overwritten.
void clear(char* row, size_t bytes);

// Where the rows of a tensor [..., V] start: leading dimensions of any strides, unit stride along V.
class Rows {
 public:
  Rows(const char* name, const Tensor& tensor)
      : base_(static_cast<char*>(tensor.data_ptr())), bytes_(tensor.element_size()) {
    const int64_t dims = tensor.dim() - 1;
    expect(dims >= 0, name, " must have at least one dimension");
    size = tensor.size(dims);
    expect(size <= 1 || tensor.stride(dims) == 1 || tensor.numel() == 0, name, " must have stride 1 along the last ",
           "dimension, got ", tensor.stride(dims));
    for (int64_t d = 0; d < dims; ++d) {
      sizes_.push_back(tensor.size(d));
      strides_.push_back(tensor.stride(d));
      count *= tensor.size(d);
    }
  }

  char* operator[](int64_t row) const {
    int64_t offset = 0;
    for (int64_t d = (int64_t)sizes_.size() - 1; d >= 0; --d) {
      offset += row % sizes_[d] * strides_[d];
      row /= sizes_[d];
    }
    return base_ + offset * bytes_;
  }

  size_t bytes_per_row() const { return size * bytes_; }

  int64_t size = 0;
  int64_t count = 1;

 private:
  char* base_;
  int64_t bytes_;
  std::vector<int64_t> sizes_, strides_;
};

// The rows of `out`, where the gradient of the logits is written: their own memory, or memory apart from it.
inline Rows output_rows(const Arguments& arguments, const Tensor& logits, const Tensor& out) {
  arguments.expect_device("out", out);
  expect(out.scalar_type() == logits.scalar_type(), "out must have dtype ", logits.scalar_type(), ", got ",
         out.scalar_type());
  expect_shape("out", out, shape_of(logits));
  if (out.data_ptr() != logits.data_ptr()) prepare_to_overwrite(out);
  return {"out", out};
}

// What a reduced row says (row_kernels.h).
struct RowSummary {
  RowSummary(const RowStats& stats_, float temperature_)
      : stats(stats_), temperature(temperature_), log_sum(std::log1p((double)stats.rest)) {}

  float logprob(double logit) const { return (float)((logit - stats.reference) / temperature - log_sum); }
  float entropy() const { return (float)(log_sum - stats.weighted / (1.0 + stats.rest)); }

  const RowStats stats;
  const float temperature;
  const double log_sum;
};

struct Temperatures {
  // One for all rows, or one for each.
  Temperatures(Arguments& arguments, const Tensor& temperature, const Shape& rows)
      : per_row(temperature.dim() > 0),
        value(arguments.read<float>("temperature", temperature, per_row ? rows : Shape{})) {}

  const bool per_row;
  const float* value;
  float operator[](int64_t row) const { return value[per_row ? row : 0]; }
};

// The rows for which a predicate holds, in order: threads share these evenly, however they cluster.
template <class Predicate>
std::vector<int64_t> rows_where(int64_t count, Predicate predicate) {
  std::vector<int64_t> rows;
  rows.reserve(count);
  for (int64_t row = 0; row < count; ++row)
    if (predicate(row)) rows.push_back(row);
  return rows;
}

// How many rows make waking a thread worth it.
inline int64_t grain_of(int64_t row_size) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, row_size)); }

// Calls visit(row, scratch) for every row, on several threads, each of which has a copy of `scratch` of its own.
template <class Scratch, class Visit>
void for_each_row(const std::vector<int64_t>& rows, int64_t row_size, const Scratch& scratch, Visit visit) {
  parallel_for(0, (int64_t)rows.size(), grain_of(row_size), [&](int64_t begin, int64_t end) {
    Scratch own = scratch;
    for (int64_t i = begin; i < end; ++i) visit(rows[i], own);
  });
}

template <class Visit>
void for_each_row(const std::vector<int64_t>& rows, int64_t row_size, Visit visit) {
  for_each_row(rows, row_size, nullptr, [&](int64_t row, std::nullptr_t) { visit(row); });
}

}  // namespace fusedpo::cpu
