"""Writes the figures in README.md and docs/ from the files in bench/results: ``python docs/generate.py [--check]``.

What stands between ``<!-- generated: NAME -->`` and the next ``<!-- end -->`` is made by the function of that name in
:data:`BLOCKS`: no figure is typed by hand. ``--check`` changes nothing; it fails where a page and the results disagree.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import predicted  # noqa: E402
from bench import choose, record  # noqa: E402
from bench.record import BUSY, ENOUGH, Row, number  # noqa: E402

RESULTS = ROOT / "bench/results"
PAGES = ("README.md", "docs/advantages.md", "docs/distributed.md", "docs/performance.md", "docs/verification.md")
BUDGETS = ROOT / "tests/budgets.json"
COUNTERS = tuple(ROOT / "tests/ptx" / name for name in ("counters.json", "counters_cuda.json"))

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

DTYPES = ("float32", "bfloat16")
BUSY_MARK = ", on a busy machine"
NOTHING = "Not recorded yet: `python -m fusedpo bench --out bench/results/MACHINE`."


def recorded() -> Iterator[tuple[Path, dict[str, Document]]]:
    """What may be published, by machine."""
    for folder in machines():
        if documents := record.recorded(folder):
            yield folder, documents


def cases(document: Document, group: str) -> list[dict[str, Row]]:
    """The rows with a time by provider, of each case of the group with the vocabulary of the first."""
    found: dict[str, dict[str, Row]] = {}
    for row in (Row(**entry) for entry in document["rows"]):
        if row.group == group and row.median is not None:
            found.setdefault(row.case, {})[row.provider] = row
    blocks = list(found.values())
    return [block for block in blocks if any_row(block).sizes.get("V") == any_row(blocks[0]).sizes.get("V")]


def any_row(block: dict[str, Row]) -> Row:
    return next(iter(block.values()))


def is_busy(row: Row) -> bool:
    return (row.others or 0) > BUSY


def sizes(row: Row) -> str:
    return ", ".join(f"{name} = {size:,}" for name, size in row.sizes.items())


def label(row: Row) -> str:
    name = f"`{row.provider}`" if row.provider.startswith("fusedpo") else row.provider
    return name + BUSY_MARK * is_busy(row)


def milliseconds(row: Row, *names: str) -> str:
    return " to ".join(number(getattr(row, name), row.samples) for name in names)


def against(row: Row, baseline: Row | None) -> str:
    """How many times as fast."""
    if baseline is None or row.provider == row.ceiling or row.median is None or baseline.median is None:
        return ""
    return f"{number(baseline.median / row.median, min(row.samples, baseline.samples, ENOUGH - 1))}x"


# The rows of the README's table; the fastest kernel of others is TRL's.
IN_README = {
    "clone (new memory)": "a copy of the logits (lower bound)",
    "fusedpo": "`fusedpo`",
    "fusedpo, in place": "`fusedpo`, gradient over the logits",
    "torch.compile": "`torch.compile`",
    "trl": "TRL",
    "eager": "eager PyTorch",
}


def measured() -> str:
    """The one table of the README: loss and gradient in the dtypes of training, at two numbers of tokens."""
    parts = []
    for folder, documents in recorded():
        blocks = {
            f"{dtype}, T = {any_row(block).sizes['T']:,}{BUSY_MARK * any(map(is_busy, block.values()))}": block
            for dtype in DTYPES
            for block in cases(documents["one_pass"], f"PPO, loss and gradient, {dtype}")
        }
        lines = []
        for name, title in IN_README.items():
            rows = [(_of(block, name), block.get("eager")) for block in blocks.values()]
            if any(row for row, _ in rows):
                lines.append([title, *(_cell(row, eager) for row, eager in rows)])
        where = source(folder, "one_pass", documents["one_pass"], blocks.values())
        parts.append(f"{table(['', *blocks], lines)}\n\n{where}")
    return "\n\n".join(parts) or NOTHING


def _of(block: dict[str, Row], name: str) -> Row | None:
    """The row of ``name``, or of ``name, ...``, what it ran on, where there is none."""
    return block.get(name) or next((row for x, row in block.items() if name == "trl" and x.startswith("trl,")), None)


def _cell(row: Row | None, eager: Row | None) -> str:
    if row is None:
        return ""
    ratio = "" if row is eager else against(row, eager)
    spread = f"{milliseconds(row, 'p20', 'p80')}, n = {row.samples}"
    return f"{milliseconds(row, 'median')} ms{ratio and f', **{ratio}**'}<br>{spread}"


TABLES: Sequence[tuple[str, str, str, str]] = (
    *(
        (operator, f"{group}, {dtype}", f"{title}, {dtype}", "eager")
        for operator, group, title in (
            ("one_pass", "NFPO N=4, loss and gradient", "NFPO (N = 4) from logits: loss and gradient"),
            ("one_pass", "PPO, loss and gradient", "PPO from logits: loss and gradient"),
            ("hidden", "PPO, loss and gradients", "PPO from hidden states: loss and gradients"),
            ("token_logprobs", "forward", "log-probs and entropy: forward"),
            ("token_logprobs", "forward and backward", "log-probs and entropy: forward and backward"),
            ("preference", "DPO from logits, loss and gradient", "DPO from logits: loss and gradient"),
            ("preference", "DPO from hidden states, loss and gradients", "DPO from hidden states: loss and gradients"),
            ("preference", "KL divergence over the vocabulary, loss and gradient", "exact KL: loss and gradient"),
        )
        for dtype in DTYPES
    ),
    (
        "one_pass",
        "NFPO N=4, loss and gradient, bfloat16, half masked",
        "NFPO from logits, half of the tokens masked",
        "eager",
    ),
    (
        "hidden",
        "PPO, loss and gradients, bfloat16, half masked",
        "PPO from hidden states, half of the tokens masked",
        "eager",
    ),
    *(
        (
            "policy_loss",
            f"NFPO N={n}, forward and backward",
            f"NFPO (N = {n}) from log-probs: loss and gradient",
            "eager, plain",
        )
        for n in (1, 4, 64)
    ),
    *(
        ("advantages", name, f"advantages: {name}", "reference")
        for name in ("grpo", "rloo", "grpo_passk", "maxpo", "gae and whiten")
    ),
)
"""Operator, group, title, and the provider that the others are compared with."""


def tables() -> str:
    """What the README has no room for."""
    parts = []
    for folder, documents in recorded():
        for operator, group, title, baseline in TABLES:
            blocks = cases(documents[operator], group)
            if blocks:
                where = source(folder, operator, documents[operator], blocks)
                parts.append(all_rows(title, blocks, baseline, where))
        plots = {name: (folder / f"{name}.png") for name in documents}
        parts += [
            f"![{name} on {folder.name}]({path.relative_to(ROOT)})" for name, path in plots.items() if path.exists()
        ]
    return "\n\n".join(parts) or NOTHING


def all_rows(title: str, blocks: Iterable[dict[str, Row]], baseline: str, where: str) -> str:
    """A table of all that was measured in some cases, with its title and its source."""
    header = ["", "implementation", "ms", "20th to 80th percentile", "n", "medians of the processes"]
    header += [f"speed against {baseline}", "of its lower bound", "page faults", "extra memory", "error"]
    lines = [
        [
            sizes(row),
            label(row),
            milliseconds(row, "median"),
            milliseconds(row, "p20", "p80"),
            str(row.samples),
            milliseconds(row, "low", "high"),
            "1" if row.provider == baseline else against(row, block.get(baseline)),
            f"{row.of_ceiling:.0%} of {row.ceiling}" if row.of_ceiling and row.ceiling != row.provider else "",
            f"{row.page_faults or 0:,.0f}",
            f"{row.peak_extra_megabytes or 0:,.0f} MB",
            "" if row.error is None else f"{row.error:.1e}",
        ]
        for block in blocks
        for row in block.values()
    ]
    return f"**{title}**\n\n{table(header, lines)}\n\n{where}"


def tensor_parallel() -> str:
    """A vocabulary split over processes of one machine."""
    parts = []
    for folder in machines():
        for name, document in record.recorded(folder, ("tensor_parallel",)).items():
            for group in dict.fromkeys(row["group"] for row in document["rows"]):
                blocks = cases(document, group)
                where = source(folder, name, document, blocks)
                parts.append(all_rows(group, blocks, "fusedpo, logits gathered", where))
    return "\n\n".join(parts) or NOTHING.replace("fusedpo bench", "fusedpo.bench.tensor_parallel")


def threshold() -> str:
    """What a gradient threshold leaves of three bare products, and its errors."""
    parts = []
    header = ("", "of three products", "20th to 80th percentile", "n", "active columns", "dropped")
    header += ("error of dHidden (exact)", "of dWeight (exact)")
    for folder in machines():
        for name, document in record.recorded(folder, record.THRESHOLD).items():
            names = dict.fromkeys(row["group"] for row in document["rows"])
            blocks = [block for group in names for block in cases(document, group)]
            lines = []
            for block in blocks:
                products = block[any_row(block).ceiling]
                what = products.group.partition("threshold, ")[2]
                others = (row for row in block.values() if row is not products)
                lines += [[f"{_policy(row)}, {what}", *_of_products(row, products)] for row in others]
            parts.append(f"{table(header, lines)}\n\n{source(folder, name, document, blocks)}")
    return "\n\n".join(parts) or NOTHING.replace("fusedpo bench", "fusedpo.bench.threshold")


def _policy(row: Row) -> str:
    """Its name, with the entropy that it has, and the threshold."""
    if not row.details:
        return row.provider + BUSY_MARK * is_busy(row)
    name, what = row.provider.removeprefix("fusedpo, ").split(", ")
    return f"{name} ({row.details['nats']:.3g}), {what}{BUSY_MARK * is_busy(row)}"


def _of_products(row: Row, products: Row) -> list[str]:
    samples, unit = min(row.samples, products.samples), products.median
    ratio, low, high = (number(time / unit, samples) for time in (row.median, row.p20, row.p80))
    times = [ratio, f"{low} to {high}", str(row.samples)]
    if not row.details:
        return [*times, "", "", "", ""]
    errors = (
        f"{row.details[f'error of {name}']:.1e} ({row.details[f'exact: {name}']:.1e})"
        for name in ("dHidden", "dWeight")
    )
    return [*times, *_left_out(row), *errors]


def _left_out(row: Row) -> tuple[str, str]:
    active, dropped = row.details["active"], row.details["dropped"]
    return (f"{active:.1%}", f"{dropped:.1e}") if dropped else ("all", "0")


def groups() -> str:
    """Group advantages beside verl's, at the first size."""
    parts = []
    for folder, documents in recorded():
        lines, blocks = [], [next(iter(cases(documents["advantages"], f)), {}) for f in ("grpo", "rloo", "grpo_passk")]
        for block in blocks:
            for verl, what in (("verl", "a loop over groups"), ("verl, vectorised", "vectorised")):
                if verl in block and "fusedpo" in block:
                    ours, theirs = block["fusedpo"], block[verl]
                    times = (f"{milliseconds(row, 'median')} ms, n = {row.samples}" for row in (ours, theirs))
                    lines.append([f"`{ours.group}`", sizes(ours), *times, what, against(ours, theirs)])
        header = ("", "size", "here", "verl", "verl's way", "speed against verl's")
        parts.append(f"{table(header, lines)}\n\n{source(folder, 'advantages', documents['advantages'], blocks)}")
    return "\n\n".join(parts) or NOTHING


