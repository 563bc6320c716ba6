"""Loss and gradient under context parallelism from one pass over the logits of this rank.

What the gradient of a token takes from other ranks is known before its row is read: what its loss is multiplied by and,
where a window reaches tokens of theirs, the log-probs of these, whose rows are read once more for that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks, backends, objectives, ops
from .._batch import Batch, as_bool
from ..logprobs import as_kernels_take_them, check_temperature, checked_token_logprobs
from ..objectives import Objective
from ..ops import one_pass as ops_one_pass
from ..ops import policy_loss as ops_policy_loss
from ..reference import PolicyLossOutput
from ..reference.layout import layout
from . import context_loss
from .context import Tokens

# One row in so many may be read twice: a second pass reads all of them.
ROWS_PER_ROW_READ_TWICE = 4


def backend_for(logits: Tensor, batch: Batch, where: Tokens, objective: Objective) -> str | None:
    """Who computes the gradient with the loss; None: two passes. Shapes and arguments decide, so ranks agree."""
    from ..losses import _one_pass_backend

    if not ops.require_grad(logits) or ops.must_be_functional():
        return None
    backend = _one_pass_backend(logits.device, (logits.dtype,), batch, objective)
    if backend is None or backends.takes_two_passes(logits, backend):
        return None
    ahead, stretches = _ahead(objective), where.stretches(batch.cu_seqlens)
    if ahead > 0 and (stretches is None or ROWS_PER_ROW_READ_TWICE * stretches * ahead > where.shape.numel()):
        return None
    return backend


def _ahead(objective: Objective) -> int:
    _, ahead = objectives.reach(objective.ratio)
    assert ahead != "all"
    return ahead


def policy_loss_from_logits(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor,
    batch: Batch,
    where: Tokens,
    *,
    objective: Objective,
    inplace: bool,
    backend: str,
) -> PolicyLossOutput:
    """This rank's share, whose gradient is there already, and the metrics of all ranks."""
    _checks.same_device("token_ids", token_ids, "logits", logits)
    check_temperature(temperature, where.shape, "logits", logits)
    ahead, mask = _ahead(objective), as_bool(batch.mask)
    logits, token_ids, temperature = as_kernels_take_them(logits, token_ids, temperature)
    inplace = inplace and not ops.may_overlap(logits)
    source, known = logits.detach(), None
    if ahead > 0:
        looked_at = where.looked_at_by_others(ahead, batch.cu_seqlens)
        looked_at = looked_at if mask is None else looked_at & mask
        known, _ = checked_token_logprobs(source, token_ids, temperature, looked_at, False, False)
    (known,), whole = context_loss.gathered(batch, where, known)

    logprobs = source.new_zeros(where.whole, dtype=torch.float32) if known is None else known
    encoded, taken = ops_policy_loss.encode(objective), whole.as_kernels_take_it(logprobs)
    scale = ops_policy_loss.token_scale(logprobs, taken, encoded=encoded, backend=backend)
    entropy = torch.zeros_like(logprobs)
    per_token: tuple[Tensor | None, ...] = taken.tokens
    rows = None
    if ahead > 0:  # of all tokens, those of this rank
        rows, source = where.flat_positions(), source.flatten(0, -2)
        token_ids = where.spread(token_ids, 0)
        temperature = temperature if temperature.dim() == 0 else where.spread(temperature, 1)
    else:
        of = layout(logprobs, taken.cu_seqlens)
        per_token = tuple(
            None if x is None else where.own(of.per_token(x)) for x in taken._replace(cu_seqlens=None).tokens
        )
        logprobs, entropy, scale = where.own(logprobs), where.own(entropy), where.own(scale)
    gradient = source if inplace else source.new_empty(source.shape)
    getattr(torch.ops.fusedpo.one_pass, backend)(
        *(source, gradient, logprobs, entropy, rows, token_ids, temperature), *(*per_token, scale, *encoded, None)
    )
    if inplace:
        torch.autograd.graph.increment_version(logits)
    if ahead > 0:
        logprobs, entropy = where.own(logprobs), where.own(entropy)
    if mask is not None:
        logprobs, entropy = logprobs.where(mask, 0), entropy.where(mask, 0)

    share, metrics = context_loss.share_and_metrics(logprobs, entropy, whole, where, objective)
    loss = ops.apply("policy_loss_from_logits", _OnePass, logits, gradient.view(logits.shape), share, backend)
    return PolicyLossOutput(loss, metrics, logprobs, entropy)


class _OnePass(ops_one_pass.GradientsWithLoss):
    """``loss``, whose gradient with respect to the logits was computed beside it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gradient: Tensor, loss: Tensor, backend: str) -> Tensor:
        ops_one_pass.keep(ctx, "policy_loss_from_logits", backend, [gradient], logits)
        return loss.clone()
