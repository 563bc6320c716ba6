"""Policy losses in plain PyTorch: ratio -> trust region -> KL and entropy -> aggregation, one function per part.

Arithmetic is float32, or float64 where the log-probs are float64. Autograd differentiates. Masked positions are
replaced by 0 before anything is computed from them, so that what they hold reaches neither value nor gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..objectives import (
    CISPO,
    CPPO,
    DRO,
    GMPO,
    KL,
    SAPO,
    VESPO,
    BinaryKL,
    BinaryTV,
    ForwardTrace,
    LogClip,
    NoTrustRegion,
    Objective,
    OnPolicy,
    PPOClip,
    SequenceRatio,
    TokenRatio,
    Trace,
)
from .aggregation import aggregate, scaled
from .layout import Layout, layout

LOG_RATIO_CLAMP = 20.0
"""Log-ratios and log-traces are clamped to +- this before ``exp``; beyond it there is no gradient."""
SEQUENCE_LOG_RATIO_MAX = 10.0
VESPO_LOG_WEIGHT_MIN = math.log(1e-8)

METRICS = (
    "tokens",
    "clip_frac",
    "clip_frac_low",
    "clip_frac_high",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "trace_mean",
    "trace_min",
    "trace_max",
    "approx_kl",
    "approx_kl_k3",
    "kl",
    "entropy",
    "ess",
    "clamp_frac",
)


class PolicyLossOutput(NamedTuple):
    """``loss`` is differentiable; the rest is detached."""

    loss: Tensor
    metrics: dict[str, Tensor]
    logprobs: Tensor
    entropy: Tensor | None


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    objective: Objective,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    is_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
    reduction: Literal["mean", "none"] = "mean",
) -> PolicyLossOutput:
    """See :func:`fusedpo.policy_loss`."""
    where = layout(logprobs, cu_seqlens)
    kept = where.kept(mask)
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32

    def tokens(x: Tensor) -> Tensor:
        return where.per_token(x).to(dtype).masked_fill(~kept, 0)

    lp = tokens(logprobs)
    olp = lp.detach() if old_logprobs is None else tokens(old_logprobs).detach()
    log_ratio = (lp - olp).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    log_of_ratio, log_trace, clamped = _RATIOS[type(objective.ratio)](objective.ratio, log_ratio, kept, where)
    ratio, trace = log_of_ratio.exp(), log_trace.exp()
    weights = torch.ones_like(lp) if is_weights is None else tokens(is_weights).detach()
    own = lp.where(weights != 0, lp.detach())  # a token without weight has no gradient, not even 0 times infinity
    a = tokens(advantages).detach()
    inputs = _Inputs(own, olp, a, ratio, trace, log_of_ratio, log_trace, log_ratio, kept, where)

    loss, clipped_low, clipped_high = _policy_term(objective, inputs)
    loss = (loss * weights).where(weights != 0, 0)
    kl = entropies = torch.zeros_like(lp)
    if objective.kl is not None:
        assert ref_logprobs is not None
        d = lp - tokens(ref_logprobs).detach()
        kl = _weighted_kl(objective.kl, d, lp - olp) if objective.kl.weighted else _kl(objective.kl, d)
        if objective.kl.coef != 0:
            loss = loss + objective.kl.coef * kl
    if entropy is not None:
        entropies = tokens(entropy)
    if objective.entropy_coef != 0:
        loss = loss - objective.entropy_coef * entropies
    loss = loss.masked_fill(~kept, 0)

    if reduction == "none":
        loss = loss.reshape(logprobs.shape)
    else:
        loss = aggregate(
            loss, kept, where, objective.aggregation, length_norm=objective.length_norm, denominator=denominator
        )

    with torch.no_grad():
        clamped = clamped | ((lp - olp).abs() > LOG_RATIO_CLAMP)
        metrics = _metrics(kept, log_ratio, ratio, trace, clipped_low, clipped_high, kl, entropies, clamped)
    return PolicyLossOutput(
        scaled(loss, loss_scale), metrics, logprobs.detach(), None if entropy is None else entropy.detach()
    )


def exp_minus_1(x: Tensor) -> Tensor:
    """``exp(x) - 1`` to all digits, its derivative too: that of ``torch.expm1`` has none left far below 0."""
    near = x.abs() < 0.5
    return torch.expm1(x.masked_fill(~near, 0)).where(near, x.exp() - 1)


def exp_minus_1_minus(x: Tensor) -> Tensor:
    """``exp(x) - 1 - x`` to all digits, derivatives too: near 0, where it cancels, by its Taylor series."""
    near = x.abs() < 0.5
    y = x.masked_fill(~near, 0)
    series = torch.full_like(y, 1 / math.factorial(15))
    for n in range(14, 1, -1):
        series = series * y + 1 / math.factorial(n)
    return (y.square() * series).where(near, torch.expm1(x) - x)


class _Inputs(NamedTuple):
    """What a trust region sees of each token, all ``[tokens]``. Most need the first five only.

    ``log_ratio`` is that of the token, clamped; ``log_of_ratio`` the logarithm of ``ratio``.
    """

    lp: Tensor
    olp: Tensor
    advantages: Tensor
    ratio: Tensor
    trace: Tensor
    log_of_ratio: Tensor
    log_trace: Tensor
    log_ratio: Tensor
    kept: Tensor
    where: Layout

    def place(self) -> Tensor:
        """Which of the kept tokens of its sequence each token is, from 1."""
        return self.where.place(self.kept).clamp(min=1).to(self.lp.dtype)

    def length(self) -> Tensor:
        """How many tokens of its sequence are kept, at least 1."""
        counts = self.where.sum_per_sequence(self.kept.to(self.lp.dtype)).clamp(min=1)
        return counts[self.where.sequence]


class _Term(NamedTuple):
    """The policy term, and the tokens whose gradient (or weight) the lower or the upper bound cut."""

    loss: Tensor
    low: Tensor
    high: Tensor


# --------------------------------------------------------------------------------------------------------------- ratios
# From the clamped log-ratio, 0 at masked tokens: the logarithms of ratio and trace, and where a clamp of its own acted.

_Ratio = tuple[Tensor, Tensor, Tensor]


def _token_ratio(part: TokenRatio, log_ratio: Tensor, kept: Tensor, where: Layout) -> _Ratio:
    return log_ratio, torch.zeros_like(log_ratio), torch.zeros_like(kept)


def _on_policy(part: OnPolicy, log_ratio: Tensor, kept: Tensor, where: Layout) -> _Ratio:
    return log_ratio.detach(), torch.zeros_like(log_ratio), torch.zeros_like(kept)


def _sequence_ratio(part: SequenceRatio, log_ratio: Tensor, kept: Tensor, where: Layout) -> _Ratio:
    own = log_ratio.detach()
    mean = where.sum_per_sequence(own) / where.sum_per_sequence(kept.to(own.dtype)).clamp(min=1)
    log_s = log_ratio - own + mean[where.sequence]
    return log_s.clamp(max=SEQUENCE_LOG_RATIO_MAX), torch.zeros_like(log_s), log_s > SEQUENCE_LOG_RATIO_MAX


def _trace(part: Trace, log_ratio: Tensor, kept: Tensor, where: Layout) -> _Ratio:
    window = log_ratio if part.differentiate else log_ratio.detach()
    log_trace = where.sum_before(window, part.back) + where.sum_after(window, part.ahead)
    return log_ratio, log_trace.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP), log_trace.abs() > LOG_RATIO_CLAMP


_RATIOS: dict[type, Callable[[Any, Tensor, Tensor, Layout], _Ratio]] = {
    TokenRatio: _token_ratio,
    SequenceRatio: _sequence_ratio,
    Trace: _trace,
    ForwardTrace: _trace,
    OnPolicy: _on_policy,
}


# -------------------------------------------------------------------------------------------------------- trust regions


def _policy_term(objective: Objective, x: _Inputs) -> _Term:
    ratio, region = objective.ratio, objective.trust_region
    term = _TRUST_REGIONS[type(region)](region, x)
    if isinstance(ratio, OnPolicy) and isinstance(region, NoTrustRegion):
        return term._replace(loss=_times_logprob(-x.advantages, x))
    if isinstance(ratio, Trace) and ratio.differentiate:
        surrogate = -x.advantages * exp_minus_1(x.log_ratio) * x.trace
        return term._replace(loss=surrogate.masked_fill(term.low | term.high, 0))
    return term


def _times_logprob(coefficient: Tensor, x: _Inputs) -> Tensor:
    """``coefficient * lp``, 0 where the coefficient is 0 and the log-prob infinite."""
    return coefficient * x.lp.where(coefficient != 0, 0)


def _nowhere(x: _Inputs) -> Tensor:
    return torch.zeros_like(x.kept)


def _no_trust_region(part: NoTrustRegion, x: _Inputs) -> _Term:
    return _Term(-x.advantages * x.ratio * x.trace, _nowhere(x), _nowhere(x))


def _ppo_clip(part: PPOClip, x: _Inputs) -> _Term:
    trace = x.trace if part.cap is None else x.trace.minimum(part.cap / x.ratio.detach())
    ratio, weight = (x.ratio * trace, 1) if part.on == "product" else (x.ratio, trace)
    ratio, low, high = pessimistic_clip(x.advantages, ratio, 1 - part.low, 1 + part.high, part.dual)
    return _Term(-x.advantages * ratio * weight, low, high)


def _log_clip(part: LogClip, x: _Inputs) -> _Term:
    scale = x.place() ** part.power  # 0 or infinite for a large power

    def bound(log: float) -> Tensor:
        return torch.ones_like(scale) if log == 0 else (log * scale).exp()

    dual = None if part.dual is None or part.dual == math.inf else bound(part.dual)
    product, low, high = pessimistic_clip(x.advantages, x.ratio * x.trace, bound(-part.low), bound(part.high), dual)
    return _Term(-x.advantages * product, low, high)


def pessimistic_clip(
    advantages: Tensor, ratio: Tensor, lower: Tensor | float, upper: Tensor | float, dual: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clip of ``ratio``, and where its lower and its upper bound acted (``dual`` is an upper one)."""
    low = (advantages < 0) & (ratio < lower)
    high = (advantages > 0) & (ratio > upper)
    # -A clip(ratio) is the larger one, strictly, just there: at a tie the gradient is that of -A ratio
    ratio = ratio.where(~low, lower).where(~high, upper)
    if dual is not None:
        dual_clipped = (advantages < 0) & (ratio > dual)
        ratio = ratio.where(~dual_clipped, dual)
        high = high | dual_clipped
    return ratio, low, high


