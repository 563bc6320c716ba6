"""The losses where logits are split along the vocabulary, or sequences over ranks, or both."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .. import _checks
from .._batch import Batch
from .._batch import checked as check_batch
from ..logprobs import linear_token_logprobs, token_logprobs
from ..objectives import Objective
from ..reference import PolicyLossOutput
from . import context_loss, context_one_pass, shards
from . import hidden as of_hidden
from .context import ContextParallel


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    batch: Batch,
    objective: Objective,
    reduction: Literal["mean", "none"],
    cp: ContextParallel,
) -> PolicyLossOutput:
    """:func:`fusedpo.policy_loss` with ``cp``."""
    from ..losses import _check_entropy_and_reduction

    where = cp.tokens("logprobs", logprobs, batch.cu_seqlens)
    batch = context_loss.checked(batch, where, "logprobs", logprobs, objective)
    entropy = _checks.taken(entropy)[0]
    if entropy is not None:
        where.check("entropy", entropy)
    _check_entropy_and_reduction(entropy, reduction, objective, batch.denominator)
    return context_loss.policy_loss(logprobs, entropy, batch, where, objective, reduction)


def policy_loss_from_logits(
    logits: Tensor,
    token_ids: Tensor,
    batch: Batch,
    *,
    objective: Objective,
    temperature: float | Tensor,
    inplace: bool,
    split: dict[str, Any],
    cp: ContextParallel | None,
) -> PolicyLossOutput:
    """:func:`fusedpo.policy_loss_from_logits` where anything is split."""
    from ..losses import _check_token_ids

    rows: Tensor = logits
    if _checks.is_dtensor(logits):
        where = shards.placed("logits", logits, -1)
        token_ids, temperature = where.local("token_ids", token_ids), where.local("temperature", temperature)
        batch = local_batch(where, batch)
        rows = logits.to_local()  # type: ignore[attr-defined]
    _checks.floating("logits", rows)
    tokens = None
    if cp is None:
        batch = check_batch(tuple(batch), "logits", rows, objective, features=1)
    else:
        tokens = cp.tokens("logits", rows, batch.cu_seqlens, features=1)
        batch = context_loss.checked(batch, tokens, "logits", rows[..., :0].sum(-1), objective)
    token_ids, temperature = _checks.taken(token_ids, temperature)
    _check_token_ids(token_ids, "logits", rows)
    if tokens is not None and rows is logits:
        shard = shards.of_arguments("logits", rows.shape[-1], **split)
        is_whole = shard.group is None and shard.valid == shard.width
        backend = context_one_pass.backend_for(rows, batch, tokens, objective) if is_whole else None
        if backend is not None:
            return context_one_pass.policy_loss_from_logits(
                *(rows, token_ids, temperature, batch, tokens), objective=objective, inplace=inplace, backend=backend
            )
    logprobs, entropy = token_logprobs(
        logits,
        token_ids,
        temperature=temperature,
        mask=batch.mask,
        return_entropy=True,
        inplace_backward=inplace,
        **split,
    )
    return of_logprobs(logprobs, entropy, batch, tokens, objective)


def policy_loss_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    batch: Batch,
    *,
    objective: Objective,
    head: dict[str, Any],
    temperature: float | Tensor,
    num_live: int | None,
    skip_zero_advantages: bool,
    split: dict[str, Any],
    cp: ContextParallel | None,
) -> PolicyLossOutput:
    """:func:`fusedpo.policy_loss_from_hidden` where anything is split."""
    from ..losses import _evaluated, _of_evaluated

    if _checks.is_dtensor(hidden):
        where = of_hidden.rows_of(hidden, weight)
        token_ids, temperature = where.local("token_ids", token_ids), where.local("temperature", temperature)
        batch = local_batch(where, batch)
    token_ids, temperature, num_live = _checks.taken(token_ids, temperature, num_live)
    _checks.integer("token_ids", token_ids)
    # stands for hidden states, which may hold a part of the rows
    rows = torch.zeros((), dtype=hidden.dtype, device=token_ids.device).expand(token_ids.shape)
    tokens = None
    if cp is None:
        batch = check_batch(tuple(batch), "hidden", rows, objective)
    else:
        if skip_zero_advantages:
            raise ValueError("skip_zero_advantages must be False with cp: which tokens matter, other ranks say, too")
        tokens = cp.tokens("token_ids", token_ids, batch.cu_seqlens)
        batch = context_loss.checked(batch, tokens, "hidden", rows, objective)
    evaluated, num_live = _evaluated(token_ids, batch, objective, num_live, skip_zero_advantages)
    is_split = any(x is not None for x in split.values()) or _checks.is_dtensor(weight)
    function: Any = of_hidden.linear_token_logprobs if is_split else linear_token_logprobs
    given = {**head, **split, "num_live": num_live} if is_split else head
    logprobs, entropy = function(
        hidden, weight, token_ids, temperature=temperature, mask=evaluated, return_entropy=True, **given
    )
    return _of_evaluated(of_logprobs(logprobs, entropy, batch, tokens, objective), batch, evaluated, objective)


def local_batch(where: shards.Placed, batch: Batch) -> Batch:
    """Of the rows of this rank: DTensors that are placed like the rows are unwrapped."""
    return Batch(*(where.local(name, x) for name, x in batch._asdict().items()))


def of_logprobs(logprobs: Tensor, entropy: Tensor, batch: Batch, tokens: Any, objective: Objective) -> PolicyLossOutput:
    """The loss of these log-probs; ``tokens`` say how sequences are split, if they are."""
    from ..losses import _policy_loss

    if tokens is None:
        return _policy_loss(logprobs, entropy, batch, objective)
    return context_loss.policy_loss(logprobs, entropy, batch, tokens, objective)
