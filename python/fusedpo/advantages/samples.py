"""Samples as users have them: tensors, NumPy arrays or lists, flat or per prompt, whole or split trajectories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .. import _checks
from ..ops.advantages import Groups, estimate
from ..reference.advantages.segments import kept, widened
from . import arguments


class HasArray(Protocol):
    """Such as an array of NumPy."""

    def __array__(self) -> Any: ...


Array = Tensor | HasArray | Sequence[Any]
T = TypeVar("T")


def as_tensor(name: str, values: Array, like: Tensor | None = None) -> Tensor:
    """Numbers as a tensor, on the device of ``like``: a tensor as it is, all else copied. None is nan."""
    if isinstance(values, Tensor):
        return values
    device = None if like is None else like.device
    try:
        if hasattr(values, "__array__"):
            array = values.__array__()
            if array.dtype != object:
                return torch.as_tensor(array.copy(), device=device)
            values = array.tolist()
        if isinstance(values, Sequence) and not isinstance(values, str):
            numbers = _map(values, lambda x: torch.nan if x is None else _checks.plain(x))
            return torch.as_tensor(numbers, device=device)
    except (TypeError, ValueError, RuntimeError):
        pass  # what holds something else than numbers, or rows of several lengths
    raise TypeError(f"{name} must be a torch.Tensor, an array or a list of numbers, got {_checks.brief(values)}")


def as_labels(name: str, values: Array, like: Tensor, number: Callable[[Any], int] | None = None) -> Tensor:
    """Integers as they are; labels of another kind by ``number``, None: from 0 on, as they first appear."""
    if isinstance(values, Tensor):
        return values
    given = values.__array__().tolist() if hasattr(values, "__array__") else values
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"{name} must be a torch.Tensor, an array or a list of labels, got {_checks.brief(values)}")
    labels = [_checks.plain(label) for label in given]
    if not all(isinstance(label, int) and not isinstance(label, bool) for label in labels):
        numbers: dict[Any, int] = {}
        try:
            labels = [numbers.setdefault(label, number(label) if number else len(numbers)) for label in labels]
        except TypeError:
            raise TypeError(f"{name} must hold one label per sample, got {_checks.brief(values)}") from None
    return torch.tensor(labels, dtype=torch.int64, device=like.device)


class Samples(NamedTuple):
    """Which samples are compared, and how their advantages are returned."""

    groups: Groups
    """Flat tensors. Its mask keeps one sample of each trajectory."""
    shape: torch.Size
    """That of the rewards."""
    first: Tensor | None = None
    """int64 ``[G]``: the first kept sample of the same trajectory, which stands for it; None: each is a trajectory."""
    kept: Tensor | None = None
    """The mask of the samples, where there is a ``first``."""

    def estimate(self, name: str, **numbers: Any) -> Tensor:
        """:func:`fusedpo.ops.advantages.estimate`, the advantage of a trajectory at all of its samples."""
        return self.returned(estimate(name, self.groups, **numbers))

    def returned(self, advantages: Tensor) -> Tensor:
        if self.first is not None:
            advantages = advantages[self.first]
            if self.kept is not None:
                advantages = advantages.where(self.kept, 0)
        return advantages if len(self.shape) == 1 else advantages.view(self.shape)

    def lengths(self, lengths: Array) -> Tensor:
        """``[G]``, of whole trajectories at the samples that stand for them; checked."""
        own = self.per_sample("lengths", lengths)
        arguments.lengths(own, self.groups.rewards, self.groups.mask if self.first is None else self.kept)
        if self.first is None:
            return own
        numbers = widened(own) if self.kept is None else widened(own).where(self.kept, 0)
        return torch.zeros_like(numbers).index_add(0, self.first, numbers)  # whole numbers: exact in any order

    def per_sample(self, name: str, values: Array) -> Tensor:
        """As a tensor, flat if it has the shape of the rewards."""
        tensor = as_tensor(name, values, self.groups.rewards)
        _checks.is_tensor(name, tensor)
        return tensor.reshape(-1) if tensor.shape == self.shape else tensor


def samples(
    rewards: Array,
    group_size: int | None = None,
    group_ids: Array | None = None,
    mask: Array | None = None,
    trajectory_ids: Array | None = None,
    *,
    grouped: bool = True,
) -> Samples:
    """Checks the arguments that all estimators share; ``grouped`` ones compare within groups."""
    lost = None if isinstance(rewards, Tensor) else missing(rewards)
    rewards = as_tensor("rewards", rewards)
    _checks.real("rewards", rewards)
    shape = rewards.shape
    if len(shape) not in (1, 2):
        raise ValueError(f"rewards must have shape [G], one per sample, or [prompts, samples], got {list(shape)}")
    if mask is not None:
        mask = as_tensor("mask", mask, rewards)
        _checks.mask(mask, tuple(shape), "one per sample", "rewards", rewards)
        mask = mask.reshape(-1)
    if len(shape) == 2:
        rewards = rewards.reshape(-1)
        if grouped:
            group_size = _per_prompt(shape[1], group_size, group_ids)
    if lost is not None:
        mask = ~lost if mask is None else (mask != 0) & ~lost
    if group_ids is not None:
        group_ids = as_labels("group_ids", group_ids, rewards)
    if grouped:
        arguments.groups(rewards, group_size, group_ids)
    groups = Groups(rewards, group_size, group_ids, mask)
    if trajectory_ids is None:
        return Samples(groups, shape)
    return _of_trajectories(groups, shape, as_labels("trajectory_ids", trajectory_ids, rewards))


def _of_trajectories(groups: Groups, shape: torch.Size, ids: Tensor) -> Samples:
    rewards = groups.rewards
    _checks.integer("trajectory_ids", ids)
    ids = ids.reshape(-1) if ids.shape == shape else ids
    _checks.shape("trajectory_ids", ids, tuple(rewards.shape), "one per sample")
    _checks.same_device("trajectory_ids", ids, "rewards", rewards)
    counted = kept(rewards, groups.mask)
    order = ids.argsort(stable=True)
    order = order[(~counted[order]).argsort(stable=True)]  # those that do not count come last
    starts = torch.ones_like(counted)
    starts[1:] = (ids[order].diff() != 0) | (counted[order].long().diff() != 0)
    position = torch.arange(len(order), device=order.device)
    first = torch.empty_like(order).index_copy(0, order, order[position.where(starts, 0).cummax(0).values])
    if _checks.values_are_free(rewards, ids):
        other = (rewards != rewards[first]) & counted & (rewards == rewards)
        if groups.group_ids is not None:
            other |= (groups.group_ids != groups.group_ids[first]) & counted
        if bool(other.any()):
            i = int(other.nonzero()[0])
            raise ValueError(
                f"samples of one trajectory must have one reward and one group, got other ones for samples "
                f"{int(first[i])} and {i} of trajectory {int(ids[i])}"
            )
    standing = counted & (first == position)
    return Samples(groups._replace(mask=standing), shape, first, None if groups.mask is None else counted)


def _per_prompt(of_a_row: int, group_size: int | None, group_ids: Array | None) -> int:
    if group_ids is not None or group_size not in (None, of_a_row):
        raise ValueError(
            f"rewards [prompts, samples] have a group per row: group_ids must be None and group_size None or "
            f"{of_a_row}, got {'group_ids' if group_ids is not None else _checks.brief(group_size)}"
        )
    return of_a_row


def missing(rewards: HasArray | Sequence[Any]) -> Tensor | None:
    """bool ``[G]``: which rewards are None, if there is any: samples that could not be scored."""
    if hasattr(rewards, "__array__"):
        array = rewards.__array__()
        rewards = array.tolist() if array.dtype == object else ()
    if not isinstance(rewards, Sequence) or isinstance(rewards, str):
        return None
    flat = [x for row in rewards for x in (row if isinstance(row, Sequence) else (row,))]
    return torch.tensor([x is None for x in flat]) if None in flat else None


def _map(values: Sequence[Any], function: Any) -> list[Any]:
    return [_map(x, function) if isinstance(x, Sequence) else function(x) for x in values]