def machine(document: Document, blocks: Iterable[dict[str, Row]]) -> str:
    """Where, with what and when ``blocks`` were measured."""
    e = document["environment"]
    packages = ("torch", "triton", "trl", "verl", "liger_kernel", "cut-cross-entropy", "megatron-core")
    versions = ", ".join(f"{name} {e[name]}" for name in packages if e.get(name))
    threads = "a thread" if e["threads"] == 1 else f"{e['threads']} threads"
    where = e["device"] if e.get("driver") else f"{threads} of {e['device']}, {e['capability']}"
    pages = "huge pages" if e["huge_pages"] else f"pages of 4 KiB (transparent_hugepage: {e['transparent_hugepage']})"
    watched = [row.others for block in blocks for row in block.values() if row.others is not None]
    busy = f"; other programs used up to {max(watched):.2f} processors" if watched else ""
    busy += ": **a busy machine**" if max(watched, default=0) > BUSY else ""
    return f"{where}; {pages} for all; {versions}; {e['date']}, commit {e['commit']}{busy}"


def source(folder: Path, name: str, document: Document, blocks: Iterable[dict[str, Row]]) -> str:
    path = (folder / name).relative_to(ROOT)
    return f"{machine(document, blocks)} ([all rows]({path}.md))."


def ceilings() -> str:
    """How close this library comes to the lower bound of its case, at the first size of each group."""
    lines = []
    for folder, documents in recorded():
        for name, document in documents.items():
            for group in dict.fromkeys(row["group"] for row in document["rows"]):
                for row in next(iter(cases(document, group)), {}).values():
                    if row.provider.startswith("fusedpo") and row.of_ceiling:
                        rate = f"{row.of_ceiling:.0%} of {row.ceiling}, n = {row.samples}"
                        lines.append([folder.name, name, group, sizes(row), label(row), rate])
    return table(("machine", "operator", "case", "size", "implementation", "rate"), lines) if lines else NOTHING


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


