"""What the compiler makes of the kernel of the KL divergence, for GPUs that are not here."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
triton_aot = pytest.importorskip("support.triton_aot")

pytestmark = [pytest.mark.triton, pytest.mark.slow]


def launch(dtype: torch.dtype, size: int, *, forward: bool = False, gradient: bool = True, mask: bool = False) -> None:
    from fusedpo.triton_kernels import exact_kl

    x, y = torch.zeros(6, size, dtype=dtype), torch.zeros(6, size, dtype=dtype)
    kept = torch.ones(6, dtype=torch.bool) if mask else None
    out = torch.empty_like(x) if gradient else None
    exact_kl.exact_kl_out(x, y, torch.ones(()), torch.ones(6), kept, torch.ones(6), forward, out)


CASES = {
    "reverse, bf16": lambda: launch(torch.bfloat16, 151_936, mask=True),
    "forward, fp16, unaligned": lambda: launch(torch.float16, 50_257, forward=True),
    "reverse, fp32, no gradient": lambda: launch(torch.float32, 1000, gradient=False),
}


ELSEWHERE = ("reverse, bf16",)  # compiled for other targets, too: with the gradient and a mask


def compile_cases() -> list[dict]:
    return triton_aot.compile_all(CASES, ELSEWHERE)


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return triton_aot.call(__name__, "compile_cases")


def test_it_compiles_for_every_target_without_spills(compiled):
    assert len(compiled) == len(triton_aot.compiled(CASES, ELSEWHERE))  # one variant each
    assert {(r["case"], r["target"]): r["stack"] for r in compiled if r["stack"]} == {}


def test_wide_loads_where_rows_are_aligned(compiled):
    results = {(r["case"], r["target"]): r["asm"] for r in compiled}
    assert (
        "ld.global.v4.b32" in results["reverse, bf16", "sm_90"] or "ld.global.v4" in results["reverse, bf16", "sm_90"]
    )
    assert "ld.global.v4" not in results["forward, fp16, unaligned", "sm_90"]
