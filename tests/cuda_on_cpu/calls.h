// Calls of kernels as tests/cuda_on_cpu/__init__.py writes them, and their results. An argument is a tag and a value:
// n (none), i (int64), d (double), or t (tensor: number of its dtype, bytes, data).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <list>
#include <vector>

#include "memory.h"

namespace cuda_on_cpu {

struct Tensor {
  int64_t dtype = -1;
  Memory<char> bytes;
  void* data() { return bytes.data(); }
};

class Calls {
 public:
  Calls(const char* input, const char* output) : in_(input, std::ios::binary), out_(output, std::ios::binary) {
    if (!in_ || !out_) std::abort();
  }

  bool more() { return in_.peek() != EOF; }

  int64_t integer() { return expect('i'), read<int64_t>(); }
  double number() { return expect('d'), read<double>(); }

  // Null if it is none. Lives as long as this object.
  Tensor* tensor() {
    const char tag = read<char>();
    if (tag == 'n') return nullptr;
    if (tag != 't') std::abort();
    Tensor& tensor = tensors_.emplace_back();
    tensor.dtype = read<int64_t>();
    tensor.bytes.resize(read<int64_t>());
    in_.read(tensor.bytes.data(), tensor.bytes.size());
    return &tensor;
  }

  template <class T, class A>
  void result(const std::vector<T, A>& values) {
    out_.write((const char*)values.data(), values.size() * sizeof(T));
  }

 private:
  template <class T>
  T read() {
    T value;
    in_.read((char*)&value, sizeof value);
    return value;
  }
  void expect(char tag) {
    if (read<char>() != tag) std::abort();
  }

  std::ifstream in_;
  std::ofstream out_;
  std::list<Tensor> tensors_;
};

}  // namespace cuda_on_cpu
