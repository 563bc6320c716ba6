// The operators over a batch, of python/fusedpo/ops/policy_loss.py and one_pass.py: their arguments as the kernels
// of every device take them.
#pragma once

#include "arguments.h"
#include "core/statistics.h"
#include "core/tokens.h"

namespace fusedpo {

// The objective that `parts` and `values` encode.
inline Objective objective_of(const std::vector<int64_t>& parts, const std::vector<double>& values) {
  expect((int64_t)parts.size() == kNumParts, "parts must hold ", (int)kNumParts, " numbers, got ", parts.size());
  expect_in("the length of values", (int64_t)values.size(), kNumValues, kNumValues + kMaxBounds);
  expect_in("parts[0], the ratio,", parts[0], 0, kNumRatios - 1);
  expect_in("parts[1], the positions back,", parts[1], 0, kWhole);
  expect_in("parts[2], the positions ahead,", parts[2], 0, kWhole);
  expect_in("parts[3], differentiate,", parts[3], 0, 1);
  expect_in("parts[4], the trust region,", parts[4], 0, kNumTrustRegions - 1);
  expect_in("parts[5], the KL,", parts[5], 0, kNumKLs - 1 + kWeighted);
  expect_in("parts[6], the aggregation,", parts[6], 0, kNumAggregations - 1);
  expect_in("parts[7], what the ratio looks at,", parts[7], 0, kEverything);
  expect_in("parts[8], what the trust region looks at,", parts[8], 0, kEverything);
  return decode(parts.data(), values.data(), (int64_t)values.size());
}

// Of these the coefficient of a token depends on nothing but itself and the tokens after it.
inline void expect_one_pass(const Objective& o) {
  expect(o.trust_region_looks_at == 0 && (o.ratio_looks_at & ~kAhead) == 0 && o.back == 0 && !o.differentiate,
         "parts must encode an objective that one pass can compute: nothing in it looks at its sequence but at a ",
         "window ahead, and no trace is differentiated");
}

// The shape that the logits of tokens of this shape have; with `rows` they are those of some tokens.
inline Shape logits_shape(const Tensor& logits, const Shape& tokens, const OptionalTensor& rows) {
  expect(logits.dim() > 0, "logits must have at least one dimension");
  Shape shape = rows ? Shape{rows->numel()} : tokens;
  shape.push_back(logits.size(logits.dim() - 1));
  return shape;
}

// A batch in the order of every schema, but for its denominator and its scale.
struct BatchInputs {
  OptionalTensor old_logprobs;
  Tensor advantages;
  OptionalTensor mask, cu_seqlens, ref_logprobs, is_weights;
};
using BatchTypes = Types<OptionalTensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;

struct PolicyLossInputs {
  Tensor logprobs;
  OptionalTensor entropy;
  BatchInputs batch;
  OptionalTensor denominator;
  Tensor loss_scale;
  std::vector<int64_t> parts;
  std::vector<double> values;
  bool per_token;
};
using PolicyLossTypes =
    decltype(joined(Types<Tensor, OptionalTensor>{}, BatchTypes{},
                    Types<OptionalTensor, Tensor, std::vector<int64_t>, std::vector<double>, bool>{}));

struct OnePassInputs {
  Tensor logits, out, logprobs, entropy;
  OptionalTensor rows;
  Tensor token_ids, temperature;
  BatchInputs batch;
  Tensor scale;
  std::vector<int64_t> parts;
  std::vector<double> values;
  OptionalTensor denominator;  // of a scale that is not per token, which Triton alone takes
};
using OnePassTypes =
    decltype(joined(Types<Tensor, Tensor, Tensor, Tensor, OptionalTensor, Tensor, Tensor>{}, BatchTypes{},
                    Types<Tensor, std::vector<int64_t>, std::vector<double>, OptionalTensor>{}));

struct BatchArguments : Arguments {
  BatchArguments(const Tensor& logprobs, const OptionalTensor& old_logprobs, const OptionalTensor& mask,
                 const OptionalTensor& cu_seqlens)
      : Arguments("logprobs", logprobs), shape(shape_of(logprobs)), batch{} {
    expect_dims("logprobs", logprobs, 1, 2);
    batch.num_tokens = logprobs.numel();
    batch.num_sequences = cu_seqlens ? num_sequences_of(*cu_seqlens, shape) : shape.size() == 2 ? shape[0] : 1;
    batch.cu_seqlens = read<int64_t>("cu_seqlens", cu_seqlens, {batch.num_sequences + 1});
    batch.width = shape.back();
    batch.tokens.logprobs = per_token("logprobs", logprobs);
    batch.tokens.old_logprobs = old_logprobs ? per_token("old_logprobs", old_logprobs) : batch.tokens.logprobs;
    batch.tokens.mask = read<uint8_t>("mask", mask, shape);
  }

  BatchArguments(const Tensor& logprobs, const BatchInputs& in)
      : BatchArguments(logprobs, in.old_logprobs, in.mask, in.cu_seqlens) {
    batch.tokens.advantages = per_token_or_sequence("advantages", in.advantages);
    batch.tokens.ref_logprobs = per_token("ref_logprobs", in.ref_logprobs);
    batch.tokens.is_weights = per_token_or_sequence("is_weights", in.is_weights);
  }

  Values per_token(const char* name, const OptionalTensor& tensor) { return {read<float>(name, tensor, shape), true}; }

  Values per_token_or_sequence(const char* name, const OptionalTensor& tensor) {
    if (!tensor || has_shape(*tensor, shape)) return per_token(name, tensor);
    const Shape of_sequences{batch.num_sequences, 1};
    expect(has_shape(*tensor, of_sequences), name, " must have shape ", text_of(shape), " or ", text_of(of_sequences),
           ", got ", text_of(tensor->sizes()));
    return {read<float>(name, tensor, of_sequences), false};
  }

  const Shape shape;
  Batch batch;
};

// A batch whose losses are aggregated.
struct AggregationArguments : BatchArguments {
  template <class... Batch>
  AggregationArguments(const Objective& o, const OptionalTensor& denominator_, const Tensor& loss_scale_,
                       const Batch&... of)
      : BatchArguments(of...),
        objective(o),
        denominator(read<float>("denominator", denominator_, {})),
        loss_scale(read<float>("loss_scale", loss_scale_, {})) {}

  const Objective objective;
  const float *denominator, *loss_scale;
};

struct PolicyLossArguments : AggregationArguments {
  explicit PolicyLossArguments(const PolicyLossInputs& in)
      : AggregationArguments(objective_of(in.parts, in.values), in.denominator, in.loss_scale, in.logprobs, in.batch) {
    batch.tokens.entropy = per_token("entropy", in.entropy);
  }
};

// Nothing but the aggregation, and the memory for what the loss of each token is multiplied by.
struct TokenScaleArguments : AggregationArguments {
  TokenScaleArguments(const Tensor& logprobs, const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                      const OptionalTensor& denominator_, const Tensor& loss_scale_, int64_t aggregation,
                      double length_norm)
      : AggregationArguments(aggregating(aggregation, length_norm), denominator_, loss_scale_, logprobs,
                             OptionalTensor{}, mask, cu_seqlens),
        result(torch::stable::new_empty(logprobs, logprobs.sizes())),
        data(static_cast<float*>(result.data_ptr())) {}

  static Objective aggregating(int64_t aggregation, double length_norm) {
    expect_in("aggregation", aggregation, kTokenMean, kSeqMeanTokenSumNorm);
    Objective o{};
    o.aggregation = (Aggregation)aggregation;
    o.length_norm = (float)length_norm;
    return o;
  }

  const Tensor result;
  float* const data;
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