def counters() -> str:
    """What the machine of tests/ptx counts, per logit or token; exact, and compared by a test."""
    return "\n\n".join(_counters(json.loads(path.read_text())) for path in COUNTERS)


def _counters(document: Document) -> str:
    lines = []
    for case, kernels in document.items():
        for kernel, row in kernels.items() if isinstance(kernels, dict) else ():

            def each(name: str, row: dict[str, int] = row, scale: int = 1) -> str:
                return f"{scale * row[name] / row['elements']:.3f}"

            each_bulk = f" + {each('bulk_bytes')}" if row.get("bulk_bytes") else ""

            def per(name: str, requests: str, row: dict[str, int] = row) -> str:
                return f"{row[name] / row[requests]:.1f}" if row[requests] else ""

            lines.append(
                [
                    case,
                    f"`{kernel.strip('_')}`",
                    f"{each('load_bytes')}{each_bulk} ({each('unique_load_sectors', scale=32)})",
                    each("store_bytes"),
                    per("load_sectors", "load_requests"),
                    per("store_sectors", "store_requests"),
                    each("exponentials"),
                    f"{row['barriers']} ({row['barriers_of_twice_as_many']})",
                    per("shared_waves", "shared_requests"),
                    str(row["divergent_branches"]),
                    each("thread_instructions"),
                ]
            )
    header = (
        *("case", "kernel", "bytes read (distinct)", "written", "sectors per load", "per store", "exponentials"),
        *("barriers (of twice as many)", "waves per access of shared memory", "divergent branches", "instructions"),
    )
    compiler = f"nvcc {document['nvcc']}" if "nvcc" in document else f"Triton {document['triton']}"
    note = "bytes (by loads + by bulk copies), exponentials and instructions are per logit, token or number"
    return f"{compiler}, {document['target']}, two rows; {note}.\n\n{table(header, lines)}"


