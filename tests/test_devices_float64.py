"""Devices without float64, as Apple's MPS is: a dispatch mode refuses it, and the reference is what runs there."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fusedpo
from fusedpo import aggregation, corrections, covariance
from fusedpo import objectives as O
from fusedpo._dtypes import wide


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in pytree.tree_leaves(result)):
            raise TypeError("this device has no float64")
        return result


def test_what_sums_are_accumulated_in():
    x = torch.zeros(2)
    assert wide(x) == wide(x.device) == torch.float64
    with NoFloat64():
        assert wide(x) == torch.float32
    assert wide(torch.device("mps")) == torch.float32
    assert torch.compile(lambda x: x.to(wide(x)), fullgraph=True, backend="eager")(x).dtype == torch.float64


def every_objective(z: torch.Tensor) -> torch.Tensor:
    return sum(
        fusedpo.policy_loss(z, z.detach() - 0.1, z[:, :1].detach(), objective=objective).loss
        for objective in (O.grpo(), O.nfpo(2), O.gspo(), O.cppo(), O.vespo(), O.gmpo(), O.ctpo(), O.sapo(), O.dppo_kl())
    )


CALLS = {
    "policy_loss": every_objective,
    "from_logits": lambda z: (
        fusedpo.policy_loss_from_logits(z, torch.zeros(2).long(), None, z[:, 0], objective=O.ppo()).loss
    ),
    "from_hidden": lambda z: (
        fusedpo.policy_loss_from_hidden(
            z,
            torch.ones(5, 4),
            torch.zeros(2).long(),
            None,
            torch.zeros(2),
            objective=O.ppo(),
            skip_zero_advantages=True,
        ).loss
    ),
    "value_loss": lambda z: fusedpo.value_loss(z, z.detach(), z.detach() + 1, clip=0.2, denominator=3.0).loss,
    "aggregate": lambda z: aggregation.aggregate(z, "seq-mean-token-sum-norm"),
    "kl_cov_penalty": lambda z: covariance.kl_cov_penalty(z, z.detach() - 1, z[:, 0].detach()).sum(),
    "clip_cov_weights": lambda z: covariance.clip_cov_weights(z, z, z[:, 0]),
    "importance_weights": lambda z: corrections.importance_weights(z, z, level="sequence", normalise=True)[0],
    "rejection_mask": lambda z: corrections.rejection_mask(z, z, {"seq_mean_k3": 0.1, "token_k1": 2.0}),
    "global_denominator": lambda z: aggregation.global_denominator(z, O.grpo()),
}


@pytest.mark.parametrize("name", CALLS)
def test_without_float64(name):
    z = torch.linspace(-1, -0.1, 8).reshape(2, 4).requires_grad_()
    with fusedpo.backend("reference"), NoFloat64():
        result = CALLS[name](z)
        if result.requires_grad:
            result.backward()
