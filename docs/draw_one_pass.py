"""Draws docs/one-pass.svg: which rows a worker reads, which it writes, and what it knows when it does."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

matplotlib.use("Agg")
from matplotlib import pyplot as plt

matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "fusedpo", "font.size": 9, "font.family": "sans-serif"}

COLOURS = {"masked": "#e3e3e3", "read": "#9ecae1", "written": "#fdae6b", "chip": "#74c476"}
N = 4  # a window of the token itself and the next three positions
MASKED = {0, 1, 2, 10}
ROWS = 16
FIRST, SECOND = range(3, 9), range(9, 16)  # segments of six kept rows


def row(axes: Axes, y: float, colour: str, text: str = "") -> None:
    axes.add_patch(Rectangle((0, -y - 0.8), 5, 0.8, facecolor=COLOURS[colour], edgecolor="white"))
    if text:
        axes.text(2.5, -y - 0.4, text, ha="center", va="center")


def box(axes: Axes, y: float, title: str, text: str) -> None:
    axes.add_patch(
        FancyBboxPatch((9.2, -y - 1.5), 9.4, 1.5, boxstyle="round,pad=0.1", facecolor="white", linewidth=0.8)
    )
    axes.text(9.4, -y - 0.4, title, va="center", weight="bold")
    axes.text(9.4, -y - 1.1, text, va="center")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: object) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, **{"color": "black", **style}))


def main(path: Path) -> None:
    figure, axes = plt.subplots(figsize=(10.5, 6.2), layout="constrained")
    here = 5
    for t in range(ROWS):
        if t in MASKED:
            row(axes, t, "masked", "masked: not read")
        elif t == here:
            row(axes, t, "chip", "row t, on chip")
        elif t in FIRST and t > here:
            row(axes, t, "written", f"gradient of row t + {t - here}, written")
        elif t in SECOND and t < FIRST.stop + N - 1:
            row(axes, t, "read", "halo: read only, reduced first")
        else:
            row(axes, t, "read", "logits, not reached yet" if t in FIRST else "")
    axes.text(2.5, 0.35, "logits, one row per token", ha="center", weight="bold")
    for segment, name in ((FIRST, "segment of\nworker 1"), (SECOND, "segment of\nworker 2")):
        top, bottom = -segment.start, -segment.stop + 0.2
        axes.plot([-0.3, -0.5, -0.5, -0.3], [top, top, bottom, bottom], color="black", linewidth=0.8)
        axes.text(-0.7, (top + bottom) / 2, name, ha="right", va="center")
    arrow(axes, (5.5, -9.0), (5.5, -3.0), linewidth=1.5)
    axes.text(5.5, -2.6, "the walk goes backwards", ha="center")

    box(axes, 1.0, "1  reduce row t", "maximum, sum of exponentials: log-prob and entropy")
    box(axes, 4.0, "2  coefficient", "advantage x ratio x ratios of t + 1, ..., t + N - 1, clip, KL")
    box(axes, 7.0, "3  write the gradient of row t", "c (onehot - softmax) / temperature: the row is still on chip")
    box(axes, 10.6, "kept by the worker", f"log-ratios of the next {N - 1} positions, 0 where masked")
    arrow(axes, (5.1, -here - 0.4), (9.0, -1.8), color="#2c7a31", connectionstyle="arc3,rad=-0.15")
    for y in (2.6, 5.6):
        arrow(axes, (13.9, -y), (13.9, -y - 1.25))
    arrow(axes, (18.7, -11.3), (18.7, -4.8), connectionstyle="arc3,rad=0.35")
    arrow(axes, (9.0, -8.0), (5.1, -here - 0.6), color="#c65d00", connectionstyle="arc3,rad=-0.1")
    axes.text(
        9.2,
        -14.2,
        "DRAM sees one read and one write of every kept row, and one more\nread of at most N - 1 rows per segment.",
    )
    axes.set(xlim=(-3.2, 20.2), ylim=(-16.2, 1))
    axes.set_axis_off()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(__file__).with_name("one-pass.svg"))
