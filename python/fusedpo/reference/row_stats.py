"""Token log-probs where each rank holds some columns of the logits, in plain PyTorch.

A rank reduces its columns of a row to ``(reference, rest, weighted)``: with ``e_j = exp((x_j - reference) / T)`` for
the largest logit as the reference, ``1 + rest`` is the sum of the ``e_j``, the 1 being that of the reference, and
``weighted`` the sum of ``e_j (x_j - reference) / T``. Columns that are all -inf, or none, have ``reference`` 0 and
``rest`` -1. The triples of all ranks merge into that of the row; nothing is lost beside a dominant logit on the way.
Arithmetic is float32, or float64 where the logits are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .logprobs import _compute_dtype, _drop

HEADER = 3
"""Numbers of a header: the first column, how many there are, and the size of the vocabulary, 0 if none was named."""


def row_stats(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    vocab_start: int,
    width: int,
    vocab_size: int,
    return_entropy: bool,
) -> Tensor:
    """What a rank sends, ``[1 + R, 3 + K]``: a header, then of each row its triple and the logits of K tokens.

    ``logits`` ``[..., V]`` are the valid ones of the ``width`` columns from ``vocab_start`` on. The logit of a token of
    other columns is -inf. Without ``return_entropy``, ``weighted`` is left out: ``[1 + R, 2 + K]``. Rows that ``mask``
    leaves out are 0.
    """
    rows, size = logits.shape[:-1], logits.shape[-1]
    count = rows.numel()
    x = _drop(logits, mask).to(_compute_dtype(logits)).reshape(count, size)
    t = temperature if temperature.dim() == 0 else _drop(temperature, mask, 1).reshape(count, 1)
    top = torch.cat((x, x.new_full((count, 1), -torch.inf)), 1).amax(1, keepdim=True)
    first = torch.arange(size, device=x.device) == torch.cat((x, top), 1).eq(top).to(torch.int8).argmax(1, keepdim=True)
    reference = top.masked_fill(top == -torch.inf, 0)
    scaled = (x - reference) / t.to(x.dtype)
    terms = scaled.exp()
    rest = torch.where(top == -torch.inf, -1, terms.masked_fill(first & terms.isfinite(), 0).sum(1, keepdim=True))
    weighted = (terms * scaled.masked_fill(scaled == -torch.inf, 0)).sum(1, keepdim=True)
    ids = token_ids.reshape(count, -1) - vocab_start if count else token_ids.new_zeros(0, _ids_per_row(rows, token_ids))
    found = (ids >= 0) & (ids < size)
    padded = torch.cat((x, x.new_zeros(count, 1)), 1)
    chosen = padded.gather(1, ids.where(found, size)).masked_fill(~found, -torch.inf)
    triple = (reference, rest, weighted) if return_entropy else (reference, rest)
    parts = torch.cat((*triple, chosen), 1)
    if mask is not None:
        parts = parts.masked_fill(mask.reshape(-1, 1) == 0, 0)
    header = parts.new_zeros(1, parts.shape[1])
    header[0, :HEADER] = parts.new_tensor([vocab_start, width, vocab_size])
    return torch.cat((header, parts))


def merge_row_stats(
    parts: Tensor, temperature: Tensor, mask: Tensor | None, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``parts`` ``[P, 1 + R, 3 + K]``, by rank, to log-probs ``[R, K]``, entropy ``[R]``, stats ``[R, 3]``.

    ``temperature``: ``[]`` or ``[R]``. ``stats`` are the merged triples. With ``M`` the largest reference of the ranks
    that have some finite column, ``f`` the first of them that has it, and ``d_r = (reference_r - M) / T``::

        rest     = sum_r (rest_r if r == f else (1 + rest_r) exp(d_r))
        weighted = sum_r exp(d_r) (weighted_r + (1 + rest_r) d_r)
        log p    = (max_r logit_r - M) / T - log1p(rest),   entropy = log1p(rest) - weighted / (1 + rest)

    Where headers contradict each other, all is NaN.
    """
    agree = headers_agree(parts)
    of_rows = parts[:, 1:]
    ranks, count = of_rows.shape[:2]
    t = temperature.to(parts.dtype)
    triple = 3 if return_entropy else 2
    reference, rest = of_rows[..., 0], of_rows[..., 1]
    some = rest != -1
    top = reference.masked_fill(~some, -torch.inf).amax(0)
    first = some & (reference == top)
    first = first & (first.to(torch.int8).cumsum(0) == 1)
    nothing = ~some.any(0)
    top = top.masked_fill(nothing, 0)
    distance = ((reference - top) / t).masked_fill(~some, 0)
    factor = distance.exp()
    total, weighted = torch.zeros_like(top), torch.zeros_like(top)
    for r in range(ranks):  # one order of summation, whoever sums
        others = ((1 + rest[r]) * factor[r]).masked_fill(~some[r], 0)
        total = total + torch.where(first[r], rest[r], others)
        if return_entropy:
            moved = factor[r] * (of_rows[r, :, 2] + (1 + rest[r]) * distance[r])
            weighted = weighted + moved.masked_fill(~some[r], 0)
    total = total.masked_fill(nothing, -1)
    log_sum = torch.log1p(total)
    chosen = of_rows[..., triple:].amax(0)
    logprobs = (chosen - top[:, None]) / (t if t.dim() == 0 else t[:, None]) - log_sum[:, None]
    entropy = log_sum - weighted / (1 + total) if return_entropy else logprobs.new_zeros(0)
    stats = torch.stack((top, total, weighted), 1)
    results = [x.masked_fill(~agree, torch.nan) for x in (logprobs, entropy, stats)]
    if mask is not None:
        left_out = mask.reshape(-1) == 0
        results = [x if x.shape[0] != count else _drop(x, ~left_out) for x in results]
    return results[0], results[1], results[2]


