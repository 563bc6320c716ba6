"""Plots of one result file: time against each size, the fraction of the ceiling, and memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

from .record import Row

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# One colour per provider in all panels; what is ours stands out.
_OURS = ("black", "dimgrey", "darkgrey", "silver")


def plot(operator: str, rows: list[Row], path: Path) -> None:
    """A line of panels per group of cases; nothing where nothing was measured."""
    groups = {row.group: [r for r in rows if r.group == row.group and r.median] for row in rows}
    groups = {name: measured for name, measured in groups.items() if measured}
    if not groups:
        return
    axes_of = {name: _swept(measured) for name, measured in groups.items()}
    columns = max(1, *map(len, axes_of.values())) + 2
    figure, panels = plt.subplots(
        len(groups), columns, figsize=(4.2 * columns, 3.4 * len(groups)), squeeze=False, layout="constrained"
    )
    colours = _colours(row.provider for row in rows if row.median)
    for line, (group, measured) in zip(panels, groups.items(), strict=True):
        *times, fractions, memory = line
        largest = _headline(measured)
        label = ", ".join(f"{name} = {size:,}" for name, size in largest[0].sizes.items())
        for panel, size in zip(times, axes_of[group], strict=False):
            _against(panel, measured, size, colours)
        for panel in times[len(axes_of[group]) :]:
            panel.set_axis_off()
        if not axes_of[group]:
            times[0].set_axis_on()
            _bars(times[0], largest, "median", label, colours)
        line[0].set_ylabel(f"{group}\nms", fontsize="small")
        _bars(fractions, largest, "of_ceiling", f"fraction of the ceiling\n{label}", colours)
        _bars(memory, largest, "peak_extra_megabytes", f"peak extra memory, MB\n{label}", colours)
    handles = [plt.Line2D([], [], color=colour, marker="o", label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(operator)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _colours(providers: Iterable[str]) -> dict[str, object]:
    names = list(dict.fromkeys(providers))
    ours = (n for n in names if n.startswith("fusedpo"))
    others = (n for n in names if not n.startswith("fusedpo"))
    return dict(zip(ours, _OURS * 9, strict=False)) | {n: f"C{i}" for i, n in enumerate(others)}


def _headline(rows: list[Row]) -> list[Row]:
    """The rows of the group's first case, the one that its sweeps start from."""
    return [row for row in rows if row.case == rows[0].case]


def _swept(rows: list[Row]) -> list[str]:
    """The sizes that take more than one value while all others are as in the first case."""
    return [size for size in rows[0].sizes if len({row.sizes[size] for row in _along(rows, size)}) > 1]


def _along(rows: list[Row], size: str) -> list[Row]:
    fixed = {name: value for name, value in rows[0].sizes.items() if name != size}
    return [row for row in rows if fixed.items() <= row.sizes.items()]


def _against(panel: Axes, rows: list[Row], size: str, colours: dict[str, object]) -> None:
    along = sorted(_along(rows, size), key=lambda row: row.sizes[size])
    for provider, colour in colours.items():
        line = [row for row in along if row.provider == provider]
        if line:
            x, y = [row.sizes[size] for row in line], [row.median for row in line]
            panel.plot(x, y, marker=".", color=colour)
            panel.fill_between(x, [row.p20 for row in line], [row.p80 for row in line], color=colour, alpha=0.2)
    fixed = ", ".join(f"{name} = {value:,}" for name, value in rows[0].sizes.items() if name != size)
    panel.set(xscale="log", yscale="log", xlabel=size, title=fixed)


def _bars(panel: Axes, rows: list[Row], key: str, title: str, colours: dict[str, object]) -> None:
    bars = panel.barh(
        [row.provider for row in rows],
        [getattr(row, key) or 0.0 for row in rows],
        color=[colours[row.provider] for row in rows],
    )
    panel.bar_label(bars, fmt="%.3g", fontsize="small", padding=2)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.set_title(title, fontsize="medium")
