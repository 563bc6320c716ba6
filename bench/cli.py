"""``python -m fusedpo bench``: every operator against every provider that is installed.

Each operator is measured by processes of its own: what differs between two launches is part of the spread, and all of
them have the same memory from the start (:data:`MEMORY`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from . import compare, launch, plots, report
from .arguments import parse, parser
from .launch import Plan
from .record import OPERATORS, PROCESSES, Row, merge, recorded

MEMORY = {
    "THP_MEM_ALLOC_ENABLE": "1",  # torch's allocator asks for huge pages, as the kernels of this library do
    # What has up to 4 MiB the C library keeps for the next call, what is larger comes from the system at each, for
    # everybody; left alone, it decides by what others have freed before.
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}


def why_no_recording(arguments: argparse.Namespace, commit: str | None) -> str:
    """Empty where the tables of this run may be published."""
    if commit is None or commit.endswith("-dirty"):
        return f"the tree is not that of a commit ({commit}): commit first, or write elsewhere with --out"
    partial = arguments.quick or arguments.providers or arguments.dtype
    return "a recording is of all dtypes, sizes and providers" if partial else ""


def launched(plan: Plan, path: Path) -> None:
    """Measures in a process of its own."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(path.parent / "inductor")}
    command = [sys.executable, "-m", launch.__name__, json.dumps(asdict(plan)), str(path)]
    subprocess.run(command, env=os.environ | MEMORY | cache, check=True)


def run(plan: Plan, header: report.Environment, out: Path, console: Console) -> list[Row]:
    """Measures one operator, and writes its files; what has been measured when it is interrupted, too."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.jsonl" for number in range(plan.processes)]
        try:
            for number, path in enumerate(paths):
                launched(replace(plan, number=number), path)
        finally:
            found = [launch.read(path.read_text()) for path in paths if path.exists()]
            rows = merge([one.rows for one in found])
            header = header | {"huge_pages": bool(found) and all(one.huge_pages for one in found)}
            if not header["huge_pages"]:
                console.print(f"In pages of 4 KiB: transparent_hugepage is {header['transparent_hugepage']!r}.")
            extra = {"overhead_microseconds": cheapest([one.overhead for one in found])}
            for case, block in report.by_case(rows).items():
                report.show(case, block, console)
            out.mkdir(parents=True, exist_ok=True)
            plots.plot(plan.operator, rows, out / f"{plan.operator}.png", header)
            report.write(plan.operator, rows, header, out, **{k: v for k, v in extra.items() if v})
    return rows


def cheapest(overheads: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for overhead in overheads for name in overhead)
    return {name: min(overhead[name] for overhead in overheads if name in overhead) for name in names}


def main(argv: Sequence[str]) -> int:
    """1 if a row of this library is wrong or fails, or (compare) has become slower; 2 if a run may not be recorded or
    an argument names what is not there.
    """
    arguments = parse(argv)
    if arguments.compare:
        return compare.main(arguments.before, arguments.after, arguments.threshold, arguments.of_ceiling)
    return measured(arguments, OPERATORS)


def measured(arguments: argparse.Namespace, whole: Sequence[str], patience: float = Plan.patience) -> int:
    """Measures and, under ``bench/results``, records; ``whole``: the operators that a folder has all of, or none."""
    arguments.threads = arguments.threads or torch.get_num_threads()
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device: there is no CUDA or ROCm device")
    console = Console(width=None if sys.stdout.isatty() else 120)
    started, failures = time.perf_counter(), []
    header = report.environment(arguments.device, arguments.threads)
    recording = report.RESULTS in arguments.out.resolve().parents
    if recording and (reason := why_no_recording(arguments, header["commit"])):
        console.print(f"not recorded: {reason}", style="red", soft_wrap=True, highlight=False)
        return 2
    out = arguments.out
    if recording:
        out = Path("out/recording")
        shutil.rmtree(out, ignore_errors=True)
        if arguments.out.exists():  # the operators that are measured now replace theirs
            shutil.copytree(arguments.out, out)
    dtypes = arguments.dtype or (["bfloat16"] if arguments.quick else ["float32", "bfloat16"])
    processes = PROCESSES if recording else arguments.processes
    for operator in arguments.op:
        plan = Plan(
            operator,
            arguments.device,
            arguments.quick,
            dtypes,
            arguments.providers,
            arguments.threads,
            processes,
            patience=patience,
        )
        rows = run(plan, header, out, console)
        failures += [r for r in rows if r.provider.startswith("fusedpo") and r.note.startswith(("wrong", "failed"))]
    for row in failures:
        console.print(f"{row.case}: {row.provider}: {row.note}", style="red", soft_wrap=True)
    if recording:
        try:
            if report.commit() != header["commit"]:
                raise ValueError("the tree has changed during the run")
            recorded(out, whole)
        except ValueError as reasons:
            console.print(f"not recorded, and left in {out}:\n{reasons}", style="red", soft_wrap=True, highlight=False)
            return 2
        shutil.copytree(out, arguments.out, dirs_exist_ok=True)
    console.print(f"{time.perf_counter() - started:.0f} s; results in {arguments.out}", highlight=False)
    return int(bool(failures))
