"""Statistics of each row of logits in the same pass as log-prob and entropy: for metrics, weights, baselines."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, backends, reference
from ._batch import as_bool
from .logprobs import (
    _check_values,
    as_kernels_take_them,
    check_linear_token_logprobs,
    check_token_logprobs,
    chunk_of_reference,
    head_options,
    ids_and_temperature,
    taken_if_differentiated,
)
from .ops import hidden as ops_hidden
from .ops import token_statistics as ops_statistics

__all__ = ["TokenStatistics", "linear_token_statistics", "token_statistics"]


class TokenStatistics(NamedTuple):
    """All ``[...]``, 0 (False) at masked rows; float32, float64 for float64 input.

    ``logprobs`` and ``entropy`` as :func:`fusedpo.token_logprobs` gives them, differentiable, once. The others have no
    gradient. ``log_sum_sq_probs``: ``log sum_v p_v^2``, from which the optimal token baseline and WPO's weights are
    made. ``mean_logits``: the mean of ``logits / temperature`` over the vocabulary. ``is_top1``: whether the token is
    the likeliest one, the first of several; False where its log-prob is NaN.
    """

    logprobs: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor


@_checks.of_whole_vocabulary(
    "token_logprobs(..., tp_group=tp_group, return_entropy=True) has log-probs and entropy of a split vocabulary; "
    "for the other statistics gather the logits"
)
def token_statistics(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> TokenStatistics:
    """Log-prob, entropy, and what trainers log or weigh by, of each row of ``softmax(logits / temperature)``.

    The logits are read once, as for :func:`fusedpo.token_logprobs`, whose arguments these are, with one token per row;
    what is raised, too.
    """
    token_ids, temperature, mask = _checks.taken(token_ids, temperature, mask)
    check_token_logprobs(logits, token_ids, temperature, mask)
    _one_per_row(token_ids, logits.shape[:-1])
    backend = backends.choose("token_statistics", logits.device.type, logits.dtype)
    if backend == "reference":
        _check_values(token_ids, logits.shape[-1], temperature, mask)
        return TokenStatistics(*reference.token_statistics(logits, token_ids, temperature=temperature, mask=mask))
    inputs = as_kernels_take_them(logits, token_ids, temperature)
    return TokenStatistics(*ops_statistics.token_statistics(*inputs, as_bool(mask), inplace_backward, backend))


@_checks.of_whole_vocabulary(
    "linear_token_logprobs(..., tp_group=tp_group, return_entropy=True) has log-probs and entropy of a split head; "
    "for the other statistics gather the weight"
)
def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> TokenStatistics:
    """:func:`token_statistics` of the logits ``hidden @ weight.T``, of which one chunk is in memory at a time.

    Arguments, and what is raised, as of :func:`fusedpo.linear_token_logprobs`, with one token per row; no product more.
    (The reference and ``torch.compile`` compute the logits once more.) Differentiable with respect to ``hidden``,
    ``weight`` and ``bias``, once.
    """
    token_ids, temperature, mask, softcap, logit_scale, chunk_tokens = _checks.taken(
        token_ids, temperature, mask, softcap, logit_scale, chunk_tokens
    )
    options = head_options(hidden, softcap, logit_scale, chunk_tokens)
    check_linear_token_logprobs(hidden, weight, bias, token_ids, temperature=temperature, mask=mask)
    _one_per_row(token_ids, hidden.shape[:-1])
    hidden, weight, bias = taken_if_differentiated(hidden, weight, bias)
    return TokenStatistics(*_linear(hidden, weight, bias, token_ids, temperature, mask, options))


def _linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    options: ops_hidden.Options,
    function: type[ops_statistics.LinearTokenStatistics] = ops_statistics.LinearTokenStatistics,
) -> tuple[Tensor, ...]:
    backend = ops_hidden.choose(hidden, options.dtype)
    if backend == "reference":
        return reference.linear_token_statistics(
            hidden,
            weight,
            token_ids,
            bias=bias,
            softcap=options.softcap,
            logit_scale=options.logit_scale,
            temperature=temperature,
            mask=mask,
            chunk_tokens=chunk_of_reference(hidden, weight, options),
        )
    rows = ops_hidden.rows_where(as_bool(mask), hidden.shape[:-1].numel(), hidden.device)
    return ops_statistics.linear_token_statistics(
        ops_hidden.Inputs(hidden, weight, bias, *ids_and_temperature(token_ids, temperature), rows),
        options=options,
        backend=backend,
        function=function,
    )


def _one_per_row(token_ids: Tensor, rows: torch.Size) -> None:
    if token_ids.shape != rows:
        raise ValueError(f"token_ids must have shape {list(rows)}, one per row, got {list(token_ids.shape)}")
