"""Clip-Cov and KL-Cov (2505.22617): what tokens with a high covariance of advantage and log-prob do to the entropy.

``cov = (A - mean A) (lp - mean lp)``, means over the kept tokens of the batch. Both methods act on a few tokens that
are chosen among all of the batch, by rank or at random. That is no function of one token, hence no part of an
objective: Clip-Cov is a factor of the policy term, KL-Cov a term beside it. Formulas and defaults are those of verl.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _tokens
from ._dtypes import wide
from .reference.advantages.segments import result_dtype
from .reference.losses import LOG_RATIO_CLAMP, pessimistic_clip

__all__ = ["clip_cov_weights", "kl_cov_penalty"]


@torch.no_grad()
def clip_cov_weights(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Clip-Cov: ``is_weights`` that are 0 at tokens drawn from those with ``low < cov < high``, and 1 elsewhere.

    Use them with ``ppo(clip_low, clip_high)`` of the same bounds: a token that its clip cuts is not drawn.

    Args:
        logprobs, old_logprobs: floating-point, padded ``[B, T]``, or packed ``[T]`` or ``[1, T]`` with ``cu_seqlens``.
        advantages, mask, cu_seqlens: as in :func:`fusedpo.policy_loss`.
        fraction: of the kept tokens, how many are drawn, rounded down and at least 1.
        generator: of the device of ``logprobs``; the same state draws the same tokens.

    Returns:
        Shaped like ``logprobs``, float64 for float64 ``logprobs``, else float32; not differentiable.

    Raises:
        TypeError: types and dtypes. ValueError: shapes, devices, ``cu_seqlens`` that are no offsets, a ``fraction``
            outside of (0, 1].
    """
    fraction, clip_low, clip_high, low, high = map(_checks.plain, (fraction, clip_low, clip_high, low, high))
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high), ("low", low), ("high", high)):
        _checks.number(name, value)
    lp, olp, a, kept = _flat(logprobs, old_logprobs, advantages, mask, cu_seqlens, fraction)
    ratio = (lp - olp).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    _, clipped_low, clipped_high = pessimistic_clip(a, ratio, 1 - clip_low, 1 + clip_high, None)
    cov = _covariance(lp, a, kept)
    candidates = kept & ~clipped_low & ~clipped_high & (cov > low) & (cov < high)
    order = torch.rand(lp.shape, generator=generator, dtype=torch.float32, device=lp.device)
    drawn = _largest(order, candidates, kept, fraction)
    return (~drawn).to(lp.dtype).reshape(logprobs.shape)


def kl_cov_penalty(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    fraction: float = 2e-4,
    coef: float = 0.1,
) -> Tensor:
    """KL-Cov: ``coef * |lp - olp|`` at the tokens with the largest ``cov``, 0 elsewhere.

    The loss is that of ``Objective(TokenRatio(), NoTrustRegion())`` plus :func:`fusedpo.aggregation.aggregate` of this.

    Args:
        As in :func:`clip_cov_weights`; ``fraction`` of the kept tokens have the largest ``cov``.

    Returns:
        Shaped like ``logprobs``, float64 for float64 ``logprobs``, else float32; differentiable with respect to
        ``logprobs``.

    Raises:
        As :func:`clip_cov_weights`.
    """
    old_logprobs, advantages, mask, cu_seqlens, fraction, coef = _checks.taken(
        old_logprobs, advantages, mask, cu_seqlens, fraction, coef
    )
    _checks.finite("coef", coef)
    lp, olp, a, kept = _flat(logprobs, old_logprobs, advantages, mask, cu_seqlens, fraction)
    chosen = _largest(_covariance(lp.detach(), a, kept), kept, kept, fraction)
    return (coef * (lp - olp).abs()).masked_fill(~chosen, 0).reshape(logprobs.shape)


def _flat(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    fraction: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs, advantages, 0 where masked, and which tokens are kept."""
    _checks.floating("logprobs", logprobs)
    where, kept = _tokens.layout_of("logprobs", logprobs, mask, cu_seqlens)
    _tokens.check_per_token("old_logprobs", old_logprobs, "logprobs", logprobs)
    _tokens.check_weights("advantages", advantages, "logprobs", logprobs, where.lengths.numel())
    _checks.number("fraction", fraction)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {_checks.brief(fraction)}")

    def tokens(x: Tensor) -> Tensor:
        return where.per_token(x).to(result_dtype(logprobs)).masked_fill(~kept, 0)

    return tokens(logprobs), tokens(old_logprobs).detach(), tokens(advantages).detach(), kept


def _covariance(lp: Tensor, a: Tensor, kept: Tensor) -> Tensor:
    count = kept.sum().clamp(min=1)
    return (a - a.sum() / count) * (lp - lp.sum() / count)


def _largest(score: Tensor, candidates: Tensor, kept: Tensor, fraction: float) -> Tensor:
    """The candidates with the largest scores, ``fraction`` of the kept tokens of them, at least 1."""
    number = (fraction * kept.sum().to(wide(kept))).floor().clamp(min=1)
    order = score.masked_fill(~candidates, -torch.inf).argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return candidates & (rank < number)
