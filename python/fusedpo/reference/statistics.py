"""Statistics of each row of logits beside log-prob and entropy, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .logprobs import _compute_dtype, _drop, linear_logits, linear_token_logprobs, token_logprobs


def token_statistics(
    logits: Tensor, token_ids: Tensor, *, temperature: float | Tensor = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Log-probs and entropy as :func:`token_logprobs`, differentiable, and three numbers of each row, which are not.

    ``log sum_v p_v^2``; the mean of ``logits / temperature``; whether the token is the first of the likeliest, False
    where its log-prob is NaN. ``token_ids``: ``[...]``.
    """
    results = token_logprobs(logits, token_ids, temperature=temperature, mask=mask, return_entropy=True)
    assert isinstance(results, tuple)
    return *results, *_others(logits.detach(), token_ids, results[0].detach(), temperature, mask)


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
) -> tuple[Tensor, ...]:
    """:func:`token_statistics` of the logits of :func:`linear_token_logprobs`."""
    options: dict[str, Any] = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale}
    results = linear_token_logprobs(
        hidden,
        weight,
        token_ids,
        temperature=temperature,
        mask=mask,
        return_entropy=True,
        chunk_tokens=chunk_tokens,
        **options,
    )
    leading = hidden.shape[:-1]
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(leading)
    of_rows = (hidden, token_ids, results[0], temperature, mask)
    flat: list[Any] = [x.reshape(-1, *x.shape[len(leading) :]) if isinstance(x, Tensor) else x for x in of_rows]
    step = max(1, leading.numel() if chunk_tokens is None else chunk_tokens)
    parts = []
    for first in range(0, max(1, leading.numel()), step):
        states, ids, logprobs, t, kept = (x[first : first + step] if isinstance(x, Tensor) else x for x in flat)
        with torch.no_grad():
            logits = linear_logits(_drop(states, kept), weight, **options)
        parts.append(_others(logits, ids, logprobs, t, kept))
    return *results, *(torch.cat(x).reshape(leading) for x in zip(*parts, strict=True))


@torch.no_grad()
def _others(
    logits: Tensor, token_ids: Tensor, logprobs: Tensor, temperature: float | Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    x = _drop(logits, mask).to(_compute_dtype(logits))
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        temperature = _drop(temperature, mask, 1).to(x.dtype).unsqueeze(-1)
    z = x / temperature
    squares = (2 * z.log_softmax(-1)).logsumexp(-1)
    is_top1 = (x.argmax(-1) == token_ids) & ~logprobs.isnan()
    return _drop(squares, mask), _drop(z.mean(-1), mask), _drop(is_top1, mask)
