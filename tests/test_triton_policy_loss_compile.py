"""What the compiler makes of the policy loss, for GPUs that are not here: resources, offsets, variants."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
import torch

import fusedpo
from fusedpo import objectives as O

pytest.importorskip("triton")
triton_aot = pytest.importorskip("support.triton_aot")

pytestmark = [pytest.mark.triton, pytest.mark.slow]

NFPO = O.nfpo(4)
KERNELS = ("_tokens_kernel", "_finish_kernel", "_backward_kernel")


def forward(
    objective: O.Objective = NFPO,
    rows: int = 2,
    width: int = 1024,
    *,
    packed: bool = False,
    mask: bool = True,
    denominator: bool = False,
    everything: bool = True,
    per_token: bool = False,
) -> None:
    from fusedpo.triton_kernels import policy_loss

    x = torch.zeros(rows * width) if packed else torch.zeros(rows, width)
    given = x if everything else None
    policy_loss.policy_loss(
        x,
        given,
        given,
        x if everything else torch.zeros(rows, 1),
        torch.ones_like(x, dtype=torch.bool) if mask else None,
        torch.arange(rows + 1) * width if packed else None,
        given,
        given,
        torch.ones(()) if denominator else None,
        torch.ones(()),
        *fusedpo.ops.policy_loss.encode(objective),
        per_token,
    )


def backward(rows: int = 2, width: int = 1024, back: int = 0, ahead: int = 3, *, packed: bool = False) -> None:
    from fusedpo.triton_kernels import policy_loss

    x = torch.zeros(rows * width) if packed else torch.zeros(rows, width)
    cu_seqlens = torch.arange(rows + 1) * width if packed else None
    mask = torch.ones_like(x, dtype=torch.bool)
    policy_loss.policy_loss_backward(x, x, x, x, x, mask, cu_seqlens, back, ahead)


CASES: dict[str, Callable[[], None]] = {
    "padded": lambda: (forward(), backward()),
    "packed": lambda: (forward(packed=True, denominator=True), backward(packed=True)),
}


ELSEWHERE = ("packed",)  # compiled for other targets, too: padded batches are the same but for how a tile is found


def compile_cases() -> list[dict]:
    return triton_aot.compile_all(CASES, ELSEWHERE)


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str, str], dict]:
    results = triton_aot.call(__name__, "compile_cases")
    return {(result["case"], result["kernel"], result["target"]): result for result in results}


@pytest.mark.parametrize(("case", "target"), triton_aot.compiled(CASES, ELSEWHERE))
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_spilled(compiled, case, kernel, target, record_property):
    result = compiled[case, kernel, target]
    record_property("registers", result["registers"])
    assert result["stack"] == 0
    assert result["registers"] <= 128  # four programs of 4 warps fit on a multiprocessor


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_offsets_of_tokens_have_64_bits(compiled, case, kernel):
    """Of every array that holds a value per token; the rest have a value per sequence, tile or metric."""
    ttir = compiled[case, kernel, "sm_90"]["ttir"]
    arguments = re.search(r"tt\.func public @\w+\((.*?)\) attributes", ttir, re.DOTALL)[1]
    arrays = set(re.findall(r"%(\w+): !tt\.ptr", arguments))
    arrays -= {"cu_seqlens", "denominator", "loss_scale", "statistics", "metrics"}
    offsets = re.findall(r"tt\.addptr %(\w+), \S+ : !tt\.ptr<\w+>, (\w+)", ttir)
    assert {(array, "i64") for array in arrays} == {(name, kind) for name, kind in offsets if name in arrays}


# ------------------------------------------------------------------------------------------------------------- variants


def count_variants() -> dict[str, int]:
    presets = list(O.PRESETS.values())
    objectives = [preset(beta=0.1) if preset is O.dro else preset() for preset in presets]
    objectives += [
        O.nfpo(2, differentiate=True),
        O.Objective(O.Trace(11, "all"), O.PPOClip(cap=3.0, on="product"), entropy_coef=0.1),
        O.grpo(kl=O.KL("k3", 0.1)),
        O.dr_grpo(length_norm=1.0),
    ]

    def every_objective() -> None:
        for objective, per_token, everything in itertools.product(objectives, (False, True), (False, True)):
            forward(objective, everything=everything, per_token=per_token)

    def many_lengths() -> None:
        for rows, width in itertools.product((1, 2, 16, 33), (1, 16, 1000, 4096)):
            forward(rows=rows, width=width, packed=True)
            backward(rows, width, back=rows, ahead=width, packed=True)

    def all_variants() -> None:
        choices = itertools.product((False, True), repeat=3)
        for packed, mask, denominator in choices:
            forward(packed=packed, mask=mask, denominator=denominator)

    launches = (every_objective, many_lengths, all_variants)
    return {launch.__name__: len(triton_aot.variants(launch)) for launch in launches}


def test_number_of_variants():
    """Padded or packed, with a mask or without: these are compiled apart, and nothing else."""
    assert triton_aot.call(__name__, "count_variants") == {
        "every_objective": 2,
        "many_lengths": 2 + 1,
        "all_variants": 4 + 4,
    }
