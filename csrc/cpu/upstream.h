// What the backwards of token log-probs are given for each row of logits.
#pragma once

#include <vector>

#include "logits.h"
#include "repeats.h"

namespace fusedpo::cpu {

// The leading dimensions of `logits`.
inline Shape rows_of(const Tensor& logits) {
  expect(logits.dim() > 0, "logits must have at least one dimension");
  return {logits.sizes().begin(), logits.sizes().end() - 1};
}

inline Shape with(Shape shape, int64_t size) {
  shape.push_back(size);
  return shape;
}

// A row of K ids, or one id, for each row of logits.
struct Ids {
  Ids(Arguments& arguments, const Tensor& token_ids, const Shape& rows) : shape(rows) {
    if (token_ids.dim() > (int64_t)rows.size()) shape.push_back(count = token_ids.size(token_ids.dim() - 1));
    data = arguments.read<int64_t>("token_ids", token_ids, shape);
  }

  const int64_t* operator[](int64_t row) const { return data + row * count; }

  Shape shape;
  int64_t count = 1;
  const int64_t* data;
};

// Of `logits` [..., V]. Either upstream gradient may be absent.
class Upstream {
 public:
  // What a thread needs for the gradient of a row.
  struct Scratch {
    explicit Scratch(int64_t num_ids) : order(num_ids), places(num_ids), grad_at_ids(num_ids), at_ids(num_ids) {}
    std::vector<int64_t> order, places;
    std::vector<double> grad_at_ids;
    std::vector<float> at_ids;
  };

  Upstream(const Tensor& logits, const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy,
           const Tensor& token_ids, const Tensor& temperature, const OptionalTensor& mask, const Tensor& stats)
      : arguments("logits", logits),
        ids(arguments, token_ids, rows_of(logits)),
        grad_logprobs_(arguments.read<float>("grad_logprobs", grad_logprobs, ids.shape)),
        grad_entropy_(arguments.read<float>("grad_entropy", grad_entropy, rows_of(logits))),
        stats_(arguments.read<float>("stats", stats, with(rows_of(logits), 3))),
        kept_(arguments.read<uint8_t>("mask", mask, rows_of(logits))),
        temperatures_(arguments, temperature, rows_of(logits)),
        zeros_(grad_logprobs_ ? 0 : ids.count, 0.0f),
        vocab_size_(logits.size(logits.dim() - 1)) {}

  // Whether the row is kept and a gradient reaches it.
  bool reaches(int64_t row) const {
    if (kept_ && kept_[row] == 0) return false;
    const float* g = grad_logprobs(row);
    return grad_entropy(row) != 0 || std::any_of(g, g + ids.count, [](float x) { return x != 0; });
  }

  void check_ids(const std::vector<int64_t>& rows) const {
    for (const int64_t row : rows)
      for (int64_t k = 0; k < ids.count; ++k)
        if (ids[row][k] < 0 || ids[row][k] >= vocab_size_)
          fail("token_ids must be in [0, ", vocab_size_, ") at kept rows, got ", ids[row][k], " at flat position ",
               row * ids.count + k, " in the backward: they were others in the forward");
  }

  const float* grad_logprobs(int64_t row) const {
    return grad_logprobs_ ? grad_logprobs_ + row * ids.count : zeros_.data();
  }
  float grad_entropy(int64_t row) const { return grad_entropy_ ? grad_entropy_[row] : 0.0f; }
  RowStats stats(int64_t row) const { return {stats_[3 * row], stats_[3 * row + 1], stats_[3 * row + 2]}; }
  float temperature(int64_t row) const { return temperatures_[row]; }
  Scratch scratch() const { return Scratch(ids.count); }

  // As row kernels take it; `places`: where the columns of the ids lie in the row.
  RowGradient gradient(int64_t row, const int64_t* places, Scratch& scratch) const {
    sum_over_equal(ids[row], grad_logprobs(row), ids.count, scratch.order.data(), scratch.grad_at_ids.data());
    return {places,    grad_logprobs(row), scratch.grad_at_ids.data(), scratch.at_ids.data(),
            ids.count, grad_entropy(row),  temperatures_[row]};
  }

  Arguments arguments;
  const Ids ids;

 private:
  const float *grad_logprobs_, *grad_entropy_, *stats_;
  const uint8_t* kept_;
  const Temperatures temperatures_;
  const std::vector<float> zeros_;
  const int64_t vocab_size_;
};

}  // namespace fusedpo::cpu
