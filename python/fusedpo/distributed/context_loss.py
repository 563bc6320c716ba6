"""Losses under context parallelism: the operators of one device on the tokens of all ranks.

What a rank returns is its share, the sum over its own tokens of their losses times their weights in the aggregation;
its gradient is that of the sum of all shares. So nothing is communicated in the backward.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .. import _checks, _tokens, backends, reference
from .._batch import Batch
from .._batch import checked as check_batch
from ..objectives import Aggregation, Objective, Trace
from ..ops import policy_loss as ops_policy_loss
from ..reference import aggregation as of_reference
from ..reference.advantages.segments import result_dtype
from ..reference.layout import layout
from .context import ContextParallel, Tokens

PER_TOKEN = ("old_logprobs", "mask", "ref_logprobs")
PER_TOKEN_OR_SEQUENCE = ("advantages", "is_weights")


def checked(batch: Batch, where: Tokens, name: str, source: Tensor, objective: Objective) -> Batch:
    """``Batch.checked`` of arguments whose values per token are those of this rank; it communicates nothing."""
    batch = Batch(*_checks.taken(*batch))
    _checks.floating(name, source)
    stand_ins: dict[str, Any] = {}
    for argument in PER_TOKEN:
        x = getattr(batch, argument)
        if x is not None:
            where.check(argument, x)
            stand_ins[argument] = where.stand_in(x)
    for argument in PER_TOKEN_OR_SEQUENCE:
        x = getattr(batch, argument)
        if isinstance(x, Tensor) and where.is_per_token(x):
            stand_ins[argument] = where.stand_in(x)
    whole = where.stand_in(source)
    assert whole is not None
    check_batch(tuple(batch._replace(**stand_ins)), name, whole, objective)
    return batch


def gathered(batch: Batch, where: Tokens, *others: Tensor | None) -> tuple[list[Tensor | None], Batch]:
    """``others``, which have a value per token, and the batch, of the tokens of all ranks, by one gather."""
    names = [n for n in PER_TOKEN_OR_SEQUENCE if isinstance(x := getattr(batch, n), Tensor) and where.is_per_token(x)]
    names += PER_TOKEN
    found = where.gathered(*others, *(getattr(batch, n) for n in names))
    arrays: dict[str, Any] = dict(zip(names, found[len(others) :], strict=True))
    return found[: len(others)], batch._replace(**arrays)


def share_and_metrics(
    logprobs: Tensor, entropy: Tensor, whole: Batch, where: Tokens, objective: Objective
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of this rank's log-probs and entropy, and the batch of all ranks; without a gradient."""
    lp, h = where.gathered(logprobs, entropy)
    assert lp is not None
    values, metrics, *_ = _whole(lp, h, whole, objective, "mean")
    return _share(where.own(values), logprobs), metrics


def _share(own: Tensor, logprobs: Tensor) -> Tensor:
    return own.sum(dtype=torch.float64).to(result_dtype(logprobs))


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    batch: Batch,
    where: Tokens,
    objective: Objective,
    reduction: Literal["mean", "none"] = "mean",
) -> reference.PolicyLossOutput:
    """This rank's share, and the metrics of all ranks."""
    if reduction == "none" and isinstance(objective.ratio, Trace) and objective.ratio.differentiate:
        raise ValueError(
            "reduction must be 'mean' with cp and a differentiated trace: the gradient of a token's loss would have to "
            "reach the log-probs of other ranks in the backward"
        )
    (lp, h), whole = gathered(batch, where, logprobs, entropy)
    assert lp is not None
    values, metrics, grad_logprobs, grad_entropy = _whole(lp, h, whole, objective, reduction)
    own = where.own(values)
    loss = own if reduction == "none" else _share(own, logprobs)
    gradients = [
        (x, where.own(g).to(x.dtype))
        for x, g in ((logprobs, grad_logprobs), (entropy, grad_entropy))
        if x is not None and g is not None
    ]
    loss = with_gradient(loss, *gradients)
    return reference.PolicyLossOutput(loss, metrics, logprobs.detach(), None if entropy is None else entropy.detach())


