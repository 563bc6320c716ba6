"""One process of a run: measures the cases of one operator. :mod:`.cli` starts it, and reads what it has written."""

from __future__ import annotations

import importlib
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .harness import Case, Effort, effort, has_huge_pages, measure, touch_memory
from .record import Row

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Plan:
    """What the processes of a run have in common, and which of them this is."""

    operator: str
    device: str
    quick: bool
    dtypes: Sequence[str]
    providers: Sequence[str] | None
    threads: int
    processes: int
    number: int = 0
    patience: float = 15.0  # seconds a case may spend on a provider; beyond, it has fewer samples

    @property
    def effort(self) -> Effort:
        return effort(self.quick, self.processes, self.patience)


@dataclass
class Found:
    """What a process has written, also if it came to no end."""

    rows: list[Row]
    huge_pages: bool
    overhead: dict[str, float]


def select(case: Case, names: Sequence[str] | None) -> Case:
    """With the providers whose name starts with one of ``names``, and their ceilings."""
    if names is None:
        return case
    chosen = [p for p in case.providers if p.name.startswith(tuple(names))]
    ceilings = {case.ceiling, *(p.ceiling for p in chosen)}
    return replace(case, providers=[p for p in case.providers if p in chosen or p.name in ceilings])


def run(plan: Plan, console: Console) -> Iterator[dict[str, Any]]:
    """What there is to say of the memory, then of each case, then of the operator's small calls."""
    torch.set_num_threads(plan.threads)
    # A compile time that a cache has shortened says nothing. The first process tells it, the others need not wait.
    torch._inductor.config.force_disable_caches = plan.number == 0
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
    torch.manual_seed(0)
    yield {"huge_pages": has_huge_pages()}
    if not plan.quick:
        touch_memory()
    module = importlib.import_module(f".{plan.operator}", __package__)
    title = f"{plan.operator}, process {plan.number + 1} of {plan.processes}"
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(pulse_style="bar.complete"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(title, total=1.0)
        for case in module.cases(plan.device, plan.quick, [DTYPES[name] for name in plan.dtypes]):
            progress.update(task, description=f"{title}: {case.name}", completed=0.0)
            started = time.perf_counter()
            rows = measure(
                select(case, plan.providers),
                plan.device,
                plan.effort,
                lambda share: progress.update(task, completed=share),
            )
            progress.console.print(f"{title}: {case.name}: {time.perf_counter() - started:.0f} s", highlight=False)
            yield {"rows": [asdict(row) for row in rows]}
    if hasattr(module, "overhead"):
        yield {"overhead": module.overhead()}


def read(text: str) -> Found:
    found = Found([], False, {})
    for entry in map(json.loads, text.splitlines()):
        found.rows += [Row(**row) for row in entry.get("rows", ())]
        found.huge_pages = entry.get("huge_pages", found.huge_pages)
        found.overhead = entry.get("overhead", found.overhead)
    return found


def main(plan: Plan, path: Path, console: Console) -> None:
    """A line of JSON per case, written when it has been measured: what ends this process loses one case."""
    with path.open("w") as file:
        for entry in run(plan, console):
            file.write(json.dumps(entry) + "\n")
            file.flush()


if __name__ == "__main__":
    try:
        main(Plan(**json.loads(sys.argv[1])), Path(sys.argv[2]), Console(width=None if sys.stdout.isatty() else 120))
    except KeyboardInterrupt:
        sys.exit(130)
