"""From hidden states, for losses whose units (pairs of segments) are small: all tokens of a unit in one chunk.

The log-probs of a unit are complete while its logits are still there, so their gradient can be computed at once: the
logits are not computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import apply
from .hidden import (
    OTHER_WORKSPACE_BYTES,
    WORKSPACE_BYTES,
    Options,
    _Gradients,
    _Head,
    _per_row,
    _plain,
    _select,
    _uncapped_temperature,
)
from .one_pass import GradientsWithLoss, keep


def chunks_of_units(
    units: list[int], segments: Tensor, vocab: int, options: Options, device: torch.device
) -> list[Tensor] | None:
    """Which of the evaluated tokens make a chunk, so that none splits a unit; None where one does not fit.

    ``units``: the unit of each segment; ``segments``: that of each evaluated token.
    """
    most = options.chunk_tokens
    if most is None:
        buffers = 2 if options.softcap is not None else 1
        workspace = WORKSPACE_BYTES.get(device.type, OTHER_WORKSPACE_BYTES)
        most = max(1, workspace // (buffers * vocab * options.dtype.itemsize))
    of_token = torch.tensor(units, dtype=torch.int64, device=device)[segments]
    of_token, order = of_token.sort(stable=True)
    sizes = of_token.unique_consecutive(return_counts=True)[1].tolist()
    if not sizes or max(sizes) > most:
        return None
    lengths, length = [], 0
    for size in sizes:
        if length + size > most:
            lengths.append(length)
            length = 0
        length += size
    return [chunk.sort().values for chunk in order.split([*lengths, length])]


class _ByUnits(GradientsWithLoss):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        temperature: Tensor,
        chunks: list[Tensor],
        loss_of: Callable[[Tensor], Tensor],
        options: Options,
        backend: str,
    ) -> tuple[Tensor, ...]:
        forward = getattr(torch.ops.fusedpo.token_logprobs, backend)
        leading = hidden.shape[:-1]
        ids, temperature = token_ids.reshape(-1), _per_row(temperature, leading)
        logprobs, entropy = torch.zeros((2, *token_ids.shape), dtype=torch.float32, device=hidden.device).unbind()
        rows = torch.cat(chunks)
        with _plain(hidden):
            largest = max(chunk.numel() for chunk in chunks)
            head = _Head(hidden, weight, bias, rows, options._replace(chunk_tokens=largest), gradients=True)
            head.chunks = [slice(0, 0)] * len(chunks)  # how many there are is what the sums of gradients ask for
            gradients = _Gradients(head, ctx.needs_input_grad[:3], hidden, weight, bias)
            for at in chunks:
                states = head.rows_of(at)
                logits = head.logits(states)
                of_rows = (ids[at], _select(temperature, at))
                logprobs.view(-1)[at], entropy.view(-1)[at], stats = forward(logits, *of_rows, None, True)
                # of all tokens, which is little against the products; those of the other units are not used
                with torch.enable_grad():
                    leaf = logprobs.detach().requires_grad_()
                    (coefficients,) = torch.autograd.grad(loss_of(leaf), leaf)
                upstream = (coefficients.view(-1)[at], None)
                gradients.add_chunk(at, states, logits, upstream, *of_rows, stats, backend)
            results = gradients.rounded()
        loss = loss_of(logprobs)
        keep(ctx, "preference_loss_from_hidden", backend, results, hidden, weight, bias)
        ctx.mark_non_differentiable(logprobs, entropy, gradients.dropped)
        return loss, logprobs, entropy, gradients.dropped


def loss_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: Tensor,
    chunks: list[Tensor],
    loss_of: Callable[[Tensor], Tensor],
    *,
    options: Options,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``loss_of(logprobs)``, the log-probs and the entropy of the tokens in ``chunks``, both 0 elsewhere.

    And the largest probability that the gradient of a row was left without.

    A chunk holds positions among the flattened tokens. The gradient of ``loss_of`` with respect to the log-probs of a
    chunk must not depend on those of the chunks after it.
    """
    temperature = _uncapped_temperature(temperature, options)
    args = (hidden, weight, bias, token_ids, temperature, chunks, loss_of, options, backend)
    return apply("preference_loss_from_hidden", _ByUnits, *args)
