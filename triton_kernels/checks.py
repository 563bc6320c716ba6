"""What launchers check of their arguments, as ``csrc/arguments.h`` does: exported programs call operators directly.

Device, dtype and shape of every tensor and the ranges of numbers, each in O(1) and without a look at the device. Each
message names the argument, what it must be, and what was given. Values that index are checked where they may be read
(``_checks.values_are_free``); kernels mask or clamp them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT, INT64, BOOL = (torch.float32,), (torch.int64,), (torch.bool,)
LOGITS = (torch.float16, torch.bfloat16, torch.float32)
INTEGER = (torch.int32, torch.int64)
REAL = (*BOOL, torch.uint8, torch.int8, torch.int16, *INTEGER, *LOGITS, torch.float64)

WHOLE = 1 << 62  # larger than every size: a window over the whole sequence


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def in_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} must be {least} to {most}, got {value}")


def given(name: str, tensor: Tensor | None, wanted: bool) -> None:
    if (tensor is not None) != wanted:
        raise ValueError(f"{name} must {'' if wanted else 'not '}be given for this estimator")


def dims(name: str, tensor: Tensor, least: int, most: int) -> None:
    if not least <= tensor.dim() <= most:
        raise ValueError(f"{name} must have {least} to {most} dimensions, got the shape {list(tensor.shape)}")


def packed(cu_seqlens: Tensor, tokens: torch.Size) -> int:
    """The number of sequences that ``cu_seqlens`` has offsets for, in packed tokens of this shape."""
    dims("cu_seqlens", cu_seqlens, 1, 1)
    expect(
        len(tokens) == 1 or tokens[0] == 1, f"cu_seqlens needs packed tokens [T] or [1, T], got the shape {[*tokens]}"
    )
    sequences, count = cu_seqlens.numel() - 1, tokens[-1]
    expect(
        sequences > 0 or (sequences == 0 and count == 0),
        f"cu_seqlens must start with 0, never decrease and end with the number of tokens {count}, "
        f"got {sequences + 1} offsets",
    )
    return sequences


class Arguments:
    """Tensors on the device of the first one."""

    def __init__(self, name: str, first: Tensor) -> None:
        expect(first is not None, f"{name} must be a tensor, got None")  # PyTorch lets None through for any tensor
        self._name, self._device = name, first.device

    def check(self, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], *shapes: Sequence[int]) -> None:
        """``shapes``: the tensor must have one of them."""
        expect(tensor is not None, f"{name} must be a tensor, got None")
        if tensor.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{name} must have dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}")
        if tensor.device != self._device:
            raise ValueError(f"{name} must be on the device of {self._name}, {self._device}, got {tensor.device}")
        if tuple(tensor.shape) not in map(tuple, shapes):
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{name} must have shape {expected}, got {list(tensor.shape)}")

    def read(
        self, name: str, tensor: Tensor | None, dtypes: tuple[torch.dtype, ...], *shapes: Sequence[int]
    ) -> Tensor | None:
        """Checked, and contiguous."""
        if tensor is None:
            return None
        self.check(name, tensor, dtypes, *shapes)
        return tensor.contiguous()

    def write(self, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], *shapes: Sequence[int]) -> None:
        self.check(name, tensor, dtypes, *shapes)
        expect(tensor.is_contiguous(), f"{name} must be contiguous")
