// Which build of the kernels runs on this machine.
#pragma once

#include "divergence.h"
#include "row_kernels.h"
#include "token_kernels.h"

namespace fusedpo {

// "avx512_bf16", "avx512", "avx2" or "portable": the best that was built and that the processor has, or at most what
// the environment variable FUSEDPO_CPU_CAPABILITY names. Throws std::invalid_argument if that names nothing known.
// Visible: fusedpo._C calls it.
__attribute__((visibility("default"))) const char* cpu_capability();

const RowKernelTable& row_kernels();

const DivergenceKernelTable& divergence_kernels();

const TokenKernels& token_kernels();

}  // namespace fusedpo
