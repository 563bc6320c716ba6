// Launchers of the kernels of one_pass.cuh, and their registration.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <climits>
#include <string>

#include "launch.h"
#include "one_pass.cuh"
#include "policy_loss_arguments.h"

namespace fusedpo::cuda {
namespace {

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

// Calls visit with a null pointer to the type of the elements.
template <class Visit>
void dispatch(const char* name, const Tensor& rows, Visit visit) {
  const ScalarType dtype = rows.scalar_type();
  expect(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
         " must be float16, bfloat16 or float32, got ", dtype);
  if (dtype == ScalarType::Float) return visit((float*)nullptr);
  if (dtype == ScalarType::BFloat16) return visit((__nv_bfloat16*)nullptr);
  visit((__half*)nullptr);
}

int64_t num_rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d < x.dim() - 1; ++d) rows *= x.size(d);
  return rows;
}

RowOffsets rows_of(const char* name, const Tensor& x) {
  expect_dims(name, x, 1, 3);
  const int64_t dims = x.dim() - 1, size = x.size(dims);
  expect(size <= 1 || x.stride(dims) == 1, name, " must have stride 1 along the last dimension, got ", x.stride(dims));
  expect(size <= INT_MAX - kSliceBytes, name, " must have shorter rows than ", size);
  if (dims == 0) return {1, 0, 0};
  return {std::max<int64_t>(1, x.size(dims - 1)), dims == 2 ? x.stride(0) : 0, x.stride(dims - 1)};
}

// A launch of `kernel`; lives as long as it is needed.
struct Configuration : cudaLaunchConfig_t {
  Configuration(const GridShape& shape, cudaStream_t stream_) : cudaLaunchConfig_t{} {
    gridDim = dim3((unsigned)shape.blocks);
    blockDim = dim3((unsigned)shape.threads);
    dynamicSmemBytes = shape.shared_bytes;
    stream = stream_;
    if (shape.cluster == 0) return;
    attribute_.id = cudaLaunchAttributeClusterDimension;
    attribute_.val.clusterDim.x = (unsigned)shape.cluster;
    attribute_.val.clusterDim.y = attribute_.val.clusterDim.z = 1;
    attrs = &attribute_;
    numAttrs = 1;
  }
  Configuration(const Configuration&) = delete;

 private:
  cudaLaunchAttribute attribute_;
};

auto launcher(const Launch& launch) {
  return [&launch](auto kernel, const GridShape& shape, const auto&... arguments) {
    const Configuration configuration(shape, launch.stream());
    check(cudaLaunchKernelEx(&configuration, kernel, arguments...));
  };
}

int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// How a row lies in shared memory and how many clusters run at a time, on the current device.
template <class T>
void fit(OnePass& p) {
  cudaFuncAttributes code;
  check(cudaFuncGetAttributes(&code, row_kernel<T>));
  STD_TORCH_CHECK(attribute(cudaDevAttrComputeCapabilityMajor) >= 9 && code.ptxVersion >= 90,
                  "the native kernel of one_pass needs a device of compute capability 9.0 or later, and code for it");
  const int64_t row_bytes = p.size * (int64_t)sizeof(T), limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p.geometry = geometry_for(row_bytes, kRowThreads / 32, limit);
  STD_TORCH_CHECK(p.geometry.blocks > 0, "the native kernel of one_pass holds a row in the shared memory of ",
                  kMaxClusterBlocks, " blocks; ", row_bytes, " bytes are too many");
  const int shared_bytes = p.geometry.shared_bytes();
  check(cudaFuncSetAttribute(row_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  const Configuration cluster({p.geometry.blocks, kRowThreads, p.geometry.blocks, shared_bytes}, nullptr);
  int num_clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&num_clusters, row_kernel<T>, &cluster));
  STD_TORCH_CHECK(num_clusters > 0, "no cluster of ", p.geometry.blocks, " blocks fits on this device");
  p.num_clusters = std::min<int64_t>(num_clusters, std::max<int64_t>(1, p.num_rows));
}

