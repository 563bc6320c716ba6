"""What the loss of a token is computed from, besides its log-prob: one record on the whole way to the kernels."""

from __future__ import annotations

from typing import NamedTuple

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

    def checked(self, name: str, source: Tensor, objective: Objective, *, features: int = 0) -> Batch:
        """For the tokens of ``source``, the argument ``name``, which has ``features`` dimensions beyond theirs."""
        batch = Batch(*_checks.taken(*self))
        _checks.floating(name, source)
        shape = source.shape[: source.dim() - features]
        num_sequences = _tokens.check_layout(name, source, batch.mask, batch.cu_seqlens, shape)
        for argument, tensor in (("old_logprobs", batch.old_logprobs), ("ref_logprobs", batch.ref_logprobs)):
            if tensor is not None:
                _tokens.check_per_token(argument, tensor, name, source, shape)
        if objective.kl is not None and batch.ref_logprobs is None:
            raise ValueError(f"ref_logprobs is needed by objective.kl={objective.kl}, got None")
        _tokens.check_weights("advantages", batch.advantages, name, source, num_sequences, shape)
        if batch.is_weights is not None:
            _tokens.check_weights("is_weights", batch.is_weights, name, source, num_sequences, shape)
        _tokens.check_number("loss_scale", batch.loss_scale, name, source)
        _tokens.check_denominator(batch.denominator, objective.aggregation, name, source)
        return batch

    def as_kernels_take_it(self, tokens: Tensor) -> Batch:
        """As the schemas have it: dtypes, shapes and numbers as tensors, for ``tokens`` of any dtype."""

        def per_token_or_sequence(x: Tensor) -> Tensor:
            per_token = x.shape[-1:] == tokens.shape[-1:] and x.numel() == tokens.numel()
            return x.float().reshape(tokens.shape if per_token else (-1, 1))

        def number(x: float | Tensor) -> Tensor:
            return x.float() if isinstance(x, Tensor) else ops.scalar(x, tokens.device)

        return self._replace(
            old_logprobs=None if self.old_logprobs is None else self.old_logprobs.float(),
            advantages=per_token_or_sequence(self.advantages),
            mask=as_bool(self.mask),
            cu_seqlens=None if self.cu_seqlens is None else self.cu_seqlens.to(torch.int64),
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs.float(),
            is_weights=None if self.is_weights is None else per_token_or_sequence(self.is_weights),
            denominator=None if self.denominator is None else number(self.denominator),
            loss_scale=number(self.loss_scale),
        )


def as_bool(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dtype == torch.bool else mask != 0
