"""Token log-probs by Triton: one read of the logits forward, one read and one write of them backward.

A program owns a tile of rows x columns: one long row, which it walks block by block, or several short rows side by side. A
row is reduced to (reference, rest, weighted): with the row's maximum as reference, t_j = (x_j - reference) / T and
e_j = exp(t_j), the sum of e_j is 1 + rest, and weighted is the sum of e_j t_j. The 1 is one element at the maximum, so
that nothing is lost beside a dominant logit. (A row that is -inf everywhere has reference 0 and rest -1.) Then

    log p_y = t_y - log1p(rest),   entropy = log1p(rest) - weighted / (1 + rest).

The order of every sum depends on the shape of the tile and the width of the loads alone: neither on the number of rows nor
on a row's place among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedpo import _checks

from .common import kernel, launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MINUS_INF = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-200.0)  # 2^-200 is 0 in float32; t = -inf is moved here where 0 * -inf would arise


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _log1p(x):
    """log(1 + x) for x = -1 and x >= 0, with the digits of a small x."""
    s = x / (2 + x)
    square = s * s
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square * (1 / 11)))))
    return tl.where(tl.abs(x) < 0.5, 2 * s * series, tl.log(1 + x))


@triton.jit
def _rows(mask, num_rows, ROWS: tl.constexpr):
    """The rows of this program, which of them exist, and which of those the mask keeps."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < num_rows
    kept = exists
    if mask is not None:
        kept = tl.load(mask + rows, mask=exists, other=0) != 0
    return rows, exists, kept


