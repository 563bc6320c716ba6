"""The docstrings as Markdown: roles become links, tables of dashes those with bars, ``::`` an indented block."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from textwrap import dedent
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|mod|class|meth|data|attr|obj|exc):`~?([\w.]+)`")
RULE = re.compile(r"^ *=+(?:  =+)+$")


class Markdown(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for module in modules(pkg):
            for item in (module, *members(module)):
                if item.docstring:
                    item.docstring.value = rewrite(item.docstring.value, item)


def modules(module: griffe.Module) -> Iterator[griffe.Module]:
    yield module
    for one in module.modules.values():
        if not one.is_alias:
            yield from modules(one)


def members(parent: griffe.Object) -> Iterator[griffe.Object]:
    for item in parent.members.values():
        if not item.is_alias and not item.is_module:
            yield item
            if item.is_class:
                yield from members(item)


def rewrite(text: str, where: griffe.Object) -> str:
    text = ROLE.sub(lambda match: link(match[1], where), text)
    text = re.sub(r"::$", ":", re.sub(r"^::\n\n", "", text), flags=re.MULTILINE)
    # no "name: description": a paragraph below the list
    text = re.sub(r"^    (Others as in (?:.|\n(?= {4}))*)", r"\n\1", text, flags=re.MULTILINE)
    text = re.sub(
        r"^Returns:\n((?: {4}.*\n?)+)", lambda match: f"**Returns:**\n\n{dedent(match[1])}", text, flags=re.MULTILINE
    )
    # the errors of a line, each on its own
    head, raises, errors = text.partition("Raises:\n")
    errors = re.sub(r"\. (?=[A-Z]\w+Error: )", ".\n    ", errors)
    return "\n".join(tables((head + raises + errors).split("\n")))


def link(name: str, where: griffe.Object) -> str:
    """To where the name is documented, if it is."""
    path = name
    if not name.startswith("fusedpo"):
        try:
            path = where.resolve(name)
        except griffe.NameResolutionError:
            path = f"fusedpo.advantages.{name}" if ".advantages" in where.path else f"fusedpo.{name}"
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'


def tables(lines: list[str]) -> Iterator[str]:
    """Columns start where the strokes of a rule do; a line whose first column is empty continues the one before."""
    starts: list[int] = []
    head: list[str] = []
    rows: list[list[str]] = []
    for line, after in itertools.zip_longest(lines, lines[1:], fillvalue=""):
        if not RULE.match(line):
            if not starts:
                yield line
                continue
            cells = [line[a:b].strip().replace("|", "\\|") for a, b in itertools.pairwise([*starts, None])]
            if cells[0]:
                rows.append(cells)
            else:
                rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
        elif not starts:
            starts = [match.start() for match in re.finditer("=+", line)]
            head = [""] * len(starts)
        elif after.strip():  # the rule below the header
            head = rows.pop()
        else:
            yield from (f"| {' | '.join(row)} |" for row in (head, ["---"] * len(starts), *rows))
            starts, rows = [], []
