"""What the compiler makes of the kernel of the statistics of rows, for GPUs that are not here."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")
triton_aot = pytest.importorskip("support.triton_aot")

pytestmark = [pytest.mark.triton, pytest.mark.slow]


def launch(dtype: torch.dtype, size: int, *, mask: bool = False) -> None:
    from fusedpo.triton_kernels import token_statistics

    kept = torch.ones(6, dtype=torch.bool) if mask else None
    ids = torch.zeros(6, dtype=torch.int64)
    token_statistics.token_statistics(torch.zeros(6, size, dtype=dtype), ids, torch.ones(6), kept)


CASES = {
    "bf16": lambda: launch(torch.bfloat16, 151_936, mask=True),
    "fp16, unaligned": lambda: launch(torch.float16, 50_257),
    "fp32, short": lambda: launch(torch.float32, 1000),
}


ELSEWHERE = ("bf16",)  # compiled for other targets, too: with a mask, and with two logits in a word


def compile_cases() -> list[dict]:
    return triton_aot.compile_all(CASES, ELSEWHERE)


def test_it_compiles_for_every_target_without_spills_and_loads_wide_where_rows_are_aligned():
    results = triton_aot.call(__name__, "compile_cases")
    assert len(results) == len(triton_aot.compiled(CASES, ELSEWHERE))  # one variant each
    assert {(r["case"], r["target"]): r["stack"] for r in results if r["stack"]} == {}
    asm = {(r["case"], r["target"]): r["asm"] for r in results}
    wide = re.compile(r"ld\.global\S*\.v4\.")
    assert wide.search(asm["bf16", "sm_90"])
    assert not wide.search(asm["fp16, unaligned", "sm_90"])
