"""What the compiler makes of the Triton kernels, for GPUs that are not here: resources, instructions, variants."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")
triton_aot = pytest.importorskip("support.triton_aot")

pytestmark = [pytest.mark.triton, pytest.mark.slow]

ROWS = 6


def forward(dtype: torch.dtype, size: int, *, entropy: bool, mask: bool = False, num_ids: int = 1, rows: int = ROWS):
    from fusedpo.triton_kernels import logprobs

    logits, ids = torch.zeros(rows, size, dtype=dtype), torch.zeros(rows, num_ids, dtype=torch.int64)
    logprobs.token_logprobs(logits, ids, torch.ones(()), torch.ones(rows, dtype=torch.bool) if mask else None, entropy)


def backward(
    dtype: torch.dtype,
    size: int,
    *,
    logprobs: bool = True,
    entropy: bool = False,
    mask: bool = False,
    num_ids: int = 1,
    rows: int = ROWS,
):
    from fusedpo.triton_kernels import logprobs as kernels

    logits = torch.zeros(rows, size, dtype=dtype)
    kernels.token_logprobs_backward_out(
        torch.zeros(rows, num_ids) if logprobs else None,
        torch.zeros(rows) if entropy else None,
        logits,
        torch.zeros(rows, num_ids, dtype=torch.int64),
        torch.ones(()),
        torch.ones(rows, dtype=torch.bool) if mask else None,
        torch.zeros(rows, 3),
        torch.empty_like(logits),
    )


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES: dict[str, Callable[[], None]] = {
    "forward, bf16": lambda: forward(BF16, 151_936, entropy=True, mask=True),
    "forward, fp16, unaligned": lambda: forward(FP16, 50_257, entropy=False),
    "forward, fp32": lambda: forward(FP32, 128_256, entropy=False, mask=True),
    "forward, bf16, short rows": lambda: forward(BF16, 1000, entropy=True, num_ids=4),
    "forward, fp16, short rows, unaligned": lambda: forward(FP16, 1023, entropy=False, mask=True),
    "forward, fp32, short rows": lambda: forward(FP32, 1024, entropy=True),
    "backward, bf16": lambda: backward(BF16, 151_936, entropy=True, mask=True),
    "backward, fp16, unaligned": lambda: backward(FP16, 50_257),
    "backward, fp32": lambda: backward(FP32, 128_256, num_ids=4),
    "backward, bf16, short rows, of entropy alone": lambda: backward(BF16, 1000, logprobs=False, entropy=True),
    "backward, fp16, short rows, unaligned": lambda: backward(FP16, 1023, num_ids=4),
    "backward, fp32, short rows": lambda: backward(FP32, 1024, entropy=True, mask=True),
}
UNALIGNED = [case for case in CASES if "unaligned" in case]
ALIGNED = [case for case in CASES if case not in UNALIGNED]
CHOSEN_GRADIENT = [case for case in CASES if case.startswith("backward") and "alone" not in case]


def compile_cases() -> list[dict]:
    return [
        {"case": case} | triton_aot.compile_for(variant, target)
        for case, launch in CASES.items()
        for variant in triton_aot.variants(launch)
        for target in triton_aot.TARGETS
    ]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], dict]:
    return {(result["case"], result["target"]): result for result in triton_aot.call(__name__, "compile_cases")}


def elements_per_thread(result: dict) -> int:
    """Of a block of the gradient, or of a step of the sums: 4 words of each lane."""
    if "BLOCK" in result:
        return result["ROWS"] * result["BLOCK"] // (32 * result["num_warps"])
    words = 4 * result["ROWS"] * result["LANES"] // (32 * result["num_warps"])
    return words * (2 if result["WIDTH"] == 8 else 1)


@pytest.mark.parametrize("target", triton_aot.TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_spilled(compiled, case, target, record_property):
    result = compiled[case, target]
    record_property("registers", result["registers"])
    assert result["stack"] == 0
    # two programs of 8 warps fit on a multiprocessor
    assert result["registers"] <= (128 if target.startswith("sm_") else 256)


@pytest.mark.parametrize("case", [case for case in CASES if "short" in case])
def test_short_rows_share_a_program(compiled, case):
    """Of up to 1024 logits, whatever their dtype."""
    assert compiled[case, "sm_90"]["ROWS"] > 1


@pytest.mark.parametrize("case", CASES)
def test_one_exponential_per_element(compiled, case):
    """In each copy of the sweep: over steps in the loop, the one ahead of it, the last; over complete blocks, the last.

    Beside them, forward one in each copy for every lane, and one to merge it; backward one for the chosen columns.
    """
    result = compiled[case, "sm_90"]
    others = int(case in CHOSEN_GRADIENT)
    if case.startswith("forward"):
        others = 4 * result["ROWS"] * result["LANES"] // (32 * result["num_warps"])
    assert result["asm"].count("ex2.approx") == copies(case) * elements_per_thread(result) + others


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("forward")])
def test_rows_are_summed_without_a_barrier(compiled, case):
    """Lanes meet when the row is over."""
    asm, load = compiled[case, "sm_90"]["asm"], "ld.global.L1::evict_first"
    sweep = asm[asm.index(load) : asm.rindex(load)]
    assert "bar.sync" not in sweep
    assert "shfl" not in sweep


def copies(case: str) -> int:
    """Of the sweep: forward over the first step, those in the loop and the last; backward over blocks and the last."""
    return 3 if case.startswith("forward") else 2


def sweep_accesses(result: dict) -> list[list[str]]:
    """Widths of the loads and stores of the sweeps; the loads carry a hint, the store of chosen columns comes last."""
    loads = re.findall(r"ld\.global\.L1::evict_first\.L2::cache_hint\.(\S+)", result["asm"])
    if result["case"].startswith("forward"):
        return [loads]
    stores = re.findall(r"st\.global\.(\S+)", result["asm"])
    return [loads, stores[:-1] if result["case"] in CHOSEN_GRADIENT else stores]


@pytest.mark.parametrize("case", ALIGNED)
def test_aligned_rows_are_accessed_16_bytes_at_a_time(compiled, case):
    result = compiled[case, "sm_90"]
    itemsize = 4 if "fp32" in case else 2
    for widths in sweep_accesses(result):
        assert widths == ["v4.b32"] * (copies(case) * elements_per_thread(result) * itemsize // 16)


@pytest.mark.parametrize("case", UNALIGNED)
def test_unaligned_rows_are_accessed_by_element(compiled, case):
    """Neighbouring threads access neighbouring elements: the layout is [1 element] x [32 threads]."""
    result = compiled[case, "sm_90"]
    for widths in sweep_accesses(result):
        assert widths == ["b16"] * (copies(case) * elements_per_thread(result))


@pytest.mark.parametrize("case", CASES)
def test_offsets_of_rows_have_64_bits(compiled, case):
    ttir = compiled[case, "sm_90"]["ttir"]
    pointers = 2 if case.startswith("backward") else 1
    rows = re.findall(r"%(?:outer|inner)\w* = arith\.muli .*: (\S+)", ttir)
    assert len(rows) == 2 * pointers
    assert all("i64" in kind for kind in rows)


@pytest.mark.parametrize("case", CHOSEN_GRADIENT)
def test_chosen_columns_are_read_before_the_sweep_and_written_after_it(compiled, case):
    """Barriers in between: in place, threads would otherwise read each other's gradients as logits."""
    operations = re.findall(r"(bar\.sync|ld\.global\.L1|ld\.global|st\.global)", compiled[case, "sm_90"]["asm"])
    first, last = operations.index("bar.sync"), len(operations) - 1 - operations[::-1].index("bar.sync")
    assert "ld.global.L1" not in operations[:first]
    assert "st.global" not in operations[:first]
    assert {"ld.global.L1", "st.global"} <= set(operations[first:last])
    assert "ld.global" not in operations[first:]
    assert operations[last:] == ["bar.sync", "st.global"]


