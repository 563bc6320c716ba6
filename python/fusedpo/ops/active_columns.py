"""The operators ``torch.ops.fusedpo.active_columns`` and ``gradient_at_``: the gradient of logits, but for small parts.

::

    active_columns(grad_logprobs?, grad_entropy?, logits, token_ids, temperature, stats, threshold) -> active
    gradient_at_(grad_logprobs?, grad_entropy?, logits, token_ids, temperature, stats, active, most) -> columns, dropped

* ``logits`` ``[R, V]``, a chunk of rows; other arguments as those of ``token_logprobs_backward_out``. ``threshold``: at
  least 2^-64.
* ``active`` ``[V]``, bool: where an element of the gradient of some row may be larger than ``threshold * (|G| + |E|) /
  T``, ``G`` being the sum of the row's ``grad_logprobs`` and ``E`` its ``grad_entropy``; and the ids of every row that
  a gradient reaches. Without ``E`` that is where ``p > threshold``. All columns where a gradient is not finite.
* ``gradient_at_`` writes the gradient of the A ``active`` columns (with the ids of every row that a gradient reaches)
  to the front of each row, ``logits[:, :A]``, with 0 for elements below 2^-64 of that size; what is behind is left as
  it was; and all of it where A is larger than ``most``.
* ``columns`` ``[most]``, int64: the active ones, ascending, and -1 behind them. ``dropped`` ``[R]``, float32: the
  probability of the other columns, 0 in rows that no gradient reaches and where nothing was written.

How many columns are active is known to the device alone: neither operator waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    f"({_INPUTS.format('(a!)')}, Tensor active, int most) -> (Tensor columns, Tensor dropped)",
    lambda _grad_logprobs, _grad_entropy, logits, *args: (
        logits.new_empty((args[-1],), dtype=torch.int64),
        logits.new_empty(logits.shape[:-1], dtype=torch.float32),
    ),
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

    None, and the logits are as they were, where so many are active that nothing is gained. The host has to know how
    many there are, for products of them: the device computes their gradient until it does.
    """
    operators, given = torch.ops.fusedpo, (*upstream, logits, token_ids, temperature, stats)
    active, most = getattr(operators.active_columns, backend)(*given, threshold), _most_active(logits)
    count = to_host(active.sum())
    columns, dropped = getattr(operators.gradient_at_, backend)(*given, active, most)
    number = count()
    return (columns[:number], dropped) if number <= most else None


def columns_above(gradient: Tensor, bound: Tensor) -> Callable[[], Tensor | None]:
    """What gives the columns of ``gradient`` ``[R, V]`` in which an element of some row r is larger than ``bound[r]``,
    or NaN, and waits for their number.

    None where so many are that nothing is gained.
    """
    step = max(1, (1 << 18) // gradient.shape[1])  # rows that stay in a cache
    active = torch.zeros(gradient.shape[1], dtype=torch.bool, device=gradient.device)
    for rows, limit in zip(gradient.split(step), bound.split(step), strict=True):
        active |= ~(rows.abs() <= limit[:, None]).all(0)
    count = to_host(active.sum())

    def columns() -> Tensor | None:
        number = count()
        return torch.nonzero_static(active, size=number).squeeze(1) if number <= _most_active(gradient) else None

    return columns


def _most_active(logits: Tensor) -> int:
    return int(MOST_ACTIVE * logits.shape[1])


def to_host(number: Tensor) -> Callable[[], int]:
    """Sends an integer (0-d) to the host, and gives what waits for it: until then the device can be given more to do.

    Only where the device has nothing left to do when it arrives does it idle for the time of the way.
    """
    if number.device.type == "cpu":
        return lambda: int(number)
    there = torch.empty((), dtype=number.dtype, device="cpu", pin_memory=True)
    there.copy_(number, non_blocking=True)
    arrived = torch.Event(number.device)
    arrived.record(torch.accelerator.current_stream(number.device))

    def value() -> int:
        arrived.synchronize()
        return int(there)

    return value
