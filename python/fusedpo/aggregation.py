"""From a value per token to one number, and by what a batch that is spread over ranks is divided."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch import distributed as dist

from . import _checks, _tokens
from .objectives import Aggregation, Objective, as_objective
from .reference import aggregation as reference
from .reference.advantages.segments import result_dtype
from .reference.layout import layout

__all__ = ["aggregate", "global_denominator", "to_floats"]


def aggregate(
    tokens: Tensor,
    aggregation: Aggregation = "token-mean",
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    length_norm: float | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """What :func:`fusedpo.policy_loss` does with the losses of tokens, for a loss of your own.

    Args:
        tokens: floating-point, padded ``[B, T]``, or packed ``[T]`` or ``[1, T]`` with ``cu_seqlens``.
        mask, cu_seqlens, denominator: as in :func:`fusedpo.policy_loss`.
        aggregation, length_norm: as in :class:`fusedpo.Objective`.

    Returns:
        0-d, float64 for float64 ``tokens``, else float32; differentiable with respect to ``tokens``. 0, with a gradient
        of 0, where no token is kept.

    Raises:
        TypeError: types and dtypes. ValueError: shapes, devices, ``cu_seqlens`` that are no offsets, ``denominator``
            where nothing is divided, ``length_norm`` without the aggregation that it belongs to.
    """
    mask, cu_seqlens, length_norm, denominator = _checks.taken(mask, cu_seqlens, length_norm, denominator)
    Objective(aggregation=aggregation, length_norm=length_norm)
    _checks.floating("tokens", tokens)
    _tokens.check_layout("tokens", tokens, mask, cu_seqlens)
    _tokens.check_denominator(denominator, aggregation, "tokens", tokens)
    where = layout(tokens, cu_seqlens)
    kept = where.kept(mask)
    flat = tokens.reshape(-1).to(result_dtype(tokens)).masked_fill(~kept, 0)
    return reference.aggregate(flat, kept, where, aggregation, length_norm=length_norm, denominator=denominator)


def global_denominator(
    mask: Tensor,
    objective: Objective | str,
    group: dist.ProcessGroup | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The ``denominator`` with which data-parallel training takes the mean over the batch of all ranks.

    Each rank passes the mask of its part of the batch: the micro-batches that one optimiser step accumulates, together
    (or one by one, and adds up the results). Counted is what ``objective.aggregation`` averages over, kept tokens for
    ``token-mean`` and sequences with a kept token for ``seq-mean-*``, over all ranks, and divided by the number of
    ranks: ``DistributedDataParallel`` and FSDP average the gradients of ranks, so the sum of their losses is divided
    by the global count. ``seq-mean-token-sum-norm`` needs a ``length_norm`` besides, or ranks divide by different
    widths. ``token-sum`` divides by nothing: there, the number of ranks belongs into ``loss_scale``.

    Args:
        mask: ``[B, T]``, or packed ``[T]`` or ``[1, T]`` with ``cu_seqlens``; nonzero keeps a token.
        group: the ranks between which the batch is split; None: all. Without ``torch.distributed``, one rank.

    Returns:
        0-d float32, on the device of ``mask``. It stays there: nothing waits for the device.

    Raises:
        TypeError: types. ValueError: shapes, ``cu_seqlens`` that are no offsets, an objective that divides by nothing.
    """
    objective = as_objective(objective)
    if objective.aggregation == "token-sum":
        raise ValueError("objective must average over something, got aggregation='token-sum'")
    _checks.is_tensor("mask", mask)
    _tokens.check_layout("mask", mask, mask, cu_seqlens)
    kept = mask.reshape(-1) != 0
    if objective.aggregation == "token-mean":
        count = kept.sum()
    else:
        count = (layout(mask, cu_seqlens).sum_per_sequence(kept.long()) > 0).sum()
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count, group=group)
        ranks = dist.get_world_size(group)
    return count.to(torch.float32) / ranks


def to_floats(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """The metrics of a loss as Python numbers, for a logger: one wait for the device, not one for each.

    Args:
        metrics: 0-d tensors on one device, or numbers, by name: ``out.metrics``, or those of several losses in one.

    Raises:
        ValueError: a tensor that holds more than a number.
    """
    tensors = {name: x for name, x in metrics.items() if isinstance(x, Tensor)}
    for name, x in tensors.items():
        _checks.shape(f"metrics[{name!r}]", x, (), "a number")
    if not tensors:
        return {name: float(x) for name, x in metrics.items()}
    dtype = result_dtype(*tensors.values())
    numbers = iter(torch.stack([x.detach().to(dtype) for x in tensors.values()]).tolist())
    return {name: next(numbers) if name in tensors else float(x) for name, x in metrics.items()}
