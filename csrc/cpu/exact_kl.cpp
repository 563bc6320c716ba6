#include "exact_kl.h"

#include "logits.h"

namespace fusedpo::cpu {
namespace {

using torch::headeronly::ScalarType;

constexpr double kLog2e = 1.44269504088896341, kLn2 = 0.693147180559945309;

const DivergenceKernels& divergence_kernels_for(ScalarType dtype) {
  const DivergenceKernelTable& table = divergence_kernels();
  if (dtype == ScalarType::Float) return table.float32;
  if (dtype == ScalarType::BFloat16) return table.bfloat16;
  STD_TORCH_CHECK(dtype == ScalarType::Half, "logits must be float32, bfloat16 or float16");
  return table.float16;
}

LogProbs logprobs_of(const RowStats& stats, float temperature) {
  // a row of -inf has no distribution: its rest is -1
  const double exact = stats.rest > -1 ? std::log1p((double)stats.rest) * kLog2e : NAN;
  const float log_sum = (float)exact;
  return {stats.reference, (float)(kLog2e / temperature), log_sum, (float)(exact - log_sum)};
}

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.data_ptr()); }

// `grad_logits` may be the logits.
Tensor divergences(const Tensor& logits, const Tensor& ref_logits, const Tensor& temperature_,
                   const Tensor& ref_temperature_, const std::optional<Tensor>& mask_, const Tensor& scale_,
                   bool forward, const std::optional<Tensor>& grad_logits) {
  STD_TORCH_CHECK(logits.scalar_type() == ref_logits.scalar_type(), "logits and ref_logits must have one dtype");
  const Rows xs(logits), ys(ref_logits), to(grad_logits ? *grad_logits : logits);
  STD_TORCH_CHECK(xs.size == ys.size && xs.count == ys.count, "logits and ref_logits must have one shape");
  const Tensor temperature = torch::stable::contiguous(temperature_),
               ref_temperature = torch::stable::contiguous(ref_temperature_), scale = torch::stable::contiguous(scale_);
  const auto mask = mask_ ? std::optional<Tensor>(torch::stable::contiguous(*mask_)) : std::nullopt;
  STD_TORCH_CHECK(scale.numel() == xs.count && (!mask || mask->numel() == xs.count),
                  "mask and scale must have a value per row of logits");
  for (const Tensor* t : {&temperature, &ref_temperature})
    STD_TORCH_CHECK(t->numel() == 1 || t->numel() == xs.count, "temperature must have one value, or one per row");
  const RowKernels& row = row_kernels_for(logits.scalar_type());
  const DivergenceKernels& pair = divergence_kernels_for(logits.scalar_type());
  const Temperatures temperatures{floats(temperature), temperature.numel() > 1},
      ref_temperatures{floats(ref_temperature), ref_temperature.numel() > 1};
  const bool* kept = mask ? static_cast<const bool*>(mask->data_ptr()) : nullptr;
  const float* factor = floats(scale);

  const std::vector<int64_t> shape(logits.sizes().begin(), logits.sizes().end() - 1);
  const Tensor kl = torch::stable::new_empty(logits, shape, ScalarType::Float);
  float* out = static_cast<float*>(kl.data_ptr());

  const auto is_kept = [&](int64_t r) { return !kept || kept[r]; };
  for_each_row(rows_where(xs.count, is_kept), 2 * xs.size, 0, [&](int64_t r, float*) {
    const float T = temperatures[r], ref_T = ref_temperatures[r];
    const LogProbs p = logprobs_of(row.reduce(xs[r], xs.size, T, false), T),
                   q = logprobs_of(row.reduce(ys[r], ys.size, ref_T, false), ref_T);
    const double divergence =
        forward ? pair.divergence(ys[r], xs[r], xs.size, q, p) : pair.divergence(xs[r], ys[r], xs.size, p, q);
    out[r] = (float)(divergence * kLn2);
    if (!grad_logits) return;
    if (forward)
      pair.of_forward(xs[r], ys[r], to[r], xs.size, p, q, factor[r] / T);
    else
      pair.of_reverse(xs[r], ys[r], to[r], xs.size, p, q, (float)divergence, (float)(factor[r] / T * kLn2));
  });
  for_each_row(rows_where(xs.count, [&](int64_t r) { return !is_kept(r); }), xs.size, 0, [&](int64_t r, float*) {
    out[r] = 0;
    if (grad_logits) clear(to[r], to.bytes_per_row());
  });
  return kl;
}

}  // namespace

std::tuple<Tensor, Tensor> exact_kl(Tensor logits, Tensor ref_logits, Tensor temperature, Tensor ref_temperature,
                                    std::optional<Tensor> mask, Tensor scale, bool forward, bool gradient) {
  const Tensor grad_logits =
      gradient ? torch::stable::new_empty(logits, logits.sizes()) : torch::stable::new_empty(logits, {0});
  if (gradient) ask_for_huge_pages(grad_logits);
  const Tensor kl = divergences(logits, ref_logits, temperature, ref_temperature, mask, scale, forward,
                                gradient ? std::optional<Tensor>(grad_logits) : std::nullopt);
  return {kl, grad_logits};
}

Tensor exact_kl_(Tensor logits, Tensor ref_logits, Tensor temperature, Tensor ref_temperature,
                 std::optional<Tensor> mask, Tensor scale, bool forward) {
  return divergences(logits, ref_logits, temperature, ref_temperature, mask, scale, forward, logits);
}

}  // namespace fusedpo::cpu
