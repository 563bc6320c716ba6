#include "logits.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedpo::cpu {

const RowKernels& row_kernels_for(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  const RowKernelTable& table = row_kernels();
  if (dtype == ScalarType::Float) return table.float32;
  if (dtype == ScalarType::BFloat16) return table.bfloat16;
  STD_TORCH_CHECK(dtype == ScalarType::Half, "logits must be float16, bfloat16 or float32");
  return table.float16;
}

void ask_for_huge_pages([[maybe_unused]] const Tensor& tensor) {
#if defined(__linux__)
  const uintptr_t page = 2 << 20, begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + tensor.numel() * tensor.element_size()) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fusedpo::cpu
