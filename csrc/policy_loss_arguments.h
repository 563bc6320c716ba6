// The operators of python/fusedpo/ops_policy_loss.py: their arguments as the kernels of every device take them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "core/statistics.h"
#include "core/tokens.h"

namespace fusedpo {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Contiguous versions of an operator's tensors, for as long as the kernels run.
class BatchArguments {
 public:
  BatchArguments(const Tensor& logprobs, const OptionalTensor& old_logprobs, const OptionalTensor& mask,
                 const OptionalTensor& cu_seqlens)
      : shape(logprobs.sizes().begin(), logprobs.sizes().end()), batch{} {
    batch.tokens.logprobs.data = data<float>(logprobs);
    batch.tokens.old_logprobs = old_logprobs ? per_token(old_logprobs) : batch.tokens.logprobs;
    batch.tokens.mask = data<bool>(mask);
    batch.num_tokens = logprobs.numel();
    batch.cu_seqlens = data<int64_t>(cu_seqlens);
    batch.num_sequences = cu_seqlens ? cu_seqlens->numel() - 1 : shape.size() == 2 ? shape[0] : 1;
    batch.width = shape.back();
  }

  // Null for a tensor that is not given.
  template <class T>
  const T* data(const OptionalTensor& tensor) {
    if (!tensor) return nullptr;
    tensors_.push_back(tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor));
    return static_cast<const T*>(tensors_.back().data_ptr());
  }

  Values per_token(const OptionalTensor& tensor) { return {data<float>(tensor), true}; }

  Values per_token_or_sequence(const OptionalTensor& tensor) {
    const bool has_shape =
        tensor && std::equal(shape.begin(), shape.end(), tensor->sizes().begin(), tensor->sizes().end());
    return {data<float>(tensor), has_shape};
  }

  std::vector<int64_t> shape;
  Batch batch;

 private:
  std::vector<Tensor> tensors_;
};

struct PolicyLossArguments : BatchArguments {
  PolicyLossArguments(const Tensor& logprobs, const OptionalTensor& old_logprobs, const Tensor& advantages,
                      const OptionalTensor& mask, const OptionalTensor& cu_seqlens, const OptionalTensor& ref_logprobs,
                      const OptionalTensor& entropy, const OptionalTensor& is_weights,
                      const OptionalTensor& denominator_, const Tensor& loss_scale_, const std::vector<int64_t>& parts,
                      const std::vector<double>& values)
      : BatchArguments(logprobs, old_logprobs, mask, cu_seqlens),
        denominator(data<float>(denominator_)),
        loss_scale(data<float>(loss_scale_)) {
    STD_TORCH_CHECK((int64_t)parts.size() == kNumParts && (int64_t)values.size() >= kNumValues &&
                        (int64_t)values.size() <= kNumValues + kMaxBounds,
                    "parts and values do not encode an objective");
    objective = decode(parts.data(), values.data(), (int64_t)values.size());
    batch.tokens.advantages = per_token_or_sequence(advantages);
    batch.tokens.ref_logprobs = per_token(ref_logprobs);
    batch.tokens.entropy = per_token(entropy);
    batch.tokens.is_weights = per_token_or_sequence(is_weights);
  }

  Objective objective;
  const float *denominator, *loss_scale;
};

// What the operator returns; without elements where it is not wanted.
struct PolicyLossResults {
  PolicyLossResults(const Tensor& logprobs, const Objective& o, bool per_token)
      : loss(per_token ? floats(logprobs, true) : torch::stable::new_empty(logprobs, {})),
        metrics(torch::stable::new_empty(logprobs, {kNumMetrics})),
        grad_logprobs(floats(logprobs, true)),
        grad_entropy(floats(logprobs, o.entropy_coef != 0)),
        grad_log_trace(floats(logprobs, per_token && o.differentiate)),
        of_tokens{data(loss, per_token), data(grad_logprobs), data(grad_entropy, o.entropy_coef != 0),
                  data(grad_log_trace, per_token && o.differentiate)} {}

  static float* data(const Tensor& tensor, bool wanted = true) {
    return wanted ? static_cast<float*>(tensor.data_ptr()) : nullptr;
  }

  Tensor loss, metrics, grad_logprobs, grad_entropy, grad_log_trace;
  TokenOutputs of_tokens;

 private:
  static Tensor floats(const Tensor& logprobs, bool wanted) {
    return wanted ? torch::stable::new_empty(logprobs, logprobs.sizes()) : torch::stable::new_empty(logprobs, {0});
  }
};

}  // namespace fusedpo
