"""What kernels do to memory and to the special-function units, as compiled for sm_90: what tests/ptx/counters.json
has. Who changes a kernel changes the table too: what was counted is left in build/ptx/counters.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ptx
import pytest
import torch
from test_policy_loss import random_batch

import fusedpo
from fusedpo import objectives as O

triton = pytest.importorskip("triton")
import test_triton_one_pass as one_pass  # noqa: E402
import test_triton_policy_loss as policy_loss  # noqa: E402

pytestmark = [pytest.mark.triton, pytest.mark.skipif("not ptx.runs_triton()", reason="Triton is not run as compiled")]

TABLE = Path(__file__).parent / "ptx" / "counters.json"
COUNTERS = (
    "load_bytes", "load_requests", "load_sectors", "unique_load_sectors", "store_bytes", "store_requests",
    "store_sectors", "unique_store_sectors", "shared_requests", "shared_waves", "exponentials", "barriers",
    "divergent_branches", "thread_instructions",
)  # fmt: skip
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS = 2


def two_passes(size: int, dtype: torch.dtype) -> None:
    logits = torch.randn(ROWS, size).to(dtype).requires_grad_()
    outputs = fusedpo.token_logprobs(logits, torch.arange(ROWS), return_entropy=True)
    torch.autograd.backward(outputs, [torch.ones(ROWS)] * 2)


def fused(size: int, dtype: torch.dtype) -> None:
    batch = one_pass.make_batch((1, ROWS), size, dtype=dtype) | {"mask": torch.ones(1, ROWS, dtype=torch.bool)}
    one_pass.run(batch, O.nfpo(4, entropy_coef=0.1))


def losses(size: int) -> None:
    batch = random_batch(ROWS, size, spread=0.02, holes=False)
    batch["mask"][:] = True
    policy_loss.run(batch, O.nfpo(4))


# Elements of which there are so many, and how many; twice, for what is done for each block of them.
CASES: dict[str, tuple[Callable[..., None], tuple[Any, ...], int]] = {
    "log-probs, bfloat16": (two_passes, (BF16,), 151_936),
    "log-probs, float32": (two_passes, (FP32,), 128_256),
    "log-probs, float16, unaligned": (two_passes, (FP16,), 50_257),
    "one pass, bfloat16": (fused, (BF16,), 151_936),
    "one pass, float32": (fused, (FP32,), 128_256),
    "one pass, float16, unaligned": (fused, (FP16,), 50_257),
    "policy loss, NFPO": (losses, (), 4096),
}


def measure(name: str) -> dict[str, dict[str, int]]:
    """Of each kernel: its counters, and how many more barriers there are for twice the elements."""
    run, arguments, size = CASES[name]
    with fusedpo.backend("triton"), ptx.recorded() as launches:
        run(size, *arguments)
        count = len(launches)
        run(2 * size - size % 2, *arguments)
    rows = {}
    for (kernel, counters), (_, more) in zip(launches[:count], launches[count:], strict=True):
        rows[kernel] = {"elements": ROWS * size} | {counter: counters[counter] for counter in COUNTERS}
        rows[kernel]["barriers_of_twice_as_many"] = more["barriers"]
    return rows


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    expected = json.loads(TABLE.read_text())
    if triton.__version__ != expected["triton"]:
        pytest.skip(f"the table is of Triton {expected['triton']}")
    return expected


@pytest.fixture(scope="module")
def counted():
    rows: dict[str, Any] = {"triton": triton.__version__, "target": "sm_90"}
    yield rows
    (ptx.BUILD / "counters.json").write_text(json.dumps(rows, indent=1) + "\n")


@pytest.mark.parametrize("name", CASES)
def test_counters(name, counted, table):
    counted[name] = measure(name)
    assert counted[name] == table[name]
