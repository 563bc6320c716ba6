"""Statistics of each row of logits beside log-prob and entropy, without gradient: for metrics, weights, baselines."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, ops
from .logprobs import _check_values, check_token_logprobs

__all__ = ["TokenStatistics", "token_statistics"]

NAMES = ("log_sum_sq_probs", "mean_logits", "is_top1")


class TokenStatistics(NamedTuple):
    """All ``[...]``, without gradient, 0 (False) at masked rows.

    ``log_sum_sq_probs``: ``log sum_v p_v^2``, whose exponential ``advantages.optimal_token_baseline`` takes and from
    which WPO's weights are made. ``mean_logits``: the mean of ``logits / temperature`` over the vocabulary.
    ``is_top1``: whether the token is the likeliest one, the first of several.
    """

    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor


@torch.no_grad()
def token_statistics(
    logits: Tensor, token_ids: Tensor, *, temperature: float | Tensor = 1.0, mask: Tensor | None = None
) -> TokenStatistics:
    """What trainers log or weigh by, of each row of ``softmax(logits / temperature)``.

    Args, and what is raised: as :func:`fusedpo.token_logprobs`, with one token per row. Float32, float64 for float64
    ``logits``. Each of the three reads the logits once more.
    """
    check_token_logprobs(logits, token_ids, temperature, mask)
    if token_ids.shape != logits.shape[:-1]:
        raise ValueError(f"token_ids must have shape {list(logits.shape[:-1])}, got {list(token_ids.shape)}")
    backend = backends.choose("token_logprobs", logits.device.type, logits.dtype)
    _check_values(token_ids, logits.shape[-1], temperature, mask)
    ids = token_ids.to(torch.int64)
    if backend == "reference":
        dtype = torch.promote_types(logits.dtype, torch.float32)
        t = temperature[..., None] if isinstance(temperature, Tensor) and temperature.dim() > 0 else temperature
        z = logits.to(dtype) / t
        found = {
            "log_sum_sq_probs": (2 * z.log_softmax(-1)).logsumexp(-1),
            "mean_logits": z.mean(-1),
            "is_top1": logits.argmax(-1) == ids,
        }
    else:
        if logits.stride(-1) != 1 and logits.shape[-1] > 1:
            logits = logits.contiguous()
        t = ops.as_scalar(temperature, logits.device)
        kept = None if mask is None else mask != 0
        _, _, stats = getattr(torch.ops.fusedpo.token_logprobs, backend)(logits, ids, t, kept, False)
        found = of_rows(logits, ids, t, stats, NAMES, backend, kept)
    if mask is not None:
        found = {name: x.masked_fill(mask == 0, 0) for name, x in found.items()}
    return TokenStatistics(**found)


def of_rows(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    stats: Tensor,
    names: Collection[str],
    backend: str,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """The statistics called ``names``, where the kernels of ``backend`` have reduced the rows to ``stats``.

    ``log sum p^2`` is the log-sum-exp at half the temperature less twice that at the whole one; both are kept relative
    to a logit, close to the maximum, whose own term does not enter the difference where it is the same.
    """
    found = {}
    if "log_sum_sq_probs" in names:
        _, _, squares = getattr(torch.ops.fusedpo.token_logprobs, backend)(
            logits, token_ids, temperature / 2, mask, False
        )
        moved = (squares[..., 0] - stats[..., 0]) * 2 / temperature
        found["log_sum_sq_probs"] = moved + torch.log1p(squares[..., 1]) - 2 * torch.log1p(stats[..., 1])
    if "mean_logits" in names:
        found["mean_logits"] = logits.mean(-1, dtype=torch.float32) / temperature
    if "is_top1" in names:
        found["is_top1"] = logits.argmax(-1) == token_ids
    return found
