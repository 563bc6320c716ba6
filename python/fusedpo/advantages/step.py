"""Estimators for tokens and reasoning steps, and what turns advantages of samples into those of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

from .. import _checks, backends
from .._ranks import split_sequences
from ..ops.advantages import estimate_tokens
from ..reference import advantages as reference
from ..reference.advantages import GAE as GAE
from ..reference.advantages import VTrace as VTrace
from ..statistics import token_statistics
from . import arguments
from .registry import register

if TYPE_CHECKING:
    from ..distributed import ContextParallel


@register("reward_to_go")
@split_sequences("rewards", "mask")
def reward_to_go(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    bootstrap: Tensor | None = None,
    cp: ContextParallel | None = None,
) -> Tensor:
    """The discounted sum of the rewards from each token on: ``G_t = r_t + gamma G_{t+1}``; shape of ``rewards``.

    ``bootstrap``: one value per sequence, ``[B]``, packed ``[num_sequences]``: ``G`` after its last token, the value of
    the state where a truncated sequence was cut off, 0 for one that ended; None is 0 for all.
    Raises as the package says; ``ValueError`` for ``gamma`` outside [0, 1].
    """
    arguments.rewards_per_token(rewards, mask, cu_seqlens)
    gamma = arguments.unit_interval("gamma", gamma)
    if bootstrap is not None:
        arguments.per_sequence("bootstrap", bootstrap, "rewards", rewards, cu_seqlens)
    return estimate_tokens("reward_to_go", rewards, mask=mask, cu_seqlens=cu_seqlens, gamma=gamma, bootstrap=bootstrap)


@register("gae")
@split_sequences("rewards", "values", "mask")
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
    cp: ContextParallel | None = None,
) -> GAE:
    """GAE (1506.02438): ``A_t = delta_t + gamma lam A_{t+1}`` with ``delta_t = r_t + gamma V_{t+1} - V_t``.

    ``values``: floating-point, of the shape of ``rewards``. After the end of a sequence A is 0 and V is ``bootstrap``,
    one value per sequence as in :func:`reward_to_go`; None is 0 for all.

    Returns ``GAE(advantages, returns)``, ``returns = advantages + values``; apply :func:`whiten` to the advantages for
    verl's. Raises as the package says; ``ValueError`` for ``gamma`` or ``lam`` outside [0, 1].
    """
    arguments.rewards_per_token(rewards, mask, cu_seqlens)
    arguments.per_token("values", values, "rewards", rewards)
    gamma = arguments.unit_interval("gamma", gamma)
    lam = arguments.unit_interval("lam", lam)
    if bootstrap is not None:
        arguments.per_sequence("bootstrap", bootstrap, "rewards", rewards, cu_seqlens)
    return estimate_tokens(
        "gae", rewards, values=values, mask=mask, cu_seqlens=cu_seqlens, gamma=gamma, lam=lam, bootstrap=bootstrap
    )


@register("vtrace")
@split_sequences("rewards", "values", "logprobs", "old_logprobs", "mask")
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
    cp: ContextParallel | None = None,
) -> VTrace:
    """V-trace (IMPALA, 1802.01561): off-policy value targets v and advantages, from truncated likelihood ratios.

    With ``ratio_t = exp(logprobs - old_logprobs)``, its exponent clamped to +-20, ``rho_t = min(rho_bar, ratio_t)`` and
    ``c_t = lam min(c_bar, ratio_t)``::

        v_t = V_t + rho_t (r_t + gamma V_{t+1} - V_t) + gamma c_t (v_{t+1} - V_{t+1})
        A_t = rho_t (r_t + gamma v_{t+1} - V_t)

    ``values``, ``logprobs`` of the policy to evaluate and ``old_logprobs`` of the one that sampled: floating-point, of
    the shape of ``rewards``. After the end of a sequence v and V are ``bootstrap``, as in :func:`gae`.

    Returns ``VTrace(advantages, returns)``, where ``returns`` are the targets v. On-policy they are those of
    :func:`gae`; so are the advantages for ``lam=1``. Raises as the package says; ``ValueError`` for ``gamma`` or
    ``lam`` outside [0, 1], ``rho_bar`` or ``c_bar`` not > 0.
    """
    arguments.rewards_per_token(rewards, mask, cu_seqlens)
    arguments.per_token("values", values, "rewards", rewards)
    arguments.per_token("logprobs", logprobs, "rewards", rewards)
    arguments.per_token("old_logprobs", old_logprobs, "rewards", rewards)
    gamma = arguments.unit_interval("gamma", gamma)
    lam = arguments.unit_interval("lam", lam)
    rho_bar = arguments.positive("rho_bar", rho_bar)
    c_bar = arguments.positive("c_bar", c_bar)
    if bootstrap is not None:
        arguments.per_sequence("bootstrap", bootstrap, "rewards", rewards, cu_seqlens)
    return estimate_tokens(
        "vtrace",
        rewards,
        values=values,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        mask=mask,
        cu_seqlens=cu_seqlens,
        gamma=gamma,
        lam=lam,
        rho_bar=rho_bar,
        c_bar=c_bar,
        bootstrap=bootstrap,
    )


@register("reinforce_plus_plus")
@split_sequences("rewards", "mask")
def reinforce_plus_plus(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    cp: ContextParallel | None = None,
) -> Tensor:
    """REINFORCE++ (2501.03262): :func:`reward_to_go`, whitened over all kept tokens of the batch.

    A nan reaches all tokens. Over several batches: ``whiten(reward_to_go(...), mask=mask, group=...)``.
    Raises as the package says; ``ValueError`` for ``gamma`` outside [0, 1].
    """
    arguments.rewards_per_token(rewards, mask, cu_seqlens)
    gamma = arguments.unit_interval("gamma", gamma)
    return estimate_tokens("reinforce_plus_plus", rewards, mask=mask, cu_seqlens=cu_seqlens, gamma=gamma)


@register("optimal_token_baseline")
def optimal_token_baseline(
    rewards: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    sum_pi_squared: Tensor | None = None,
    logits: Tensor | None = None,
    token_ids: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    is_weights: Tensor | None = None,
    mask: Tensor | None = None,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
) -> Tensor:
    """Optimal token baseline, as in verl: ``G`` minus ``sum_i W_it G_it / (sum_i W_it + 1e-8)`` over its group.

    ``[B, T]`` to ``[B, T]``: the samples of a group are compared position by position. ``G`` is :func:`reward_to_go`,
    ``W`` the sum of ``1 - 2 pi + sum_v pi_v^2`` up to the token, that is of the squared norms of the scores. Both come
    from ``logits`` ``[B, T, V]``, ``token_ids`` ``[B, T]`` and ``temperature`` in one read
    (:func:`fusedpo.token_statistics`); or they are given as ``old_logprobs`` and ``sum_pi_squared``, the sum of all
    squared probabilities at the token. ``is_weights`` (importance weights): each term times its square. These are
    floating-point ``[B, T]``. ``group_size`` or ``group_ids`` ``[B]``. Where one sample of a group is left at a
    position, the baseline is 0; so it is for a group of one.
    Raises as the package says.
    """
    _checks.real("rewards", rewards)
    if rewards.dim() != 2:
        raise ValueError(f"rewards must have shape [B, T], got {list(rewards.shape)}")
    arguments.rewards_per_token(rewards, mask)
    arguments.groups(rewards, group_size, group_ids)
    if logits is not None:
        if old_logprobs is not None or sum_pi_squared is not None or token_ids is None:
            raise ValueError("logits come with token_ids, in the place of old_logprobs and sum_pi_squared")
        _checks.shape("token_ids", token_ids, tuple(rewards.shape), "that of rewards")
        with torch.no_grad():
            found = token_statistics(logits, token_ids, temperature=temperature, mask=mask)
        old_logprobs, sum_pi_squared = found.logprobs, found.log_sum_sq_probs.exp()
    elif old_logprobs is None or sum_pi_squared is None or token_ids is not None:
        raise ValueError("either logits and token_ids must be given, or old_logprobs and sum_pi_squared")
    arguments.per_token("old_logprobs", old_logprobs, "rewards", rewards)
    arguments.per_token("sum_pi_squared", sum_pi_squared, "rewards", rewards)
    if is_weights is not None:
        arguments.per_token("is_weights", is_weights, "rewards", rewards)
    backends.choose("optimal_token_baseline", rewards.device.type)
    return reference.optimal_token_baseline(
        rewards,
        old_logprobs=old_logprobs,
        sum_pi_squared=sum_pi_squared,
        is_weights=is_weights,
        mask=mask,
        group_size=group_size,
        group_ids=group_ids,
    )


@register("vineppo")
def vineppo(values: Tensor, *, step_rewards: Tensor, step_ids: Tensor, whiten: bool = False) -> Tensor:
    """VinePPO (2410.01679): each token of reasoning step s gets ``A_s = r_s + V_{s+1} - V_s``; ``[B, T]``.

    ``values`` ``[B, S + 1]``, floating-point: estimates at the query and after each step, see :func:`pool_rollouts`;
    the last is the terminal value, 0 for a response that has ended. nan is a missing estimate: ``V_s = r_s + V_{s+1}``,
    hence ``A_s = 0``; a missing terminal value is 0. ``step_rewards`` ``[B, S]``, the outcome on the last step as a
    rule. A row with fewer than S steps is padded with values nan and rewards 0. ``step_ids`` ``[B, T]``, int32 or
    int64: the step of each token, negative for none (advantage 0), see :func:`segment_steps`.

    Per row ``sum_s A_s = sum_s r_s + V_S - V_0``. ``whiten=True`` applies :func:`whiten` to the tokens that have a
    step, as the authors do. Raises as the package says; ``ValueError`` for step ids of S or more.
    """
    _checks.floating("values", values)
    if values.dim() != 2 or values.shape[1] < 1:
        raise ValueError(f"values must have shape [B, S + 1], got {list(values.shape)}")
    batch, steps = values.shape[0], values.shape[1] - 1
    _checks.real("step_rewards", step_rewards)
    _checks.shape("step_rewards", step_rewards, (batch, steps), "one less per row than values")
    _checks.same_device("step_rewards", step_rewards, "values", values)
    _checks.integer("step_ids", step_ids)
    if step_ids.dim() != 2 or step_ids.shape[0] != batch:
        raise ValueError(f"step_ids must have shape [{batch}, T] (as many rows as values), got {list(step_ids.shape)}")
    _checks.same_device("step_ids", step_ids, "values", values)
    if arguments.unchecked("step_advantages", step_ids) and bool((step_ids >= steps).any()):
        raise ValueError(f"step_ids must be less than the number of steps {steps}, got {int(step_ids.max())}")
    return estimate_tokens("vineppo", values, step_rewards=step_rewards, step_ids=step_ids, whiten=whiten)


def whiten(advantages: Tensor, *, mask: Tensor | None = None, group: distributed.ProcessGroup | None = None) -> Tensor:
    """``(a - mean) / sqrt(var + 1e-8)`` over all kept elements, of any shape, with the unbiased variance; 0 elsewhere.

    ``group``: mean and variance are those of all its processes, each of which has to call, one without kept elements
    too; ``torch.distributed.group.WORLD`` is all of them, None this process alone.
    As verl's ``masked_whiten``, but a single kept element gives 0, not an error. Raises as the package says.
    """
    _checks.real("advantages", advantages)
    _checks.mask(mask, tuple(advantages.shape), "that of advantages", "advantages", advantages)
    if group is not None and not isinstance(group, distributed.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    if group is not None:
        backends.choose("whiten (process group)", advantages.device.type)
        return reference.whiten(advantages, mask=mask, group=group)
    return estimate_tokens("whiten", advantages, mask=mask)


@split_sequences("rewards", "mask")
def rewards_on_kept(
    rewards: Tensor, mask: Tensor, *, cu_seqlens: Tensor | None = None, cp: ContextParallel | None = None
) -> Tensor:
    """``rewards`` with each that stands at a skipped token added to the last kept token before it; same shape.

    For the outcome of a rollout that ended in what the policy did not write, such as the answer of a tool: it belongs
    to the last token that it did write. A reward before the first kept token goes to that one, so that the sum over a
    sequence does not change, unless it has no kept token at all. nan at a skipped token is no reward. Skipped tokens
    get 0, as the estimators want them. Raises as the package says.
    """
    _checks.is_tensor("mask", mask)
    arguments.tokens("rewards", rewards, mask, cu_seqlens)
    return reference.rewards_on_kept(rewards, mask, cu_seqlens=cu_seqlens)


@split_sequences("mask")
def to_tokens(
    advantages: Tensor, mask: Tensor, *, cu_seqlens: Tensor | None = None, cp: ContextParallel | None = None
) -> Tensor:
    """The advantage of its sequence at every token that ``mask`` keeps, 0 at the others; shape of ``mask``.

    ``advantages`` ``[B]``, packed ``[num_sequences]``. The losses do this by themselves: it is for what needs an
    array per token, such as :func:`whiten` over tokens. Raises as the package says.
    """
    _checks.is_tensor("mask", mask)
    arguments.tokens("mask", mask, None, cu_seqlens)
    arguments.per_sequence("advantages", advantages, "mask", mask, cu_seqlens)
    return estimate_tokens("to_tokens", advantages, mask=mask, cu_seqlens=cu_seqlens)
