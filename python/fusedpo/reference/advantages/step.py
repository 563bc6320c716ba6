"""Advantages of tokens and of reasoning steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .segments import result_dtype, shift, suffix_scan


class GAE(NamedTuple):
    advantages: Tensor
    returns: Tensor


def _continues(like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Whether the next position, if there is one, belongs to the same sequence: bool ``[T]``."""
    boundary = torch.zeros(like.shape[-1] + 1, dtype=torch.bool, device=like.device)
    if cu_seqlens is not None:
        boundary.index_fill_(0, cu_seqlens.long(), True)
    return ~boundary[1:]


def _kept(like: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask != 0


def _discounted(x: Tensor, decay: float, kept: Tensor, continues: Tensor) -> Tensor:
    """``y_t = x_t + decay * y`` of the next kept token of the sequence; 0 where not kept."""
    # A token left out passes on what follows it, undiscounted.
    factor = torch.full_like(x, decay).where(kept, 1).where(continues, 0)
    return suffix_scan(x.where(kept, 0), factor).where(kept, 0)


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float,
    lam: float,
) -> GAE:
    dtype = result_dtype(rewards, values)
    kept, continues = _kept(rewards, mask), _continues(rewards, cu_seqlens)
    r, v = rewards.double().where(kept, 0), values.double().where(kept, 0)
    this_or_next = suffix_scan(v, (~kept & continues).double())
    next_v = shift(this_or_next).where(continues, 0)
    advantages = _discounted(r + gamma * next_v - v, gamma * lam, kept, continues)
    return GAE(advantages.to(dtype), (advantages + v).to(dtype))


@torch.no_grad()
def reinforce_plus_plus(
    rewards: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, gamma: float = 1.0
) -> Tensor:
    kept = _kept(rewards, mask)
    to_go = _discounted(rewards.double(), gamma, kept, _continues(rewards, cu_seqlens))
    return _whitened(to_go, kept).to(result_dtype(rewards))


@torch.no_grad()
def vineppo(values: Tensor, *, step_rewards: Tensor, step_ids: Tensor, whiten: bool = False) -> Tensor:
    dtype = result_dtype(values, step_rewards)
    r, v, missing = step_rewards.double(), values.double(), values.isnan()
    v = suffix_scan(torch.where(missing, pad(r, (0, 1)), v), missing.double())
    advantages = (r + v[:, 1:] - v[:, :-1]).where(~missing[:, :-1], 0)
    # The column appended for tokens of no step.
    kept = step_ids >= 0
    tokens = pad(advantages, (0, 1)).gather(1, step_ids.long().where(kept, advantages.shape[1]))
    return (_whitened(tokens, kept) if whiten else tokens).to(dtype)


@torch.no_grad()
def whiten(advantages: Tensor, *, mask: Tensor | None = None) -> Tensor:
    return _whitened(advantages.double(), _kept(advantages, mask)).to(result_dtype(advantages))


def _whitened(x: Tensor, kept: Tensor) -> Tensor:
    count = kept.sum()
    centred = x - x.where(kept, 0).sum() / count
    variance = centred.square().where(kept, 0).sum() / (count - 1).clamp(min=1)
    return (centred * (variance + 1e-8).rsqrt()).where(kept, 0)
