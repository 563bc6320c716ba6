"""The operator ``torch.ops.fusedpo.one_pass``: from logits to the gradient of the loss, each row read and written once.

::

    one_pass(
        logits, out, logprobs, entropy, rows?, token_ids, temperature, *batch.tokens, scale, parts, values, denominator?
    )

* ``logits`` ``[*tokens, V]``, float16, bfloat16 or float32, unit stride along V; ``tokens`` is ``[B, T]`` or ``[T]``:
  padded sequences, or one; with ``cu_seqlens`` ``[S + 1]`` (int64) packed ``[T]`` or ``[1, T]``. Their gradient is
  written into ``out``, which may be the logits.
* ``logprobs`` and ``entropy``, float32 ``[*tokens]``, are written at every row that is evaluated; by Triton, 0 at
  the others, and anything at masked ``rows``.
* ``rows`` None: every token that ``mask`` (bool) keeps is evaluated, and the gradient of the others is zero. Otherwise
  ``logits`` is ``[R, V]`` and its row r belongs to the token ``rows[r]`` (int64, ascending positions among the
  flattened tokens), of which, too, those are evaluated that ``mask`` keeps; kept tokens that are not in ``rows`` and
  that a window reaches have their log-probs in ``logprobs`` already.
* ``token_ids`` int64; ``temperature`` ``[]`` or ``[*tokens]``; ``advantages`` and ``is_weights`` ``[*tokens]`` or
  ``[num_sequences, 1]``; ``old_logprobs`` (None: the log-probs themselves) and ``ref_logprobs`` ``[*tokens]``; float32.
* ``scale`` ``[*tokens]`` float32: what the loss of each token is multiplied by. For Triton it may be 0-d, if the
  aggregation is ``token-sum``, or ``token-mean``, which divides it by the 0-d ``denominator`` (None: the number of kept
  tokens; then ``rows`` are not given).
* ``parts`` and ``values``: the objective (:func:`fusedpo.ops.policy_loss.encode`), of which :func:`is_possible` holds.

``scale_`` multiplies a stored gradient by a 0-d factor, which it
reads on the device: a factor of 1 costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, objectives
from .._batch import Batch
from ..objectives import Objective
from . import apply, are_batched, define, edge_to, may_overlap, once_differentiable
from . import policy_loss as ops_policy_loss

define(
    "one_pass",
    "(Tensor logits, Tensor(a!) out, Tensor(b!) logprobs, Tensor(c!) entropy, Tensor? rows, Tensor token_ids, "
    f"Tensor temperature, {ops_policy_loss.TOKENS}, Tensor scale, int[] parts, float[] values, "
    "Tensor? denominator=None) -> ()",
    lambda *_: None,
)
define("scale_", "(Tensor(a!) gradient, Tensor factor) -> ()", lambda *_: None)

# A longer window is cheaper in two passes: the rows that a worker reads beyond its own would outweigh what it saves.
MAX_AHEAD = 256


def is_possible(objective: Objective) -> bool:
    """Whether the coefficient of a token depends on nothing but the log-probs of itself and of tokens after it.

    What looks at the tokens before it, or at all tokens of the sequence, takes two passes.
    """
    ratio = objective.ratio
    _, ahead = objectives.reach(ratio)
    return (
        objective.trust_region.looks_at == objectives.TOKEN
        and ratio.looks_at in (objectives.TOKEN, objectives.AHEAD)
        and ahead != "all"
        and ahead <= MAX_AHEAD
    )


class GradientsWithLoss(torch.autograd.Function):
    """The gradients are computed with the loss, the first result; the backward scales what :func:`keep` was given.

    It overwrites them: a second backward raises. Old-style: what goes through functorch takes two passes.
    """

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> Any:
        inputs = len(ctx.needs_input_grad)
        if grad_loss is None:
            return (None,) * inputs
        if ctx.taken:
            gradients, them = ("gradient was", "it") if len(ctx.sources) == 1 else ("gradients were", "them")
            raise RuntimeError(
                f"{ctx.name}: the {gradients} computed with the loss and the first backward has taken {them}; a second "
                "one needs a second call"
            )
        ctx.taken = True
        saved = [None if x is None else _scaled(x.detach(), grad_loss, ctx.backend) for x in ctx.saved_tensors]
        results = [None if x is None else once_differentiable(ctx.name, x, *ctx.sources, grad_loss) for x in saved]
        return *results, *(None,) * (inputs - len(results))


def keep(ctx: Any, name: str, backend: str | None, gradients: Sequence[Tensor | None], *sources: Tensor | None) -> None:
    """For :class:`GradientsWithLoss`: the gradients of the first inputs, the ``sources``. ``name`` is for errors."""
    ctx.name, ctx.backend, ctx.taken, ctx.sources = name, backend, False, [edge_to(x) for x in sources]
    ctx.save_for_backward(*gradients)
    ctx.set_materialize_grads(False)


def _scaled(gradient: Tensor, factor: Tensor, backend: str | None) -> Tensor:
    if are_batched(factor):
        return gradient * factor
    if backend is None:
        backend = backends.kernel_for("one_pass", gradient.device.type, gradient.dtype)
    if backend is None:
        return gradient.mul_(factor)
    getattr(torch.ops.fusedpo.scale_, backend)(gradient, factor.detach().float())  # does nothing for a factor of 1
    return gradient


class _OnePass(GradientsWithLoss):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        token_ids: Tensor,
        temperature: Tensor,
        batch: Batch,
        objective: Objective,
        inplace: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        allocate = logits.new_empty if backend == "triton" else logits.new_zeros  # Triton writes all tokens
        logprobs, entropy = allocate((2, *token_ids.shape), dtype=torch.float32).unbind()
        encoded = ops_policy_loss.encode(objective)
        if backend == "triton" and objective.aggregation in ("token-mean", "token-sum"):
            scale, denominator = batch.loss_scale, batch.denominator
        else:
            scale = ops_policy_loss.token_scale(logprobs, batch, encoded=encoded, backend=backend)
            denominator = None
        gradient = logits if inplace else logits.new_empty(logits.shape)
        getattr(torch.ops.fusedpo.one_pass, backend)(
            *(logits, gradient, logprobs, entropy, None, token_ids, temperature),
            *(*batch.tokens, scale, *encoded, denominator),
        )
        if inplace:
            torch.autograd.graph.increment_version(logits)
        loss, metrics = ops_policy_loss.policy_loss(
            logprobs, entropy, batch, objective=objective, per_token=False, backend=backend
        )
        keep(ctx, "policy_loss_from_logits", backend, [gradient], logits)
        ctx.mark_non_differentiable(metrics, logprobs, entropy)
        return loss, metrics, logprobs, entropy


def policy_loss_from_logits(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    batch: Batch,
    *,
    objective: Objective,
    inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics, log-probs and entropy by the kernels of ``backend``; the gradient is computed on the way."""
    inplace = inplace and not may_overlap(logits)
    return apply(
        "policy_loss_from_logits", _OnePass, logits, token_ids, temperature, batch, objective, inplace, backend
    )
