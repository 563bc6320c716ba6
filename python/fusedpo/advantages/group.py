"""Rewards compared with a baseline, of their group as a rule. How the estimators differ: docs/advantages.md."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .. import _checks
from ..ops_advantages import implementation
from . import arguments
from .registry import register


@register("grpo")
def grpo(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    std: bool = True,
    eps: float = 1e-6,
    mask: Tensor | None = None,
) -> Tensor:
    """GRPO (2402.03300): ``(r - mean) / (std + eps)`` of the group, ``[G]`` to ``[G]``; std is the unbiased one.

    ``std=False``: no division. Equal rewards, and so a group of one, give exactly 0 (for a group of one, verl returns
    its reward). Raises as the package says; ``ValueError`` for ``eps <= 0``.
    """
    arguments.grouped_rewards(rewards, group_size, group_ids, mask)
    eps = arguments.positive("eps", eps)
    return implementation("group_advantages", rewards).grpo(
        rewards, group_size=group_size, group_ids=group_ids, std=std, eps=eps, mask=mask
    )


@register("dr_grpo")
def dr_grpo(
    rewards: Tensor, *, group_size: int | None = None, group_ids: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Dr. GRPO (2503.20783): ``r - mean`` of the group, ``[G]`` to ``[G]``; equal rewards give exactly 0."""
    arguments.grouped_rewards(rewards, group_size, group_ids, mask)
    return implementation("group_advantages", rewards).dr_grpo(
        rewards, group_size=group_size, group_ids=group_ids, mask=mask
    )


