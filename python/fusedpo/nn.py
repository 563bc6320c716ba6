"""The losses as a ``torch.nn.Module``, for a training loop of your own, Lightning or Accelerate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from torch import Tensor, nn

from . import _checks, _names
from .losses import PolicyLossOutput, policy_loss, policy_loss_from_hidden, policy_loss_from_logits
from .objectives import Objective, as_objective

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .distributed import ContextParallel

__all__ = ["LossHead", "PolicyLoss"]


class _Shared(TypedDict, total=False):
    """Keyword arguments of a call; the functions say what they mean."""

    mask: Tensor | None
    cu_seqlens: Tensor | None
    ref_logprobs: Tensor | None
    is_weights: Tensor | None
    denominator: float | Tensor | None
    loss_scale: float | Tensor
    cp: ContextParallel | None


class _FromLogprobs(_Shared, total=False):
    entropy: Tensor | None
    reduction: Literal["mean", "none"]


class _Split(_Shared, total=False):
    tp_group: ProcessGroup | None
    vocab_start: int | None
    vocab_size: int | None


class _FromLogits(_Split, total=False):
    temperature: float | Tensor
    inplace: bool


class _FromHidden(_Split, total=False):
    temperature: float | Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    chunk_tokens: int | None
    gradient_threshold: float | None
    num_live: int | None
    skip_zero_advantages: bool


class PolicyLoss(nn.Module):
    """A policy loss whose objective is chosen once; it has no parameters and no state.

    ``forward`` takes the log-probs of the tokens, :meth:`from_logits` the logits, :meth:`from_hidden` the last hidden
    state and the head's weight. Shapes, results, gradients and errors are those of :func:`fusedpo.policy_loss`,
    :func:`fusedpo.policy_loss_from_logits` and :func:`fusedpo.policy_loss_from_hidden`::

        loss_fn = fusedpo.nn.PolicyLoss(fusedpo.objectives.nfpo(n=4), temperature=0.8)
        out = loss_fn.from_logits(logits, token_ids, old_logprobs, advantages, mask=mask)
        out.loss.backward()

    Args:
        objective: what is computed; a string is the name of a preset with its defaults.
        defaults: keyword arguments that all of those functions, or some of them, take: ``temperature``, ``inplace``,
            ``softcap``, ``logit_scale``, ``chunk_tokens``, ``gradient_threshold``, ``skip_zero_advantages``,
            ``loss_scale``, ``reduction``. A call may give another value.

    Raises:
        TypeError: ``objective`` is neither an ``Objective`` nor a string, or a default has another name. ValueError: no
            preset has the name.
    """

    DEFAULTS = (
        *("temperature", "inplace", "softcap", "logit_scale", "chunk_tokens", "gradient_threshold"),
        *("skip_zero_advantages", "loss_scale", "reduction"),
    )

    def __init__(self, objective: Objective | str, **defaults: Any) -> None:
        super().__init__()
        self.objective = as_objective(objective)
        self.defaults = _checked(defaults)

    if TYPE_CHECKING:  # that of a Module returns Any

        def __call__(
            self, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, **arguments: Unpack[_FromLogprobs]
        ) -> PolicyLossOutput: ...

    def forward(
        self, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, **arguments: Unpack[_FromLogprobs]
    ) -> PolicyLossOutput:
        """:func:`fusedpo.policy_loss` with this objective."""
        return policy_loss(logprobs, old_logprobs, advantages, **self._with("loss_scale", "reduction", **arguments))

    def from_logits(
        self,
        logits: Tensor,
        token_ids: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        **arguments: Unpack[_FromLogits],
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
        **arguments: Unpack[_FromHidden],
    ) -> PolicyLossOutput:
        """:func:`fusedpo.policy_loss_from_hidden` with this objective."""
        names = set(self.DEFAULTS) - {"inplace", "reduction"}
        given = self._with(*names, **arguments)
        return policy_loss_from_hidden(hidden, weight, token_ids, old_logprobs, advantages, **given)

    def extra_repr(self) -> str:
        return ", ".join([repr(self.objective), *(f"{name}={value!r}" for name, value in self.defaults.items())])

    def _with(self, *names: str, **arguments: Any) -> dict[str, Any]:
        """The arguments of a call, over the defaults by these names."""
        own = {name: value for name, value in self.defaults.items() if name in names}
        return {"objective": self.objective, **own, **arguments}


def _checked(defaults: dict[str, Any]) -> dict[str, Any]:
    known = PolicyLoss.DEFAULTS
    for name in defaults:
        if name not in known:
            hint = _names.hint(name, known)
            raise TypeError(f"defaults must be among {known}, got {_checks.brief(name)}{hint}")
    return defaults


class LossHead(nn.Linear):
    """A ``torch.nn.Linear``, the last layer of the model, whose forward is :func:`fusedpo.policy_loss_from_hidden`.

    What owns a weight has to use it: FSDP2 and ZeRO-3 gather it for the forward of its module and reduce its gradient,
    and it is the mixed-precision copy there. ``LossHead.of(model.lm_head, objective)`` makes one of a layer that is
    there, which then shares its parameters: put it in its place, before the model is sharded::

        model.lm_head = fusedpo.nn.LossHead.of(model.lm_head, fusedpo.objectives.grpo())
        fully_shard(model.lm_head)
        out = model.lm_head(hidden, token_ids, old_logprobs, advantages, mask=mask)

    Args:
        objective: what is computed; None: each call names it.
        defaults: as in :class:`PolicyLoss`.
        Others as in ``torch.nn.Linear``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        objective: Objective | str | None = None,
        **defaults: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.objective = None if objective is None else as_objective(objective)
        self.defaults = _checked(defaults)

    @classmethod
    def of(cls, linear: nn.Linear, objective: Objective | str | None = None, **defaults: Any) -> LossHead:
        """One that shares the parameters of ``linear``."""
        head = cls(linear.in_features, linear.out_features, False, "meta", objective=objective, **defaults)
        head.weight, head.bias = linear.weight, linear.bias
        return head

    def forward(  # type: ignore[override]
        self, hidden: Tensor, token_ids: Tensor, old_logprobs: Tensor | None, advantages: Tensor, **arguments: Any
    ) -> PolicyLossOutput:
        """:func:`fusedpo.policy_loss_from_hidden` with this weight and bias."""
        given = {"bias": self.bias, **self.defaults, **arguments}
        given.setdefault("objective", self.objective)
        return policy_loss_from_hidden(hidden, self.weight, token_ids, old_logprobs, advantages, **given)

    def logits(self, hidden: Tensor) -> Tensor:
        """What a ``torch.nn.Linear`` gives, for generation."""
        return nn.functional.linear(hidden, self.weight, self.bias)
