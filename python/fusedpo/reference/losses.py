"""Policy losses in plain PyTorch: ratio -> trust region -> KL and entropy -> aggregation, one function per part.

Arithmetic is float32, or float64 where the log-probs are float64. Autograd differentiates. Masked positions are
replaced by 0 before anything is computed from them, so that what they hold reaches neither value nor gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..objectives import (
    CISPO,
    KL,
    SAPO,
    BinaryKL,
    BinaryTV,
    ForwardTrace,
    NoTrustRegion,
    Objective,
    OnPolicy,
    PPOClip,
    SequenceRatio,
    TokenRatio,
)
from .layout import Layout, layout

LOG_RATIO_CLAMP = 20.0
"""Log-ratios and log-traces are clamped to +- this before ``exp``; beyond it there is no gradient."""
SEQUENCE_LOG_RATIO_MAX = 10.0

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
    kept = torch.ones_like(where.sequence, dtype=torch.bool) if mask is None else mask.reshape(-1) != 0
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32

    def tokens(x: Tensor) -> Tensor:
        return where.per_token(x).to(dtype).masked_fill(~kept, 0)

    lp = tokens(logprobs)
    olp = lp.detach() if old_logprobs is None else tokens(old_logprobs).detach()
    log_ratio = (lp - olp).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    ratio, trace, clamped = _RATIOS[type(objective.ratio)](objective.ratio, log_ratio, kept, where)
    inputs = _Inputs(lp, olp, tokens(advantages).detach(), ratio, trace)

    loss, clipped_low, clipped_high = _policy_term(objective, inputs)
    if is_weights is not None:
        loss = loss * tokens(is_weights).detach()
    kl = entropies = torch.zeros_like(lp)
    if objective.kl is not None:
        assert ref_logprobs is not None
        kl = _kl(objective.kl, lp - tokens(ref_logprobs).detach())
        loss = loss + objective.kl.coef * kl
    if entropy is not None:
        entropies = tokens(entropy)
    if objective.entropy_coef != 0:
        loss = loss - objective.entropy_coef * entropies
    loss = loss.masked_fill(~kept, 0)

    if reduction == "none":
        loss = loss.reshape(logprobs.shape)
    else:
        loss = _aggregate(objective, loss, kept, where, denominator)

    if isinstance(loss_scale, Tensor):
        loss_scale = loss_scale.detach().to(dtype)

    with torch.no_grad():
        clamped = clamped | ((lp - olp).abs() > LOG_RATIO_CLAMP)
        metrics = _metrics(kept, log_ratio, ratio, trace, clipped_low, clipped_high, kl, entropies, clamped)
    return PolicyLossOutput(
        loss * loss_scale, metrics, logprobs.detach(), None if entropy is None else entropy.detach()
    )


class _Inputs(NamedTuple):
    """What a trust region sees of each token, all ``[tokens]``."""

    lp: Tensor
    olp: Tensor
    advantages: Tensor
    ratio: Tensor
    trace: Tensor


class _Term(NamedTuple):
    """The policy term, and the tokens whose gradient (or weight) the lower or the upper bound cut."""

    loss: Tensor
    low: Tensor
    high: Tensor


# --------------------------------------------------------------------------------------------------------------- ratios
# From the clamped log-ratio, 0 at masked tokens: ratio, forward trace, and where a clamp of its own acted.

_Ratio = tuple[Tensor, Tensor, Tensor]


def _token_ratio(part: TokenRatio, log_ratio: Tensor, kept: Tensor, where: Layout) -> _Ratio:
    return log_ratio.exp(), torch.ones_like(log_ratio), torch.zeros_like(kept)


def _on_policy(part: OnPolicy, log_ratio: Tensor, kept: Tensor, where: Layout) -> _Ratio:
    return log_ratio.detach().exp(), torch.ones_like(log_ratio), torch.zeros_like(kept)


def _sequence_ratio(part: SequenceRatio, log_ratio: Tensor, kept: Tensor, where: Layout) -> _Ratio:
    own = log_ratio.detach()
    mean = where.sum_per_sequence(own) / where.sum_per_sequence(kept.to(own.dtype)).clamp(min=1)
    log_s = log_ratio - own + mean[where.sequence]
    ratio = log_s.clamp(max=SEQUENCE_LOG_RATIO_MAX).exp()
    return ratio, torch.ones_like(ratio), log_s > SEQUENCE_LOG_RATIO_MAX


def _forward_trace(part: ForwardTrace, log_ratio: Tensor, kept: Tensor, where: Layout) -> _Ratio:
    log_trace = where.sum_ahead(log_ratio if part.differentiate else log_ratio.detach(), part.n - 1)
    trace = log_trace.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    return log_ratio.exp(), trace, log_trace.abs() > LOG_RATIO_CLAMP


_RATIOS: dict[type, Callable[[Any, Tensor, Tensor, Layout], _Ratio]] = {
    TokenRatio: _token_ratio,
    SequenceRatio: _sequence_ratio,
    ForwardTrace: _forward_trace,
    OnPolicy: _on_policy,
}


# -------------------------------------------------------------------------------------------------------- trust regions


def _policy_term(objective: Objective, x: _Inputs) -> _Term:
    term = _TRUST_REGIONS[type(objective.trust_region)](objective.trust_region, x)
    if isinstance(objective.ratio, OnPolicy):
        return term._replace(loss=-x.advantages * x.lp)
    if isinstance(objective.ratio, ForwardTrace) and objective.ratio.differentiate:
        surrogate = -x.advantages * (x.ratio - 1) * x.trace
        return term._replace(loss=surrogate.masked_fill(term.low | term.high, 0))
    return term


def _no_trust_region(part: NoTrustRegion, x: _Inputs) -> _Term:
    nowhere = torch.zeros_like(x.lp, dtype=torch.bool)
    return _Term(-x.advantages * x.ratio * x.trace, nowhere, nowhere)


def _ppo_clip(part: PPOClip, x: _Inputs) -> _Term:
    trace = x.trace if part.cap is None else x.trace.minimum(part.cap / x.ratio.detach())
    ratio, weight = (x.ratio * trace, 1) if part.on == "product" else (x.ratio, trace)
    low = (x.advantages < 0) & (ratio < 1 - part.low)
    high = (x.advantages > 0) & (ratio > 1 + part.high)
    # -A clip(ratio) is the larger one, strictly, just there: at a tie the gradient is that of -A ratio
    ratio = torch.where(low | high, ratio.detach().clamp(1 - part.low, 1 + part.high), ratio)
    if part.dual is not None:
        dual = (x.advantages < 0) & (ratio > part.dual)
        ratio = ratio.masked_fill(dual, part.dual)
        high = high | dual
    return _Term(-x.advantages * ratio * weight, low, high)


def _cispo(part: CISPO, x: _Inputs) -> _Term:
    ratio = x.ratio.detach()
    weight = ratio.clamp(1 - part.low, 1 + part.high) * x.trace
    return _Term(-x.advantages * weight * x.lp, ratio < 1 - part.low, ratio > 1 + part.high)


def _binary_tv(part: BinaryTV, x: _Inputs) -> _Term:
    moved = x.lp.detach().exp() - x.olp.exp()
    return _binary(part, x, rises=moved <= part.high, falls=moved >= -part.low)


def _binary_kl(part: BinaryKL, x: _Inputs) -> _Term:
    lp = x.lp.detach()
    p, p_old = lp.exp(), x.olp.exp()
    divergence = p_old * (x.olp - lp) + (1 - p_old) * ((1 - p_old + 1e-8) / (1 - p + 1e-8)).log()
    return _binary(
        part, x, rises=(divergence <= part.high) | (p <= p_old), falls=(divergence <= part.low) | (p >= p_old)
    )


def _binary(part: BinaryTV | BinaryKL, x: _Inputs, rises: Tensor, falls: Tensor) -> _Term:
    """Keep a token with ``A > 0`` where ``rises`` holds, another one where ``falls`` holds."""
    positive = x.advantages > 0
    low, high = ~positive & ~falls, positive & ~rises
    weight = x.ratio.detach() * x.trace
    if part.cap is not None:
        weight = weight.clamp(max=part.cap)
    return _Term((-x.advantages * weight * x.lp).masked_fill(low | high, 0), low, high)


def _sapo(part: SAPO, x: _Inputs) -> _Term:
    tau = torch.full_like(x.advantages, part.tau_neg).masked_fill(x.advantages > 0, part.tau_pos)
    gate = 4 / tau * torch.sigmoid(tau * (x.ratio - 1))
    nowhere = torch.zeros_like(x.lp, dtype=torch.bool)
    return _Term(-x.advantages * gate * x.trace, nowhere, nowhere)


_TRUST_REGIONS: dict[type, Callable[[Any, _Inputs], _Term]] = {
    NoTrustRegion: _no_trust_region,
    PPOClip: _ppo_clip,
    CISPO: _cispo,
    BinaryTV: _binary_tv,
    BinaryKL: _binary_kl,
    SAPO: _sapo,
}


# ------------------------------------------------------------------------------------------------------ KL, aggregation


def _kl(part: KL, d: Tensor) -> Tensor:
    if part.kind == "k1":
        value = d
    elif part.kind == "k2":
        value = d.square() / 2
    else:
        bounded = d.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
        value = torch.expm1(-bounded) + bounded
        if part.kind == "k3+":
            k2 = d.square() / 2
            value = value.detach() + (k2 - k2.detach())
    return value if part.clamp is None else value.clamp(-part.clamp, part.clamp)


def _aggregate(
    objective: Objective, loss: Tensor, kept: Tensor, where: Layout, denominator: float | Tensor | None
) -> Tensor:
    sums = where.sum_per_sequence(loss)
    if objective.aggregation == "token-sum":
        return sums.sum()
    counts = where.sum_per_sequence(kept.to(loss.dtype))
    if objective.aggregation == "token-mean":
        return _divide(sums.sum(), counts.sum() if denominator is None else denominator)
    if objective.aggregation == "seq-mean-token-mean":
        sums = _divide(sums, counts)
    elif objective.aggregation == "seq-mean-token-sum-norm":
        longest = torch.cat((where.lengths, where.lengths.new_ones(1))).amax()
        sums = sums / (longest if objective.length_norm is None else objective.length_norm)
    return _divide(sums.sum(), (counts > 0).sum() if denominator is None else denominator)


def _divide(total: Tensor, count: float | Tensor) -> Tensor:
    """``total / count``; nothing, counted as 0, divides by 1."""
    if isinstance(count, Tensor):
        return total / count.detach().to(total.dtype).masked_fill(count == 0, 1)
    return total / (count or 1)


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
        mean(torch.expm1(log_ratio) - log_ratio),
        mean(kl),
        mean(entropy),
        weight.sum().square() / (tokens * weight.square().sum()).clamp(min=1),
        mean(clamped),
    )
    return dict(zip(METRICS, values, strict=True))
