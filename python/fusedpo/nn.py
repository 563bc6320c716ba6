"""The losses as a ``torch.nn.Module``, for a training loop of your own, Lightning or Accelerate."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import _checks
from .losses import PolicyLossOutput, policy_loss, policy_loss_from_hidden, policy_loss_from_logits
from .objectives import Objective

__all__ = ["PolicyLoss"]


class PolicyLoss(nn.Module):
    """A policy loss whose objective is chosen once; it has no parameters and no state.

    ``forward`` takes the log-probs of the tokens, :meth:`from_logits` the logits, :meth:`from_hidden` the last hidden
    state and the head's weight. Shapes, results, gradients and errors are those of :func:`fusedpo.policy_loss`,
    :func:`fusedpo.policy_loss_from_logits` and :func:`fusedpo.policy_loss_from_hidden`::

        loss_fn = fusedpo.nn.PolicyLoss(fusedpo.objectives.nfpo(n=4), temperature=0.8)
        out = loss_fn.from_logits(logits, token_ids, old_logprobs, advantages, mask=mask)
        out.loss.backward()

    Args:
        objective: what is computed.
        defaults: keyword arguments that all of those functions, or some of them, take: ``temperature``, ``inplace``,
            ``softcap``, ``logit_scale``, ``chunk_tokens``, ``skip_zero_advantages``, ``loss_scale``, ``reduction``. A
            call may give another value.

    Raises:
        TypeError: ``objective`` is no ``Objective``, or a default has another name.
    """

    DEFAULTS = (
        *("temperature", "inplace", "softcap", "logit_scale", "chunk_tokens", "skip_zero_advantages"),
        *("loss_scale", "reduction"),
    )

    def __init__(self, objective: Objective, **defaults: Any) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise TypeError(f"objective must be a fusedpo.Objective, got {type(objective).__name__}")
        unknown = [name for name in defaults if name not in self.DEFAULTS]
        if unknown:
            raise TypeError(f"defaults must be among {self.DEFAULTS}, got {_checks.brief(unknown[0])}")
        self.objective = objective
        self.defaults = defaults

    def forward(
        self, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, **arguments: Any
    ) -> PolicyLossOutput:
        """:func:`fusedpo.policy_loss` with this objective."""
        return policy_loss(logprobs, old_logprobs, advantages, **self._with("loss_scale", "reduction", **arguments))

    def from_logits(
        self, logits: Tensor, token_ids: Tensor, old_logprobs: Tensor | None, advantages: Tensor, **arguments: Any
    ) -> PolicyLossOutput:
        """:func:`fusedpo.policy_loss_from_logits` with this objective."""
        given = self._with("loss_scale", "temperature", "inplace", **arguments)
        return policy_loss_from_logits(logits, token_ids, old_logprobs, advantages, **given)

    def from_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        **arguments: Any,
    ) -> PolicyLossOutput:
        """:func:`fusedpo.policy_loss_from_hidden` with this objective."""
        names = ("loss_scale", "temperature", "softcap", "logit_scale", "chunk_tokens", "skip_zero_advantages")
        given = self._with(*names, **arguments)
        return policy_loss_from_hidden(hidden, weight, token_ids, old_logprobs, advantages, **given)

    def extra_repr(self) -> str:
        return ", ".join([repr(self.objective), *(f"{name}={value!r}" for name, value in self.defaults.items())])

    def _with(self, *names: str, **arguments: Any) -> dict[str, Any]:
        """The arguments of a call, over the defaults by these names."""
        own = {name: value for name, value in self.defaults.items() if name in names}
        return {"objective": self.objective, **own, **arguments}