def _whole(
    logprobs: Tensor, entropy: Tensor | None, batch: Batch, objective: Objective, reduction: str
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor | None]:
    """Of whole sequences: the weighted loss of each token, metrics, and the gradients of the sum of the losses."""
    backend = backends.choose("policy_loss", logprobs.device.type, logprobs.dtype)
    per_token = reduction == "none"
    differentiated = entropy is not None and objective.entropy_coef != 0
    if backend == "reference":
        given: dict[str, Any] = {"objective": objective, **batch._asdict()}
        with torch.enable_grad():
            x = logprobs.detach().requires_grad_()
            h = None if entropy is None else entropy.detach().requires_grad_(differentiated)
            out = reference.policy_loss(x, entropy=h, reduction=reduction, **given)  # type: ignore[arg-type]
            inputs = [x] if h is None or not differentiated else [x, h]
            found = torch.autograd.grad(out.loss.sum(), inputs, allow_unused=True, materialize_grads=True)
        losses = out.loss
        if not per_token:
            losses = reference.policy_loss(
                x.detach(), entropy=entropy, reduction="none", **{**given, "denominator": None}
            ).loss
            losses = losses * _weights(losses, batch, objective)
        return losses.detach(), out.metrics, found[0], found[1] if differentiated else None
    taken = batch.as_kernels_take_it(logprobs)
    lp, h = logprobs.float(), None if entropy is None else entropy.float()
    operator = getattr(torch.ops.fusedpo.policy_loss, backend)
    encoded = ops_policy_loss.encode(objective)
    losses, metrics, grad_logprobs, grad_entropy, _ = operator(lp, h, *taken, *encoded, per_token)
    if not per_token:
        one = torch.ones_like(taken.loss_scale)  # type: ignore[arg-type]
        alone = taken._replace(denominator=None, loss_scale=one)
        losses, *_ = operator(lp, h, *alone, *encoded, True)
        scale = ops_policy_loss.token_scale(lp, taken, encoded=encoded, backend=backend)
        losses = (losses.double() * scale).where(scale != 0, 0)
    named = dict(zip(reference.METRICS, metrics.unbind(), strict=True))
    losses = losses if per_token else losses.to(torch.float64)
    return losses, named, grad_logprobs, grad_entropy if differentiated else None


def _weights(losses: Tensor, batch: Batch, objective: Objective) -> Tensor:
    """What the loss of each token is multiplied by when they are aggregated; ``loss_scale`` is in it already."""
    with torch.enable_grad():
        ones = torch.ones_like(losses).requires_grad_()
        where = layout(losses, batch.cu_seqlens)
        kept = where.kept(batch.mask)
        total = of_reference.aggregate(
            ones.reshape(-1).masked_fill(~kept, 0),
            kept,
            where,
            objective.aggregation,
            length_norm=objective.length_norm,
            denominator=batch.denominator,
        )
        return torch.autograd.grad(total, ones)[0]


def aggregate(
    tokens: Tensor,
    aggregation: Aggregation,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    length_norm: float | None,
    denominator: float | Tensor | None,
    cp: ContextParallel,
) -> Tensor:
    """This rank's share of :func:`fusedpo.aggregate`."""
    where = cp.tokens("tokens", tokens, cu_seqlens)
    _tokens.check_denominator(denominator, aggregation, "tokens", tokens)
    if mask is None:
        kept = torch.ones(where.whole, dtype=torch.bool, device=tokens.device)
    else:
        where.check("mask", mask)
        gathered = where.gathered(mask != 0)[0]
        assert gathered is not None
        kept = gathered
    objective = Objective(aggregation=aggregation, length_norm=length_norm)
    dtype = result_dtype(tokens)
    batch = Batch(None, tokens, kept, cu_seqlens, None, None, denominator, 1.0)
    weights = where.own(_weights(torch.zeros(where.whole, dtype=dtype, device=tokens.device), batch, objective))
    own = tokens.to(dtype).masked_fill(~where.own(kept), 0)
    return (own * weights).sum()


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *sources_and_gradients: Tensor) -> Tensor:
        ctx.count = count
        ctx.save_for_backward(*sources_and_gradients[count:])
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        gradients = [(upstream.to(g.dtype) if upstream.dim() else upstream) * g for g in ctx.saved_tensors]
        return (
            None,
            None,
            *(g.to(s.dtype) for g, s in zip(gradients, ctx.saved_tensors, strict=True)),
            *[None for _ in range(ctx.count)],
        )


def with_gradient(value: Tensor, *sources: tuple[Tensor, Tensor]) -> Tensor:
    """``value``, whose derivative with respect to each source is the tensor beside it."""
    if not torch.is_grad_enabled() or not any(x.requires_grad for x, _ in sources):
        return value
    return _WithGradient.apply(value, len(sources), *(x for x, _ in sources), *(g for _, g in sources))
