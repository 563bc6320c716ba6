"""What the CUDA kernels do to memory and to the special-function units, as nvcc compiles them for sm_90: what
tests/ptx/counters_cuda.json has. Who changes a kernel changes the table too: what was counted is left in
build/ptx/counters_cuda.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_on_cpu
import ptx
import pytest
import test_advantages_cuda as advantages
import test_one_pass_cuda as one_pass
import torch
from support import policy_loss_cuda as policy_loss
from support.policy_loss import random_batch

from fusedpo import backends
from fusedpo import objectives as O

pytestmark = [
    cuda_on_cpu.needs_nvcc,
    pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING)),
]

TABLE = Path(__file__).parent / "ptx" / "counters_cuda.json"
COUNTERS = (
    "load_bytes", "load_requests", "load_sectors", "unique_load_sectors", "bulk_bytes", "store_bytes",
    "store_requests", "store_sectors", "unique_store_sectors", "shared_requests", "shared_waves", "exponentials",
    "barriers", "divergent_branches", "thread_instructions",
)  # fmt: skip
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS = 2
H200 = one_pass.Device(16, 232_448, 1)  # as launched there, but for the number of clusters


def rows(program: Path, size: int, dtype: torch.dtype, entropy_coef: float) -> None:
    objective = O.Objective(O.Trace(0, 4), O.NoTrustRegion(), entropy_coef=entropy_coef)
    problem = one_pass.problem(objective, (1, ROWS), size, dtype)
    one_pass.check(program, [one_pass.Call(one_pass.without_mask(problem), H200)])


def scaling(program: Path, size: int, dtype: torch.dtype) -> None:
    gradient = torch.randn(ROWS, size).to(dtype)
    arguments = (1, gradient, *one_pass.DENSE.arguments(gradient.shape), *gradient.shape, torch.tensor(-0.3))
    cuda_on_cpu.run(program, [arguments], [(gradient.shape, dtype)])


def losses(program: Path, size: int) -> None:
    batch = random_batch(ROWS, size, spread=0.02, holes=False)
    batch["mask"][:] = True
    policy_loss.run(program, [policy_loss.call(batch, O.nfpo(4), False, policy_loss.Sizes(256, 1024, 1024))])


def whitening(program: Path, size: int) -> None:
    batch = advantages.Batch()
    batch.add("whiten", (ROWS * size,), (torch.randn(ROWS * size), None, None, True), 256, "whiten")
    batch.check(program)


# The program, what it runs for so many elements, and how many; twice, for what is done for each block of them.
CASES: dict[str, tuple[str, Callable[..., None], tuple[Any, ...], int]] = {
    "one pass, bfloat16": ("one_pass", rows, (BF16, 0.0), 151_936),
    "one pass, bfloat16, entropy": ("one_pass", rows, (BF16, 0.1), 151_936),
    "one pass, float32": ("one_pass", rows, (FP32, 0.0), 128_256),
    "one pass, float16, unaligned": ("one_pass", rows, (FP16, 0.0), 50_257),
    "scaling, bfloat16": ("one_pass", scaling, (BF16,), 151_936),
    "policy loss, NFPO": ("policy_loss", losses, (), 4096),
    "whitening, float32": ("advantages", whitening, (), 8192),
}


@pytest.fixture(scope="module")
def program(request, tmp_path_factory):
    return cuda_on_cpu.build_as_compiled(request.param, tmp_path_factory.mktemp("cuda") / request.param)


def measure(name: str, program: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, int]]:
    """Of each launch: its counters, and how many more barriers there are for twice the elements."""
    _, run, arguments, size = CASES[name]
    launches = []
    for number, elements in enumerate((size, 2 * size - size % 2)):
        path = directory / f"{number}.txt"
        monkeypatch.setenv("PTX_COUNTERS", str(path))
        torch.manual_seed(0)
        run(program, elements, *arguments)
        launches.append(cuda_on_cpu.read_counters(path))
    found: dict[str, dict[str, int]] = {}
    for (kernel, counters), (_, more) in zip(*launches, strict=True):
        row = {"elements": ROWS * size} | {counter: counters[counter] for counter in COUNTERS}
        number = sum(name.startswith(kernel) for name in found)
        found[kernel + f", launch {number + 1}" * (number > 0)] = row | {"barriers_of_twice_as_many": more["barriers"]}
    return found


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    expected = json.loads(TABLE.read_text())
    if f"release {expected['nvcc']}," not in cuda_on_cpu.nvcc_version():
        pytest.skip(f"the table is of nvcc {expected['nvcc']}")
    return expected


@pytest.fixture(scope="module")
def counted() -> Iterator[dict[str, Any]]:
    rows: dict[str, Any] = {"nvcc": cuda_on_cpu.nvcc_release(), "target": "sm_90"}
    yield rows
    (ptx.BUILD / "counters_cuda.json").write_text(json.dumps(rows, indent=1) + "\n")


@pytest.mark.parametrize(("program", "name"), [(case[0], name) for name, case in CASES.items()], indirect=["program"])
def test_counters(name, program, counted, table, tmp_path, monkeypatch):
    counted[name] = measure(name, program, tmp_path, monkeypatch)
    assert counted[name] == table[name]
