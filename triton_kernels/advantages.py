"""Advantages by Triton: one launch per operator, two for whitening, and no host sync.

The kernels mirror ``csrc/core/group_advantages.h`` and ``token_advantages.h``, a program in the place of a team. They
read any real dtype and compute in float64, in float32 where the device has no float64. The order of every sum depends
on the size of the group or the length of the sequence, and on the place in it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedpo import _checks
from fusedpo.ops.advantages import ESTIMATORS, GROUP_ESTIMATORS, TOKEN_ESTIMATORS

from .checks import INT64, INTEGER, REAL, WHOLE, Arguments, dims, given, in_range, packed
from .common import kernel, launch, sum_where

INF = tl.constexpr(float("inf"))

# Their numbers, by name: a kernel reads only globals that are tl.constexpr.
RAFT = tl.constexpr(ESTIMATORS.index("raft"))
REMAX = tl.constexpr(ESTIMATORS.index("remax"))
REINFORCE_REJ = tl.constexpr(ESTIMATORS.index("reinforce_rej"))
GRPO = tl.constexpr(ESTIMATORS.index("grpo"))
RLOO = tl.constexpr(ESTIMATORS.index("rloo"))
OPO = tl.constexpr(ESTIMATORS.index("opo"))
GPG = tl.constexpr(ESTIMATORS.index("gpg"))
LEAD = tl.constexpr(ESTIMATORS.index("lead"))
NORMALISED_LEAD = tl.constexpr(ESTIMATORS.index("normalised_lead"))
PKPO_S = tl.constexpr(ESTIMATORS.index("pkpo s"))
PKPO_SLOO = tl.constexpr(ESTIMATORS.index("pkpo sloo"))
PKPO_SLOO_1 = tl.constexpr(ESTIMATORS.index("pkpo sloo-1"))
PASSK = tl.constexpr(ESTIMATORS.index("passk"))
MAX_AT_K = tl.constexpr(ESTIMATORS.index("max_at_k"))
ORDER_STATISTIC = tl.constexpr(ESTIMATORS.index("order_statistic"))
TO_TOKENS = tl.constexpr(TOKEN_ESTIMATORS.index("to_tokens"))
REWARD_TO_GO = tl.constexpr(TOKEN_ESTIMATORS.index("reward_to_go"))


# ----------------------------------------------------------------------------------------------------------- shared


@triton.jit
def _number(high, low, REAL: tl.constexpr):
    """A float64 argument: Triton passes numbers as float32, so they come in two parts."""
    return tl.full([], high, REAL) + tl.full([], low, REAL)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _at(x, lane, BLOCK: tl.constexpr):
    """The element of a block at one lane."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == lane, x, 0.0), 0)


@triton.jit
def _following(x, beyond, BLOCK: tl.constexpr):
    """At each lane the element of the next one; after the last comes ``beyond``."""
    lanes = tl.arange(0, BLOCK)
    return tl.where(lanes == BLOCK - 1, beyond, tl.gather(x, tl.minimum(lanes + 1, BLOCK - 1), 0))


# ----------------------------------------------------------------------------------------------------------- groups


class Samples(NamedTuple):
    """Rewards, mask and other inputs of the batch, and the sample at each position."""

    rewards: Any
    mask: Any
    other: Any
    order: Any
    count: Any


class Group(NamedTuple):
    """The samples at ``size`` positions from ``start``."""

    start: Any
    size: Any
    label: Any


class Part(NamedTuple):
    """A block of a group: its samples, which of them exist, which are kept, and their rewards."""

    sample: Any
    inside: Any
    kept: Any
    reward: Any


class Census(NamedTuple):
    """What is known of a group before its estimator runs. A nan is neither lowest nor highest."""

    kept: Any
    nans: Any
    lowest: Any
    highest: Any
    second: Any


