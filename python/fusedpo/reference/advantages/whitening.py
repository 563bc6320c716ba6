"""Mean 0 and variance 1 over a batch."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from .segments import result_dtype, widened


def whitened(x: Tensor, weights: Tensor, group: distributed.ProcessGroup | None = None) -> Tensor:
    """``(x - mean) / sqrt(var + 1e-8)`` with each element counted ``weights`` times; 0 where that is 0."""
    kept = weights > 0
    x = x.where(kept, 0)
    count, total = _summed(torch.stack([weights.sum(), (weights * x).sum()]), group)
    centred = x - total / count
    variance = _summed((weights * centred.square()).sum(), group) / (count - 1).clamp(min=1)
    return (centred * (variance + 1e-8).rsqrt()).where(kept, 0)


def _summed(x: Tensor, group: distributed.ProcessGroup | None) -> Tensor:
    """Sum over the processes of ``group``."""
    if group is not None:
        distributed.all_reduce(x, group=group)
    return x


@torch.no_grad()
def whiten(advantages: Tensor, *, mask: Tensor | None = None, group: distributed.ProcessGroup | None = None) -> Tensor:
    x = widened(advantages)
    weights = torch.ones_like(x)
    if mask is not None:
        weights = weights.where(mask != 0, 0)
    return whitened(x, weights, group).to(result_dtype(advantages))
