"""Data that another policy sampled: importance weights, and masks that reject what is too far away.

The log-probs of an inference engine differ from those of the trainer for the same weights, and asynchronous training
samples with older weights. With ``w = pi_old / pi_rollout``, :func:`importance_weights` gives the ``is_weights`` of
:func:`fusedpo.policy_loss`, and :func:`rejection_mask` its ``mask``.

Decoupled PPO, whose ratio is taken to a proximal policy while another one sampled, is the same combination::

    is_weights, mask = importance_weights(proximal_logprobs, behaviour_logprobs, mask=mask, high=None)
    policy_loss(logprobs, proximal_logprobs, advantages, mask=mask, is_weights=is_weights, objective=ppo())
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from . import _checks, _tokens
from .reference.advantages.segments import result_dtype
from .reference.aggregation import aggregate
from .reference.layout import Layout
from .reference.losses import LOG_RATIO_CLAMP

__all__ = ["CRITERIA", "importance_weights", "rejection_mask"]

Level = Literal["token", "sequence"]
Mode = Literal["truncate", "mask", "reject"]
CRITERIA = (
    *("token_k1", "token_k2", "token_k3"),
    *("seq_sum_k1", "seq_sum_k2", "seq_sum_k3"),
    *("seq_mean_k1", "seq_mean_k2", "seq_mean_k3"),
    *("seq_max_k2", "seq_max_k3"),
)


@torch.no_grad()
def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    level: Level = "token",
    mode: Mode = "truncate",
    low: float | None = None,
    high: float | None = 2.0,
    normalise: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weights ``w = exp(clamp(log pi_old - log pi_rollout, -20, 20))`` of tokens, or of sequences.

    ``level="sequence"`` sums the log-ratios of the kept tokens of a sequence before ``exp``; each token carries the
    weight of its sequence. What happens to ``w`` outside of ``[low, high]``:

    ============  ===================================================================  ==============================
    ``mode``      weight and mask                                                      known as
    ============  ===================================================================  ==============================
    ``truncate``  ``clip(w, low, high)``                                               TIS
    ``mask``      weight 0; the token still counts in the denominator of the loss      IcePop; TRL's ``*_mask``
    ``reject``    weight 0, and taken out of the mask, so that it counts no longer     MIS
    ============  ===================================================================  ==============================

    Args:
        old_logprobs: log-probs in nats by the trainer, floating-point: padded ``[B, T]``, or packed ``[T]`` or
            ``[1, T]`` with ``cu_seqlens``.
        rollout_logprobs: like ``old_logprobs``, by the policy that sampled.
        mask, cu_seqlens: as in :func:`fusedpo.policy_loss`.
        low, high: positive bounds of ``w``; None is no bound.
        normalise: divide the weights by their mean, over the tokens or the sequences of this batch that the returned
            mask keeps, unless it is below 1e-8.

    Returns:
        ``(is_weights, mask)``, both shaped like ``old_logprobs``: float64 for float64 ``old_logprobs``, else float32, 0
        at masked tokens; and bool. Nothing is differentiable.

    Raises:
        TypeError: types and dtypes. ValueError: shapes, devices, ``cu_seqlens`` that are no offsets, bounds that are
            not positive or not in order, an unknown ``level`` or ``mode``.

    Source: ``rollout_corr_helper`` of verl, whose ``rollout_is_threshold="lo_hi"`` is ``mode="mask"``.
    """
    if level not in get_args(Level):
        raise ValueError(f"level must be one of {get_args(Level)}, got {_checks.brief(level)}")
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, got {_checks.brief(mode)}")
    low, high = _checks.plain(low), _checks.plain(high)
    for name, bound in (("low", low), ("high", high)):
        if bound is not None:
            _checks.number(name, bound, "a float or None")
    lower, upper = 0.0 if low is None else low, math.inf if high is None else high
    if (low is not None and not low > 0) or not upper > 0 or not lower <= upper:
        raise ValueError(f"low and high must be > 0 or None, and low <= high, got {low} and {high}")
    where, kept, log_ratio = _log_ratio(old_logprobs, rollout_logprobs, mask, cu_seqlens)

    if level == "sequence":
        log_ratio = where.sum_per_sequence(log_ratio)[where.sequence]
    weights = log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    if mode == "truncate":
        weights = weights.clamp(lower, upper)
    else:
        inside = (weights >= lower) & (weights <= upper)
        weights = weights.masked_fill(~inside, 0)
        if mode == "reject":
            kept = kept & inside
    weights = weights.masked_fill(~kept, 0)
    if normalise:
        mean = aggregate(weights, kept, where, "token-mean" if level == "token" else "seq-mean-token-mean")
        weights = weights / mean.where(mean > 1e-8, 1)
    return weights.reshape(old_logprobs.shape), kept.reshape(old_logprobs.shape)


