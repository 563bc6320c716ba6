"""torchtitan: a loss in the place of the RL experiment's ``DAPOLoss`` and ``GRPOLoss``, from logits in one pass.

::

    from fusedpo.integrations.torchtitan import PolicyLoss

    trainer.loss_fn = PolicyLoss("nfpo", n=4)  # what the trainer calls with logits
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distributed import ContextParallel
from ..losses import policy_loss_from_logits
from ..objectives import Objective
from . import _common

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["PolicyLoss"]


class PolicyLoss:
    """The arguments and results of ``torchtitan.experiments.rl.losses.DAPOLoss``; ``objective`` as a name, or built."""

    def __init__(
        self,
        objective: str | Objective = "dapo",
        *,
        inplace: bool = False,
        tp_group: ProcessGroup | None = None,
        vocab_start: int | None = None,
        cp: ContextParallel | None = None,
        **options: Any,
    ) -> None:
        """``options``: of the preset; ``inplace``: the gradient overwrites the logits.

        ``tp_group``, ``vocab_start``, ``cp``: as in :func:`fusedpo.policy_loss_from_logits`, where plain tensors hold
        this rank's part of the vocabulary or of the tokens. A ``DTensor`` says itself how the vocabulary is split.
        """
        self.objective = _common.objective(objective, options, aggregation="token-mean")
        self.given: dict[str, Any] = {"inplace": inplace, "tp_group": tp_group, "vocab_start": vocab_start, "cp": cp}

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        global_valid_tokens: float | None = None,
        *,
        generator_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``logits`` ``[B, L, V]``, the others ``[B, L]``; tokens whose ``generator_logprobs`` are not finite drop out.

        The loss is a sum over ``global_valid_tokens``, or over 1; where tokens are split, the share of this rank's own.
        """
        kept = (loss_mask != 0) & generator_logprobs.isfinite()
        count = 1.0 if global_valid_tokens is None else max(float(global_valid_tokens), 1.0)
        out = policy_loss_from_logits(
            logits,
            labels,
            generator_logprobs,
            advantages,
            objective=self.objective,
            mask=kept,
            denominator=count,
            **self.given,
        )
        assert out.logprobs is not None
        assert out.entropy is not None
        with torch.no_grad():
            difference = (out.logprobs - generator_logprobs).masked_fill(~kept, 0)
            tokens = kept.sum()
            metrics = {
                "loss/mean": out.loss.detach(),
                "loss/ratio_mean": difference.clamp(-10, 10).exp().masked_fill(~kept, 0).sum() / count,
                "loss/ratio_clipped_frac": out.metrics["clip_frac"] * tokens / count,
                "bit_wise/logprob_diff/mean": difference.sum() / count,
                "bit_wise/ratio_tokens_different/mean": (difference.abs() > 1e-6).sum() / count,
                "bit_wise/logprob_diff/max": difference.abs().max(),
                "trainer/entropy/mean": out.entropy.masked_fill(~kept, 0).sum() / count,
            }
        return out.loss, metrics
