"""Draws docs/alignment.svg: where an inference engine puts what belongs to a token, and where the losses want it."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

matplotlib.use("Agg")
from matplotlib import pyplot as plt

matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "fusedpo", "font.size": 9, "font.family": "sans-serif"}

PROMPT, RESPONSE, NOTHING = "#e3e3e3", "#9ecae1", "white"
TOKENS = ("2", "+", "3", "=", "5", "<eos>")
FIRST = 4  # of the response
WIDTH, HEIGHT, LEFT = 2.0, 0.8, 5.2


def row(axes: Axes, y: float, name: str, cells: list[tuple[str, str]]) -> None:
    axes.text(LEFT - 0.25, y + HEIGHT / 2, name, ha="right", va="center", family="monospace")
    for t, (text, colour) in enumerate(cells):
        x = LEFT + t * WIDTH
        axes.add_patch(Rectangle((x, y), WIDTH, HEIGHT, facecolor=colour, edgecolor="#888888", linewidth=0.6))
        axes.text(x + WIDTH / 2, y + HEIGHT / 2, text, ha="center", va="center")


def cells(values: list[str]) -> list[tuple[str, str]]:
    """One per token, coloured by the part that the token belongs to."""
    return [(value, RESPONSE if t >= FIRST else PROMPT) for t, value in enumerate(values)]


def main(path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9.5, 4.4), layout="constrained")
    sampled = [f"log p({token})" if t >= FIRST else "" for t, token in enumerate(TOKENS)]
    as_given = {
        "input_ids": list(TOKENS),
        "loss_mask": ["1" if t >= FIRST else "0" for t in range(len(TOKENS))],
        "engine's log-probs": sampled,
    }
    shifted = {"token_ids": list(TOKENS), "mask": as_given["loss_mask"], "old_logprobs": sampled}
    for t in range(len(TOKENS)):
        axes.text(LEFT + (t + 0.5) * WIDTH, 8.1, f"t = {t}", ha="center", va="center", color="#555555")
    axes.text(0, 8.1, "with the token itself", va="center", weight="bold")
    for i, (name, values) in enumerate(as_given.items()):
        row(axes, 7.0 - i * HEIGHT, name, cells(values))
    for t in range(1, len(TOKENS)):
        start, end = (LEFT + (t + 0.5) * WIDTH, 5.3), (LEFT + (t - 0.5) * WIDTH, 3.75)
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color="#555555"))
    axes.text(0, 4.8, "next_tokens(input_ids, loss_mask)", va="center", family="monospace")
    axes.text(0, 4.2, "shift(logprobs)", va="center", family="monospace")
    axes.text(0, 3.45, "with the logits that predict it", va="center", weight="bold")
    for i, (name, values) in enumerate(shifted.items()):
        empty = {"token_ids": "0", "mask": "0", "old_logprobs": ""}[name]
        row(axes, 2.3 - i * HEIGHT, name, [*cells(values)[1:], (empty, NOTHING)])
    row(axes, 2.3 - 3 * HEIGHT, "logits[t] predict", [*cells(list(TOKENS))[1:], ("nothing", NOTHING)])
    axes.set(xlim=(-0.2, LEFT + len(TOKENS) * WIDTH + 0.2), ylim=(-0.3, 8.6))
    axes.set_axis_off()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(__file__).with_name("alignment.svg"))