@torch.no_grad()
def rejection_mask(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    criteria: Mapping[str, float | Sequence[float]],
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The mask without the tokens, or the whole sequences, that fail one of ``criteria``.

    With ``l = clamp(log pi_old - log pi_rollout, -20, 20)``, estimates of the divergence are ``k1 = -l``,
    ``k2 = l^2 / 2`` and ``k3 = exp(l) - 1 - l``. A criterion bounds the estimate of a token (``token_*``), or the sum,
    mean or maximum over the kept tokens of a sequence (``seq_sum_*``, ``seq_mean_*``, ``seq_max_*``).

    Args:
        old_logprobs, rollout_logprobs, mask, cu_seqlens: as in :func:`importance_weights`.
        criteria: names from :data:`CRITERIA`, with their bounds. ``k1``: ``(low, high)`` of the ratio that its
            exponential is, ``pi_rollout / pi_old``; a number ``u`` means ``(1 / u, u)``. ``k2``, ``k3``: the largest
            value that passes.

    Returns:
        bool, shaped like ``old_logprobs``.

    Raises:
        TypeError: types and dtypes. ValueError: shapes, devices, ``cu_seqlens`` that are no offsets, an unknown
            criterion, bounds that are not positive or not in order.

    Source: ``rollout_corr_helper`` of verl. ``{"seq_sum_k1": u}`` with weights per sequence is its MIS,
    ``{"seq_mean_k1": u}`` its Geo-RS.
    """
    where, kept, log_ratio = _log_ratio(old_logprobs, rollout_logprobs, mask, cu_seqlens)
    log_ratio = log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    estimates = {"k1": -log_ratio, "k2": log_ratio.square() / 2, "k3": torch.expm1(log_ratio) - log_ratio}
    passed = kept
    for name, bounds in criteria.items():
        low, high = _bounds(name, bounds)
        level, _, kind = name.rpartition("_")
        value = estimates[kind]
        if level == "seq_max":
            value = value.new_zeros(where.lengths.shape).scatter_reduce(0, where.sequence, value, "amax")
        elif level != "token":
            value = where.sum_per_sequence(value)
            if level == "seq_mean":
                value = value / where.sum_per_sequence(kept.to(value.dtype)).clamp(min=1)
        inside = (value >= low) & (value <= high)
        passed = passed & (inside if level == "token" else inside[where.sequence])
    return passed.reshape(old_logprobs.shape)


def _log_ratio(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Layout, Tensor, Tensor]:
    """The layout, which tokens are kept, and the log-ratio, 0 where masked."""
    _checks.floating("old_logprobs", old_logprobs)
    where, kept = _tokens.layout_of("old_logprobs", old_logprobs, mask, cu_seqlens)
    _tokens.check_per_token("rollout_logprobs", rollout_logprobs, "old_logprobs", old_logprobs)
    dtype = result_dtype(old_logprobs)
    log_ratio = old_logprobs.reshape(-1).to(dtype) - rollout_logprobs.reshape(-1).to(dtype)
    return where, kept, log_ratio.masked_fill(~kept, 0)


def _bounds(name: str, bounds: float | Sequence[float]) -> tuple[float, float]:
    """Bounds of the estimate itself."""
    if name not in CRITERIA:
        raise ValueError(f"criteria must be among {CRITERIA}, got {_checks.brief(name)}")
    several = not isinstance(bounds, str) and isinstance(bounds, Sequence)
    given: Any = bounds if several else [bounds]
    numbers = [_checks.plain(bound) for bound in given]
    for number in numbers:
        _checks.number(f"criteria[{name!r}]", number, "a float or two")
    got = _checks.brief(bounds)
    if name.endswith("k1"):
        if not several:
            numbers = [1 / numbers[0] if numbers[0] else 0.0, numbers[0]]
        if len(numbers) != 2 or not 0 < numbers[0] <= numbers[1]:
            raise ValueError(f"criteria[{name!r}] must be (low, high) with 0 < low <= high, or u >= 1, got {got}")
        return math.log(numbers[0]), math.log(numbers[1])
    if several or not numbers[0] > 0:
        raise ValueError(f"criteria[{name!r}] must be one number > 0, got {got}")
    return -math.inf, numbers[0]
