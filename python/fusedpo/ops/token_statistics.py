"""The operator ``torch.ops.fusedpo.token_statistics``: what ``token_logprobs`` gives, and more of the same pass.

::

    token_statistics(logits, token_ids, temperature, mask?)
        -> logprobs, entropy, stats, log_sum_sq_probs, mean_logits, is_top1

Arguments and the first three results as in :mod:`fusedpo.ops.token_logprobs`, with one id per row and the entropy; its
backward is that of ``token_logprobs``. The others, ``[...]``, 0 where masked, have no gradient: the log of the sum of
the squared probabilities and the mean of ``logits / temperature``, float32, and, bool, whether the token is the first
of the likeliest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import apply, define, is_differentiated, may_overlap, must_be_functional
from .hidden import Inputs, Options, _Head, _LinearTokenLogprobs, _per_row, _plain, _select, _uncapped
from .token_logprobs import _INPUTS, _TokenLogprobs


def _fake(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    rows = logits.shape[:-1]
    numbers = [logits.new_empty(rows, dtype=torch.float32) for _ in range(4)]
    stats = logits.new_empty((*rows, 3), dtype=torch.float32)
    return *numbers[:2], stats, *numbers[2:], logits.new_empty(rows, dtype=torch.bool)


define(
    "token_statistics",
    f"({_INPUTS}) -> (Tensor logprobs, Tensor entropy, Tensor stats, Tensor log_sum_sq_probs, Tensor mean_logits, "
    "Tensor is_top1)",
    _fake,
)


class _TokenStatistics(_TokenLogprobs):
    generate_vmap_rule = True

    @staticmethod
    def forward(backend: str, inplace_backward: bool, *inputs: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        return getattr(torch.ops.fusedpo.token_statistics, backend)(*inputs[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        _TokenLogprobs.setup_context(ctx, inputs, output[:3])  # type: ignore[arg-type]
        ctx.mark_non_differentiable(*output[2:])


class LinearTokenStatistics(_LinearTokenLogprobs):
    """Of hidden states; the statistics of a chunk are taken while its logits are there."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        inputs, (options, backend) = Inputs.first_of(args)
        hidden, weight, bias, token_ids, temperature, rows = inputs
        operator = getattr(torch.ops.fusedpo.token_statistics, backend)
        leading = hidden.shape[:-1]
        ids, temperature = _per_row(token_ids, leading), _per_row(temperature, leading)
        results = list(torch.zeros((4, *ids.shape), dtype=torch.float32, device=ids.device).unbind())
        results.append(torch.zeros_like(ids, dtype=torch.bool))
        stats = results[0].new_empty((ids.shape[0], 3))
        with _plain(hidden):
            head = _Head(hidden, weight, bias, rows, options, gradients=False)
            for at, _, logits in head.walk():
                *first, stats[at], squares, mean, top1 = operator(logits, ids[at], _select(temperature, at), None)
                for result, values in zip(results, (*first, squares, mean, top1), strict=True):
                    result[at] = values
        ctx.options, ctx.dropped, ctx.backend = options, None, backend
        ctx.save_for_backward(*inputs, stats)
        ctx.set_materialize_grads(False)
        results = [result.reshape(leading) for result in results]
        ctx.mark_non_differentiable(*results[2:])
        return tuple(results)


def token_statistics(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None, inplace_backward: bool, backend: str
) -> tuple[Tensor, ...]:
    """All results but the stats, by the kernels of ``backend``; arguments as the operator's schema has them."""
    inputs = (logits, token_ids, temperature, mask)
    if is_differentiated(logits):
        inplace_backward = inplace_backward and not must_be_functional() and not may_overlap(logits)
        results = apply("token_statistics", _TokenStatistics, backend, inplace_backward, *inputs, True)
    else:
        results = getattr(torch.ops.fusedpo.token_statistics, backend)(*inputs)
    logprobs, entropy, _, *others = results
    return logprobs, entropy, *others


def linear_token_statistics(
    inputs: Inputs, *, options: Options, backend: str, function: type[LinearTokenStatistics] = LinearTokenStatistics
) -> tuple[Tensor, ...]:
    """As :func:`token_statistics`, of the rows, 0 elsewhere. ``function`` computes it."""
    return apply("linear_token_statistics", function, *_uncapped(inputs, options), options, backend)