@triton.jit
def _find_group(ids, count, group_size, BLOCK: tl.constexpr):
    """Of the programs for the positions of a run of equal ids, only the first has a group; the others' are empty."""
    if ids is None:
        label = tl.program_id(0).to(tl.int64)
        start = label * group_size
        size = tl.minimum(count - start, group_size)
    else:
        start = tl.program_id(0).to(tl.int64)
        label = tl.load(ids + start).to(tl.int64)
        before = tl.load(ids + start - 1, mask=start > 0, other=0).to(tl.int64)
        end = start
        if (start == 0) | (before != label):
            end += count - start
        first = start
        while first < end:
            i = first + tl.arange(0, BLOCK)
            differs = (i < count) & (tl.load(ids + i, mask=i < count, other=0).to(tl.int64) != label)
            end = tl.min(tl.where(differs, i, count), 0)
            first += BLOCK
        size = end - start
    return Group(start, size, label)


@triton.jit
def _load_part(s, group, first, BLOCK: tl.constexpr, REAL: tl.constexpr):
    """The positions of a group from ``first``."""
    i = first + tl.arange(0, BLOCK)
    inside = i < group.size
    sample = group.start + i
    if s.order is not None:
        sample = tl.load(s.order + sample, mask=inside, other=0)
        sample = tl.where((sample >= 0) & (sample < s.count), sample, 0)
    kept = inside
    if s.mask is not None:
        kept = inside & (tl.load(s.mask + sample, mask=inside, other=0) != 0)
    return Part(sample, inside, kept, tl.load(s.rewards + sample, mask=kept, other=0).to(REAL))


@triton.jit
def _census(s, group, BLOCK: tl.constexpr, REAL: tl.constexpr):
    zero = tl.full([], 0.0, REAL)
    n, nans, lowest, highest, second = zero, zero, zero + INF, zero - INF, zero - INF
    for first in range(0, group.size, BLOCK):
        part = _load_part(s, group, first, BLOCK, REAL)
        r = part.reward
        n += tl.sum(part.kept.to(REAL), 0)
        nans += tl.sum((part.kept & (r != r)).to(REAL), 0)
        known = part.kept & (r == r)
        lowest = tl.minimum(lowest, tl.min(tl.where(known, r, INF), 0))
        top = tl.max(tl.where(known, r, -INF), 0)
        twice = tl.sum((known & (r == top)).to(REAL), 0) > 1
        below = tl.where(twice, top, tl.max(tl.where(known & (r < top), r, -INF), 0))
        second = tl.maximum(tl.minimum(highest, top), tl.maximum(second, below))
        highest = tl.maximum(highest, top)
    return Census(n, nans, lowest, highest, second)


@triton.jit
def _weights(s, part, estimator, REAL: tl.constexpr):
    w = part.kept.to(REAL)
    if s.other is not None:  # noqa: SIM102 (that is known when the kernel is compiled)
        if estimator == OPO:
            w = tl.load(s.other + part.sample, mask=part.kept, other=0).to(REAL)
    return w