@register("rloo")
def rloo(
    rewards: Tensor, *, group_size: int | None = None, group_ids: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """RLOO (2402.14740): ``r`` minus the mean of the others in the group, ``[G]`` to ``[G]``.

    Equal rewards give exactly 0; so does a group of one, which has no others.
    """
    arguments.grouped_rewards(rewards, group_size, group_ids, mask)
    return implementation("group_advantages", rewards).rloo(
        rewards, group_size=group_size, group_ids=group_ids, mask=mask
    )


@register("opo")
def opo(
    rewards: Tensor,
    *,
    lengths: Tensor,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scope: Literal["group", "batch"] = "group",
    mask: Tensor | None = None,
) -> Tensor:
    """OPO (2505.23585): ``r - sum(len r) / sum(len)``, the baseline of least variance if gradients grow with length.

    ``[G]`` to ``[G]``. ``lengths`` ``[G]``, >= 0: number of response tokens of each sample. A sample without tokens has
    no weight in the baseline; a group without tokens has advantage 0. A group of one is its own baseline: 0, as in the
    authors' code (verl returns its reward). ``scope="batch"``: one baseline for the whole batch, no groups.
    Raises as the package says; ``ValueError`` for negative lengths, and for groups given with ``scope="batch"``.
    """
    arguments.choice("scope", scope, ("group", "batch"))
    if scope == "group":
        arguments.grouped_rewards(rewards, group_size, group_ids, mask)
    else:
        arguments.rewards(rewards, mask)
        if group_size is not None or group_ids is not None:
            raise ValueError("scope='batch' has one baseline for all samples: group_size and group_ids must be None")
    arguments.lengths(lengths, rewards, mask)
    return implementation("group_advantages", rewards).opo(
        rewards, lengths=lengths, group_size=group_size, group_ids=group_ids, scope=scope, mask=mask
    )


@register("reinforce_plus_plus_baseline")
def reinforce_plus_plus_baseline(
    rewards: Tensor,
    *,
    lengths: Tensor,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """REINFORCE++-baseline (2501.03262): ``r - mean`` of the group, whitened over all tokens of the batch.

    ``[G]`` to ``[G]``. ``lengths`` ``[G]``, >= 0: number of response tokens of each sample, all of which get its
    advantage; so mean and variance count a sample ``lengths`` times, and :func:`whiten` of the tokens gives the same. A
    sample without tokens gets 0. A group of one is its own baseline (for verl, that is 0).

    Whitening shifts: a group of equal rewards does not get exactly 0, and a nan reaches the whole batch. Over several
    processes: ``whiten(to_tokens(dr_grpo(...), mask), mask=mask, group=...)``.
    Raises as the package says; ``ValueError`` for negative lengths.
    """
    arguments.grouped_rewards(rewards, group_size, group_ids, mask)
    arguments.lengths(lengths, rewards, mask)
    return implementation("group_advantages", rewards).reinforce_plus_plus_baseline(
        rewards, lengths=lengths, group_size=group_size, group_ids=group_ids, mask=mask
    )


@register("gpg")
def gpg(
    rewards: Tensor,
    *,
    f_norm: float = 1.0,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """GPG, as in verl: ``alpha (r - mean) / f_norm`` with the mean of the group, ``[G]`` to ``[G]``.

    ``alpha`` is the number of kept samples in the batch over the number of those with a reward other than 0, at least
    1: it depends on what stands for a wrong answer, 0 or -1. Equal rewards give exactly 0, and so does a group of one
    (for verl, ``alpha r / f_norm``). Raises as the package says; ``ValueError`` for ``f_norm <= 0``.
    """
    arguments.grouped_rewards(rewards, group_size, group_ids, mask)
    f_norm = arguments.positive("f_norm", f_norm)
    return implementation("group_advantages", rewards).gpg(
        rewards, f_norm=f_norm, group_size=group_size, group_ids=group_ids, mask=mask
    )


@register("reinforce_rej")
def reinforce_rej(
    rewards: Tensor, *, group_size: int | None = None, group_ids: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Reinforce-Rej (2504.11343): the reward itself, 0 in a group of equal rewards; ``[G]`` to ``[G]``.

    A group of one keeps its reward, as in the authors' code. There is no baseline.
    """
    arguments.grouped_rewards(rewards, group_size, group_ids, mask)
    return implementation("group_advantages", rewards).reinforce_rej(
        rewards, group_size=group_size, group_ids=group_ids, mask=mask
    )


@register("raft")
def raft(rewards: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """RAFT, as in 2504.11343: ``max(r, 0)``, so only samples of positive reward count; ``[G]`` to ``[G]``.

    There are neither groups nor a baseline.
    """
    arguments.rewards(rewards, mask)
    return implementation("group_advantages", rewards).raft(rewards, mask=mask)


@register("remax")
def remax(
    rewards: Tensor,
    *,
    baselines: Tensor,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """ReMax (2310.10505): ``r`` minus the reward of the greedy response to the same prompt; ``[G]`` to ``[G]``.

    ``baselines``: the rewards of the greedy responses, ``[G]``, one per sample; or one per prompt, ``[P]``, with
    ``group_size`` (``P = G / group_size``) or ``group_ids`` (0 to P - 1). Not centred. For rewards per token, subtract
    ``to_tokens(baselines, mask)`` from :func:`reward_to_go`.
    Raises as the package says; ``ValueError`` for group ids outside 0 to P - 1.
    """
    arguments.rewards(rewards, mask)
    arguments.real("baselines", baselines)
    _checks.same_device("baselines", baselines, "rewards", rewards)
    if group_size is None and group_ids is None:
        _checks.shape("baselines", baselines, tuple(rewards.shape), "one per sample, without group_size or group_ids")
    else:
        arguments.groups(rewards, group_size, group_ids)
        if baselines.dim() != 1:
            raise ValueError(f"baselines must have shape [P], one per prompt, got {list(baselines.shape)}")
        if group_size is not None:
            _checks.shape("baselines", baselines, (rewards.numel() // group_size,), "one per group of group_size")
        elif group_ids is not None and arguments.unchecked("group_advantages", group_ids, mask):
            ids = group_ids if mask is None else group_ids[mask != 0]
            wrong = ids[(ids < 0) | (ids >= baselines.numel())]
            if wrong.numel():
                raise ValueError(f"group_ids must be 0 to {baselines.numel() - 1}, as baselines, got {int(wrong[0])}")
    return implementation("group_advantages", rewards).remax(
        rewards, baselines=baselines, group_size=group_size, group_ids=group_ids, mask=mask
    )
