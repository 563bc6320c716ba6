"""Sums of log-probs over segments: whole sequences, or the reasoning steps or turns of each.

Losses of segments (:mod:`fusedpo.preferences`) see the policy through these sums only, so that their gradient is one
number per segment, the same at each of its tokens. Sums, counts and what is made of them are small: float64, where the
device has it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _tokens
from ._dtypes import wide
from .ops import LIBRARY
from .reference.layout import layout

__all__ = ["Segments", "segment_sums", "segments_of", "sequence_logprobs"]


class Segments(NamedTuple):
    """Which segment each token belongs to. All tensors are flat, ``[tokens]``."""

    ids: Tensor
    """int64, in ``[0, number)``: the sequence, or ``sequence * S + step``; of no meaning where ``kept`` is False."""
    kept: Tensor
    """bool: which tokens are in a segment."""
    shape: tuple[int, ...]
    """``[num_sequences]`` or ``[num_sequences, S]``, one entry per segment."""
    ascending: bool
    """Whether ``ids`` never decrease."""

    @property
    def number(self) -> int:
        return math.prod(self.shape)

    def only(self, kept: Tensor) -> Segments:
        return self._replace(kept=self.kept & kept)

    def sizes(self) -> Tensor:
        """``[number]``: how many tokens each segment has."""
        return segment_sums(self.kept.float(), None, None, self)

    def per_token(self, x: Tensor) -> Tensor:
        """``x``, one per segment, at each token; 0 (False) where it is in none."""
        return x[self.ids].masked_fill(~self.kept, 0) if x.numel() else x.new_zeros(self.ids.shape)


def sequence_logprobs(
    logprobs: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    step_ids: Tensor | None = None,
    num_steps: int | None = None,
    token_weights: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """The sum over each sequence, or each of its steps, of ``logprobs - ref_logprobs``.

    Any function of such sums is plain PyTorch on top (docs/segments.md). They are sums of differences, accumulated in
    float64: a difference of two sums loses the digits that matter where sequences are long.

    Args:
        logprobs: in nats, floating-point: padded ``[B, T]``, or packed ``[T]`` or ``[1, T]`` with ``cu_seqlens``;
            ``[T]`` without ``cu_seqlens`` is one sequence.
        ref_logprobs: of the same shape, subtracted; None subtracts nothing.
        mask: of the same shape; nonzero keeps a token. The others add nothing, and what they hold is not read.
        cu_seqlens: ``[num_sequences + 1]``, int32 or int64: where each packed sequence starts, and the number of
            tokens.
        step_ids: of the shape of ``logprobs``, int32 or int64: the step or turn of each token, counted from 0 in every
            sequence; below 0 a token is in none. The tokens of a step need not be neighbours.
        num_steps: ``S``, how many steps a sequence has at most. None: one more than the largest of ``step_ids``, which
            costs a sync; under ``torch.compile`` it is needed.
        token_weights: of the shape of ``logprobs``; multiply the differences.
        normalize: divide by the number of kept tokens of the segment, not by the sum of their weights.

    Returns:
        ``[num_sequences]``, with ``step_ids`` ``[num_sequences, S]``: float64 for float64 ``logprobs``, else float32;
        0 for a segment without kept token. Differentiable with respect to ``logprobs``, and nothing else is: the
        gradient of a token is that of its segment, times its weight, over the length of the segment if ``normalize``.

    Raises:
        TypeError: types and dtypes. ValueError: shapes, devices, ``cu_seqlens`` that are no offsets, steps beyond
            ``num_steps`` (as all values, where reading them is free; elsewhere such tokens are in no segment).
    """
    _checks.floating("logprobs", logprobs)
    segments = segments_of("logprobs", logprobs, logprobs, mask, cu_seqlens, step_ids, num_steps)
    for name, tensor in (("ref_logprobs", ref_logprobs), ("token_weights", token_weights)):
        if tensor is not None:
            _tokens.check_per_token(name, tensor, "logprobs", logprobs)
    sums = segment_sums(logprobs, ref_logprobs, token_weights, segments)
    if normalize:
        sums = sums / segments.sizes().clamp(min=1)
    return sums.reshape(segments.shape).to(torch.promote_types(logprobs.dtype, torch.float32))


def segments_of(
    name: str,
    source: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    step_ids: Tensor | None,
    num_steps: int | None,
) -> Segments:
    """The segments of ``tokens``, those of the argument ``name``, ``source``; checks what it is given."""
    sequences = _tokens.check_layout(name, source, mask, cu_seqlens, tokens.shape)
    where = layout(tokens, cu_seqlens)
    ids, kept = where.sequence, where.kept(mask)
    if step_ids is None:
        if num_steps is not None:
            raise ValueError(f"num_steps has no meaning without step_ids, got {num_steps}")
        return Segments(ids, kept, (sequences,), ascending=True)

    _checks.integer("step_ids", step_ids)
    _checks.shape("step_ids", step_ids, tuple(tokens.shape), f"one per token of {name}")
    _checks.same_device("step_ids", step_ids, name, source)
    steps = step_ids.reshape(-1).to(torch.int64)
    if num_steps is None:
        if torch.compiler.is_compiling():
            raise ValueError("num_steps is needed with step_ids under torch.compile, got None")
        num_steps = int(steps.where(kept, -1).max()) + 1 if steps.numel() else 0
        num_steps = max(num_steps, 1)
    _checks.whole_number("num_steps", num_steps, at_least=1, expected="an int or None")
    if _checks.values_are_free(steps) and bool(((steps >= num_steps) & kept).any()):
        raise ValueError(f"step_ids must be less than num_steps={num_steps}, got {int(steps.where(kept, -1).max())}")
    kept = kept & (steps >= 0) & (steps < num_steps)
    return Segments((ids * num_steps + steps).where(kept, 0), kept, (sequences, num_steps), ascending=False)


def segment_sums(x: Tensor, minus: Tensor | None, weights: Tensor | None, segments: Segments) -> Tensor:
    """``[number]``: the sum over each segment of ``(x - minus) * weights``, of values per token.

    float64, float32 where the device has no float64. Differentiable with respect to ``x``.
    """
    flat = [None if t is None else t.reshape(-1).detach() for t in (minus, weights)]
    return torch.ops.fusedpo.segment_sums(
        x.reshape(-1), *flat, segments.ids, segments.kept, segments.number, segments.ascending
    )


# ------------------------------------------------------------------------------------------------------------- operator


LIBRARY.define(
    "segment_sums(Tensor x, Tensor? minus, Tensor? weights, Tensor ids, Tensor kept, SymInt count, bool ascending)"
    " -> Tensor"
)


def _segment_sums(
    x: Tensor, minus: Tensor | None, weights: Tensor | None, ids: Tensor, kept: Tensor, count: int, ascending: bool
) -> Tensor:
    dtype = wide(x)
    x = x.to(dtype)
    if minus is not None:
        x = x - minus.to(dtype)
    if weights is not None:
        x = x * weights.to(dtype)
    x = x.masked_fill(~kept, 0)
    if x.device.type == "cpu":
        return x.new_zeros(count).index_add_(0, ids, x)
    return _sums_by_offsets(x, ids, count, ascending)


def _sums_by_offsets(x: Tensor, ids: Tensor, count: int, ascending: bool) -> Tensor:
    """Without atomics: the tokens of a segment side by side, one tree per segment."""
    if not ascending:
        ids, order = ids.sort(stable=True)
        x = x[order]
    offsets = torch.searchsorted(ids, torch.arange(count + 1, device=ids.device))
    return torch.segment_reduce(x, "sum", offsets=offsets, unsafe=True)


def _backward(ctx: Any, gradient: Tensor) -> Any:
    ids, kept, weights = ctx.saved_tensors
    per_token = gradient[ids] if gradient.numel() else gradient.new_zeros(ids.shape)
    if weights is not None:
        per_token = per_token * weights
    return per_token.masked_fill(~kept, 0).to(ctx.dtype), None, None, None, None, None, None


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, _, weights, ids, kept, _, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(ids, kept, weights)


LIBRARY.impl("segment_sums", _segment_sums, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fusedpo::segment_sums",
    lambda x, minus, weights, ids, kept, count, ascending: x.new_empty(count, dtype=wide(x)),
    lib=LIBRARY,
)
torch.library.register_autograd("fusedpo::segment_sums", _backward, setup_context=_setup_context, lib=LIBRARY)
