"""The sums over a row of logits that its log-probs and its entropy are made of.

A row is reduced to (reference, rest, weighted). The reference is its maximum; with t_j = (x_j - reference) / T and
e_j = exp(t_j), the sum of e_j is 1 + rest, and weighted is the sum of e_j t_j. The 1 is one of the elements at the
maximum, so that nothing is lost beside a dominant logit. (A row that is -inf everywhere has reference 0, rest -1.) Then

    log p_y = t_y - log1p(rest),   entropy = log1p(rest) - weighted / (1 + rest).

Lane number l of LANES takes the words l, l + LANES, l + 2 LANES, ... of the row and has sums of its own: warps neither
meet nor exchange anything before the end of the row, where the lanes are merged. A step is TILES words of each lane. An
element that exceeds the largest so far changes places with it; what is added is always the smaller one, which leaves
out one element at the maximum without telling which. Each step is asked for
while the one before it is added, and the last, which may be incomplete, before all others.

Words are of 4 bytes: an element of float32, or two of a 16-bit type, of which 4 words make a load of 16 bytes. Rows
that begin at other places than multiples of 16 bytes have words of one element, whatever its type: lanes that followed
the boundaries would take other elements from row to row, and the sums of a row depend on its place in the batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import sum_where

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MINUS_INF = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-200.0)  # 2^-200 is 0 in float32; t = -inf is moved here where 0 * -inf would arise
NANS = tl.constexpr(tl.PropagateNan.ALL)
TILES = tl.constexpr(4)


@triton.jit
def log1p(x):
    """log(1 + x) for x = -1 and x >= 0, with all digits of a small x."""
    s = x / (2 + x)
    square = s * s
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square * (1 / 11)))))
    return tl.where(tl.abs(x) < 0.5, 2 * s * series, tl.log(1 + x))


# ----------------------------------------------------------------------------------------------------- words of a row


@triton.jit
def words_of(row, WIDTH: tl.constexpr):
    """Pointers to rows as pointers to words."""
    if WIDTH == 8:
        row = row.to(tl.pointer_type(tl.int32), bitcast=True)
    if WIDTH > 1:
        row = tl.multiple_of(row, 16)
    return row


@triton.jit
def filled(number, block):
    """A block of one number. (In the interpreter, a condition that is none does not mask a block.)"""
    return tl.full(block.shape, number, tl.int32)


@triton.jit
def load_step(row, first, lanes, end, WIDTH: tl.constexpr, DTYPE: tl.constexpr, POLICY: tl.constexpr):
    """TILES words of each lane, the first of which is ``first + lanes``; -inf unless ``first < end`` where given."""
    tiles = ()
    for i in tl.static_range(TILES):
        words = row + (first + i * lanes.shape[len(lanes.shape) - 1] + lanes)
        if end is None:
            tiles += (tl.load(words, eviction_policy=POLICY),)
        else:
            inside = filled(first, lanes) < end
            tiles += (tl.load(words, mask=inside, other=_nothing(WIDTH, DTYPE), eviction_policy=POLICY),)
    return tiles


@triton.jit
def load_last_step(row, first, lanes, end, WIDTH: tl.constexpr, DTYPE: tl.constexpr, POLICY: tl.constexpr):
    """The same, -inf from ``end`` on."""
    FOUR: tl.constexpr = 4 if WIDTH > 1 else 1  # as many are inside, or not, together
    tiles = ()
    for i in tl.static_range(TILES):
        word = first + i * lanes.shape[len(lanes.shape) - 1] + lanes
        inside = word // FOUR < end // FOUR
        tiles += (tl.load(row + word, mask=inside, other=_nothing(WIDTH, DTYPE), eviction_policy=POLICY),)
    return tiles


@triton.jit
def _nothing(WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """A word of -inf."""
    if WIDTH < 8:
        word = MINUS_INF
    elif DTYPE.is_bf16():
        word = -0x7F0080  # 0xFF80FF80
    else:
        word = -0x3FF0400  # 0xFC00FC00
    return word


@triton.jit
def _elements(tiles, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """The elements in the words of a step, as float32."""
    elements = ()
    for i in tl.static_range(TILES):
        word = tiles[i]
        if WIDTH < 8:
            elements += (word.to(tl.float32),)
        elif DTYPE.is_bf16():
            elements += ((word << 16).to(tl.float32, bitcast=True), (word & -0x10000).to(tl.float32, bitcast=True))
        else:
            low, high = word.to(tl.int16), (word >> 16).to(tl.int16)
            elements += (low.to(DTYPE, bitcast=True).to(tl.float32), high.to(DTYPE, bitcast=True).to(tl.float32))
    return elements


# ---------------------------------------------------------------------------------------------------------------- sums


class Sums(NamedTuple):
    """Of each lane: its largest element, and rest and weighted of the others with that as their reference."""

    top: Any
    rest: Any
    weighted: Any


@triton.jit
def no_sums(lanes):
    zeros = lanes.to(tl.float32) * 0
    return Sums(zeros + MINUS_INF, zeros, zeros)


@triton.jit
def add(tiles, sums, scale, WIDTH: tl.constexpr, DTYPE: tl.constexpr, ENTROPY: tl.constexpr):
    """Adds a step. ``scale`` is log2(e) / T; t_j is log2(e_j) and weighted short of a factor ln 2."""
    elements = _elements(tiles, WIDTH, DTYPE)
    top = sums.top
    smaller = ()
    for i in tl.static_range(len(elements)):
        smaller += (tl.minimum(top, elements[i], propagate_nan=NANS),)
        top = tl.maximum(top, elements[i])
    reference = tl.where(top == MINUS_INF, 0.0, top)
    shift = tl.maximum((sums.top - reference) * scale, LOWEST)
    factor = tl.exp2(shift)
    weighted = sums.weighted
    if ENTROPY:
        weighted = (weighted + shift * sums.rest) * factor
    rest = sums.rest * factor
    for i in tl.static_range(len(smaller)):
        t = (smaller[i] - reference) * scale
        if ENTROPY:
            t = tl.maximum(t, LOWEST, propagate_nan=NANS)
        e = tl.exp2(t)
        rest += e
        if ENTROPY:
            weighted += e * t
    return Sums(top, rest, weighted)


@triton.jit
def merge(sums, scale):
    """(reference, rest, weighted) of rows. The largest element of each lane is added, but for one at the maximum."""
    AXIS: tl.constexpr = len(sums.top.shape) - 1
    largest = tl.max(sums.top, AXIS)
    reference = tl.where(largest == MINUS_INF, 0.0, largest)
    t = tl.maximum((sums.top - beside(reference, sums.top)) * scale, LOWEST, propagate_nan=NANS)
    e = tl.exp2(t)
    at_top = (sums.top == beside(largest, sums.top)) & (sums.top != MINUS_INF)
    weighted = sum_where(sums.top != MINUS_INF, (sums.weighted + t * (1 + sums.rest)) * e, AXIS)
    rest = tl.sum(sums.rest * e + tl.where(at_top, 0.0, e), AXIS) + (tl.sum(at_top.to(tl.float32), AXIS) - 1)
    return reference, rest, weighted * LN2


@triton.jit
def beside(x, block):
    """What there is one of for each row, to go with a block of rows or of one row."""
    if len(block.shape) == 2:
        x = x[:, None]
    return x


@triton.jit
def reduce_rows(
    row, size, end, scale, lanes, WIDTH: tl.constexpr, DTYPE: tl.constexpr, ENTROPY: tl.constexpr, POLICY: tl.constexpr
):
    """Reads the words of rows up to ``end``, of which ``size`` is the largest, once."""
    STEP: tl.constexpr = TILES * lanes.shape[len(lanes.shape) - 1]
    sums = no_sums(lanes)
    full = size // STEP * STEP
    last = load_last_step(row, full, lanes, end, WIDTH, DTYPE, POLICY)
    if full > 0:
        ahead = load_step(row, 0, lanes, None, WIDTH, DTYPE, POLICY)
        for first in range(STEP, full, STEP):
            tiles = ahead
            ahead = load_step(row, first, lanes, None, WIDTH, DTYPE, POLICY)
            sums = add(tiles, sums, scale, WIDTH, DTYPE, ENTROPY)
        sums = add(ahead, sums, scale, WIDTH, DTYPE, ENTROPY)
    sums = add(last, sums, scale, WIDTH, DTYPE, ENTROPY)
    return merge(sums, scale)