# ------------------------------------------------------------------------------------------------------------- variants


def count_variants() -> dict[str, int]:
    def many_lengths_and_temperatures() -> None:
        from fusedpo.triton_kernels import logprobs

        for i in range(20):
            rows = 1 + 7 * i
            logits, ids = torch.zeros(rows, 1000, dtype=BF16), torch.zeros(rows, dtype=torch.int64)
            offset_ids = torch.zeros(rows + i, dtype=torch.int64)[i:]
            for temperature in (torch.full((), 0.5 + i), torch.full((rows,), 0.5 + i)):
                _, _, stats = logprobs.token_logprobs(logits, ids, temperature, None, False)
                arguments = (torch.ones(rows), None, logits, offset_ids, temperature, None, stats)
                logprobs.token_logprobs_backward_out(*arguments, torch.empty_like(logits))
                logprobs.token_logprobs_backward_out(*arguments, logits)

    def vocabularies() -> None:
        for size in (32_000, 50_257, 100_277, 128_256, 151_936, 152_064, 202_048, 262_144):
            forward(BF16, size, entropy=True)

    def strided() -> None:
        from fusedpo.triton_kernels import logprobs

        for view in (torch.zeros(4, 9, 1000)[:, 1:], torch.zeros(9, 4, 1000).transpose(0, 1), torch.zeros(4, 8, 1000)):
            logprobs.token_logprobs(view, torch.zeros(view.shape[:-1], dtype=torch.int64), torch.ones(()), None, False)

    launches = (many_lengths_and_temperatures, vocabularies, strided)
    return {launch.__name__: len(triton_aot.variants(launch)) for launch in launches}


def test_number_of_variants():
    """Lengths, temperatures, strides and places in memory add none; of a vocabulary, the alignment of rows matters."""
    assert triton_aot.call(__name__, "count_variants") == {
        "many_lengths_and_temperatures": 2,
        "vocabularies": 2,
        "strided": 1,
    }
