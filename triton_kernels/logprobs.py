"""Token log-probs: one read of the logits forward, one read and one write of them backward.

A program owns one long row, which it walks step by step, or several short rows side by side, and reduces each to
(reference, rest, weighted), which sums.py explains. The order of every sum follows from V, K, the dtype, whether all
rows are aligned, and the ids of the row: it depends neither on the number of rows nor on the place of a row among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedpo import _checks, _chosen

from .checks import BOOL, FLOAT, INT64, LOGITS, Arguments, expect
from .common import cdiv, kernel, launch
from .sums import LN2, LOG2E, LOWEST, TILES, log1p, reduce_rows, words_of

# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _rows(mask, num_rows, ROWS: tl.constexpr):
    """[ROWS]: the rows of this program, which of them exist, and which of those the mask keeps."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    exists = rows < num_rows
    kept = exists
    if mask is not None:
        kept = tl.load(mask + rows, mask=exists, other=0) != 0
    return rows, exists, kept


@triton.jit
def _row_pointers(base, inner_rows, outer_stride, inner_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS] pointers to the rows of this program, in a tensor of leading dimensions (outer, inner_rows)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outer = (rows // inner_rows).to(tl.int64) * outer_stride  # rows * V may exceed 2^31
    inner = (rows % inner_rows).to(tl.int64) * inner_stride
    pointers = base + (outer + inner)
    if WIDTH > 1:
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def _load_ids(token_ids, rows, kept, num_ids, vocab_size, IDS: tl.constexpr):
    """[ROWS, IDS]: the ids of these rows, their places in memory, and which of them exist and are in range."""
    k = tl.arange(0, IDS)[None, :]
    places = rows[:, None] * num_ids + k
    ids = tl.load(token_ids + places, mask=kept[:, None] & (k < num_ids), other=-1)
    return ids, places, k < num_ids, (ids >= 0) & (ids < vocab_size)


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
    LANES: tl.constexpr,
    IDS: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Reads V logits of each kept row, once; writes K log-probs, an entropy and three sums of every row."""
    rows, exists, kept = _rows(mask, num_rows, ROWS)
    row = _row_pointers(logits, inner_rows, outer_stride, inner_stride, ROWS, WIDTH)
    T = tl.load(temperature + rows * temperature_stride, mask=kept, other=1.0)
    scale = tl.div_rn(LOG2E, T)
    ids, places, is_id, in_range = _load_ids(token_ids, rows, kept, num_ids, vocab_size, IDS)
    chosen = tl.load(row[:, None] + ids, mask=in_range, other=float("nan")).to(tl.float32)

    PER_WORD: tl.constexpr = 2 if WIDTH == 8 else 1
    size = vocab_size // PER_WORD
    end = tl.where(kept, size, 0)
    lanes = tl.zeros([ROWS, 1], tl.int32) + tl.arange(0, LANES)[None, :]
    reference, rest, weighted = reduce_rows(
        words_of(row, WIDTH)[:, None],
        tl.max(end, 0),
        end[:, None],
        scale[:, None],
        lanes,
        WIDTH,
        logits.dtype.element_ty,
        ENTROPY,
        "evict_first",
    )
    log_sum = log1p(rest)
    logprob = tl.div_rn(chosen - reference[:, None], T[:, None]) - log_sum[:, None]
    tl.store(logprobs + places, tl.where(kept[:, None], logprob, 0.0), mask=exists[:, None] & is_id)
    if ENTROPY:
        tl.store(entropy + rows, tl.where(kept, log_sum - tl.div_rn(weighted, 1 + rest), 0.0), mask=exists)
    tl.store(stats + 3 * rows, tl.where(kept, reference, 0.0), mask=exists)
    tl.store(stats + 3 * rows + 1, tl.where(kept, rest, 0.0), mask=exists)
    tl.store(stats + 3 * rows + 2, tl.where(kept, weighted, 0.0), mask=exists)


@triton.jit
def gradient_of(x, reference, scale, constant, slope, ENTROPY: tl.constexpr):
    """exp(t) (constant + slope t) of a block."""
    t = (x.to(tl.float32) - reference) * scale
    weight = constant
    if ENTROPY:
        t = tl.maximum(t, LOWEST)
        weight += slope * t
    return tl.exp2(t) * weight


@triton.jit
def _join(starts, here, before, next_starts, next_here, next_before):
    """Two neighbouring stretches of sorted ids: whether an id starts in it, the sum of its last id, the sum before."""
    new = next_starts != 0
    before = tl.where(new, before + here + next_before, before)
    return starts | next_starts, tl.where(new, next_here, here + next_here), before


@triton.jit
def _sums_at_ids(grad_logprobs, token_ids, order, rows, kept, num_ids, vocab_size, IDS: tl.constexpr):
    """[ROWS, IDS]: ids, which of them are in range, gradients, and their sums at the same and at other ids of the row.

    In time linear in K, for ids are sorted. One that was taken several times is in range at the last place only, where
    its sum is complete.
    """
    ids, places, is_id, in_range = _load_ids(token_ids, rows, kept, num_ids, vocab_size, IDS)
    is_id &= kept[:, None]
    if IDS == 1:
        g = tl.load(grad_logprobs + places, mask=is_id, other=0.0)
        here = g
        others = tl.zeros_like(g)
    else:
        k = tl.arange(0, IDS)[None, :]
        follows = is_id & (k + 1 < num_ids)
        row = grad_logprobs + rows[:, None] * num_ids
        g = tl.load(row + tl.load(order + places, mask=is_id, other=0), mask=is_id, other=0.0)
        next_g = tl.load(row + tl.load(order + places + 1, mask=follows, other=0), mask=follows, other=0.0)
        starts = (k == 0) | (ids != tl.load(token_ids + places - 1, mask=is_id & (k > 0), other=-1))
        _, here, before = tl.associative_scan((starts.to(tl.int32), g, tl.zeros_like(g)), 1, _join)
        others = before + tl.cumsum(next_g, 1, reverse=True)
        in_range &= (k + 1 == num_ids) | (ids != tl.load(token_ids + places + 1, mask=follows, other=-1))
    return ids, in_range, g, here, others


@kernel
def _token_logprobs_backward_kernel(
    grad_logprobs,
    grad_entropy,
    logits,
    grad_logits,
    token_ids,
    order,
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
    """Reads V logits of each row that a gradient reaches, once; writes V gradients of every row, maybe in their place.

    With G the sum of grad_logprobs, E grad_entropy, p_j = e_j / (1 + rest) and mean = weighted / (1 + rest):

        grad x_j = (grad_logprobs at j - p_j (G + E (t_j - mean))) / T

    The columns whose log-prob was taken are computed apart and rounded once, with 1 - p_y as (rest + (1 - e_y)) /
    (1 + rest). No digits are lost: e_y is exactly 1 where y is the maximum, and where it is not, rest is at least e_y.
    """
    rows, exists, evaluated = _rows(mask, num_rows, ROWS)
    g_sum = tl.zeros([ROWS], tl.float32)
    g_entropy = tl.zeros([ROWS], tl.float32)
    if grad_entropy is not None:
        g_entropy = tl.load(grad_entropy + rows, mask=evaluated, other=0.0)
    reached = g_entropy != 0
    if grad_logprobs is not None:
        ids, in_range, g, here, others = _sums_at_ids(
            grad_logprobs, token_ids, order, rows, evaluated, num_ids, vocab_size, IDS
        )
        g_sum = tl.sum(g, 1)
        reached = reached | (tl.max((g != 0).to(tl.int32), 1) != 0)
    evaluated = evaluated & reached

    # The other rows are left with x = 0, T = 1 and the gradient 0.
    T = tl.load(temperature + rows * temperature_stride, mask=evaluated, other=1.0)
    scale = tl.div_rn(LOG2E, T)
    reference = tl.load(stats + 3 * rows, mask=evaluated, other=0.0)
    rest = tl.load(stats + 3 * rows + 1, mask=evaluated, other=0.0)
    inverse = tl.div_rn(1.0, 1 + rest)
    mean = tl.load(stats + 3 * rows + 2, mask=evaluated, other=0.0) * inverse
    row = _row_pointers(logits, inner_rows, outer_stride, inner_stride, ROWS, WIDTH)
    grad_row = _row_pointers(grad_logits, inner_rows, grad_outer_stride, grad_inner_stride, ROWS, WIDTH)
    row, grad_row = row[:, None], grad_row[:, None]

    if grad_logprobs is not None:
        in_range = in_range & evaluated[:, None]
        t = (tl.load(row + ids, mask=in_range, other=0.0).to(tl.float32) - reference[:, None]) * scale[:, None]
        e = tl.exp2(t)
        chosen = here * (rest[:, None] + (1 - e)) - others * e
        if grad_entropy is not None:
            chosen -= g_entropy[:, None] * e * (LN2 * tl.maximum(t, LOWEST) - mean[:, None])
        chosen = tl.div_rn(chosen * inverse[:, None], T[:, None])
        tl.debug_barrier()  # every thread has read the chosen logits before any overwrites them

    normaliser = tl.div_rn(inverse, T)
    constant = (g_entropy * mean - g_sum) * normaliser
    slope = -LN2 * g_entropy * normaliser
    reference, scale, constant, slope = reference[:, None], scale[:, None], constant[:, None], slope[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    full = vocab_size // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        x = tl.load(row + (start + columns), mask=evaluated[:, None], other=0.0, eviction_policy="evict_first")
        grad = gradient_of(x, reference, scale, constant, slope, grad_entropy is not None)
        tl.store(grad_row + (start + columns), grad, mask=exists[:, None])
    if full < vocab_size:
        inside = tl.max_constancy(full + columns < vocab_size, [1, WIDTH])
        x = tl.load(row + (full + columns), mask=inside & evaluated[:, None], other=0.0, eviction_policy="evict_first")
        grad = gradient_of(x, reference, scale, constant, slope, grad_entropy is not None)
        tl.store(grad_row + (full + columns), grad, mask=inside & exists[:, None])

    if grad_logprobs is not None:
        tl.debug_barrier()  # the chosen columns are written last
        tl.store(grad_row + ids, chosen, mask=in_range)


# ------------------------------------------------------------------------------------------------------------ launchers


class RowLayout(NamedTuple):
    """Where the rows of a tensor [..., V] start: leading dimensions (outer, inner_rows), unit stride along V."""

    inner_rows: int
    outer_stride: int
    inner_stride: int


def row_layout(tensor: Tensor) -> RowLayout | None:
    """None where V is strided, or the leading dimensions need more than two strides."""
    expect(tensor.dim() > 0, "rows must have at least one dimension")
    if tensor.is_contiguous():
        return RowLayout(tensor.shape[:-1].numel(), 0, tensor.shape[-1])
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
    (inner_rows, inner_stride), (_, outer_stride) = (*dims, (1, 0), (1, 0))[:2]
    return RowLayout(inner_rows, outer_stride, inner_stride)


def with_layout(tensor: Tensor) -> tuple[Tensor, RowLayout]:
    layout = row_layout(tensor)
    if layout is None:
        tensor = tensor.contiguous()
        layout = row_layout(tensor)
        assert layout is not None
    return tensor, layout


def with_output(logits: Tensor, out: Tensor, run: Callable[[Tensor, RowLayout, Tensor, RowLayout], None]) -> None:
    """Calls ``run`` with two tensors and where their rows start; what it writes into the second one, ``out`` holds."""
    logits, layout = with_layout(logits)
    to = row_layout(out)
    target = out
    if to is None or (to.inner_rows != layout.inner_rows and not out.is_contiguous()):
        target = out.new_empty(out.shape)
    if target.is_contiguous():
        vocab_size = out.shape[-1]
        to = RowLayout(layout.inner_rows, layout.inner_rows * vocab_size, vocab_size)
    assert to is not None
    run(logits, layout, target, to)
    if target is not out:
        out.copy_(target)


def row_width(tensor: Tensor, layout: RowLayout) -> int:
    """Elements per load and store: 16 bytes of them if every row starts and ends on a boundary of 16 bytes, else one.

    One is what V = 50,257 gets. Neighbouring threads still access neighbouring elements: that costs no bytes.
    """
    itemsize = tensor.element_size()
    step = itemsize * math.gcd(tensor.shape[-1], layout.outer_stride, layout.inner_stride)
    return 16 // itemsize if step % 16 == 0 and tensor.data_ptr() % 16 == 0 else 1


@lru_cache
def _lanes(vocab_size: int, num_ids: int, width: int, shape: tuple[int, int]) -> dict[str, int]:
    """All warps for one long row, or for several that are a step or less each. ``shape``: see ``_chosen.FORWARD``."""
    most, warps = shape
    words = vocab_size // 2 if width == 8 else vocab_size
    lanes = max(128, min(triton.next_power_of_2(cdiv(words, TILES.value)), most))
    ids = triton.next_power_of_2(max(1, num_ids))
    rows = max(1, most // max(lanes, ids))
    num_warps = max(1, min(16, rows * max(lanes, ids) * warps // most))
    return {"ROWS": rows, "LANES": lanes, "IDS": ids, "WIDTH": width, "num_warps": num_warps}


@lru_cache
def _tile(vocab_size: int, num_ids: int, itemsize: int, width: int, shape: tuple[int, int]) -> dict[str, int]:
    """A tile of the gradient: of a long row, or 2048 logits of up to four short ones. ``shape``: ``_chosen.BACKWARD``.

    Where loads are narrow, a thread has 8 logits of it.
    """
    most, warps = shape
    block = max(512, min(triton.next_power_of_2(vocab_size), most // itemsize))
    ids = triton.next_power_of_2(max(1, num_ids))
    row_bytes = max(block * itemsize, ids * 16)  # an id comes with its column, two sums and its gradient
    rows = max(1, 2048 * itemsize // row_bytes)
    num_warps = max(1, min(16, rows * row_bytes // (most // warps if width > 1 else 256 * itemsize)))
    return {"ROWS": rows, "BLOCK": block, "IDS": ids, "WIDTH": width, "num_warps": num_warps}


def _check(arguments: Arguments, logits: Tensor, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """``token_ids``, ``temperature`` and ``mask``, checked and contiguous."""
    token_ids, temperature, mask = inputs
    assert token_ids is not None
    expect(logits.dim() > 0, "logits must have at least one dimension")
    rows = logits.shape[:-1]
    arguments.check("logits", logits, LOGITS, logits.shape)
    ids_shape = (*rows, token_ids.shape[-1]) if token_ids.dim() > len(rows) else rows
    return (
        arguments.read("token_ids", token_ids, INT64, ids_shape),
        arguments.read("temperature", temperature, FLOAT, (), rows),
        arguments.read("mask", mask, BOOL, rows),
    )


def check_values(vocab_size: int, token_ids: Tensor, temperature: Tensor, mask: Tensor | None) -> None:
    kept = torch.ones((), dtype=torch.bool, device=token_ids.device) if mask is None else mask
    kept_ids = kept.reshape(kept.shape + (1,) * (token_ids.dim() - kept.dim()))
    bad = (((token_ids < 0) | (token_ids >= vocab_size)) & kept_ids).flatten().nonzero()
    if len(bad) > 0:
        raise ValueError(
            f"token_ids must be in [0, {vocab_size}) at kept rows, got {token_ids.flatten()[bad[0]].item()} "
            f"at flat position {bad[0].item()}"
        )
    bad = (~((temperature > 0) & (temperature < torch.inf)) & kept).flatten().nonzero()
    if len(bad) > 0:
        value = temperature.expand(torch.broadcast_shapes(temperature.shape, kept.shape)).flatten()[bad[0]]
        raise ValueError(f"temperature must be positive and finite, got {value.item()} at row {bad[0].item()}")


def token_logprobs(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``fusedpo::token_logprobs``; its third result is (reference, rest, weighted) of every row."""
    arguments = Arguments("logits", logits)
    token_ids, temperature, mask = _check(arguments, logits, token_ids, temperature, mask)
    *shape, vocab_size = logits.shape
    if _checks.values_are_free(token_ids):
        check_values(vocab_size, token_ids, temperature, mask)
    logprobs = torch.empty_like(token_ids, dtype=torch.float32, memory_format=torch.contiguous_format)
    entropy = logprobs.new_empty(shape if return_entropy else 0)
    stats = logprobs.new_empty(*shape, 3)
    num_rows = math.prod(shape)
    if num_rows > 0:
        logits, layout = with_layout(logits)
        num_ids = token_ids.numel() // num_rows
        lanes = _lanes(vocab_size, num_ids, row_width(logits, layout), _chosen.FORWARD)
        launch(
            _token_logprobs_kernel,
            cdiv(num_rows, lanes["ROWS"]),
            logits.device,
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
            *layout,
            int(temperature.dim() > 0),
            ENTROPY=return_entropy,
            **lanes,
        )
    return logprobs, entropy, stats


def _reached(
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, mask: Tensor | None, rows: torch.Size
) -> Tensor | None:
    """The kept rows that a gradient reaches: no others are looked at."""
    reached = torch.zeros(rows, dtype=torch.bool) if grad_entropy is None else grad_entropy != 0
    if grad_logprobs is not None:
        reached = reached.to(grad_logprobs.device) | (grad_logprobs != 0).reshape(*rows, -1).any(-1)
    return reached if mask is None else reached & mask


def token_logprobs_backward_out(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    out: Tensor,
    vocab_start: int | None = None,
) -> None:
    """The operator ``fusedpo::token_logprobs_backward_out``."""
    expect(logits.dim() > 0, "rows must have at least one dimension")
    arguments = Arguments("logits", logits)
    rows, vocab_size = logits.shape[:-1], logits.shape[-1]
    token_ids, temperature, mask = _check(arguments, logits, token_ids, temperature, mask)
    stats = arguments.read("stats", stats, FLOAT, (*rows, 3))
    grad_logprobs = arguments.read("grad_logprobs", grad_logprobs, FLOAT, token_ids.shape)
    if grad_entropy is not None and grad_entropy.numel() == 0:
        grad_entropy = None  # a traced graph passes it for an entropy that was not asked for
    grad_entropy = arguments.read("grad_entropy", grad_entropy, FLOAT, rows)
    arguments.check("out", out, (logits.dtype,), logits.shape)
    num_rows = rows.numel()
    if num_rows == 0:
        return
    if vocab_start is not None:
        token_ids = token_ids - vocab_start  # other columns count in the sum, and have no place in the row
    elif _checks.values_are_free(token_ids):
        reached = _reached(grad_logprobs, grad_entropy, mask, rows)
        check_values(vocab_size, token_ids, temperature, reached)
    num_ids = token_ids.numel() // num_rows
    order = None
    if num_ids > 1 and grad_logprobs is not None:
        token_ids, order = token_ids.sort(dim=-1, stable=True)

    def run(logits: Tensor, layout: RowLayout, out: Tensor, out_layout: RowLayout) -> None:
        width = min(row_width(logits, layout), row_width(out, out_layout))
        tile = _tile(vocab_size, num_ids, logits.element_size(), width, _chosen.BACKWARD)
        launch(
            _token_logprobs_backward_kernel,
            cdiv(num_rows, tile["ROWS"]),
            logits.device,
            grad_logprobs,
            grad_entropy,
            logits,
            out,
            token_ids,
            order,
            temperature,
            mask,
            stats,
            num_rows,
            vocab_size,
            num_ids,
            *layout,
            out_layout.outer_stride,
            out_layout.inner_stride,
            int(temperature.dim() > 0),
            **tile,
        )

    with_output(logits, out, run)
