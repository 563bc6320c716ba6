"""Advantages of tokens and of reasoning steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import layout
from .segments import Groups, group_labels, kept, result_dtype, shift, suffix_scan, widened
from .whitening import whitened


class GAE(NamedTuple):
    advantages: Tensor
    returns: Tensor


class VTrace(NamedTuple):
    advantages: Tensor
    returns: Tensor


def _continues(like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Whether the next position, if there is one, belongs to the same sequence: bool ``[T]``."""
    boundary = torch.zeros(like.shape[-1] + 1, dtype=torch.bool, device=like.device)
    boundary[-1] = True
    if cu_seqlens is not None:
        boundary.index_fill_(0, cu_seqlens.long(), True)
    return ~boundary[1:]


def _of_sequence(x: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``x``, one per sequence, at each of the tokens ``like``."""
    return x[layout(like, cu_seqlens).sequence].view(like.shape)


class _Tokens:
    """What follows each token: the next kept token of its sequence, or the end."""

    def __init__(self, like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, bootstrap: Tensor | None) -> None:
        self.kept = kept(like, mask)
        self.continues = _continues(like, cu_seqlens)
        self.after_end: Tensor | float = 0.0
        if bootstrap is not None:
            self.after_end = _of_sequence(widened(bootstrap), like, cu_seqlens)

    def discounted(self, x: Tensor, decay: Tensor | float, after_end: Tensor | float = 0.0) -> Tensor:
        """``y_t = x_t + decay_t y`` of what follows; a token left out passes on what follows it, undiscounted."""
        decay = torch.zeros_like(x).add(decay).where(self.kept, 1)
        x = x.where(self.kept, 0)
        return suffix_scan(torch.where(self.continues, x, x + decay * after_end), decay.where(self.continues, 0))

    def following(self, y: Tensor, after_end: Tensor | float = 0.0) -> Tensor:
        """What follows, of a ``y`` that tokens left out pass on."""
        return torch.where(self.continues, shift(y), after_end)

    def following_value(self, values: Tensor) -> Tensor:
        return self.following(self.discounted(values, 0.0, self.after_end), self.after_end)


@torch.no_grad()
def reward_to_go(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    bootstrap: Tensor | None = None,
) -> Tensor:
    tokens = _Tokens(rewards, mask, cu_seqlens, bootstrap)
    to_go = tokens.discounted(widened(rewards), gamma, tokens.after_end)
    return to_go.where(tokens.kept, 0).to(result_dtype(rewards))


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
) -> GAE:
    dtype = result_dtype(rewards, values)
    tokens = _Tokens(rewards, mask, cu_seqlens, bootstrap)
    r, v = (widened(x).where(tokens.kept, 0) for x in (rewards, values))
    advantages = tokens.discounted(r + gamma * tokens.following_value(v) - v, gamma * lam).where(tokens.kept, 0)
    return GAE(advantages.to(dtype), (advantages + v).to(dtype))


@torch.no_grad()
def vtrace(
    rewards: Tensor,
    values: Tensor,
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    bootstrap: Tensor | None = None,
) -> VTrace:
    dtype = result_dtype(rewards, values)
    tokens = _Tokens(rewards, mask, cu_seqlens, bootstrap)
    r, v = (widened(x).where(tokens.kept, 0) for x in (rewards, values))
    log_ratio = widened(logprobs) - widened(old_logprobs)
    ratio = log_ratio.where(tokens.kept, 0).clamp(-20, 20).exp()
    rho = ratio.clamp(max=rho_bar)
    next_v = tokens.following_value(v)
    # v_t - V_t; it is 0 after the end.
    correction = tokens.discounted(rho * (r + gamma * next_v - v), gamma * lam * ratio.clamp(max=c_bar))
    advantages = rho * (r + gamma * (next_v + tokens.following(correction)) - v)
    return VTrace(*(x.where(tokens.kept, 0).to(dtype) for x in (advantages, v + correction)))


@torch.no_grad()
def reinforce_plus_plus(
    rewards: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, gamma: float = 1.0
) -> Tensor:
    to_go = reward_to_go(widened(rewards), mask=mask, cu_seqlens=cu_seqlens, gamma=gamma)
    return whitened(to_go, widened(kept(rewards, mask))).to(result_dtype(rewards))


@torch.no_grad()
def optimal_token_baseline(
    rewards: Tensor,
    *,
    old_logprobs: Tensor,
    sum_pi_squared: Tensor,
    is_weights: Tensor | None = None,
    mask: Tensor | None = None,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
) -> Tensor:
    counted = kept(rewards, mask)
    to_go = reward_to_go(widened(rewards), mask=mask)
    energy = 1 - 2 * widened(old_logprobs).exp() + widened(sum_pi_squared)  # of the score: |grad log pi|^2
    if is_weights is not None:
        energy = energy * widened(is_weights).square()
    energy = energy.where(counted, 0).flip(1)
    weight = suffix_scan(energy, torch.ones_like(energy)).flip(1).where(counted, 0)

    unsorted = to_go.new_zeros(len(to_go))
    labels = group_labels(unsorted, group_size, group_ids)
    groups = Groups.of(unsorted, labels, torch.ones_like(labels, dtype=torch.bool))
    returns, weights, present = (x[groups.order].T for x in (to_go, weight, widened(counted)))
    baseline = groups.total(weights * returns) / (groups.total(weights) + 1e-8)
    baseline = baseline.where(groups.total(present) > 1, 0).T
    advantages = to_go - torch.empty_like(to_go).index_copy(0, groups.order, baseline)
    return advantages.where(counted, 0).to(result_dtype(rewards))


@torch.no_grad()
def vineppo(values: Tensor, *, step_rewards: Tensor, step_ids: Tensor, whiten: bool = False) -> Tensor:
    dtype = result_dtype(values, step_rewards)
    r, v, missing = widened(step_rewards), widened(values), values.isnan()
    v = suffix_scan(torch.where(missing, pad(r, (0, 1)), v), widened(missing))
    advantages = (r + v[:, 1:] - v[:, :-1]).where(~missing[:, :-1], 0)
    # The column appended for tokens of no step.
    has_step = step_ids >= 0
    tokens = pad(advantages, (0, 1)).gather(1, step_ids.long().where(has_step, advantages.shape[1]))
    return (whitened(tokens, widened(has_step)) if whiten else tokens).to(dtype)


@torch.no_grad()
def rewards_on_kept(rewards: Tensor, mask: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    where = layout(rewards, cu_seqlens)
    counted = where.kept(mask)
    r = widened(rewards.reshape(-1))
    r = r.where(counted | ~r.isnan(), 0)
    # What follows is added to a token as long as it is skipped.
    skipped_next = (where.left > 1) & ~counted.roll(-1)
    own = suffix_scan(r, widened(skipped_next))
    # Before the first kept token the sum runs the other way.
    leading = where.place(counted) == 0
    leading_before = (where.before > 0) & leading.roll(1)
    early = suffix_scan(r.where(leading, 0).flip(0), widened(leading_before).flip(0)).flip(0)
    return (own + early).where(counted, 0).to(result_dtype(rewards)).view(rewards.shape)


@torch.no_grad()
def to_tokens(advantages: Tensor, mask: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    tokens = _of_sequence(widened(advantages), mask, cu_seqlens)
    return tokens.where(mask != 0, 0).to(result_dtype(advantages))
