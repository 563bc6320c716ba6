"""From logits to the gradient of the loss: each row read once from memory, and written once.

A row is reduced to its log-prob and entropy, which give the coefficient of its token, and while it is still in the L2
cache it is read again and its gradient written. Both go on at once: while the gradient of row k is written, row k - 1
is reduced, so memory is always read and written. A trace looks at the tokens after its own, so every sequence is walked
backwards: what a window holds is known when its row comes up.

The evaluated rows (kept by the mask, or all those that ``rows`` names, of which masked ones get zeros) are cut into
segments of equal numbers, one per program. Launches, none of which waits for the host:

1. where there is a mask, ``_evaluated_first_kernel`` counts the evaluated rows and lists their indices, then those of
   the skipped rows;
2. where there is a trace, ``_one_pass_kernel`` reduces the halo: those first rows of each segment that are in windows
   of the segment before, whose walk starts with them. A program per row, which reads it and writes its log-prob;
3. ``_one_pass_kernel`` walks, a program per segment: it reads its rows and writes their gradients, those of the halo as
   well, and a share of the zeros of the skipped rows. The scale of a mean or sum over tokens follows from the count.

In place, step 2 is over before step 3 overwrites anything. A row is in one halo at most, and then read twice: the
shorter the windows beside the segments, the less that costs, and never more than the 3 T V elements that two passes
move. Both launches run the same code, so what a row gives depends, bit for bit, neither on the number of segments nor
on where they begin, and the log-probs of the halo, which are written twice, do not change.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedpo import _checks, _chosen, backends

from .checks import BOOL, FLOAT, INT64, LOGITS, Arguments, expect
from .common import cdiv, kernel, launch
from .logprobs import RowLayout, check_values, gradient_of, row_layout, row_width, with_output
from .objective import AHEAD, TOKEN_MEAN, TOKEN_SUM, TRACE, Objective, Token, evaluate, log_ratio
from .policy_loss import Weights, decode, only_if, token_layout
from .sums import LN2, LOG2E, LOWEST, TILES, add, filled, load_last_step, load_step, log1p, merge, no_sums, words_of

# ----------------------------------------------------------------------------------------------------- segments of rows


@triton.jit
def _count(mask, begin, end, rows, BLOCK: tl.constexpr):
    """How many of the rows ``begin``, a multiple of BLOCK, to ``end`` the mask keeps."""
    counts = tl.zeros([BLOCK], tl.int32)
    full = begin + (end - begin) // BLOCK * BLOCK
    for start in range(begin, full, BLOCK):
        counts += (tl.load(tl.multiple_of(mask + start, 16) + rows) != 0).to(tl.int32)
    counts += (tl.load(mask + full + rows, mask=full + rows < end, other=0) != 0).to(tl.int32)
    return tl.sum(counts, 0)


@kernel
def _evaluated_first_kernel(mask, order, num_rows, blocks, BLOCK: tl.constexpr):
    """Lists the rows that the mask keeps, then the others, both in order, and how many it keeps at the end.

    A program lists ``blocks`` blocks of rows. It counts all rows by itself: a byte each, and nobody to wait for.
    """
    rows = tl.arange(0, BLOCK)
    begin = tl.program_id(0) * blocks * BLOCK
    before = _count(mask, 0, begin, rows, BLOCK)
    num_evaluated = before + _count(mask, begin, num_rows, rows, BLOCK)
    for start in range(begin, tl.minimum(begin + blocks * BLOCK, num_rows), BLOCK):
        row = start + rows
        kept = (tl.load(mask + row, mask=row < num_rows, other=0) != 0).to(tl.int32)
        count = before + tl.cumsum(kept, 0)
        place = tl.where(kept != 0, count - 1, num_evaluated + row - count)
        tl.store(order + place, row.to(tl.int64), mask=row < num_rows)
        before += tl.sum(kept, 0)
    tl.store(order + num_rows, num_evaluated.to(tl.int64), mask=begin == 0)


class Rows(NamedTuple):
    """The rows in the order in which they are counted: evaluated ones, then skipped ones."""

    order: Any  # the token of each
    has_order: Any  # otherwise row k is that of token k
    num_evaluated: Any
    num_tokens: Any


@triton.jit
def _token_of(rows, k, exists):
    """The token of row number k; 0 if there is no such row. Always a token of the batch, whatever the order holds."""
    token = tl.where(exists, k, 0).to(tl.int64)
    if rows.has_order != 0:
        token = tl.load(rows.order + k, mask=exists, other=0)
        token = tl.minimum(tl.maximum(token, 0), rows.num_tokens - 1)
    return token


class Sequences(NamedTuple):
    """Where the tokens of a batch belong; rows of a padded batch are ``width`` apart."""

    cu_seqlens: Any
    num_sequences: Any
    width: Any


@triton.jit
def _sequence_of(token, sequences):
    """The sequence of a token, and where that ends."""
    if sequences.cu_seqlens is None:
        sequence = (token // sequences.width).to(tl.int32)
        end = (sequence + 1).to(tl.int64) * sequences.width
    else:
        sequence = 0  # the last that does not begin after the token
        above = sequences.num_sequences
        while above - sequence > 1:
            middle = (sequence + above) // 2
            begun = tl.load(sequences.cu_seqlens + middle) <= token
            sequence = tl.where(begun, middle, sequence)
            above = tl.where(begun, above, middle)
        end = tl.minimum(tl.load(sequences.cu_seqlens + sequence + 1), sequences.width)
    return sequence, end


@triton.jit
def _segment(count, segment, num_segments):
    """Where a segment of ``count`` things begins and ends."""
    count = tl.cast(count, tl.int64)
    begin = count * segment // num_segments
    end = count * (segment + 1) // num_segments
    return begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def _halo_row(rows, sequences, segment, num_segments, place, ahead):
    """As a segment of its own: row number ``place`` of a segment if windows of the segment before reach it."""
    begin, end = _segment(rows.num_evaluated, segment, num_segments)
    exists = (begin > 0) & (begin + place < end)
    before = _token_of(rows, begin - 1, exists)
    _, sequence_end = _sequence_of(before, sequences)
    token = _token_of(rows, begin + place, exists)
    reached = exists & (token <= before + ahead) & (token < sequence_end)
    return begin + place, begin + place + reached.to(tl.int32)


# -------------------------------------------------------------------------------------------------------------- one row


@triton.jit
def _row_pointer(base, row, inner_rows, outer_stride, inner_stride, WIDTH: tl.constexpr):
    """Where a row begins, in a tensor of leading dimensions (outer, inner_rows)."""
    outer = (row // inner_rows).to(tl.int64) * outer_stride  # rows * V may exceed 2^31
    inner = (row % inner_rows).to(tl.int64) * inner_stride
    pointer = base + (outer + inner)
    if WIDTH > 1:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


class Chosen(NamedTuple):
    """The logit of the token that a row predicts; of an id out of range NaN, and V as the column."""

    logit: Any
    column: Any


@triton.jit
def _load_chosen(row, token_id, vocab_size):
    column = tl.load(token_id)
    column = tl.where((column >= 0) & (column < vocab_size), column, vocab_size)
    return Chosen(tl.load(row + column, mask=column < vocab_size, other=float("nan")).to(tl.float32), column)


class Gradient(NamedTuple):
    """Of a row: exp(t) (constant + slope t), t = (x - reference) scale, and its chosen column; or zeros, no x read."""

    end: Any  # 0 if there are none but zeros, else V
    reference: Any
    scale: Any
    constant: Any
    slope: Any
    chosen: Any
    column: Any


@triton.jit
def _gradient(chosen, stats, scale, T, g, g_entropy, vocab_size, BONUS: tl.constexpr):
    """The gradient of g logprob + g_entropy entropy. The formulas are those of ``_token_logprobs_backward_kernel``."""
    reference, rest, weighted = stats
    inverse = tl.div_rn(1.0, 1 + rest)
    mean = weighted * inverse
    t = (chosen.logit - reference) * scale
    e = tl.exp2(t)
    grad_chosen = g * (rest + (1 - e))
    normaliser = tl.div_rn(inverse, T)
    constant = -g * normaliser
    slope = 0.0
    if BONUS:
        grad_chosen -= g_entropy * e * (LN2 * tl.maximum(t, LOWEST) - mean)
        constant = (g_entropy * mean - g) * normaliser
        slope = -LN2 * g_entropy * normaliser
    reads = (g != 0) | (g_entropy != 0)
    return Gradient(
        tl.where(reads, vocab_size, 0),
        tl.where(reads, reference, 0.0),
        tl.where(reads, scale, 1.0),
        tl.where(reads, constant, 0.0),
        tl.where(reads, slope, 0.0),
        tl.where(reads, tl.div_rn(grad_chosen * inverse, T), 0.0),
        chosen.column,
    )


@triton.jit
def _write_zeros(row, columns, vocab_size, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    for start in range(0, vocab_size, BLOCK):
        inside = tl.max_constancy(start + columns < vocab_size, WIDTH)
        tl.store(row + (start + columns), columns * 0.0, mask=inside, eviction_policy="evict_first")


# ------------------------------------------------------------------------------------------------------------ one token


class Batch(NamedTuple):
    """What the loss of a token is computed from. Arrays that were not given are others, which are not read."""

    logprobs: Any
    old_logprobs: Any
    has_old_logprobs: Any
    advantages: Any
    mask: Any
    has_mask: Any
    ref_logprobs: Any
    is_weights: Any
    has_is_weights: Any
    scale: Any  # of tokens, or one, to be divided by
    denominator: Any


@triton.jit
def _sum_ahead(batch, token, count, CHUNK: tl.constexpr):
    """[1]: the sum of the log-ratios of the ``count`` tokens after a token, masked ones being 0.

    It is taken afresh for each token: nothing cancels, and a NaN stays in the windows that hold it.
    """
    following = token + 1
    total = tl.zeros([CHUNK], tl.float32)
    for start in range(0, count, CHUNK):
        offset = start + tl.arange(0, CHUNK)
        kept = offset < count
        kept &= tl.load(batch.mask + following + offset, mask=only_if(batch.has_mask, kept), other=1) != 0
        logprob = tl.load(batch.logprobs + following + offset, mask=kept, other=0.0)
        total += log_ratio(logprob, tl.load(batch.old_logprobs + following + offset, mask=kept, other=0.0))
    return tl.sum(total[None, :], 1)


@triton.jit
def _derivatives(o, batch, sequences, token, logprob, entropy, CHUNK: tl.constexpr):
    """The derivatives of the loss with respect to the log-prob and the entropy of a token."""
    i = tl.arange(0, 1)
    logprob = tl.full([1], logprob, tl.float32)
    entropy = tl.full([1], entropy, tl.float32)
    there = i == 0
    sequence, end = _sequence_of(token, sequences)
    advantage = batch.advantages.array + tl.where(batch.advantages.per_token != 0, token, sequence) + i
    is_weight = batch.is_weights.array + tl.where(batch.is_weights.per_token != 0, token, sequence) + i
    old_logprob = tl.load(batch.old_logprobs + token + i, mask=only_if(batch.has_old_logprobs, there), other=0.0)
    zero = tl.zeros([1], tl.float32)
    x = Token(
        logprob,
        tl.where(batch.has_old_logprobs != 0, old_logprob, logprob),
        tl.load(batch.ref_logprobs + token + i, mask=only_if(o.kl, there), other=0.0),
        tl.load(advantage),
        tl.load(is_weight, mask=only_if(batch.has_is_weights, there), other=1.0),
        entropy,
        _sum_ahead(batch, token, tl.minimum(o.ahead, end - 1 - token).to(tl.int32), CHUNK),
        zero,
        zero,
        zero,
    )
    scale = tl.load(batch.scale.array + tl.where(batch.scale.per_token != 0, token, 0)) / batch.denominator
    d_logprob, d_entropy = scale * tl.sum(evaluate(o, x).d_logprob, 0), -scale * o.entropy_coef
    if batch.has_mask != 0:  # rows that are given may be masked, and then hold anything
        kept = tl.load(batch.mask + token) != 0
        d_logprob, d_entropy = tl.where(kept, d_logprob, 0.0), tl.where(kept, d_entropy, 0.0)
    return d_logprob, d_entropy


# ------------------------------------------------------------------------------------------------------------- the walk


@kernel
def _one_pass_kernel(
    logits,
    grad_logits,
    logprobs,
    entropies,
    order,
    token_ids,
    temperature,
    old_logprobs,
    advantages,
    mask,
    cu_seqlens,
    ref_logprobs,
    is_weights,
    scale,
    denominator,
    halo,
    num_segments,
    num_rows,
    vocab_size,
    has_order,
    gathered,
    num_sequences,
    width,
    inner_rows,
    outer_stride,
    inner_stride,
    grad_outer_stride,
    grad_inner_stride,
    temperature_stride,
    advantage_per_token,
    is_weight_per_token,
    scale_per_token,
    has_denominator,
    has_old_logprobs,
    has_is_weights,
    has_mask,
    ratio,
    back,
    ahead,
    differentiate,
    trust_region,
    kl,
    aggregation,
    looks_at,
    kl_coef,
    kl_clamp,
    entropy_coef,
    length_norm,
    p0,
    p1,
    p2,
    p3,
    p4,
    BONUS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Walks a segment; or, where ``halo`` is not 0, reduces one of the first ``halo`` rows of a segment but the first.

    BONUS: the entropy has a gradient, too.
    """
    o = Objective(
        ratio,
        back,
        ahead,
        differentiate,
        trust_region,
        kl,
        aggregation,
        looks_at,
        kl_coef,
        kl_clamp,
        entropy_coef,
        length_norm,
        p0,
        p1,
        p2,
        p3,
        p4,
    )
    sequences = Sequences(cu_seqlens, num_sequences, width)
    num_evaluated = num_rows
    if (has_order != 0) & (gathered == 0):
        num_evaluated = tl.load(order + num_rows).to(tl.int32)
    count = 1.0
    if (scale_per_token == 0) & (aggregation == TOKEN_MEAN):
        count = num_evaluated.to(tl.float32)
        if has_denominator != 0:
            count = tl.load(denominator)
        count = tl.where(count == 0, 1.0, count)
    batch = Batch(
        logprobs,
        old_logprobs,
        has_old_logprobs,
        Weights(advantages, advantage_per_token),
        mask,
        has_mask,
        ref_logprobs,
        Weights(is_weights, is_weight_per_token),
        has_is_weights,
        Weights(scale, scale_per_token),
        count,
    )
    num_tokens = tl.cast(num_sequences if cu_seqlens is None else 1, tl.int64) * width
    rows = Rows(order, has_order, num_evaluated, num_tokens)
    program = tl.program_id(0)
    if halo == 0:
        begin, end = _segment(num_evaluated, program, num_segments)
    else:
        begin, end = _halo_row(rows, sequences, 1 + program // halo, num_segments, program % halo, ahead)

    DTYPE: tl.constexpr = logits.dtype.element_ty
    PER_WORD: tl.constexpr = 2 if WIDTH == 8 else 1
    STEP: tl.constexpr = TILES * LANES
    BLOCK: tl.constexpr = STEP * PER_WORD
    lanes = tl.arange(0, LANES)
    columns = tl.arange(0, BLOCK)
    size = vocab_size // PER_WORD
    full = size // STEP * STEP
    zero = 0.0
    gradient = Gradient(0 * vocab_size, zero, zero, zero, zero, zero, begin.to(tl.int64))
    index = begin
    last = begin + (halo != 0).to(tl.int32)  # nothing of the halo is written
    k = tl.where(begin < end, end, last - 1)
    while k >= last:  # row number k is written, unless it is the end; row number k - 1 is reduced, if there is one
        reduces = k > begin
        write_end = tl.where(k < end, vocab_size, 0)
        row = _row_pointer(logits, index, inner_rows, outer_stride, inner_stride, WIDTH)
        grad_row = _row_pointer(grad_logits, index, inner_rows, grad_outer_stride, grad_inner_stride, WIDTH)
        token = _token_of(rows, k - 1, reduces)
        index = tl.where(gathered != 0, tl.maximum(k - 1, begin), token.to(tl.int32))
        next_row = _row_pointer(logits, index, inner_rows, outer_stride, inner_stride, WIDTH)
        words = words_of(next_row, WIDTH)
        T = tl.load(temperature + token * temperature_stride)
        exponent_scale = tl.div_rn(LOG2E, T)

        sums = no_sums(lanes)
        read_end = tl.where(reduces, full, 0)
        tiles = load_last_step(words, full, lanes, tl.where(reduces, size, 0), WIDTH, DTYPE, "evict_last")
        next_tiles = load_step(words, 0, lanes, read_end, WIDTH, DTYPE, "evict_last")
        if full < size:
            at = full * PER_WORD + columns
            inside = tl.max_constancy(at < gradient.end, WIDTH)
            x = tl.load(row + at, mask=inside, other=0.0, eviction_policy="evict_first")
            sums = add(tiles, sums, exponent_scale, WIDTH, DTYPE, True)
            grad = gradient_of(x, gradient.reference, gradient.scale, gradient.constant, gradient.slope, BONUS)
            inside = tl.max_constancy(at < write_end, WIDTH)
            tl.store(grad_row + at, grad, mask=inside, eviction_policy="evict_first")
        for first in range(0, full, STEP):
            tiles = next_tiles
            at = first * PER_WORD + columns
            x = tl.load(row + at, mask=filled(0, columns) < gradient.end, other=0.0, eviction_policy="evict_first")
            next_tiles = load_step(words, first + STEP, lanes, read_end, WIDTH, DTYPE, "evict_last")
            sums = add(tiles, sums, exponent_scale, WIDTH, DTYPE, True)
            grad = gradient_of(x, gradient.reference, gradient.scale, gradient.constant, gradient.slope, BONUS)
            tl.store(grad_row + at, grad, mask=filled(0, columns) < write_end, eviction_policy="evict_first")
        chosen = _load_chosen(next_row, token_ids + token, tl.where(reduces, vocab_size, 0))
        tl.debug_barrier()  # the chosen column is written last; the next chosen logit was read before it is overwritten
        tl.store(grad_row + gradient.column, gradient.chosen, mask=gradient.column < write_end)

        k -= 1
        if reduces:
            reference, rest, weighted = merge(sums, exponent_scale)
            log_sum = log1p(rest)
            logprob = tl.div_rn(chosen.logit - reference, T) - log_sum
            entropy = log_sum - tl.div_rn(weighted, 1 + rest)
            tl.store(logprobs + token, logprob)
            tl.store(entropies + token, entropy)
            if halo == 0:
                g, g_entropy = _derivatives(o, batch, sequences, token, logprob, entropy, CHUNK)
                stats = (reference, rest, weighted)
                gradient = _gradient(chosen, stats, exponent_scale, T, g, g_entropy, vocab_size, BONUS)
            tl.debug_barrier()  # the log-prob can be read, for the rows before

    if halo == 0:
        begin, end = _segment(num_rows - num_evaluated, program, num_segments)
        for k in range(begin, end):
            row = _token_of(rows, num_evaluated + k, k >= 0)
            grad_row = _row_pointer(
                grad_logits, row.to(tl.int32), inner_rows, grad_outer_stride, grad_inner_stride, WIDTH
            )
            _write_zeros(grad_row, columns, vocab_size, BLOCK, WIDTH)
            tl.store(logprobs + row, zero)
            tl.store(entropies + row, zero)


@kernel
def _scale_kernel(
    gradient,
    factor,
    num_rows,
    vocab_size,
    inner_rows,
    outer_stride,
    inner_stride,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    factor = tl.load(factor)
    if factor != 1:
        columns = tl.arange(0, BLOCK)
        for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
            row = _row_pointer(gradient, index, inner_rows, outer_stride, inner_stride, WIDTH)
            for start in range(0, vocab_size, BLOCK):
                inside = tl.max_constancy(start + columns < vocab_size, WIDTH)
                x = tl.load(row + (start + columns), mask=inside, other=0.0, eviction_policy="evict_first")
                tl.store(row + (start + columns), x.to(tl.float32) * factor, mask=inside, eviction_policy="evict_first")


# ------------------------------------------------------------------------------------------------------------ launchers

_CHUNK = 64  # positions of a window that are summed at a time
_BLOCK = 16384  # logits of a row at a time where all are done alike, half of that where loads are narrow


def _num_segments(device: torch.device, num_rows: int, row_bytes: int) -> int:
    return max(1, min(num_rows, backends.rows_at_a_time(device, row_bytes)[0]))


def _lanes(vocab_size: int, width: int) -> dict[str, int]:
    """As chosen, until a step holds the row. Narrow words take more registers: half as many threads."""
    most, warps = _chosen.WALK
    words = vocab_size // 2 if width == 8 else vocab_size
    lanes = max(32, min(triton.next_power_of_2(cdiv(words, TILES.value)), most if width > 1 else most // 2))
    return {"LANES": lanes, "WIDTH": width, "num_warps": max(1, lanes * warps // most)}


def _tile(vocab_size: int, width: int) -> dict[str, int]:
    """32 logits for each thread, or 16 where loads are narrow: as many as registers hold while they are read ahead."""
    per_thread = 32 if width > 1 else 16
    block = max(128, min(triton.next_power_of_2(vocab_size), _BLOCK * per_thread // 32))
    return {"BLOCK": block, "WIDTH": width, "num_warps": min(16, max(1, block // (32 * per_thread)))}


def _evaluated_first(mask: Tensor) -> Tensor:
    """The rows in order, evaluated ones first; and then how many of these there are."""
    num_rows, block = mask.numel(), 4096
    if mask.data_ptr() % 16 != 0:
        mask = mask.clone()
    order = torch.empty(num_rows + 1, dtype=torch.int64, device=mask.device)
    blocks = cdiv(cdiv(num_rows, block), 128)
    programs = cdiv(num_rows, blocks * block)
    launch(_evaluated_first_kernel, programs, mask.device, mask, order, num_rows, blocks, BLOCK=block, num_warps=16)
    return order


def _check_values(
    rows: Tensor | None, token_ids: Tensor, temperature: Tensor, mask: Tensor | None, vocab_size: int
) -> None:
    if not _checks.values_are_free(token_ids):
        return
    if rows is not None:
        count = token_ids.numel()
        bad = (rows < 0) | (rows >= count) | (rows.diff(prepend=rows.new_tensor([-1])) <= 0)
        for row in rows[bad][:1].tolist():
            raise ValueError(f"rows must be ascending positions of tokens, got {row}")
        given = torch.zeros(token_ids.shape, dtype=torch.bool, device=token_ids.device)
        given.view(-1)[rows] = True
        mask = given if mask is None else given & mask
    check_values(vocab_size, token_ids, temperature, mask)


def _decode(parts: list[int], values: list[float], num_tokens: int) -> Objective:
    """Of the objectives, those whose coefficient of a token depends on nothing but itself and the tokens after it."""
    o = decode(parts, values, num_tokens, per_token=False)
    expect(
        o.looks_at == 0 and parts[7] & ~AHEAD.value == 0 and (o.back, o.differentiate) == (0, 0),
        "parts must encode an objective that one pass can compute: nothing in it looks at its sequence but at a "
        "window ahead, and no trace is differentiated",
    )
    return o


def one_pass(
    logits: Tensor,
    out: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    rows: Tensor | None,
    token_ids: Tensor,
    temperature: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logprobs: Tensor | None,
    is_weights: Tensor | None,
    scale: Tensor,
    parts: list[int],
    values: list[float],
    denominator: Tensor | None = None,
) -> None:
    """The operator ``fusedpo::one_pass``."""
    expect(logits.dim() > 0, "rows must have at least one dimension")
    shape, vocab_size = logprobs.shape, logits.shape[-1]
    num_rows = logits.shape[:-1].numel()
    arguments, tokens = Arguments("logprobs", logprobs), token_layout(logprobs, cu_seqlens)
    per_sequence = (tokens.num_sequences, 1)
    arguments.check("logits", logits, LOGITS, (*(shape if rows is None else (rows.numel(),)), vocab_size))
    arguments.check("out", out, (logits.dtype,), logits.shape)
    arguments.write("logprobs", logprobs, FLOAT, shape)
    arguments.write("entropy", entropy, FLOAT, shape)
    order = arguments.read("rows", rows, INT64, (num_rows,))
    token_ids = arguments.read("token_ids", token_ids, INT64, shape)
    temperature = arguments.read("temperature", temperature, FLOAT, (), shape)
    advantages = arguments.read("advantages", advantages, FLOAT, shape, per_sequence)
    mask = arguments.read("mask", mask, BOOL, shape)
    cu_seqlens = arguments.read("cu_seqlens", cu_seqlens, INT64, (tokens.num_sequences + 1,))
    scale = arguments.read("scale", scale, FLOAT, shape, ())
    denominator = arguments.read("denominator", denominator, FLOAT, ())
    given = (
        arguments.read("old_logprobs", old_logprobs, FLOAT, shape),
        arguments.read("ref_logprobs", ref_logprobs, FLOAT, shape),
        arguments.read("is_weights", is_weights, FLOAT, shape, per_sequence),
    )
    o = _decode(parts, values, shape.numel())
    if scale.dim() == 0:
        of_tokens, mean = o.aggregation in (TOKEN_MEAN.value, TOKEN_SUM.value), o.aggregation == TOKEN_MEAN.value
        expect(of_tokens, "scale must be per token unless parts encode a mean or a sum over tokens")
        expect(
            rows is None or not mean or denominator is not None,
            "a mean over tokens of which some are given as rows must have a scale per token or a denominator",
        )
    _check_values(order, token_ids, temperature, mask, vocab_size)
    if logits.numel() == 0:
        return
    if rows is None and mask is not None:
        order = _evaluated_first(mask)
    olp, ref, weights = (logprobs if x is None else x for x in given)

    def run(logits: Tensor, layout: RowLayout, out: Tensor, out_layout: RowLayout) -> None:
        lanes = _lanes(vocab_size, min(row_width(logits, layout), row_width(out, out_layout)))
        num_segments = _num_segments(logits.device, num_rows, vocab_size * logits.element_size())
        halo = min(o.ahead, cdiv(num_rows, num_segments)) if o.ratio == TRACE.value else 0
        for halo_rows, programs in ((halo, halo * (num_segments - 1)), (0, num_segments)):
            if programs == 0:
                continue
            launch(
                _one_pass_kernel,
                programs,
                logits.device,
                logits,
                out,
                logprobs,
                entropy,
                token_ids if order is None else order,
                token_ids,
                temperature,
                olp,
                advantages,
                logits.new_empty(0, dtype=torch.bool) if mask is None else mask,
                cu_seqlens,
                ref,
                weights,
                scale,
                scale if denominator is None else denominator,
                halo_rows,
                num_segments,
                num_rows,
                vocab_size,
                int(order is not None),
                int(rows is not None),
                *tokens,
                *layout,
                out_layout.outer_stride,
                out_layout.inner_stride,
                int(temperature.dim() > 0),
                int(advantages.shape == shape),
                int(weights.shape == shape),
                int(scale.dim() > 0),
                int(denominator is not None),
                int(old_logprobs is not None),
                int(is_weights is not None),
                int(mask is not None),
                *o,
                BONUS=o.entropy_coef != 0,
                CHUNK=_CHUNK,
                alone=True,
                **lanes,
            )

    with_output(logits, out, run)


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """The operator ``fusedpo::scale_``."""
    layout = row_layout(gradient)
    arguments = Arguments("gradient", gradient)
    arguments.check("gradient", gradient, LOGITS, gradient.shape)
    factor = arguments.read("factor", factor, FLOAT, ())
    if layout is None:
        gradient.copy_(gradient.float() * factor)
    elif gradient.numel() > 0:
        vocab_size, num_rows = gradient.shape[-1], gradient.shape[:-1].numel()
        tile = _tile(vocab_size, row_width(gradient, layout))
        launch(
            _scale_kernel, min(num_rows, 1024), gradient.device, gradient, factor, num_rows, vocab_size, *layout, **tile
        )
