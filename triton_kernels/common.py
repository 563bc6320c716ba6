"""How every kernel of this package is compiled and launched."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton


def kernel(function: Callable) -> Any:
    """``triton.jit`` with one compiled variant per dtypes, absent arguments and ``tl.constexpr``.

    Triton would also compile for integers that are 1 or divisible by 16 and for aligned pointers, that is to say again and again
    as lengths change. A kernel that wants to know such a thing takes it as a ``tl.constexpr``.
    """
    parameters = inspect.signature(function).parameters.values()
    return triton.jit(function, do_not_specialize=[p.name for p in parameters if "constexpr" not in str(p.annotation)])


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, num_warps: int, **constants: Any) -> None:
    """Launches ``programs`` programs on the current stream of ``device``; none if there is no work."""
    if programs > 0:
        with torch.accelerator.device_index(device.index):
            kernel[(programs,)](*args, **constants, num_warps=num_warps, enable_fp_fusion=True)
