"""What the compiler makes of the walk from logits to gradients, for GPUs that are not here: resources, instructions."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch

import fusedpo
from fusedpo import objectives as O

pytest.importorskip("triton")
triton_aot = pytest.importorskip("support.triton_aot")

pytestmark = [pytest.mark.triton, pytest.mark.slow]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WALK, LIST, SCALE = "_one_pass_kernel", "_evaluated_first_kernel", "_scale_kernel"


def one_pass(
    dtype: torch.dtype,
    vocab_size: int,
    objective: O.Objective,
    tokens: int = 6,
    *,
    packed: bool = False,
    mask: bool = True,
    rows: bool = False,
    everything: bool = True,
    inplace: bool = False,
) -> None:
    from fusedpo.triton_kernels import one_pass

    per_token, ids = torch.zeros(tokens), torch.zeros(tokens, dtype=torch.int64)
    given = per_token if everything else None
    logits = torch.zeros(tokens, vocab_size, dtype=dtype)
    one_pass.one_pass(
        logits,
        logits if inplace else torch.empty_like(logits),
        per_token,
        per_token,
        torch.arange(tokens) if rows else None,
        ids,
        per_token + 1 if everything else torch.ones(()),
        given,
        per_token if everything else torch.zeros(2 if packed else 1, 1),
        torch.ones(tokens, dtype=torch.bool) if mask else None,
        torch.tensor([0, 1, tokens]) if packed else None,
        given,
        given,
        per_token,
        *fusedpo.ops.policy_loss.encode(objective),
    )


def scale(dtype: torch.dtype, vocab_size: int, tokens: int = 6) -> None:
    from fusedpo.triton_kernels import one_pass

    one_pass.scale_(torch.zeros(tokens, vocab_size, dtype=dtype), torch.ones(()))


BONUS = O.nfpo(4, entropy_coef=0.1)
CASES: dict[str, Callable[[], None]] = {
    "bf16": lambda: (one_pass(BF16, 151_936, O.nfpo(4)), scale(BF16, 151_936)),
    "bf16, entropy, packed": lambda: one_pass(BF16, 151_936, BONUS, packed=True),
    "fp32, entropy": lambda: (one_pass(FP32, 128_256, BONUS, mask=False), scale(FP32, 128_256)),
    "fp16, unaligned, packed": lambda: (one_pass(FP16, 50_257, O.nfpo(4), packed=True), scale(FP16, 50_257)),
}
# Compiled for other targets, too: with the entropy, which takes the most registers.
ELSEWHERE = ("bf16, entropy, packed", "fp32, entropy")
ALIGNED = [case for case in CASES if "unaligned" not in case]
UNALIGNED = [case for case in CASES if "unaligned" in case]


def compile_cases() -> list[dict]:
    return triton_aot.compile_all(CASES, ELSEWHERE)


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str, str], dict]:
    results = triton_aot.call(__name__, "compile_cases")
    return {(result["case"], result["kernel"], result["target"]): result for result in results}


@pytest.mark.parametrize("target", triton_aot.TARGETS)
def test_no_more_is_spilled_than_two_values_of_a_row(compiled, target, record_property):
    """In float32 with the entropy bonus, on sm_90; the loops over the logits do not touch them (test_budgets.py)."""
    results = [result for result in compiled.values() if result["target"] == target]
    counts = {WALK: 4, LIST: 3, SCALE: 3} if target == "sm_90" else {WALK: 2, LIST: 1, SCALE: 1}
    assert Counter(result["kernel"] for result in results) == counts
    for result in results:
        record_property(f"registers, {result['case']}", result["registers"])
        allowed = 8 if (result["kernel"], result["case"], target) == (WALK, "fp32, entropy", "sm_90") else 0
        assert result["stack"] <= allowed, result["case"]
        assert result["registers"] * 32 * result["num_warps"] <= 65_536  # those of a multiprocessor, which runs one


def elements_per_thread(result: dict) -> int:
    """Of a step: 4 words of each lane."""
    return 4 * result["LANES"] // (32 * result["num_warps"]) * (2 if result["WIDTH"] == 8 else 1)


@pytest.mark.parametrize("case", CASES)
def test_one_exponential_per_element_of_a_sum_and_of_a_gradient(compiled, case):
    """In two copies of the walk, over complete steps and the last; one for every lane and copy, and to merge it."""
    result = compiled[case, WALK, "sm_90"]
    exponentials = Counter(re.findall(r"= math\.exp2? .* : (\S+)", result["ttir"]))
    per_word, lanes = (2 if result["WIDTH"] == 8 else 1), result["LANES"]
    assert exponentials.pop(f"tensor<{lanes}xf32>") == 2 * (4 * per_word + 1) + 1
    assert exponentials.pop(f"tensor<{4 * per_word * lanes}xf32>") == 2
    assert set(exponentials) <= {"tensor<1xf32>", "f32"}
    of_lanes = 3 * lanes // (32 * result["num_warps"])
    most = 4 * elements_per_thread(result) + of_lanes + exponentials.total()
    assert result["asm"].count("ex2.approx") <= most


def accesses(result: dict) -> dict[str, list[str]]:
    """Widths of the loads of the first and of the second sweep, and of the stores: gradients and zeros."""
    hint = r"\.global\.L1::evict_{}\.L2::cache_hint\.(\S+)"
    load_first, load_second = (re.findall("ld" + hint.format(policy), result["asm"]) for policy in ("last", "first"))
    return {
        "first": load_first,
        "second": load_second,
        "stores": re.findall("st" + hint.format("first"), result["asm"]),
    }


@pytest.mark.parametrize("case", CASES)
def test_width_of_accesses(compiled, case):
    """Aligned rows 16 bytes at a time, also under the mask of the last step; others by element, side by side."""
    result = compiled[case, WALK, "sm_90"]
    itemsize = 4 if "fp32" in case else 2
    width, name = (16 // itemsize, "v4.b32") if case in ALIGNED else (1, "b16")
    step = [name] * (elements_per_thread(result) // width)
    assert accesses(result) == {
        "first": 3 * step,  # the last, the first, and the next one
        "second": 2 * step,
        "stores": 3 * step,  # one is of dead rows
    }


@pytest.mark.parametrize("case", CASES)
def test_rows_are_summed_without_a_barrier(compiled, case):
    """Where logits are read, and gradients written."""
    asm = compiled[case, WALK, "sm_90"]["asm"]
    first, last = asm.index("ld.global.L1::evict_last"), asm.rindex("ld.global.L1::evict_first")
    assert "bar.sync" not in asm[first:last]
    assert "shfl" not in asm[first:last]


@pytest.mark.parametrize("case", ["bf16", "fp32, entropy"])
def test_scale_accesses_16_bytes_at_a_time(compiled, case):
    widths = accesses(compiled[case, SCALE, "sm_90"])
    assert set(widths["second"] + widths["stores"]) == {"v4.b32"}


@pytest.mark.parametrize("case", CASES)
def test_chosen_columns_are_read_before_their_row_is_written_and_written_after_it(compiled, case):
    """Barriers in between: in place, threads would otherwise read each other's gradients as logits."""
    names = {
        r"%chosen\w* = tt\.load": "read the next",
        r"barrier": "wait",
        r"tt\.store %pointer\w*, [^\n]*: !tt\.ptr": "write",
        r"tt\.store [^\n]*: tensor<\d{4,}x": "sweep",
    }
    found = re.findall("|".join(f"({pattern})" for pattern in names), compiled[case, WALK, "sm_90"]["ttir"])
    order = [name for groups in found for name, group in zip(names.values(), groups, strict=True) if group]
    assert order == ["sweep", "sweep", "read the next", "wait", "write", "wait", "sweep"]  # the last of dead rows


