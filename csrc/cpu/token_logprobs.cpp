#include "token_logprobs.h"

#include <atomic>
#include <stdexcept>
#include <string>

#include "logits.h"

namespace fusedpo::cpu {
namespace {

using torch::headeronly::ScalarType;

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

void gradient(const std::optional<Tensor>& grad_logprobs_, const std::optional<Tensor>& grad_entropy_,
              const Tensor& logits, const Tensor& grad_logits, const Tensor& token_ids_, const Tensor& temperature_,
              const std::optional<Tensor>& mask_, const Tensor& stats_) {
  const auto grad_logprobs = contiguous(grad_logprobs_), grad_entropy = contiguous(grad_entropy_),
             mask = contiguous(mask_);
  const Tensor token_ids = torch::stable::contiguous(token_ids_);
  const Tensor temperature_rows = torch::stable::contiguous(temperature_);
  const Rows from(logits), to(grad_logits);
  const RowKernels& kernels = row_kernels_for(logits.scalar_type());
  const int64_t num_ids = from.count == 0 ? 1 : token_ids.numel() / from.count;
  const int64_t* ids = data<int64_t>(token_ids);
  const float* grad_logprob = data<float>(grad_logprobs);
  const float* grad_of_entropy = data<float>(grad_entropy);
  const float* stats = data<float>(stats_);
  const bool* kept = data<bool>(mask);
  const Temperatures temperatures{data<float>(temperature_rows), temperature_rows.numel() > 1};
  const std::vector<float> zeros(grad_logprob ? 0 : num_ids, 0.0f);
  const auto upstream = [&](int64_t row) { return grad_logprob ? grad_logprob + row * num_ids : zeros.data(); };
  const auto upstream_entropy = [&](int64_t row) { return grad_of_entropy ? grad_of_entropy[row] : 0.0f; };
  const auto live = [&](int64_t row) {
    if (kept && !kept[row]) return false;
    return upstream_entropy(row) != 0 ||
           std::any_of(upstream(row), upstream(row) + num_ids, [](float g) { return g != 0; });
  };

  for_each_row(rows_where(from.count, live), from.size, num_ids, [&](int64_t row, float* scratch) {
    const RowStats row_stats{stats[3 * row], stats[3 * row + 1], stats[3 * row + 2]};
    kernels.gradient(from[row], to[row], from.size, row_stats,
                     {ids + row * num_ids, upstream(row), scratch, num_ids, upstream_entropy(row), temperatures[row]});
  });
  const auto dead = rows_where(from.count, [&](int64_t row) { return !live(row); });
  for_each_row(dead, from.size, 0, [&](int64_t row, float*) { clear(to[row], to.bytes_per_row()); });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> token_logprobs(Tensor logits, Tensor token_ids_, Tensor temperature_,
                                                  std::optional<Tensor> mask_, bool return_entropy) {
  const Rows rows(logits);
  const RowKernels& kernels = row_kernels_for(logits.scalar_type());
  const Tensor token_ids = torch::stable::contiguous(token_ids_);
  const Tensor temperature_rows = torch::stable::contiguous(temperature_);
  const auto mask = contiguous(mask_);
  const std::vector<int64_t> row_shape(logits.sizes().begin(), logits.sizes().end() - 1);
  std::vector<int64_t> stats_shape = row_shape;
  stats_shape.push_back(3);
  const auto filled = [&](const std::vector<int64_t>& shape) {
    Tensor result = torch::stable::new_empty(logits, shape, ScalarType::Float);
    if (mask) torch::stable::zero_(result);  // masked rows are visited by nobody
    return result;
  };
  const Tensor logprobs = filled({token_ids.sizes().begin(), token_ids.sizes().end()});
  const Tensor entropy = filled(return_entropy ? row_shape : std::vector<int64_t>{0});
  const Tensor stats = filled(stats_shape);

  const int64_t num_ids = rows.count == 0 ? 1 : token_ids.numel() / rows.count;
  const int64_t* ids = data<int64_t>(token_ids);
  const Temperatures temperatures{data<float>(temperature_rows), temperature_rows.numel() > 1};
  float* logprob_out = mutable_data<float>(logprobs);
  float* entropy_out = mutable_data<float>(entropy);
  float* stats_out = mutable_data<float>(stats);
  const bool* kept = data<bool>(mask);
  std::atomic<int64_t> bad_id{-1}, bad_row{-1};  // a throw inside parallel_for would lose its message

  for_each_row(rows_where(rows.count, [&](int64_t row) { return !kept || kept[row]; }), rows.size, 0,
               [&](int64_t row, float*) {
                 const float temperature = temperatures[row];
                 if (!(temperature > 0 && temperature < INFINITY)) bad_row = row;
                 const char* x = rows[row];
                 const RowStats row_stats = kernels.reduce(x, rows.size, temperature, return_entropy);
                 const RowSummary summary(row_stats, temperature);
                 for (int64_t k = row * num_ids; k < (row + 1) * num_ids; ++k) {
                   if (ids[k] >= 0 && ids[k] < rows.size)
                     logprob_out[k] = summary.logprob(kernels.value(x, ids[k]));
                   else
                     bad_id = k;
                 }
                 if (return_entropy) entropy_out[row] = summary.entropy();
                 stats_out[3 * row] = row_stats.reference;
                 stats_out[3 * row + 1] = row_stats.rest;
                 stats_out[3 * row + 2] = row_stats.weighted;
               });
  if (const int64_t k = bad_id; k >= 0)
    throw std::invalid_argument("token_ids must be in [0, " + std::to_string(rows.size) + ") at kept rows, got " +
                                std::to_string(ids[k]) + " at flat position " + std::to_string(k));
  if (const int64_t row = bad_row; row >= 0)
    throw std::invalid_argument("temperature must be positive and finite, got " + std::to_string(temperatures[row]) + " at row " +
                                std::to_string(row));
  return {logprobs, entropy, stats};
}

Tensor token_logprobs_backward(std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy, Tensor logits,
                               Tensor token_ids, Tensor temperature, std::optional<Tensor> mask, Tensor stats) {
  const Tensor grad_logits = torch::stable::new_empty(logits, logits.sizes());
  ask_for_huge_pages(grad_logits);
  gradient(grad_logprobs, grad_entropy, logits, grad_logits, token_ids, temperature, mask, stats);
  return grad_logits;
}

void token_logprobs_backward_(std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy, Tensor logits,
                              Tensor token_ids, Tensor temperature, std::optional<Tensor> mask, Tensor stats) {
  gradient(grad_logprobs, grad_entropy, logits, logits, token_ids, temperature, mask, stats);
}

}  // namespace fusedpo::cpu