@triton.jit
def _row_pointers(base, rows, inner_rows, outer_stride, inner_stride, WIDTH: tl.constexpr):
    """[ROWS, 1] pointers into a tensor of leading dimensions (outer, inner_rows). Offsets need 64 bits: rows * V > 2^31."""
    outer = (rows // inner_rows).to(tl.int64) * outer_stride
    inner = (rows % inner_rows).to(tl.int64) * inner_stride
    pointers = base + (outer + inner)
    if WIDTH > 1:
        pointers = tl.multiple_of(pointers, 16)
    return pointers[:, None]


@triton.jit
def _columns(size, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The columns of a block, their number in all, and where the last, incomplete block starts: the others need no mask."""
    size = tl.multiple_of(size, WIDTH)
    return tl.arange(0, BLOCK)[None, :], size, size // BLOCK * BLOCK


@triton.jit
def _load_ids(token_ids, rows, kept, num_ids, vocab_size, IDS: tl.constexpr):
    """[ROWS, IDS] ids of these rows, their places in memory, which of them exist, and which may be looked up."""
    k = tl.arange(0, IDS)[None, :]
    places = rows.to(tl.int64)[:, None] * num_ids + k
    ids = tl.load(token_ids + places, mask=kept[:, None] & (k < num_ids), other=-1)
    return ids, places, k < num_ids, (ids >= 0) & (ids < vocab_size)


@triton.jit
def _add_block(x, top, ones, rest, weighted, scale, ENTROPY: tl.constexpr):
    """Adds a block [ROWS, BLOCK] to the sums of its rows: `ones` elements at the maximum `top`, `rest` of the others."""
    block_top = tl.max(x, 1)
    new_top = tl.maximum(top, block_top)
    reference = tl.where(new_top == MINUS_INF, 0.0, new_top)
    shift = tl.maximum((top - reference) * scale, LOWEST)
    if ENTROPY:
        weighted = (weighted + shift * (ones + rest)) * tl.exp2(shift)
    rest = tl.where(shift == 0, rest, (ones + rest) * tl.exp2(shift))
    ones = tl.where(shift == 0, ones, 0.0)

    t = (x - reference[:, None]) * scale[:, None]
    e = tl.exp2(t)
    if ENTROPY:
        weighted += tl.sum(e * tl.maximum(t, LOWEST), 1)
    if tl.max((block_top >= top).to(tl.int32), 0) != 0:  # else nothing here is at the maximum
        at_top = e == 1
        ones += tl.sum(at_top.to(tl.float32), 1)
        e = tl.where(at_top, 0.0, e)
    rest += tl.sum(e, 1)
    return new_top, ones, rest, weighted


@kernel
def _token_logprobs_kernel(
    logits,
    token_ids,
    temperature,
    mask,
    logprobs,
    entropy,
    stats,
    num_rows,
    vocab_size,
    num_ids,
    inner_rows,
    outer_stride,
    inner_stride,
    temperature_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    IDS: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Reads the kept rows of `logits` once; writes [T, K] log-probs, [T] entropies and [T, 3] sums, 0 for the other rows."""
    rows, exists, kept = _rows(mask, num_rows, ROWS)
    row = _row_pointers(logits, rows, inner_rows, outer_stride, inner_stride, WIDTH)
    T = tl.load(temperature + rows * temperature_stride, mask=kept, other=1.0)
    scale = tl.div_rn(LOG2E, T)
    ids, places, is_id, in_range = _load_ids(token_ids, rows, kept, num_ids, vocab_size, IDS)
    chosen = tl.load(row + ids, mask=in_range, other=float("nan")).to(tl.float32)

    top = tl.full([ROWS], MINUS_INF, tl.float32)
    ones = tl.zeros([ROWS], tl.float32)
    rest = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    any_kept = tl.max(kept.to(tl.int32), 0) != 0
    columns, size, full = _columns(tl.where(any_kept, vocab_size, 0), WIDTH, BLOCK)
    for start in range(0, full, BLOCK):
        x = tl.load(row + (start + columns), mask=kept[:, None], other=MINUS_INF, eviction_policy="evict_first")
        top, ones, rest, weighted = _add_block(x.to(tl.float32), top, ones, rest, weighted, scale, ENTROPY)
    if full < size:
        inside = kept[:, None] & (full + columns < size)
        x = tl.load(row + (full + columns), mask=inside, other=MINUS_INF, eviction_policy="evict_first")
        top, ones, rest, weighted = _add_block(x.to(tl.float32), top, ones, rest, weighted, scale, ENTROPY)

    reference = tl.where(top == MINUS_INF, 0.0, top)
    rest = ones - 1 + rest
    weighted *= LN2
    log_sum = _log1p(rest)
    logprob = tl.div_rn(chosen - reference[:, None], T[:, None]) - log_sum[:, None]
    tl.store(logprobs + places, tl.where(kept[:, None], logprob, 0.0), mask=exists[:, None] & is_id)
    if ENTROPY:
        tl.store(entropy + rows, tl.where(kept, log_sum - tl.div_rn(weighted, 1 + rest), 0.0), mask=exists)
    stats += rows.to(tl.int64) * 3
    tl.store(stats, tl.where(kept, reference, 0.0), mask=exists)
    tl.store(stats + 1, tl.where(kept, rest, 0.0), mask=exists)
    tl.store(stats + 2, tl.where(kept, weighted, 0.0), mask=exists)


@triton.jit
def _gradient(x, live, reference, scale, constant, slope, ENTROPY: tl.constexpr):
    """e (constant + slope t) for a block, 0 in rows that are not live."""
    t = (x.to(tl.float32) - reference[:, None]) * scale[:, None]
    weight = constant[:, None]
    if ENTROPY:
        t = tl.maximum(t, LOWEST)
        weight += slope[:, None] * t
    return tl.where(live[:, None], tl.exp2(t) * weight, 0.0)


@kernel
def _token_logprobs_backward_kernel(
    grad_logprobs,
    grad_entropy,
    logits,
    grad_logits,
    token_ids,
    temperature,
    mask,
    stats,
    num_rows,
    vocab_size,
    num_ids,
    inner_rows,
    outer_stride,
    inner_stride,
    grad_outer_stride,
    grad_inner_stride,
    temperature_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    IDS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Reads `logits` once, where a gradient arrives from above; writes `grad_logits` once, which may be the same memory.

    With G the sum of grad_logprobs, E grad_entropy, p_j = e_j / (1 + rest) and the mean of t, weighted / (1 + rest):

        grad x_j = (grad_logprobs at j - p_j (G + E (t_j - mean))) / T

    The columns whose log-prob was taken are computed apart, with 1 - p_y = (rest + (1 - e_y)) / (1 + rest), which loses
    nothing: e_y is 1 where y is the maximum, and where it is not, rest holds at least e_y. They are rounded once.
    """
    rows, exists, live = _rows(mask, num_rows, ROWS)
    T = tl.load(temperature + rows * temperature_stride, mask=live, other=1.0)
    scale = tl.div_rn(LOG2E, T)
    g_sum = tl.zeros([ROWS], tl.float32)
    g_entropy = tl.zeros([ROWS], tl.float32)
    if grad_entropy is not None:
        g_entropy = tl.load(grad_entropy + rows, mask=live, other=0.0)
    arrives = g_entropy != 0
    if grad_logprobs is not None:
        ids, places, is_id, in_range = _load_ids(token_ids, rows, live, num_ids, vocab_size, IDS)
        g = tl.load(grad_logprobs + places, mask=live[:, None] & is_id, other=0.0)
        g_sum = tl.sum(g, 1)
        arrives = arrives | (tl.max((g != 0).to(tl.int32), 1) != 0)
    live = live & arrives

    stats += rows.to(tl.int64) * 3
    reference = tl.load(stats, mask=live, other=0.0)
    rest = tl.load(stats + 1, mask=live, other=0.0)
    inverse = tl.div_rn(1.0, 1 + rest)
    mean = tl.load(stats + 2, mask=live, other=0.0) * inverse
    row = _row_pointers(logits, rows, inner_rows, outer_stride, inner_stride, WIDTH)
    grad_row = _row_pointers(grad_logits, rows, inner_rows, grad_outer_stride, grad_inner_stride, WIDTH)

    if grad_logprobs is not None:
        in_range = in_range & live[:, None]
        t = (tl.load(row + ids, mask=in_range, other=0.0).to(tl.float32) - reference[:, None]) * scale[:, None]
        e = tl.exp2(t)
        others = tl.zeros_like(g)
        if IDS > 1:
            here = tl.zeros_like(g)
            first = rows.to(tl.int64) * num_ids
            for k in range(num_ids):
                same = ids == tl.load(token_ids + first + k, mask=live, other=-1)[:, None]
                g_k = tl.load(grad_logprobs + first + k, mask=live, other=0.0)[:, None]
                here += tl.where(same, g_k, 0.0)
                others += tl.where(same, 0.0, g_k)
        else:
            here = g
        chosen = here * (rest[:, None] + (1 - e)) - others * e
        if grad_entropy is not None:
            chosen -= g_entropy[:, None] * e * (LN2 * tl.maximum(t, LOWEST) - mean[:, None])
        chosen = tl.div_rn(chosen * inverse[:, None], T[:, None])
        tl.debug_barrier()  # all threads have read the chosen logits, which the sweep may overwrite

    per_e = tl.div_rn(inverse, T)
    constant = (g_entropy * mean - g_sum) * per_e
    slope = -LN2 * g_entropy * per_e
    columns, size, full = _columns(vocab_size, WIDTH, BLOCK)
    for start in range(0, full, BLOCK):
        x = tl.load(row + (start + columns), mask=live[:, None], other=0.0, eviction_policy="evict_first")
        grad = _gradient(x, live, reference, scale, constant, slope, grad_entropy is not None)
        tl.store(grad_row + (start + columns), grad, mask=exists[:, None])
    if full < size:
        inside = full + columns < size
        x = tl.load(row + (full + columns), mask=inside & live[:, None], other=0.0, eviction_policy="evict_first")
        grad = _gradient(x, live, reference, scale, constant, slope, grad_entropy is not None)
        tl.store(grad_row + (full + columns), grad, mask=inside & exists[:, None])

    if grad_logprobs is not None:
        tl.debug_barrier()  # the chosen columns are written last
        tl.store(grad_row + ids, chosen, mask=in_range)


# ------------------------------------------------------------------------------------------------------------ launchers


class _Rows(NamedTuple):
    """A tensor [..., V] of unit stride along V, whose leading dimensions are (outer, inner)."""

    tensor: Tensor
    inner: int
    outer_stride: int
    inner_stride: int

    def width(self) -> int:
        """Elements per load and store: 16 bytes if every row starts and ends on such a boundary, otherwise one element.

        With V = 50,257 every other row is out of line. Neighbouring threads then still touch neighbouring elements, so it
        costs instructions and no bytes.
        """
        width = 16 // self.tensor.element_size()
        extents = (self.tensor.shape[-1], self.outer_stride, self.inner_stride)
        return width if self.tensor.data_ptr() % 16 == 0 and all(extent % width == 0 for extent in extents) else 1


def _rows_of(tensor: Tensor) -> _Rows | None:
    """Merges leading dimensions that have one common stride; None if more than two are left, or V is strided."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return None
    dims: list[tuple[int, int]] = []  # (size, stride), innermost first
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = (dims[-1][0] * size, dims[-1][1])
        elif size != 1:
            dims.append((size, stride))
    if len(dims) > 2:
        return None
    (inner, inner_stride), (_, outer_stride) = (*dims, (1, 0), (1, 0))[:2]
    return _Rows(tensor, inner, outer_stride, inner_stride)


def _rows_or_copy(tensor: Tensor) -> _Rows:
    rows = _rows_of(tensor) or _rows_of(tensor.contiguous())
    assert rows is not None
    return rows


def _tile(vocab_size: int, num_ids: int, itemsize: int) -> dict[str, int]:
    """Shape of a tile: long rows take blocks of 16 KB, short ones share 4 KB. Each thread holds 64 bytes, four loads of 16."""
    block = max(128, min(triton.next_power_of_2(vocab_size), 16384 // itemsize))
    ids = triton.next_power_of_2(max(1, num_ids))
    rows = max(1, 4096 // itemsize // max(block, ids))
    return {"ROWS": rows, "BLOCK": block, "IDS": ids, "num_warps": max(1, rows * block * itemsize // 2048)}


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _check_values(vocab_size: int, token_ids: Tensor, temperature: Tensor, mask: Tensor | None) -> None:
    kept = torch.ones((), dtype=torch.bool, device=token_ids.device) if mask is None else mask
    kept_ids = kept.reshape(kept.shape + (1,) * (token_ids.dim() - kept.dim()))
    bad = (((token_ids < 0) | (token_ids >= vocab_size)) & kept_ids).flatten().nonzero()
    if len(bad):
        raise ValueError(
            f"token_ids must be in [0, {vocab_size}) at kept rows, got {token_ids.flatten()[bad[0]].item()} "
            f"at flat position {bad[0].item()}"
        )
    bad = (~(temperature > 0) & kept).flatten().nonzero()
    if len(bad):
        value = temperature.expand(torch.broadcast_shapes(temperature.shape, kept.shape)).flatten()[bad[0]]
        raise ValueError(f"temperature must be positive, got {value.item()} at row {bad[0].item()}")


def token_logprobs(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``fusedpo::token_logprobs``; the sums of each row come third."""
    if _checks.values_are_free(token_ids):
        _check_values(logits.shape[-1], token_ids, temperature, mask)
    shape, vocab_size = logits.shape[:-1], logits.shape[-1]
    logprobs = logits.new_empty(token_ids.shape, dtype=torch.float32)
    entropy = logits.new_empty(shape if return_entropy else (0,), dtype=torch.float32)
    stats = logits.new_empty((*shape, 3), dtype=torch.float32)
    num_rows = shape.numel()
    if num_rows == 0:
        return logprobs, entropy, stats
    rows = _rows_or_copy(logits)
    num_ids = token_ids.numel() // num_rows
    tile = _tile(vocab_size, num_ids, logits.element_size())
    launch(
        _token_logprobs_kernel,
        triton.cdiv(num_rows, tile["ROWS"]),
        logits.device,
        rows.tensor,
        token_ids.contiguous(),
        temperature.contiguous(),
        _contiguous(mask),
        logprobs,
        entropy,
        stats,
        num_rows,
        vocab_size,
        num_ids,
        *rows[1:],
        int(temperature.dim() > 0),
        WIDTH=rows.width(),
        ENTROPY=return_entropy,
        **tile,
    )
    return logprobs, entropy, stats


def _backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: _Rows,
    grad_logits: _Rows,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    stats: Tensor,
) -> None:
    vocab_size = logits.tensor.shape[-1]
    num_rows = stats.numel() // 3
    num_ids = token_ids.numel() // num_rows
    tile = _tile(vocab_size, num_ids, logits.tensor.element_size())
    launch(
        _token_logprobs_backward_kernel,
        triton.cdiv(num_rows, tile["ROWS"]),
        logits.tensor.device,
        _contiguous(grad_logprobs),
        _contiguous(grad_entropy),
        logits.tensor,
        grad_logits.tensor,
        token_ids.contiguous(),
        temperature.contiguous(),
        _contiguous(mask),
        stats,
        num_rows,
        vocab_size,
        num_ids,
        *logits[1:],
        *grad_logits[2:],
        int(temperature.dim() > 0),
        WIDTH=min(logits.width(), grad_logits.width()),
        **tile,
    )


def token_logprobs_backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    stats: Tensor,
) -> Tensor:
    """The operator ``fusedpo::token_logprobs_backward``: the gradient of the logits, contiguous."""
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if stats.numel() > 0:
        rows = _rows_or_copy(logits)
        to = _Rows(grad_logits, rows.inner, rows.inner * logits.shape[-1], logits.shape[-1])
        _backward(grad_logprobs, grad_entropy, rows, to, token_ids, temperature, mask, stats)
    return grad_logits


def token_logprobs_backward_(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    stats: Tensor,
) -> None:
    """The operator ``fusedpo::token_logprobs_backward_``: the gradient overwrites the logits."""
    rows = _rows_of(logits)
    if stats.numel() == 0:
        return
    if rows is None:
        logits.copy_(token_logprobs_backward(grad_logprobs, grad_entropy, logits, token_ids, temperature, mask, stats))
    else:
        _backward(grad_logprobs, grad_entropy, rows, rows, token_ids, temperature, mask, stats)


def warmup(vocab_size: int, dtypes: Sequence[torch.dtype], device: torch.device | str, num_ids: int = 1) -> None:
    """Compiles every variant that logits ``[..., vocab_size]`` of these dtypes need, so that no training step waits for one."""
    for dtype in dtypes:
        logits = torch.zeros(1, vocab_size, dtype=dtype, device=device)
        token_ids = torch.zeros(1, num_ids, dtype=torch.int64, device=device)
        temperature, g = torch.ones((), device=device), torch.ones(1, num_ids, device=device)
        for mask in (None, torch.ones(1, dtype=torch.bool, device=device)):
            for return_entropy in (False, True):
                _, _, stats = token_logprobs(logits, token_ids, temperature, mask, return_entropy)
            for upstream in ((g, None), (None, g[:, 0]), (g, g[:, 0])):
                token_logprobs_backward(*upstream, logits, token_ids, temperature, mask, stats)
