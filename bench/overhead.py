"""What the host does before the first kernel: ``python bench/overhead.py``.

Medians in microseconds; for the import, after that of torch, the least of some processes in milliseconds.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NoReturn
from unittest import mock

import torch

import fusedpo
from fusedpo import backends, objectives

OPERATORS = ("token_logprobs", "policy_loss", "one_pass", "token_scale")


class _Reached(Exception):
    """A kernel would run now."""


def before_the_first_kernel(call: Callable[[], Any], rounds: int = 500) -> float:
    """Seconds from the start of ``call`` to its first operator, which does not run."""
    reached = 0

    def stop(*_: Any) -> NoReturn:
        nonlocal reached
        reached = time.perf_counter_ns()
        raise _Reached

    def once() -> int:
        start = time.perf_counter_ns()
        try:
            call()
        except _Reached:
            return reached - start
        raise AssertionError("no operator was called")

    with mock.patch.multiple(torch.ops.fusedpo, **{name: _Stopped(stop) for name in OPERATORS}):
        return median(once() for _ in range(rounds)) * 1e-9


class _Stopped:
    """Every overload of an operator."""

    def __init__(self, stop: Callable[..., NoReturn]) -> None:
        self.native = self.triton = stop


def cases(device: str) -> dict[str, Callable[[], Any]]:
    shape = (2, 4)
    logits = torch.randn(*shape, 8, device=device, requires_grad=True)
    logprobs = torch.randn(shape, device=device, requires_grad=True)
    ids = torch.randint(8, shape, device=device)
    batch = {
        "old_logprobs": torch.randn(shape, device=device),
        "advantages": torch.randn(shape[0], device=device),
        "mask": torch.ones(shape, dtype=torch.bool, device=device),
        "objective": objectives.nfpo(4),
    }
    return {
        "token_logprobs": lambda: fusedpo.token_logprobs(logits, ids, mask=batch["mask"]),
        "policy_loss": lambda: fusedpo.policy_loss(logprobs, **batch),
        "policy_loss_from_logits": lambda: fusedpo.policy_loss_from_logits(logits, ids, **batch),
    }


def import_seconds(processes: int = 5) -> float:
    """``import fusedpo`` where torch has been imported."""
    code = "import time, torch; start = time.perf_counter(); import fusedpo; print(time.perf_counter() - start)"
    command = [sys.executable, "-c", code]
    return min(float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(processes))


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if backends.why_not("native", "policy_loss", device, torch.float32) is None or device == "cuda":
        for name, call in cases(device).items():
            call()
            print(f"{name}: {before_the_first_kernel(call) * 1e6:.1f}")
    print(f"import fusedpo: {import_seconds() * 1e3:.1f}")
