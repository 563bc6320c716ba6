"""prime-rl: a custom loss, and the head that gives log-probs from hidden states.

::

    [trainer.loss]
    type = "custom"
    import_path = "fusedpo.integrations.prime_rl.policy_loss"
    kwargs = { objective = "nfpo", n = 4, clip_high = 0.28 }
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from .. import losses
from ..logprobs import linear_token_logprobs
from . import _common

__all__ = ["FusedOutputLinear", "policy_loss"]


def policy_loss(inputs: Any, objective: str = "nfpo", **options: Any) -> Any:
    """``LossInputs`` of one sample to ``LossOutputs``: the sum over its tokens, which prime-rl normalises.

    Args:
        inputs: ``[seq]`` each: ``trainer_logprobs``, ``inference_logprobs`` (the old ones), ``ref_logprobs`` or None,
            ``advantages``, ``loss_mask`` and ``loss_weights`` or None, which multiply the policy term of their token.
        objective: a preset's name. options: its arguments; ``kl_coef`` and ``kl_kind`` for a KL term to
            ``ref_logprobs``.
    """
    out = losses.policy_loss(
        inputs.trainer_logprobs,
        inputs.inference_logprobs,
        inputs.advantages,
        objective=_common.objective(objective, options, aggregation="token-sum"),
        mask=inputs.loss_mask,
        ref_logprobs=inputs.ref_logprobs,
        is_weights=inputs.loss_weights,
    )
    names = ("clip_frac", "clip_frac_low", "clip_frac_high", "approx_kl", "ratio_max", "ess")
    outputs = importlib.import_module("prime_rl.trainer.rl.loss").LossOutputs
    return outputs(loss=out.loss, metrics={name: out.metrics[name] for name in names})


class FusedOutputLinear(nn.Linear):
    """prime-rl's head of that name: log-probs and entropy, without the logits of all tokens in memory at a time.

    Put it in the place of ``prime_rl.trainer.models.layers.lm_head.FusedOutputLinear`` before ``inject_prime_lm_head``.
    Unlike prime-rl's, its entropy is differentiable.
    """

    def __init__(self, in_features: int, out_features: int, chunk_size: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, labels: Tensor | None = None, temperature: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``[b, s, H]``, ``[b, s]``, ``[b, s]`` to ``PrimeLmOutput``, a dict of ``logprobs`` and ``entropy``."""
        if labels is None or temperature is None:
            raise ValueError("FusedOutputLinear needs labels and a temperature per token, got None")
        logprobs, entropy = linear_token_logprobs(
            hidden_states,
            self.weight,
            labels,
            temperature=temperature.float(),
            return_entropy=True,
            chunk_tokens=self.chunk_size,
        )
        return {"logprobs": logprobs, "entropy": entropy}
