"""The loss of a value model, for advantages by :func:`fusedpo.advantages.gae`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _tokens
from .objectives import Aggregation, Objective
from .reference.advantages.segments import result_dtype
from .reference.aggregation import aggregate, scaled

__all__ = ["ValueLossOutput", "value_loss"]


class ValueLossOutput(NamedTuple):
    """``loss`` is differentiable. ``clip_frac``, detached: the fraction of tokens whose gradient the clip cut."""

    loss: Tensor
    clip_frac: Tensor


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    *,
    clip: float | None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    aggregation: Aggregation = "token-mean",
    length_norm: float | None = None,
    denominator: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
) -> ValueLossOutput:
    """PPO's clipped squared error ``max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2) / 2``, aggregated.

    Args:
        values: predicted by the model that is trained, floating-point: padded ``[B, T]``, or packed ``[T]`` or
            ``[1, T]`` with ``cu_seqlens``.
        old_values: like ``values``, predicted when the sequences were sampled. Needed unless ``clip`` is None.
        returns: like ``values``: the targets, advantages plus old values.
        clip: how far a value may move from the old one, as verl's ``cliprange_value``; None does not clip.
        mask, cu_seqlens, denominator, loss_scale: as in :func:`fusedpo.policy_loss`.
        aggregation, length_norm: as in :class:`fusedpo.Objective`.

    Returns:
        ``loss``: 0-d, float64 for float64 ``values``, else float32; 0 with a gradient of 0 where no token is kept.
        Differentiable with respect to ``values``; where the clip makes no difference the gradient is ``v - R``.

    Raises:
        TypeError: types and dtypes. ValueError: shapes, devices, ``cu_seqlens`` that are no offsets, a ``clip`` below 0
            or without ``old_values``, ``denominator`` or ``length_norm`` where they have no meaning.
    """
    old_values, returns, clip, mask, cu_seqlens, length_norm, denominator, loss_scale = _checks.taken(
        old_values, returns, clip, mask, cu_seqlens, length_norm, denominator, loss_scale
    )
    Objective(aggregation=aggregation, length_norm=length_norm)
    _checks.floating("values", values)
    where, kept = _tokens.layout_of("values", values, mask, cu_seqlens)
    _tokens.check_per_token("returns", returns, "values", values)
    if old_values is not None:
        _tokens.check_per_token("old_values", old_values, "values", values)
    if clip is not None:
        _checks.number("clip", clip, "a float or None")
        if not clip >= 0:
            raise ValueError(f"clip must be >= 0 or None, got {_checks.brief(clip)}")
        if old_values is None:
            raise ValueError(f"old_values are needed by clip={clip}, got None")
    _tokens.check_denominator(denominator, aggregation, "values", values)
    _tokens.check_number("loss_scale", loss_scale, "values", values)

    dtype = result_dtype(values)

    def tokens(x: Tensor) -> Tensor:
        return x.reshape(-1).to(dtype).masked_fill(~kept, 0)

    v, target = tokens(values), tokens(returns).detach()
    loss = (v - target).square()
    clipped = torch.zeros_like(kept)
    if clip is not None:
        assert old_values is not None
        old = tokens(old_values).detach()
        bounded = (v.clamp(old - clip, old + clip) - target).square()
        clipped = bounded > loss
        loss = loss.where(~clipped, bounded)
    total = aggregate(loss / 2, kept, where, aggregation, length_norm=length_norm, denominator=denominator)
    return ValueLossOutput(scaled(total, loss_scale), aggregate(clipped.to(dtype), kept, where, "token-mean"))
