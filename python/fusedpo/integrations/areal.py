"""AReaL: ``ppo_actor_loss_fn`` and ``gather_logprobs``, for packed tokens with ``cu_seqlens``.

There is no registry: replace the name where the actor looks it up::

    import functools

    import areal.trainer.ppo.actor as actor
    from fusedpo.integrations.areal import ppo_actor_loss_fn

    actor.ppo_actor_loss_fn = functools.partial(ppo_actor_loss_fn, objective="nfpo", options={"n": 4})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..logprobs import token_logprobs
from ..losses import policy_loss
from ..objectives import Objective
from ..reference.layout import layout
from . import _common

__all__ = ["gather_logprobs", "gather_logprobs_entropy", "ppo_actor_loss_fn"]


def ppo_actor_loss_fn(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    eps_clip: float,
    loss_mask: Tensor,
    eps_clip_higher: float | None = None,
    c_clip: float | None = None,
    rejection_sampling: Any = None,
    importance_sampling_level: str = "token",
    cu_seqlens: Tensor | None = None,
    *,
    objective: str | Objective | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``areal.utils.functional.ppo_actor_loss_fn``: the mean over the kept tokens, and AReaL's statistics per token.

    Args:
        logprobs, proximal_logprobs, advantages, loss_mask: ``[B, T]``, or packed ``[T]`` with ``cu_seqlens``; the ratio
            is ``logprobs`` to ``proximal_logprobs``. ``old_logprobs`` are those of the rollout, which only
            ``rejection_sampling`` needs: that is refused.
        importance_sampling_level: ``"token"`` (PPO) or ``"sequence"`` (GSPO, with advantages averaged per sequence).
        objective: in place of those two, an ``Objective`` or a preset's name, with its arguments in ``options``.
    """
    _common.refuse("areal", rejection_sampling=rejection_sampling)
    if importance_sampling_level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level must be 'token' or 'sequence', got {importance_sampling_level!r}")
    if logprobs.dim() == 1 and cu_seqlens is None and (objective or importance_sampling_level == "sequence"):
        raise ValueError("cu_seqlens is needed for packed tokens [T], got None")
    per_sequence = importance_sampling_level == "sequence"
    low, high = eps_clip, eps_clip if eps_clip_higher is None else eps_clip_higher
    built = _common.objective(
        objective or ("gspo" if per_sequence else "ppo"),
        options,
        thresholds={"clip_low": low, "clip_high": high},
        aggregation="token-mean",
    )
    built = _common.with_dual_clip("areal", built, c_clip=c_clip)
    if per_sequence:
        advantages = _mean_of_sequences(advantages, loss_mask, cu_seqlens)
    loss = policy_loss(
        logprobs,
        proximal_logprobs,
        advantages,
        objective=built,
        mask=loss_mask,
        cu_seqlens=cu_seqlens,
        reduction="none",
    ).loss
    kept = loss_mask != 0
    return loss.sum() / kept.sum().clamp(min=1), _statistics(
        loss, logprobs, proximal_logprobs, advantages, kept, cu_seqlens, (low, high, c_clip), per_sequence
    )


@torch.no_grad()
def _statistics(
    loss: Tensor,
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    advantages: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    bounds: tuple[float, float, float | None],
    per_sequence: bool,
) -> dict[str, Tensor]:
    """What AReaL logs: the clip of PPO's ratio, whatever the objective."""
    low, high, dual = bounds
    log_ratio = (logprobs - proximal_logprobs).detach()
    level = _mean_of_sequences(log_ratio, kept, cu_seqlens) if per_sequence else log_ratio
    ratio = level.masked_fill(~kept, -torch.inf).clamp(max=20.0).exp()
    down, up = (advantages < 0) & (ratio < 1 - low), (advantages > 0) & (ratio > 1 + high)
    dual_clipped = torch.zeros_like(kept) if dual is None else (advantages < 0) & (ratio > dual)
    return {
        "loss": loss.detach(),
        "importance_weight": ratio,
        "approx_kl": log_ratio,
        "clip_mask": (down | up) & kept,
        "dual_clip_mask": dual_clipped & kept,
    }


def _mean_of_sequences(values: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The mean over the kept tokens of each sequence, at all of its tokens."""
    where = layout(values, cu_seqlens)
    kept = where.kept(mask)
    total = where.sum_per_sequence(values.reshape(-1).masked_fill(~kept, 0))
    mean = total / where.sum_per_sequence(kept.to(total.dtype)).clamp(min=1)
    return mean[where.sequence].reshape(values.shape)


def gather_logprobs(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, tp_group: Any = None, chunk_size: int = 1024
) -> Tensor:
    """``areal.utils.functional.gather_logprobs``: ``[...]`` float32 from ``[..., V]`` and ``[...]``.

    ``chunk_size`` is not needed. With a ``tp_group``, the logits are this rank's equal part of the vocabulary.
    """
    return token_logprobs(logits, labels, temperature=temperature, tp_group=tp_group)


def gather_logprobs_entropy(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, tp_group: Any = None, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """:func:`gather_logprobs` and the entropy, ``[...]`` float32, in nats."""
    return token_logprobs(logits, labels, temperature=temperature, return_entropy=True, tp_group=tp_group)
