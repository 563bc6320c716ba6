"""Which position a value belongs to: from the alignment of an inference engine to that of the logits.

The logits at position t predict token t + 1, so everything about that token stands at position t: its id, its mask, the
log-prob with which it was sampled. Inference engines and data sets have it the other way round: at position t, what
belongs to token t. :func:`next_tokens` moves ids and masks, :func:`shift` everything else that has a value per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _checks, reference
from ._ranks import split_sequences

if TYPE_CHECKING:
    from .distributed import ContextParallel

__all__ = ["cu_seqlens", "next_tokens", "shift"]


@split_sequences("input_ids", "mask", "attention_mask")
def next_tokens(
    input_ids: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    ignore_index: int | None = -100,
    cp: ContextParallel | None = None,
) -> tuple[Tensor, Tensor]:
    """The token that each position predicts, and which positions predict a kept one.

    Position t predicts token t+1. Rolling the ids costs nothing; slicing the logits instead, ``logits[:, :-1]``, makes
    autograd write a tensor of their size once more in the backward. What else has a value per token, such as the
    log-probs of an inference engine, is moved by :func:`shift`.

    Args:
        input_ids: int32 or int64, padded ``[B, T]``, or packed ``[T]`` or ``[1, T]`` with ``cu_seqlens``; ``[T]``
            without ``cu_seqlens`` is one sequence. Labels are fine, too.
        mask: like ``input_ids``, bool, integer or floating-point; nonzero keeps a token.
        cu_seqlens: ``[num_sequences + 1]``, int32 or int64: where each packed sequence starts, and their number.
        attention_mask: like ``mask``, 0 at padding. Padding is not predicted and, on the left, predicts nothing.
        ignore_index: tokens with this id are not kept. None: all ids count.
        cp: how sequences are split over ranks (:class:`fusedpo.ContextParallel`): the token after the last one of a
            piece lies on another rank. Calling this before the batch is split needs no communication.

    Returns:
        ``token_ids`` and a bool ``mask``, shaped like ``input_ids``: at t, id and mask of t+1. The last position
        of a sequence predicts nothing: id 0, mask False.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, ``cu_seqlens`` that are no offsets.
    """
    _checks.integer("input_ids", input_ids)
    _check_layout("input_ids", input_ids, cu_seqlens)
    _checks.mask(mask, tuple(input_ids.shape), "like input_ids", "input_ids", input_ids)
    kept = None if mask is None else mask != 0
    if ignore_index is not None:
        _checks.whole_number("ignore_index", ignore_index, -(1 << 31), "an int or None")
        counts = input_ids != ignore_index
        kept = counts if kept is None else kept & counts
    if attention_mask is not None:
        _checks.real("attention_mask", attention_mask)
        _checks.shape("attention_mask", attention_mask, tuple(input_ids.shape), "like input_ids")
        _checks.same_device("attention_mask", attention_mask, "input_ids", input_ids)
        is_token = attention_mask != 0
        kept = is_token if kept is None else kept & is_token
    token_ids, predicts = reference.next_tokens(input_ids, kept, cu_seqlens)
    return token_ids, predicts if attention_mask is None else predicts & is_token


@split_sequences("x")
def shift(x: Tensor, cu_seqlens: Tensor | None = None, *, fill: float = 0, cp: ContextParallel | None = None) -> Tensor:
    """``x`` at the next token: at position t what stood at t + 1 of the same sequence, ``fill`` at its last position.

    For values per token that come with the token that they belong to: ``old_logprobs`` and ``ref_logprobs`` of an
    inference engine, advantages, weights, temperatures, steps (``fill=-1``). What was computed from logits at
    :func:`next_tokens` is aligned already.

    Args:
        x: any real dtype, padded ``[B, T]``, or packed ``[T]`` or ``[1, T]`` with ``cu_seqlens``; ``[T]`` without
            ``cu_seqlens`` is one sequence.
        cu_seqlens, cp: as in :func:`next_tokens`; with ``cp`` nothing is differentiable.

    Returns shape and dtype of ``x``; differentiable with respect to it.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, ``cu_seqlens`` that are no offsets.
    """
    _checks.real("x", x)
    _check_layout("x", x, cu_seqlens)
    _checks.number("fill", fill)
    return reference.shift(x, cu_seqlens, fill)


def cu_seqlens(
    *,
    lengths: Tensor | Sequence[int] | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Where each packed sequence starts, and the number of tokens, from exactly one of three arguments.

    Args:
        lengths: of the sequences, integers ``[num_sequences]``, a tensor or a sequence of ints.
        position_ids: int32 or int64, packed ``[T]`` or ``[1, T]``: a sequence starts where they do not go up by one.
            Their number depends on the data, which costs a sync on a GPU.
        attention_mask: padded ``[B, T]``, for tokens that were packed by ``x[attention_mask != 0]``.

    Returns ``[num_sequences + 1]``, int32, on the device of the argument.

    Raises:
        TypeError: types and dtypes. ValueError: shapes, not exactly one argument, negative lengths.
    """
    given = [x for x in (lengths, position_ids, attention_mask) if x is not None]
    if len(given) != 1:
        raise ValueError(f"exactly one of lengths, position_ids and attention_mask is needed, got {len(given)}")
    if position_ids is not None:
        _checks.integer("position_ids", position_ids)
        if position_ids.dim() not in (1, 2) or (position_ids.dim() == 2 and position_ids.shape[0] != 1):
            raise ValueError(f"position_ids must have shape [T] or [1, T], got {list(position_ids.shape)}")
        flat = position_ids.reshape(-1)
        starts = torch.ones_like(flat, dtype=torch.bool)
        starts[1:] = flat[1:] != flat[:-1] + 1
        return torch.cat((starts.nonzero()[:, 0], starts.new_tensor([flat.numel()], dtype=torch.int64))).int()
    if attention_mask is not None:
        _checks.real("attention_mask", attention_mask)
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must have shape [B, T], got {list(attention_mask.shape)}")
        lengths = (attention_mask != 0).sum(1)
    elif not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths, dtype=None if len(lengths) else torch.int64)  # type: ignore[arg-type]
    _checks.real("lengths", lengths, boolean=False)
    if lengths.dim() != 1 or lengths.is_floating_point():
        raise ValueError(f"lengths must be integers [num_sequences], got {lengths.dtype} {list(lengths.shape)}")
    if _checks.values_are_free(lengths) and bool((lengths < 0).any()):
        raise ValueError(f"lengths must be >= 0, got {int(lengths.min())}")
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def _check_layout(name: str, x: Tensor, cu_seqlens: Tensor | None) -> None:
    packed = cu_seqlens is not None
    if x.dim() not in (1, 2) or (packed and x.dim() == 2 and x.shape[0] != 1):
        layouts = "[T] or [1, T] with cu_seqlens" if packed else "[T] or [B, T] without cu_seqlens"
        raise ValueError(f"{name} must have shape {layouts}, got {list(x.shape)}")
    if cu_seqlens is not None:
        _checks.cu_seqlens(cu_seqlens, x.numel(), name, x)
