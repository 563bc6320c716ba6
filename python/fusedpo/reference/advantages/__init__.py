"""Advantages in plain PyTorch: how good was each sample, step or token?

Everything is computed in float64, in float32 on devices that have no float64; results are float64 for float64 input
and float32 otherwise, and carry no gradient.
Arguments are not checked here: :mod:`fusedpo.advantages` documents them and checks them.
"""

from .group import dr_grpo, gpg, grpo, opo, raft, reinforce_plus_plus_baseline, reinforce_rej, remax, rloo
from .order import grpo_passk, max_at_k, maxpo, maxpo_leave_two_out, maxpo_quadratic, order_statistic, passk, pkpo
from .step import (
    GAE,
    VTrace,
    gae,
    optimal_token_baseline,
    reinforce_plus_plus,
    reward_to_go,
    rewards_on_kept,
    to_tokens,
    vineppo,
    vtrace,
)
from .whitening import whiten

__all__ = [
    "GAE",
    "VTrace",
    "dr_grpo",
    "gae",
    "gpg",
    "grpo",
    "grpo_passk",
    "max_at_k",
    "maxpo",
    "maxpo_leave_two_out",
    "maxpo_quadratic",
    "opo",
    "optimal_token_baseline",
    "order_statistic",
    "passk",
    "pkpo",
    "raft",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "reinforce_rej",
    "remax",
    "reward_to_go",
    "rewards_on_kept",
    "rloo",
    "to_tokens",
    "vineppo",
    "vtrace",
    "whiten",
]
