"""The policy loss by Triton: two launches forward whatever the objective, none or one backward.

The tokens of a batch lie one after the other, and each sequence is cut into tiles of ``TILE`` positions, the first of
which starts with it. Tile number ``begin // TILE + sequence`` is the first of the sequence that begins there: that
leaves room for all tiles of the sequences before it, so ``num_tokens // TILE + num_sequences`` programs are enough,
and each finds its sequence in ``cu_seqlens`` by itself. Some tiles are empty.

1. ``_tokens_kernel``, a program per tile: reads every array once for the tile, and of its sequence whatever the
   objective needs beyond that (the window of a trace; the mask, to count; all log-ratios, for a mean). Writes loss and
   gradient of each token, still without the scale that the whole batch decides, and ``NUM_ROWS`` statistics.
2. ``_finish_kernel``, a program per row of statistics, and one per tile. All read the counts of the tiles; the
   former add up their row and write metrics and the loss, the latter scale the results of a tile in place, and add
   what reaches its log-probs through the traces of other tokens.

Nothing is atomic and nothing depends on which program comes first. The order of every sum depends on positions within
sequences and on their number in the batch, so padded and packed batches agree bit for bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedpo import _checks
from fusedpo.objectives import AGGREGATION_NUMBERS, KL_KINDS, KL_NUMBERS, RATIOS, TRUST_REGIONS
from fusedpo.reference import METRICS

from .checks import BOOL, FLOAT, INT64, WHOLE, Arguments, dims, expect, in_range, packed
from .common import kernel, launch, sum_where
from .objective import (
    EVERYTHING,
    PLACE,
    PREFIX,
    SEQ_MEAN_TOKEN_MEAN,
    SEQ_MEAN_TOKEN_SUM_NORM,
    SEQUENCE,
    SEQUENCE_RATIO,
    TOKEN_MEAN,
    TOKEN_SUM,
    TRACE,
    Objective,
    Token,
    evaluate,
    exp,
    exp_minus_1_minus,
    log_ratio,
    log_ratio_passes,
    summand,
)

MINUS_INF = tl.constexpr(float("-inf"))

# Rows of the statistics: the metrics in their order, as sums over a tile or as its maximum, and what else is needed.
TOKENS, CLIPPED, CLIPPED_LOW, CLIPPED_HIGH = map(tl.constexpr, range(4))
RATIO, MINUS_RATIO_MAX, RATIO_MAX, TRACES, MINUS_TRACE_MAX, TRACE_MAX = map(tl.constexpr, range(4, 10))
MINUS_LOG_RATIO, APPROX_K3, KL, ENTROPY, WEIGHT, CLAMPED = map(tl.constexpr, range(10, 16))
LOSS, SQUARED_WEIGHT, SEQUENCES, NUM_ROWS = map(tl.constexpr, range(16, 20))
NUM_REDUCERS = tl.constexpr(LOSS.value + 1)
assert len(METRICS) == LOSS.value


# ---------------------------------------------------------------------------------------------------- tokens and tiles


class Tokens(NamedTuple):
    """Where the log-ratios of a batch are."""

    logprobs: Any
    old_logprobs: Any
    mask: Any


class Weights(NamedTuple):
    """Values per token, or one per sequence."""

    array: Any
    per_token: Any


class Tile(NamedTuple):
    """TILE positions from ``first`` on, of a sequence with ``before`` positions before and ``left`` from there on."""

    sequence: Any
    first: Any  # 64 bits; positions are 32-bit offsets to it
    before: Any
    left: Any


@triton.jit
def _begin(cu_seqlens, sequence, exists, width):
    """Where a sequence begins; rows of a padded batch are ``width`` apart."""
    if cu_seqlens is None:
        begin = sequence.to(tl.int64) * width
    else:  # packed tokens are one row; offsets that are none give results without meaning, of tokens in it
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence, mask=exists, other=0), 0), width)
    return begin


@triton.jit
def _find_tile(index, cu_seqlens, num_sequences, width, TILE: tl.constexpr, CHUNK: tl.constexpr):
    begun = 0  # sequences whose first tile is this one or an earlier one
    for start in range(0, num_sequences, CHUNK):
        s = start + tl.arange(0, CHUNK)
        exists = s < num_sequences
        first_tile = _begin(cu_seqlens, s, exists, width) // TILE + s
        begun += tl.sum((exists & (first_tile <= index)).to(tl.int32), 0)
    sequence = begun - 1
    begin = _begin(cu_seqlens, sequence, begun > 0, width)
    end = _begin(cu_seqlens, sequence + 1, begun > 0, width)
    first = begin + (index - begin // TILE - sequence) * TILE
    there = (first >= begin) & (first < end)  # otherwise the tile is empty
    before, left = tl.where(there, first - begin, 0), tl.where(there, end - first, 0)
    return Tile(tl.maximum(sequence, 0), tl.where(there, first, 0), before.to(tl.int32), left.to(tl.int32))


@triton.jit
def _kept(mask, tile, offset, inside):
    """Which positions the mask keeps, of those inside."""
    if mask is not None:
        inside = inside & (tl.load(mask + tile.first + offset, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _load(values, tile, offset, kept):
    return tl.load(values + tile.first + offset, mask=kept, other=0.0)


@triton.jit
def _load_weights(weights, tile, offset, kept, other):
    base = weights.array + tl.where(weights.per_token != 0, tile.first, tile.sequence)
    return tl.load(base + tl.where(weights.per_token != 0, offset, 0), mask=kept, other=other)


@triton.jit
def only_if(flag, mask):
    """The mask, or none of it. (``mask & (flag != 0)`` fails in the interpreter.)"""
    return mask & (tl.full(mask.shape, flag, tl.int32) != 0)


# ------------------------------------------------------------------------------------------------------------- windows


class Traced(NamedTuple):
    """What is summed over windows: log-ratios; or, if not None, ``grad_log_trace``, times ``grad_loss`` if not None."""

    tokens: Any
    grad_log_trace: Any
    grad_loss: Any


@triton.jit
def _value(x, tile, offset, inside):
    """The value at ``offset`` from the tile, 0 where masked, not ``inside``, or beyond the sequence."""
    kept = _kept(x.tokens.mask, tile, offset, inside & (offset >= -tile.before) & (offset < tile.left))
    if x.grad_log_trace is None:
        logprob = _load(x.tokens.logprobs, tile, offset, kept)
        value = log_ratio(logprob, _load(x.tokens.old_logprobs, tile, offset, kept))
    else:
        value = _load(x.grad_log_trace, tile, offset, kept)
        if x.grad_loss is not None:
            value *= _load(x.grad_loss, tile, offset, kept)
    return value


@triton.jit
def _sum_one_way(x, tile, count, STEP: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """For each position of the tile, the sum over the next (STEP = 1) or the previous (-1) ``count`` positions.

    Nothing is ever subtracted, so nothing cancels and a NaN stays in the windows that hold it. Short windows are summed
    afresh for each position, together with the roundings: the error is at most 2 u sum|x|, u the unit roundoff. Long
    ones reach beyond the tile: the rest of the tile by a scan, what lies in the windows of all its positions by a sum,
    and what lies in those of some by another scan. Each value passes through no more than
    2 log2(TILE) + log2(CHUNK) + length of the sequence / CHUNK additions.
    """
    i = tl.arange(0, TILE)
    NEAR: tl.constexpr = 0 if STEP == 1 else TILE - 1  # the ends of the tile: windows go from near to far
    FAR: tl.constexpr = TILE - 1 - NEAR
    reach = tl.minimum(count, tile.left - 1 if STEP == 1 else tile.before + TILE - 1)
    total = tl.zeros([TILE], tl.float32)
    if count < TILE:
        roundings = total
        for k in range(1, reach + 1):
            value = _value(x, tile, i + STEP * k, i >= 0)
            before = total
            total += value
            added = total - before
            roundings += (before - (total - added)) + (value - added)
        total += roundings
    else:
        shared = tl.zeros([CHUNK], tl.float32)
        for start in range(TILE, reach + 1, CHUNK):
            k = start + tl.arange(0, CHUNK)
            shared += _value(x, tile, NEAR + STEP * k, k <= count)
        total = tl.cumsum(_value(x, tile, i + STEP, i != FAR), 0, reverse=STEP == 1)
        total += tl.cumsum(_value(x, tile, i + STEP * count, i != NEAR), 0, reverse=STEP == -1)
        total += tl.sum(shared, 0)
    return total


@triton.jit
def _sum_of_window(x, tile, back, ahead, TILE: tl.constexpr, CHUNK: tl.constexpr):
    total = _sum_one_way(x, tile, ahead, 1, TILE, CHUNK)
    return total + _sum_one_way(x, tile, back, -1, TILE, CHUNK)


@triton.jit
def _through_traces(x, tile, back, ahead, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """The gradient that reaches log-probs through traces: a token is in the windows of those that reach it."""
    reaching = _sum_of_window(x, tile, ahead, back, TILE, CHUNK)
    i = tl.arange(0, TILE)
    kept = _kept(x.tokens.mask, tile, i, i < tile.left)
    passes = log_ratio_passes(_load(x.tokens.logprobs, tile, i, kept), _load(x.tokens.old_logprobs, tile, i, kept))
    return tl.where(kept & passes, reaching, 0.0)


# ----------------------------------------------------------------------------------- what tokens know of their sequence


@triton.jit
def _places(kept, before):
    """Which of the kept tokens of its sequence each token is, from 1, where ``before`` come before all of these."""
    return tl.maximum(before + tl.cumsum(kept.to(tl.int32), 0), 1).to(tl.float32)


@triton.jit
def _count_kept(o, mask, tile, CHUNK: tl.constexpr):
    """How many tokens the sequence keeps before the tile, and in all of it, if the objective needs to know."""
    of_sequences = (o.aggregation != TOKEN_MEAN) & (o.aggregation != TOKEN_SUM)
    needs_place = (o.looks_at & PLACE) != 0
    needs_length = ((o.looks_at & (PREFIX | SEQUENCE)) != 0) | (o.ratio == SEQUENCE_RATIO) | of_sequences
    if mask is None:
        before, count = tile.before, tile.before + tile.left
    else:
        counts_before = tl.zeros([CHUNK], tl.int32)
        counts = tl.zeros([CHUNK], tl.int32)
        stop = tl.where(needs_length, tile.left, tl.where(needs_place, tl.minimum(tile.left, 0), -tile.before))
        for start in range(-tile.before, stop, CHUNK):
            offset = start + tl.arange(0, CHUNK)
            there = _kept(mask, tile, offset, offset < stop).to(tl.int32)
            counts_before += tl.where(offset < 0, there, 0)
            counts += there
        before, count = tl.sum(counts_before, 0), tl.sum(counts, 0)
    return before, count


@triton.jit
def _sum_sequence(o, tokens, advantages, tile, length, CHUNK: tl.constexpr):
    """The sums of the log-ratios, and of what the trust region sums: over the sequence, or before the tile."""
    log_ratios = tl.zeros([CHUNK], tl.float32)
    summands = tl.zeros([CHUNK], tl.float32)
    before = 0
    until_tile = tl.minimum(tile.left, 0)  # a tile may begin after the end of its sequence
    needs_all = ((o.looks_at & SEQUENCE) != 0) | (o.ratio == SEQUENCE_RATIO)
    stop = tl.where(needs_all, tile.left, tl.where((o.looks_at & PREFIX) != 0, until_tile, -tile.before))
    for start in range(-tile.before, stop, CHUNK):
        offset = start + tl.arange(0, CHUNK)
        kept = _kept(tokens.mask, tile, offset, offset < stop)
        x = _bare_token(tokens, advantages, tile, offset, kept, _places(kept, before), length)
        log_ratios += log_ratio(x.logprob, x.old_logprob)
        summands += tl.where(kept, summand(o, x), 0.0)
        before += tl.sum(kept.to(tl.int32), 0)
    return tl.sum(log_ratios, 0), tl.sum(summands, 0)


@triton.jit
def _bare_token(tokens, advantages, tile, offset, kept, place, length):
    logprob = _load(tokens.logprobs, tile, offset, kept)
    old_logprob = _load(tokens.old_logprobs, tile, offset, kept)
    advantage = _load_weights(advantages, tile, offset, kept, 0.0)
    zero = tl.zeros_like(logprob)
    return Token(logprob, old_logprob, zero, advantage, zero, zero, zero, place, length, zero)


# ------------------------------------------------------------------------------------------------- loss of every token


@kernel
def _tokens_kernel(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    cu_seqlens,
    ref_logprobs,
    entropies,
    is_weights,
    loss,
    grad_logprobs,
    grad_entropy,
    grad_log_trace,
    statistics,
    num_sequences,
    width,
    advantage_per_token,
    is_weight_per_token,
    has_is_weights,
    has_entropy,
    has_entropy_gradient,
    per_token,
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
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
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
    tokens = Tokens(logprobs, old_logprobs, mask)
    weights = Weights(advantages, advantage_per_token)
    tile = _find_tile(tl.program_id(0), cu_seqlens, num_sequences, width, TILE, CHUNK)
    i = tl.arange(0, TILE)
    inside = i < tile.left
    kept = _kept(mask, tile, i, inside)

    before, count = _count_kept(o, mask, tile, CHUNK)
    length = tl.maximum(count, 1).to(tl.float32)
    log_ratios, summands = _sum_sequence(o, tokens, weights, tile, length, CHUNK)
    x = _bare_token(tokens, weights, tile, i, kept, _places(kept, before), length)
    log_trace = x.log_trace
    sequence_sum = x.sequence_sum
    if o.ratio == TRACE:
        log_trace = _sum_of_window(Traced(tokens, None, None), tile, o.back, o.ahead, TILE, CHUNK)
    elif o.ratio == SEQUENCE_RATIO:
        log_trace += log_ratios / length
    if (o.looks_at & SEQUENCE) != 0:
        sequence_sum += summands / length
    elif (o.looks_at & PREFIX) != 0:
        sequence_sum = summands + tl.cumsum(tl.where(kept, summand(o, x), 0.0), 0)

    ref_logprob = _load(ref_logprobs, tile, i, only_if(o.kl, kept))
    entropy = _load(entropies, tile, i, only_if(has_entropy, kept))
    is_weight = _load_weights(Weights(is_weights, is_weight_per_token), tile, i, only_if(has_is_weights, kept), 1.0)
    x = Token(
        x.logprob,
        x.old_logprob,
        ref_logprob,
        x.advantage,
        is_weight,
        entropy,
        log_trace,
        x.place,
        x.length,
        sequence_sum,
    )
    result = evaluate(o, x)
    share = 1 / tl.where(o.aggregation == SEQ_MEAN_TOKEN_MEAN, length, 1.0)
    d_logprob = tl.where(kept, share * result.d_logprob, 0.0)
    d_log_trace = tl.where(kept, share * result.d_log_trace, 0.0)
    d_entropy = tl.where(kept, -share * entropy_coef, 0.0)
    tl.store(loss + tile.first + i, tl.where(kept, result.loss, 0.0), mask=only_if(per_token, inside))
    tl.store(grad_logprobs + tile.first + i, d_logprob, mask=inside)
    tl.store(grad_log_trace + tile.first + i, d_log_trace, mask=only_if(differentiate, inside))
    tl.store(grad_entropy + tile.first + i, d_entropy, mask=only_if(has_entropy_gradient, inside))
    _store_statistics(statistics, result, entropy, kept, share, (tile.before == 0) & (count > 0))


@triton.jit
def _store_statistics(statistics, result, entropy, kept, share, opens_sequence):
    w = result.weight
    weight = w.ratio * w.trace
    k3 = exp_minus_1_minus(w.log_ratio, exp(w.log_ratio))
    ratios = sum_where(kept, w.ratio, 0)
    traces = sum_where(kept, w.trace, 0)
    out = statistics + tl.program_id(0)
    row = tl.num_programs(0)
    tl.store(out + TOKENS * row, tl.sum(kept.to(tl.float32), 0))
    tl.store(out + CLIPPED * row, tl.sum((kept & (result.low | result.high)).to(tl.float32), 0))
    tl.store(out + CLIPPED_LOW * row, tl.sum((kept & result.low).to(tl.float32), 0))
    tl.store(out + CLIPPED_HIGH * row, tl.sum((kept & result.high).to(tl.float32), 0))
    # a maximum may pass over a NaN, 0 times a sum does not
    tl.store(out + RATIO * row, ratios)
    tl.store(out + MINUS_RATIO_MAX * row, tl.max(tl.where(kept, -w.ratio, MINUS_INF), 0) + 0 * ratios)
    tl.store(out + RATIO_MAX * row, tl.max(tl.where(kept, w.ratio, MINUS_INF), 0) + 0 * ratios)
    tl.store(out + TRACES * row, traces)
    tl.store(out + MINUS_TRACE_MAX * row, tl.max(tl.where(kept, -w.trace, MINUS_INF), 0) + 0 * traces)
    tl.store(out + TRACE_MAX * row, tl.max(tl.where(kept, w.trace, MINUS_INF), 0) + 0 * traces)
    tl.store(out + MINUS_LOG_RATIO * row, sum_where(kept, -w.log_ratio, 0))
    tl.store(out + APPROX_K3 * row, sum_where(kept, k3, 0))
    tl.store(out + KL * row, sum_where(kept, result.kl, 0))
    tl.store(out + ENTROPY * row, tl.sum(entropy, 0))
    tl.store(out + WEIGHT * row, sum_where(kept, weight, 0))
    tl.store(out + CLAMPED * row, tl.sum((kept & w.clamped).to(tl.float32), 0))
    tl.store(out + LOSS * row, sum_where(kept, share * result.loss, 0))
    tl.store(out + SQUARED_WEIGHT * row, sum_where(kept, weight * weight, 0))
    tl.store(out + SEQUENCES * row, opens_sequence.to(tl.float32))


# --------------------------------------------------------------------------------------------------- scale and metrics


@triton.jit
def _counts(statistics, num_tiles, CHUNK: tl.constexpr):
    """Kept tokens, and sequences with any; exact."""
    tokens = tl.zeros([CHUNK], tl.int32)
    sequences = tl.zeros([CHUNK], tl.int32)
    for start in range(0, num_tiles, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        exists = tile < num_tiles
        tokens += tl.load(statistics + TOKENS * num_tiles + tile, mask=exists, other=0.0).to(tl.int32)
        sequences += tl.load(statistics + SEQUENCES * num_tiles + tile, mask=exists, other=0.0).to(tl.int32)
    return tl.sum(tokens, 0).to(tl.float32), tl.sum(sequences, 0).to(tl.float32)


@triton.jit
def _longest(cu_seqlens, num_sequences, width, CHUNK: tl.constexpr):
    """The length of the longest sequence, at least 1."""
    longest = tl.full([CHUNK], 1, tl.int64)
    for start in range(0, num_sequences, CHUNK):
        s = start + tl.arange(0, CHUNK)
        exists = s < num_sequences
        length = _begin(cu_seqlens, s + 1, exists, width) - _begin(cu_seqlens, s, exists, width)
        longest = tl.maximum(longest, tl.where(exists, length, 1))
    return tl.max(longest, 0).to(tl.float32)


@triton.jit
def _batch_scale(
    denominator,
    has_denominator,
    loss_scale,
    tokens,
    sequences,
    cu_seqlens,
    num_sequences,
    width,
    aggregation,
    length_norm,
    CHUNK: tl.constexpr,
):
    """What the loss of every token is multiplied by, beside its share in a mean over its sequence."""
    scale = tl.load(loss_scale)
    if aggregation != TOKEN_SUM:
        count = tl.where(aggregation == TOKEN_MEAN, tokens, sequences)
        if has_denominator != 0:
            count = tl.load(denominator)
        scale /= tl.where(count == 0, 1.0, count)
    if aggregation == SEQ_MEAN_TOKEN_SUM_NORM:
        norm = length_norm
        if norm == 0:
            norm = _longest(cu_seqlens, num_sequences, width, CHUNK)
        scale /= norm
    return scale


@triton.jit
def _add_up(statistics, row, cu_seqlens, num_sequences, width, num_tiles, TILE: tl.constexpr):
    """Sum and maximum of a row over all tiles, and 2^-10 times the sum of the squared weights, lest that overflow.

    A lane takes every 8th tile of every 128th sequence: tiles that only one of two layouts has, and that hold no
    tokens, do not move the others to other lanes.
    """
    sums = tl.zeros([128, 8], tl.float32)
    tops = tl.full([128, 8], MINUS_INF, tl.float32)
    squares = tl.zeros([128, 8], tl.float32)
    for start in range(0, num_sequences, 128):
        s = start + tl.arange(0, 128)
        exists = s < num_sequences
        begin = _begin(cu_seqlens, s, exists, width)
        size = tl.cdiv(_begin(cu_seqlens, s + 1, exists, width) - begin, TILE)
        first_tile = begin // TILE + s
        for first in range(0, tl.max(tl.where(exists, size, 0), 0), 8):
            k = first + tl.arange(0, 8)[None, :]
            tile = first_tile[:, None] + k
            there = exists[:, None] & (k < size[:, None])
            squares += 2.0**-10 * tl.load(statistics + SQUARED_WEIGHT * num_tiles + tile, mask=there, other=0.0)
            value = tl.load(statistics + row * num_tiles + tile, mask=there, other=0.0)
            sums += value
            tops = tl.maximum(tops, tl.where(there, value, MINUS_INF))
    return tl.sum(tl.sum(sums, 1), 0), tl.max(tl.max(tops, 1), 0), tl.sum(tl.sum(squares, 1), 0)


@kernel
def _finish_kernel(
    logprobs,
    old_logprobs,
    mask,
    cu_seqlens,
    denominator,
    loss_scale,
    statistics,
    loss,
    metrics,
    grad_logprobs,
    grad_entropy,
    grad_log_trace,
    num_sequences,
    width,
    num_tiles,
    has_denominator,
    has_entropy_gradient,
    per_token,
    back,
    ahead,
    differentiate,
    aggregation,
    length_norm,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    index = tl.program_id(0)
    tokens, sequences = _counts(statistics, num_tiles, CHUNK)
    scale = _batch_scale(
        denominator,
        has_denominator,
        loss_scale,
        tokens,
        sequences,
        cu_seqlens,
        num_sequences,
        width,
        aggregation,
        length_norm,
        CHUNK,
    )

    if index < NUM_REDUCERS:
        row = index
        total, top, squares = _add_up(statistics, row, cu_seqlens, num_sequences, width, num_tiles, TILE)
        top = tl.where(total == total, top, total)
        mean = total / tl.maximum(tokens, 1.0)
        value = tl.where((row == RATIO_MAX) | (row == TRACE_MAX), top, mean)
        value = tl.where((row == MINUS_RATIO_MAX) | (row == MINUS_TRACE_MAX), -top, value)
        value = tl.where(row == WEIGHT, mean * (total / squares) * 2.0**-10, value)  # the effective sample size
        value = tl.where(row == TOKENS, tokens, value)
        if row < LOSS:
            tl.store(metrics + row, tl.where(tokens > 0, value, 0.0))
        elif per_token == 0:
            tl.store(loss, scale * total)
    else:
        tile = _find_tile(index - NUM_REDUCERS, cu_seqlens, num_sequences, width, TILE, CHUNK)
        i = tl.arange(0, TILE)
        inside = i < tile.left
        gradient = _load(grad_logprobs, tile, i, inside)
        if per_token != 0:
            _scale(loss + tile.first + i, scale, inside)
            if differentiate != 0:
                _scale(grad_log_trace + tile.first + i, scale, inside)
        elif differentiate != 0:
            traced = Traced(Tokens(logprobs, old_logprobs, mask), grad_log_trace, None)
            gradient += _through_traces(traced, tile, back, ahead, TILE, CHUNK)
        tl.store(grad_logprobs + tile.first + i, scale * gradient, mask=inside)
        if has_entropy_gradient != 0:
            _scale(grad_entropy + tile.first + i, scale, inside)


@triton.jit
def _scale(pointers, scale, inside):
    tl.store(pointers, scale * tl.load(pointers, mask=inside, other=0.0), mask=inside)


# --------------------------------------------------------------------------------------------------------- scale alone


@kernel
def _shares_kernel(
    mask,
    cu_seqlens,
    shares,
    statistics,
    num_sequences,
    width,
    aggregation,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The share of each token in the mean over its sequence, and the counts of each tile."""
    tile = _find_tile(tl.program_id(0), cu_seqlens, num_sequences, width, TILE, CHUNK)
    i = tl.arange(0, TILE)
    kept = _kept(mask, tile, i, i < tile.left)
    count = 0
    for start in range(-tile.before, tile.left, CHUNK):
        offset = start + tl.arange(0, CHUNK)
        count += tl.sum(_kept(mask, tile, offset, offset < tile.left).to(tl.int32), 0)
    share = 1 / tl.where(aggregation == SEQ_MEAN_TOKEN_MEAN, tl.maximum(count, 1).to(tl.float32), 1.0)
    tl.store(shares + tile.first + i, tl.where(kept, share, 0.0), mask=i < tile.left)
    out = statistics + tl.program_id(0)
    tl.store(out + TOKENS * tl.num_programs(0), tl.sum(kept.to(tl.float32), 0))
    tl.store(out + SEQUENCES * tl.num_programs(0), ((tile.before == 0) & (count > 0)).to(tl.float32))


