"""Log-probabilities of tokens, and the entropy they were drawn with, in plain PyTorch.

Arithmetic is float32, or float64 where the input is float64. Autograd differentiates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .layout import layout


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``log_softmax(logits / temperature)`` at ``token_ids``, in nats, and the entropy of each row.

    ``logits``: ``[..., V]``. ``token_ids``: ``[...]``, or ``[..., K]`` for K tokens of each row; the log-probs have its
    shape. ``temperature``: one for all rows, or ``[...]``. ``mask``: ``[...]``, 0 where a row is left out: its results
    are 0 and nothing of it is read. Differentiable in ``logits``.

    A logit of -inf has probability 0 and adds 0 to the entropy. NaN and +inf propagate through their row; a row that is
    -inf everywhere gives NaN.
    """
    x = _drop(logits, mask).to(_compute_dtype(logits))
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        temperature = _drop(temperature, mask, 1).to(x.dtype).unsqueeze(-1)
    logp = torch.log_softmax(x / temperature, dim=-1)
    ids = _drop(token_ids, mask).to(torch.int64)
    index = ids if ids.dim() == x.dim() else ids.unsqueeze(-1)
    chosen = _drop(logp.gather(-1, index).reshape(ids.shape), mask)
    if not return_entropy:
        return chosen
    # 0 * -inf is NaN, in the value and in the gradient
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)
    return chosen, _drop(entropy, mask)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    chunk_tokens: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`token_logprobs` of ``softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)``.

    ``hidden``: ``[..., H]``, ``weight``: ``[V, H]``, ``bias``: ``[V]``. The product is in the dtype of ``hidden`` and
    ``weight``, what follows in float32. Scale before cap before temperature, as in TRL. ``chunk_tokens``: rows whose
    logits are alive at a time, in the forward and, recomputed, in the backward; ``None`` for all, and all under
    functorch, which does not recompute. Differentiable in ``hidden``, ``weight`` and ``bias``.
    """

    def rows(
        hidden: Tensor, token_ids: Tensor, temperature: float | Tensor, mask: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        logits = linear_logits(_drop(hidden, mask), weight, bias=bias, softcap=softcap, logit_scale=logit_scale)
        return token_logprobs(logits, token_ids, temperature=temperature, mask=mask, return_entropy=return_entropy)

    leading = hidden.shape[:-1]
    # functorch lets no checkpoint save what it needs
    if chunk_tokens is None or chunk_tokens >= leading.numel() or torch._C._are_functorch_transforms_active():
        return rows(hidden, token_ids, temperature, mask)

    if isinstance(temperature, Tensor):
        temperature = temperature.expand(leading)
    per_row = (hidden, token_ids, temperature, mask)
    flat = [x.reshape(-1, *x.shape[len(leading) :]) if isinstance(x, Tensor) else x for x in per_row]
    chunks = [
        checkpoint(
            rows,
            *(x[i * chunk_tokens : (i + 1) * chunk_tokens] if isinstance(x, Tensor) else x for x in flat),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for i in range(-(-leading.numel() // chunk_tokens))
    ]
    if not return_entropy:
        return torch.cat(chunks).reshape(token_ids.shape)
    logp, entropy = zip(*chunks, strict=True)
    return torch.cat(logp).reshape(token_ids.shape), torch.cat(entropy).reshape(leading)


def linear_logits(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Tensor:
    """``softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)``; after the product in float32."""
    logits = F.linear(hidden, weight).to(_compute_dtype(hidden))
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def next_tokens(
    input_ids: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The token that each position predicts, and the mask of the positions that predict a kept one.

    ``input_ids`` and ``mask`` (0: left out): padded ``[B, T]``, or packed ``[T]`` or ``[1, T]`` with ``cu_seqlens``;
    ``[T]`` without is one sequence. Both results have that shape: ids moved one position back, the mask bool. The last
    position of a sequence predicts nothing: id 0, mask False.
    """
    kept = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask != 0
    return shift(input_ids, cu_seqlens), shift(kept, cu_seqlens)


def shift(x: Tensor, cu_seqlens: Tensor | None = None, fill: float = 0) -> Tensor:
    """``x`` one position back, ``fill`` at the last position of a sequence; in the layouts of :func:`next_tokens`."""
    where = layout(x, cu_seqlens)
    return x.reshape(-1).roll(-1).masked_fill(where.left <= 1, fill).reshape(x.shape)


def _drop(x: Tensor, mask: Tensor | None, value: float = 0) -> Tensor:
    """``x``, whose leading dimensions are those of ``mask``, with ``value`` in the rows that are left out."""
    if mask is None:
        return x
    return x.masked_fill((mask == 0).reshape(mask.shape + (1,) * (x.dim() - mask.dim())), value)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
