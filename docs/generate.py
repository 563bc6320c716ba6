"""Writes the figures in README.md and docs/ from the files in bench/results: ``python docs/generate.py [--check]``.

What stands between ``<!-- generated: NAME -->`` and the next ``<!-- end -->`` is made by the function of that name in
:data:`BLOCKS`: no figure is typed by hand. ``--check`` changes nothing; it fails where a page and the results disagree.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
PAGES = ("README.md", "docs/verification.md")

Document = dict[str, Any]
RowDict = dict[str, Any]


def load(path: Path) -> Document | None:
    return json.loads(path.read_text()) if path.exists() else None


def machines() -> list[Path]:
    """The folders of recorded results; GPUs first."""
    folders = (path for path in RESULTS.iterdir() if path.is_dir())
    return sorted(folders, key=lambda path: (path.name.startswith("cpu"), path.name))


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines))


# ------------------------------------------------------------------------------------------------------------- measured


CEILINGS = ("one read", "one copy", "three matrix products")


def milliseconds(row: RowDict) -> str:
    time = row["median"]
    return f"{time:,.0f} ms" if time >= 1000 else f"{time:.3g} ms"


def label(provider: str) -> str:
    if provider in CEILINGS:
        return f"{provider} (the floor)"
    return f"`{provider}`" if provider.startswith("fusedpo") else provider


def against(row: RowDict, baseline: RowDict) -> str:
    ratio = baseline["median"] / row["median"]
    if row["provider"] in CEILINGS:
        return ""
    return "1" if row is baseline else f"{ratio:.1f}x faster" if ratio > 1 else f"{1 / ratio:.1f}x slower"


def headline(document: Document, group: str) -> dict[str, RowDict]:
    """By provider, the measured rows of the group's first case."""
    rows = [row for row in document["rows"] if row["group"] == group]
    return {row["provider"]: row for row in rows if row["case"] == rows[0]["case"] and row["median"] is not None}


def sizes(rows: dict[str, RowDict]) -> str:
    return ", ".join(f"{name} = {size:,}" for name, size in next(iter(rows.values()))["sizes"].items())


def compared(document: Document, title: str, columns: dict[str, str], baseline: str = "eager") -> str:
    """Time, ratio to the baseline and extra memory of every provider; ``columns`` maps headings to groups."""
    found = {heading: headline(document, group) for heading, group in columns.items()}
    found = {heading: rows for heading, rows in found.items() if rows}
    if not found:
        return ""
    first = next(iter(found.values()))
    header = [f"{title}, {sizes(first)}"]
    for heading in found:
        header += [heading, f"against {baseline}", "extra memory"]
    lines = []
    for provider in dict.fromkeys(name for rows in found.values() for name in rows):
        line = [label(provider)]
        for rows in found.values():
            row = rows.get(provider)
            base = rows.get(baseline)
            memory = "" if row is None else f"{row['peak_extra_megabytes']:.0f} MB"
            line += [milliseconds(row), against(row, base) if base else "", memory] if row else ["", "", ""]
        lines.append(line)
    return table(header, lines)


def small(document: Document, title: str, columns: dict[str, str]) -> str:
    """Times only: a line per provider, a column per group."""
    found = {heading: headline(document, group) for heading, group in columns.items()}
    found = {heading: rows for heading, rows in found.items() if rows}
    providers = dict.fromkeys(name for rows in found.values() for name in rows)
    lines = [[label(p), *(milliseconds(rows[p]) if p in rows else "" for rows in found.values())] for p in providers]
    return table([title, *(f"{heading}, {sizes(rows)}" for heading, rows in found.items())], lines) if found else ""


def machine(document: Document) -> str:
    e = document["environment"]
    versions = ", ".join(
        f"{name} {e[name]}" for name in ("torch", "triton", "trl", "verl", "liger_kernel") if e.get(name)
    )
    load = f"; load {e['load']:g} before the run" if e.get("load") is not None else ""
    where = e["device"] if e.get("driver") else f"{e['threads']} threads of {e['device']}, {e['capability']}"
    return f"{where}; {versions}; {e['date']}, commit {e['commit']}{load}"


DTYPES = ("float32", "bfloat16")


def measured() -> str:
    parts = []
    for folder in machines():
        documents = {name: load(folder / f"{name}.json") for name in ("one_pass", "hidden", "token_logprobs")}
        documents |= {name: load(folder / f"{name}.json") for name in ("policy_loss", "advantages")}
        tables = []
        for name, prefix, title in (
            ("one_pass", "NFPO N=4, loss and gradient, ", "NFPO (N = 4) from logits: loss and gradient"),
            ("one_pass", "PPO, loss and gradient, ", "PPO from logits: loss and gradient"),
            ("hidden", "PPO, loss and gradients, ", "PPO from hidden states: loss and gradients"),
            ("token_logprobs", "forward and backward, ", "log-probs and entropy: forward and backward"),
        ):
            if documents[name]:
                text = compared(documents[name], title, {dtype: prefix + dtype for dtype in DTYPES})
                tables.append(f"{text}\n\n{source(folder, name, documents[name])}" if text else "")
        if documents["policy_loss"]:
            columns = {f"N = {n}": f"NFPO N={n}, forward and backward" for n in (1, 4, 64)}
            text = small(documents["policy_loss"], "NFPO from log-probs: loss and gradient", columns)
            tables.append(f"{text}\n\n{source(folder, 'policy_loss', documents['policy_loss'])}")
        if documents["advantages"]:
            columns = {name: name for name in ("grpo", "rloo", "grpo_passk", "maxpo", "gae and whiten")}
            text = small(documents["advantages"], "advantages", columns)
            tables.append(f"{text}\n\n{source(folder, 'advantages', documents['advantages'])}")
        parts += [text for text in tables if text]
    return "\n\n".join(parts)


