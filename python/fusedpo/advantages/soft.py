"""Soft values of groups, and advantages between the tokens at which they were estimated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks
from ..reference.advantages.segments import Groups, kept, per_group, result_dtype
from .samples import Array, samples


def soft_value(
    rewards: Array,
    *,
    beta: float,
    group_size: int | None = None,
    group_ids: Array | None = None,
    mask: Array | None = None,
    trajectory_ids: Array | None = None,
) -> Tensor:
    """``beta log mean exp(r / beta)`` of the group, the optimal value under a KL penalty: a baseline, not an advantage.

    ``[G]`` to ``[G]``, every kept sample has the value of its group. For samples of the reference policy it estimates
    the ``V`` of A*-PO (2505.20686), whose authors take ``beta=0.5`` and 8 samples. It lies between mean and maximum,
    which are its limits: ``beta=inf`` gives the mean, ``beta=0`` the maximum. A finite group underestimates it, by
    about ``beta Var(e^(r / beta)) / (2 n E[e^(r / beta)]^2)``. Nothing overflows for a small ``beta``.

    Raises as the package says; ``ValueError`` for a negative ``beta``.
    """
    given = samples(rewards, group_size, group_ids, mask, trajectory_ids)
    _checks.number("beta", beta)
    if not beta >= 0:
        raise ValueError(f"beta must be >= 0, got {beta}")
    return given.returned(_soft_value(**given.groups._asdict(), beta=beta))


@per_group
def _soft_value(r: Tensor, groups: Groups, *, beta: float) -> Tensor:
    highest = r[groups.start + groups.size - 1]
    if beta == 0:
        return highest
    below = r - highest
    if math.isinf(beta):
        return highest + groups.total(below) / groups.size
    return highest + beta * torch.log1p(groups.total(torch.expm1(below / beta)) / groups.size)


@torch.no_grad()
def interpolate(advantages: Tensor, places: Tensor, mask: Tensor) -> Tensor:
    """Advantages of all tokens from those at some: linear in the number of kept tokens between two anchors.

    ``advantages`` ``[B, S]``: of S anchors per row. ``places`` ``[B, S]``, int32 or int64: how many kept tokens stand
    before the anchor, in ascending order, -1 where there is none. ``mask`` ``[B, T]``, nonzero keeps a token. Returns
    ``[B, T]``: constant before the first anchor and after the last one, 0 in a row without anchors and at masked
    tokens. What ``advantages`` hold where there is no anchor is not read.

    TRePO (2506.02553) interpolates between tokens whose advantage was estimated by rollouts; which interpolation is
    not known to us, the linear one is our own. Raises as the package says; ``ValueError`` for places that descend.
    """
    _checks.floating("advantages", advantages)
    if advantages.dim() != 2:
        raise ValueError(f"advantages must have shape [B, S], one per anchor, got {list(advantages.shape)}")
    _checks.integer("places", places)
    _checks.shape("places", places, tuple(advantages.shape), "one per anchor")
    _checks.same_device("places", places, "advantages", advantages)
    _checks.is_tensor("mask", mask)
    batch, anchors = advantages.shape
    if mask.dim() != 2 or mask.shape[0] != batch:
        raise ValueError(f"mask must have shape [{batch}, T] (as many rows as advantages), got {list(mask.shape)}")
    _checks.mask(mask, tuple(mask.shape), "one per token", "advantages", advantages)

    is_kept, dtype = kept(mask, mask), result_dtype(advantages)
    if anchors == 0:
        return advantages.new_zeros(mask.shape, dtype=dtype)
    none = torch.iinfo(torch.int64).max
    at = places.to(torch.int64)
    exists = at >= 0
    number = exists.sum(1, keepdim=True)
    at, order = at.where(exists, none).sort(dim=1, stable=True)
    if _checks.values_are_free(places) and bool(((order.diff(dim=1) < 0) & (at[:, 1:] < none)).any()):
        raise ValueError("places must ascend in every row, but for -1")
    a = advantages.double().gather(1, order).where(at < none, 0)

    place = is_kept.long().cumsum(1) - 1
    after = torch.searchsorted(at, place, right=True)
    left, right = (x.minimum(number - 1).clamp(min=0) for x in (after - 1, after))
    start, end = at.gather(1, left), at.gather(1, right)
    fraction = (place - start).double() / (end - start).clamp(min=1)
    fraction = fraction.clamp(0, 1)  # before the first anchor and after the last one
    low, high = a.gather(1, left), a.gather(1, right)
    return torch.lerp(low, high, fraction).where(is_kept & (number > 0), 0).to(dtype)
