"""Rows of logits whose columns lie on several ranks: what a rank says of its columns, and the merge.

Formulas and layouts: ``fusedpo.reference.row_stats``. A program of the first kernel owns rows as those of
:mod:`.logprobs` do; one of the second has ``MERGE_ROWS`` rows, of which it reads what all ranks say, in their order.
"""

from __future__ import annotations

import math

import triton.language as tl
from torch import Tensor

from fusedpo import _checks, _chosen

from .checks import BOOL, FLOAT, Arguments, dims, expect
from .common import cdiv, kernel, launch
from .logprobs import _check, _lanes, _load_ids, _row_pointers, _rows, check_values, row_width, with_layout
from .sums import LOG2E, log1p, reduce_rows, words_of

MERGE_ROWS = 128


@kernel
def _row_stats_kernel(
    logits,
    token_ids,
    temperature,
    mask,
    parts,
    num_rows,
    vocab_start,
    width,
    vocab_size,
    num_columns,
    num_ids,
    num_parts,
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
    """Reads the columns of each kept row once; ``token_ids`` are relative to the first of them."""
    rows, exists, kept = _rows(mask, num_rows, ROWS)
    row = _row_pointers(logits, inner_rows, outer_stride, inner_stride, ROWS, WIDTH)
    T = tl.load(temperature + rows * temperature_stride, mask=kept, other=1.0)
    ids, _, is_id, in_range = _load_ids(token_ids, rows, kept, num_ids, num_columns, IDS)
    chosen = tl.load(row[:, None] + ids, mask=in_range, other=float("-inf")).to(tl.float32)

    PER_WORD: tl.constexpr = 2 if WIDTH == 8 else 1
    end = tl.where(kept, num_columns // PER_WORD, 0)
    reference, rest, weighted = reduce_rows(
        words_of(row, WIDTH)[:, None],
        tl.max(end, 0),
        end[:, None],
        tl.div_rn(LOG2E, T)[:, None],
        tl.zeros([ROWS, 1], tl.int32) + tl.arange(0, LANES)[None, :],
        WIDTH,
        logits.dtype.element_ty,
        ENTROPY,
        "evict_first",
    )

    out = parts + (1 + rows) * num_parts
    tl.store(out, tl.where(kept, reference, 0.0), mask=exists)
    tl.store(out + 1, tl.where(kept, rest, 0.0), mask=exists)
    triple: tl.constexpr = 3 if ENTROPY else 2
    if ENTROPY:
        tl.store(out + 2, tl.where(kept, weighted, 0.0), mask=exists)
    k = tl.arange(0, IDS)[None, :]
    tl.store(out[:, None] + triple + k, tl.where(kept[:, None], chosen, 0.0), mask=exists[:, None] & is_id)

    if tl.program_id(0) == 0:
        for column in range(0, num_parts):
            number = tl.where(column == 0, vocab_start, tl.where(column == 1, width, vocab_size))
            tl.store(parts + column, tl.where(column < 3, number, 0).to(tl.float32))


@kernel
def _merge_row_stats_kernel(
    parts,
    temperature,
    mask,
    logprobs,
    entropy,
    stats,
    num_ranks,
    num_rows,
    num_parts,
    num_ids,
    temperature_stride,
    ROWS: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Reads what all ranks say of each row twice; the second time it is in L1."""
    rows, exists, kept = _rows(mask, num_rows, ROWS)
    T = tl.load(temperature + rows * temperature_stride, mask=kept, other=1.0)
    of_rank = (1 + num_rows).to(tl.int64) * num_parts
    of = parts + (1 + rows) * num_parts

    agree = True
    end = 0.0
    named = tl.load(parts + 2)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    first = tl.full([ROWS], -1, tl.int32)
    for rank in range(0, num_ranks):
        header = parts + rank * of_rank
        agree = agree & (tl.load(header) == end) & (tl.load(header + 2) == named)
        end += tl.load(header + 1)
        reference = tl.load(of + rank * of_rank, mask=kept, other=0.0)
        some = tl.load(of + rank * of_rank + 1, mask=kept, other=-1.0) != -1.0
        larger = some & ((first < 0) | (reference > top))
        top = tl.where(some & (reference > top), reference, top)
        first = tl.where(larger, rank, first)
    agree = agree & (named <= end)
    nothing = first < 0
    top = tl.where(nothing, 0.0, top)

    rest = tl.where(nothing, -1.0, 0.0)
    weighted = tl.zeros([ROWS], tl.float32)
    for rank in range(0, num_ranks):
        reference = tl.load(of + rank * of_rank, mask=kept, other=0.0)
        own = tl.load(of + rank * of_rank + 1, mask=kept, other=-1.0)
        some = own != -1.0
        distance = tl.where(some, tl.div_rn(reference - top, T), 0.0)
        factor = tl.exp2(distance * LOG2E)
        rest += tl.where(some, tl.where(first == rank, own, (1 + own) * factor), 0.0)
        if ENTROPY:
            moved = factor * (tl.load(of + rank * of_rank + 2, mask=kept, other=0.0) + (1 + own) * distance)
            weighted += tl.where(some, moved, 0.0)

    poison = tl.where(agree, 0.0, float("nan"))
    log_sum = log1p(rest) + poison
    if ENTROPY:
        tl.store(entropy + rows, tl.where(kept, log_sum - tl.div_rn(weighted, 1 + rest), 0.0), mask=exists)
    tl.store(stats + 3 * rows, tl.where(kept, top + poison, 0.0), mask=exists)
    tl.store(stats + 3 * rows + 1, tl.where(kept, rest + poison, 0.0), mask=exists)
    tl.store(stats + 3 * rows + 2, tl.where(kept, weighted + poison, 0.0), mask=exists)
    triple: tl.constexpr = 3 if ENTROPY else 2
    for k in range(0, num_ids):
        chosen = tl.load(of + triple + k, mask=kept, other=0.0)
        for rank in range(1, num_ranks):
            x = tl.load(of + rank * of_rank + triple + k, mask=kept, other=0.0)
            chosen = tl.where((x > chosen) | (x != x), x, chosen)
        logprob = tl.div_rn(chosen - top, T) - log_sum
        tl.store(logprobs + rows * num_ids + k, tl.where(kept, logprob, 0.0), mask=exists)


def row_stats(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    vocab_start: int,
    width: int,
    vocab_size: int,
    return_entropy: bool,
) -> Tensor:
    """The operator ``fusedpo::row_stats``."""
    arguments = Arguments("logits", logits)
    token_ids, temperature, mask = _check(arguments, logits, token_ids, temperature, mask)
    *shape, num_columns = logits.shape
    num_rows = math.prod(shape)
    num_ids = token_ids.shape[-1] if token_ids.dim() > len(shape) else 1
    expect(num_ids > 0, "token_ids must hold at least one id per row")
    expect(
        vocab_start >= 0 and width >= num_columns and vocab_size >= 0,
        "vocab_start and vocab_size must not be negative, and width not less than the columns of logits, "
        f"got {vocab_start}, {vocab_size} and {width}",
    )
    if _checks.values_are_free(token_ids):
        check_values(1 << 62, token_ids.new_zeros(shape), temperature, mask)
    parts = logits.new_empty((1 + num_rows, (3 if return_entropy else 2) + num_ids), dtype=FLOAT[0])
    logits, layout = with_layout(logits)
    lanes = _lanes(num_columns, num_ids, row_width(logits, layout), _chosen.FORWARD)
    launch(
        _row_stats_kernel,
        max(1, cdiv(num_rows, lanes["ROWS"])),
        logits.device,
        logits,
        token_ids - vocab_start,
        temperature,
        mask,
        parts,
        num_rows,
        vocab_start,
        width,
        vocab_size,
        num_columns,
        num_ids,
        parts.shape[1],
        max(1, layout.inner_rows),
        layout.outer_stride,
        layout.inner_stride,
        int(temperature.dim() > 0),
        ENTROPY=return_entropy,
        **lanes,
    )
    return parts


def merge_row_stats(
    parts: Tensor, temperature: Tensor, mask: Tensor | None, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``fusedpo::merge_row_stats``."""
    dims("parts", parts, 3, 3)
    arguments = Arguments("parts", parts)
    parts = arguments.read("parts", parts, FLOAT, parts.shape)
    num_ranks, num_rows, num_parts = parts.shape[0], parts.shape[1] - 1, parts.shape[2]
    num_ids = num_parts - (3 if return_entropy else 2)
    expect(
        num_ranks > 0 and num_rows >= 0 and num_ids > 0,
        f"parts must have shape [P, 1 + R, {num_parts - num_ids} + K], got {list(parts.shape)}",
    )
    temperature = arguments.read("temperature", temperature, FLOAT, (), (num_rows,))
    mask = arguments.read("mask", mask, BOOL, (num_rows,))
    logprobs = parts.new_empty((num_rows, num_ids))
    entropy = parts.new_empty(num_rows if return_entropy else 0)
    stats = parts.new_empty((num_rows, 3))
    if num_rows > 0:
        launch(
            _merge_row_stats_kernel,
            cdiv(num_rows, MERGE_ROWS),
            parts.device,
            parts,
            temperature,
            mask,
            logprobs,
            entropy,
            stats,
            num_ranks,
            num_rows,
            num_parts,
            num_ids,
            int(temperature.dim() > 0),
            ROWS=MERGE_ROWS,
            ENTROPY=return_entropy,
            num_warps=4,
        )
    return logprobs, entropy, stats
