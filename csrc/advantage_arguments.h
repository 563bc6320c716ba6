// The operators of python/fusedpo/ops/advantages.py: their arguments as the kernels of every device take them.
#pragma once

#include <tuple>

#include "arguments.h"
#include "core/group_advantages.h"
#include "core/token_advantages.h"

namespace fusedpo::advantages {

inline DType dtype_of(const char* name, const Tensor& tensor) {
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
      fail(name, " must be bool, integers, float16, bfloat16, float32 or float64, got ", tensor.scalar_type());
  }
}

struct RealArguments : Arguments {
  using Arguments::Arguments;

  Array array(const char* name, const OptionalTensor& tensor, const Shape& shape) {
    if (!tensor) return {nullptr, DType::kFloat32};
    return {memory(name, *tensor, shape), dtype_of(name, *tensor)};
  }

  Integers integers(const char* name, const OptionalTensor& tensor, const Shape& shape) {
    if (!tensor) return {nullptr, false};
    const ScalarType dtype = tensor->scalar_type();
    expect(dtype == ScalarType::Int || dtype == ScalarType::Long, name, " must have dtype Int or Long, got ", dtype);
    return {memory(name, *tensor, shape), dtype == ScalarType::Long};
  }

  // A tensor like `like`, float64 if `wide`, else float32.
  static Result result(const Tensor& like, bool wide, Tensor& result) {
    result = torch::stable::new_empty(like, like.sizes(), wide ? ScalarType::Double : ScalarType::Float);
    return {result.data_ptr(), wide};
  }
};

struct GroupArguments : RealArguments {
  GroupArguments(const Tensor& rewards, const OptionalTensor& ids_, const OptionalTensor& order, int64_t group_size_,
                 const OptionalTensor& other, const OptionalTensor& mask, int64_t estimator_, int64_t k, bool unbiased,
                 double number, bool wide)
      : RealArguments("rewards", rewards), count(rewards.numel()), group_size(group_size_) {
    expect_dims("rewards", rewards, 1, 1);
    expect_in("group_size", group_size, 1, kWhole);
    expect_in("estimator", estimator_, 0, kNumEstimators - 1);
    const auto estimator = (Estimator)estimator_;
    if (compares_ranks(estimator)) expect_in("k", k, 1, kWhole);
    params = {estimator, k, unbiased, number, 1};
    ids = integers("ids", ids_, {count});
    samples.rewards = array("rewards", rewards, {count});
    samples.mask = array("mask", mask, {count});
    samples.order = read<int64_t>("order", order, {count});
    samples.count = count;
    const bool of_order = estimator == Estimator::kOrderStatistic, of_labels = estimator == Estimator::kReMax;
    expect_given("other", other, of_order || of_labels || estimator == Estimator::kOPO);
    samples.num_other = !other ? 0 : of_order ? k : of_labels ? other->numel() : count;
    samples.other = array("other", other, {samples.num_other});
    samples.advantages = result(rewards, wide, advantages);
  }

  const int64_t count, group_size;  // group_size: of equal groups, where there are no ids
  Integers ids;                     // the label at each position, equal ones side by side
  GroupParams params;
  Samples samples;
  Tensor advantages;
};

struct TokenArguments : RealArguments {
  TokenArguments(const Tensor& rewards, const OptionalTensor& values, const OptionalTensor& logprobs,
                 const OptionalTensor& old_logprobs, const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                 const OptionalTensor& per_sequence, int64_t estimator_, double gamma, double lam, double rho_bar,
                 double c_bar, bool wide)
      : RealArguments("rewards", rewards) {
    expect_dims("rewards", rewards, 1, 2);
    expect_in("estimator", estimator_, 0, kNumTokenEstimators - 1);
    const auto estimator = (TokenEstimator)estimator_;
    const bool corrects = estimator == TokenEstimator::kVTrace;
    expect_given("values", values, corrects || estimator == TokenEstimator::kGAE);
    expect_given("logprobs", logprobs, corrects);
    expect_given("old_logprobs", old_logprobs, corrects);
    params = {estimator, gamma, lam, rho_bar, c_bar};
    const Shape shape = shape_of(rewards);
    tokens.length = shape.back();
    num_sequences = cu_seqlens ? num_sequences_of(*cu_seqlens, shape) : shape.size() == 2 ? shape[0] : 1;
    tokens.num_tokens = rewards.numel();
    tokens.rewards = array("rewards", rewards, shape);
    tokens.values = array("values", values, shape);
    tokens.logprobs = array("logprobs", logprobs, shape);
    tokens.old_logprobs = array("old_logprobs", old_logprobs, shape);
    tokens.mask = array("mask", mask, shape);
    tokens.per_sequence = array("per_sequence", per_sequence, {num_sequences});
    tokens.cu_seqlens = integers("cu_seqlens", cu_seqlens, {num_sequences + 1});
    tokens.advantages = result(rewards, wide, advantages);
    if (values)
      tokens.returns = result(rewards, wide, returns);
    else
      returns = torch::stable::new_empty(advantages, {0});
  }

  TokenParams params;
  Tokens tokens;
  int64_t num_sequences;
  Tensor advantages, returns;
};

struct StepArguments : RealArguments {
  StepArguments(const Tensor& values, const Tensor& step_rewards, const Tensor& step_ids, bool wide)
      : RealArguments("values", values), count(step_ids.numel()) {
    expect_dims("step_ids", step_ids, 2, 2);
    expect_dims("step_rewards", step_rewards, 2, 2);
    const int64_t batch = step_ids.size(0);
    steps.num_steps = step_rewards.size(1);
    steps.num_tokens = step_ids.size(1);
    steps.values = array("values", values, {batch, steps.num_steps + 1});
    steps.rewards = array("step_rewards", step_rewards, {batch, steps.num_steps});
    steps.ids = integers("step_ids", step_ids, {batch, steps.num_tokens});
    result = RealArguments::result(step_ids, wide, advantages);
  }

  Steps steps;
  const int64_t count;
  Result result;
  Tensor advantages;
};

struct WhiteningArguments : RealArguments {
  WhiteningArguments(const Tensor& x, const OptionalTensor& lengths, const OptionalTensor& mask, bool wide)
      : RealArguments("x", x), count(x.numel()), chunks((count + kWhiteningChunk - 1) / kWhiteningChunk) {
    const Shape shape = shape_of(x);
    whitening.x = array("x", x, shape);
    whitening.lengths = array("lengths", lengths, shape);
    whitening.mask = array("mask", mask, shape);
    whitening.result = result(x, wide, whitened);
  }

  const int64_t count, chunks;
  Whitening whitening;
  Tensor whitened;
};

}  // namespace fusedpo::advantages