def budgets() -> str:
    """What the row kernels issue, by kernel and architecture; exact, and compared by a test."""
    rows = json.loads(BUDGETS.read_text())
    lines = []
    for kernel, case in dict.fromkeys((row["kernel"], row["case"]) for row in rows):
        for compiler in dict.fromkeys(row["compiler"] for row in rows):
            here = {
                row["target"]: row
                for row in rows
                if (row["compiler"], row["kernel"], row["case"]) == (compiler, kernel, case)
            }
            if here:
                lines.append(
                    [f"`{kernel.strip('_')}`", case, compiler, *(_budget(here.get(t)) for t in BUDGET_TARGETS)]
                )
    cell = "issued, exponentials per logit, barriers per iteration: largest share"
    return f"Cells: {cell}.\n\n{table(('kernel', 'case', 'compiler', *BUDGET_TARGETS), lines)}"


BUDGET_TARGETS = ("sm_80", "sm_90", "sm_100")


def _budget(row: RowDict | None) -> str:
    if row is None:
        return ""
    unit, share = max(row["shares"].items(), key=lambda item: item[1])
    counts = f"{row['issued']:.1f}, {row['exponentials']:.2f}, {row['barriers']}"
    return f"{counts}: {share:.0%} ({unit})"


def go() -> str:
    """The questions that a sweep answers, and what it has answered."""
    parts = [table(("question", "go", "no-go"), (line[:3] for line in choose.answers({"rows": []})))]
    for path in sorted(RESULTS.glob("*/sweep.json")):
        document = json.loads(path.read_text())
        parts.append(f"{document['device']}, {document['date']}:\n\n{choose.table(choose.answers(document))}")
    return "\n\n".join(parts)


def ranks() -> str:
    """What several ranks send, and how long that takes, on paper."""
    parts = [f"**{title}**\n\n{table(header, lines())}" for title, header, lines in predicted.TABLES]
    return "\n\n".join((predicted.note(), *parts))


# ---------------------------------------------------------------------------------------------------------------- pages

BLOCKS: dict[str, Callable[[], str]] = {
    "measured": measured,
    "groups": groups,
    "tables": tables,
    "tensor_parallel": tensor_parallel,
    "threshold": threshold,
    "ceilings": ceilings,
    "budgets": budgets,
    "go": go,
    "compiled": compiled,
    "counters": counters,
    "devices": devices,
    "ranks": ranks,
}


def generate(page: str) -> str:
    """The page with its blocks made anew."""

    def block(match: re.Match[str]) -> str:
        text = BLOCKS[match[1]]().replace("](bench/", "](../bench/" if page.startswith("docs/") else "](bench/")
        return f"<!-- generated: {match[1]} -->\n\n{text}\n\n<!-- end -->"

    return re.sub(r"<!-- generated: (\w+) -->\n.*?<!-- end -->", block, (ROOT / page).read_text(), flags=re.DOTALL)


def main(check: bool) -> int:
    """1 if ``check`` finds a page that would change; ValueError where results must not be published."""
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
