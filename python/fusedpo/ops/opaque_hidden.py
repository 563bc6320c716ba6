"""The path from hidden states as operators that ``torch.compile`` takes whole: no side effects, and known shapes.

::

    linear_token_logprobs(*inputs, *options, return_entropy) -> logprobs, entropy, stats
    linear_token_logprobs_backward(grad_logprobs?, grad_entropy?, *inputs, stats, *options, needed)
        -> grad_hidden, grad_weight, grad_bias
    policy_loss_from_hidden(*inputs, *batch, *options, parts, values, needed)
        -> loss, metrics, logprobs, entropy, dropped, grad_hidden, grad_weight, grad_bias

* ``inputs``: ``hidden`` ``[*tokens, H]``, ``weight`` ``[V, H]``, ``bias?`` ``[V]``, ``token_ids`` int64,
  ``temperature`` float32 ``[]`` or ``[*tokens]``, and ``mask?`` ``[*tokens]``, bool: the tokens that are evaluated.
* ``options``: :class:`fusedpo.ops.hidden.Options`. ``batch`` as ``policy_loss`` takes it, with a mask that may keep
  more tokens.
* ``needed``: of which of hidden, weight and bias the gradient is wanted; that of another is ``[0]``.

Inside they are what runs in eager mode: rows that the mask leaves out cost nothing, though no shape depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._batch import Batch
from ..objectives import Objective
from ..reference import METRICS
from . import BACKENDS, LIBRARY, define, implement
from . import hidden as ops_hidden
from . import policy_loss as ops_policy_loss
from .hidden import Inputs, Options

_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor temperature, Tensor? mask"
_OPTIONS = "ScalarType dtype, float? softcap, float logit_scale, int? chunk_tokens, float? gradient_threshold"
_GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"
_NUM_INPUTS, _NUM_OPTIONS = len(Inputs._fields), len(Options._fields)


def _inputs(args: Sequence[Any]) -> Inputs:
    hidden, weight, bias, token_ids, temperature, mask = args[:_NUM_INPUTS]
    rows = ops_hidden.rows_where(mask, hidden.shape[:-1].numel(), hidden.device)
    return Inputs(hidden, weight, bias, token_ids, temperature, rows)


def _gradients_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(
        hidden.new_empty((0,)) if x is None or not wanted else x.new_empty(x.shape)
        for x, wanted in zip((hidden, weight, bias), needed, strict=True)
    )


def _given(gradients: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty((0,)) if x is None else x for x in gradients)


# ---------------------------------------------------------------------------------------------------------- log-probs


def _logprobs(backend: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, return_entropy = args
    return ops_hidden.logprobs_of(_inputs(given), Options(*given[_NUM_INPUTS:]), return_entropy, backend)


def _logprobs_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, *args: Any) -> Any:
    tokens = hidden.shape[:-1]
    like = partial(token_ids.new_empty, dtype=torch.float32)
    return (
        like(token_ids.shape),
        like(tokens if args[-1] else (0,)),
        like((math.prod(tokens), 3)),
    )  # numel() would fix a size that may vary


def _logprobs_backward(backend: str, *args: Any) -> tuple[Tensor, ...]:
    *upstream, stats = *args[:2], args[2 + _NUM_INPUTS]
    options, needed = Options(*args[3 + _NUM_INPUTS : -1]), args[-1]
    results, _ = ops_hidden.gradients_of_logprobs(upstream, _inputs(args[2:]), stats, options, needed, backend)
    return _given(results, args[2])


define(
    "linear_token_logprobs",
    f"({_INPUTS}, {_OPTIONS}, bool return_entropy) -> (Tensor logprobs, Tensor entropy, Tensor stats)",
    _logprobs_fake,
)
define(
    "linear_token_logprobs_backward",
    f"(Tensor? grad_logprobs, Tensor? grad_entropy, {_INPUTS}, Tensor stats, {_OPTIONS}, bool[] needed) "
    f"-> ({_GRADIENTS})",
    lambda _grad_logprobs, _grad_entropy, hidden, weight, bias, *args: _gradients_fake(hidden, weight, bias, args[-1]),
)


def _keep_for_logprobs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options, ctx.return_entropy = inputs[_NUM_INPUTS:-1], inputs[-1]
    _, entropy, stats = output
    ctx.mark_non_differentiable(stats, *(() if ctx.return_entropy else (entropy,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_NUM_INPUTS], stats)


def _backward_of_logprobs(
    backend: str, ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Any
) -> Any:
    none = (None,) * (_NUM_INPUTS - 3 + _NUM_OPTIONS + 1)
    if not ctx.return_entropy:
        grad_entropy = None
    if grad_logprobs is None and grad_entropy is None:
        return None, None, None, *none
    needed = list(ctx.needs_input_grad[:3])
    operator = getattr(torch.ops.fusedpo.linear_token_logprobs_backward, backend)
    results = operator(grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.options, needed)
    return *(x if wanted else None for x, wanted in zip(results, needed, strict=True)), *none


# --------------------------------------------------------------------------------------------------------------- loss


def _loss(backend: str, *args: Any) -> tuple[Tensor, ...]:
    *given, parts, values, needed = args
    batch, options = Batch(*given[_NUM_INPUTS:-_NUM_OPTIONS]), Options(*given[-_NUM_OPTIONS:])
    results, gradients = ops_hidden.loss_and_gradients(_inputs(given), batch, (parts, values), options, needed, backend)
    return *results, *_given(gradients, given[0])


def _loss_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, *args: Any) -> Any:
    like = partial(token_ids.new_empty, dtype=torch.float32)
    numbers = (like(()), like((len(METRICS),)), like(token_ids.shape), like(token_ids.shape), like(()))
    return *numbers, *_gradients_fake(hidden, weight, bias, args[-1])


define(
    "policy_loss_from_hidden",
    f"({_INPUTS}, {ops_policy_loss.TOKENS.replace('mask', 'kept')}, Tensor? denominator, Tensor loss_scale, "
    f"{_OPTIONS}, int[] parts, float[] values, bool[] needed) "
    f"-> (Tensor loss, Tensor metrics, Tensor logprobs, Tensor entropy, Tensor dropped, {_GRADIENTS})",
    _loss_fake,
)


def _keep_for_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.count = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[-3:])


def _backward_of_loss(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
    # A graph of the compiler may not overwrite what another has kept for it: the factor costs a copy.
    gradients = [
        x * grad_loss if wanted and grad_loss is not None else None
        for x, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    ]
    return *gradients, *(None,) * (ctx.count - 3)


implement("linear_token_logprobs", _logprobs)
implement("linear_token_logprobs_backward", _logprobs_backward)
implement("policy_loss_from_hidden", _loss)
for _backend in BACKENDS:
    torch.library.register_autograd(
        f"fusedpo::linear_token_logprobs.{_backend}",
        partial(_backward_of_logprobs, _backend),
        setup_context=_keep_for_logprobs,
        lib=LIBRARY,
    )
    torch.library.register_autograd(
        f"fusedpo::policy_loss_from_hidden.{_backend}", _backward_of_loss, setup_context=_keep_for_loss, lib=LIBRARY
    )


def linear_token_logprobs(
    inputs: Inputs, mask: Tensor | None, *, options: Options, return_entropy: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """As :func:`fusedpo.ops.hidden.linear_token_logprobs`, of the tokens that ``mask`` (bool) keeps."""
    tensors = ops_hidden._uncapped(inputs, options)[:-1]
    operator = getattr(torch.ops.fusedpo.linear_token_logprobs, backend)
    logprobs, entropy, _ = operator(*tensors, mask, *options, return_entropy)
    return logprobs, entropy


def policy_loss_from_hidden(
    inputs: Inputs, mask: Tensor | None, batch: Batch, *, objective: Objective, options: Options, backend: str
) -> tuple[Tensor, ...]:
    """As :func:`fusedpo.ops.hidden.policy_loss_from_hidden`, of the tokens that ``mask`` (bool) keeps."""
    tensors = ops_hidden._uncapped(inputs, options)[:-1]
    needed = [x is not None and x.requires_grad for x in tensors[:3]]
    operator = getattr(torch.ops.fusedpo.policy_loss_from_hidden, backend)
    return operator(*tensors, mask, *batch, *options, *ops_policy_loss.encode(objective), needed)[:5]
