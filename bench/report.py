"""The table on the terminal, and the result files: JSON with an environment header, and Markdown."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from .harness import transparent_hugepage
from .record import FORMAT, Row, dumps, number

Environment = dict[str, Any]

RESULTS = Path(__file__).resolve().parents[1] / "bench/results"

COLUMNS: Sequence[tuple[str, str, str]] = (
    ("provider", "provider", "{}"),
    ("median", "ms", ""),
    ("p20", "p20", ""),
    ("p80", "p80", ""),
    ("samples", "n", "{}"),
    ("low", "lowest", ""),
    ("high", "highest", ""),
    ("gigabytes_per_second", "GB/s", "{:.3g}"),
    ("teraflops", "TFLOP/s", "{:.3g}"),
    ("of_ceiling", "of ceiling", "{:.0%}"),
    ("ceiling", "ceiling", "{}"),
    ("page_faults", "faults", "{:,.0f}"),
    ("others", "others", "{:.2f}"),
    ("peak_extra_megabytes", "peak MB", "{:.3g}"),
    ("launches", "launches", "{}"),
    ("error", "error", "{:.1e}"),
    ("compile_seconds", "compile s", "{:.1f}"),
    ("note", "note", "{}"),
)

PEERS = ("torch", "triton", "trl", "verl", "liger_kernel", "cut-cross-entropy")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str | None:
    """Of the source tree that this file is in, results apart; an installed package has none."""
    root = RESULTS.parents[1]
    if not (root / ".git").exists():
        return None
    described = _output("git", "-C", str(root), "describe", "--always")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--", ".", ":(exclude)bench/results")
    return described and described + ("-dirty" if changed else "")


def _processor() -> str:
    """The name, which generations share, and the numbers that tell them apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.processor()
    return "{model name} (family {cpu family}, model {model})".format_map(defaultdict(lambda: "?", fields))


def environment(device: str, threads: int) -> Environment:
    """``run`` is the same in all files of one run."""
    on_gpu = device == "cuda"
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return {
        "date": now.date().isoformat(),
        "run": now.isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability())
        if on_gpu
        else torch.backends.cpu.get_cpu_capability(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cuda": torch.version.cuda,
        "cpu": _processor(),
        "threads": threads,
        "transparent_hugepage": transparent_hugepage(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "fusedpo": version("fusedpo"),
        "commit": commit(),
        **{name: version(name) for name in PEERS},
    }


TIMES = ("median", "p20", "p80", "low", "high")


def _cell(row: Row, key: str, pattern: str) -> str:
    value = row.details[key] if key in row.details else getattr(row, key, None)
    if value is None or (key == "samples" and not value):
        return ""
    return number(value, row.samples) if key in TIMES else pattern.format(value)


def _cells(rows: Sequence[Row], leave_out: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Titles and lines of the table, without the columns that are empty."""
    details = ((name, name, "{:.2g}") for name in dict.fromkeys(name for row in rows for name in row.details))
    columns = [c for c in (*COLUMNS, *details) if c[0] not in leave_out and any(_cell(row, c[0], c[2]) for row in rows)]
    lines = [[_cell(row, key, pattern) for key, _, pattern in columns] for row in rows]
    return [title for _, title, _ in columns], lines


def by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    blocks: dict[str, list[Row]] = {}
    for row in rows:
        blocks.setdefault(row.case, []).append(row)
    return blocks


def show(case: str, rows: list[Row], console: Console) -> None:
    """The table of one case, and why the rows without a time have none."""
    measured = [row for row in rows if row.median is not None]
    titles, lines = _cells(measured, ("gigabytes_per_second", "compile_seconds", "low", "high", "ceiling", "others"))
    table = Table(title=case, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for heading in titles:
        table.add_column(heading, justify="left" if heading == "provider" else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for row in rows:
        if row.median is None:
            style = "red" if row.note.startswith(("wrong", "failed")) else "dim"
            console.print(f"  {row.provider}: {row.note}", style=style, soft_wrap=True, highlight=False)


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines)]


def write(operator: str, rows: list[Row], header: Environment, out: Path, **extra: Any) -> None:
    """``operator.json`` and ``operator.md``."""
    out.mkdir(parents=True, exist_ok=True)
    document = {"format": FORMAT, "operator": operator, "environment": header, **extra}
    (out / f"{operator}.json").write_text(dumps(document | {"rows": [asdict(row) for row in rows]}))
    machine = ", ".join(f"{name} {value}" for name, value in header.items() if value is not None)
    lines = [f"# {operator}", "", machine]
    for case, block in by_case(rows).items():
        lines += ["", f"**{case}**", "", *markdown_table(*_cells(block))]
    for title, values in extra.items():
        lines += ["", *markdown_table([title.replace("_", " "), ""], ([k, f"{v:.4g}"] for k, v in values.items()))]
    lines += ["", f"![{operator}]({operator}.png)", ""] if (out / f"{operator}.png").exists() else [""]
    (out / f"{operator}.md").write_text("\n".join(lines))
