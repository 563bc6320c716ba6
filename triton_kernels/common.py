"""How the kernels are compiled and launched, and what they share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl


def kernel(function: Callable) -> Any:
    """``triton.jit`` that compiles one variant for each choice of dtypes, absent arguments and ``tl.constexpr``.

    Left alone, Triton also compiles for integers that are 1 or divisible by 16 and for aligned pointers: again and
    again as lengths change. A kernel that wants to know such a thing takes a ``tl.constexpr`` that says so.

    ``do_not_specialize`` does not reach into tuples, so what kernels treat as one (:class:`.objective.Objective`) comes
    as one argument for each number. With the kinds of its parts as ``tl.constexpr`` the kernel of the policy loss would
    have a variant for each of some hundred combinations; that saves code which is not run anyway (1,700 to 2,900 of
    6,400 instructions are left on sm_90) and 4 to 26 of 90 registers, of which none spills. Nothing is waiting for
    either: 90 leave room for 5 programs of 512 tokens on a multiprocessor, 300,000 tokens at a time on an H200, and
    in the walk over logits the sweep takes the registers of its one program whatever the objective. As a tensor on the
    device it would have to be copied there, which a CUDA graph that is captured does not allow.
    """
    parameters = inspect.signature(function).parameters.values()
    return triton.jit(function, do_not_specialize=[p.name for p in parameters if "constexpr" not in str(p.annotation)])


@triton.jit
def sum_where(kept, x, AXIS: tl.constexpr):
    """The sum of the elements of a block that are kept: the way to sum products over lanes.

    The choice stands between a product and the additions. Without it the compiler fuses the two where the reduction
    over lanes begins, which rounds the product in one of two lanes only: they would hold different sums of the same
    numbers.
    """
    return tl.sum(tl.where(kept, x, 0.0), AXIS)


def cdiv(a: int, b: int) -> int:
    """``triton.cdiv``, which is made for use inside kernels as well, takes longer than a small allocation."""
    return -(-a // b)


def launch(
    kernel: Any, programs: int, device: torch.device, *args: Any, num_warps: int, alone: bool = False, **constants: Any
) -> None:
    """Runs ``programs`` programs of a kernel on the current stream of ``device``.

    ``alone``: no multiprocessor has more than one of them, so its threads may have all registers. ptxas would spill
    some for the sake of a second program.
    """
    if alone and device.type != "xpu" and torch.version.hip is None:
        constants["maxnreg"] = min(255, 65536 // (32 * num_warps))
    with torch.accelerator.device_index(device.index):
        kernel[(programs,)](*args, **constants, num_warps=num_warps, enable_fp_fusion=True)