@kernel
def _scale_shares_kernel(
    cu_seqlens,
    denominator,
    loss_scale,
    statistics,
    shares,
    num_sequences,
    width,
    num_tiles,
    has_denominator,
    aggregation,
    length_norm,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    tokens, sequences = _counts(statistics, num_tiles, CHUNK)
    scale = _batch_scale(
        denominator,
        has_denominator,
        loss_scale,
        tokens,
        sequences,
        cu_seqlens,
        num_sequences,
        width,
        aggregation,
        length_norm,
        CHUNK,
    )
    tile = _find_tile(tl.program_id(0), cu_seqlens, num_sequences, width, TILE, CHUNK)
    i = tl.arange(0, TILE)
    _scale(shares + tile.first + i, scale, i < tile.left)


# ------------------------------------------------------------------------------------------------------------ backward


@kernel
def _backward_kernel(
    grad_loss,
    grad_logprobs,
    grad_log_trace,
    logprobs,
    old_logprobs,
    mask,
    cu_seqlens,
    result,
    num_sequences,
    width,
    back,
    ahead,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The gradient of losses per token, one of which a log-prob may be in by itself and by the traces of others."""
    tile = _find_tile(tl.program_id(0), cu_seqlens, num_sequences, width, TILE, CHUNK)
    traced = Traced(Tokens(logprobs, old_logprobs, mask), grad_log_trace, grad_loss)
    gradient = _through_traces(traced, tile, back, ahead, TILE, CHUNK)
    i = tl.arange(0, TILE)
    kept = _kept(mask, tile, i, i < tile.left)
    gradient += _load(grad_logprobs, tile, i, kept) * _load(grad_loss, tile, i, kept)
    tl.store(result + tile.first + i, gradient, mask=i < tile.left)


# ------------------------------------------------------------------------------------------------------------ launchers

_TILE = 512
_CONSTANTS = {"CHUNK": 256, "num_warps": 4}


class TokenLayout(NamedTuple):
    num_sequences: int
    width: int  # of the rows of a padded batch

    def num_tiles(self, num_tokens: int) -> int:
        return num_tokens // _TILE + self.num_sequences


def token_layout(logprobs: Tensor, cu_seqlens: Tensor | None) -> TokenLayout:
    dims("logprobs", logprobs, 1, 2)
    width = logprobs.shape[-1]
    if cu_seqlens is None:
        return TokenLayout(logprobs.shape[0] if logprobs.dim() == 2 else 1, width)
    sequences = packed(cu_seqlens, logprobs.shape)
    _checks.cu_seqlens(cu_seqlens, logprobs.numel(), "logprobs", logprobs)
    return TokenLayout(sequences, width)


def decode(parts: list[int], values: list[float], num_tokens: int, per_token: bool) -> Objective:
    """The objective as the kernels take it. Losses per token are not aggregated: they are summed with no weight."""
    expect(len(parts) == 9, f"parts must hold 9 numbers, got {len(parts)}")
    in_range("the length of values", len(values), 4, 9)
    ratio, back, ahead, differentiate, trust_region, kl, aggregation, ratio_looks_at, looks_at = parts
    in_range("parts[0], the ratio,", ratio, 0, max(RATIOS.values()))
    in_range("parts[1], the positions back,", back, 0, WHOLE)
    in_range("parts[2], the positions ahead,", ahead, 0, WHOLE)
    in_range("parts[3], differentiate,", differentiate, 0, 1)
    in_range("parts[4], the trust region,", trust_region, 0, max(TRUST_REGIONS.values()))
    in_range("parts[5], the KL,", kl, 0, max(KL_NUMBERS.values()) + len(KL_KINDS))
    in_range("parts[6], the aggregation,", aggregation, 0, max(AGGREGATION_NUMBERS.values()))
    in_range("parts[7], what the ratio looks at,", ratio_looks_at, 0, EVERYTHING.value)
    in_range("parts[8], what the trust region looks at,", looks_at, 0, EVERYTHING.value)
    values = [math.inf if value >= _checks.FLOAT32_MAX else value for value in values]  # as AOTInductor writes infinity
    bounds = values[4:] + [0.0] * (9 - len(values))
    return Objective(
        ratio,
        min(back, num_tokens),
        min(ahead, num_tokens),
        differentiate,
        trust_region,
        kl,
        TOKEN_SUM.value if per_token else aggregation,
        looks_at,
        *values[:4],
        *bounds,
    )


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logprobs: Tensor | None,
    is_weights: Tensor | None,
    denominator: Tensor | None,
    loss_scale: Tensor,
    parts: list[int],
    values: list[float],
    per_token: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator ``fusedpo::policy_loss``."""
    shape = logprobs.shape
    layout = token_layout(logprobs, cu_seqlens)
    num_tiles = layout.num_tiles(shape.numel())
    o = decode(parts, values, shape.numel(), per_token)
    arguments, per_sequence = Arguments("logprobs", logprobs), (layout.num_sequences, 1)
    x = arguments.read("logprobs", logprobs, FLOAT, shape)
    mask = arguments.read("mask", mask, BOOL, shape)
    cu_seqlens = arguments.read("cu_seqlens", cu_seqlens, INT64, (layout.num_sequences + 1,))
    advantages = arguments.read("advantages", advantages, FLOAT, shape, per_sequence)
    denominator = arguments.read("denominator", denominator, FLOAT, ())
    loss_scale = arguments.read("loss_scale", loss_scale, FLOAT, ())
    # An array that was not given is another one, which is not read: its absence is a number, not a variant to compile.
    given = (
        arguments.read("old_logprobs", old_logprobs, FLOAT, shape),
        arguments.read("ref_logprobs", ref_logprobs, FLOAT, shape),
        arguments.read("entropy", entropy, FLOAT, shape),
        arguments.read("is_weights", is_weights, FLOAT, shape, per_sequence),
    )
    old_logprobs, ref_logprobs, entropies, weights = (x if array is None else array for array in given)

    loss = logprobs.new_empty(shape if per_token else ())
    metrics = logprobs.new_empty(len(METRICS))
    grad_logprobs = logprobs.new_empty(shape)
    grad_entropy = logprobs.new_empty(shape if o.entropy_coef != 0 else (0,))
    grad_log_trace = logprobs.new_empty(shape if o.differentiate else (0,))
    statistics = logprobs.new_empty(NUM_ROWS.value * num_tiles)
    launch(
        _tokens_kernel,
        num_tiles,
        logprobs.device,
        x,
        old_logprobs,
        advantages,
        mask,
        cu_seqlens,
        ref_logprobs,
        entropies,
        weights,
        loss,
        grad_logprobs,
        grad_entropy,
        grad_log_trace,
        statistics,
        *layout,
        int(advantages.shape == shape),
        int(weights.shape == shape),
        int(is_weights is not None),
        int(entropy is not None),
        int(o.entropy_coef != 0),
        int(per_token),
        *o,
        TILE=_TILE,
        **_CONSTANTS,
    )
    launch(
        _finish_kernel,
        NUM_REDUCERS.value + num_tiles,
        logprobs.device,
        x,
        old_logprobs,
        mask,
        cu_seqlens,
        loss_scale if denominator is None else denominator,
        loss_scale,
        statistics,
        loss,
        metrics,
        grad_logprobs,
        grad_entropy,
        grad_log_trace,
        *layout,
        num_tiles,
        int(denominator is not None),
        int(o.entropy_coef != 0),
        int(per_token),
        o.back,
        o.ahead,
        o.differentiate,
        o.aggregation,
        o.length_norm,
        TILE=_TILE,
        **_CONSTANTS,
    )
    return loss, metrics, grad_logprobs, grad_entropy, grad_log_trace if per_token else logprobs.new_empty(0)


def policy_loss_backward(
    grad_loss: Tensor,
    grad_logprobs: Tensor,
    grad_log_trace: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    back: int,
    ahead: int,
) -> Tensor:
    """The operator ``fusedpo::policy_loss_backward``."""
    layout = token_layout(logprobs, cu_seqlens)
    arguments, shape = Arguments("logprobs", logprobs), logprobs.shape
    in_range("back", back, 0, WHOLE)
    in_range("ahead", ahead, 0, WHOLE)
    x = arguments.read("logprobs", logprobs, FLOAT, shape)
    result = torch.empty_like(x)
    launch(
        _backward_kernel,
        layout.num_tiles(logprobs.numel()),
        logprobs.device,
        arguments.read("grad_loss", grad_loss, FLOAT, shape),
        arguments.read("grad_logprobs", grad_logprobs, FLOAT, shape),
        arguments.read("grad_log_trace", grad_log_trace, FLOAT, shape),
        x,
        arguments.read("old_logprobs", x if old_logprobs is None else old_logprobs, FLOAT, shape),
        arguments.read("mask", mask, BOOL, shape),
        arguments.read("cu_seqlens", cu_seqlens, INT64, (layout.num_sequences + 1,)),
        result,
        *layout,
        min(back, logprobs.numel()),
        min(ahead, logprobs.numel()),
        TILE=_TILE,
        **_CONSTANTS,
    )
    return result


def token_scale(
    logprobs: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    denominator: Tensor | None,
    loss_scale: Tensor,
    aggregation: int,
    length_norm: float,
) -> Tensor:
    """The operator ``fusedpo::token_scale``."""
    layout = token_layout(logprobs, cu_seqlens)
    num_tiles = layout.num_tiles(logprobs.numel())
    arguments, shape = Arguments("logprobs", logprobs), logprobs.shape
    in_range("aggregation", aggregation, TOKEN_MEAN.value, SEQ_MEAN_TOKEN_SUM_NORM.value)
    arguments.check("logprobs", logprobs, FLOAT, shape)
    cu_seqlens = arguments.read("cu_seqlens", cu_seqlens, INT64, (layout.num_sequences + 1,))
    denominator = arguments.read("denominator", denominator, FLOAT, ())
    loss_scale = arguments.read("loss_scale", loss_scale, FLOAT, ())
    result = logprobs.new_empty(shape)
    statistics = logprobs.new_empty(NUM_ROWS.value * num_tiles)
    launch(
        _shares_kernel,
        num_tiles,
        logprobs.device,
        arguments.read("mask", mask, BOOL, shape),
        cu_seqlens,
        result,
        statistics,
        *layout,
        aggregation,
        TILE=_TILE,
        **_CONSTANTS,
    )
    launch(
        _scale_shares_kernel,
        num_tiles,
        logprobs.device,
        cu_seqlens,
        loss_scale if denominator is None else denominator,
        loss_scale,
        statistics,
        result,
        *layout,
        num_tiles,
        int(denominator is not None),
        aggregation,
        float(length_norm),
        TILE=_TILE,
        **_CONSTANTS,
    )
    return result
