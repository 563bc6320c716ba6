"""Recurrences and groups without a loop over tokens or groups, and without a host sync."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from inspect import Signature, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..._dtypes import wide


def result_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def widened(x: Tensor) -> Tensor:
    """In the dtype that everything is computed in."""
    return x.to(wide(x))


def kept(like: Tensor, mask: Tensor | None) -> Tensor:
    """Where ``mask`` is not 0, everywhere without one: bool, of the shape of ``like``."""
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask != 0


def shift(x: Tensor, stride: int = 1) -> Tensor:
    """``x_{t + stride}`` along the last dimension, 0 beyond its end."""
    return pad(x[..., stride:], (0, stride))


def suffix_scan(x: Tensor, c: Tensor) -> Tensor:
    """``y_t = x_t + c_t y_{t+1}`` along the last dimension, ``y = 0`` beyond its end, in ``log2(T)`` steps.

    After the step with stride s, ``x_t`` covers the window ``[t, t + 2s)``, ``c_t`` is the factor of what follows it.
    ``c_t = 0`` ends a segment: what follows, nan and inf included, does not reach ``y_t``.
    """
    stride, length = 1, x.shape[-1]
    while stride < length:
        x = torch.where(c == 0, x, x + c * shift(x, stride))
        c = c * shift(c, stride)
        stride *= 2
    return x


def group_labels(rewards: Tensor, group_size: int | None, group_ids: Tensor | None) -> Tensor:
    """``[G]``: the group of each sample, from the one of ``group_size`` and ``group_ids`` that is given."""
    if group_ids is not None:
        return group_ids
    assert group_size is not None
    return torch.arange(rewards.numel(), device=rewards.device) // group_size


class Groups(NamedTuple):
    """Samples sorted by group and, within a group, by ascending reward. All fields are int64 ``[G]``."""

    order: Tensor  # the sample at this position
    start: Tensor  # position at which its group starts
    rank: Tensor  # 0-based rank in the group
    size: Tensor  # number of samples in the group

    @classmethod
    def of(cls, rewards: Tensor, labels: Tensor, kept: Tensor) -> Groups:
        """Samples that are not ``kept`` come last, in groups of their own."""
        order = rewards.argsort(stable=True)
        order = order[labels[order].argsort(stable=True)]
        order = order[(~kept[order]).argsort(stable=True)]
        labels, kept = labels[order], kept[order]
        first = torch.ones_like(kept)
        first[1:] = (labels[1:] != labels[:-1]) | (kept[1:] != kept[:-1])
        position = torch.arange(len(order), device=order.device)
        start = position.where(first, 0).cummax(0).values
        size = torch.zeros_like(start).index_add(0, start, torch.ones_like(start))[start]
        return cls(order, start, position - start, size)

    def suffix_sum(self, x: Tensor) -> Tensor:
        """Sum over this and the higher ranks of the group; samples are the last dimension."""
        return suffix_scan(x, widened(self.rank < self.size - 1))

    def prefix_sum(self, x: Tensor) -> Tensor:
        """Sum over this and the lower ranks of the group."""
        return suffix_scan(x.flip(0), widened(self.rank > 0).flip(0)).flip(0)

    def total(self, x: Tensor) -> Tensor:
        """Sum over the group."""
        return self.suffix_sum(x)[..., self.start]


def per_group(estimate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorator: from ``estimate(sorted rewards, groups, ...)`` to a function of rewards in any order and of a mask."""

    @torch.no_grad()
    def of_samples(
        rewards: Tensor,
        *,
        group_size: int | None = None,
        group_ids: Tensor | None = None,
        mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        counted = kept(rewards, mask)
        r = widened(rewards)
        groups = Groups.of(r, group_labels(rewards, group_size, group_ids), counted)
        result = torch.empty_like(r).index_copy(0, groups.order, estimate(r[groups.order], groups, **options))
        return result.where(counted, 0).to(result_dtype(rewards))

    *common, _ = signature(of_samples).parameters.values()
    _, _, *own = signature(estimate).parameters.values()
    of_samples.__signature__ = Signature([*common, *own])  # type: ignore[attr-defined]
    return update_wrapper(of_samples, estimate)
