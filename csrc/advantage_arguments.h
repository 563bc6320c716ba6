// The operators of python/fusedpo/ops_advantages.py: their arguments as the kernels of every device take them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "core/group_advantages.h"
#include "core/token_advantages.h"

namespace fusedpo::advantages {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Contiguous versions of an operator's tensors, for as long as the kernel runs.
class Arguments {
 public:
  Array array(const OptionalTensor& tensor) {
    const Tensor* kept = keep(tensor);
    return kept ? Array{kept->data_ptr(), dtype_of(*kept)} : Array{nullptr, DType::kFloat32};
  }

  Integers integers(const OptionalTensor& tensor) {
    const Tensor* kept = keep(tensor);
    return {kept ? kept->data_ptr() : nullptr, kept && kept->scalar_type() == ScalarType::Long};
  }

  // A tensor like `like`, float64 if `wide`, else float32.
  Result result(const Tensor& like, bool wide, Tensor& result) {
    result = torch::stable::new_empty(like, like.sizes(), wide ? ScalarType::Double : ScalarType::Float);
    return {result.data_ptr(), wide};
  }

 private:
  const Tensor* keep(const OptionalTensor& tensor) {
    if (!tensor) return nullptr;
    tensors_.push_back(torch::stable::contiguous(*tensor));
    return &tensors_.back();
  }

  static DType dtype_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
      case ScalarType::Bool:
        return DType::kBool;
      case ScalarType::Byte:
        return DType::kUInt8;
      case ScalarType::Char:
        return DType::kInt8;
      case ScalarType::Short:
        return DType::kInt16;
      case ScalarType::Int:
        return DType::kInt32;
      case ScalarType::Long:
        return DType::kInt64;
      case ScalarType::Half:
        return DType::kFloat16;
      case ScalarType::BFloat16:
        return DType::kBFloat16;
      case ScalarType::Float:
        return DType::kFloat32;
      case ScalarType::Double:
        return DType::kFloat64;
      default:
        STD_TORCH_CHECK(false, "expected a tensor of bool, integers, float16, bfloat16, float32 or float64");
    }
  }

  std::vector<Tensor> tensors_;
};

struct GroupArguments {
  GroupArguments(const Tensor& rewards, const OptionalTensor& ids_, const OptionalTensor& order, int64_t group_size_,
                 const OptionalTensor& other, const OptionalTensor& mask, int64_t estimator, int64_t k, bool unbiased,
                 double number, bool wide)
      : count(rewards.numel()),
        group_size(group_size_),
        ids(arguments.integers(ids_)),
        params{(Estimator)estimator, k, unbiased, number, 1} {
    samples.rewards = arguments.array(rewards);
    samples.mask = arguments.array(mask);
    samples.other = arguments.array(other);
    samples.num_other = other ? other->numel() : 0;
    samples.order = (const int64_t*)arguments.integers(order).data;
    samples.advantages = arguments.result(rewards, wide, advantages);
  }

  Arguments arguments;
  int64_t count, group_size;  // group_size: of equal groups, where there are no ids
  Integers ids;               // the label at each position, equal ones side by side
  GroupParams params;
  Samples samples;
  Tensor advantages;
};

struct TokenArguments {
  TokenArguments(const Tensor& rewards, const OptionalTensor& values, const OptionalTensor& logprobs,
                 const OptionalTensor& old_logprobs, const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                 const OptionalTensor& per_sequence, int64_t estimator, double gamma, double lam, double rho_bar,
                 double c_bar, bool wide)
      : params{(TokenEstimator)estimator, gamma, lam, rho_bar, c_bar} {
    tokens.rewards = arguments.array(rewards);
    tokens.values = arguments.array(values);
    tokens.logprobs = arguments.array(logprobs);
    tokens.old_logprobs = arguments.array(old_logprobs);
    tokens.mask = arguments.array(mask);
    tokens.per_sequence = arguments.array(per_sequence);
    tokens.cu_seqlens = arguments.integers(cu_seqlens);
    tokens.length = rewards.size(rewards.dim() - 1);
    num_sequences = cu_seqlens ? cu_seqlens->numel() - 1 : rewards.dim() == 2 ? rewards.size(0) : 1;
    tokens.advantages = arguments.result(rewards, wide, advantages);
    if (values)
      tokens.returns = arguments.result(rewards, wide, returns);
    else
      returns = torch::stable::new_empty(advantages, {0});
  }

  Arguments arguments;
  TokenParams params;
  Tokens tokens;
  int64_t num_sequences;
  Tensor advantages, returns;
};

struct StepArguments {
  StepArguments(const Tensor& values, const Tensor& step_rewards, const Tensor& step_ids, bool wide) {
    steps.values = arguments.array(values);
    steps.rewards = arguments.array(step_rewards);
    steps.ids = arguments.integers(step_ids);
    steps.num_steps = step_rewards.size(1);
    steps.num_tokens = step_ids.size(1);
    count = step_ids.numel();
    result = arguments.result(step_ids, wide, advantages);
  }

  Arguments arguments;
  Steps steps;
  int64_t count;
  Result result;
  Tensor advantages;
};

struct WhiteningArguments {
  WhiteningArguments(const Tensor& x, const OptionalTensor& lengths, const OptionalTensor& mask, bool wide)
      : count(x.numel()), chunks((count + kWhiteningChunk - 1) / kWhiteningChunk) {
    whitening.x = arguments.array(x);
    whitening.lengths = arguments.array(lengths);
    whitening.mask = arguments.array(mask);
    whitening.result = arguments.result(x, wide, whitened);
  }

  Arguments arguments;
  int64_t count, chunks;
  Whitening whitening;
  Tensor whitened;
};

}  // namespace fusedpo::advantages
