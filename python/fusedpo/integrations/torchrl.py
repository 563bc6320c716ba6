"""TorchRL: ``GRPOLoss`` with any objective per token; KL, entropy, masks and aggregation stay TorchRL's.

::

    from fusedpo.integrations.torchrl import GRPOLoss

    loss = GRPOLoss(actor, objective="nfpo", options={"n": 4}, entropy_bonus=False)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchrl.objectives import llm

from ..losses import policy_loss
from ..objectives import Objective
from . import _common

__all__ = ["GRPOLoss"]


class GRPOLoss(llm.GRPOLoss):
    """``torchrl.objectives.llm.GRPOLoss``, whose other arguments these are.

    ``objective``: a preset's name, with its arguments in ``options``, or built; without a KL or an entropy part, which
    ``kl_to_ref_coeff`` and ``entropy_bonus`` are. Bounds that options do not give are ``clip_epsilon``.
    """

    def __init__(
        self,
        actor_network: Any = None,
        *,
        objective: str | Objective = "grpo",
        options: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(actor_network, **arguments)
        low, high = float(self.clip_epsilon_low), float(self.clip_epsilon_high)
        built = _common.objective(objective, options, thresholds={"clip_low": low, "clip_high": high})
        _common.refuse("torchrl", kl=built.kl, entropy_coef=built.entropy_coef)
        self.objective = built

    def _log_weight(self, *args: Any, **kwargs: Any) -> Any:
        results = super()._log_weight(*args, **kwargs)
        self._kept = results[3]
        return results

    def _compute_policy_objective(self, log_weight: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, T, 1]`` each; the ratio is to log-probs of 0."""
        log_ratio = log_weight.squeeze(-1)
        advantages = advantage.squeeze(-1).expand_as(log_ratio)
        out = policy_loss(
            log_ratio,
            torch.zeros_like(log_ratio),
            advantages,
            objective=self.objective,
            mask=self._kept,
            reduction="none",
        )
        return out.loss.unsqueeze(-1), out.metrics["clip_frac"]