void run(const Tensor& logits, const Tensor& gradient, const Tensor& logprobs, const Tensor& entropy,
         const OptionalTensor& rows, const Tensor& token_ids, const Tensor& temperature,
         const OptionalTensor& old_logprobs, const Tensor& advantages, const OptionalTensor& mask,
         const OptionalTensor& cu_seqlens, const OptionalTensor& ref_logprobs, const OptionalTensor& is_weights,
         const Tensor& scale, const std::vector<int64_t>& parts, const std::vector<double>& values) {
  BatchArguments a(logprobs, old_logprobs, mask, cu_seqlens);
  a.expect_device("logits", logits);
  expect_shape("logits", logits, logits_shape(logits, a.shape, rows));
  OnePass p{};
  p.objective = objective_of(parts, values);
  expect_one_pass(p.objective);
  p.batch = a.batch;
  p.batch.tokens.logprobs = {};
  if (!old_logprobs) p.batch.tokens.old_logprobs = {};
  p.batch.tokens.advantages = a.per_token_or_sequence("advantages", advantages);
  p.batch.tokens.ref_logprobs = a.per_token("ref_logprobs", ref_logprobs);
  p.batch.tokens.is_weights = a.per_token_or_sequence("is_weights", is_weights);
  p.num_rows = num_rows_of(logits);
  p.rows = a.read<int64_t>("rows", rows, {p.num_rows});
  p.token_ids = a.read<int64_t>("token_ids", token_ids, a.shape);
  p.temperature_per_token = temperature.dim() > 0;
  p.temperature = a.read<float>("temperature", temperature, p.temperature_per_token ? a.shape : Shape{});
  p.scale = a.read<float>("scale", scale, a.shape);
  p.logprobs = a.write<float>("logprobs", logprobs, a.shape);
  p.entropy = a.write<float>("entropy", entropy, a.shape);
  p.logits = logits.data_ptr();
  p.gradient = gradient.data_ptr();
  p.from = rows_of("logits", logits);
  p.to = rows_of("logits", gradient);
  p.size = (int)logits.size(logits.dim() - 1);
  const Launch launch(logits);
  const Tensor memory = torch::stable::new_empty(logits, {p.num_rows * (int64_t)sizeof(Row) + (int64_t)sizeof(int64_t)},
                                                 ScalarType::Byte);
  p.order = static_cast<Row*>(memory.data_ptr());
  p.num_live = (int64_t*)(p.order + p.num_rows);
  dispatch("logits", logits, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    fit<T>(p);
    launch_one_pass<T>(p, launcher(launch));
  });
}

Tensor one_pass(Tensor logits, Tensor logprobs, Tensor entropy, OptionalTensor rows, Tensor token_ids,
                Tensor temperature, OptionalTensor old_logprobs, Tensor advantages, OptionalTensor mask,
                OptionalTensor cu_seqlens, OptionalTensor ref_logprobs, OptionalTensor is_weights, Tensor scale,
                std::vector<int64_t> parts, std::vector<double> values) {
  const Tensor gradient = torch::stable::new_empty(logits, logits.sizes());
  run(logits, gradient, logprobs, entropy, rows, token_ids, temperature, old_logprobs, advantages, mask, cu_seqlens,
      ref_logprobs, is_weights, scale, parts, values);
  return gradient;
}

void one_pass_(Tensor logits, Tensor logprobs, Tensor entropy, OptionalTensor rows, Tensor token_ids,
               Tensor temperature, OptionalTensor old_logprobs, Tensor advantages, OptionalTensor mask,
               OptionalTensor cu_seqlens, OptionalTensor ref_logprobs, OptionalTensor is_weights, Tensor scale,
               std::vector<int64_t> parts, std::vector<double> values) {
  run(logits, logits, logprobs, entropy, rows, token_ids, temperature, old_logprobs, advantages, mask, cu_seqlens,
      ref_logprobs, is_weights, scale, parts, values);
}

void scale_(Tensor gradient, Tensor factor) {
  Arguments arguments("gradient", gradient);
  const RowOffsets rows = rows_of("gradient", gradient);
  const Scaling s{gradient.data_ptr(), rows, num_rows_of(gradient), (int)gradient.size(gradient.dim() - 1),
                  arguments.read<float>("factor", factor, {})};
  const Launch launch(gradient);
  dispatch("gradient", gradient,
           [&](auto* element) { launch_scale<std::remove_pointer_t<decltype(element)>>(s, launcher(launch)); });
}

}  // namespace
}  // namespace fusedpo::cuda

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CUDA, m) {
  m.impl("one_pass.native", TORCH_BOX(&fusedpo::cuda::one_pass));
  m.impl("one_pass_.native", TORCH_BOX(&fusedpo::cuda::one_pass_));
  m.impl("scale_.native", TORCH_BOX(&fusedpo::cuda::scale_));
}
