"""From a sweep to what the launchers take: ``python bench/choose.py sweep.json [--write]``.

Prints the table of go and no-go, and with ``--write`` makes ``python/fusedpo/_chosen.py`` of it. The record belongs
into ``bench/results/DEVICE/sweep.json``: without one there a test does not let a native CUDA kernel run by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

CHOSEN = Path(__file__).resolve().parents[1] / "python" / "fusedpo" / "_chosen.py"
FASTER = 0.97  # of the other's time: less is noise
DEFAULT_L2_SHARE = 2 / 3
SHAPES = ("FORWARD", "BACKWARD", "WALK")


class Question(NamedTuple):
    """Of a variant in one dtype: its time in those of a ceiling, at most ``go``; above ``no_go`` what is to be done."""

    operator: str
    backend: str
    name: str
    dtype: str
    ceiling: str
    go: float
    no_go: float
    then: str


STALLS = "look at stalls: a low long_scoreboard and more than 70% issued are instructions, barrier is the scalar part"
QUESTIONS = (
    Question("one_pass", "native", "one pass", "bfloat16", "copy", 1.12, 1.25, STALLS),
    Question("one_pass", "native", "one pass", "float32", "copy", 1.08, 1.25, STALLS),
    Question(
        "one_pass", "triton", "one pass", "bfloat16", "copy", 1.15, 1.4, "two passes, where fewer programs do not help"
    ),
    Question(
        "one_pass", "triton", "one pass", "float32", "copy", 1.15, 1.4, "two passes, where fewer programs do not help"
    ),
    Question(
        "one_pass", "triton", "two passes", "bfloat16", "copy", 1.6, 1.8, "the forward is not at the limit of memory"
    ),
    Question(
        "token_logprobs", "triton", "forward", "bfloat16", "read", 1.08, 1.18, "no shape is at the limit of memory"
    ),
)


class Decision(NamedTuple):
    native: tuple[str, ...]  # operators whose native CUDA kernels are right in every dtype, and faster than Triton's
    constants: dict[str, Any]  # the others of _chosen.py


Row = dict[str, Any]


def times(document: dict[str, Any], operator: str, backend: str, name: str = "") -> dict[str, Row]:
    """The fastest of these by dtype; nothing for a dtype in which one is wrong. With a setting, it may also not run."""
    found: dict[str, Row] = {}
    wrong = set()
    for row in document["rows"]:
        if (row["operator"], row["backend"]) == (operator, backend) and row["name"].startswith(name):
            if row["milliseconds"] is None:
                if row["error"] is not None or row["setting"] is None:
                    wrong.add(row["dtype"])
            elif row["dtype"] not in found or row["milliseconds"] < found[row["dtype"]]["milliseconds"]:
                found[row["dtype"]] = row
    return {dtype: row for dtype, row in found.items() if dtype not in wrong}


def dtypes(document: dict[str, Any], operator: str) -> set[str]:
    return {row["dtype"] for row in document["rows"] if row["operator"] == operator}


def times_with(document: dict[str, Any], constant: str) -> dict[Any, dict[str, float]]:
    """By value of a constant, the times by dtype: of the dtypes in which it runs and is right."""
    found: dict[Any, dict[str, float]] = {}
    for row in document["rows"]:
        name, value = row["setting"] or ("", None)
        if name == constant:
            by_dtype = found.setdefault(tuple(value) if isinstance(value, list) else value, {})
            if row["milliseconds"] is not None:
                by_dtype[row["dtype"]] = row["milliseconds"]
    return found


def l2_share(document: dict[str, Any]) -> float:
    """The smallest of those that are the fastest in some dtype. Results do not depend on it."""
    fastest: dict[str, tuple[float, float]] = {}
    for share, by_dtype in times_with(document, "L2_SHARE").items():
        for dtype, time in by_dtype.items():
            fastest[dtype] = min(fastest.get(dtype, (time, share)), (time, share))
    return min((share for _, share in fastest.values()), default=DEFAULT_L2_SHARE)


def shape(document: dict[str, Any], constant: str) -> tuple[int, int]:
    """The fastest, as a mean over dtypes, that no dtype loses by; the present one unless that is faster beyond noise.

    Sums of rows follow from it, so that it is not to change for nothing.
    """
    present, found = tuple(document["chosen"][constant]), times_with(document, constant)
    base = found.get(present, {})
    ratios = {
        value: [by_dtype[dtype] / base[dtype] for dtype in base]
        for value, by_dtype in found.items()
        if by_dtype.keys() == base.keys()
    }
    gains = {value: math.prod(each) for value, each in ratios.items() if max(each, default=1) < 1 / FASTER}
    best = min(gains, key=gains.__getitem__, default=present)
    return best if gains.get(best, 1) < FASTER else present


def decide(document: dict[str, Any]) -> Decision:
    native = []
    for operator in sorted({row["operator"] for row in document["rows"] if row["backend"] == "native"}):
        ours, others = (times(document, operator, backend) for backend in ("native", "triton"))
        if ours.keys() == others.keys() == dtypes(document, operator) and all(
            ours[dtype]["milliseconds"] < FASTER * others[dtype]["milliseconds"] for dtype in ours
        ):
            native.append(operator)
    return Decision(tuple(native), {"L2_SHARE": l2_share(document)} | {name: shape(document, name) for name in SHAPES})


def answers(document: dict[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """Lines of the table: the question, go, no-go, what was measured, and the verdict."""
    for q in QUESTIONS:
        row = times(document, q.operator, q.backend, q.name).get(q.dtype)
        floor = times(document, "ceiling", "torch", q.ceiling).get(q.dtype)
        question = f"{q.name}, {q.backend}, {q.dtype}"
        bounds = (f"<= {q.go} x {q.ceiling}", f"> {q.no_go}: {q.then}")
        if row is None or floor is None:
            yield (question, *bounds, "", "not measured, or wrong")
            continue
        ratio = row["milliseconds"] / floor["milliseconds"]
        yield (question, *bounds, f"{ratio:.2f}", "go" if ratio <= q.go else "no-go" if ratio > q.no_go else "between")


def table(lines: Iterator[tuple[str, ...]]) -> str:
    header = ("question", "go", "no-go", "measured", "verdict")
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ("---",) * len(header), *lines))


def source(document: dict[str, Any], decision: Decision) -> str:
    share = decision.constants["L2_SHARE"]
    names = "".join(f'\n    "{name}",' for name in decision.native)
    return f'''"""What was chosen by measurements on a GPU: ``bench/choose.py`` writes this file.

