"""Rewards compared with a baseline, of their group as a rule. How the estimators differ: docs/advantages.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from .. import _checks
from .._ranks import spread_over_ranks
from ..ops.advantages import estimate
from ..reference.advantages.group import batch_std
from ..reference.advantages.segments import result_dtype, widened
from . import arguments
from .registry import register
from .samples import Array, as_tensor, samples

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@register("grpo")
@spread_over_ranks
def grpo(
    rewards: Array,
    *,
    group_size: int | None = None,
    group_ids: Array | None = None,
    std: bool | Literal["group", "batch"] = True,
    eps: float = 1e-6,
    mask: Array | None = None,
    trajectory_ids: Array | None = None,
    dp_group: ProcessGroup | None = None,
) -> Tensor:
    """GRPO (2402.03300): ``(r - mean) / (std + eps)`` of the group, ``[G]`` to ``[G]``; std is the unbiased one.

    ``std=False``: no division. ``std="batch"``: the mean of the group, but the standard deviation of all kept rewards
    (2508.08221; TRL's ``scale_rewards="batch"``), so that a group of nearly equal rewards is not blown up. Equal
    rewards, and so a group of one, give exactly 0 (for a group of one, verl returns its reward).
    Raises as the package says; ``ValueError`` for ``eps <= 0``.
    """
    given = samples(rewards, group_size, group_ids, mask, trajectory_ids)
    eps = arguments.positive("eps", eps)
    if std == "batch":
        r, dtype = widened(given.groups.rewards), result_dtype(given.groups.rewards)
        centred = estimate("dr_grpo", given.groups._replace(rewards=r))
        return given.returned((centred / (batch_std(r, given.groups.mask) + eps)).to(dtype))
    arguments.choice("std", std, (True, False, "group"))
    return given.estimate("grpo", std=bool(std), eps=eps)


@register("dr_grpo")
@spread_over_ranks
def dr_grpo(
    rewards: Array,
    *,
    group_size: int | None = None,
    group_ids: Array | None = None,
    mask: Array | None = None,
    trajectory_ids: Array | None = None,
    dp_group: ProcessGroup | None = None,
) -> Tensor:
    """Dr. GRPO (2503.20783): ``r - mean`` of the group, ``[G]`` to ``[G]``; equal rewards give exactly 0."""
    given = samples(rewards, group_size, group_ids, mask, trajectory_ids)
    return given.estimate("dr_grpo")


@register("rloo")
@spread_over_ranks
def rloo(
    rewards: Array,
    *,
    group_size: int | None = None,
    group_ids: Array | None = None,
    mask: Array | None = None,
    trajectory_ids: Array | None = None,
    dp_group: ProcessGroup | None = None,
) -> Tensor:
    """RLOO (2402.14740): ``r`` minus the mean of the others in the group, ``[G]`` to ``[G]``.

    Equal rewards give exactly 0; so does a group of one, which has no others.
    """
    given = samples(rewards, group_size, group_ids, mask, trajectory_ids)
    return given.estimate("rloo")


@register("opo")
@spread_over_ranks
def opo(
    rewards: Array,
    *,
    lengths: Array,
    group_size: int | None = None,
    group_ids: Array | None = None,
    scope: Literal["group", "batch"] = "group",
    mask: Array | None = None,
    trajectory_ids: Array | None = None,
    dp_group: ProcessGroup | None = None,
) -> Tensor:
    """OPO (2505.23585): ``r - sum(len r) / sum(len)``, the baseline of least variance if gradients grow with length.

    ``[G]`` to ``[G]``. ``lengths`` ``[G]``, >= 0: number of response tokens of each sample. A sample without tokens has
    no weight in the baseline; a group without tokens has advantage 0. A group of one is its own baseline: 0, as in the
    authors' code (verl returns its reward). ``scope="batch"``: one baseline for the whole batch, no groups.
    Raises as the package says; ``ValueError`` for negative lengths, and for groups given with ``scope="batch"``.
    """
    arguments.choice("scope", scope, ("group", "batch"))
    if scope == "batch" and (group_size is not None or group_ids is not None):
        raise ValueError("scope='batch' has one baseline for all samples: group_size and group_ids must be None")
    given = samples(rewards, group_size, group_ids, mask, trajectory_ids, grouped=scope == "group")
    return given.estimate("opo", lengths=given.lengths(lengths), scope=scope)


@register("reinforce_plus_plus_baseline")
@spread_over_ranks
def reinforce_plus_plus_baseline(
    rewards: Array,
    *,
    lengths: Array,
    group_size: int | None = None,
    group_ids: Array | None = None,
    mask: Array | None = None,
    trajectory_ids: Array | None = None,
    dp_group: ProcessGroup | None = None,
) -> Tensor:
    """REINFORCE++-baseline (2501.03262): ``r - mean`` of the group, whitened over all tokens of the batch.

    ``[G]`` to ``[G]``. ``lengths`` ``[G]``, >= 0: number of response tokens of each sample, all of which get its
    advantage; so mean and variance count a sample ``lengths`` times, and :func:`whiten` of the tokens gives the same. A
    sample without tokens gets 0. A group of one is its own baseline (for verl, that is 0).

    Whitening shifts: a group of equal rewards does not get exactly 0, and a nan reaches the whole batch. Over several
    processes: ``whiten(to_tokens(dr_grpo(...), mask), mask=mask, group=...)``.
    Raises as the package says; ``ValueError`` for negative lengths.
    """
    given = samples(rewards, group_size, group_ids, mask, trajectory_ids)
    return given.estimate("reinforce_plus_plus_baseline", lengths=given.lengths(lengths))


@register("gpg")
@spread_over_ranks
def gpg(
    rewards: Array,
    *,
    f_norm: float = 1.0,
    group_size: int | None = None,
    group_ids: Array | None = None,
    mask: Array | None = None,
    trajectory_ids: Array | None = None,
    dp_group: ProcessGroup | None = None,
) -> Tensor:
    """GPG, as in verl: ``alpha (r - mean) / f_norm`` with the mean of the group, ``[G]`` to ``[G]``.

    ``alpha`` is the number of kept samples in the batch over the number of those with a reward other than 0, at least
    1: it depends on what stands for a wrong answer, 0 or -1. Equal rewards give exactly 0, and so does a group of one
    (for verl, ``alpha r / f_norm``). Raises as the package says; ``ValueError`` for ``f_norm <= 0``.
    """
    given = samples(rewards, group_size, group_ids, mask, trajectory_ids)
    f_norm = arguments.positive("f_norm", f_norm)
    return given.estimate("gpg", f_norm=f_norm)


@register("reinforce_rej")
@spread_over_ranks
def reinforce_rej(
    rewards: Array,
    *,
    group_size: int | None = None,
    group_ids: Array | None = None,
    mask: Array | None = None,
    trajectory_ids: Array | None = None,
    dp_group: ProcessGroup | None = None,
) -> Tensor:
    """Reinforce-Rej (2504.11343): the reward itself, 0 in a group of equal rewards; ``[G]`` to ``[G]``.

    A group of one keeps its reward, as in the authors' code. There is no baseline.
    """
    given = samples(rewards, group_size, group_ids, mask, trajectory_ids)
    return given.estimate("reinforce_rej")


@register("raft")
def raft(rewards: Tensor, *, mask: Array | None = None, trajectory_ids: Array | None = None) -> Tensor:
    """RAFT, as in 2504.11343: ``max(r, 0)``, so only samples of positive reward count; ``[G]`` to ``[G]``.

    There are neither groups nor a baseline.
    """
    return samples(rewards, mask=mask, trajectory_ids=trajectory_ids, grouped=False).estimate("raft")


@register("remax")
@spread_over_ranks
def remax(
    rewards: Array,
    *,
    baselines: Array,
    group_size: int | None = None,
    group_ids: Array | None = None,
    mask: Array | None = None,
    trajectory_ids: Array | None = None,
    dp_group: ProcessGroup | None = None,
) -> Tensor:
    """ReMax (2310.10505): ``r`` minus the reward of the greedy response to the same prompt; ``[G]`` to ``[G]``.

    ``baselines``: the rewards of the greedy responses, ``[G]``, one per sample; or one per prompt, ``[P]``, with
    ``group_size`` (``P = G / group_size``) or ``group_ids`` (0 to P - 1). Not centred. For rewards per token, subtract
    ``to_tokens(baselines, mask)`` from :func:`reward_to_go`. With ``dp_group`` they are those of this rank, as rewards
    are; with ``group_ids`` besides, those of all prompts.
    Raises as the package says; ``ValueError`` for group ids outside 0 to P - 1.
    """
    per_prompt = group_size is not None or group_ids is not None
    given = samples(rewards, group_size, group_ids, mask, trajectory_ids, grouped=per_prompt)
    flat, size, ids, counted = given.groups
    if not per_prompt and len(given.shape) == 2 and tuple(as_tensor("baselines", baselines).shape) == given.shape[:1]:
        size, per_prompt = given.shape[1], True
    baselines = given.per_sample("baselines", baselines)
    _checks.real("baselines", baselines)
    _checks.same_device("baselines", baselines, "rewards", flat)
    if not per_prompt:
        _checks.shape("baselines", baselines, tuple(flat.shape), "one per sample, without group_size or group_ids")
    else:
        if baselines.dim() != 1:
            raise ValueError(f"baselines must have shape [P], one per prompt, got {list(baselines.shape)}")
        if size is not None:
            _checks.shape("baselines", baselines, (flat.numel() // size,), "one per group of group_size")
        elif ids is not None and arguments.unchecked("group_advantages", ids, counted):
            labels = ids if counted is None else ids[counted != 0]
            wrong = labels[(labels < 0) | (labels >= baselines.numel())]
            if wrong.numel():
                raise ValueError(f"group_ids must be 0 to {baselines.numel() - 1}, as baselines, got {int(wrong[0])}")
    given = given._replace(groups=given.groups._replace(group_size=size))
    return given.estimate("remax", baselines=baselines)
