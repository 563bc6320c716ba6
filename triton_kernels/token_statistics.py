"""Token log-probs, entropy and the statistics of each row of logits, which a program reads once, block by block.

Sums are those of sums.py, and one of e_j^2: 1 + squares. The order of every sum follows from V and the block alone.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedpo import _checks

from .checks import INT64, Arguments
from .common import kernel, launch, sum_where
from .logprobs import _check, _row_pointers, _rows, check_values, row_width, with_layout
from .sums import LN2, LOG2E, LOWEST, MINUS_INF, log1p


@triton.jit
def _add(x, top, ones, rest, weighted, squares, scale):
    """Adds a block [1, BLOCK] to the sums: `ones` elements at the maximum `top`, `rest` and `squares` of others."""
    block_top = tl.max(x, 1)
    new_top = tl.maximum(top, block_top)
    reference = tl.where(new_top == MINUS_INF, 0.0, new_top)
    shift = tl.maximum((top - reference) * scale, LOWEST)
    factor = tl.exp2(shift)
    weighted = (weighted + shift * (ones + rest)) * factor
    rest = tl.where(shift == 0, rest, (ones + rest) * factor)
    squares = tl.where(shift == 0, squares, (ones + squares) * factor * factor)
    ones = tl.where(shift == 0, ones, 0.0)

    t = (x - reference[:, None]) * scale[:, None]
    e = tl.exp2(t)
    weighted += sum_where(e != 0, e * t, 1)
    at_top = e == 1
    ones += tl.sum(at_top.to(tl.float32), 1)
    return new_top, ones, rest + sum_where(~at_top, e, 1), weighted, squares + sum_where(~at_top, e * e, 1)


@kernel
def _token_statistics_kernel(
    logits,
    token_ids,
    temperature,
    mask,
    logprobs,
    entropy,
    stats,
    log_sum_sq_probs,
    mean_logits,
    is_top1,
    num_rows,
    vocab_size,
    inner_rows,
    outer_stride,
    inner_stride,
    temperature_stride,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Reads V logits of each kept row, once; writes eight numbers of every row."""
    rows, _, kept = _rows(mask, num_rows, 1)
    row = _row_pointers(logits, inner_rows, outer_stride, inner_stride, 1, WIDTH)[:, None]
    T = tl.load(temperature + rows * temperature_stride, mask=kept, other=1.0)
    scale = tl.div_rn(LOG2E, T)
    ids = tl.load(token_ids + rows, mask=kept, other=-1)[:, None]
    in_range = (ids >= 0) & (ids < vocab_size)
    chosen = tl.load(row + ids, mask=in_range, other=float("nan")).to(tl.float32)

    top = tl.full([1], MINUS_INF, tl.float32)
    ones = tl.zeros([1], tl.float32)
    rest = tl.zeros([1], tl.float32)
    weighted = tl.zeros([1], tl.float32)
    squares = tl.zeros([1], tl.float32)
    total = tl.zeros([1], tl.float32)
    beaten = tl.zeros([1], tl.int32)
    columns = tl.arange(0, BLOCK)[None, :]
    size = tl.where(tl.max(kept.to(tl.int32), 0) != 0, vocab_size, 0)
    for start in range(0, size, BLOCK):
        inside = tl.max_constancy(start + columns < size, [1, WIDTH])
        x = tl.load(row + (start + columns), mask=inside, other=MINUS_INF, eviction_policy="evict_first").to(tl.float32)
        top, ones, rest, weighted, squares = _add(x, top, ones, rest, weighted, squares, scale)
        total += tl.sum(tl.where(inside, x, 0.0), 1)
        better = (x > chosen) | ((x == chosen) & (start + columns < ids))
        beaten = tl.maximum(beaten, tl.max(better.to(tl.int32), 1))

    reference = tl.where(top == MINUS_INF, 0.0, top)
    rest = ones - 1 + rest
    squares = ones - 1 + squares
    weighted *= LN2
    log_sum = log1p(rest)
    logprob = tl.div_rn(tl.max(chosen, 1) - reference, T) - log_sum
    tl.store(logprobs + rows, tl.where(kept, logprob, 0.0))
    tl.store(entropy + rows, tl.where(kept, log_sum - tl.div_rn(weighted, 1 + rest), 0.0))
    tl.store(stats + 3 * rows, tl.where(kept, reference, 0.0))
    tl.store(stats + 3 * rows + 1, tl.where(kept, rest, 0.0))
    tl.store(stats + 3 * rows + 2, tl.where(kept, weighted, 0.0))
    tl.store(log_sum_sq_probs + rows, tl.where(kept, log1p(squares) - 2 * log_sum, 0.0))
    tl.store(mean_logits + rows, tl.where(kept, tl.div_rn(tl.div_rn(total, vocab_size.to(tl.float32)), T), 0.0))
    tl.store(is_top1 + rows, kept & (beaten == 0) & (logprob == logprob))


def token_statistics(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator ``fusedpo::token_statistics``."""
    arguments = Arguments("logits", logits)
    token_ids, temperature, mask = _check(arguments, logits, token_ids, temperature, mask)
    *shape, vocab_size = logits.shape
    arguments.check("token_ids", token_ids, INT64, shape)
    if _checks.values_are_free(token_ids):
        check_values(vocab_size, token_ids, temperature, mask)
    logprobs, entropy, squares, mean = (logits.new_empty(shape, dtype=torch.float32) for _ in range(4))
    stats = logprobs.new_empty(*shape, 3)
    is_top1 = logprobs.new_empty(shape, dtype=torch.bool)
    num_rows = math.prod(shape)
    if num_rows > 0:
        logits, layout = with_layout(logits)
        itemsize, width = logits.element_size(), row_width(logits, layout)
        block = max(512, min(triton.next_power_of_2(vocab_size), 16384 // itemsize))
        launch(
            _token_statistics_kernel,
            num_rows,
            logits.device,
            logits,
            token_ids,
            temperature,
            mask,
            logprobs,
            entropy,
            stats,
            squares,
            mean,
            is_top1,
            num_rows,
            vocab_size,
            *layout,
            int(temperature.dim() > 0),
            BLOCK=block,
            WIDTH=width,
            num_warps=max(1, min(16, block * itemsize // (2048 if width > 1 else 256 * itemsize))),
        )
    return logprobs, entropy, stats, squares, mean, is_top1
