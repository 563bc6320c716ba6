"""Checks of arguments. Every message names the argument, what was given and what is expected.

Types and shapes cost nothing and are always checked. Values live on the device: they are checked where reading them is
free (:func:`values_are_free`), on the CPU, and on other devices under ``FUSEDPO_DEBUG=1``.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)

DEBUG = os.environ.get("FUSEDPO_DEBUG", "0") not in ("", "0")


def values_are_free(*tensors: Tensor) -> bool:
    """Whether data may be read here: where there is any, and without a device sync unless the user asked for it.

    Nothing is read while something traces, transforms or intercepts what is computed, nor in a subclass of tensors.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(type(t) in _PLAIN and (t.device.type == "cpu" or (DEBUG and not t.is_meta)) for t in tensors)


def is_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name} must be a whole plain tensor, got a DTensor: gather it before the call ({name}.full_tensor(); "
            "parameters of FSDP2 once per step)"
        )


def floating(name: str, tensor: Tensor) -> None:
    is_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")


def integer(name: str, tensor: Tensor) -> None:
    is_tensor(name, tensor)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must have dtype torch.int32 or torch.int64, got {tensor.dtype}")


def number(name: str, value: object, expected: str = "a float") -> None:
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")


def finite(name: str, value: float, expected: str = "a float") -> None:
    number(name, value, expected)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")


def whole_number(name: str, value: object, at_least: int, expected: str = "an int") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {value}")


def same_device(name: str, tensor: Tensor, of: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {of} ({other.device}), got {tensor.device}")


def shape(name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {list(expected)} ({why}), got {list(tensor.shape)}")


def mask(tensor: Tensor | None, expected: tuple[int, ...], why: str, of: str, other: Tensor) -> None:
    """A mask is bool, integer or float, 0 where a position is left out, any other value where it is kept."""
    if tensor is None:
        return
    is_tensor("mask", tensor)
    if tensor.is_complex():
        raise TypeError(f"mask must be bool, integer or floating-point, got {tensor.dtype}")
    shape("mask", tensor, expected, why)
    same_device("mask", tensor, of, other)


def cu_seqlens(tensor: Tensor, total: int, of: str, other: Tensor) -> None:
    """``[num_sequences + 1]`` offsets: 0 first, never decreasing, the number of tokens last."""
    integer("cu_seqlens", tensor)
    if tensor.dim() != 1 or tensor.numel() < 1:
        raise ValueError(f"cu_seqlens must have shape [num_sequences + 1], got {list(tensor.shape)}")
    same_device("cu_seqlens", tensor, of, other)
    if values_are_free(tensor):
        if int(tensor[0]) != 0 or int(tensor[-1]) != total:
            raise ValueError(
                f"cu_seqlens must start with 0 and end with the number of tokens {total}, "
                f"got {int(tensor[0])} and {int(tensor[-1])}"
            )
        if bool((tensor[1:] < tensor[:-1]).any()):
            raise ValueError(f"cu_seqlens must not decrease, got {tensor.tolist()}")
