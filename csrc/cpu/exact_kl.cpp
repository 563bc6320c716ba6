// The KL divergence over the vocabulary, and its gradient, on the CPU: rows over threads.
#include "logits.h"

namespace fusedpo::cpu {
namespace {

constexpr double kLog2e = 1.44269504088896341, kLn2 = 0.693147180559945309;

// Of a dtype that row_kernels_for() has taken.
const DivergenceKernels& divergence_kernels_for(ScalarType dtype) {
  const DivergenceKernelTable& table = divergence_kernels();
  if (dtype == ScalarType::Float) return table.float32;
  return dtype == ScalarType::BFloat16 ? table.bfloat16 : table.float16;
}

LogProbs logprobs_of(const RowStats& stats, float temperature) {
  // a row of -inf has no distribution: its rest is -1
  const double exact = stats.rest > -1 ? std::log1p((double)stats.rest) * kLog2e : NAN;
  const float log_sum = (float)exact;
  return {stats.reference, (float)(kLog2e / temperature), log_sum, (float)(exact - log_sum)};
}

// logits and ref_logits [..., V] of one dtype (16-bit or 32-bit floats, any strides but 1 along V), temperatures [] or
// [...] float32, mask [...] bool, scale [...] float32 -> kl [...] float32, 0 where masked. `forward`: KL(q || p), q
// from ref_logits; otherwise KL(p || q). The gradient of its sum, each row times its scale, is written into `out`,
// which may be the logits.
Tensor exact_kl_out(Tensor logits, Tensor ref_logits, Tensor temperature, Tensor ref_temperature, OptionalTensor mask,
                    Tensor scale, bool forward, OptionalTensor out) {
  Arguments arguments("logits", logits);
  arguments.expect_device("ref_logits", ref_logits);
  const Rows xs("logits", logits), ys("ref_logits", ref_logits), to = out ? output_rows(arguments, logits, *out) : xs;
  expect_shape("ref_logits", ref_logits, shape_of(logits));
  expect(logits.scalar_type() == ref_logits.scalar_type(), "ref_logits must have the dtype of logits, ",
         logits.scalar_type(), ", got ", ref_logits.scalar_type());
  const bool own = !out || out->data_ptr() == logits.data_ptr() || out->data_ptr() != ref_logits.data_ptr();
  expect(own || xs.count * xs.size == 0, "out must not be ref_logits");
  const RowKernels& row = row_kernels_for("logits", logits);
  const DivergenceKernels& pair = divergence_kernels_for(logits.scalar_type());
  const Shape shape(logits.sizes().begin(), logits.sizes().end() - 1);
  const Temperatures temperatures(arguments, temperature, shape), ref_temperatures(arguments, ref_temperature, shape);
  const uint8_t* kept = arguments.read<uint8_t>("mask", mask, shape);
  const float* factor = arguments.read<float>("scale", scale, shape);
  const Tensor kl = torch::stable::new_empty(logits, shape, ScalarType::Float);
  float* kl_out = static_cast<float*>(kl.data_ptr());

  const auto is_kept = [&](int64_t r) { return !kept || kept[r] != 0; };
  for_each_row(rows_where(xs.count, is_kept), 2 * xs.size, [&](int64_t r) {
    const float T = temperatures[r], ref_T = ref_temperatures[r];
    const LogProbs p = logprobs_of(row.reduce(xs[r], xs.size, T, false, nullptr), T),
                   q = logprobs_of(row.reduce(ys[r], ys.size, ref_T, false, nullptr), ref_T);
    const double divergence =
        forward ? pair.divergence(ys[r], xs[r], xs.size, q, p) : pair.divergence(xs[r], ys[r], xs.size, p, q);
    kl_out[r] = (float)(divergence * kLn2);
    if (!out) return;
    if (forward)
      pair.of_forward(xs[r], ys[r], to[r], xs.size, p, q, factor[r] / T);
    else
      pair.of_reverse(xs[r], ys[r], to[r], xs.size, p, q, (float)divergence, (float)(factor[r] / T * kLn2));
  });
  for_each_row(rows_where(xs.count, [&](int64_t r) { return !is_kept(r); }), xs.size, [&](int64_t r) {
    kl_out[r] = 0;
    if (out) clear(to[r], to.bytes_per_row());
  });
  return kl;
}

}  // namespace
}  // namespace fusedpo::cpu

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CPU, m) {
  using namespace fusedpo;
  m.impl("exact_kl_out.native", FUSEDPO_BOX(cpu::exact_kl_out));
}
