"""The operators ``torch.ops.fusedpo.active_columns`` and ``gradient_at_``: the gradient of logits, but for small parts.

::

    active_columns(grad_logprobs?, grad_entropy?, logits, token_ids, temperature, stats, threshold) -> active
    gradient_at_(grad_logprobs?, grad_entropy?, logits, token_ids, temperature, stats, columns) -> dropped

* ``logits`` ``[R, V]``, a chunk of rows; other arguments as those of ``token_logprobs_backward_out``. ``threshold``: at
  least 2^-64.
* ``active`` ``[V]``, bool: where an element of the gradient of some row may be larger than ``threshold * (|G| + |E|) /
  T``, ``G`` being the sum of the row's ``grad_logprobs`` and ``E`` its ``grad_entropy``; and the ids of every row that
  a gradient reaches. Without ``E`` that is where ``p > threshold``. All columns where a gradient is not finite.
* ``gradient_at_`` writes the gradient of the ``columns`` (int64 ``[A]``, ascending, with the ids of every row that a
  gradient reaches) to the front of each row, ``logits[:, :A]``, with 0 for elements below 2^-64 of that size; what is
  behind is left as it was. ``dropped`` ``[R]``, float32: the probability of the other columns, 0 in rows that no
  gradient reaches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import define

MOST_ACTIVE = 0.5  # of all columns: with more, products of all of them are as fast

_INPUTS = (
    "Tensor? grad_logprobs, Tensor? grad_entropy, Tensor{} logits, Tensor token_ids, Tensor temperature, Tensor stats"
)

define(
    "active_columns",
    f"({_INPUTS.format('')}, float threshold) -> Tensor",
    lambda _grad_logprobs, _grad_entropy, logits, *_: logits.new_empty(logits.shape[-1:], dtype=torch.bool),
)
define(
    "gradient_at_",
    f"({_INPUTS.format('(a!)')}, Tensor columns) -> Tensor",
    lambda _grad_logprobs, _grad_entropy, logits, *_: logits.new_empty(logits.shape[:-1], dtype=torch.float32),
)


def gradient_of_active(
    upstream: Sequence[Tensor | None],
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    stats: Tensor,
    *,
    threshold: float,
    backend: str,
) -> tuple[Tensor, Tensor] | None:
    """The active columns, whose gradient is in front of the rows of ``logits`` then, and what that leaves out.

    None, and the logits are as they were, where so many are active that nothing is gained.
    """
    operators, given = torch.ops.fusedpo, (*upstream, logits, token_ids, temperature, stats)
    columns = getattr(operators.active_columns, backend)(*given, threshold).nonzero().squeeze(1)
    if columns.numel() > MOST_ACTIVE * logits.shape[1]:
        return None
    return columns, getattr(operators.gradient_at_, backend)(*given, columns)


def columns_above(gradient: Tensor, bound: Tensor) -> Tensor | None:
    """The columns of ``gradient`` ``[R, V]`` in which an element of some row r is larger than ``bound[r]``, or NaN.

    None where so many are that nothing is gained.
    """
    step = max(1, (1 << 18) // gradient.shape[1])  # rows that stay in a cache
    active = torch.zeros(gradient.shape[1], dtype=torch.bool, device=gradient.device)
    for rows, limit in zip(gradient.split(step), bound.split(step), strict=True):
        active |= ~(rows.abs() <= limit[:, None]).all(0)
    columns = active.nonzero().squeeze(1)
    return None if columns.numel() > MOST_ACTIVE * gradient.shape[1] else columns
