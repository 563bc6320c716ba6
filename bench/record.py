"""What is recorded, and what may be published of it: the standard library suffices here, for docs/generate.py reads it.

A recorded row holds every sample; all its other figures follow from these, and :func:`faults` computes them again.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

FORMAT = 2
PROCESSES = 3
"""Launches behind a recorded row: what differs between two, such as where memory lies, is part of the spread."""
ENOUGH = 10
"""Samples behind a row of three digits."""
BUSY = 0.2
"""Processors in use by others from which on a case was measured on a busy machine."""

OPERATORS = ("token_logprobs", "policy_loss", "advantages", "one_pass", "hidden", "preference")
"""Recorded together."""
THRESHOLD = ("threshold",)
"""Recorded apart: one option of ``hidden``, for several policies."""

OF_A_RUN = {"date", "run", "commit", "load"}
"""What may differ between the operators that one machine has recorded."""

Document = dict[str, Any]


@dataclass
class Row:
    """One provider in one case. Times in milliseconds; ``note`` says why there is none.

    ``times``: the samples, a list per process. ``median``: of the medians of the processes, which reach from ``low`` to
    ``high``; ``p20`` and ``p80``: of all samples.
    """

    case: str
    group: str
    sizes: dict[str, int]
    provider: str
    ceiling: str = ""  # the provider of the same case whose time is its floor
    bytes_moved: float = 0.0
    flops: float = 0.0
    times: list[list[float]] = field(default_factory=list)
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    samples: int = 0
    low: float | None = None
    high: float | None = None
    gigabytes_per_second: float | None = None
    teraflops: float | None = None
    of_ceiling: float | None = None  # the ceiling's time over this time
    page_faults: float | None = None  # per call
    peak_extra_megabytes: float | None = None
    allocated_megabytes: float | None = None  # by one call, whatever it gave back; on the CPU
    others: float | None = None  # processors that other programs used while the case was timed
    launches: int | None = None
    error: float | None = None  # largest difference from float64, over the largest value there
    details: dict[str, float] = field(default_factory=dict)  # what else there is to say of the result, by name
    compile_seconds: float | None = None
    note: str = ""


def summarise(rows: Iterable[Row]) -> list[Row]:
    """The rows with all that follows from their times."""
    rows = [replace(row, **_figures(row)) if row.times else row for row in rows]
    medians = {(row.case, row.provider): row.median for row in rows}
    floors = [medians.get((row.case, row.ceiling)) for row in rows]
    return [
        replace(row, of_ceiling=floor / row.median if floor and row.median else None)
        for row, floor in zip(rows, floors, strict=True)
    ]


def _figures(row: Row) -> dict[str, Any]:
    medians, samples = [statistics.median(times) for times in row.times], list(chain(*row.times))
    median = statistics.median(medians)
    p20, *_, p80 = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 2
    return {
        "median": median,
        "p20": p20,
        "p80": p80,
        "samples": len(samples),
        "low": min(medians),
        "high": max(medians),
        "gigabytes_per_second": row.bytes_moved / median / 1e6,
        "teraflops": row.flops / median / 1e9 or None,
    }


def merge(processes: Sequence[Sequence[Row]]) -> list[Row]:
    """One row for what each process measured of a provider; without a time where it failed in any."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in (row for rows in processes for row in rows):
        found.setdefault((row.case, row.provider), []).append(row)
    merged = []
    for same in found.values():
        without = next((row for row in same if not row.times), None)
        if without is not None:
            merged.append(without)
            continue
        worst = {name: _largest(same, name) for name in ("page_faults", "peak_extra_megabytes", "others", "error")}
        merged.append(replace(same[0], times=[times for row in same for times in row.times], **worst))
    return summarise(merged)


def _largest(rows: Iterable[Row], name: str) -> float | None:
    return max((value for row in rows if (value := getattr(row, name)) is not None), default=None)


def digits(samples: int) -> int:
    """How many a median of so many samples is printed with."""
    return 3 if samples >= ENOUGH else 2 if samples >= 4 else 1


def number(value: float, samples: int) -> str:
    """Rounded to what ``samples`` allow."""
    places = digits(samples) - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{round(value, places):,.{max(places, 0)}f}"


def has_small_pages(row: Row) -> bool:
    """Most of its memory came in pages of 4 KiB: a fault each, where a huge page has one for 2 MiB.

    Not all: of an allocation of 5 MB, 3 may lie before and after its huge page. Up to 32 MB nobody can tell.
    """
    megabytes = row.allocated_megabytes or 0.0
    return megabytes > 32 and (row.page_faults or 0.0) > 0.75 * megabytes * 1e6 / 4096


# ---------------------------------------------------------------------------------------------------- what is published


def dumps(document: Document) -> str:
    """With a line per row."""
    head = json.dumps({name: value for name, value in document.items() if name != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in document["rows"])
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def faults(document: Document) -> list[str]:
    """Why a document must not be published; none if it may."""
    if document.get("format") != FORMAT:
        return [f"is of format {document.get('format')}, not {FORMAT}"]
    here, rows = document["environment"], [Row(**row) for row in document["rows"]]
    found = []
    if not here["commit"] or here["commit"].endswith("-dirty"):
        found.append(f"comes from no commit, but from {here['commit']}")
    if here["huge_pages"] is False and here["transparent_hugepage"] != "never":
        found.append("was measured in pages of 4 KiB, on a machine that has huge ones")
    for row, again in zip(rows, summarise(rows), strict=True):
        name = f"{row.case}: {row.provider}"
        if row.samples != sum(map(len, row.times)):
            found.append(f"{name}: says {row.samples} samples, and has {sum(map(len, row.times))}")
        elif row != again:
            found.append(f"{name}: its figures are not those of its samples")
        if row.times and len(row.times) < PROCESSES:
            found.append(f"{name}: {len(row.times)} of {PROCESSES} processes")
        if row.median is None and not row.note:
            found.append(f"{name}: neither a time nor a reason")
        if here["huge_pages"] and has_small_pages(row):
            found.append(f"{name}: {row.page_faults:,.0f} page faults a call: not the memory that others had")
    return found


def recorded(folder: Path, operators: Sequence[str] = OPERATORS) -> dict[str, Document]:
    """By operator, the documents of a folder in the format of today; ValueError where they must not be published.

    Each is one run of one commit. All are of one machine and the same versions.
    """
    read = {name: json.loads(path.read_text()) for name in operators if (path := folder / f"{name}.json").exists()}
    documents = {name: document for name, document in read.items() if document.get("format") == FORMAT}
    reasons = [f"{folder.name}/{name}: {reason}" for name, document in documents.items() for reason in faults(document)]
    for name in sorted({name for document in documents.values() for name in document["environment"]} - OF_A_RUN):
        values = {str(document["environment"].get(name)) for document in documents.values()}
        if len(values) > 1:
            reasons.append(f"{folder.name}: not one machine, {name} is {' and '.join(sorted(values))}")
    if documents and len(documents) < len(operators):
        reasons.append(f"{folder.name}: without {', '.join(sorted(set(operators) - set(documents)))}")
    if reasons:
        raise ValueError("\n".join(reasons))
    return documents
