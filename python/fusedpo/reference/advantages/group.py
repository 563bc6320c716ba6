"""Rewards compared with a baseline, of their group as a rule."""

from __future__ import annotations

import torch
from torch import Tensor

from .segments import Groups, group_labels, kept, per_group, result_dtype, widened
from .whitening import whitened


def _minus_mean(rewards: Tensor, groups: Groups, weights: Tensor) -> Tensor:
    """``r - sum(w r) / sum(w)``; 0 where all weights of the group are 0.

    Taken from the differences to the lowest reward: equal rewards give exactly 0, nearly equal ones keep their digits.
    """
    above_lowest = rewards - rewards[groups.start]
    weight = groups.total(weights)
    mean = groups.total((weights * above_lowest).where(weights > 0, 0)) / weight
    return (above_lowest - mean).where(weight > 0, 0)


def unbiased_std(rewards: Tensor, groups: Groups) -> Tensor:
    """Standard deviation of the group; 0 for a group of one."""
    squares = _minus_mean(rewards, groups, torch.ones_like(rewards)).square()
    return (groups.total(squares) / (groups.size - 1).clamp(min=1)).sqrt()


@torch.no_grad()
def batch_std(rewards: Tensor, mask: Tensor | None) -> Tensor:
    """The unbiased standard deviation of all kept rewards, 0-d; 0 for fewer than two."""
    counted = kept(rewards, mask)
    number = counted.sum()
    mean = rewards.where(counted, 0).sum() / number.clamp(min=1)
    squares = (rewards - mean).square().where(counted, 0).sum()
    return (squares / (number - 1).clamp(min=1)).sqrt()


@per_group
def grpo(r: Tensor, groups: Groups, *, std: bool = True, eps: float = 1e-6) -> Tensor:
    advantages = _minus_mean(r, groups, torch.ones_like(r))
    return advantages / (unbiased_std(r, groups) + eps) if std else advantages


@per_group
def dr_grpo(r: Tensor, groups: Groups) -> Tensor:
    return _minus_mean(r, groups, torch.ones_like(r))


@per_group
def rloo(r: Tensor, groups: Groups) -> Tensor:
    # r - mean of the others = n / (n - 1) (r - mean of all)
    return _minus_mean(r, groups, torch.ones_like(r)) * groups.size / (groups.size - 1).clamp(min=1)


@per_group
def _opo(r: Tensor, groups: Groups, *, lengths: Tensor) -> Tensor:
    return _minus_mean(r, groups, widened(lengths)[groups.order])


def opo(
    rewards: Tensor,
    *,
    lengths: Tensor,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scope: str = "group",
    mask: Tensor | None = None,
) -> Tensor:
    if scope == "batch":
        group_size = max(1, rewards.numel())
    return _opo(rewards, group_size=group_size, group_ids=group_ids, mask=mask, lengths=lengths)


@per_group
def reinforce_rej(r: Tensor, groups: Groups) -> Tensor:
    equal = r[groups.start] == r[groups.start + groups.size - 1]
    return r.where(~equal | (groups.size == 1), 0)


@torch.no_grad()
def raft(rewards: Tensor, *, mask: Tensor | None = None) -> Tensor:
    return widened(rewards).clamp(min=0).where(kept(rewards, mask), 0).to(result_dtype(rewards))


@torch.no_grad()
def gpg(
    rewards: Tensor,
    *,
    f_norm: float = 1.0,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    counted = kept(rewards, mask)
    alpha = counted.sum() / widened((counted & (rewards != 0)).sum().clamp(min=1))
    centred = dr_grpo(widened(rewards), group_size=group_size, group_ids=group_ids, mask=mask)
    return (alpha * centred / f_norm).to(result_dtype(rewards))


@torch.no_grad()
def remax(
    rewards: Tensor,
    *,
    baselines: Tensor,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    counted = kept(rewards, mask)
    baseline = widened(baselines)
    if group_size is not None or group_ids is not None:
        baseline = baseline[group_labels(rewards, group_size, group_ids).where(counted, 0)]
    return (widened(rewards) - baseline).where(counted, 0).to(result_dtype(rewards, baselines))


@torch.no_grad()
def reinforce_plus_plus_baseline(
    rewards: Tensor,
    *,
    lengths: Tensor,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    centred = dr_grpo(widened(rewards), group_size=group_size, group_ids=group_ids, mask=mask)
    tokens = widened(lengths).where(kept(rewards, mask), 0)
    return whitened(centred, tokens).to(result_dtype(rewards))
