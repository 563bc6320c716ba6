"""What the compiler makes of the Triton kernels of the advantages, for GPUs that are not here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedpo.ops.advantages import ESTIMATORS, TOKEN_ESTIMATORS

pytest.importorskip("triton")
triton_aot = pytest.importorskip("support.triton_aot")

pytestmark = [pytest.mark.triton, pytest.mark.slow]


def samples(
    name: str, group_size: int | None, *, count: int = 64, mask: bool = True, wide: bool = False, k: int = 2
) -> None:
    """Groups of a size, or by ids."""
    from fusedpo.triton_kernels import advantages

    rewards, kept = torch.zeros(count), torch.ones(count, dtype=torch.bool) if mask else None
    other = torch.zeros(k) if name == "order_statistic" else rewards if name in ("opo", "remax") else None
    ids = order = None
    if group_size is None:
        ids, order = torch.zeros(count, dtype=torch.int64), torch.arange(count)
    numbers = (ESTIMATORS.index(name), k, k > 3, 0.1 * k, wide)
    advantages.group_advantages(rewards, ids, order, group_size or 1, other, kept, *numbers)


def tokens(name: str, rewards: Tensor, *, mask: bool = False, packed: bool = False, gamma: float = 0.9) -> None:
    from fusedpo.triton_kernels import advantages

    values = rewards if name in ("gae", "vtrace") else None
    new = old = rewards if name == "vtrace" else None
    kept = torch.ones(rewards.shape, dtype=torch.bool) if mask else None
    offsets = torch.tensor([0, 5, rewards.numel()]) if packed else None
    numbers = (TOKEN_ESTIMATORS.index(name), gamma, 0.95, 1.0, 1.0, False)
    per_sequence = torch.zeros(2) if packed else None
    advantages.token_advantages(rewards, values, new, old, kept, offsets, per_sequence, *numbers)


def steps(rows: int, num_steps: int, num_tokens: int) -> None:
    from fusedpo.triton_kernels import advantages

    values, ids = torch.zeros(rows, num_steps + 1), torch.zeros(rows, num_tokens, dtype=torch.int64)
    advantages.step_advantages(values, values[:, 1:], ids, False)


def whiten(count: int) -> None:
    from fusedpo.triton_kernels import advantages

    x = torch.zeros(count)
    advantages.whiten(x, x, torch.ones(count, dtype=torch.bool), False)


CASES: dict[str, Callable[[], None]] = {
    "baseline, large groups": lambda: samples("opo", 4096),
    "baseline, groups of 8": lambda: samples("grpo", 8, mask=False),
    "baseline, ids": lambda: samples("remax", None),
    "ranks, large groups": lambda: samples("order_statistic", 4096),
    "ranks, groups of 8": lambda: samples("maxpo", 8, mask=False),
    "ranks, ids": lambda: samples("maxpo", None, wide=True),
    "tokens, packed": lambda: tokens("vtrace", torch.zeros(64), mask=True, packed=True),
    "tokens, bfloat16": lambda: tokens("gae", torch.zeros(2, 600, dtype=torch.bfloat16)),
    "steps": lambda: steps(8, 7, 8),
    "whitening": lambda: whiten(64),
}
KERNELS = {"_baseline_kernel", "_ranks_kernel", "_tokens_kernel", "_steps_kernel", "_moments_kernel", "_whiten_kernel"}


# Compiled for other targets, too: each kernel as it takes the most registers.
ELSEWHERE = ("baseline, ids", "ranks, ids", "tokens, packed", "steps", "whitening")


def compile_cases() -> list[dict[str, Any]]:
    results = triton_aot.compile_all(CASES, ELSEWHERE)
    kept = ("case", "kernel", "target", "num_warps", "registers", "stack")
    return [{key: r[key] for key in kept} | {"ttir": r["ttir"] if r["target"] == "sm_90" else ""} for r in results]


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    return triton_aot.call(__name__, "compile_cases")


def test_every_kernel_compiles_for_every_target(compiled):
    from fusedpo.triton_kernels import advantages

    assert {name for name in vars(advantages) if name.endswith("_kernel")} == KERNELS
    assert {(result["kernel"], result["target"]) for result in compiled} == {
        (kernel, target) for kernel in KERNELS for target in triton_aot.TARGETS
    }
    both = len(triton_aot.TARGETS)  # whitening has two kernels
    assert len(compiled) == len(triton_aot.compiled(CASES, ELSEWHERE)) + both


@pytest.mark.parametrize("target", triton_aot.TARGETS)
def test_registers_and_spills(compiled, target, record_property):
    """Nothing is spilled, and two programs of 8 warps fit on a multiprocessor."""
    results = [result for result in compiled if result["target"] == target]
    record_property("registers", {result["case"]: result["registers"] for result in results})
    assert [result for result in results if result["stack"] > 0] == []
    at_most = 128 if target.startswith("sm_") else 256
    assert [result for result in results if result["registers"] > at_most or result["num_warps"] > 8] == []


def test_offsets_have_64_bits(compiled):
    """All of them start from the number of the program, which is widened before anything is computed with it."""
    for result in compiled:
        if result["target"] == "sm_90":
            programs = re.findall(r"(%\S+) = tt\.get_program_id", result["ttir"])
            uses = {use for program in programs for use in re.findall(rf"(\S+) {program}(?!\w)", result["ttir"])}
            assert uses == {"arith.extsi"}, result["case"]


# ------------------------------------------------------------------------------------------------------------- variants


def count_variants() -> dict[str, int]:
    def numbers() -> None:
        """Estimators, k, factors, numbers of groups and of tokens."""
        for i in range(8):
            for name in ("grpo", "rloo", "raft", "gpg", "maxpo", "pkpo s", "passk", "max_at_k"):
                samples(name, 17 + i, count=(17 + i) * (1 + i), mask=False, k=1 + i)
            tokens("gae", torch.zeros(1 + i, 130 + 7 * i), gamma=0.9 + 0.01 * i)
            tokens("gae", torch.zeros(1000)[i:].view(1, -1)[:, :150])

    def group_sizes() -> None:
        for group_size in (1, 2, 5, 16, 17, 31, 48, 100, 200, 256, 300, 600, 1000, 1024, 1025, 4096, 5000):
            samples("grpo", group_size)
            samples("maxpo", group_size)

    def ids() -> None:
        for count in (1, 16, 1000, 4096):
            samples("grpo", None, count=count)
            samples("maxpo", None, count=count)

    def lengths() -> None:
        for length in (1, 7, 16, 20, 33, 100, 128, 129, 500, 513, 1024, 1025, 8000, 32768):
            tokens("gae", torch.zeros(1, length))

    def steps_and_whitening() -> None:
        for i in (1, 2, 16, 100, 5000):
            steps(i, 1 + i % 16, 1 + i)
            whiten(i)

    launches = (numbers, group_sizes, ids, lengths, steps_and_whitening)
    return {launch.__name__: len(triton_aot.variants(launch)) for launch in launches}


def test_number_of_variants():
    """Small groups and large ones have one each; of ranks and of tokens there is one."""
    assert triton_aot.call(__name__, "count_variants") == {
        "numbers": 3,
        "group_sizes": 2 + 1,
        "ids": 2,
        "lengths": 1,
        "steps_and_whitening": 1 + 2,
    }
