"""Which dtypes a device has."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(of: Tensor | torch.device) -> torch.dtype:
    """What sums are accumulated in on the device: float64, or float32 where it has none (Apple's MPS, Intel's Arc)."""
    device = of.device if isinstance(of, Tensor) else of
    if device.type == "mps":
        return torch.float32
    if device.type == "xpu":
        return torch.float64 if torch.xpu.get_device_properties(device).has_fp64 else torch.float32
    if torch.compiler.is_compiling():
        return torch.float64
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64