@kernel
def _baseline_kernel(
    rewards,
    mask,
    other,
    order,
    ids,
    advantages,
    count,
    group_size,
    num_other,
    estimator,
    number_high,
    number_low,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """``compare_with_baseline``: a program per group, or per position where there are ids."""
    s = Samples(rewards, mask, other, order, count)
    group = _find_group(ids, count, group_size, BLOCK)
    every = _census(s, group, BLOCK, REAL)
    number = _number(number_high, number_low, REAL)
    zero = tl.full([], 0.0, REAL)

    weights, total = zero, zero
    for first in range(0, group.size, BLOCK):
        part = _load_part(s, group, first, BLOCK, REAL)
        w = _weights(s, part, estimator, REAL)
        weights += tl.sum(w, 0)
        total += sum_where(w > 0, w * (part.reward - every.lowest), 0)
    mean = total / weights

    others = tl.maximum(every.kept - 1, 1)
    squares, batch_kept, batch_nonzero = zero, zero, zero
    if other is None:  # known when the kernel is compiled: estimators that have others need no more sums
        if (estimator == GRPO) | (estimator == NORMALISED_LEAD):
            for first in range(0, group.size, BLOCK):
                part = _load_part(s, group, first, BLOCK, REAL)
                centred = (part.reward - every.lowest) - mean
                squares += sum_where(part.kept, centred * centred, 0)
        if (estimator == GPG) & (group.size > 0):
            for start in range(0, count, BLOCK):
                i = start + tl.arange(0, BLOCK)
                kept = i < count
                if mask is not None:
                    kept = kept & (tl.load(mask + i, mask=kept, other=0) != 0)
                batch_kept += tl.sum(kept.to(REAL), 0)
                batch_nonzero += tl.sum((kept & (tl.load(rewards + i, mask=kept, other=0).to(REAL) != 0)).to(REAL), 0)
    deviation = tl.sqrt(squares / others) + number
    alpha = batch_kept / tl.maximum(batch_nonzero, 1)

    baseline = zero
    if other is not None:  # noqa: SIM102 (that is known when the kernel is compiled)
        if (estimator == REMAX) & (group.size > 0):
            labelled = (group.label >= 0) & (group.label < num_other)
            baseline = tl.where(labelled, tl.load(other + group.label, mask=labelled, other=0).to(REAL), float("nan"))
    leads = (estimator == LEAD) | (estimator == NORMALISED_LEAD)
    undefined = leads & ((every.kept < 2) | (every.nans > 0))
    equal = (every.lowest == every.highest) & (every.nans == 0) & (every.kept > 1)

    for first in range(0, group.size, BLOCK):
        part = _load_part(s, group, first, BLOCK, REAL)
        r = part.reward
        centred = tl.where(weights > 0, (r - every.lowest) - mean, 0.0)
        a = centred
        if estimator == RAFT:
            a = tl.where(r < 0, 0.0, r)
        elif estimator == REMAX:
            a = r - baseline
        elif estimator == REINFORCE_REJ:
            a = tl.where(equal, 0.0, r)
        elif estimator == GRPO:
            a = centred / deviation
        elif estimator == RLOO:
            a = centred * every.kept / others
        elif estimator == GPG:
            a = alpha * centred / number
        elif leads:
            lead = tl.where(r == every.highest, r - every.second, 0.0)
            a = tl.where(estimator == LEAD, lead, lead / deviation)
        a = tl.where(undefined, float("nan"), a)
        tl.store(advantages + part.sample, tl.where(part.kept, a, 0.0), mask=part.inside)


@triton.jit
def _sort(s, group, sorted_rewards, source, BLOCK: tl.constexpr, CHUNK: tl.constexpr, REAL: tl.constexpr):
    """Writes the kept rewards in ascending order and where they come from: a rank is the number of samples before."""
    for first in range(0, group.size, BLOCK):
        mine = _load_part(s, group, first, BLOCK, REAL)
        i, r = (first + tl.arange(0, BLOCK))[:, None], mine.reward[:, None]
        rank = tl.zeros([BLOCK], tl.int32)
        for start in range(0, group.size, CHUNK):
            theirs = _load_part(s, group, start, CHUNK, REAL)
            j, x = (start + tl.arange(0, CHUNK))[None, :], theirs.reward[None, :]
            before = theirs.kept[None, :] & ((x < r) | ((x == r) & (j < i)))
            rank += tl.sum(before.to(tl.int32), 1)
        tl.store(sorted_rewards + rank, mine.reward, mask=mine.kept)
        tl.store(source + rank, mine.sample, mask=mine.kept)


@triton.jit
def _mean_weight(weights, g, n, k, REAL: tl.constexpr):
    """``mean_weight`` for a block of gaps."""
    mode = (k * g) // n
    w = tl.load(weights + mode).to(REAL)
    total, mean, p = tl.full(g.shape, 1.0, REAL), w, tl.full(g.shape, 1.0, REAL)
    for step in range(0, k - 1):
        b = mode + step
        live = b < k - 1
        up = (g - 1 - b).to(REAL) * (k - 1 - b).to(REAL)
        down = (b + 1).to(REAL) * (n - g - k + 1 + b).to(REAL)
        p = tl.where(live, p * up / tl.where(live, down, 1.0), 0.0)
        total += p
        mean += p * tl.load(weights + b + 1, mask=live, other=0).to(REAL)
    p = tl.full(g.shape, 1.0, REAL)
    for step in range(1, k):
        b = mode - step
        live = b >= 0
        up = (g - 1 - b).to(REAL) * (k - 1 - b).to(REAL)
        down = (b + 1).to(REAL) * (n - g - k + 1 + b).to(REAL)
        p = tl.where(live, p * down / tl.where(live, up, 1.0), 0.0)
        total += p
        mean += p * tl.load(weights + b, mask=live, other=0).to(REAL)
    return mean / total


@kernel
def _ranks_kernel(
    rewards,
    mask,
    other,
    order,
    ids,
    advantages,
    sorted_rewards,
    sums,
    source,
    count,
    group_size,
    k,
    spare,
    estimator,
    unbiased,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    REAL: tl.constexpr,
):
    """``compare_ranks``: a program per group, or per position where there are ids."""
    s = Samples(rewards, mask, other, order, count)
    group = _find_group(ids, count, group_size, BLOCK)
    every = _census(s, group, BLOCK, REAL)
    defined = (every.kept >= k + spare) & (every.kept > 0) & (every.nans == 0)
    for first in range(0, group.size, BLOCK):
        part = _load_part(s, group, first, BLOCK, REAL)
        later = tl.where(defined, part.kept.to(tl.int32), 0)
        tl.store(advantages + part.sample, tl.where(part.kept, float("nan"), 0.0), mask=part.inside & (later == 0))

    n = tl.where(defined, every.kept, 0).to(tl.int64)
    sorted_rewards += group.start
    sums += group.start
    source += group.start
    if n > 0:
        _sort(s, group, sorted_rewards, source, BLOCK, CHUNK, REAL)
    tl.debug_barrier()

    # GapFormula
    one = tl.full([], 1.0, REAL)
    size, subset = tl.maximum(n, 1).to(REAL), k * one
    exponent, below, above, slope, share = k + 0, one, -one, one, one * 0
    part, whole = one, one  # of the scale
    if estimator == PKPO_S:
        below, above, slope, share = one * 0, subset - size, one * 0, one
        part, whole = subset, size
    elif estimator == PKPO_SLOO:
        below, above, slope, share = size, -subset, size, -one
        part, whole = subset, size * (size - 1)
    elif estimator == PKPO_SLOO_1:
        exponent, above, slope = k - 1, one * 0, one * 0
        part, whole = subset, size
    elif unbiased != 0:
        part, whole = subset, size
    rest = (size - subset) / size

    # From the highest rank to the lowest: weights of the gaps, and the sums over higher gaps.
    alpha_after, higher, total = one, one * 0, one * 0
    lanes = tl.arange(0, BLOCK)
    for tile in range(0, tl.cdiv(n, BLOCK)):
        first = (tl.cdiv(n, BLOCK) - 1 - tile) * BLOCK
        g = first + lanes
        gap = (g > 0) & (g < n)
        if estimator == ORDER_STATISTIC:
            alpha = tl.zeros([BLOCK], REAL)
            if other is not None:
                alpha += g.to(REAL) / (size - 1) * _mean_weight(other, tl.where(gap, g, 0), n, k, REAL)
        else:
            ratio = tl.maximum(g + 1 - exponent, 0).to(REAL) / (g + 1).to(REAL)
            ratio = tl.where(g + 1 < n, ratio, one)
            alpha = tl.associative_scan(ratio, 0, _multiply, reverse=True) * alpha_after
            alpha_after = _at(alpha, 0, BLOCK)
        d = tl.load(sorted_rewards + g, mask=gap, other=0) - tl.load(sorted_rewards + g - 1, mask=gap, other=0)
        weighted = tl.where(gap, alpha * d, 0.0)
        x = weighted * (above - slope * (n - 1 - g).to(REAL)) / tl.maximum(g, 1).to(REAL)
        suffix = tl.associative_scan(x, 0, _add, reverse=True) + higher
        tl.store(sums + g, _following(suffix, higher, BLOCK), mask=g < n)
        tl.store(sums + count + g, below * weighted, mask=g < n)
        higher = _at(suffix, 0, BLOCK)
    tl.debug_barrier()

    for first in range(0, n, BLOCK):
        g = first + lanes
        prefix = tl.associative_scan(tl.load(sums + count + g, mask=g < n, other=0), 0, _add) + total
        tl.store(sums + g, tl.load(sums + g, mask=g < n, other=0) + prefix, mask=g < n)
        total = _at(prefix, BLOCK - 1, BLOCK)
    tl.debug_barrier()

    if estimator == PASSK:
        failure = rest * total
        whole = tl.sqrt(failure * (1 - failure))
        part = tl.where(whole > 0, rest, 0.0)
    scale = part / tl.where(whole > 0, whole, one)
    highest = every.highest
    for first in range(0, n, BLOCK):
        p = first + lanes
        inside = p < n
        mine = tl.load(sorted_rewards + p, mask=inside, other=0)
        # Equal rewards take the value at the first of them: the same sum may be rounded differently at each rank.
        low, high = tl.zeros_like(p), tl.where(inside, p, 0)
        while tl.max(high - low, 0) > 0:
            middle = (low + high) // 2
            less = tl.load(sorted_rewards + middle, mask=low < high, other=0) < mine
            low, high = tl.where((low < high) & less, middle + 1, low), tl.where((low < high) & ~less, middle, high)
        a = tl.load(sums + low, mask=inside, other=0)
        a = scale * tl.where(share != 0, a + share * highest, a)
        a = tl.where(estimator == MAX_AT_K, highest - rest * total, a)
        tl.store(advantages + tl.load(source + p, mask=inside, other=0), a, mask=inside)


# ----------------------------------------------------------------------------------------------------------- tokens


@triton.jit
def _chain(later_x, later_c, x, c):
    """``y = x + c * (y of what follows)``; where c is 0 nothing follows, nan and inf included. For a reversed scan."""
    return tl.where(c == 0, x, x + c * later_x), tl.where(c == 0, 0.0, c * later_c)


@triton.jit
def _walk(x, c, carry):
    """The recurrence over a block that ``carry`` follows."""
    x, c = tl.associative_scan((x, c), 0, _chain, reverse=True)
    return tl.where(c == 0, x, x + c * carry)


@kernel
def _tokens_kernel(
    rewards,
    values,
    logprobs,
    old_logprobs,
    mask,
    cu_seqlens,
    per_sequence,
    advantages,
    returns,
    length,
    estimator,
    gamma_high,
    gamma_low,
    lam_high,
    lam_low,
    rho_bar_high,
    rho_bar_low,
    c_bar_high,
    c_bar_low,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """``token_advantages``: a program per sequence, which it walks backwards."""
    sequence = tl.program_id(0).to(tl.int64)
    if cu_seqlens is None:
        begin = sequence * length
        end = begin + length
    else:
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence).to(tl.int64), 0), length)
        end = tl.minimum(tl.load(cu_seqlens + sequence + 1).to(tl.int64), length)
    gamma, lam = _number(gamma_high, gamma_low, REAL), _number(lam_high, lam_low, REAL)
    zero = tl.full([], 0.0, REAL)
    at_end = zero
    if per_sequence is not None:
        at_end += tl.load(per_sequence + sequence).to(REAL)
    next_value = at_end
    following_y = tl.where(estimator == REWARD_TO_GO, at_end, zero)

    tiles = tl.cdiv(end - begin, BLOCK)
    for tile in range(0, tiles):
        t = begin + (tiles - 1 - tile) * BLOCK + tl.arange(0, BLOCK)
        inside = t < end
        kept = inside
        if mask is not None:
            kept = inside & (tl.load(mask + t, mask=inside, other=0) != 0)
        if estimator == TO_TOKENS:
            tl.store(advantages + t, tl.where(kept, at_end, 0.0), mask=inside)
        else:
            r = tl.load(rewards + t, mask=kept, other=0).to(REAL)
            pass_on = 1 - kept.to(REAL)
            x, decay, rho = r, gamma + tl.zeros([BLOCK], REAL), tl.full([BLOCK], 1.0, REAL)
            if values is not None:
                v = tl.load(values + t, mask=kept, other=0).to(REAL)
                this_or_next = _walk(v, pass_on, next_value)
                following_v = _following(this_or_next, next_value, BLOCK)
                next_value = _at(this_or_next, 0, BLOCK)
                decay *= lam
                if logprobs is not None:
                    log_ratio = tl.load(logprobs + t, mask=kept, other=0).to(REAL)
                    log_ratio -= tl.load(old_logprobs + t, mask=kept, other=0).to(REAL)
                    high = tl.where(log_ratio > 20, 20.0, log_ratio)
                    ratio = tl.exp(tl.where(high < -20, -20.0, high))
                    rho_bar = _number(rho_bar_high, rho_bar_low, REAL)
                    c_bar = _number(c_bar_high, c_bar_low, REAL)
                    rho = tl.where(ratio > rho_bar, rho_bar, ratio)
                    decay *= tl.where(ratio > c_bar, c_bar, ratio)
                x = rho * (r + gamma * following_v - v)
            y = _walk(tl.where(kept, x, 0.0), tl.where(kept, decay, 1.0), following_y)
            a = y
            if logprobs is not None:
                a = x + rho * gamma * _following(y, following_y, BLOCK)
            tl.store(advantages + t, tl.where(kept, a, 0.0), mask=inside)
            if values is not None:
                tl.store(returns + t, tl.where(kept, y + v, 0.0), mask=inside)
            following_y = _at(y, 0, BLOCK)


