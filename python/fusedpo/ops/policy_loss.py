"""The operator ``torch.ops.fusedpo.policy_loss``: log-probs in, loss, gradient coefficients and metrics out.

::

    policy_loss(logprobs, entropy?, *batch, parts, values, per_token)
        -> loss, metrics, grad_logprobs, grad_entropy, grad_log_trace

``batch`` is a :class:`fusedpo._batch.Batch`. All floating-point tensors are float32; ``mask`` is bool, ``cu_seqlens``
int64.

* ``logprobs`` ``[B, T]`` or ``[T]``: padded sequences, or one; with ``cu_seqlens`` ``[S + 1]`` packed ``[T]`` or
  ``[1, T]``. ``old_logprobs`` (None: ``logprobs``), ``mask``, ``ref_logprobs`` and ``entropy`` have its shape;
  ``advantages`` and ``is_weights`` have its shape or ``[num_sequences, 1]``.
* ``denominator`` (None: the count in this batch) and ``loss_scale`` are 0-d.
* ``parts`` and ``values`` are the objective as :func:`encode` writes it and ``decode`` in ``csrc/core/objective.h``
  reads it.
* ``loss`` is 0-d, or per token where ``per_token`` is set, which is to say not aggregated. ``metrics`` ``[16]`` in the
  order of ``reference.METRICS``.
* ``grad_logprobs``, and ``grad_entropy`` if the entropy coefficient is not 0 (else ``[0]``), are the gradients of
  ``loss.sum()``, with denominators and ``loss_scale`` in them: the backward only multiplies by the upstream gradient.
  The exception is a differentiated trace with ``per_token``: there a token's log-prob is in the loss of several tokens,
  so ``grad_logprobs`` leaves out what goes through traces, ``grad_log_trace`` is the derivative of each token's loss
  with respect to its own log-trace (else ``[0]``), and ``policy_loss_backward`` takes the adjoint of the window sum.

``token_scale`` is what the loss of each token is multiplied by when it is aggregated, 0 at masked tokens; of
``logprobs`` it takes the shape, and ``aggregation`` and ``length_norm`` are those of ``parts`` and ``values``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._batch import Batch
from .._checks import FLOAT32_MAX
from ..objectives import AGGREGATION_NUMBERS, KL_KINDS, KL_NUMBERS, RATIOS, TRUST_REGIONS, Objective
from ..reference import METRICS
from . import apply, define, is_differentiated, once_differentiable

# Of a batch, in the order of Batch.
TOKENS = (
    "Tensor? old_logprobs, Tensor advantages, Tensor? mask, Tensor? cu_seqlens, Tensor? ref_logprobs, "
    "Tensor? is_weights"
)

define(
    "policy_loss",
    f"(Tensor logprobs, Tensor? entropy, {TOKENS}, Tensor? denominator, Tensor loss_scale, "
    "int[] parts, float[] values, bool per_token) "
    "-> (Tensor loss, Tensor metrics, Tensor grad_logprobs, Tensor grad_entropy, Tensor grad_log_trace)",
    lambda logprobs, *args: _fake(logprobs, *args[-3:]),
)
define(
    "token_scale",
    "(Tensor logprobs, Tensor? mask, Tensor? cu_seqlens, Tensor? denominator, Tensor loss_scale, int aggregation, "
    "float length_norm) -> Tensor",
    lambda logprobs, *_: logprobs.new_empty(logprobs.shape),
)
define(
    "policy_loss_backward",
    "(Tensor grad_loss, Tensor grad_logprobs, Tensor grad_log_trace, Tensor logprobs, Tensor? old_logprobs, "
    "Tensor? mask, Tensor? cu_seqlens, int back, int ahead) -> Tensor",
    lambda grad_loss, *_: grad_loss.new_empty(grad_loss.shape),
)

_WHOLE_SEQUENCE = 1 << 62


def encode(objective: Objective) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """``parts``: ratio, positions back and ahead in its window, differentiate, trust region, KL, aggregation, what the
    ratio looks at and what the trust region does.

    The number of a weighted KL is higher by ``len(KL_KINDS)``. ``values``: coefficient and clamp of the KL, entropy
    coefficient, length_norm (0: the longest sequence), and then the fields of the trust region in their order. A bound
    that is None or infinite is the largest float32, which decoders take for infinity: AOTInductor cannot write
    an infinite number.
    """
    # the tracer of torch.compile, which runs this once, does not take the cache
    return _encode(objective) if torch.compiler.is_compiling() else _cached(objective)


def _encode(objective: Objective) -> tuple[tuple[int, ...], tuple[float, ...]]:
    ratio, region, kl = objective.ratio, objective.trust_region, objective.kl
    back, ahead = (
        _WHOLE_SEQUENCE if count == "all" else int(count)
        for count in (getattr(ratio, "back", 0), getattr(ratio, "ahead", 0))
    )
    parts = (
        RATIOS[type(ratio)],
        back,
        ahead,
        int(getattr(ratio, "differentiate", False)),
        TRUST_REGIONS[type(region)],
        KL_NUMBERS[None] if kl is None else KL_NUMBERS[kl.kind] + len(KL_KINDS) * bool(kl.weighted),
        AGGREGATION_NUMBERS[objective.aggregation],
        ratio.looks_at,
        region.looks_at,
    )
    values = (
        0.0 if kl is None else float(kl.coef),
        FLOAT32_MAX if kl is None else _number(kl.clamp),
        float(objective.entropy_coef),
        float(objective.length_norm or 0),
        # not vars(region): torch 2.10's compiler does not trace it
        *(_number(getattr(region, field.name)) for field in dataclasses.fields(region)),
    )
    return parts, values


_cached = functools.lru_cache(maxsize=256)(_encode)


def _number(field: float | str | None) -> float:
    if isinstance(field, str):
        return float(field == "product")
    return FLOAT32_MAX if field is None else float(min(field, FLOAT32_MAX))


def _fake(logprobs: Tensor, parts: list[int], values: list[float], per_token: bool) -> tuple[Tensor, ...]:
    shape, nothing = logprobs.shape, (0,)
    differentiated, entropy_coef = parts[3], values[2]
    return (
        logprobs.new_empty(shape if per_token else ()),
        logprobs.new_empty(len(METRICS)),
        logprobs.new_empty(shape),
        logprobs.new_empty(shape if entropy_coef != 0 else nothing),
        logprobs.new_empty(shape if per_token and differentiated else nothing),
    )


class _PolicyLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(backend: str, *inputs: Any) -> tuple[Tensor, ...]:
        return getattr(torch.ops.fusedpo.policy_loss, backend)(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.backend, logprobs, _, *batch, parts, _, per_token = inputs
        of = Batch(*batch)
        _, ctx.back, ctx.ahead, differentiated, *_ = parts
        ctx.through_traces, ctx.num_inputs = per_token and differentiated, len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logprobs, of.old_logprobs, of.mask, of.cu_seqlens, *output[2:])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> Any:
        gradients: list[Tensor | None] = [None] * ctx.num_inputs
        if grad_loss is None:
            return tuple(gradients)
        *tokens, grad_logprobs, grad_entropy, grad_log_trace = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            if ctx.through_traces:
                backward = getattr(torch.ops.fusedpo.policy_loss_backward, ctx.backend)
                gradient = backward(grad_loss, grad_logprobs, grad_log_trace, *tokens, ctx.back, ctx.ahead)
            else:
                gradient = grad_loss * grad_logprobs
            gradients[1] = once_differentiable("policy_loss", gradient, tokens[0], grad_loss)
        if ctx.needs_input_grad[2]:
            gradients[2] = once_differentiable("policy_loss", grad_loss * grad_entropy, tokens[0], grad_loss)
        return tuple(gradients)


def policy_loss(
    logprobs: Tensor, entropy: Tensor | None, batch: Batch, *, objective: Objective, per_token: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Loss and metrics by the kernels of ``backend``; all tensors as the schema has them."""
    inputs = (logprobs, entropy, *batch, *encode(objective), per_token)
    if is_differentiated(logprobs, entropy):
        loss, metrics, *_ = apply("policy_loss", _PolicyLoss, backend, *inputs)
    else:
        loss, metrics, *_ = getattr(torch.ops.fusedpo.policy_loss, backend)(*inputs)
    return loss, metrics


def token_scale(
    logprobs: Tensor, batch: Batch, *, encoded: tuple[Sequence[int], Sequence[float]], backend: str
) -> Tensor:
    """What the loss of each token is multiplied by, by the kernels of ``backend``; ``encoded``: see :func:`encode`."""
    parts, values = encoded
    return getattr(torch.ops.fusedpo.token_scale, backend)(
        logprobs, batch.mask, batch.cu_seqlens, batch.denominator, batch.loss_scale, parts[6], values[3]
    )
