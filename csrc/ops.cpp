// Registration of the native kernels, through the LibTorch stable ABI. The schemas are in python/fusedpo/ops.py: an
// operator has one overload per implementation, and `native` is the one that lives here.

#include <torch/csrc/stable/library.h>

#include "cpu/advantages.h"
#include "cpu/exact_kl.h"
#include "cpu/one_pass.h"
#include "cpu/parallel.h"
#include "cpu/policy_loss.h"
#include "cpu/token_logprobs.h"

#define BOX(name) TORCH_BOX(&fusedpo::cpu::InIeeeArithmetic<&fusedpo::cpu::name>::call)

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CPU, m) {
  m.impl("group_advantages.native", BOX(group_advantages));
  m.impl("token_advantages.native", BOX(token_advantages));
  m.impl("step_advantages.native", BOX(step_advantages));
  m.impl("whiten.native", BOX(whiten));
  m.impl("exact_kl.native", BOX(exact_kl));
  m.impl("exact_kl_.native", BOX(exact_kl_));
  m.impl("one_pass.native", BOX(one_pass));
  m.impl("one_pass_.native", BOX(one_pass_));
  m.impl("scale_.native", BOX(scale_));
  m.impl("policy_loss.native", BOX(policy_loss));
  m.impl("policy_loss_backward.native", BOX(policy_loss_backward));
  m.impl("token_logprobs.native", BOX(token_logprobs));
  m.impl("token_logprobs_backward.native", BOX(token_logprobs_backward));
  m.impl("token_logprobs_backward_.native", BOX(token_logprobs_backward_));
}
