"""What every benchmark shares: timing that compares providers fairly, ceilings, memory, errors, and result files.

Providers of one case take turns, so that whatever else the machine does falls on all of them; a ratio within one run
means something, an absolute time on another machine does not. A row whose output is wrong has no time.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

Run = Callable[[], Any]


@dataclass
class Row:
    """One provider in one case. Times in milliseconds; ``note`` says why there is none."""

    case: str
    provider: str
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    gigabytes_per_second: float | None = None
    of_ceiling: float | None = None  # the ceiling's time over this time
    peak_extra_megabytes: float | None = None
    error: float | None = None  # largest difference from float64, over the largest value there
    compile_seconds: float | None = None
    note: str = ""


@dataclass
class Provider:
    """``prepare()`` gives the call that is timed; ``check(result)`` gives its error, and ``allowed`` bounds that."""

    name: str
    prepare: Callable[[], Run]
    check: Callable[[Any], float] | None = None
    allowed: float = float("inf")
    compiles: bool = False
    missing: str = ""


def measure(
    case: str, providers: Iterable[Provider], *, bytes_moved: float, ceiling: str, repeats: int = 9
) -> list[Row]:
    """One row per provider; ``ceiling`` names the provider whose time is the floor."""
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    for provider in providers:
        row = rows[provider.name] = Row(case, provider.name, note=provider.missing)
        if provider.missing:
            continue
        started = time.perf_counter()
        run = provider.prepare()
        result = run()
        if provider.compiles:
            row.compile_seconds = time.perf_counter() - started
        if provider.check is not None:
            row.error = provider.check(result)
            if not row.error <= provider.allowed:
                row.note = f"wrong: error {row.error:.1e}, allowed {provider.allowed:.1e}"
                continue
        del result
        row.peak_extra_megabytes = peak_extra_bytes(run) / 1e6
        runs[provider.name] = run
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            gc.collect()
            started = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - started) * 1e3)
    for name, samples in times.items():
        row = rows[name]
        row.p20, *_, row.p80 = statistics.quantiles(samples, n=5, method="inclusive")
        row.median = statistics.median(samples)
        row.gigabytes_per_second = bytes_moved / row.median / 1e6
    floor = rows[ceiling].median
    for row in rows.values():
        if floor is not None and row.median is not None:
            row.of_ceiling = floor / row.median
    return list(rows.values())


def peak_extra_bytes(run: Run) -> int:
    """The largest sum of what the allocator gave out and did not get back while ``run`` ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def relative_error(result: Tensor, truth: Tensor) -> float:
    """The largest difference from ``truth`` over its largest value; NaN never passes."""
    difference = (result.detach().double() - truth).abs().max() / truth.abs().max()
    return float(difference) if difference.isfinite() else float("inf")


def microseconds(run: Run, calls: int = 2000) -> float:
    """Processor time of a small call, the best of five rounds: what else runs does not count."""
    for _ in range(calls // 5):
        run()
    best = float("inf")
    for _ in range(5):
        started = time.process_time()
        for _ in range(calls // 5):
            run()
        best = min(best, (time.process_time() - started) / (calls // 5) * 1e6)
    return best


def environment() -> dict[str, Any]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    with open("/proc/cpuinfo") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.processor())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        **{name: version(name) for name in ("fusedpo", "torch", "triton", "trl", "liger_kernel")},
    }


COLUMNS: Sequence[tuple[str, str, str]] = (
    ("case", "case", "{}"),
    ("provider", "provider", "{}"),
    ("median", "ms", "{:.2f}"),
    ("p20", "p20", "{:.2f}"),
    ("p80", "p80", "{:.2f}"),
    ("gigabytes_per_second", "GB/s", "{:.1f}"),
    ("of_ceiling", "of ceiling", "{:.2f}"),
    ("peak_extra_megabytes", "peak MB", "{:.1f}"),
    ("error", "error", "{:.1e}"),
    ("compile_seconds", "compile s", "{:.1f}"),
    ("note", "note", "{}"),
)


def report(name: str, rows: list[Row], out: Path, **extra: Any) -> None:
    """Prints the table; writes ``name.json`` and ``name.md``."""
    out.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment(), "rows": [asdict(row) for row in rows], **extra}
    (out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    lines = [
        [pattern.format(v) if (v := getattr(row, key)) is not None else "" for key, _, pattern in COLUMNS]
        for row in rows
    ]
    header = [title for _, title, _ in COLUMNS]
    table = Table(*header, title=name)
    for line in lines:
        table.add_row(*line)
    Console(width=160).print(table)
    markdown = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines)]
    (out / f"{name}.md").write_text("\n".join([f"# {name}", "", *markdown, ""]))


def progress(cases: Sequence[Any], title: str) -> Iterable[Any]:
    return track(cases, description=title)