{document["device"]}, {document["date"]}.
"""

# Operators whose native CUDA kernels run without being forced: right, and faster than those of Triton.
NATIVE_ON_CUDA: tuple[str, ...] = ({names}{chr(10) if names else ""})

# How much of the L2 cache the Triton kernel of one_pass may fill with the rows that it has under way.
L2_SHARE = {"2 / 3" if share == DEFAULT_L2_SHARE else f"{share:.3g}"}

# Triton kernels of long rows: how much of a row a program has at a time, and its warps. The order of sums follows from
# them, and so do last digits: they are chosen once, for all calls, and nothing is tuned while a program runs.
FORWARD = {decision.constants["FORWARD"]}  # token_logprobs: words, a fourth of a step
BACKWARD = {decision.constants["BACKWARD"]}  # its gradient: bytes
WALK = {decision.constants["WALK"]}  # one_pass: words, a fourth of a step; half of them where they are narrow
'''


def main(arguments: list[str] | None = None) -> int:
    """2 where a record that is not of a GPU is to be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    document = json.loads(options.record.read_text())
    decision = decide(document)
    print(table(answers(document)))
    print(f"\nnative CUDA kernels: {', '.join(decision.native) or 'none'}; {decision.constants}")
    if options.write:
        if document["device"] == "CPU":
            print("that is a rehearsal on a CPU: nothing is chosen by it")
            return 2
        CHOSEN.write_text(source(document, decision))
    return 0


if __name__ == "__main__":
    sys.exit(main())
