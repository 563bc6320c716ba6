"""Plots of one result file: what each provider takes, time and memory, and how the time grows with each size."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from .record import Row, number

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OURS, OTHERS, BOUND = "#1f77b4", "#ff7f0e", "0.35"
"""Two colours: this library, and everybody else. The lower bound is a dashed line."""


def plot(operator: str, rows: list[Row], path: Path, environment: Mapping[str, Any]) -> None:
    """Writes ``path``, unless nothing was measured."""
    figure = draw(operator, rows, environment)
    if figure is not None:
        figure.savefig(path, dpi=90)
        plt.close(figure)


def draw(operator: str, rows: list[Row], environment: Mapping[str, Any]) -> Figure | None:
    """The panels of each group of cases."""
    groups = {row.group: [r for r in rows if r.group == row.group and r.median] for row in rows}
    groups = {name: measured for name, measured in groups.items() if measured}
    if not groups:
        return None
    sweeps = {name: _swept(measured) for name, measured in groups.items()}
    bars = {name: 1.0 + 0.26 * max(5, len(_providers(measured))) for name, measured in groups.items()}
    heights = [bars[name] + 2.5 * math.ceil(len(sweeps[name]) / 2) for name in groups]
    figure = plt.figure(figsize=(10.4, sum(heights) + 0.6), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(f"{operator}, {_machine(environment)}", 100)), fontsize="medium")
    parts = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (group, measured) in zip(parts, groups.items(), strict=True):
        headline = _headline(measured)
        part.suptitle(_title(group, headline[0]), fontsize="small", fontweight="bold")
        more = math.ceil(len(sweeps[group]) / 2)
        panels = part.subplots(1 + more, 2, squeeze=False, height_ratios=[bars[group], *[2.5] * more])
        (times, memory), growth = panels[0], panels[1:].flat
        _bars(times, headline, "median", "ms")
        _bars(memory, headline, "peak_extra_megabytes", "MB of extra memory")
        memory.tick_params(labelleft=False)
        for panel, size in itertools.zip_longest(growth, sweeps[group]):
            if size is None:
                panel.set_axis_off()
            else:
                _growth(panel, _along(measured, size), size)
    return figure


def _machine(environment: Mapping[str, Any]) -> str:
    device = environment["device"]
    where = device if environment.get("driver") else f"{environment['threads']} threads of {device}"
    return f"{where}; torch {environment['torch']}; {environment['date']}"


def _title(group: str, row: Row) -> str:
    """What was measured, in float32 where the group names no dtype."""
    dtype = [] if "float" in group else ["float32"]
    return ", ".join([group, *dtype, *(f"{name} = {size:,}" for name, size in row.sizes.items())])


def _providers(rows: list[Row]) -> list[str]:
    """Those of the first case, without the lower bounds."""
    return [row.provider for row in _headline(rows) if not _is_bound(row, rows)]


def _is_bound(row: Row, rows: list[Row]) -> bool:
    return any(row.provider == other.ceiling for other in rows)


def _colour(provider: str) -> str:
    return OURS if provider.startswith("fusedpo") else OTHERS


def _headline(rows: list[Row]) -> list[Row]:
    """The rows of the group's first case, the one that its sweeps start from."""
    return [row for row in rows if row.case == rows[0].case]


def _swept(rows: list[Row]) -> list[str]:
    """The sizes that take more than one value while all others are as in the first case."""
    return [size for size in rows[0].sizes if len({row.sizes[size] for row in _along(rows, size)}) > 1]


def _along(rows: list[Row], size: str) -> list[Row]:
    fixed = {name: value for name, value in rows[0].sizes.items() if name != size}
    return [row for row in rows if fixed.items() <= row.sizes.items()]


def _bars(panel: Axes, rows: list[Row], key: str, unit: str) -> None:
    """Time on a logarithmic axis, with its percentiles, and the lower bounds; memory on a linear one."""
    shown = [row for row in rows if not _is_bound(row, rows)]
    values = [getattr(row, key) or 0.0 for row in shown]
    bars = panel.barh(range(len(shown)), values, color=[_colour(row.provider) for row in shown], height=0.7)
    panel.set_yticks(range(len(shown)), [row.provider for row in shown], fontsize="small")
    panel.invert_yaxis()
    panel.set_xlabel(unit, fontsize="small")
    panel.tick_params(axis="x", labelsize="small")
    if key != "median":
        panel.bar_label(bars, [f"{value:,.0f}" for value in values], fontsize="small", padding=3)
        panel.set_xlim(0, 1.2 * max(1.0, *values))
        return
    # The median of the medians of few processes may lie outside of the percentiles of all samples.
    spread = [[max(0.0, row.median - row.p20) for row in shown], [max(0.0, row.p80 - row.median) for row in shown]]
    panel.errorbar(values, range(len(shown)), xerr=spread, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
    for place, row in enumerate(shown):  # beside the bar and its whisker
        text = f"{number(row.median, row.samples)}, n = {row.samples}"
        panel.annotate(
            text,
            (max(row.median, row.p80), place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
            bbox={"color": "white", "pad": 1},
        )
    bounds = {row.provider: row for row in rows if _is_bound(row, rows)}
    for row, style in zip(bounds.values(), ("--", ":", "-."), strict=False):
        label = f"{row.provider}: {number(row.median, row.samples)}"
        panel.axvline(row.median, color=BOUND, linestyle=style, linewidth=1, label=label)
    if bounds:
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False, fontsize="small")
    lowest = min(value for value in [*values, *(row.median for row in bounds.values())] if value)
    panel.set(xscale="log", xlim=(lowest / 2, 12 * max(row.p80 for row in shown)))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _growth(panel: Axes, rows: list[Row], size: str) -> None:
    """The time of this library against a size, and that of the fastest of the others."""
    places = sorted({row.sizes[size] for row in rows})
    at = {place: [row for row in rows if row.sizes[size] == place and not _is_bound(row, rows)] for place in places}
    ours = {place: row for place in places for row in at[place] if row.provider == "fusedpo"}
    others = {
        place: min(theirs, key=lambda row: row.median)
        for place in places
        if (theirs := [row for row in at[place] if not row.provider.startswith("fusedpo")])
    }
    for label, colour, line in (("fusedpo", OURS, ours), ("the fastest of the others", OTHERS, others)):
        if line:
            panel.plot(list(line), [row.median for row in line.values()], marker="o", color=colour, label=label)
            panel.fill_between(
                list(line), [r.p20 for r in line.values()], [r.p80 for r in line.values()], color=colour, alpha=0.2
            )
    panel.set(xscale="log", yscale="log")
    panel.set_xlabel(size, fontsize="small")
    panel.set_ylabel("ms", fontsize="small")
    panel.xaxis.set_major_locator(FixedLocator(_apart(places)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.tick_params(labelsize="small")
    panel.legend(frameon=False, fontsize="small")


def _apart(places: list[int], ratio: float = 1.3) -> list[int]:
    """Those sizes whose labels have room on a logarithmic axis."""
    span = (places[-1] / places[0]) ** 0.2 if len(places) > 1 else ratio
    kept: list[int] = []
    for place in places:
        if not kept or place >= kept[-1] * max(ratio, span):
            kept.append(place)
    return kept