# ------------------------------------------------------------------------------------------------------------ steps


@kernel
def _steps_kernel(
    values,
    step_rewards,
    step_ids,
    advantages,
    of_steps,
    num_tokens,
    num_steps,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """``step_advantages``: a program per row, whose steps it walks backwards."""
    row = tl.program_id(0).to(tl.int64)
    values += row * (num_steps + 1)
    step_rewards += row * num_steps
    of_steps += row * num_steps
    last = tl.load(values + num_steps).to(REAL)
    following = tl.where(last == last, last, 0.0)
    tiles = tl.cdiv(num_steps, BLOCK)
    for tile in range(0, tiles):
        s = (tiles - 1 - tile) * BLOCK + tl.arange(0, BLOCK)
        inside = s < num_steps
        value = tl.load(values + s, mask=inside, other=0).to(REAL)
        reward = tl.load(step_rewards + s, mask=inside, other=0).to(REAL)
        known = inside & (value == value)
        filled = _walk(tl.where(known, value, reward), 1 - known.to(REAL), following)
        a = reward + _following(filled, following, BLOCK) - value
        tl.store(of_steps + s, tl.where(known, a, 0.0), mask=inside)
        following = _at(filled, 0, BLOCK)
    tl.debug_barrier()

    step_ids += row * num_tokens
    advantages += row * num_tokens
    for first in range(0, num_tokens, BLOCK):
        t = first + tl.arange(0, BLOCK)
        step = tl.load(step_ids + t, mask=t < num_tokens, other=-1).to(tl.int64)
        there = (step >= 0) & (step < num_steps)
        a = tl.load(of_steps + step, mask=there, other=0)
        tl.store(advantages + t, tl.where(step >= num_steps, float("nan"), a), mask=t < num_tokens)


# -------------------------------------------------------------------------------------------------------- whitening


@triton.jit
def _load_weighted(x, lengths, mask, count, BLOCK: tl.constexpr, REAL: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    w = inside.to(REAL)
    if lengths is not None:
        w = tl.maximum(tl.load(lengths + i, mask=inside, other=0).to(REAL), 0)
    if mask is not None:
        w = tl.where(tl.load(mask + i, mask=inside, other=0) != 0, w, 0.0)
    return i, inside, w, tl.load(x + i, mask=w > 0, other=0).to(REAL)


@kernel
def _moments_kernel(x, lengths, mask, partial, count, BLOCK: tl.constexpr, REAL: tl.constexpr):
    """Weight, mean and sum of the squared differences to it, of a block of elements."""
    _, _, w, value = _load_weighted(x, lengths, mask, count, BLOCK, REAL)
    weight = tl.sum(w, 0)
    mean = sum_where(w > 0, w * value, 0) / tl.where(weight > 0, weight, 1.0)
    partial += tl.program_id(0).to(tl.int64) * 3
    tl.store(partial, weight)
    tl.store(partial + 1, mean)
    tl.store(partial + 2, sum_where(w > 0, w * (value - mean) * (value - mean), 0))


@kernel
def _whiten_kernel(x, lengths, mask, partial, whitened, count, num_blocks, BLOCK: tl.constexpr, REAL: tl.constexpr):
    zero = tl.full([], 0.0, REAL)
    weight, total = zero, zero
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        w = tl.load(partial + block * 3, mask=block < num_blocks, other=0)
        weight += tl.sum(w, 0)
        total += sum_where(w > 0, w * tl.load(partial + block * 3 + 1, mask=block < num_blocks, other=0), 0)
    mean = total / weight
    squares = zero
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        inside = block < num_blocks
        distance = tl.load(partial + block * 3 + 1, mask=inside, other=0) - mean
        w = tl.load(partial + block * 3, mask=inside, other=0)
        between = tl.where(w > 0, w * distance * distance, 0.0)
        squares += tl.sum(tl.load(partial + block * 3 + 2, mask=inside, other=0) + between, 0)
    scale = 1 / tl.sqrt(squares / tl.maximum(weight - 1, 1) + 1e-8)
    i, inside, w, value = _load_weighted(x, lengths, mask, count, BLOCK, REAL)
    tl.store(whitened + i, tl.where(w > 0, (value - mean) * scale, 0.0), mask=inside)


# -------------------------------------------------------------------------------------------------------- launchers


def _real(device: torch.device) -> Any:
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return tl.float32
    return tl.float64


def _scratch(like: Tensor, real: Any, *size: int) -> Tensor:
    return like.new_empty(size, dtype=torch.float64 if real == tl.float64 else torch.float32)


def _result(like: Tensor, wide: bool) -> Tensor:
    return torch.empty(like.shape, dtype=torch.float64 if wide else torch.float32, device=like.device)


def _two_parts(number: float) -> tuple[float, float]:
    """A number as the sum of two float32 numbers; one beyond their range is infinite."""
    high = torch.tensor(number, dtype=torch.float32).item()
    return high, number - high if math.isfinite(high) else 0.0


# A warp or eight, a thread per element, and no sizes in between: each would be a variant to compile, and to wait for.
_SMALL: dict[str, int] = {"BLOCK": 32, "num_warps": 1}
_LARGE: dict[str, int] = {"BLOCK": 256, "num_warps": 8}
# Of every sequence, however short: no bit of it follows from the lengths of others.
_TOKENS: dict[str, int] = {"BLOCK": 512, "num_warps": 8}


def _check_order(order: Tensor, count: int) -> None:
    if not torch.equal(order.sort().values, torch.arange(count, device=order.device)):
        raise ValueError(f"order must hold each of the {count} samples once, got {order.flatten()[:8].tolist()}...")


def group_advantages(
    rewards: Tensor,
    ids: Tensor | None,
    order: Tensor | None,
    group_size: int,
    other: Tensor | None,
    mask: Tensor | None,
    estimator: int,
    k: int,
    unbiased: bool,
    number: float,
    wide: bool,
) -> Tensor:
    """The operator ``fusedpo::group_advantages``."""
    count, check = rewards.numel(), Arguments("rewards", rewards)
    dims("rewards", rewards, 1, 1)
    in_range("group_size", group_size, 1, WHOLE)
    in_range("estimator", estimator, 0, len(ESTIMATORS) - 1)
    needs = GROUP_ESTIMATORS[ESTIMATORS[estimator]]
    if needs.ranks:
        in_range("k", k, 1, WHOLE)
    given("other", other, needs.other is not None)
    size = {"rank": k, "label": 0 if other is None else other.numel()}.get(str(needs.other), count)
    arguments = (
        check.read("rewards", rewards, REAL, (count,)),
        check.read("mask", mask, REAL, (count,)),
        check.read("other", other, REAL, (size,)),
        check.read("order", order, INT64, (count,)),
        check.read("ids", ids, INTEGER, (count,)),
    )
    if order is not None and _checks.values_are_free(order):
        _check_order(order, count)
    advantages = _result(rewards, wide)
    if count == 0:
        return advantages
    arguments = (*arguments, advantages)
    programs = count if ids is not None else triton.cdiv(count, group_size)
    real = _real(advantages.device)
    if not needs.ranks:
        num_other = 0 if other is None else other.numel()
        numbers = (count, group_size, num_other, estimator, *_two_parts(number))
        shape = _LARGE if ids is None and group_size > 64 else _SMALL
        launch(_baseline_kernel, programs, advantages.device, *arguments, *numbers, REAL=real, **shape)
    else:
        memory = (
            _scratch(advantages, real, count),
            _scratch(advantages, real, 2, count),
            advantages.new_empty(count, dtype=torch.int64),
        )
        numbers = (count, group_size, k, needs.spare, estimator, int(unbiased))
        # A thread per element: two that hold the same would race.
        launch(_ranks_kernel, programs, advantages.device, *arguments, *memory, *numbers, CHUNK=16, REAL=real, **_SMALL)
    return advantages


def token_advantages(
    rewards: Tensor,
    values: Tensor | None,
    logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    per_sequence: Tensor | None,
    estimator: int,
    gamma: float,
    lam: float,
    rho_bar: float,
    c_bar: float,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """The operator ``fusedpo::token_advantages``."""
    shape, check = rewards.shape, Arguments("rewards", rewards)
    dims("rewards", rewards, 1, 2)
    in_range("estimator", estimator, 0, len(TOKEN_ESTIMATORS) - 1)
    name = TOKEN_ESTIMATORS[estimator]
    given("values", values, name in ("gae", "vtrace"))
    given("logprobs", logprobs, name == "vtrace")
    given("old_logprobs", old_logprobs, name == "vtrace")
    sequences = shape[:-1].numel() if cu_seqlens is None else packed(cu_seqlens, shape)
    tensors = (
        check.read("rewards", rewards, REAL, shape),
        check.read("values", values, REAL, shape),
        check.read("logprobs", logprobs, REAL, shape),
        check.read("old_logprobs", old_logprobs, REAL, shape),
        check.read("mask", mask, REAL, shape),
        check.read("cu_seqlens", cu_seqlens, INTEGER, (sequences + 1,)),
        check.read("per_sequence", per_sequence, REAL, (sequences,)),
    )
    if cu_seqlens is not None:
        _checks.cu_seqlens(cu_seqlens, rewards.numel(), "rewards", rewards)
    advantages = _result(rewards, wide)
    returns = advantages.new_empty(0) if values is None else _result(rewards, wide)
    if rewards.numel() == 0:
        return advantages, returns
    length = shape[-1]
    numbers = (part for number in (gamma, lam, rho_bar, c_bar) for part in _two_parts(number))
    launch(
        _tokens_kernel,
        sequences,
        rewards.device,
        *tensors,
        advantages,
        returns,
        length,
        estimator,
        *numbers,
        REAL=_real(rewards.device),
        **_TOKENS,
    )
    return advantages, returns


def step_advantages(values: Tensor, step_rewards: Tensor, step_ids: Tensor, wide: bool) -> Tensor:
    """The operator ``fusedpo::step_advantages``."""
    check = Arguments("values", values)
    dims("step_ids", step_ids, 2, 2)
    dims("step_rewards", step_rewards, 2, 2)
    batch, steps = step_ids.shape[0], step_rewards.shape[1]
    tensors = (
        check.read("values", values, REAL, (batch, steps + 1)),
        check.read("step_rewards", step_rewards, REAL, (batch, steps)),
        check.read("step_ids", step_ids, INTEGER, step_ids.shape),
    )
    advantages = _result(step_ids, wide)
    count = step_ids.numel()
    if count > 0:
        real = _real(values.device)
        (rows, num_tokens), num_steps = step_ids.shape, step_rewards.shape[1]
        results = (advantages, _scratch(values, real, rows, num_steps))
        shape = {"BLOCK": 256, "REAL": real, "num_warps": 4}
        launch(_steps_kernel, rows, values.device, *tensors, *results, num_tokens, num_steps, **shape)
    return advantages


def whiten(x: Tensor, lengths: Tensor | None, mask: Tensor | None, wide: bool) -> Tensor:
    """The operator ``fusedpo::whiten``."""
    check, shape = Arguments("x", x), x.shape
    tensors = (
        check.read("x", x, REAL, shape),
        check.read("lengths", lengths, REAL, shape),
        check.read("mask", mask, REAL, shape),
    )
    whitened = _result(x, wide)
    count = x.numel()
    if count > 0:
        real = _real(x.device)
        blocks = triton.cdiv(count, 2048)
        partial = _scratch(x, real, blocks, 3)
        block = {"BLOCK": 2048, "REAL": real, "num_warps": 8}
        launch(_moments_kernel, blocks, x.device, *tensors, partial, count, **block)
        launch(_whiten_kernel, blocks, x.device, *tensors, partial, whitened, count, blocks, **block)
    return whitened
