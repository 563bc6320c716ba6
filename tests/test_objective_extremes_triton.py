"""The ends of the domains by the Triton kernels: on a GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch
from support.extremes import OBJECTIVES, batch_of, compare, run
from support.triton_device import DEVICE, _backend, pytestmark  # noqa: F401

import fusedpo

CHOSEN = [
    *("SAPO, sharp", "SAPO, sequence", "VESPO, narrow", "VESPO, unbounded", "LogClip, infinite scale"),
    *("LogClip, scale 0", "BinaryKL", "PPOClip, upper below lower", "CISPO", "on policy"),
    *(f"{kind}, weighted=True, clamp={clamp}" for kind in ("k2", "k3") for clamp in (None, 7.0)),
]


@pytest.mark.parametrize("name", CHOSEN)
def test_triton(name):
    rows = [*range(0, len(batch_of(name)["logprobs"]), 7), -1]  # interpreted, each takes its time
    batch = {key: x[rows].to(DEVICE) for key, x in batch_of(name).items()}
    leaf = batch["logprobs"].requires_grad_()
    loss = fusedpo.policy_loss(**batch, objective=OBJECTIVES[name], reduction="none").loss
    loss.sum().backward()
    with torch.device("cpu"):
        truths = [x[rows] for x in run(name, "reference", torch.float64)]
        compare(name, [loss.detach().cpu(), leaf.grad.cpu()], truths)
