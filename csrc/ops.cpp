// Registration of the native kernels, through the LibTorch stable ABI. The schemas are in python/fusedpo/ops.py: an
// operator has one overload per implementation, and `native` is the one that lives here.

#include <torch/csrc/stable/library.h>

#include "cpu/token_logprobs.h"

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CPU, m) {
  m.impl("token_logprobs.native", TORCH_BOX(&fusedpo::cpu::token_logprobs));
  m.impl("token_logprobs_backward.native", TORCH_BOX(&fusedpo::cpu::token_logprobs_backward));
  m.impl("token_logprobs_backward_.native", TORCH_BOX(&fusedpo::cpu::token_logprobs_backward_));
}
