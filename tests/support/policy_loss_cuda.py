"""The CUDA kernels of the policy loss, compiled for the CPU, and the calls of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import cuda_on_cpu
import pytest
import torch
from torch import Tensor

import fusedpo
from fusedpo import backends
from fusedpo import objectives as O
from fusedpo.ops import policy_loss as ops_policy_loss

on_the_cpu = pytest.mark.skipif(
    backends.NATIVE_MISSING is not None or cuda_on_cpu.COMPILER is None,
    reason=backends.NATIVE_MISSING or "no C++ compiler",
)


class Sizes(NamedTuple):
    """Threads of a block, tokens of a tile, and how many blocks a grid has at most."""

    block: int
    tile: int
    grid: int


SMALL = Sizes(32, 8, 1)


class Call(NamedTuple):
    """What the kernels get, and what the reference makes of it in float64: loss, metrics, two gradients, scale."""

    name: str
    arguments: tuple
    expected: list[Tensor]


def call(batch: dict, objective: O.Objective, per_token: bool, sizes: Sizes = SMALL, **options: Any) -> Call:
    batch = cast(batch, torch.float32)
    lp, cu_seqlens = batch["logprobs"], batch.get("cu_seqlens")
    upstream = torch.randn(lp.shape) if per_token else None
    options |= {"objective": objective, "reduction": "none" if per_token else "mean"}
    tensors = operator_arguments(batch, options)
    parts, values = ops_policy_loss.encode(objective)
    encoded = (torch.tensor(parts), torch.tensor(values, dtype=torch.float64), per_token)
    if cu_seqlens is None:
        shape = (lp.numel(), lp.shape[0] if lp.dim() == 2 else 1, lp.shape[-1])
    else:
        shape = (lp.numel(), cu_seqlens.numel() - 1, 0)
    advantages, is_weights = tensors[3], tensors[7]
    is_per_token = [x is None or x.shape == lp.shape for x in (advantages, is_weights)]
    arguments = (*sizes, *tensors, *encoded, *shape, *is_per_token, upstream)
    name = f"{objective}, per_token={per_token}, {list(lp.shape)}, {sizes}"
    return Call(name, arguments, reference(batch, options, upstream))


def cast(batch: dict, dtype: torch.dtype) -> dict:
    return {name: x.to(dtype) if x is not None and x.is_floating_point() else x for name, x in batch.items()}


def operator_arguments(batch: dict, options: dict) -> tuple[Tensor | None, ...]:
    """The tensors that the operator gets."""
    captured = []

    def capture(logprobs: Tensor, entropy: Tensor | None, rest: tuple, **_: Any) -> tuple[Tensor, Tensor]:
        captured.append((logprobs, entropy, *rest))
        return torch.zeros(()), torch.zeros(16)

    with pytest.MonkeyPatch.context() as patch, fusedpo.backend("native"):
        patch.setattr(ops_policy_loss, "policy_loss", capture)
        fusedpo.policy_loss(**batch, **options)
    return captured[0]


def reference(batch: dict, options: dict, upstream: Tensor | None) -> list[Tensor]:
    batch = cast(batch, torch.float64)
    leaves = {
        name: batch[name].clone().requires_grad_() for name in ("logprobs", "entropy") if batch.get(name) is not None
    }
    with fusedpo.backend("reference"):
        out = fusedpo.policy_loss(**batch | leaves, **options)
    out.loss.backward(None if upstream is None else upstream.double())
    has_entropy = options["objective"].entropy_coef != 0
    gradients = [leaves["logprobs"].grad, leaves["entropy"].grad if has_entropy else torch.empty(0).double()]
    scale = token_scale(batch, options["objective"], options.get("denominator"), options.get("loss_scale", 1.0))
    return [out.loss.detach(), torch.stack(list(out.metrics.values())), *gradients, scale]


def token_scale(batch: dict, objective: O.Objective, denominator: float | None, loss_scale: float) -> Tensor:
    """What the loss of each token is multiplied by: the gradient of an aggregation alone."""
    shape = {"aggregation": objective.aggregation, "length_norm": objective.length_norm}
    leaf = torch.zeros_like(batch["logprobs"]).requires_grad_()
    given = {"mask": batch.get("mask"), "cu_seqlens": batch.get("cu_seqlens")}
    with fusedpo.backend("reference"):
        fusedpo.policy_loss(
            *(leaf, None, -torch.ones_like(leaf)),
            objective=O.Objective(O.OnPolicy(), O.NoTrustRegion(), **shape),
            denominator=denominator,
            loss_scale=loss_scale,
            **given,
        ).loss.backward()
    return leaf.grad


def run(program: Path, calls: list[Call]) -> list[list[Tensor]]:
    """All calls in one process."""
    shapes = [(x.shape, torch.float32) for call in calls for x in call.expected]
    results = iter(cuda_on_cpu.run(program, [call.arguments for call in calls], shapes))
    return [[next(results) for _ in call.expected] for call in calls]
