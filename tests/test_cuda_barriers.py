"""Each barrier of the CUDA kernels, and each wait for a copy, as nvcc compiles them, is removed in turn: that is found,
or there is a reason why it cannot be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import cuda_on_cpu
import pytest
import test_advantages_cuda
import test_distributed_cuda
import test_one_pass_cuda
import test_policy_loss_cuda

from fusedpo import backends

pytestmark = [
    pytest.mark.slow,
    cuda_on_cpu.needs_nvcc,
    pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING)),
]

UNSEEN = Path(__file__).parent / "ptx" / "unseen_barriers_cuda.json"
BARRIER = re.compile(
    r"bar\.sync[^;]*;|bar\.warp\.sync[^;]*;|barrier\.cluster\.arrive[^;]*;\s*barrier\.cluster\.wait[^;]*;|"
    r"mbarrier\.try_wait[^;]*;"
)
PASSED = "setp.eq.u32 {}, 0, 0;"  # in the place of a wait for an mbarrier: the phase is over at once
CHECKS: dict[str, Callable[[Path], None]] = {
    "advantages": test_advantages_cuda.check_a_few,
    "one_pass": test_one_pass_cuda.check_a_few,
    "policy_loss": test_policy_loss_cuda.check_a_few,
    "row_stats": test_distributed_cuda.check_a_few,
}


def kernel_at(text: str, place: int) -> str:
    return re.findall(r"\.entry (\w+)", text[:place])[-1]


def unseen_barriers(name: str, directory: Path) -> dict[str, list[str]]:
    """By kernel, the numbers of the barriers without which nothing is found. All are executed."""
    program = cuda_on_cpu.build_as_compiled(name, directory / name)
    target = program.with_suffix(".ptx")
    text = target.read_text()

    def fails(new: str) -> bool:
        target.write_text(re.sub(r"^\s*\.loc\s.*\n", "", new, flags=re.M))  # which take longer to parse than the rest
        try:
            CHECKS[name](program)
        except AssertionError:
            return True
        return False

    assert not fails(text)
    unseen: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for barrier in BARRIER.finditer(text):
        kernel = kernel_at(text, barrier.start())
        number = counts[kernel] = counts.get(kernel, -1) + 1
        before, after = text[: barrier.start()], text[barrier.end() :]
        wait = re.match(r"mbarrier\.try_wait\S+\s+([^,]+),", barrier[0])
        removed = PASSED.format(wait[1]) if wait else ";"
        if fails(before + removed + after):
            continue
        line = re.findall(r"\.loc\s+\d+ (\d+)", before)[-1]
        executed = fails(f"{before}trap;{after}")
        assert executed, f"these calls never execute barrier {number} of {kernel}, line {line}"
        unseen.setdefault(kernel, []).append(str(number))
    return unseen


@pytest.mark.parametrize("name", CHECKS)
def test_barriers_are_missed(name, tmp_path):
    expected = json.loads(UNSEEN.read_text())
    if f"release {expected['nvcc']}," not in cuda_on_cpu.nvcc_version():
        pytest.skip(f"the list is of nvcc {expected['nvcc']}")
    found = unseen_barriers(name, tmp_path)
    assert found == {kernel: list(barriers) for kernel, barriers in expected[name].items()}
