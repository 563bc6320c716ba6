"""The policy objective of one token, on blocks of tokens: log-ratio -> ratio and trace -> term -> coefficient.

It mirrors csrc/core/objective.h, function by function; both follow python/fusedpo/reference/losses.py and add the
derivatives. The parts of the objective are numbers at run time: no combination of them is compiled apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG_RATIO_CLAMP = tl.constexpr(20.0)
SEQUENCE_LOG_RATIO_MAX = tl.constexpr(10.0)
VESPO_LOG_WEIGHT_MIN = tl.constexpr(-18.420680743952367)  # log(1e-8)
LARGEST = tl.constexpr(3.402823466e38)
LOG2E = tl.constexpr(1.4426950408889634)


# -------------------------------------------------------------------------------------------------------- the objective
# Numbers are those that _RATIOS, _TRUST_REGIONS, ... in python/fusedpo/ops/policy_loss.py count.

TOKEN_RATIO, SEQUENCE_RATIO, TRACE, ON_POLICY = map(tl.constexpr, range(4))
NO_TRUST_REGION, PPO_CLIP, LOG_CLIP, CISPO, BINARY_TV, BINARY_KL = map(tl.constexpr, range(6))
CPPO, SAPO, VESPO, GMPO, DRO = map(tl.constexpr, range(6, 11))
NO_KL, K1, K2, K3, K3_PLUS = map(tl.constexpr, range(5))  # and K3_PLUS more where it is weighted
TOKEN_MEAN, TOKEN_SUM, SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM, SEQ_MEAN_TOKEN_SUM_NORM = map(tl.constexpr, range(5))


class Objective(NamedTuple):
    """Numbers of the parts, windows, coefficients; then the fields of the trust region's dataclass, in their order."""

    ratio: Any
    back: Any
    ahead: Any
    differentiate: Any
    trust_region: Any
    kl: Any
    aggregation: Any
    kl_coef: Any
    kl_clamp: Any
    entropy_coef: Any
    length_norm: Any  # 0: the longest sequence
    p0: Any
    p1: Any
    p2: Any
    p3: Any
    p4: Any


class Token(NamedTuple):
    """A block of tokens. A masked one is all zeros but for ``place``, ``length`` and what is known of its sequence."""

    logprob: Any
    old_logprob: Any
    ref_logprob: Any
    advantage: Any
    is_weight: Any
    entropy: Any
    log_trace: Any  # TRACE: sum of the log-ratios in the window; SEQUENCE_RATIO: their mean over the kept tokens
    place: Any  # which of the kept tokens of its sequence this is, from 1
    length: Any  # how many they are, at least 1
    sequence_sum: Any  # of `summand`. GMPO: mean over the kept tokens; CPPO: sum up to this token


class Weight(NamedTuple):
    """The ratio with its trace; ``live`` where no clamp stops the gradient."""

    log_ratio: Any
    ratio: Any
    trace: Any
    log_of_ratio: Any
    log_weight: Any  # log(ratio * trace)
    ratio_live: Any
    trace_live: Any
    clamped: Any


class Term(NamedTuple):
    """The policy term and its derivatives. ``low``, ``high``: that bound cut the gradient (or the weight)."""

    loss: Any
    d_log_ratio: Any
    d_logprob: Any  # beside the way through the log-ratio
    low: Any
    high: Any


class TokenResult(NamedTuple):
    """``d_logprob`` is the gradient coefficient of the token, all but what reaches it through its neighbours' traces:
    that is the adjoint of the window sum, applied to ``d_log_trace``."""

    loss: Any
    d_logprob: Any
    d_log_trace: Any
    weight: Any
    kl: Any
    low: Any
    high: Any


# ----------------------------------------------------------------------------------------------------------- arithmetic


