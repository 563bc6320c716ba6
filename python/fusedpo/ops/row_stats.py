"""The operators of rows of logits whose columns lie on several ranks.

::

    row_stats(logits, token_ids, temperature, mask?, vocab_start, width, vocab_size, return_entropy) -> parts
    merge_row_stats(parts, temperature, mask?, return_entropy) -> logprobs, entropy, stats

What they compute: :mod:`fusedpo.reference.row_stats`.

* ``logits`` ``[..., V]``, the valid ones of ``width`` columns from ``vocab_start`` on, V may be 0; ``token_ids``,
  ``temperature`` and ``mask`` as in :mod:`.token_logprobs`, ids of the whole vocabulary.
* ``parts`` ``[1 + R, 3 + K]`` float32, ``[1 + R, 2 + K]`` without the entropy; of all ranks ``[P, 1 + R, ..]``.
* To merge, ``temperature`` is ``[]`` or ``[R]`` and ``mask`` ``[R]``; ``logprobs`` ``[R, K]``, ``entropy`` ``[R]``
  (``[0]`` if it is not asked for), ``stats`` ``[R, 3]``, which ``token_logprobs_backward`` takes with ``vocab_start``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import define


def num_columns(token_ids: Tensor, leading: int, return_entropy: bool) -> int:
    """Of ``parts``."""
    return (3 if return_entropy else 2) + (token_ids.shape[-1] if token_ids.dim() > leading else 1)


def _row_stats_fake(logits: Tensor, token_ids: Tensor, *args: object) -> Tensor:
    rows = logits.shape[:-1]  # Size.numel() would fix a number that is traced
    columns = num_columns(token_ids, len(rows), bool(args[-1]))
    return logits.new_empty((1 + math.prod(rows), columns), dtype=torch.float32)


def _merge_row_stats_fake(
    parts: Tensor, temperature: Tensor, mask: Tensor | None, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = parts.shape[1] - 1
    return (
        parts.new_empty((rows, parts.shape[2] - (3 if return_entropy else 2))),
        parts.new_empty(rows if return_entropy else 0),
        parts.new_empty((rows, 3)),
    )


define(
    "row_stats",
    "(Tensor logits, Tensor token_ids, Tensor temperature, Tensor? mask, int vocab_start, int width, int vocab_size, "
    "bool return_entropy) -> Tensor",
    _row_stats_fake,
)
define(
    "merge_row_stats",
    "(Tensor parts, Tensor temperature, Tensor? mask, bool return_entropy) "
    "-> (Tensor logprobs, Tensor entropy, Tensor stats)",
    _merge_row_stats_fake,
)
