"""Metrics of a whole optimiser step, from those of its micro-batches on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_COUNTS = ("tokens", "rows")
_EXTREMES = ("ratio_min", "ratio_max", "trace_min", "trace_max")


def reduce_metrics(
    metrics: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]], group: ProcessGroup | None = None
) -> dict[str, Tensor]:
    """The metrics of all tokens, from ``out.metrics`` of each micro-batch on each rank.

    Counts are added up; means are weighted by ``tokens``; minima and maxima leave out batches without a token. ``ess``
    follows from the sums of the weights and of their squares, with ``ratio_mean * trace_mean`` for the mean weight:
    exact without a trace, close to it with one. Metrics of other names are taken for means over the tokens.

    Args:
        metrics: those of one batch, or a list of those of the micro-batches of a step; the same names on all ranks.
        group: the ranks between which the batch is split, data parallel alone: ranks of a ``ContextParallel`` and of a
            ``tp_group`` have the metrics of all their tokens already. None: all ranks. Without ``torch.distributed``,
            one.

    Returns 0-d tensors on the device of the metrics, float32, the same on all ranks. Two small reductions, started
    together, which the host does not wait for.
    """
    batches = [metrics] if isinstance(metrics, Mapping) else list(metrics)
    if not batches:
        raise ValueError(
            "metrics must be those of at least one batch, got none: a rank that ran out passes an empty one"
        )
    names = list(batches[0])
    if "tokens" not in names:
        raise ValueError(f"metrics must hold 'tokens', got {names}")
    if any(list(batch) != names for batch in batches):
        raise ValueError("metrics must have the same names in all batches")
    values = torch.stack([torch.stack([b[name].detach().to(torch.float64) for name in names]) for b in batches])
    of = dict(zip(names, values.unbind(1), strict=True))
    tokens = of["tokens"]

    means = [name for name in names if name not in (*_COUNTS, *_EXTREMES, "ess")]
    sums = [of[name].sum() for name in names if name in _COUNTS] + [(of[name] * tokens).sum() for name in means]
    if "ess" in of:
        weight = torch.ones_like(tokens)
        for name in ("ratio_mean", "trace_mean"):
            weight = weight * of.get(name, 1)
        squares = (tokens * weight.square() / of["ess"]).where(tokens > 0, 0)
        sums += [(tokens * weight).sum(), squares.sum()]
    signs = {name: -1 if name.endswith("_min") else 1 for name in names if name in _EXTREMES}
    largest = [(sign * of[name]).where(tokens > 0, -torch.inf).amax() for name, sign in signs.items()]

    totals = torch.stack(sums)
    most = torch.stack(largest) if largest else totals.new_zeros(0)
    if dist.is_available() and dist.is_initialized():
        works = [dist.all_reduce(totals, group=group, async_op=True)]
        if largest:
            works.append(dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group, async_op=True))
        for work in works:
            work.wait()

    found = dict(zip([name for name in names if name in _COUNTS] + means, totals.unbind(), strict=False))
    count = found["tokens"]
    result = {name: x / count.clamp(min=1) if name in means else x for name, x in found.items()}
    for (name, sign), x in zip(signs.items(), most.unbind(), strict=True):
        result[name] = (sign * x).where(count > 0, 0)
    if "ess" in of:
        weights, squares = totals[-2:].unbind()
        result["ess"] = (weights.square() / (count * squares)).where(count * squares > 0, 0)
    return {name: result[name].to(torch.float32) for name in names}
