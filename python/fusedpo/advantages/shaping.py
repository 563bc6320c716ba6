"""Rewards per token from outcomes, and penalties that are added to rewards before advantages are estimated."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import _checks
from ..reference.advantages.segments import result_dtype, widened
from ..reference.layout import layout
from ..reference.losses import LOG_RATIO_CLAMP
from . import arguments
from .samples import Array, as_tensor

KINDS = ("k1", "k2", "k3")


@torch.no_grad()
def token_rewards(
    outcomes: Array,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: Literal["k1", "k2", "k3"] = "k1",
    kl_at: Literal["token", "last"] = "token",
) -> Tensor:
    """The outcome of each sequence at its last kept token, less a KL penalty; shape of ``mask``.

    For :func:`gae`, :func:`reward_to_go` and :func:`reinforce_plus_plus`; the sum over a sequence is what an estimator
    of outcomes takes. The last position may be padding, an end-of-sequence token that is not trained, or the answer of
    a tool: the last token that the policy wrote is the last one that ``mask`` keeps. A sequence without any loses its
    outcome.

    Args:
        outcomes: one per sequence, ``[B]``, packed ``[num_sequences]``: a tensor, an array or a list; None and nan are
            no reward, 0.
        mask: ``[B, T]``, or packed ``[T]`` or ``[1, T]`` with ``cu_seqlens``; nonzero keeps a token.
        logprobs, ref_logprobs: of the shape of ``mask``, in nats: under the policy that sampled and the reference.
            Needed where ``kl_coef`` is not 0.
        kl_kind: with ``d = clamp(logprobs - ref_logprobs, -20, 20)``: ``k1`` is ``d``, ``k2`` ``d^2 / 2``, ``k3``
            ``exp(-d) - 1 + d``.
        kl_at: ``"token"`` subtracts ``kl_coef`` times the KL of each token there (PPO of InstructGPT); ``"last"`` that
            of the whole sequence at its last kept token, with the outcome (TRL's RLOO).

    Returns float64 for float64 ``outcomes``, else float32; 0 at masked tokens. No gradient.

    Raises as the package says; ``ValueError`` if one of the log-probs is missing.
    """
    _checks.is_tensor("mask", mask)
    arguments.tokens("mask", mask, None, cu_seqlens)
    outcomes = as_tensor("outcomes", outcomes, mask)
    arguments.per_sequence("outcomes", outcomes, "mask", mask, cu_seqlens)
    _checks.finite("kl_coef", kl_coef)
    arguments.choice("kl_kind", kl_kind, KINDS)
    arguments.choice("kl_at", kl_at, ("token", "last"))
    where, dtype = layout(mask, cu_seqlens), result_dtype(outcomes)
    counted = where.kept(mask)
    place = where.place(counted)
    last = counted & (place == where.sum_per_sequence(counted.long())[where.sequence])
    outcome = widened(outcomes).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)[where.sequence]
    rewards = outcome.where(last, 0)
    if kl_coef != 0:
        if logprobs is None or ref_logprobs is None:
            missing = "logprobs" if logprobs is None else "ref_logprobs"
            raise ValueError(f"{missing} is needed by kl_coef={kl_coef}, got None")
        arguments.per_token("logprobs", logprobs, "mask", mask)
        arguments.per_token("ref_logprobs", ref_logprobs, "mask", mask)
        d = (widened(logprobs) - widened(ref_logprobs)).reshape(-1).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
        kl = {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(-d) + d}[kl_kind]()
        kl = kl.where(counted, 0)
        if kl_at == "last":
            kl = where.sum_per_sequence(kl)[where.sequence].where(last, 0)
        rewards = rewards - kl_coef * kl
    return rewards.to(dtype).reshape(mask.shape)


@torch.no_grad()
def overlong_penalty(lengths: Array, *, max_length: int, buffer: int, factor: float = 1.0) -> Tensor:
    """DAPO's soft overlong punishment (2503.14476, equation 13), to be added to the rewards; shape of ``lengths``.

    With ``L = max_length``: 0 up to ``L - buffer`` tokens, from there on linearly down to ``-factor`` at ``L``, and
    ``-factor`` beyond. DAPO has ``max_length=20480`` and ``buffer=4096``.

    Args:
        lengths: number of tokens of each response; a tensor, an array or a list.

    Returns float32, no gradient. Raises as the package says; ``ValueError`` if not ``1 <= buffer <= max_length``.
    """
    lengths = as_tensor("lengths", lengths)
    _checks.real("lengths", lengths)
    _checks.whole_number("buffer", buffer, at_least=1)
    _checks.whole_number("max_length", max_length, at_least=buffer)
    _checks.finite("factor", factor)
    over = lengths.to(torch.float32) - (max_length - buffer)
    return -factor * (over / buffer).clamp(0, 1)
