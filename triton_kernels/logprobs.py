"""Token log-probs by Triton: one read of the logits forward, one read and one write of them backward.

A program owns a tile of rows x columns: one long row, which it walks block by block, or several short rows side by side. A
row is reduced to (reference, rest, weighted), as in csrc/cpu/rows.h: with t_j = (x_j - reference) / T and e_j = exp(t_j),
1 + rest is the sum of e_j and weighted the sum of e_j t_j. The reference is the row's maximum; one element at the maximum
is the 1, so that nothing is lost beside a dominant logit. (A row that is -inf everywhere has rest = -1.) Then

    log p_y = t_y - log1p(rest),   entropy = log1p(rest) - weighted / (1 + rest).

The order of every sum depends on the shape of the tile, which depends on V, K and the dtype alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedpo import _checks

_TILE_BYTES = 16384  # 64 bytes per thread: four independent loads of 16 bytes
_NUM_WARPS = 8

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-200.0)  # 2^-200 is 0 in float32; a -inf is moved here so that 0 * -inf never arises


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _log1p(x):
    """log(1 + x) for x = -1 and x >= 0, to the last digits of a small x."""
    s = x / (2 + x)
    square = s * s
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square * (1 / 11)))))
    return tl.where(tl.abs(x) < 0.5, 2 * s * series, tl.log(1 + x))


@triton.jit
def _live_rows(mask, num_rows, ROWS: tl.constexpr):
    """The rows of this program, those of them that exist, and those that the mask keeps."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < num_rows
    live = exists
    if mask is not None:
        live = tl.load(mask + rows, mask=exists, other=0) != 0
    return rows, exists, live


@triton.jit
def _row_starts(base, rows, inner_rows, outer_stride, inner_stride, ALIGNED: tl.constexpr):
    """Pointers [ROWS, 1] to the rows of a tensor whose leading dimensions are (outer, inner); 64-bit offsets."""
    outer = (rows // inner_rows).to(tl.int64) * outer_stride
    inner = (rows % inner_rows).to(tl.int64) * inner_stride
    start = base + (outer + inner)
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start[:, None]


@triton.jit
def _add_block(x, top, ones, rest, weighted, scale, ENTROPY: tl.constexpr):
    """Adds a block of columns to the sums of its rows: `ones` elements at the maximum `top`, `rest` of all others."""
    block_top = tl.max(x, 1)
    new_top = tl.maximum(top, block_top)
    reference = tl.where(new_top == -float("inf"), 0.0, new_top)
    shift = tl.maximum((top - reference) * scale, LOWEST)
    factor = tl.exp2(shift)
    if ENTROPY:
        weighted = (weighted + shift * (ones + rest)) * factor

    t = (x - reference[:, None]) * scale[:, None]
    e = tl.exp2(t)
    if ENTROPY:
        weighted += tl.sum(e * tl.maximum(t, LOWEST), 1)
    moved = shift != 0
    rest = tl.where(moved, (ones + rest) * factor, rest)
    ones = tl.where(moved, 0.0, ones)
    if tl.max((block_top >= top).to(tl.int32), 0) != 0:
        at_top = e == 1
        ones += tl.sum(at_top.to(tl.float32), 1)
        rest += tl.sum(tl.where(at_top, 0.0, e), 1)
    else:
        rest += tl.sum(e, 1)
    return new_top, ones, rest, weighted


@triton.jit(do_not_specialize=["num_rows", "vocab_size", "num_ids", "inner_rows", "outer_stride", "inner_stride", "temperature_stride"])
def _token_logprobs_kernel(
    logits, token_ids, temperature, mask, logprobs, entropy, stats,
    num_rows, vocab_size, num_ids, inner_rows, outer_stride, inner_stride, temperature_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, IDS: tl.constexpr, ALIGNED: tl.constexpr, ENTROPY: tl.constexpr,
):
    rows, exists, live = _live_rows(mask, num_rows, ROWS)
    row = _row_starts(logits, rows, inner_rows, outer_stride, inner_stride, ALIGNED)
    T = tl.load(temperature + rows * temperature_stride, mask=live, other=1.0)
    scale = tl.div_rn(LOG2E, T)
    rows = rows.to(tl.int64)

    k = tl.arange(0, IDS)[None, :]
    id_mask = exists[:, None] & (k < num_ids)
    id_offsets = rows[:, None] * num_ids + k
    ids = tl.load(token_ids + id_offsets, mask=id_mask & live[:, None], other=-1)
    x_ids = tl.load(row + ids, mask=(ids >= 0) & (ids < vocab_size), other=float("nan")).to(tl.float32)

    top = tl.full([ROWS], -float("inf"), tl.float32)
    ones = tl.zeros([ROWS], tl.float32)
    rest = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    columns = tl.arange(0, BLOCK)[None, :]
    size = tl.where(tl.max(live.to(tl.int32), 0) != 0, vocab_size, 0)
    full = size // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        x = tl.load(row + (start + columns), mask=live[:, None], other=-float("inf"), eviction_policy="evict_first").to(tl.float32)
        top, ones, rest, weighted = _add_block(x, top, ones, rest, weighted, scale, ENTROPY)
    if full < size:
        inside = live[:, None] & (full + columns < size)
        x = tl.load(row + (full + columns), mask=inside, other=-float("inf"), eviction_policy="evict_first").to(tl.float32)
        top, ones, rest, weighted = _add_block(x, top, ones, rest, weighted, scale, ENTROPY)

    reference = tl.where(top == -float("inf"), 0.0, top)
    rest = (ones - 1) + rest
    log_sum = _log1p(rest)
    logp = tl.div_rn(x_ids - reference[:, None], T[:, None]) - log_sum[:, None]
    tl.store(logprobs + id_offsets, tl.where(live[:, None], logp, 0.0), mask=id_mask)
    weighted *= LN2
    if ENTROPY:
        tl.store(entropy + rows, tl.where(live, log_sum - tl.div_rn(weighted, 1 + rest), 0.0), mask=exists)
    tl.store(stats + 3 * rows, tl.where(live, reference, 0.0), mask=exists)
    tl.store(stats + 3 * rows + 1, tl.where(live, rest, 0.0), mask=exists)
    tl.store(stats + 3 * rows + 2, tl.where(live, weighted, 0.0), mask=exists)
