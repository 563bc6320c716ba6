"""The KL divergence to another model over the whole vocabulary: a term of a loss, or a loss: distillation."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _checks, _tokens, backends, ops, reference
from .advantages import arguments
from .logprobs import _check_linear, check_temperature, head_options
from .objectives import Aggregation, Objective
from .ops import divergence as ops_divergence
from .ops import hidden as ops_hidden
from .reference.aggregation import aggregate, scaled
from .reference.layout import layout

__all__ = ["ExactKLOutput", "exact_kl", "exact_kl_from_hidden"]

Direction = Literal["reverse", "forward"]

_WHOLE = _checks.of_whole_vocabulary(
    "gather the logits or the weight of a split vocabulary, or estimate the divergence from log-probs by the KL part "
    "of an objective; of split sequences, a token-sum, or a token-mean with the denominator of all ranks, is a share"
)


class ExactKLOutput(NamedTuple):
    """``loss`` is differentiable. ``kl``, detached: the divergence at each token in nats, 0 where masked."""

    loss: Tensor
    kl: Tensor


@_WHOLE
def exact_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    direction: Direction = "reverse",
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    aggregation: Aggregation = "token-mean",
    length_norm: float | None = None,
    denominator: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
    inplace: bool = False,
) -> ExactKLOutput:
    """The aggregated ``KL(p || q)`` of every token, ``p`` and ``q`` the softmax of ``logits`` and of ``ref_logits``.

    ``direction="forward"`` is ``KL(q || p)``. Add ``coef * exact_kl(...).loss`` to any loss; with a teacher's logits
    as ``ref_logits`` it is a loss of distillation by itself, on the student's own samples on-policy distillation. Where
    ``KL`` of an objective estimates the divergence from the sampled token, this has no variance. The gradient is
    computed with the loss, while both rows are in the cache.

    Args:
        logits: of the policy: ``[B, T, V]``, or packed ``[T, V]`` or ``[1, T, V]``, floating-point, rows may be
            strided. ``ref_logits``: of that shape, any floating-point dtype; no gradient.
        temperature: positive number, or a tensor of one value per token; divides both.
        mask, cu_seqlens, denominator: as in :func:`fusedpo.policy_loss`. What logits of masked tokens hold reaches
            nothing.
        loss_scale: a number or a 0-d tensor that multiplies the loss. For float16, as in
            :func:`fusedpo.policy_loss_from_logits`: the factor of the GradScaler, as a tensor; with a number of at most
            1 the backward computes the gradient, once it is scaled, and reads both rows again.
        aggregation, length_norm: as in :class:`fusedpo.Objective`.
        inplace: let the gradient overwrite ``logits``, which saves a tensor of their size. A use of the logits that was
            saved before raises then. Ignored by the reference, under ``torch.compile`` and where rows share memory.

    Returns:
        ``loss``: 0-d, float64 for float64 ``logits``, else float32; differentiable with respect to ``logits``, once.
        ``kl``: ``[*tokens]``. A token of which ``q`` is 0 at a column where ``p`` is not has infinite ``KL(p || q)``;
        a column where both are 0 adds nothing.

    Raises:
        TypeError: types and dtypes. ValueError: shapes, devices, values.
    """
    _checks.floating("logits", logits)
    _checks.floating("ref_logits", ref_logits)
    _checks.shape("ref_logits", ref_logits, tuple(logits.shape), "that of logits")
    _checks.same_device("ref_logits", ref_logits, "logits", logits)
    if logits.dim() < 2 or logits.shape[-1] == 0:
        raise ValueError(f"logits must hold tokens [B, T, V] or [T, V] with V >= 1, got the shape {list(logits.shape)}")
    given = (direction, temperature, mask, cu_seqlens, aggregation, length_norm, denominator, loss_scale)
    tokens = _Tokens("logits", logits, *given)
    way = _way(logits.device.type, logits.dtype, ref_logits.dtype, loss_scale)
    if way == "reference":
        kl = reference.exact_kl(logits, ref_logits, direction=direction, temperature=temperature, mask=mask)
        return ExactKLOutput(tokens.loss(kl), kl.detach())
    inplace = inplace and logits.stride(-1) == 1 and not ops.may_overlap(logits)
    if way == "deferred":
        rows = tokens.rows(temperature, scale=False)
        kl = ops_divergence.divergences(logits, ref_logits.detach(), rows, direction=direction, inplace=inplace)
        return ExactKLOutput(tokens.loss(kl), kl.detach())
    rows = tokens.rows(temperature)
    return ExactKLOutput(*ops_divergence.from_logits(logits, ref_logits, rows, direction=direction, inplace=inplace))


@_WHOLE
def exact_kl_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_bias: Tensor | None = None,
    ref_softcap: float | None = None,
    ref_logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    gradient_threshold: float | None = None,
    direction: Direction = "reverse",
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    aggregation: Aggregation = "token-mean",
    length_norm: float | None = None,
    denominator: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
) -> ExactKLOutput:
    """:func:`exact_kl` of the logits ``hidden @ weight.T`` and ``ref_hidden @ ref_weight.T``, a chunk at a time.

    Two chunks of logits are in memory, and the gradients are computed with the loss: two products for the logits, one
    each for ``hidden`` and ``weight`` as far as they require gradients. Masked tokens cost nothing. (The reference and
    ``torch.compile``, whose graph may write into no memory that it did not make, hold all logits.)

    Args:
        hidden: ``[B, T, H]``, or packed ``[T, H]`` or ``[1, T, H]``. ``weight``: ``[V, H]``, same dtype.
        ref_hidden, ref_weight: of the other model, whose ``H`` may be another; the vocabulary is the same.
        bias, softcap, logit_scale, chunk_tokens: as in :func:`fusedpo.linear_token_logprobs`; ``ref_*`` of the other.
        gradient_threshold: as there; columns are active where an element of the gradient is larger than
            ``gradient_threshold * |c|``, ``c`` being the gradient of the row's divergence over its temperature.
        Others as in :func:`exact_kl`.

    Returns as :func:`exact_kl`; differentiable with respect to ``hidden``, ``weight`` and ``bias``, once.
    Raises as :func:`exact_kl` and :func:`fusedpo.linear_token_logprobs`.
    """
    _checks.floating("hidden", hidden)
    _check_linear(hidden, weight, bias)
    _checks.floating("ref_hidden", ref_hidden)
    _check_linear(ref_hidden, ref_weight, ref_bias)
    _checks.same_device("ref_hidden", ref_hidden, "hidden", hidden)
    if ref_hidden.shape[:-1] != hidden.shape[:-1] or ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_hidden and ref_weight must have the tokens {list(hidden.shape[:-1])} and the vocabulary "
            f"{weight.shape[0]} of hidden and weight, got {list(ref_hidden.shape)} and {list(ref_weight.shape)}"
        )
    head = head_options(hidden, softcap, logit_scale, chunk_tokens, gradient_threshold)
    ref_head = head_options(ref_hidden, ref_softcap, ref_logit_scale)
    given = (direction, temperature, mask, cu_seqlens, aggregation, length_norm, denominator, loss_scale)
    tokens = _Tokens("hidden", hidden, *given)
    way = _way(hidden.device.type, head.dtype, ref_head.dtype, loss_scale)
    if way == "reference" or torch.compiler.is_compiling():
        both = [
            reference.linear_logits(x, w, bias=b, softcap=cap, logit_scale=factor)
            for x, w, b, cap, factor in (
                (hidden, weight, bias, softcap, logit_scale),
                (ref_hidden, ref_weight, ref_bias, ref_softcap, ref_logit_scale),
            )
        ]
        if way == "reference":
            kl = reference.exact_kl(*both, direction=direction, temperature=temperature, mask=mask)
        else:
            logits, ref_logits = (x.to(head.dtype) for x in both)
            rows = tokens.rows(temperature, scale=False)
            kl = ops_divergence.divergences(logits, ref_logits.detach(), rows, direction=direction, inplace=False)
        return ExactKLOutput(tokens.loss(kl), kl.detach())
    deferred = way == "deferred"
    found = ops_divergence.from_hidden(
        hidden,
        weight,
        bias,
        (ref_hidden, ref_weight, ref_bias),
        ops_hidden.rows_where(tokens.kept if mask is not None else None, tokens.kept.numel(), hidden.device),
        tokens.rows(temperature, scale=not deferred),
        direction=direction,
        options=head,
        ref_options=ref_head,
        deferred=deferred,
    )
    return ExactKLOutput(tokens.loss(found), found.detach()) if deferred else ExactKLOutput(*found)


def _way(
    device: str, dtype: torch.dtype, ref_dtype: torch.dtype, loss_scale: float | Tensor
) -> Literal["reference", "deferred", "with the loss"]:
    """Which function runs, and when the gradient is computed.

    In the backward, where it may have no side effects, and where it is rounded to float16, for which it may be too
    small before it is scaled.
    """
    forced = backends.forced() is not None and backends.choose("exact_kl", device, dtype) == "reference"
    if forced or dtype == torch.float64 or torch._C._are_functorch_transforms_active():
        return "reference"
    if torch.compiler.is_compiling():
        has_kernel = backends.kernel_for("exact_kl", device, dtype) is not None
        return "deferred" if has_kernel and dtype == ref_dtype else "reference"
    rounded = dtype == torch.float16 and not isinstance(loss_scale, Tensor) and loss_scale <= 1
    return "deferred" if rounded else "with the loss"


class _Tokens:
    """From a divergence per token of ``source``, the argument ``name``, to the loss."""

    def __init__(
        self,
        name: str,
        source: Tensor,
        direction: str,
        temperature: float | Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        aggregation: Aggregation,
        length_norm: float | None,
        denominator: float | Tensor | None,
        loss_scale: float | Tensor,
    ) -> None:
        arguments.choice("direction", direction, ("reverse", "forward"))
        self.shape, self.mask, self.loss_scale = source.shape[:-1], mask, loss_scale
        _tokens.check_layout(name, source, mask, cu_seqlens, self.shape)
        if not torch.compiler.is_compiling():  # which cannot build one with the default of a part
            Objective(aggregation=aggregation, length_norm=length_norm)
        _tokens.check_denominator(denominator, aggregation, name, source)
        _tokens.check_number("loss_scale", loss_scale, name, source)
        _check_temperature(temperature, mask, name, source)
        self.aggregation, self.length_norm, self.denominator = aggregation, length_norm, denominator
        self.like = source.new_zeros(self.shape, dtype=torch.promote_types(source.dtype, torch.float32))
        self.where = layout(self.like, cu_seqlens)
        self.kept = self.where.kept(mask)

    def loss(self, kl: Tensor) -> Tensor:
        total = aggregate(
            *(kl.reshape(-1), self.kept, self.where, self.aggregation),
            length_norm=self.length_norm,
            denominator=self.denominator,
        )
        return scaled(total, self.loss_scale)

    def rows(self, temperature: float | Tensor, *, scale: bool = True) -> ops_divergence.Rows:
        """Of both models; with ``scale`` the gradient of the loss with respect to the divergences, otherwise 0."""
        factor = self.like
        if scale:
            leaf = self.like.detach().requires_grad_()
            with torch.enable_grad():
                (factor,) = torch.autograd.grad(self.loss(leaf.masked_fill(~self.kept.reshape(self.shape), 0)), leaf)
        t = ops.as_scalar(temperature.detach() if isinstance(temperature, Tensor) else temperature, factor.device)
        return ops_divergence.Rows(t, t, None if self.mask is None else self.kept.reshape(self.shape), factor)


def _check_temperature(temperature: float | Tensor, mask: Tensor | None, name: str, source: Tensor) -> None:
    check_temperature(temperature, source.shape[:-1], name, source)
    if isinstance(temperature, Tensor) and _checks.values_are_free(temperature):
        good = temperature > 0 if mask is None or temperature.dim() == 0 else (temperature > 0) | (mask == 0)
        if not bool(good.all()):
            raise ValueError(f"temperature must be positive, got {float(temperature[~good].flatten()[0])}")