@triton.jit
def clamp(x, low, high):
    """NaN stays NaN, as in torch.clamp."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def exp(x):
    """To a few units in the last place: the hardware's 2^x of a rounded x log2(e) would lose |x| of them."""
    x = clamp(x, -104.0, 89.0)  # 0 and infinity
    n = tl.floor(x * LOG2E + 0.5)
    r = (
        x - n * 0.693359375
    ) - n * -2.12194440e-4  # log 2 in two parts: the product with the first, of 9 bits, is exact
    return tl.exp2(n) * tl.exp(r)


@triton.jit
def exp_minus_1_minus(x, exp_x):
    """exp(x) - 1 - x without cancellation, given exp(x).

    Below 1 in magnitude it is x^2 times the minimax polynomial of degree 7 (relative error 4e-9).
    """
    p = 2.7722833e-6 * x + 2.5354830e-5
    p = p * x + 1.9844024e-4
    p = p * x + 1.3885452e-3
    p = p * x + 8.3333103e-3
    p = p * x + 4.1666735e-2
    p = p * x + 1.6666667e-1
    p = p * x + 0.5
    return tl.where(tl.abs(x) < 1, x * x * p, exp_x - 1 - x)


@triton.jit
def exp_minus_1(x, exp_x):
    """exp(x) - 1 without cancellation, given exp(x)."""
    return tl.where(tl.abs(x) < 1, exp_minus_1_minus(x, exp_x) + x, exp_x - 1)


@triton.jit
def times(factor, x):
    """factor * x, 0 where the factor is 0, whatever x is."""
    return tl.where(factor == 0, 0.0, factor * x)


@triton.jit
def log_ratio(logprob, old_logprob):
    return clamp(logprob - old_logprob, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)


@triton.jit
def log_ratio_live(logprob, old_logprob):
    return tl.abs(logprob - old_logprob) <= LOG_RATIO_CLAMP


# ----------------------------------------------------------------------------------------------------- ratio and trace


