"""Losses of segments from their formulas: plain Python loops over segments, float64, autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def segments(shape, mask, cu_seqlens=None, step_ids=None, num_steps=None) -> list[list[int]]:
    """The positions, among the flattened tokens, of the kept tokens of each segment."""
    total = math.prod(shape)
    if cu_seqlens is None:
        width = shape[-1]
        bounds = [(i * width, (i + 1) * width) for i in range(total // width if width else 0)]
    else:
        bounds = list(zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:], strict=True))
    kept = [True] * total if mask is None else (mask.flatten() != 0).tolist()
    result = []
    for start, end in bounds:
        tokens = [t for t in range(start, end) if kept[t]]
        if step_ids is None:
            result.append(tokens)
        else:
            steps = step_ids.flatten().tolist()
            result += [[t for t in tokens if steps[t] == s] for s in range(num_steps)]
    return result


def sums(lp: Tensor, ref: Tensor | None, where: list[list[int]], weights: Tensor | None = None) -> list[Tensor]:
    lp = lp.flatten()
    ref = torch.zeros_like(lp) if ref is None else ref.flatten()
    weights = torch.ones_like(lp) if weights is None else weights.flatten()
    return [sum((weights[t] * (lp[t] - ref[t]) for t in tokens), lp.new_zeros(())) for tokens in where]


def counts(where: list[list[int]], pair) -> bool:
    return all(g >= 0 and where[g] for g in pair)


def preference(lp, ref, where, pairs, objective, *, token_weights=None, weights=None, **per_pair) -> Tensor:
    """``per_pair``: margins, targets and label_smoothing, in place of those of the objective."""
    z = sums(lp, ref, where, token_weights)
    if objective.normalize:
        z = [total / max(len(tokens), 1) for total, tokens in zip(z, where, strict=True)]
    b, terms = objective.beta, []
    for p, (w, l) in enumerate(pairs):  # noqa: E741
        if not counts(where, (w, l)):
            continue
        one = {name: values[p] for name, values in per_pair.items()}
        e = one.get("label_smoothing", objective.label_smoothing)
        d = z[w] - z[l] - one.get("margins", objective.margin)
        right, flipped = torch.log1p(torch.exp(-b * d)), torch.log1p(torch.exp(b * d))
        if objective.link == "sigmoid":
            f = (1 - e) * right + e * flipped
        elif objective.link == "robust":
            f = ((1 - e) * right - e * flipped) / (1 - 2 * e)
        elif objective.link == "hinge":
            f = (1 - b * d).clamp(min=0)
        elif objective.link == "square":
            f = (d - one.get("targets", objective.target) / b) ** 2
        else:
            odds = [z[g].exp() / (1 - z[g].exp()) for g in (w, l)]
            f = -b * torch.sigmoid(torch.log(odds[0] / odds[1])).log()
        terms.append(f * (1 if weights is None else weights[p]))
    return sum(terms) / len(terms) if terms else lp.sum() * 0


def nll(lp, where, sft_where, pairs, aggregation) -> Tensor:
    lp = lp.flatten()
    chosen = [sft_where[pair[0]] for pair in pairs if counts(where, pair)]
    if aggregation == "token-mean":
        return -sum(lp[t] for tokens in chosen for t in tokens) / sum(len(tokens) for tokens in chosen)
    return -sum(sum(lp[t] for t in tokens) / len(tokens) for tokens in chosen) / len(chosen)


def kto(lp, ref, where, labels, z0, objective) -> Tensor:
    terms = []
    for z, tokens, label in zip(sums(lp, ref, where), where, labels, strict=True):
        if tokens:
            y, weight = (1, objective.desirable_weight) if label > 0 else (-1, objective.undesirable_weight)
            terms.append(weight * (1 - torch.sigmoid(y * objective.beta * (z - z0))))
    return sum(terms) / len(terms)
