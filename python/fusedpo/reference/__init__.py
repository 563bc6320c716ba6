"""The specification: every operation in plain PyTorch, vectorised, and differentiated by autograd.

Results are float64 for float64 input, float32 otherwise. Arguments are not checked.
"""

from .divergence import exact_kl
from .logprobs import linear_logits, linear_token_logprobs, next_tokens, shift, token_logprobs
from .losses import METRICS, PolicyLossOutput, policy_loss
from .statistics import linear_token_statistics, token_statistics

__all__ = [
    "METRICS",
    "PolicyLossOutput",
    "exact_kl",
    "linear_logits",
    "linear_token_logprobs",
    "linear_token_statistics",
    "next_tokens",
    "policy_loss",
    "shift",
    "token_logprobs",
    "token_statistics",
]
