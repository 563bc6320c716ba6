// Launchers of the kernels of one_pass.cuh, and their registration.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <climits>
#include <map>
#include <mutex>
#include <string>

#include "batch_arguments.h"
#include "launch.h"
#include "one_pass.cuh"

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
  Configuration(const Grid& shape, cudaStream_t stream_) : cudaLaunchConfig_t{} {
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
  return [&launch](auto kernel, const Grid& shape, const auto&... arguments) {
    const Configuration configuration(shape, launch.stream());
    check(cudaLaunchKernelEx(&configuration, kernel, arguments...));
  };
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// Bytes of shared memory that a block of row_kernel<T> can have on the current device; from now on it may have them.
template <class T>
int shared_limit(int device) {
  cudaFuncAttributes code;
  check(cudaFuncGetAttributes(&code, row_kernel<T>));
  STD_TORCH_CHECK(attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9 && code.ptxVersion >= 90,
                  "the native kernel of one_pass needs a device of compute capability 9.0 or later, and code for it");
  const int limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  check(cudaFuncSetAttribute(row_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
  return limit;
}

template <class T>
int max_active_clusters(const Geometry& g) {
  const Configuration cluster({g.blocks, kRowThreads, g.blocks, g.shared_bytes()}, nullptr);
  int count = 0;
  check(cudaOccupancyMaxActiveClusters(&count, row_kernel<T>, &cluster));
  STD_TORCH_CHECK(count > 0, "no cluster of ", g.blocks, " blocks fits on this device");
  return count;
}

// How a row lies in shared memory and how many clusters run at a time, on the current device.
template <class T>
void fit(OnePass& p, int device) {
  // What the driver has answered: it is asked once. An error is no answer.
  static std::mutex mutex;
  static std::map<int, int> limits;
  static std::map<std::array<int, 3>, int> clusters;
  const std::lock_guard<std::mutex> lock(mutex);

  if (limits.count(device) == 0) limits[device] = shared_limit<T>(device);
  const int64_t row_bytes = p.size * (int64_t)sizeof(T);
  p.geometry = geometry_for(row_bytes, kRowThreads / 32, limits[device]);
  STD_TORCH_CHECK(p.geometry.blocks > 0, "the native kernel of one_pass holds a row in the shared memory of ",
                  kMaxClusterBlocks, " blocks; ", row_bytes, " bytes are too many");
  const std::array<int, 3> shape{device, p.geometry.blocks, p.geometry.slices};
  if (clusters.count(shape) == 0) clusters[shape] = max_active_clusters<T>(p.geometry);
  const int active = clusters[shape];
  p.num_clusters = std::min<int64_t>(active, std::max<int64_t>(1, p.num_rows));
}

void one_pass(const OnePassInputs& in) {
  BatchArguments a(in.logprobs, in.batch);
  const Tensor& logits = in.logits;
  a.expect_device("logits", logits);
  a.expect_device("out", in.out);
  expect_shape("logits", logits, logits_shape(logits, a.shape, in.rows));
  expect_shape("out", in.out, shape_of(logits));
  expect(in.out.scalar_type() == logits.scalar_type(), "out must have dtype ", logits.scalar_type(), ", got ",
         in.out.scalar_type());
  OnePass p{};
  p.objective = objective_of(in.parts, in.values);
  expect_one_pass(p.objective);
  p.batch = a.batch;
  p.batch.tokens.logprobs = {};
  if (!in.batch.old_logprobs) p.batch.tokens.old_logprobs = {};
  p.num_rows = num_rows_of(logits);
  p.rows = a.read<int64_t>("rows", in.rows, {p.num_rows});
  p.token_ids = a.read<int64_t>("token_ids", in.token_ids, a.shape);
  p.temperature_per_token = in.temperature.dim() > 0;
  p.temperature = a.read<float>("temperature", in.temperature, p.temperature_per_token ? a.shape : Shape{});
  p.scale = a.read<float>("scale", in.scale, a.shape);
  p.logprobs = a.write<float>("logprobs", in.logprobs, a.shape);
  p.entropy = a.write<float>("entropy", in.entropy, a.shape);
  p.logits = logits.data_ptr();
  p.gradient = in.out.data_ptr();
  p.from = rows_of("logits", logits);
  p.to = rows_of("out", in.out);
  p.size = (int)logits.size(logits.dim() - 1);
  const Launch launch(logits);
  const Tensor memory = torch::stable::new_empty(logits, {p.num_rows * (int64_t)sizeof(Row) + (int64_t)sizeof(int64_t)},
                                                 ScalarType::Byte);
  p.order = static_cast<Row*>(memory.data_ptr());
  p.num_evaluated = (int64_t*)(p.order + p.num_rows);
  dispatch("logits", logits, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    fit<T>(p, logits.get_device_index());
    launch_one_pass<T>(p, launcher(launch));
  });
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
  using Spread = fusedpo::Spread<&fusedpo::cuda::one_pass, fusedpo::OnePassTypes>;
  m.impl("one_pass.native", TORCH_BOX(&Spread::call));
  m.impl("scale_.native", TORCH_BOX(&fusedpo::cuda::scale_));
}
