"""The policy loss by Triton: two launches forward whatever the objective, none or one backward.

The tokens of a batch lie one after the other, and each sequence is cut into tiles of ``TILE`` positions, the first of
which starts with it. Tile number ``begin // TILE + sequence`` is the first of the sequence that begins there: that
leaves room for all tiles of the sequences before it, so ``num_tokens // TILE + num_sequences`` programs are enough,
and each finds its sequence in ``cu_seqlens`` by itself. Some tiles are empty.

1. ``_tokens_kernel``, a program per tile: reads every array once for the tile, and of its sequence whatever the
   objective needs beyond that (the window of a trace; the mask, to count; all log-ratios, for a mean). Writes loss and
   gradient of each token, still without the scale that the whole batch decides, and a column of ``NUM_ROWS`` statistics.
2. ``_finish_kernel``, a program per metric, one for the loss, and one per tile. All read the counts of the tiles; the
   former add up a row of statistics and write a number, the latter scale the results of a tile in place, and add what
   reaches its log-probs through the traces of other tokens.

Nothing is atomic and nothing depends on which program comes first. The order of every sum depends on positions within
sequences and on their number in the batch, so padded and packed batches agree bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fusedpo import _checks
from fusedpo.reference import METRICS

from .common import kernel, launch
from .objective import (
    CPPO,
    GMPO,
    LOG_CLIP,
    SEQ_MEAN_TOKEN_MEAN,
    SEQ_MEAN_TOKEN_SUM_NORM,
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
    log_ratio_live,
    summand,
)

MINUS_INF = tl.constexpr(float("-inf"))
NAN = tl.constexpr(float("nan"))

# Rows of the statistics: the metrics in their order, as sums over a tile or as its maximum, and what else is needed.
NUM_METRICS = tl.constexpr(16)
TOKENS, CLIPPED, CLIPPED_LOW, CLIPPED_HIGH = map(tl.constexpr, range(4))
RATIO, MINUS_RATIO_MAX, RATIO_MAX, TRACES, MINUS_TRACE_MAX, TRACE_MAX = map(tl.constexpr, range(4, 10))
MINUS_LOG_RATIO, APPROX_K3, KL, ENTROPY, WEIGHT, CLAMPED = map(tl.constexpr, range(10, 16))
LOSS, SQUARED_WEIGHT, WEIGHT_MAX, SEQUENCES, NUM_ROWS = map(tl.constexpr, range(16, 21))
assert len(METRICS) == NUM_METRICS.value


# ---------------------------------------------------------------------------------------------------- tokens and tiles


class Tokens(NamedTuple):
    """Where the tokens of a batch are."""

    logprobs: Any
    old_logprobs: Any
    mask: Any


class Tile(NamedTuple):
    """Positions [first, end) of a sequence, the first TILE of them; the sequence is [begin, end)."""

    sequence: Any
    begin: Any
    end: Any
    first: Any


@triton.jit
def _begin(cu_seqlens, sequence, exists, width):
    """Where a sequence begins; rows of a padded batch are ``width`` apart."""
    if cu_seqlens is None:
        begin = sequence.to(tl.int64) * width
    else:
        begin = tl.load(cu_seqlens + sequence, mask=exists, other=0)
    return begin


@triton.jit
def _find_tile(index, cu_seqlens, num_sequences, width, TILE: tl.constexpr, CHUNK: tl.constexpr):
    lanes = tl.arange(0, CHUNK)
    begun = 0  # sequences whose first tile is this one or an earlier one
    for start in range(0, num_sequences, CHUNK):
        s = start + lanes
        exists = s < num_sequences
        first_tile = _begin(cu_seqlens, s, exists, width) // TILE + s
        begun += tl.sum((exists & (first_tile <= index)).to(tl.int32), 0)
    sequence = begun - 1
    begin = _begin(cu_seqlens, sequence, True, width)
    end = _begin(cu_seqlens, sequence + 1, True, width)
    return Tile(sequence, begin, end, begin + (index - begin // TILE - sequence) * TILE)


@triton.jit
def _kept(mask, position, inside):
    """Which positions the mask keeps, of those inside."""
    if mask is not None:
        inside = inside & (tl.load(mask + position, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _places(kept, before):
    """Which of the kept tokens of its sequence each token is, from 1, where ``before`` come before all of these."""
    return tl.maximum(before + tl.cumsum(kept.to(tl.int32), 0), 1).to(tl.float32)


# ------------------------------------------------------------------------------------------------------------- windows


class Traced(NamedTuple):
    """What is summed over windows: log-ratios; or, if not None, ``grad_log_trace``, times ``grad_loss`` if not None."""

    tokens: Any
    grad_log_trace: Any
    grad_loss: Any


@triton.jit
def _value(x, tile, offset, inside):
    """The value at ``tile.first + offset``, 0 where masked, not ``inside``, or beyond the sequence."""
    position = tile.first + offset
    inside = inside & (position >= tile.begin) & (position < tile.end)
    kept = _kept(x.tokens.mask, position, inside)
    if x.grad_log_trace is None:
        logprob = tl.load(x.tokens.logprobs + position, mask=kept, other=0.0)
        value = log_ratio(logprob, tl.load(x.tokens.old_logprobs + position, mask=kept, other=0.0))
    else:
        value = tl.load(x.grad_log_trace + position, mask=kept, other=0.0)
        if x.grad_loss is not None:
            value *= tl.load(x.grad_loss + position, mask=kept, other=0.0)
    return value


@triton.jit
def _sum_one_way(x, tile, count, STEP: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """For each position of the tile, the sum over the next (STEP = 1) or the previous (-1) ``count`` positions.

    Nothing is ever subtracted, so nothing cancels and a NaN stays in the windows that hold it. With u the unit roundoff
    and |x| summed over the window, short windows have an error of 2 u |x|: they are summed afresh for each position,
    with the roundings. Long ones reach beyond the tile: the rest of the tile by a scan, what lies in the windows of all
    its positions by a sum, and what lies in those of some by another scan. Each value then passes through less than
    2 log2(TILE) + log2(CHUNK) + sequence length / CHUNK additions.
    """
    i = tl.arange(0, TILE)
    near: tl.constexpr = 0 if STEP == 1 else TILE - 1  # the tile's ends: the windows go from near to far
    far: tl.constexpr = TILE - 1 - near
    if STEP == 1:
        reach = tl.minimum(count, tile.end - 1 - tile.first)
    else:
        reach = tl.minimum(count, far + TILE - 1 + tile.first - tile.begin)
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
        lanes = tl.arange(0, CHUNK)
        shared = tl.zeros([CHUNK], tl.float32)
        for start in range(TILE, reach + 1, CHUNK):
            k = start + lanes
            shared += _value(x, tile, near + STEP * k, k <= count)
        total = tl.cumsum(_value(x, tile, i + STEP, i != far), 0, reverse=STEP == 1)
        total += tl.cumsum(_value(x, tile, i + STEP * count, i != near), 0, reverse=STEP == -1)
        total += tl.sum(shared, 0)
    return total


@triton.jit
def _sum_of_window(x, tile, back, ahead, TILE: tl.constexpr, CHUNK: tl.constexpr):
    total = _sum_one_way(x, tile, ahead, 1, TILE, CHUNK)
    return total + _sum_one_way(x, tile, back, -1, TILE, CHUNK)


@triton.jit
def _through_traces(x, tile, back, ahead, live, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """The gradient that reaches log-probs through traces: a token is in the windows of those that reach it."""
    i = tl.arange(0, TILE)
    logprob = tl.load(x.tokens.logprobs + tile.first + i, mask=live, other=0.0)
    old_logprob = tl.load(x.tokens.old_logprobs + tile.first + i, mask=live, other=0.0)
    reaching = _sum_of_window(x, tile, ahead, back, TILE, CHUNK)
    return tl.where(live & log_ratio_live(logprob, old_logprob), reaching, 0.0)


# ------------------------------------------------------------------------------------------------- loss of every token


@triton.jit
def _load_weights(weights, per_token, tile, i, kept, other):
    """Values per token, or one for the sequence."""
    return tl.load(weights + tl.where(per_token != 0, tile.first + i, tile.sequence), mask=kept, other=other)


@triton.jit
def _largest(values, kept):
    """NaN wins, as in torch.amax; -infinity if there are none."""
    top = tl.max(tl.where(kept, values, MINUS_INF), 0)
    return tl.where(tl.max((kept & (values != values)).to(tl.int32), 0) != 0, NAN, top)


@kernel
def _tokens_kernel(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    cu_seqlens,
    ref_logprobs,
    entropy,
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
    per_token,
    ratio,
    back,
    ahead,
    differentiate,
    trust_region,
    kl,
    aggregation,
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
    tile = _find_tile(tl.program_id(0), cu_seqlens, num_sequences, width, TILE, CHUNK)
    i = tl.arange(0, TILE)
    kept = _kept(mask, tile.first + i, i < tile.end - tile.first)

    # What the tokens must know of their sequence: how many tokens it keeps, here before the tile and in all of it, ...
    needs_place = (o.trust_region == LOG_CLIP) | (o.trust_region == CPPO)
    needs_length = (o.trust_region == CPPO) | (o.ratio == SEQUENCE_RATIO) | (o.aggregation >= SEQ_MEAN_TOKEN_MEAN)
    lanes = tl.arange(0, CHUNK)
    if mask is None:
        before, count = (tile.first - tile.begin).to(tl.int32), (tile.end - tile.begin).to(tl.int32)
    else:
        counts = tl.zeros([CHUNK], tl.int32)
        counts_before = tl.zeros([CHUNK], tl.int32)
        stop = tl.where(needs_length, tile.end, tl.where(needs_place, tile.first, tile.begin))
        for start in range(tile.begin, stop, CHUNK):
            in_chunk = _kept(mask, start + lanes, start + lanes < stop).to(tl.int32)
            counts += in_chunk
            counts_before += tl.where(start + lanes < tile.first, in_chunk, 0)
        before, count = tl.sum(counts_before, 0), tl.sum(counts, 0)
    length = tl.maximum(count, 1).to(tl.float32)

    # ... the mean of its log-ratios, and sums of what the trust region compares
    log_ratios = tl.zeros([CHUNK], tl.float32)
    summands = tl.zeros([CHUNK], tl.float32)
    walked = 0
    stop = tl.where(o.ratio == SEQUENCE_RATIO, tile.end, tl.where(o.trust_region == CPPO, tile.first, tile.begin))
    for start in range(tile.begin, stop, CHUNK):
        chunk = Tile(tile.sequence, tile.begin, tile.end, start)
        in_chunk = _kept(mask, start + lanes, start + lanes < stop)
        logprob = tl.load(logprobs + start + lanes, mask=in_chunk, other=0.0)
        old_logprob = tl.load(old_logprobs + start + lanes, mask=in_chunk, other=0.0)
        advantage = _load_weights(advantages, advantage_per_token, chunk, lanes, in_chunk, 0.0)
        zero = tl.zeros_like(logprob)
        place = _places(in_chunk, walked)
        x = Token(logprob, old_logprob, zero, advantage, zero, zero, zero, place, length, zero)
        log_ratios += log_ratio(logprob, old_logprob)
        summands += tl.where(in_chunk, summand(o, x), 0.0)
        walked += tl.sum(in_chunk.to(tl.int32), 0)

    logprob = tl.load(logprobs + tile.first + i, mask=kept, other=0.0)
    old_logprob = tl.load(old_logprobs + tile.first + i, mask=kept, other=0.0)
    ref_logprob = tl.load(ref_logprobs + tile.first + i, mask=kept & (o.kl != 0), other=0.0)
    advantage = _load_weights(advantages, advantage_per_token, tile, i, kept, 0.0)
    is_weight = _load_weights(is_weights, is_weight_per_token, tile, i, kept & (has_is_weights != 0), 1.0)
    entropies = tl.load(entropy + tile.first + i, mask=kept & (has_entropy != 0), other=0.0)
    place = _places(kept, before)
    zero = tl.zeros_like(logprob)
    log_trace = zero
    sequence_sum = zero
    if o.ratio == TRACE:
        log_trace = _sum_of_window(Traced(tokens, None, None), tile, o.back, o.ahead, TILE, CHUNK)
    elif o.ratio == SEQUENCE_RATIO:
        log_trace = zero + tl.sum(log_ratios, 0) / length
    if o.trust_region == GMPO:
        sequence_sum = zero + tl.sum(summands, 0) / length
    elif o.trust_region == CPPO:
        x = Token(logprob, old_logprob, zero, advantage, zero, zero, zero, place, length, zero)
        sequence_sum = tl.sum(summands, 0) + tl.cumsum(tl.where(kept, summand(o, x), 0.0), 0)
    x = Token(
        logprob, old_logprob, ref_logprob, advantage, is_weight, entropies, log_trace, place, length, sequence_sum
    )
    result = evaluate(o, x)

    share = tl.where(o.aggregation == SEQ_MEAN_TOKEN_MEAN, tl.div_rn(1.0, length), 1.0)
    inside = i < tile.end - tile.first
    position = tile.first + i
    tl.store(loss + position, tl.where(kept, result.loss, 0.0), mask=inside & (per_token != 0))
    tl.store(grad_logprobs + position, tl.where(kept, share * result.d_logprob, 0.0), mask=inside)
    tl.store(grad_entropy + position, tl.where(kept, -share * entropy_coef, 0.0), mask=inside & (entropy_coef != 0))
    in_windows = inside & (differentiate != 0)
    tl.store(grad_log_trace + position, tl.where(kept, share * result.d_log_trace, 0.0), mask=in_windows)

    w = result.weight
    weight = w.ratio * w.trace
    top = _largest(weight, kept)
    relative = weight / tl.where(top > 0, top, 1.0)  # its square neither overflows nor vanishes
    _store_sum(statistics, TOKENS, kept, 1.0)
    _store_sum(statistics, CLIPPED, kept, (result.low | result.high).to(tl.float32))
    _store_sum(statistics, CLIPPED_LOW, kept, result.low.to(tl.float32))
    _store_sum(statistics, CLIPPED_HIGH, kept, result.high.to(tl.float32))
    _store_sum(statistics, RATIO, kept, w.ratio)
    _store(statistics, MINUS_RATIO_MAX, _largest(-w.ratio, kept))
    _store(statistics, RATIO_MAX, _largest(w.ratio, kept))
    _store_sum(statistics, TRACES, kept, w.trace)
    _store(statistics, MINUS_TRACE_MAX, _largest(-w.trace, kept))
    _store(statistics, TRACE_MAX, _largest(w.trace, kept))
    _store_sum(statistics, MINUS_LOG_RATIO, kept, -w.log_ratio)
    _store_sum(statistics, APPROX_K3, kept, exp_minus_1_minus(w.log_ratio, exp(w.log_ratio)))
    _store_sum(statistics, KL, kept, result.kl)
    _store_sum(statistics, ENTROPY, kept, entropies)
    _store_sum(statistics, WEIGHT, kept, relative)
    _store_sum(statistics, CLAMPED, kept, w.clamped.to(tl.float32))
    _store_sum(statistics, LOSS, kept, share * result.loss)
    _store_sum(statistics, SQUARED_WEIGHT, kept, relative * relative)
    _store(statistics, WEIGHT_MAX, top)
    _store(statistics, SEQUENCES, ((tile.first == tile.begin) & (count > 0)).to(tl.float32))


@triton.jit
def _store(statistics, ROW: tl.constexpr, value):
    tl.store(statistics + ROW * tl.num_programs(0) + tl.program_id(0), value)


@triton.jit
def _store_sum(statistics, ROW: tl.constexpr, kept, values):
    _store(statistics, ROW, tl.sum(tl.where(kept, values, 0.0), 0))


# --------------------------------------------------------------------------------------------------- scale and metrics


@triton.jit
def _count(row, num_tiles, CHUNK: tl.constexpr):
    """The sum of a row of counts, exact."""
    counts = tl.zeros([CHUNK], tl.int32)
    for start in range(0, num_tiles, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        counts += tl.load(row + tile, mask=tile < num_tiles, other=0.0).to(tl.int32)
    return tl.sum(counts, 0).to(tl.float32)


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
def _add_up(
    statistics, ROW, top, POWER, cu_seqlens, num_sequences, width, num_tiles, TILE: tl.constexpr, CHUNK: tl.constexpr
):
    """Sum and maximum of a row over all tiles. The sum is of values times (WEIGHT_MAX of their tile / top)^POWER.

    A lane takes every 16th tile of every (CHUNK / 16)th sequence, so that tiles which only one of two layouts has, and
    which hold nothing, do not move the others to other lanes.
    """
    STRIDE: tl.constexpr = CHUNK // 16
    sums = tl.zeros([STRIDE, 16], tl.float32)
    tops = tl.full([STRIDE, 16], MINUS_INF, tl.float32)
    for start in range(0, num_sequences, STRIDE):
        s = start + tl.arange(0, STRIDE)
        exists = s < num_sequences
        begin = _begin(cu_seqlens, s, exists, width)
        size = tl.cdiv(_begin(cu_seqlens, s + 1, exists, width) - begin, TILE)
        first_tile = begin // TILE + s
        most = tl.max(tl.where(exists, size, 0), 0)
        for first in range(0, most, 16):
            k = first + tl.arange(0, 16)[None, :]
            there = exists[:, None] & (k < size[:, None])
            tile = first_tile[:, None] + k
            value = tl.load(statistics + ROW * num_tiles + tile, mask=there, other=0.0)
            tops = tl.maximum(tops, tl.where(there, value, MINUS_INF))
            if POWER > 0:
                factor = tl.load(statistics + WEIGHT_MAX * num_tiles + tile, mask=there, other=0.0) / top
                value *= tl.where(POWER == 1, factor, factor * factor)
            sums += value
    return tl.sum(tl.sum(sums, 1), 0), tl.max(tl.max(tops, 1), 0)
