"""OpenRLHF: its ``PolicyLoss`` and its log-probs and entropy.

There is no registry: replace the name where the actor looks it up, before the trainer is built::

    import functools

    import openrlhf.trainer.ray.ppo_actor as ppo_actor
    from fusedpo.integrations.openrlhf import PolicyLoss

    ppo_actor.PolicyLoss = functools.partial(PolicyLoss, objective="nfpo", n=4)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..corrections import importance_weights
from ..logprobs import token_logprobs
from ..losses import policy_loss
from ..objectives import Objective
from . import _common

__all__ = ["PolicyLoss", "compute_entropy", "log_probs_from_logits"]


class PolicyLoss(nn.Module):
    """``openrlhf.models.loss.PolicyLoss``; ``objective`` replaces what ``policy_loss_type`` (ppo, gspo) says.

    ``objective`` is an ``Objective`` or a preset's name, with the preset's arguments in ``options``; clip bounds that
    they do not give are ``clip_eps_low``, ``clip_eps_high`` and ``dual_clip``. ``token_level_loss`` chooses the
    aggregation, and GSPO is always averaged per sample, as in OpenRLHF.

    The correction for the rollout engine: ``is_correction_*`` of OpenRLHF 0.11 per token by the ratio, clipped or
    masked; anything else is refused by name, and so is ``enable_vllm_is_correction`` of earlier versions.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str | None = None,
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: tuple[float, float] = (0.5, 5.0),
        enable_vllm_is_correction: bool = False,
        vllm_is_truncated_threshold: Any = None,
        vllm_is_correction_type: str = "tis",
        *,
        objective: str | Objective | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        _common.refuse("openrlhf", enable_vllm_is_correction=enable_vllm_is_correction)
        if policy_loss_type not in ("ppo", "gspo"):
            raise ValueError(f"policy_loss_type must be 'ppo' or 'gspo', got {policy_loss_type!r}")
        self.correct = is_correction_level not in (None, "off")
        if self.correct:
            refused = is_correction_level if is_correction_level != "token" or policy_loss_type == "gspo" else None
            _common.refuse("openrlhf", is_correction_level=refused)
            _common.refuse(
                "openrlhf", is_correction_gating=None if is_correction_gating == "ratio" else is_correction_gating
            )
        self.mode = {"mask": "mask", "clip": "truncate"}[is_correction_mode]
        self.threshold = is_correction_threshold
        # Versions that know is_correction_level return one value more.
        self.returns_filter_ratio = is_correction_level is not None
        per_token = token_level_loss and policy_loss_type != "gspo"
        built = _common.objective(
            objective or policy_loss_type,
            options,
            thresholds={"clip_low": clip_eps_low, "clip_high": clip_eps_high},
            aggregation="token-mean" if per_token else "seq-mean-token-mean",
        )
        self.objective = _common.with_dual_clip("openrlhf", built, dual_clip=dual_clip)

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor | None, ...]:
        """``[B, T]`` each to ``(loss, clip_ratio, ppo_kl, vllm_kl)``, and the fraction filtered in OpenRLHF 0.11."""
        weights = vllm_kl = filtered = None
        if self.correct:
            if rollout_log_probs is None:
                raise ValueError("rollout_log_probs is needed by is_correction_level='token', got None")
            mask = torch.ones_like(log_probs) if action_mask is None else action_mask
            low, high = self.threshold
            bounds: dict[str, Any] = {"mask": mask, "low": low or None, "high": high}
            weights, _ = importance_weights(old_log_probs, rollout_log_probs, mode=self.mode, **bounds)  # type: ignore[arg-type]
            _, inside = importance_weights(old_log_probs, rollout_log_probs, mode="reject", **bounds)
            kept = mask != 0
            tokens = kept.sum().clamp(min=1)  # a micro-batch may have none
            filtered = (kept & ~inside).sum() / tokens
            vllm_kl = (rollout_log_probs - old_log_probs).masked_fill(~kept, 0).sum() / tokens
        count = batch_num_tokens if self.objective.aggregation == "token-mean" else global_batch_size
        out = policy_loss(
            log_probs,
            old_log_probs,
            advantages,
            objective=self.objective,
            mask=action_mask,
            is_weights=weights,
            denominator=count,
            loss_scale=1.0 if count is None else float(dp_size),  # without a global count, OpenRLHF ignores dp_size
        )
        results = (out.loss, out.metrics["clip_frac"], out.metrics["approx_kl"], vllm_kl)
        return (*results, filtered) if self.returns_filter_ratio else results


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """``openrlhf.models.utils.log_probs_from_logits``: ``[...]`` float32 from ``[..., V]`` and ``[...]``.

    Unlike OpenRLHF's, it leaves ``logits`` as they are, and needs no float32 copy of them.
    """
    return token_logprobs(logits, labels, temperature=temperature)


def compute_entropy(logits: Tensor) -> Tensor:
    """``openrlhf.models.utils.compute_entropy``: ``[...]`` float32, in nats, from ``[..., V]``."""
    return _common.entropy(logits)
