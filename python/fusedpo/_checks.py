"""Checks of arguments. Every message names the argument, what was given and what is expected.

Types and shapes cost nothing and are always checked. Values live on the device: they are checked where reading them is
free (:func:`values_are_free`), on the CPU, and on other devices under ``FUSEDPO_DEBUG=1``.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from reprlib import Repr
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_NUMBERS = (*FLOATS, *INTEGERS)
_INDICES = (torch.int32, torch.int64)

# Numbers reach the kernels as float32: another magnitude would become 0 or infinite there. Below the smallest normal
# number, it would where subnormal ones are flushed to 0.
FLOAT32_MIN, FLOAT32_MAX = 2.0**-126, 2.0**128 - 2.0**104

_brief = Repr()
_brief.maxother = _brief.maxstring = _brief.maxlong = 200

_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
_OTHERS = (type(None), float, int, bool, str)  # what arguments mostly are beside tensors

# full_tensor() alone gives a parameter that FSDP2 shards a wrong gradient: each rank keeps its slice of its own.
WAYS_TO_GATHER = (
    "and for a parameter of FSDP2 call this inside the forward of the module that owns it (fusedpo.nn.LossHead is such "
    "a module), in a method given to torch.distributed.fsdp.register_fsdp_forward_method, or pass "
    'full_tensor(grad_placements=[Partial("avg")]); DeepSpeed ZeRO-3: inside deepspeed.zero.GatheredParameters'
)

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


def brief(value: object) -> str:
    """``repr(value)``, shortened to a line or two: what a message says was given."""
    return _brief.repr(value)


def plain(value: Any) -> Any:
    """A NumPy number, or array of one, as the Python number that it holds; everything else as it is."""
    if type(value) in _OTHERS or isinstance(value, Tensor):
        return value
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def taken(*values: Any) -> tuple[Any, ...]:
    """Arguments as autograd and the kernels take them: :func:`plain`, and tensors that may be saved for a backward.

    Those made under ``torch.inference_mode`` may not, outside of it: they are copied.
    """
    compiling = torch.compiler.is_compiling()
    for x in values:  # as a rule, there is nothing to do
        if type(x) not in _OTHERS and (type(x) is not Tensor or compiling or x.is_inference()):
            break
    else:
        return values
    copied = torch.is_grad_enabled() and not compiling
    return tuple(
        (x.clone() if copied and x.is_inference() else x) if isinstance(x, Tensor) else plain(x) for x in values
    )


def is_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if is_dtensor(value):
        raise TypeError(
            f"{name} must be a whole plain tensor, got a DTensor: {name}.to_local() where every rank holds all of it, "
            f"{WAYS_TO_GATHER}"
        )
    if value.is_nested:
        raise TypeError(
            f"{name} must be a padded or packed tensor, got a nested one: {name}.to_padded_tensor(...) pads it, and "
            "its values and offsets are packed tokens and cu_seqlens"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense, strided tensor, got the layout {value.layout}: {name}.to_dense()")


def is_dtensor(value: object) -> bool:
    return type(value).__name__ == "DTensor"


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def of_whole_vocabulary(way: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """For functions that take no split vocabulary or sequences: who tries is told the ``way`` that works."""

    def refusing(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def checked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            for name in ("tp_group", "vocab_start", "vocab_size", "cp"):
                if name in kwargs:
                    raise TypeError(f"{function.__name__} takes no {name}, what it reads must be whole: {way}")
            return function(*args, **kwargs)

        return checked

    return refusing


def floating(name: str, tensor: Tensor) -> None:
    is_tensor(name, tensor)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must have a floating-point dtype of 16 bits or more, got {tensor.dtype}")


def real(name: str, tensor: Tensor, *, boolean: bool = True) -> None:
    is_tensor(name, tensor)
    if tensor.dtype not in _NUMBERS and not (boolean and tensor.dtype == torch.bool):
        kinds = "bool, integer or floating-point" if boolean else "integer or floating-point"
        raise TypeError(f"{name} must be {kinds}, got {tensor.dtype}")


def integer(name: str, tensor: Tensor) -> None:
    is_tensor(name, tensor)
    if tensor.dtype not in _INDICES:
        raise TypeError(f"{name} must have dtype torch.int32 or torch.int64, got {tensor.dtype}")


def number(name: str, value: Any, expected: str = "a float") -> None:
    value = plain(value)
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, float | int)):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")


def finite(name: str, value: float, expected: str = "a float") -> None:
    number(name, value, expected)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {brief(value)}")


def in_float32(name: str, value: float) -> None:
    """``value`` is not another number, 0 or infinite, once it is rounded to float32."""
    if value != 0 and abs(value) != math.inf and not FLOAT32_MIN <= abs(value) <= FLOAT32_MAX:
        raise ValueError(
            f"{name} must be between {FLOAT32_MIN:.3g} and {FLOAT32_MAX:.3g} in magnitude, the range of float32, "
            f"got {brief(value)}"
        )


def whole_number(name: str, value: Any, at_least: int, expected: str = "an int") -> None:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {brief(value)}")


def same_device(name: str, tensor: Tensor, of: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {of} ({other.device}), got {tensor.device}")


def shape(name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{name} must have shape {list(expected)} ({why}), got {list(tensor.shape)}")


def mask(tensor: Tensor | None, expected: tuple[int, ...], why: str, of: str, other: Tensor) -> None:
    """A mask is bool, integer or float, 0 where a position is left out, any other value where it is kept."""
    if tensor is None:
        return
    real("mask", tensor)
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
            first = max(int((tensor[1:] < tensor[:-1]).nonzero()[0]) - 2, 0)
            raise ValueError(
                f"cu_seqlens must not decrease, got {tensor[first : first + 6].tolist()} from index {first} on"
            )