def _cispo(part: CISPO, x: _Inputs) -> _Term:
    ratio = x.ratio.detach()
    weight = ratio.clamp(1 - part.low, 1 + part.high) * x.trace
    return _Term(_times_logprob(-x.advantages * weight, x), ratio < 1 - part.low, ratio > 1 + part.high)


def _binary_tv(part: BinaryTV, x: _Inputs) -> _Term:
    moved = x.lp.detach().exp() - x.olp.exp()
    return _binary(part, x, too_low=moved < -part.low, too_high=moved > part.high)


def _binary_kl(part: BinaryKL, x: _Inputs) -> _Term:
    lp = x.lp.detach()
    p, p_old = lp.exp(), x.olp.exp()
    other, other_old = (-torch.expm1(logprob).clamp(-1, 0) for logprob in (lp, x.olp))
    moved = (x.olp - lp).clamp(-LOG_RATIO_CLAMP, torch.finfo(torch.float32).max)  # infinite where one of them is 0
    divergence = p_old * moved + other_old * ((other_old + 1e-8) / (other + 1e-8)).log()
    return _binary(
        part, x, too_low=(divergence > part.low) & (p < p_old), too_high=(divergence > part.high) & (p > p_old)
    )


def _binary(part: BinaryTV | BinaryKL, x: _Inputs, too_low: Tensor, too_high: Tensor) -> _Term:
    """Drop a token with ``A > 0`` where it is ``too_high``, another one where it is ``too_low``."""
    positive = x.advantages > 0
    low, high = ~positive & too_low, positive & too_high
    weight = x.ratio.detach() * x.trace
    if part.cap is not None:
        weight = weight.clamp(max=part.cap)
    return _Term(_times_logprob(-x.advantages * weight, x).masked_fill(low | high, 0), low, high)