def source(folder: Path, name: str, document: Document) -> str:
    path = (folder / name).relative_to(ROOT)
    plot = f", [plot]({path}.png)" if (folder / f"{name}.png").exists() else ""
    return f"{machine(document)} ([all rows]({path}.md){plot})."


def ceilings() -> str:
    """How close this library comes to the floor of its case: the largest first."""
    lines = []
    for folder in machines():
        for path in sorted(folder.glob("*.json")):
            document = load(path)
            if document is None or "rows" not in document:
                continue
            for group in dict.fromkeys(row["group"] for row in document["rows"]):
                rows = headline(document, group)
                for provider, row in rows.items():
                    if provider.startswith("fusedpo") and row["of_ceiling"]:
                        ceiling = next(iter(rows))
                        share = f"{row['of_ceiling']:.0%} of {ceiling}"
                        lines.append([folder.name, path.stem, group, sizes(rows), f"`{provider}`", share])
    return table(("machine", "operator", "case", "size", "provider", "rate"), lines)


# ------------------------------------------------------------------------------------------------------------- verified


def compiled() -> str:
    """Registers and stack of every GPU kernel, by architecture."""
    document = load(RESULTS / "compiled.json")
    if document is None:
        return "Not recorded: `python docs/compiled.py`."
    rows = document["rows"]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = []
    for compiler, kernel in dict.fromkeys((row["compiler"], row["kernel"]) for row in rows):
        line = [f"`{kernel}`", f"{compiler} {document[compiler]}"]
        for target in targets:
            here = [r for r in rows if (r["compiler"], r["kernel"], r["target"]) == (compiler, kernel, target)]
            line.append(_resources(here))
        lines.append(line)
    note = (
        f"Registers of a thread over all compiled variants, and bytes of stack where there are any; {document['date']}."
    )
    return f"{note}\n\n{table(('kernel', 'compiler', *targets), lines)}"


def _resources(rows: list[RowDict]) -> str:
    if not rows:
        return ""
    registers, stack = [row["registers"] for row in rows], max(row["stack"] for row in rows)
    span = f"{min(registers)}" if len(set(registers)) == 1 else f"{min(registers)}-{max(registers)}"
    return span + (f", {stack} bytes" if stack else "")


def devices() -> str:
    """What ``python -m fusedpo verify`` found, where it was recorded."""
    lines = []
    for folder in machines():
        document = load(folder / "verify.json")
        if document is None:
            continue
        results = document["results"]
        for operator, device, implementation in dict.fromkeys(
            (r["operator"], r["device"], r["implementation"]) for r in results
        ):
            here = [
                r
                for r in results
                if (r["operator"], r["device"], r["implementation"]) == (operator, device, implementation)
            ]
            count = sum(r["comparisons"] for r in here)
            verdict = "right" if all(r["ok"] for r in here) else "WRONG"
            if count or verdict == "WRONG":
                where = f"{document['devices'][device]}; torch {document['torch']}; {document['date']}"
                lines.append([f"`{operator}`", implementation, where, f"{count} comparisons, {verdict}"])
    nothing_on_gpu = all(line[2].startswith("CPU") for line in lines)
    text = table(("operator", "implementation", "where", "python -m fusedpo verify"), lines) if lines else ""
    warning = "**Nothing has run on a GPU**: no record of one is under `bench/results`."
    return "\n\n".join(filter(None, (text, warning if nothing_on_gpu else "")))


# ---------------------------------------------------------------------------------------------------------------- pages

BLOCKS: dict[str, Callable[[], str]] = {
    "measured": measured,
    "ceilings": ceilings,
    "compiled": compiled,
    "devices": devices,
}


def generate(page: str) -> str:
    """The page with its blocks made anew."""

    def block(match: re.Match[str]) -> str:
        text = BLOCKS[match[1]]().replace("](bench/", "](../bench/" if page.startswith("docs/") else "](bench/")
        return f"<!-- generated: {match[1]} -->\n\n{text}\n\n<!-- end -->"

    return re.sub(r"<!-- generated: (\w+) -->\n.*?<!-- end -->", block, (ROOT / page).read_text(), flags=re.DOTALL)


def main(check: bool) -> int:
    """1 if ``check`` finds a page that would change."""
    stale = [page for page in PAGES if generate(page) != (ROOT / page).read_text()]
    for page in stale:
        if check:
            print(f"{page} and bench/results disagree: python docs/generate.py")
        else:
            (ROOT / page).write_text(generate(page))
            print(page)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
