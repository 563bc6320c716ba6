"""From the losses of tokens to the loss of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives import Aggregation
from .layout import Layout


def aggregate(
    loss: Tensor,
    kept: Tensor,
    where: Layout,
    aggregation: Aggregation,
    *,
    length_norm: float | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """``loss`` and ``kept`` are flat, ``loss`` is 0 where ``kept`` is false. See :class:`fusedpo.Objective`."""
    sums = where.sum_per_sequence(loss)
    if aggregation == "token-sum":
        return sums.sum()
    counts = where.sum_per_sequence(kept.to(loss.dtype))
    if aggregation == "token-mean":
        return _divide(sums.sum(), counts.sum() if denominator is None else denominator)
    if aggregation == "seq-mean-token-mean":
        sums = _divide(sums, counts)
    elif aggregation == "seq-mean-token-sum-norm":
        longest = torch.cat((where.lengths, where.lengths.new_ones(1))).amax()
        sums = sums / (longest if length_norm is None else length_norm)
    return _divide(sums.sum(), (counts > 0).sum() if denominator is None else denominator)


def scaled(loss: Tensor, factor: float | Tensor) -> Tensor:
    """``loss`` times a number, or a 0-d tensor that has no gradient."""
    return loss * (factor.detach().to(loss.dtype) if isinstance(factor, Tensor) else factor)


def _divide(total: Tensor, count: float | Tensor) -> Tensor:
    """``total / count``; nothing, counted as 0, divides by 1."""
    if isinstance(count, Tensor):
        return total / count.detach().to(total.dtype).masked_fill(count == 0, 1)
    return total / (count or 1)
