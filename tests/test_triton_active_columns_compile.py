"""What the compiler makes of the kernels of active columns, for GPUs that are not here."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
triton_aot = pytest.importorskip("support.triton_aot")

pytestmark = [pytest.mark.triton, pytest.mark.slow]


def launch(dtype: torch.dtype, size: int, *, entropy: bool = False, ids: tuple[int, ...] = ()) -> None:
    """With few and with many active columns: how many there are is known to the device alone."""
    from fusedpo.triton_kernels import active_columns

    upstream = torch.ones(6, *ids), torch.ones(6) if entropy else None
    given = (*upstream, torch.zeros(6, size, dtype=dtype), torch.zeros(6, *ids, dtype=torch.int64), torch.ones(6))
    active_columns.active_columns(*given, torch.ones(6, 3), 2.0**-12)
    for count in (1, size // 3):
        active_columns.gradient_at_(*given, torch.ones(6, 3), torch.arange(size) < count, size // 2)


CASES = {
    "bf16": lambda: launch(torch.bfloat16, 151_936),
    "fp16, entropy, 3 ids": lambda: launch(torch.float16, 50_257, entropy=True, ids=(3,)),
    "fp32, short": lambda: launch(torch.float32, 1000),
}


ELSEWHERE = ("fp16, entropy, 3 ids",)  # compiled for other targets, too: what takes the most registers


def compile_cases() -> list[dict]:
    return triton_aot.compile_all(CASES, ELSEWHERE)


def test_they_compile_once_for_every_target_without_spills():
    results = triton_aot.call(__name__, "compile_cases")
    assert len(results) == 2 * len(triton_aot.compiled(CASES, ELSEWHERE))  # one variant of each kernel
    assert {(r["case"], r["kernel"], r["target"]): r["stack"] for r in results if r["stack"]} == {}
