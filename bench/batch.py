"""The batch and the plain PyTorch loss that the benchmarks of the fusion share, and the exact gradient of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import fusedpo
from fusedpo import Objective, backends, objectives

from .harness import not_installed

OBJECTIVES: dict[str, tuple[Objective, int]] = {
    "PPO": (objectives.ppo(), 1),
    "NFPO N=4": (objectives.nfpo(4), 4),
}
SEQUENCES = 4

Loss = Callable[..., Tensor]


class Batch(NamedTuple):
    """Padded tokens ``[B, T]``."""

    token_ids: Tensor
    old_logprobs: Tensor
    advantages: Tensor  # [B]
    mask: Tensor


def make_batch(logprobs: Tensor, token_ids: Tensor, *, masked: float = 0.0) -> Batch:
    """Of each sequence the first part, ``masked`` of it, is a prompt that the mask leaves out.

    Ratios of 0.6 to 1.65, none within 0.08 (in the log) of a clip bound, so that rounding does not decide there.
    """
    shift = 0.4 * torch.randint_like(token_ids, -1, 2) + 0.1 * (2 * torch.rand_like(logprobs) - 1)
    rows, width = token_ids.shape
    mask = (torch.arange(width, device=token_ids.device) >= masked * width).expand(rows, width).contiguous()
    return Batch(token_ids, logprobs - shift, torch.randn(rows, device=token_ids.device), mask)


def plain_loss(logprobs: Tensor, batch: Batch, n: int) -> Tensor:
    """As a trainer would write it, without metrics: PPO's surrogate times the ratios of the next n - 1 tokens."""
    width = logprobs.shape[-1]
    log_ratio = torch.where(batch.mask, (logprobs - batch.old_logprobs).clamp(-20, 20), 0)
    ratio, advantages = log_ratio.exp(), batch.advantages[:, None]
    surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    if n > 1:
        ahead = torch.nn.functional.pad(log_ratio.detach(), (0, n))
        log_trace = sum(ahead[:, k : k + width] for k in range(1, n))
        surrogate = surrogate * log_trace.clamp(-20, 20).exp()
    return torch.where(batch.mask, surrogate, 0).sum() / batch.mask.sum().clamp(min=1)


def on_gpu(loss: Loss, operator: str, device: str, dtype: torch.dtype) -> Iterator[tuple[str, Loss, str]]:
    """The backends that a GPU has a choice between: name, ``loss`` by that one, and why it is missing."""

    def by(backend: str) -> Loss:
        def forced(*inputs: Tensor) -> Tensor:
            with fusedpo.backend(backend):
                return loss(*inputs)

        return forced

    for backend in ("native", "triton") if device == "cuda" else ():
        yield backend, by(backend), backends.why_not(backend, operator, device, dtype) or ""


def verl_by(device: str) -> str:
    """What verl's log-probs of logits run on, by its own choice."""
    return "flash-attn" if device == "cuda" and not not_installed("flash_attn") else "PyTorch"


def exact_coefficients(logprobs: Tensor, batch: Batch, objective: Objective) -> Tensor:
    """The gradient of the loss with respect to float64 log-probs, by the reference."""
    leaf = logprobs.detach().double().requires_grad_()
    with fusedpo.backend("reference"):
        fusedpo.policy_loss(
            leaf, batch.old_logprobs.double(), batch.advantages.double(), objective=objective, mask=batch.mask
        ).loss.backward()
    return leaf.grad


def some_rows(rows: int, count: int = 16) -> Tensor:
    """Positions across the whole batch, among them the first and the last."""
    return torch.linspace(0, rows - 1, min(rows, count)).long()
