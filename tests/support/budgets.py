"""What the row kernels issue for each logit, as a share of what a GPU can issue while its memory moves that logit at
the speed of a copy. Facts about machine code, without a GPU; ``tests/budgets.json`` has them, and the reasons of those
above 75%. Who changes a kernel writes the table anew, in a minute or two:

    cd tests && python -m support.budgets

That replaces the lines of the compilers that are there and keeps the reasons. Another version of Triton comes into the
table by ``pip install --no-deps --target build/triton-3.6.0 triton==3.6.0``.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cuda_on_cpu

from . import sass

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests" / "budgets.json"
OTHER_TRITON = ROOT / "build" / "triton-3.6.0"
MOST = 0.75


class Gpu(NamedTuple):
    """What budgets are made of. ``copy`` counts bytes read and written, in TB/s."""

    name: str
    multiprocessors: int
    gigahertz: float
    copy: float


GPUS = {
    "sm_80": Gpu("A100 80 GB", 108, 1.41, 1.7),
    "sm_90": Gpu("H200", 132, 1.755, 4.3),
    "sm_100": Gpu("B200", 148, 1.85, 7.0),
}


class Case(NamedTuple):
    """Launches of a test file, and the bytes that a copy would move for each element."""

    module: str
    name: str
    itemsize: int
    moved: dict[str, int]  # by kernel


def cases() -> Iterator[Case]:
    """All rows that are longer than a block."""
    for module, kernels in (
        ("test_triton_compile", {"_token_logprobs_kernel": 1, "_token_logprobs_backward_kernel": 2}),
        ("test_triton_one_pass_compile", {"_one_pass_kernel": 2, "_scale_kernel": 2}),
        ("test_triton_exact_kl_compile", {"_exact_kl_kernel": 3}),
    ):
        for name in importlib.import_module(module).CASES:
            if "short" not in name and "no gradient" not in name:
                size = 4 if "fp32" in name else 2
                yield Case(module, name, size, {kernel: size * times for kernel, times in kernels.items()})


def rows_of_triton() -> list[dict[str, Any]]:
    """In a process where Triton compiles: see triton_aot.call."""
    import triton

    from . import triton_aot

    rows = []
    for case in cases():
        launch: Callable[[], object] = importlib.import_module(case.module).CASES[case.name]
        for variant in triton_aot.variants(launch):
            kernel = variant.kernel.__name__
            for target in GPUS if kernel in case.moved else ():
                cubin = triton_aot.compile_variant(variant, target).asm["cubin"]
                (code,) = sass.disassemble(cubin).values()
                compiler, loops = f"triton {triton.__version__}", sass.hot_loops(code)
                rows.append(row(compiler, target, case.name, kernel, loops, case.itemsize, case.moved[kernel]))
    return rows


def rows_of_cuda() -> list[dict[str, Any]]:
    rows = []
    for target in GPUS:
        kernels = sass.disassemble(cuda_on_cpu.compile_to_machine_code("one_pass", int(target.removeprefix("sm_"))))
        for symbol, code in kernels.items():
            kernel = cuda_on_cpu.kernel_name(symbol)
            if kernel == "order_kernel" or (kernel == "row_kernel" and target == "sm_80"):  # nothing for older devices
                continue
            dtype = {"If": "fp32", "I6": "fp16", "I1": "bf16"}[symbol.partition(kernel)[2][:2]]
            size = 4 if dtype == "fp32" else 2
            loops = sorted(sass.hot_loops(code), key=len)
            writing = [path for path in loops if sass.writes(path)]
            reading = [path for path in loops if not sass.writes(path)]
            assert len(writing) == (2 if kernel == "row_kernel" else 1), "without and with the gradient of the entropy"
            for extra, path in zip(("", ", entropy"), writing, strict=False):
                compiler, loops = f"nvcc {cuda_on_cpu.nvcc_release()}", [*reading, path]
                rows.append(row(compiler, target, dtype + extra, kernel, loops, size, 2 * size))
    return rows


def row(
    compiler: str,
    target: str,
    case: str,
    kernel: str,
    loops: Sequence[Sequence[sass.Instruction]],
    itemsize: int,
    moved: int,
) -> dict[str, Any]:
    """A line of the table: what all sweeps over a row issue, which share the time that memory takes for it.

    Of loops that are for different rows the one counts that issues most. One that writes a row while it reads another
    is all that there is to a row.
    """
    assert loops, f"{kernel}, {case}, {target}: no loop over a row was found"
    if target == "sm_90":  # elsewhere a loop may hold what is done once for a row, too
        assert all(i.name not in ("LDL", "STL") for path in loops for i in path), f"{kernel}, {case}: spills"
    found = [(sass.counts(path, itemsize), sass.writes(path), sass.reads_ahead(path)) for path in loops]
    writing = max((counts for counts, writes, _ in found if writes), default=None)
    ahead = any(ahead for _, _, ahead in found)
    reading = None if ahead else max((counts for counts, writes, _ in found if not writes), default=None)
    total = [sum(numbers) for numbers in zip(*filter(None, (reading, writing)), strict=True)]
    counts = sass.Counts(*total[:-1], barriers=total[-1])
    rounded = {name: round(value, 2) for name, value in counts._asdict().items() if name != "fma"}
    return {
        "compiler": compiler,
        "target": target,
        "kernel": kernel,
        "case": case,
        **rounded,
        "shares": {unit: round(share, 2) for unit, share in shares(counts, moved, GPUS[target]).items()},
    }


def shares(counts: sass.Counts, moved: int, gpu: Gpu) -> dict[str, float]:
    """Of a multiprocessor: 4 schedulers issue for 32 lanes each; half as many do integers, an eighth exponentials."""
    clocks = gpu.multiprocessors * gpu.gigahertz * moved / (1000 * gpu.copy)  # of all multiprocessors, for one element
    return {
        "issue": counts.issued / (128 * clocks),
        "alu": counts.alu / (64 * clocks),
        "fma": counts.fma / (128 * clocks),
        "exponentials": counts.exponentials / (16 * clocks),
    }


# --------------------------------------------------------------------------------------------------------------- table


def key(line: dict[str, Any]) -> tuple[str, ...]:
    return tuple(line[name] for name in ("compiler", "target", "kernel", "case"))


def load() -> list[dict[str, Any]]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else []


def is_above(line: dict[str, Any]) -> bool:
    return max(line["shares"].values()) > MOST


def by_triton(place: Path | None = None) -> list[dict[str, Any]]:
    """Of the Triton that is installed, or of the one in a directory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
    if place is not None:
        environment["PYTHONPATH"] = str(place)
    program = "import json; from support import budgets; print(json.dumps(budgets.rows_of_triton()))"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, cwd=ROOT / "tests", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-5000:]
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    lines = by_triton()
    if OTHER_TRITON.exists():
        lines += by_triton(OTHER_TRITON)
    if cuda_on_cpu.NVCC is not None:
        lines += rows_of_cuda()
    old = load()
    reasons = {key(line): line["reason"] for line in old if "reason" in line}
    compilers = {line["compiler"] for line in lines}
    lines = [line for line in old if line["compiler"] not in compilers] + [
        line | ({"reason": reasons.get(key(line), "")} if is_above(line) else {}) for line in lines
    ]
    lines.sort(key=key)
    TABLE.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")


if __name__ == "__main__":
    main()
