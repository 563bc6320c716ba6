// Registration of the native kernels, through the LibTorch stable ABI. The schemas are in python/fusedpo/ops.py: an
// operator has one overload per implementation, and `native` is the one that lives here.

#include <torch/csrc/stable/library.h>

#include "cpu/advantages.h"
#include "cpu/one_pass.h"
#include "cpu/policy_loss.h"
#include "cpu/token_logprobs.h"

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CPU, m) {
  m.impl("group_advantages.native", TORCH_BOX(&fusedpo::cpu::group_advantages));
  m.impl("token_advantages.native", TORCH_BOX(&fusedpo::cpu::token_advantages));
  m.impl("step_advantages.native", TORCH_BOX(&fusedpo::cpu::step_advantages));
  m.impl("whiten.native", TORCH_BOX(&fusedpo::cpu::whiten));
  m.impl("one_pass.native", TORCH_BOX(&fusedpo::cpu::one_pass));
  m.impl("one_pass_.native", TORCH_BOX(&fusedpo::cpu::one_pass_));
  m.impl("scale_.native", TORCH_BOX(&fusedpo::cpu::scale_));
  m.impl("policy_loss.native", TORCH_BOX(&fusedpo::cpu::policy_loss));
  m.impl("policy_loss_backward.native", TORCH_BOX(&fusedpo::cpu::policy_loss_backward));
  m.impl("token_logprobs.native", TORCH_BOX(&fusedpo::cpu::token_logprobs));
  m.impl("token_logprobs_backward.native", TORCH_BOX(&fusedpo::cpu::token_logprobs_backward));
  m.impl("token_logprobs_backward_.native", TORCH_BOX(&fusedpo::cpu::token_logprobs_backward_));
}