@triton.jit
def weight_of(o, x):
    own = log_ratio(x.logprob, x.old_logprob)
    ratio_live = log_ratio_live(x.logprob, x.old_logprob)
    clamped = tl.abs(x.logprob - x.old_logprob) > LOG_RATIO_CLAMP
    log_weight = own
    if o.ratio == SEQUENCE_RATIO:
        log_s = own - own + x.log_trace  # NaN where the token's own ratio is
        log_weight = tl.where(log_s > SEQUENCE_LOG_RATIO_MAX, SEQUENCE_LOG_RATIO_MAX, log_s)
        ratio_live = ratio_live & (log_s <= SEQUENCE_LOG_RATIO_MAX)
        clamped = clamped | (log_s > SEQUENCE_LOG_RATIO_MAX)
    log_of_ratio = log_weight
    ratio = exp(log_of_ratio)
    trace = tl.full(own.shape, 1.0, tl.float32)
    trace_live = ratio_live
    if o.ratio == TRACE:
        log_trace = clamp(x.log_trace, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
        trace = exp(log_trace)
        trace_live = tl.abs(x.log_trace) <= LOG_RATIO_CLAMP
        clamped = clamped | (tl.abs(x.log_trace) > LOG_RATIO_CLAMP)
        log_weight = own + log_trace
    return Weight(own, ratio, trace, log_of_ratio, log_weight, ratio_live, trace_live, clamped)


# -------------------------------------------------------------------------------------------------------- trust regions


@triton.jit
def nowhere(x):
    return tl.zeros(x.logprob.shape, tl.int1)


@triton.jit
def through_ratio(loss, d_log_ratio, low, high):
    """A token that is cut has no gradient."""
    return Term(loss, tl.where(low | high, 0.0, d_log_ratio), tl.zeros_like(loss), low, high)


@triton.jit
def through_logprob(x, weight, low, high):
    """-A * weight * lp with the weight detached."""
    coefficient = -x.advantage * weight
    return Term(times(coefficient, x.logprob), tl.zeros_like(coefficient), coefficient, low, high)


@triton.jit
def on_policy(x):
    return through_logprob(x, tl.full(x.logprob.shape, 1.0, tl.float32), nowhere(x), nowhere(x))


@triton.jit
def no_trust_region(x, w):
    loss = -x.advantage * w.ratio * w.trace
    return through_ratio(loss, loss, nowhere(x), nowhere(x))


@triton.jit
def clip(advantage, ratio, weight, lower, upper, dual):
    """PPO's pessimistic clip of ``ratio`` to [lower, upper], and to ``dual`` where A < 0; the loss times ``weight``.

    At a tie the gradient is that of -A ratio.
    """
    low = (advantage < 0) & (ratio < lower)
    high = (advantage > 0) & (ratio > upper)
    clipped = tl.where(low, lower, tl.where(high, upper, ratio))
    dual_clipped = (advantage < 0) & (clipped > dual)
    clipped = tl.where(dual_clipped, dual, clipped)
    return through_ratio(-advantage * clipped * weight, -advantage * ratio * weight, low, high | dual_clipped)


@triton.jit
def ppo_clip(low, high, dual, cap, on_product, x, w):
    most = cap / w.ratio
    trace = tl.where(w.trace > most, most, w.trace)
    ratio = tl.where(on_product != 0, w.ratio * trace, w.ratio)
    return clip(x.advantage, ratio, tl.where(on_product != 0, 1.0, trace), 1 - low, 1 + high, dual)


@triton.jit
def log_clip(low, high, dual, power, x, w):
    scale = exp(power * tl.log(x.place))  # 0 or infinite for a large power
    upper = exp(tl.where(dual == float("inf"), dual, times(dual, scale)))
    return clip(x.advantage, w.ratio * w.trace, 1.0, exp(-times(low, scale)), exp(times(high, scale)), upper)


@triton.jit
def cispo(low, high, x, w):
    lower, upper = 1 - low, 1 + high
    return through_logprob(x, clamp(w.ratio, lower, upper) * w.trace, w.ratio < lower, w.ratio > upper)


@triton.jit
def binary(cap, x, w, too_low, too_high):
    """Drops a token with A > 0 where it is too high, another one where it is too low."""
    positive = x.advantage > 0
    low, high = (positive == 0) & too_low, positive & too_high
    weight = w.ratio * w.trace
    term = through_logprob(x, tl.where(weight > cap, cap, weight), low, high)
    cut = low | high
    return Term(tl.where(cut, 0.0, term.loss), term.d_log_ratio, tl.where(cut, 0.0, term.d_logprob), low, high)


@triton.jit
def binary_tv(low, high, cap, x, w):
    moved = exp(x.logprob) - exp(x.old_logprob)
    return binary(cap, x, w, moved < -low, moved > high)


@triton.jit
def binary_kl(low, high, cap, x, w):
    now, old = exp(x.logprob), exp(x.old_logprob)
    other_now = clamp(-exp_minus_1(x.logprob, now), 0.0, 1.0)  # 1 - p has no digits left where p is near 1
    other_old = clamp(-exp_minus_1(x.old_logprob, old), 0.0, 1.0)
    moved = clamp(x.old_logprob - x.logprob, -LOG_RATIO_CLAMP, LARGEST)  # infinite where one of them is 0
    divergence = old * moved + other_old * tl.log((other_old + 1e-8) / (other_now + 1e-8))
    return binary(cap, x, w, (divergence > low) & (now < old), (divergence > high) & (now > old))


@triton.jit
def cppo_slope(min_weight, x):
    return (1 - min_weight) / tl.where(x.length < 2, 1.0, x.length - 1)


@triton.jit
def cppo_divergence(min_weight, x):
    """The weighted divergence that CPPO sums."""
    moved = exp(x.logprob) - exp(x.old_logprob)
    return (1 - cppo_slope(min_weight, x) * (x.place - 1)) * tl.abs(moved)


@triton.jit
def cppo(threshold, budget, min_weight, x, w):
    before = x.place - 1
    weight_before = before - cppo_slope(min_weight, x) * before * (before - 1) * 0.5
    too_much = x.sequence_sum > threshold + budget * weight_before
    outside = (cppo_divergence(min_weight, x) > threshold) | too_much
    low = (x.advantage < 0) & (w.ratio < 1) & outside
    high = (x.advantage > 0) & (w.ratio > 1) & outside
    loss = -x.advantage * w.ratio * w.trace
    return through_ratio(tl.where(low | high, 0.0, loss), loss, low, high)


@triton.jit
def sapo(tau_pos, tau_neg, x, w):
    tau = tl.where(x.advantage > 0, tau_pos, tau_neg)
    z = tau * exp_minus_1(w.log_of_ratio, w.ratio)
    decay = exp(-tl.abs(z))  # at most 1, so that no tau makes it overflow
    inverse = 1 / (1 + decay)
    gate = tl.where(z < 0, decay * inverse, inverse)
    loss = -x.advantage * (4 / tau) * gate * w.trace
    d_log_ratio = -x.advantage * 4 * (decay * inverse * inverse) * w.ratio * w.trace
    return through_ratio(loss, d_log_ratio, nowhere(x), nowhere(x))


@triton.jit
def vespo(k_pos, lambda_pos, k_neg, lambda_neg, x, w):
    negative = x.advantage < 0
    k = tl.where(negative, k_neg, k_pos)
    rate = tl.where(negative, lambda_neg, lambda_pos)
    log_weight = clamp(w.log_weight, VESPO_LOG_WEIGHT_MIN, LOG_RATIO_CLAMP)
    exp_weight = exp(log_weight)
    # near 1 the two terms nearly cancel where k is near the rate
    near = (k - rate) * log_weight - rate * exp_minus_1_minus(log_weight, exp_weight)
    log_phi = tl.where(tl.abs(log_weight) < 1, near, k * log_weight - rate * (exp_weight - 1))
    log_phi = tl.where(log_phi > LOG_RATIO_CLAMP, LOG_RATIO_CLAMP, log_phi)
    return through_logprob(x, exp(log_phi), nowhere(x), nowhere(x))


@triton.jit
def gmpo_low(low, x, log_ratio):
    return (x.advantage < 0) & (log_ratio < -low)


@triton.jit
def gmpo_high(high, x, log_ratio):
    return (x.advantage > 0) & (log_ratio > high)


@triton.jit
def gmpo(low, high, x, w):
    loss = -x.advantage * exp(w.log_ratio - w.log_ratio + x.sequence_sum)  # NaN where the token's own ratio is
    too_low, too_high = gmpo_low(low, x, w.log_ratio), gmpo_high(high, x, w.log_ratio)
    dead = too_low | too_high | (log_ratio_live(x.logprob, x.old_logprob) == 0)
    d_logprob = tl.where(dead, 0.0, loss)  # the bound on the sequence's ratio has no say
    return Term(loss, tl.zeros_like(loss), d_logprob, too_low, too_high)


@triton.jit
def dro(beta, x):
    moved = x.logprob - x.old_logprob
    term = on_policy(x)
    loss = term.loss + beta / 2 * moved * moved
    return Term(loss, term.d_log_ratio, term.d_logprob + beta * moved, term.low, term.high)


@triton.jit
def summand(o, x):
    """What the trust region sums over a sequence."""
    own = log_ratio(x.logprob, x.old_logprob)
    value = tl.where(gmpo_low(o.p0, x, own), -o.p0, tl.where(gmpo_high(o.p1, x, own), o.p1, own))
    if o.trust_region == CPPO:
        value = cppo_divergence(o.p2, x)
    return value


@triton.jit
def trust_region(o, x, w):
    term = no_trust_region(x, w)
    if o.trust_region == PPO_CLIP:
        term = ppo_clip(o.p0, o.p1, o.p2, o.p3, o.p4, x, w)
    elif o.trust_region == LOG_CLIP:
        term = log_clip(o.p0, o.p1, o.p2, o.p3, x, w)
    elif o.trust_region == CISPO:
        term = cispo(o.p0, o.p1, x, w)
    elif o.trust_region == BINARY_TV:
        term = binary_tv(o.p0, o.p1, o.p2, x, w)
    elif o.trust_region == BINARY_KL:
        term = binary_kl(o.p0, o.p1, o.p2, x, w)
    elif o.trust_region == CPPO:
        term = cppo(o.p0, o.p1, o.p2, x, w)
    elif o.trust_region == SAPO:
        term = sapo(o.p0, o.p1, x, w)
    elif o.trust_region == VESPO:
        term = vespo(o.p0, o.p1, o.p2, o.p3, x, w)
    elif o.trust_region == GMPO:
        term = gmpo(o.p0, o.p1, x, w)
    elif o.trust_region == DRO:
        term = dro(o.p0, x)
    elif o.ratio == ON_POLICY:
        term = on_policy(x)
    return term


# ------------------------------------------------------------------------------------------------------------------- KL


@triton.jit
def kl_of(o, x, own):
    """The estimate of the KL divergence and its derivative. ``own`` is the log-ratio of the token.

    ``d_weighted`` is the sum of both: the derivative of exp(lp) times the estimate, over exp(lp).
    """
    d = x.logprob - x.ref_logprob
    value = tl.zeros_like(d)
    d_logprob = tl.zeros_like(d)
    d_weighted = tl.zeros_like(d)
    weighted = o.kl > K3_PLUS
    kind = tl.where(weighted, o.kl - K3_PLUS, o.kl)
    if kind == K1:
        value = d
        d_logprob = tl.full(d.shape, 1.0, tl.float32)
        d_weighted = 1 + d
    elif kind == K2:
        value = d * d * 0.5
        d_logprob = d
        d_weighted = d * (1 + d * 0.5)
    elif kind != NO_KL:
        y = clamp(-d, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
        exp_y = exp(y)
        value = exp_minus_1_minus(y, exp_y)
        live = tl.abs(d) <= LOG_RATIO_CLAMP
        d_logprob = tl.where(kind == K3, tl.where(live, -exp_minus_1(y, exp_y), 0.0), d)
        d_weighted = tl.where(kind == K3, tl.where(live, d, value), d + value)
    beyond = tl.abs(value) > o.kl_clamp
    value = clamp(value, -o.kl_clamp, o.kl_clamp)
    d_logprob = tl.where(beyond, 0.0, d_logprob)
    d_weighted = tl.where(beyond, value, d_weighted)
    if weighted:
        ratio = exp(own)
        d_logprob = ratio * tl.where(log_ratio_live(x.logprob, x.old_logprob), d_weighted, d_logprob)
        value = value * ratio
    return value, d_logprob


# ----------------------------------------------------------------------------------------------------------- the token


@triton.jit
def evaluate(o, x):
    """Loss and derivatives of a token: is_weight * policy term + kl_coef * KL - entropy_coef * entropy."""
    w = weight_of(o, x)
    term = trust_region(o, x, w)
    d_log_trace = tl.zeros_like(term.loss)
    if o.differentiate != 0:
        cut = term.low | term.high
        loss = tl.where(cut, 0.0, -x.advantage * exp_minus_1(w.log_ratio, w.ratio) * w.trace)
        d_log_ratio = tl.where(cut, 0.0, -x.advantage * w.ratio * w.trace)
        d_log_trace = tl.where(w.trace_live, times(x.is_weight, loss), 0.0)
        term = Term(loss, d_log_ratio, tl.zeros_like(loss), term.low, term.high)
    d_policy = tl.where(w.ratio_live, term.d_log_ratio, 0.0) + term.d_logprob
    kl, d_kl = kl_of(o, x, w.log_ratio)
    bonus = tl.where(o.entropy_coef != 0, o.entropy_coef * x.entropy, 0.0)
    loss = times(x.is_weight, term.loss) + times(o.kl_coef, kl) - bonus
    d_logprob = times(x.is_weight, d_policy) + times(o.kl_coef, d_kl)
    return TokenResult(loss, d_logprob, d_log_trace, w, kl, term.low, term.high)