def _cppo(part: CPPO, x: _Inputs) -> _Term:
    place = x.place()
    slope = (1 - part.min_weight) / (x.length() - 1).clamp(min=1)
    weight = 1 - slope * (place - 1)
    divergence = weight * (x.lp.detach().exp() - x.olp.exp()).abs()  # 0 at masked tokens
    prefix = x.where.sum_before(divergence, "all") + divergence
    prefix_weight = (place - 1) - slope * (place - 1) * (place - 2) / 2  # of the tokens before this one
    outside = (divergence > part.threshold) | (prefix > part.threshold + part.budget * prefix_weight)
    ratio = x.ratio.detach()
    low = (x.advantages < 0) & (ratio < 1) & outside
    high = (x.advantages > 0) & (ratio > 1) & outside
    return _Term((-x.advantages * x.ratio * x.trace).masked_fill(low | high, 0), low, high)


def _sapo(part: SAPO, x: _Inputs) -> _Term:
    tau = torch.full_like(x.advantages, part.tau_neg).masked_fill(x.advantages > 0, part.tau_pos)
    z = tau * exp_minus_1(x.log_of_ratio)
    gate = torch.sigmoid(z.where(z < 0, -z))  # above 0, where it is rounded to 1, it has lost the digits of its slope
    gate = 4 / tau * gate.where(z < 0, 1 - gate)
    return _Term(-x.advantages * gate * x.trace, _nowhere(x), _nowhere(x))