def headers_agree(parts: Tensor) -> Tensor:
    """0-d bool: columns follow each other from 0 on, and all ranks name one vocabulary that is not larger."""
    start, width, size = parts[:, 0, :HEADER].unbind(1)
    ends = start + width
    return (start[0] == 0) & (start[1:] == ends[:-1]).all() & (size == size[0]).all() & (size[0] <= ends[-1])


def token_logprobs_backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    vocab_start: int,
) -> Tensor:
    """The gradient of the columns ``logits`` ``[..., V]`` from ``vocab_start`` on, given the merged ``stats``.

    With ``p_j = exp((x_j - reference) / T) / (1 + rest)``, G the sum of ``grad_logprobs`` over all tokens of the row,
    those of other columns too, E ``grad_entropy`` and H the entropy::

        grad x_j = (grad_logprobs at j - G p_j - E p_j (log p_j + H)) / T
    """
    rows, size = logits.shape[:-1], logits.shape[-1]
    count = rows.numel()
    x = _drop(logits, mask).to(_compute_dtype(logits)).reshape(count, size)
    t = temperature.to(x.dtype)
    t = t if t.dim() == 0 else _drop(t, mask, 1).reshape(count, 1)
    reference, rest, weighted = stats.to(x.dtype).reshape(count, 3, 1).unbind(1)
    rest = rest.where(rest > -1, torch.nan)
    log_p = (x - reference) / t - torch.log1p(rest)
    p = log_p.exp()
    gradient = torch.zeros_like(x)
    if grad_logprobs is not None:
        g = grad_logprobs.to(x.dtype).reshape(count, -1) if count else x.new_zeros(0, 1)
        ids = token_ids.reshape(count, -1) - vocab_start if count else token_ids.new_zeros(0, 1)
        found = (ids >= 0) & (ids < size)
        here = x.new_zeros(count, size + 1).scatter_add(1, ids.where(found, size), g)[:, :size]
        total = g.sum(1, keepdim=True)
        gradient = torch.where(here == 0, -total * p, (here - total) - total * torch.expm1(log_p))
    if grad_entropy is not None:
        entropy = torch.log1p(rest) - weighted / (1 + rest)
        slope = (p * (log_p.masked_fill(log_p == -torch.inf, 0) + entropy)).where(p != 0, 0)
        gradient = gradient - grad_entropy.to(x.dtype).reshape(count, 1) * slope
    gradient = (gradient / t).reshape(*rows, size)
    return _drop(gradient, mask).to(logits.dtype)


def _ids_per_row(rows: torch.Size, token_ids: Tensor) -> int:
    return token_ids.shape[-1] if token_ids.dim() > len(rows) else 1
