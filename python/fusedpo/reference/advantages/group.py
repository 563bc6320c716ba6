"""Rewards compared with a baseline of their group."""

from __future__ import annotations

import torch
from torch import Tensor

from .segments import Groups, per_group


def _minus_mean(rewards: Tensor, groups: Groups, weights: Tensor) -> Tensor:
    """``r - sum(w r) / sum(w)``; 0 where all weights of the group are 0.

    Taken from the differences to the lowest reward: equal rewards give exactly 0, nearly equal ones keep their digits.
    """
    above_lowest = rewards - rewards[groups.start]
    weight = groups.total(weights)
    mean = groups.total((weights * above_lowest).where(weights > 0, 0)) / weight
    return (above_lowest - mean).where(weight > 0, 0)


def grpo(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    std: bool = True,
    eps: float = 1e-6,
    mask: Tensor | None = None,
) -> Tensor:
    def estimate(r: Tensor, groups: Groups) -> Tensor:
        advantages = _minus_mean(r, groups, torch.ones_like(r))
        if not std:
            return advantages
        variance = groups.total(advantages.square()) / (groups.size - 1).clamp(min=1)
        return advantages / (variance.sqrt() + eps)

    return per_group(estimate, rewards, group_size, group_ids, mask)


def dr_grpo(
    rewards: Tensor, *, group_size: int | None = None, group_ids: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    return grpo(rewards, group_size=group_size, group_ids=group_ids, std=False, mask=mask)


def rloo(
    rewards: Tensor, *, group_size: int | None = None, group_ids: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    def estimate(r: Tensor, groups: Groups) -> Tensor:
        # r - mean of the others = n / (n - 1) (r - mean of all)
        return _minus_mean(r, groups, torch.ones_like(r)) * groups.size / (groups.size - 1).clamp(min=1)

    return per_group(estimate, rewards, group_size, group_ids, mask)


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

    def estimate(r: Tensor, groups: Groups) -> Tensor:
        return _minus_mean(r, groups, lengths.double()[groups.order])

    return per_group(estimate, rewards, group_size, group_ids, mask)