def _vespo(part: VESPO, x: _Inputs) -> _Term:
    log_weight = (x.log_of_ratio.detach() + x.log_trace).clamp(VESPO_LOG_WEIGHT_MIN, LOG_RATIO_CLAMP)
    negative = x.advantages < 0
    k = torch.full_like(log_weight, part.k_pos).masked_fill(negative, part.k_neg)
    rate = torch.full_like(log_weight, part.lambda_pos).masked_fill(negative, part.lambda_neg)
    # near 1 the two terms nearly cancel where k is near the rate
    near = (k - rate) * log_weight - rate * exp_minus_1_minus(log_weight)
    log_phi = near.where(log_weight.abs() < 1, k * log_weight - rate * torch.expm1(log_weight))
    phi = log_phi.clamp(max=LOG_RATIO_CLAMP).exp()
    return _Term(_times_logprob(-x.advantages * phi, x), _nowhere(x), _nowhere(x))


def _gmpo(part: GMPO, x: _Inputs) -> _Term:
    low = (x.advantages < 0) & (x.log_ratio < -part.low)
    high = (x.advantages > 0) & (x.log_ratio > part.high)
    log_ratio = x.log_ratio.where(~low, -part.low).where(~high, part.high)
    mean = x.where.sum_per_sequence(log_ratio.detach())[x.where.sequence] / x.length()
    return _Term(-x.advantages * (log_ratio - log_ratio.detach() + mean).exp(), low, high)


def _dro(part: DRO, x: _Inputs) -> _Term:
    return _Term(_times_logprob(-x.advantages, x) + part.beta / 2 * (x.lp - x.olp).square(), _nowhere(x), _nowhere(x))


