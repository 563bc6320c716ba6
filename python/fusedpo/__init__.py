"""Fused kernels for the token-level policy-optimisation objectives that train language models.

Layer 1, :mod:`fusedpo.logprobs`: log-probs and entropy of the sampled tokens. Layer 2, :mod:`fusedpo.losses`: ratio,
forward trace, trust region, KL and aggregation. Layer 3, :mod:`fusedpo.advantages`. The parts of a loss are in
:mod:`fusedpo.objectives`, the plain PyTorch specification of everything in :mod:`fusedpo.reference`.
"""

from fusedpo._cli import VERSION  # first: the help of the command line does not wait for torch

from . import advantages, corrections, covariance, distributed, nn, objectives, reference
from ._warmup import warmup
from .aggregation import aggregate, global_denominator, prompt_weights, to_floats
from .alignment import cu_seqlens, next_tokens, shift
from .backends import BackendUnavailable, backend
from .distributed import ContextParallel
from .divergence import ExactKLOutput, exact_kl, exact_kl_from_hidden
from .logprobs import linear_token_logprobs, token_logprobs
from .losses import PolicyLossOutput, policy_loss, policy_loss_from_hidden, policy_loss_from_logits
from .objectives import Objective
from .oreo import OREOLossOutput, oreo_loss
from .preferences import (
    pairs_from_rewards,
    preference_loss,
    preference_loss_from_hidden,
    preference_loss_from_logits,
    regression_loss,
)
from .segments import sequence_logprobs
from .selection import top_entropy_mask
from .statistics import TokenStatistics, linear_token_statistics, token_statistics
from .values import ValueLossOutput, value_loss

__version__ = VERSION

__all__ = [
    "BackendUnavailable",
    "ContextParallel",
    "ExactKLOutput",
    "OREOLossOutput",
    "Objective",
    "PolicyLossOutput",
    "TokenStatistics",
    "ValueLossOutput",
    "advantages",
    "aggregate",
    "backend",
    "corrections",
    "covariance",
    "cu_seqlens",
    "distributed",
    "exact_kl",
    "exact_kl_from_hidden",
    "global_denominator",
    "linear_token_logprobs",
    "linear_token_statistics",
    "next_tokens",
    "nn",
    "objectives",
    "oreo_loss",
    "pairs_from_rewards",
    "policy_loss",
    "policy_loss_from_hidden",
    "policy_loss_from_logits",
    "preference_loss",
    "preference_loss_from_hidden",
    "preference_loss_from_logits",
    "prompt_weights",
    "reference",
    "regression_loss",
    "sequence_logprobs",
    "shift",
    "to_floats",
    "token_logprobs",
    "token_statistics",
    "top_entropy_mask",
    "value_loss",
    "warmup",
]
