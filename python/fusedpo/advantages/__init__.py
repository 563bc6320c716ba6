"""Advantages: how good was each sample, step or token?

*Groups.* Rewards ``[G]`` are compared within groups, given by exactly one of ``group_size`` (int: equal, contiguous
groups, such as the samples of one prompt) and ``group_ids`` (``[G]``: any sizes, any order, any labels). Rewards
``[prompts, samples]`` have a group per row and need neither; the advantages have their shape (``.flatten()`` is what a
loss takes).

*Samples that do not count.* ``mask`` ``[G]``, 0 where a sample is left out: it gets advantage 0 and is not counted, its
reward may be nan; so is a reward of None in a list. A nan in a kept reward stays within its group, unless the docstring
says otherwise. ``trajectory_ids`` ``[G]``: samples of one trajectory, which was split into several (turns, a context
that was cut), have one label. They count once, with the length of all of them, and share the advantage; their rewards
and groups have to be the same. Where an estimator needs groups of some size, ``small_groups="zero"`` leaves out
smaller ones, ``"error"`` raises.

*Kinds.* What has a value per sample may be a tensor, an array of NumPy or a list. ``group_ids`` and ``trajectory_ids``
may hold strings or other labels; integers are taken as they are.

*Ranks.* ``dp_group``: groups are spread over these ranks, which have equally many samples each; tensors ``[G]`` are
those of this rank, and so is the result.

*Tokens.* Arrays per token are padded ``[B, T]``, or packed ``[T]`` or ``[1, T]`` with ``cu_seqlens``; ``[T]`` without
is one sequence. Where ``mask``, of the same shape, is 0, a token is skipped: what follows token t is the next kept
token of its sequence. A skipped token gets 0, and nothing that stands there is read, nan included. So a reward there
would be lost: on the CPU it is a ``ValueError``, and :func:`rewards_on_kept` moves it. ``cp``: sequences are split over
ranks (:class:`fusedpo.ContextParallel`); arrays per token, and results, are those of this rank.

*dtypes.* Rewards may be floating-point, integer or bool. Results are float64 for float64 input and float32 otherwise,
computed in float64 (in float32 on devices that have no float64), and carry no gradient.

*Errors.* ``TypeError`` for wrong types and dtypes, ``ValueError`` for wrong shapes, devices and values. What depends on
data is checked on the CPU, elsewhere under ``FUSEDPO_DEBUG=1``.

*By name.* :func:`compute` calls an estimator by its registered name, :func:`register` adds one, :func:`available` lists
the names.
"""

from .group import dr_grpo, gpg, grpo, opo, raft, reinforce_plus_plus_baseline, reinforce_rej, remax, rloo
from .order import grpo_passk, max_at_k, maxpo, order_statistic, passk, pkpo, rank_weights
from .registry import available, compute, register
from .shaping import overlong_penalty, token_rewards
from .soft import interpolate, soft_value
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
    whiten,
)
from .steps_text import Steps, pool_rollouts, segment_steps

__all__ = [
    "GAE",
    "Steps",
    "VTrace",
    "available",
    "compute",
    "dr_grpo",
    "gae",
    "gpg",
    "grpo",
    "grpo_passk",
    "interpolate",
    "max_at_k",
    "maxpo",
    "opo",
    "optimal_token_baseline",
    "order_statistic",
    "overlong_penalty",
    "passk",
    "pkpo",
    "pool_rollouts",
    "raft",
    "rank_weights",
    "register",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "reinforce_rej",
    "remax",
    "reward_to_go",
    "rewards_on_kept",
    "rloo",
    "segment_steps",
    "soft_value",
    "to_tokens",
    "token_rewards",
    "vineppo",
    "vtrace",
    "whiten",
]
