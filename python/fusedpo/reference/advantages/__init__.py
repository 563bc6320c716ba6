"""Advantages in plain PyTorch: how good was each sample, step or token?

Everything is computed in float64; results are float64 for float64 input and float32 otherwise, and carry no gradient.
Arguments are not checked here: :mod:`fusedpo.advantages` documents them and checks them.
"""

from .group import dr_grpo, grpo, opo, rloo
from .order import max_at_k, maxpo, maxpo_quadratic, passk, pkpo
from .step import GAE, gae, reinforce_plus_plus, vineppo, whiten

__all__ = [
    "GAE",
    "dr_grpo",
    "gae",
    "grpo",
    "max_at_k",
    "maxpo",
    "maxpo_quadratic",
    "opo",
    "passk",
    "pkpo",
    "reinforce_plus_plus",
    "rloo",
    "vineppo",
    "whiten",
]