@pytest.mark.parametrize("kernel", [WALK, SCALE])
@pytest.mark.parametrize("case", ["bf16", "fp16, unaligned, packed"])
def test_offsets_of_rows_have_64_bits(compiled, case, kernel):
    rows = re.findall(r"%(?:outer|inner)\w* = arith\.muli .*: (\S+)", compiled[case, kernel, "sm_90"]["ttir"])
    assert len(rows) == (2 if kernel == SCALE else 2 * 4)  # logits, gradients, the logits of the next row, zeros
    assert set(rows) == {"i64"}


@pytest.mark.parametrize("case", CASES)
def test_offsets_of_tokens_have_64_bits(compiled, case):
    ttir = compiled[case, WALK, "sm_90"]["ttir"]
    arrays = {"logprobs", "entropies", "token_ids", "temperature", "old_logprobs", "ref_logprobs", "scale"}
    offsets = re.findall(r"tt\.addptr %(\w+), \S+ : !tt\.ptr<\w+>, (\w+)", ttir)
    found = {(name, kind) for name, kind in offsets if name in arrays}
    assert found == {(name, "i64") for name in arrays}


# ------------------------------------------------------------------------------------------------------------- variants


def count_variants() -> dict[str, int]:
    def lengths_and_vocabularies() -> None:
        for tokens, size in itertools.product((2, 16, 33, 1000), (32_000, 128_256, 151_936)):
            one_pass(BF16, size, O.nfpo(4), tokens)
            scale(BF16, size, tokens)

    def objectives() -> None:
        for objective, everything, inplace in itertools.product(
            (O.ppo(), O.nfpo(2), O.nfpo(200), O.cispo(), O.sapo(), O.reinforce(), O.grpo(kl=O.KL("k3", 0.1))),
            (False, True),
            (False, True),
        ):
            one_pass(BF16, 1024, objective, everything=everything, inplace=inplace)

    def layouts() -> None:
        for packed, mask, rows in itertools.product((False, True), repeat=3):
            one_pass(BF16, 1024, O.nfpo(4), packed=packed, mask=mask, rows=rows)

    def entropy_bonus() -> None:
        for coef in (0.0, 0.1, 0.2):
            one_pass(BF16, 1024, O.nfpo(4, entropy_coef=coef))

    launches = (lengths_and_vocabularies, objectives, layouts, entropy_bonus)
    return {launch.__name__: len(triton_aot.variants(launch)) for launch in launches}


def test_number_of_variants():
    """The halo and the walk are one, with a mask or without; padded or packed, with an entropy bonus are apart."""
    assert triton_aot.call(__name__, "count_variants") == {
        "lengths_and_vocabularies": 3,  # with those that list the rows, and scale
        "objectives": 2,
        "layouts": 2 + 1,
        "entropy_bonus": 2 + 1,
    }
