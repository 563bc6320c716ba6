"""The KL divergence between two distributions over the vocabulary, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .logprobs import _compute_dtype, _drop


def exact_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    direction: str = "reverse",
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """``KL(p || q)`` of every row, ``KL(q || p)`` for ``direction="forward"``; ``p = softmax(logits / temperature)``.

    ``logits``: ``[..., V]``, ``ref_logits`` likewise, for ``q``, without gradient; ``temperature``: ``[...]`` or a
    number; ``mask``: ``[...]``, where 0 the result is 0. A column that has no probability adds nothing.
    """
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        temperature = _drop(temperature, mask, 1).unsqueeze(-1)
    logp, logq = (
        (_drop(x.to(_compute_dtype(x)), mask) / temperature).log_softmax(-1) for x in (logits, ref_logits.detach())
    )
    if direction == "forward":
        logp, logq = logq, logp
    difference = (logp - logq).masked_fill(logp == -torch.inf, 0)  # 0 * -inf is NaN, in the value and in the gradient
    return _drop((logp.exp() * difference).sum(-1), mask)
