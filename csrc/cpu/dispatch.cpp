#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fusedpo {
namespace {

struct Build {
  const char* name;
  const RowKernelTable* rows;
  const DivergenceKernelTable* pairs;
  const TokenKernels* tokens;
  bool supported;
};

Build choose() {
  const char* wanted = std::getenv("FUSEDPO_CPU_CAPABILITY");
  bool reached = wanted == nullptr || *wanted == '\0';
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  const Build builds[] = {
#if defined(__x86_64__)
      {"avx512_bf16", &avx512_bf16::kRowKernels, &avx512_bf16::kDivergenceKernels, &avx512::kTokenKernels, avx512_bf16},
      {"avx512", &avx512::kRowKernels, &avx512::kDivergenceKernels, &avx512::kTokenKernels, avx512},
      {"avx2", &avx2::kRowKernels, &avx2::kDivergenceKernels, &avx2::kTokenKernels, avx2},
#endif
      {"portable", &portable::kRowKernels, &portable::kDivergenceKernels, &portable::kTokenKernels, true},
  };
  for (const Build& build : builds) {
    reached = reached || std::string(wanted) == build.name;
    if (reached && build.supported) return build;
  }
  throw std::invalid_argument("FUSEDPO_CPU_CAPABILITY must be avx512_bf16, avx512, avx2 or portable, got " +
                              std::string(wanted));
}

const Build& chosen() {
  static const Build build = choose();
  return build;
}

}  // namespace

const char* cpu_capability() { return chosen().name; }

const RowKernelTable& row_kernels() { return *chosen().rows; }

const DivergenceKernelTable& divergence_kernels() { return *chosen().pairs; }

const TokenKernels& token_kernels() { return *chosen().tokens; }

}  // namespace fusedpo
