"""Two result files of the same cases: how much slower or faster, and whether that is more than their spread."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass
class Change:
    """The ratio of the second time to the first, between the extremes that the 20th and 80th percentiles allow."""

    case: str
    provider: str
    ratio: float | None
    low: float | None
    high: float | None
    verdict: str

    @property
    def fails(self) -> bool:
        return self.verdict not in ("", "faster", "new")


def compare(first: dict, second: dict, threshold: float, *, of_ceiling: bool = False) -> list[Change]:
    """``threshold`` is the slowdown that is allowed: 0.1 for a tenth. A change within the spread is no slowdown.

    ``of_ceiling``: each time is divided by that of its case's ceiling in the same run, as between two machines, or on
    one that was busier in one of the runs.
    """
    after = {(row["case"], row["provider"]): row for row in second["rows"]}
    before = {(row["case"], row["provider"]): row for row in first["rows"]}
    changes = []
    for key, old in before.items():
        new = after.get(key)
        if old["median"] is None:
            continue
        if new is None or new["median"] is None:
            verdict = "missing" if new is None else new["note"] or "no time"
            changes.append(Change(*key, None, None, None, verdict))
            continue
        unit = 1.0
        if of_ceiling and old["of_ceiling"] and new["of_ceiling"]:
            # ceiling before / ceiling after
            unit = old["of_ceiling"] * old["median"] / (new["of_ceiling"] * new["median"])
        ratio, low, high = (unit * new[a] / old[b] for a, b in (("median", "median"), ("p20", "p80"), ("p80", "p20")))
        verdict = "slower" if ratio > 1 + threshold and low > 1 else "faster" if high < 1 else ""
        changes.append(Change(*key, ratio, low, high, verdict))
    new_rows = (key for key, row in after.items() if key not in before and row["median"] is not None)
    return changes + [Change(*key, None, None, None, "new") for key in new_rows]


def main(first: Path, second: Path, threshold: float, of_ceiling: bool) -> int:
    """Prints the table; 1 if a row is slower, is missing or has become wrong."""
    documents = [json.loads(path.read_text()) for path in (first, second)]
    changes = compare(*documents, threshold, of_ceiling=of_ceiling)
    table = Table(title=f"time in {second} / time in {first}")
    for heading in ("case", "provider", "ratio", "spread", ""):
        table.add_column(heading, justify="right" if heading in ("ratio", "spread") else "left")
    for c in changes:
        numbers = ("", "") if c.ratio is None else (f"{c.ratio:.2f}", f"{c.low:.2f} to {c.high:.2f}")
        table.add_row(c.case, c.provider, *numbers, c.verdict, style="red" if c.fails else None)
    console = Console()
    console.print(table)
    machines = [{k: d["environment"].get(k) for k in ("device", "threads")} for d in documents]
    if machines[0] != machines[1] and not of_ceiling:
        console.print("Two different machines: compare with --of-ceiling.", style="yellow")
    return int(any(c.fails for c in changes))
