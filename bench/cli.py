"""``python -m fusedpo bench``: every operator against every provider that is installed."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch._inductor.config
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import OPERATORS, compare, plots, report
from .harness import EFFORT, Case, Row, measure

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m fusedpo bench",
        description=__doc__,
        epilog="Or: python -m fusedpo bench compare BEFORE.json AFTER.json [--threshold 0.1] [--of-ceiling]",
    )
    p.add_argument(
        "--op", nargs="+", choices=OPERATORS, default=list(OPERATORS), metavar="OP", help=" ".join(OPERATORS)
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, help="of the logits; default: float32 and bfloat16")
    p.add_argument("--quick", action="store_true", help="bfloat16 and one size: under two minutes on two cores")
    p.add_argument("--providers", nargs="+", metavar="NAME", help="only those whose name starts so, and the ceilings")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument(
        "--out", type=Path, default=Path("out/bench"), help="for JSON, Markdown and plots; default: %(default)s"
    )
    return p


def compare_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m fusedpo bench compare", description=compare.__doc__)
    p.add_argument("before", type=Path)
    p.add_argument("after", type=Path)
    p.add_argument("--threshold", type=float, default=0.1, help="the slowdown that is allowed; default: %(default)s")
    p.add_argument("--of-ceiling", action="store_true", help="compare times in units of the ceiling of their own run")
    return p


def select(case: Case, names: Sequence[str] | None) -> Case:
    """With the providers whose name starts with one of ``names``, and the ceiling."""
    if names is None:
        return case
    chosen = [p for p in case.providers if p.name == case.ceiling or p.name.startswith(tuple(names))]
    return replace(case, providers=chosen)


def run(operator: str, arguments: argparse.Namespace, console: Console) -> list[Row]:
    """Measures one operator, and writes its files; what has been measured when it is interrupted, too."""
    module = importlib.import_module(f".{operator}", __package__)
    default = ["bfloat16"] if arguments.quick else ["float32", "bfloat16"]
    dtypes = [DTYPES[name] for name in arguments.dtype or default]
    header = report.environment(arguments.device)
    rows: list[Row] = []
    extra = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(pulse_style="bar.complete"))
    torch.manual_seed(0)
    try:
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
            task = progress.add_task(operator, total=None)
            for case in module.cases(arguments.device, arguments.quick, dtypes):
                progress.update(task, description=f"{operator}: {case.name}")
                chosen = select(case, arguments.providers)
                block = measure(chosen, arguments.device, EFFORT[arguments.device, arguments.quick])
                report.show(case.name, block, progress.console)
                rows += block
        if hasattr(module, "overhead"):
            extra["overhead_microseconds"] = module.overhead()
    finally:
        arguments.out.mkdir(parents=True, exist_ok=True)
        plots.plot(operator, rows, arguments.out / f"{operator}.png")
        report.write(operator, rows, header, arguments.out, **extra)
    return rows


def main(argv: Sequence[str]) -> int:
    """1 if a row of this library is wrong or fails, or (compare) has become slower."""
    if argv[:1] == ["compare"]:
        a = compare_parser().parse_args(argv[1:])
        return compare.main(a.before, a.after, a.threshold, a.of_ceiling)
    arguments = parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch._inductor.config.force_disable_caches = True  # a compile time that a cache has shortened says nothing
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
    console = Console(width=None if sys.stdout.isatty() else 120)
    started, failures = time.perf_counter(), []
    for operator in arguments.op:
        rows = run(operator, arguments, console)
        failures += [r for r in rows if r.provider.startswith("fusedpo") and r.note.startswith(("wrong", "failed"))]
    console.print(f"{time.perf_counter() - started:.0f} s; results in {arguments.out}", highlight=False)
    for row in failures:
        console.print(f"{row.case}: {row.provider}: {row.note}", style="red", soft_wrap=True)
    return int(bool(failures))
