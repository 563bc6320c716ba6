"""Checks that several estimators share. Every message names the argument, what was given and what is expected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .. import _checks, backends
from ..ops.advantages import Groups
from ..reference.advantages import segments
from ..reference.advantages.segments import group_labels, kept

if TYPE_CHECKING:
    from .samples import Samples

SmallGroups = Literal["error", "zero"]


def unchecked(operator: str, *tensors: Tensor | None) -> bool:
    """Whether values are to be checked here: where reading them is free, and no kernel does it, as on the CPU."""
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device.type
    checked = device == "cpu" and backends.choose(operator, device) == "native"
    return not checked and _checks.values_are_free(*given)


def positive(name: str, value: float) -> float:
    _checks.number(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")
    result: float = _checks.plain(value)
    return result


def unit_interval(name: str, value: float) -> float:
    _checks.number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    result: float = _checks.plain(value)
    return result


def choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {_checks.brief(value)}")


def groups(rewards: Tensor, group_size: int | None, group_ids: Tensor | None) -> None:
    """``rewards`` of any shape, one sample per index of the first dimension."""
    samples = rewards.shape[0]
    if (group_size is None) == (group_ids is None):
        raise ValueError(
            f"exactly one of group_size and group_ids is needed, got {'neither' if group_ids is None else 'both'}"
        )
    if group_ids is not None:
        _checks.integer("group_ids", group_ids)
        _checks.shape("group_ids", group_ids, (samples,), "one per sample")
        _checks.same_device("group_ids", group_ids, "rewards", rewards)
    elif group_size is not None:
        _checks.whole_number("group_size", group_size, at_least=1)
        if samples % group_size:
            raise ValueError(f"group_size must divide the number of samples, got {group_size} for {samples} samples")


def group_sizes(at_least: int, rule: str, samples: Samples, small_groups: SmallGroups) -> Samples:
    """The groups that count, where one with a kept sample needs ``at_least`` of them.

    Smaller groups raise (``rule`` is what the message says) or, with ``small_groups="zero"``, are left out.
    """
    choice("small_groups", small_groups, ("error", "zero"))
    if small_groups == "zero":
        groups = samples.groups._replace(mask=in_large_groups(at_least, samples.groups))
        return samples._replace(groups=groups)
    rewards, group_size, group_ids, mask = samples.groups
    if group_size is not None and mask is None:
        if group_size < at_least:
            raise ValueError(f"{rule}, but group_size is {group_size}")
    elif unchecked("group_advantages", rewards, group_ids, mask):
        ids = group_labels(rewards, group_size, group_ids)
        labels, sizes = (ids if mask is None else ids[mask != 0]).unique(return_counts=True)
        small = (sizes < at_least).nonzero()
        if small.numel():
            group, size = int(labels[small[0]]), int(sizes[small[0]])
            raise ValueError(f"{rule}, but group {group} has size {size}")
    return samples


@torch.no_grad()
def in_large_groups(at_least: int, groups: Groups) -> Tensor:
    """bool ``[G]``: kept samples of groups that keep ``at_least``."""
    rewards, group_size, group_ids, mask = groups
    counted = kept(rewards, mask)
    if group_size is not None:
        rows = counted.view(-1, group_size)
        return (rows & (rows.sum(1, keepdim=True) >= at_least)).view(-1)
    runs = segments.Groups.of(counted, group_labels(rewards, group_size, group_ids), counted)
    return counted & (torch.empty_like(runs.size).index_copy(0, runs.order, runs.size) >= at_least)


def subset_size(
    k: int, samples: Samples, small_groups: SmallGroups = "error", *, at_least: int = 1, spare: int = 0
) -> Samples:
    """:func:`group_sizes` for groups of at least ``k + spare``; besides, ``at_least <= k``."""
    _checks.whole_number("k", k, at_least)
    rule = f"k must be at most the size of the group{f' - {spare}' if spare else ''}, got k={k}"
    return group_sizes(k + spare, rule, samples, small_groups)


def lengths(tensor: Tensor, rewards: Tensor, mask: Tensor | None) -> None:
    _checks.real("lengths", tensor)
    _checks.shape("lengths", tensor, tuple(rewards.shape), "one per sample")
    _checks.same_device("lengths", tensor, "rewards", rewards)
    if unchecked("group_advantages", tensor, mask):
        kept = tensor if mask is None else tensor[mask != 0]
        if not bool((kept >= 0).all()):
            raise ValueError(f"lengths must be >= 0, got {kept.min()}")


def token_shape(name: str, tensor: Tensor, cu_seqlens: Tensor | None) -> None:
    """``[B, T]`` or ``[T]``; with ``cu_seqlens``, ``[T]`` or ``[1, T]``."""
    if cu_seqlens is None:
        if tensor.dim() not in (1, 2):
            raise ValueError(f"{name} must have shape [B, T] or [T], got {list(tensor.shape)}")
        return
    if tensor.dim() != 1 and (tensor.dim() != 2 or tensor.shape[0] != 1):
        raise ValueError(f"{name} must have shape [T] or [1, T] with cu_seqlens, got {list(tensor.shape)}")
    _checks.cu_seqlens(cu_seqlens, tensor.shape[-1], name, tensor)


def tokens(name: str, tensor: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    _checks.real(name, tensor)
    token_shape(name, tensor, cu_seqlens)
    _checks.mask(mask, tuple(tensor.shape), f"that of {name}", name, tensor)


def rewards_per_token(tensor: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None = None) -> None:
    """As :func:`tokens`, and none is lost: where a token is skipped there is 0, or nan, which is no reward."""
    tokens("rewards", tensor, mask, cu_seqlens)
    if mask is None or not _checks.values_are_free(tensor, mask):
        return
    lost = tensor[(mask == 0) & (tensor != 0) & (tensor == tensor)]
    if lost.numel():
        raise ValueError(
            f"rewards must be 0 where mask is 0, got {lost[0].item()}: it would be lost; "
            "advantages.rewards_on_kept(rewards, mask) adds it to the last kept token before it"
        )


def per_token(name: str, tensor: Tensor, of: str, other: Tensor) -> None:
    """A floating-point tensor of the shape of ``other``."""
    _checks.floating(name, tensor)
    _checks.shape(name, tensor, tuple(other.shape), f"that of {of}")
    _checks.same_device(name, tensor, of, other)


def per_sequence(name: str, tensor: Tensor, of: str, tokens: Tensor, cu_seqlens: Tensor | None) -> None:
    """One number per sequence: ``[B]``, with ``cu_seqlens`` ``[num_sequences]``, ``[1]`` for a single one."""
    _checks.real(name, tensor)
    rows = tokens.shape[0] if tokens.dim() == 2 else 1
    _checks.shape(name, tensor, (rows if cu_seqlens is None else cu_seqlens.numel() - 1,), "one per sequence")
    _checks.same_device(name, tensor, of, tokens)
