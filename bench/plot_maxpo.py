"""How much the gradient estimates of max@k vary: MaxPO, the variants of PKPO, and the signal that is not centred.

The variances are exact, nothing is sampled. ``python bench/plot_maxpo.py`` writes docs/maxpo_variance.png.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import comb
from pathlib import Path

import torch
from torch import Tensor

from fusedpo import advantages

Weights = Callable[..., Tensor]
"""``(rewards [G], group_size=n) -> [G]``: the group's sum of weight times score estimates the gradient of max@k."""

MANY = 10**6  # answers: no two samples of a group are the same


def estimators(k: int) -> dict[str, Weights]:
    """All are unbiased. ``sloo-1`` is the expected improvement of a sample over k - 1 others, which is not centred."""
    variants = {f"PKPO {v}": partial(advantages.pkpo, k=k, variant=v) for v in ("s", "sloo", "sloo-1")}
    return variants | {"MaxPO": partial(advantages.maxpo, k=k, scale="unbiased")}


def gradient_variance(weights: Weights, right: int, answers: int, n: int) -> float:
    """The trace of the covariance of the estimate from n samples, with respect to the logits of a softmax policy.

    The policy gives the same probability to all ``answers``, of which ``right`` have reward 1, the others 0. The score
    of an answer is its unit vector minus ``1 / answers``: two samples have the inner product ``[same answer] - 1 /
    answers``. With c right samples, these have one weight and the wrong ones another, so only c has to be summed over.
    """
    p = right / answers
    c = torch.arange(n + 1, dtype=torch.float64)
    probability = torch.tensor([comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)], dtype=torch.float64)
    is_right = torch.arange(n) < c[:, None]
    weight = weights(is_right.double().flatten(), group_size=n).view(n + 1, n)
    of_right, of_wrong = weight[:, 0].where(c > 0, 0), weight[:, -1].where(c < n, 0)

    # Inner products of the mean scores of right and wrong answers.
    both_right, both_wrong, mixed = 1 / right - 1 / answers, 1 / (answers - right) - 1 / answers, -1 / answers
    second_moment = (
        (c * of_right**2 + (n - c) * of_wrong**2) * (1 - 1 / answers)
        + c * (c - 1) * of_right**2 * both_right
        + (n - c) * (n - c - 1) * of_wrong**2 * both_wrong
        + 2 * c * (n - c) * of_right * of_wrong * mixed
    )
    a, b = (probability * c * of_right).sum(), (probability * (n - c) * of_wrong).sum()
    squared_mean = a**2 * both_right + b**2 * both_wrong + 2 * a * b * mixed
    return float((probability * second_moment).sum() - squared_mean)


def ratios(right: int, answers: int, n: int, k: int) -> dict[str, float]:
    """Each variance over that of the signal that is not centred."""
    variance = {name: gradient_variance(weights, right, answers, n) for name, weights in estimators(k).items()}
    return {name: value / variance["PKPO sloo-1"] for name, value in variance.items()}


def main(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 4), sharex=True, sharey=True, layout="constrained")
    for panel, (answers, n, k) in zip(panels, [(MANY, 16, 4), (MANY, 5, 4), (8, 16, 4)], strict=True):
        shares = torch.logspace(-2, -0.02, 60).tolist() if answers == MANY else [i / answers for i in range(1, answers)]
        results = [ratios(round(share * answers), answers, n, k) for share in shares]
        for name in estimators(k):
            style = {"color": "black", "linewidth": 2.5} if name == "MaxPO" else {}
            style |= {} if answers == MANY else {"marker": "."}
            panel.plot(shares, [r[name] for r in results], label=name, **style)
        title = "no two samples alike" if answers == MANY else f"{answers} answers"
        panel.set(title=f"{title}, n = {n}, k = {k}", xlabel="share of right answers", xscale="log", yscale="log")
        panel.set(xlim=(0.01, 1), ylim=(0.1, 10))
        panel.axvline(1 / n, color="grey", linewidth=0.5)
        panel.text(1 / n, 0.11, " 1/n", color="grey")
    panels[0].set_ylabel("variance / that of PKPO sloo-1")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(Path(__file__).parents[1] / "docs" / "maxpo_variance.png")
