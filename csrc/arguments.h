// The arguments of an operator as kernels take them, checked: programs that were exported, and user code, call
// operators directly, so none relies on what its Python caller has checked. Every pointer comes from an `Arguments`,
// which knows its device, dtype and shape; numbers are checked by expect(). All that is O(1), and throws
// std::invalid_argument, which becomes a ValueError, with the argument's name, what it must be, and what was given.
// Values that index are checked where they are used on the CPU, and clamped on a GPU.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fusedpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

constexpr int64_t kWhole = (int64_t)1 << 62;  // larger than every size: a window over the whole sequence

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <class... Parts>
void expect(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

inline void expect_in(const char* name, int64_t value, int64_t least, int64_t most) {
  expect(value >= least && value <= most, name, " must be ", least, " to ", most, ", got ", value);
}

inline void expect_given(const char* name, const OptionalTensor& tensor, bool wanted) {
  expect(tensor.has_value() == wanted, name, wanted ? " must be given" : " must not be given", " for this estimator");
}

template <class Sizes>
std::string text_of(const Sizes& shape) {
  std::ostringstream text;
  for (const int64_t size : shape) text << (text.tellp() > 0 ? ", " : "") << size;
  return "[" + text.str() + "]";
}

inline Shape shape_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

inline bool has_shape(const Tensor& tensor, const Shape& shape) {
  const auto sizes = tensor.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

inline void expect_shape(const char* name, const Tensor& tensor, const Shape& shape) {
  expect(has_shape(tensor, shape), name, " must have shape ", text_of(shape), ", got ", text_of(tensor.sizes()));
}

inline void expect_dims(const char* name, const Tensor& tensor, int64_t least, int64_t most) {
  const int64_t dims = tensor.dim();
  expect(dims >= least && dims <= most, name, " must have ", least, " to ", most, " dimensions, got the shape ",
         text_of(tensor.sizes()));
}

// The number of sequences that `cu_seqlens` has offsets for, in packed tokens of this shape.
inline int64_t num_sequences_of(const Tensor& cu_seqlens, const Shape& tokens) {
  expect_dims("cu_seqlens", cu_seqlens, 1, 1);
  expect(tokens.size() == 1 || tokens[0] == 1, "cu_seqlens needs packed tokens [T] or [1, T], got ", text_of(tokens));
  const int64_t num_sequences = cu_seqlens.numel() - 1;
  expect(num_sequences > 0 || (num_sequences == 0 && tokens.back() == 0), "cu_seqlens must start with 0, never ",
         "decrease and end with the number of tokens ", tokens.back(), ", got ", num_sequences + 1, " offsets");
  return num_sequences;
}

// The dtype of the tensors that kernels read as T. Masks are bytes: those of a bool tensor may be others than 0 and 1.
template <class T>
inline constexpr ScalarType kDType = ScalarType::Undefined;
template <>
inline constexpr ScalarType kDType<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kDType<int64_t> = ScalarType::Long;
template <>
inline constexpr ScalarType kDType<uint8_t> = ScalarType::Bool;

template <class T>
void expect_dtype(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  expect(dtype == kDType<T>, name, " must have dtype ", kDType<T>, ", got ", dtype);
}

// Tensors on the device of the first one, and contiguous versions of them for as long as the kernels run.
class Arguments {
 public:
  Arguments(const char* name, const Tensor& first) : first_name_(name), device_(first.device()) {}

  void expect_device(const char* name, const Tensor& tensor) const {
    expect(tensor.device() == device_, name, " must be on the device of ", first_name_);
  }

  // The elements of `tensor` one after the other; null if it is not given.
  template <class T>
  const T* read(const char* name, const OptionalTensor& tensor, const Shape& shape) {
    if (!tensor) return nullptr;
    expect_dtype<T>(name, *tensor);
    return static_cast<const T*>(memory(name, *tensor, shape));
  }

  // Its own memory, to be written to.
  template <class T>
  T* write(const char* name, const Tensor& tensor, const Shape& shape) const {
    expect_dtype<T>(name, tensor);
    expect_device(name, tensor);
    expect_shape(name, tensor, shape);
    expect(tensor.is_contiguous(), name, " must be contiguous");
    return static_cast<T*>(tensor.data_ptr());
  }

  // Of any dtype.
  const void* memory(const char* name, const Tensor& tensor, const Shape& shape) {
    expect_device(name, tensor);
    expect_shape(name, tensor, shape);
    tensors_.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
    return tensors_.back().data_ptr();
  }

 private:
  const char* first_name_;
  const torch::stable::Device device_;
  std::vector<Tensor> tensors_;
};

// An operator that takes a struct whose fields are its arguments in their order, of the types `Types<...>`; fields of
// structs within that struct count as its own.
template <class... T>
struct Types {};

template <class... A, class... B, class... C>
Types<A..., B..., C...> joined(Types<A...>, Types<B...>, Types<C...>);

template <auto kOperator, class Types>
struct Spread;

template <auto kOperator, class... T>
struct Spread<kOperator, Types<T...>> {
  static auto call(T... arguments) { return kOperator({std::move(arguments)...}); }
};

}  // namespace fusedpo
