"""Tokens at the ends of every range, and the objectives that look at them."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

import fusedpo
from fusedpo import objectives as O

INF = math.inf
LOGPROBS = (-30.0, -19.0, -1.3, -0.7, -1e-3, -1e-6, 0.0)


def tokens() -> dict[str, Tensor]:
    """Sequences of three equal tokens: sums over windows and sequences do not cancel.

    Any log-prob after any other, with advantages of each sign; the last ones have become impossible.
    """
    rows = [(lp, olp, a, 1.0) for lp, olp, a in itertools.product(LOGPROBS, LOGPROBS, (-2.0, 0.0, 3.0))]
    rows += [(-INF, olp, a, 1.0) for olp, a in itertools.product((-110.0, -1.3, 0.0), (-2.0, 0.0, 3.0))]
    rows += [(-INF, -1.3, 3.0, 0.0)]  # dropped by an importance weight of 0
    lp, olp, a, weight = (torch.tensor(column)[:, None].repeat(1, 3) for column in zip(*rows, strict=True))
    ref = torch.tensor(LOGPROBS).repeat(len(rows) // len(LOGPROBS) + 1)[: len(rows), None].repeat(1, 3)
    return {"logprobs": lp, "old_logprobs": olp, "advantages": a, "is_weights": weight, "ref_logprobs": ref}


def objective(region: O.TrustRegion, ratio: O.Ratio = O.TokenRatio()) -> O.Objective:  # noqa: B008
    return O.Objective(ratio, region)


SEQUENCE, WHOLE = O.SequenceRatio(), O.Trace("all", "all")
OBJECTIVES = {
    "SAPO, sharp": objective(O.SAPO(1e4, 9e3)),
    "SAPO, flat": objective(O.SAPO(1e-4, 30.0)),
    "SAPO, sequence": objective(O.SAPO(1e3, 50.0), SEQUENCE),
    "VESPO, narrow": objective(O.VESPO(1e4, 1e4, 9e3, 9e3)),
    "VESPO, unbounded": objective(O.VESPO(50.0, 1e-3, 0.0, 1e3), WHOLE),
    "LogClip, infinite scale": objective(O.LogClip(0.0, 0.0, power=1e3)),
    "LogClip, scale 0": objective(O.LogClip(0.1, 0.0, dual=INF, power=-1e3)),
    "LogClip, infinite dual": objective(O.LogClip(0.2, 0.3, dual=1e3, power=2.0), WHOLE),
    "BinaryKL": objective(O.BinaryKL(0.05, 0.05, cap=None)),
    "BinaryKL, wide": objective(O.BinaryKL(9.9, 9.9)),
    "BinaryTV": objective(O.BinaryTV(0.3, 1e-7), WHOLE),
    "CPPO, nothing": objective(O.CPPO(1e-9, 0.0, 1e-6)),
    "CPPO, everything": objective(O.CPPO(1e30, INF)),
    "PPOClip, no bounds": objective(O.PPOClip(INF, INF, dual=INF, cap=1e30)),
    "PPOClip, upper below lower": objective(O.PPOClip(0.1, -0.875, dual=0.3125)),
    "PPOClip, cap": objective(O.PPOClip(0.1, 0.2, cap=1e-30), WHOLE),
    "PPOClip, product": objective(O.PPOClip(0.1, 0.2, cap=1e-30, on="product"), WHOLE),
    "CISPO": objective(O.CISPO(INF, -0.875)),
    "GMPO, no bounds": objective(O.GMPO(INF, INF), SEQUENCE),
    "DRO": objective(O.DRO(1e8), O.OnPolicy()),
    "on policy": objective(O.NoTrustRegion(), O.OnPolicy()),
    **{
        f"{kind}, weighted={weighted}, clamp={clamp}": O.reinforce(kl=O.KL(kind, 1.0, clamp, weighted))
        for kind, weighted, clamp in itertools.product(("k1", "k2", "k3", "k3+"), (False, True), (None, 7.0))
    },
}


def batch_of(name: str) -> dict[str, Tensor]:
    batch = tokens()
    if name == "DRO" or OBJECTIVES[name].kl is not None:
        batch["logprobs"].clamp_(min=-1e4)  # a quadratic penalty of -infinity is infinite, and so is its derivative
    if OBJECTIVES[name].kl is not None:
        batch["advantages"].zero_()
    return batch


def run(name: str, backend: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The losses of the tokens, and the gradient of their sum."""
    batch = {key: x.to(dtype) for key, x in batch_of(name).items()}
    leaf = batch["logprobs"].requires_grad_()
    with fusedpo.backend(backend):
        loss = fusedpo.policy_loss(**batch, objective=OBJECTIVES[name], reduction="none").loss
    loss.sum().backward()
    return [loss.detach(), leaf.grad]


def compare(name: str, results: list[Tensor], truths: list[Tensor] | None = None) -> None:
    """Differences of log-probs lose some roundoffs of 30, which a gate of slope 100 makes a relative error of 1e-4."""
    truths = truths or run(name, "reference", torch.float64)
    for what, result, truth in zip(("loss", "gradient"), results, truths, strict=True):
        assert not truth.isnan().any(), what
        torch.testing.assert_close(
            result.double(), truth, rtol=1e-4, atol=1e-30, msg=lambda text, what=what: f"{what}: {text}"
        )
