"""OREO: the soft Bellman residual of every state, as a loss of the policy and of a value model."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _checks, _tokens
from ._dtypes import wide
from .advantages import arguments
from .preferences import _mean_over, _or_one, _scaled
from .reference.layout import layout
from .segments import segment_sums, segments_of

__all__ = ["OREOLossOutput", "oreo_loss"]


class OREOLossOutput(NamedTuple):
    """``policy_loss`` is differentiable with respect to the log-probs, ``value_loss`` to the values."""

    policy_loss: Tensor
    value_loss: Tensor
    metrics: dict[str, Tensor]


def oreo_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    rewards: Tensor,
    *,
    beta: float,
    gradient: Literal["token", "step", "suffix", "sequence"] = "token",
    clip_log: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    step_ids: Tensor | None = None,
    num_steps: int | None = None,
    denominator: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
) -> OREOLossOutput:
    """OREO (2412.16145), as the authors' code has it: the mean over sequences of the mean over states of ``delta^2``.

    ``delta_t = V_t - R + beta sum_{i >= t} (lp - ref)_i`` over the kept tokens. There is a state before each kept
    token; with ``step_ids`` only before the first kept token of each step, with ``gradient="sequence"`` only before
    the first of the sequence. The loss of the values has the log-probs detached, that of the policy, which is the same
    number, the values. Its gradient goes through

    * ``"token"``: the state's own token (the authors' default);
    * ``"step"``: the tokens of the state's own step; needs ``step_ids``;
    * ``"suffix"``: all tokens that follow, which is the gradient of the loss itself (PCL);
    * ``"sequence"``: all tokens, of the one state.

    The authors add a KL divergence over the vocabulary, ``0.01 *`` :func:`fusedpo.exact_kl`, to the policy's loss.

    Args:
        logprobs, ref_logprobs, mask, cu_seqlens, step_ids, num_steps: as in :func:`fusedpo.sequence_logprobs`. Kept
            tokens whose step is below 0 are in the sums but have no state.
        values: like ``logprobs``, predicted before each token. Those at tokens without a state are not used.
        rewards: ``[num_sequences]``, of the whole sequence; 0 or 1 in the authors' scripts.
        beta: positive; 0.03 in the authors' scripts.
        clip_log: bound the sums of log-ratios to +- this in the loss of the values.
        denominator: what the sum over sequences is divided by instead of the number of those that have a state.
        loss_scale: a number or a 0-d tensor that multiplies both losses.

    Returns:
        Two losses, 0-d, float64 for float64 ``logprobs``, else float32. ``metrics``, 0-d: ``residual``, the mean of
        ``delta`` over sequences and states, ``log_ratios``, that of the sum over the whole sequence, and
        ``sequences``, how many have a state.

    Raises:
        TypeError: types and dtypes. ValueError: shapes, devices, values, ``step_ids`` where ``gradient`` has no use for
            them or needs them.
    """
    _checks.floating("logprobs", logprobs)
    arguments.choice("gradient", gradient, ("token", "step", "suffix", "sequence"))
    if (gradient == "step" and step_ids is None) or (gradient in ("token", "sequence") and step_ids is not None):
        need = "needs" if gradient == "step" else "has no use for"
        raise ValueError(f"gradient={gradient!r} {need} step_ids")
    sequences = segments_of("logprobs", logprobs, logprobs, mask, cu_seqlens, None, None)
    _tokens.check_per_token("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    _tokens.check_per_token("values", values, "logprobs", logprobs)
    _checks.real("rewards", rewards)
    _checks.shape("rewards", rewards, sequences.shape, "one per sequence")
    _checks.same_device("rewards", rewards, "logprobs", logprobs)
    arguments.positive("beta", beta)
    if clip_log is not None:
        arguments.positive("clip_log", clip_log)
    _tokens.check_count("denominator", denominator, "logprobs", logprobs)
    _tokens.check_number("loss_scale", loss_scale, "logprobs", logprobs)

    where, dtype = layout(logprobs, cu_seqlens), wide(logprobs)
    kept = sequences.kept
    x = (logprobs.reshape(-1).to(dtype) - ref_logprobs.detach().reshape(-1).to(dtype)).masked_fill(~kept, 0)
    ahead = x + where.sum_after(x, "all") if gradient == "suffix" else x.detach() + where.sum_after(x.detach(), "all")
    place = where.place(kept)
    if gradient == "sequence":
        state = kept & (place == 1)
        through = segment_sums(logprobs, ref_logprobs, None, sequences)[sequences.ids]
    elif step_ids is not None:
        steps = segments_of("logprobs", logprobs, logprobs, mask, cu_seqlens, step_ids, num_steps)
        first = place.new_full((steps.number + 1,), kept.numel() + 1)
        ids = steps.ids.where(steps.kept, steps.number)
        first = first.scatter_reduce(0, ids, place, "amin")
        state = steps.kept & (place == first[ids])
        through = segment_sums(logprobs, ref_logprobs, None, steps)[steps.ids] if gradient == "step" else ahead
    else:
        state, through = kept, x if gradient == "token" else ahead

    log_ratios = ahead.detach()
    v = values.reshape(-1).to(dtype).masked_fill(~state, 0)
    r = rewards.detach().to(dtype)[sequences.ids]
    states = sequences.only(state)
    number = states.sizes()
    has_state = number > 0
    sequences_with = has_state.sum()
    divisor = _or_one(sequences_with if denominator is None else denominator, dtype, logprobs.device)

    def mean(delta: Tensor) -> Tensor:
        per_sequence = segment_sums(delta.where(state, 0), None, None, states) / number.clamp(min=1)
        return per_sequence.sum() / divisor

    bounded = log_ratios if clip_log is None else log_ratios.clamp(-clip_log, clip_log)
    value_loss = mean((v - (r - beta * bounded)).square())
    # the value of the whole sum, the gradient of the part that `gradient` names
    log_ratios = log_ratios + (through - through.detach())
    residual = v.detach() - r + beta * log_ratios
    policy_loss = mean(residual.where(state, 0).square())
    with torch.no_grad():
        total = segment_sums(logprobs, ref_logprobs, None, sequences)
        metrics = {
            "residual": (mean(residual) * divisor / sequences_with.clamp(min=1)).float(),
            "log_ratios": _mean_over(has_state)(total),
            "sequences": sequences_with.float(),
        }
    return OREOLossOutput(
        _scaled(policy_loss, loss_scale, logprobs), _scaled(value_loss, loss_scale, logprobs), metrics
    )