_TRUST_REGIONS: dict[type, Callable[[Any, _Inputs], _Term]] = {
    NoTrustRegion: _no_trust_region,
    PPOClip: _ppo_clip,
    LogClip: _log_clip,
    CISPO: _cispo,
    BinaryTV: _binary_tv,
    BinaryKL: _binary_kl,
    CPPO: _cppo,
    SAPO: _sapo,
    VESPO: _vespo,
    GMPO: _gmpo,
    DRO: _dro,
}


# ------------------------------------------------------------------------------------------------------------------- KL


def _kl(part: KL, d: Tensor) -> Tensor:
    value = _estimate(part, d)
    if part.clamp is None:
        return value
    beyond = value.detach().abs() > part.clamp
    bound = value.detach().clamp(-part.clamp, part.clamp)
    return _estimate(part, d.masked_fill(beyond, 0)).where(~beyond, bound)  # an infinite d has no gradient


def _estimate(part: KL, d: Tensor) -> Tensor:
    if part.kind == "k1":
        return d
    k2 = d.square() / 2
    if part.kind == "k2":
        return k2
    bounded = d.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    k3 = exp_minus_1_minus(-bounded)
    return k3 if part.kind == "k3" else k3.detach() + (k2 - k2.detach())


def _weighted_kl(part: KL, d: Tensor, log_ratio: Tensor) -> Tensor:
    """The estimate times ``rho``, given the log-ratio before it is clamped.

    The derivative of ``rho k3`` is ``rho d``. As ``rho (k3 + 1 - exp(-d))`` it cancels where ``exp(-d)`` is large, so
    that there ``rho (d - 1)`` is differentiated: ``rho exp(-d)``, the difference to ``rho k3``, is constant in ``lp``.
    """
    rho = log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    kl = _kl(part, d)
    if part.kind != "k3":
        return rho * kl
    moving = (log_ratio.abs() <= LOG_RATIO_CLAMP) & (d.abs() <= LOG_RATIO_CLAMP)
    if part.clamp is not None:
        moving = moving & (kl.detach() < part.clamp)
    steep = moving & (d.detach().abs() >= 1)
    same_slope = (rho * (d.masked_fill(~steep, 0) - 1)).where(steep, 0)
    return (rho * kl).detach().where(steep, rho * kl) + (same_slope - same_slope.detach())


# -------------------------------------------------------------------------------------------------------------- metrics


def _metrics(
    kept: Tensor,
    log_ratio: Tensor,
    ratio: Tensor,
    trace: Tensor,
    low: Tensor,
    high: Tensor,
    kl: Tensor,
    entropy: Tensor,
    clamped: Tensor,
) -> dict[str, Tensor]:
    """Statistics over the kept tokens, 0 where there is none: 0-d tensors in the order of :data:`METRICS`."""
    tokens = kept.sum().to(ratio.dtype)
    nothing = tokens == 0

    def mean(x: Tensor) -> Tensor:
        return x.to(ratio.dtype).masked_fill(~kept, 0).sum() / tokens.clamp(min=1)

    def largest(x: Tensor) -> Tensor:
        x = x.masked_fill(~kept, -torch.inf)
        return torch.cat((x, x.new_full((1,), -torch.inf))).amax().masked_fill(nothing, 0)

    weight = ratio * trace
    weight = weight.masked_fill(~kept, 0) / largest(weight).masked_fill(nothing, 1)  # its square cannot overflow
    clip_low, clip_high = mean(low), mean(high)
    values = (
        tokens,
        clip_low + clip_high,
        clip_low,
        clip_high,
        mean(ratio),
        -largest(-ratio),
        largest(ratio),
        mean(trace),
        -largest(-trace),
        largest(trace),
        mean(-log_ratio),
        mean(exp_minus_1_minus(log_ratio)),
        mean(kl),
        mean(entropy),
        weight.sum().square() / (tokens * weight.square().sum()).clamp(min=1),
        mean(clamped),
    )
    return dict(zip(METRICS, values, strict=True))
