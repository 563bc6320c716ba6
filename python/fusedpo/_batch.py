"""What the loss of a token is computed from, besides its log-prob: one record on the whole way to the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _tokens, ops
from .objectives import Objective


class Batch(NamedTuple):
    """Arguments that all losses share, in the order of every operator's schema: ``*batch`` spells them."""

    old_logprobs: Tensor | None
    advantages: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    ref_logprobs: Tensor | None
    is_weights: Tensor | None
    denominator: float | Tensor | None
    loss_scale: float | Tensor

    @property
    def tokens(self) -> tuple[Tensor | None, ...]:
        """Without the numbers of the aggregation."""
        return self[:6]

    def as_kernels_take_it(self, tokens: Tensor) -> Batch:
        """As the schemas have it: dtypes, shapes and numbers as tensors, for ``tokens`` of any dtype."""
        old_logprobs, advantages, mask, cu_seqlens, ref_logprobs, is_weights, denominator, loss_scale = self
        return Batch(
            None if old_logprobs is None else as_float(old_logprobs),
            _per_token_or_sequence(advantages, tokens),
            as_bool(mask),
            None if cu_seqlens is None else cu_seqlens.to(torch.int64),
            None if ref_logprobs is None else as_float(ref_logprobs),
            None if is_weights is None else _per_token_or_sequence(is_weights, tokens),
            None if denominator is None else ops.as_scalar(denominator, tokens.device),
            ops.as_scalar(loss_scale, tokens.device),
        )


def checked(batch: tuple[Any, ...], name: str, source: Tensor, objective: Objective, *, features: int = 0) -> Batch:
    """The fields ``batch``, for the tokens of ``source``, the argument ``name``, which has ``features`` dimensions
    beyond theirs.
    """
    old_logprobs, advantages, mask, cu_seqlens, ref_logprobs, is_weights, denominator, loss_scale = batch = (
        _checks.taken(*batch)
    )
    _checks.floating(name, source)
    shape = source.shape[:-features] if features else source.shape
    num_sequences = _tokens.check_layout(name, source, mask, cu_seqlens, shape)
    if old_logprobs is not None:
        _tokens.check_per_token("old_logprobs", old_logprobs, name, source, shape)
    if ref_logprobs is not None:
        _tokens.check_per_token("ref_logprobs", ref_logprobs, name, source, shape)
    elif objective.kl is not None:
        raise ValueError(f"ref_logprobs is needed by objective.kl={objective.kl}, got None")
    _tokens.check_weights("advantages", advantages, name, source, num_sequences, shape)
    if is_weights is not None:
        _tokens.check_weights("is_weights", is_weights, name, source, num_sequences, shape)
    _tokens.check_number("loss_scale", loss_scale, name, source)
    _tokens.check_denominator(denominator, objective.aggregation, name, source)
    return Batch(*batch)


def _per_token_or_sequence(x: Tensor, tokens: Tensor) -> Tensor:
    per_token = x.numel() == tokens.numel() and x.shape[-1:] == tokens.shape[-1:]
    return as_float(x).reshape(tokens.shape if per_token else (-1, 1))


def as_float(x: Tensor) -> Tensor:
    """``x.float()``, which asks the dispatcher only where there is something to do."""
    return x if x.dtype == torch.float32 else x.float()


def as_bool(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dtype == torch.bool else mask != 0
