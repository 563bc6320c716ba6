#include "logits.h"

#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fusedpo::cpu {

const RowKernels& row_kernels_for(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  const RowKernelTable& table = row_kernels();
  if (dtype == ScalarType::Float) return table.float32;
  if (dtype == ScalarType::BFloat16) return table.bfloat16;
  expect(dtype == ScalarType::Half, name, " must be float16, bfloat16 or float32, got ", dtype);
  return table.float16;
}

void prepare_to_overwrite([[maybe_unused]] const Tensor& tensor) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, of Linux 5.14; refused before, and that is fine
  constexpr uintptr_t kSmall = 4096, kHuge = 2 << 20;
  const auto advise = [](uintptr_t begin, uintptr_t end, int advice) {
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
  };
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t end = begin + tensor.numel() * tensor.element_size();
  if (end - begin < kHuge) return;
  advise((begin + kHuge - 1) / kHuge * kHuge, end / kHuge * kHuge, MADV_HUGEPAGE);
  parallel_for(begin / kHuge, (end - 1) / kHuge + 1, 1, [&](int64_t first, int64_t last) {
    advise(std::max(first * kHuge, begin / kSmall * kSmall),
           std::min(last * kHuge, (end + kSmall - 1) / kSmall * kSmall), kPopulateWrite);
  });
#endif
}

void clear(char* row, size_t bytes) {
#if defined(__SSE2__)
  constexpr size_t kLine = 64, kLong = 32768;
  if (bytes >= kLong) {
    const size_t head = -reinterpret_cast<uintptr_t>(row) % kLine;
    std::memset(row, 0, head);
    row += head, bytes -= head;
    for (; bytes >= kLine; row += kLine, bytes -= kLine)
      for (size_t i = 0; i < kLine; i += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(row + i), _mm_setzero_si128());
    _mm_sfence();  // before another thread may see the row
  }
#endif
  std::memset(row, 0, bytes);
}

}  // namespace fusedpo::cpu
