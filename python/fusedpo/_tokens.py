"""Checks of arrays that hold a value per token or per sequence: padded ``[B, T]``, or packed ``[T]`` or ``[1, T]``.

``source``, the argument ``name``, is what the shape, the device and the messages of the others refer to; ``shape`` is
that of its tokens where it holds more than a value for each (logits).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from .objectives import Aggregation
from .reference.layout import Layout, layout


def check_layout(
    name: str, source: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, shape: torch.Size | None = None
) -> int:
    """The number of sequences."""
    shape = source.shape if shape is None else shape
    if len(shape) not in (1, 2):
        raise ValueError(f"{name} must hold tokens [B, T] or [T], got the shape {list(source.shape)}")
    if cu_seqlens is None:
        num_sequences = shape[0] if len(shape) == 2 else 1
    else:
        if len(shape) == 2 and shape[0] != 1:
            raise ValueError(
                f"cu_seqlens needs {name} that hold packed tokens [T] or [1, T], got the shape {list(source.shape)}"
            )
        _checks.cu_seqlens(cu_seqlens, shape.numel(), name, source)
        num_sequences = cu_seqlens.numel() - 1
    _checks.mask(mask, shape, f"one value per token of {name}", name, source)
    return num_sequences


def layout_of(name: str, source: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Layout, Tensor]:
    """And the kept tokens, flat, of arguments that are checked."""
    check_layout(name, source, mask, cu_seqlens)
    where = layout(source, cu_seqlens)
    return where, where.kept(mask)


def check_per_token(argument: str, tensor: Tensor, name: str, source: Tensor, shape: torch.Size | None = None) -> None:
    _checks.floating(argument, tensor)
    _checks.shape(argument, tensor, source.shape if shape is None else shape, f"one value per token of {name}")
    _checks.same_device(argument, tensor, name, source)


def check_weights(
    argument: str, tensor: Tensor, name: str, source: Tensor, num_sequences: int, shape: torch.Size | None = None
) -> None:
    """One value per token, or one per sequence."""
    _checks.floating(argument, tensor)
    shape = source.shape if shape is None else shape
    expected: tuple[tuple[int, ...], ...] = (shape, (num_sequences,), (num_sequences, 1))
    if len(shape) == 1 or shape[0] == 1:
        expected += ((shape[-1],), (1, shape[-1]))
    if tensor.shape not in expected:
        shapes = [list(s) for s in dict.fromkeys(expected)]
        raise ValueError(
            f"{argument} must have one of the shapes {shapes} (a value per token or per sequence of {name}), "
            f"got {list(tensor.shape)}"
        )
    _checks.same_device(argument, tensor, name, source)


def check_denominator(denominator: float | Tensor | None, aggregation: Aggregation, name: str, source: Tensor) -> None:
    if denominator is not None and aggregation == "token-sum":
        raise ValueError("denominator must be None with aggregation='token-sum', which divides by nothing")
    check_count("denominator", denominator, name, source)


def check_count(argument: str, count: float | Tensor | None, name: str, source: Tensor) -> None:
    if count is None:
        return
    check_number(argument, count, name, source)
    free = not isinstance(count, Tensor) or _checks.values_are_free(count)
    if free and not count >= 0:
        raise ValueError(f"{argument} must be a count >= 0, got {_checks.brief(_checks.plain(count))}")


def check_number(argument: str, value: float | Tensor, name: str, source: Tensor) -> None:
    if isinstance(value, Tensor):
        _checks.real(argument, value, boolean=False)
        _checks.shape(argument, value, (), "a number or a 0-d tensor")
        _checks.same_device(argument, value, name, source)
    else:
        _checks.finite(argument, value, "a number or a 0-d tensor")
        _checks.in_float32(argument, value)
