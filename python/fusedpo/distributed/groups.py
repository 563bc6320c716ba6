"""Groups of samples that are spread over data-parallel ranks: a few numbers per sample are gathered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from .. import _checks
from ..advantages.samples import Array, as_tensor
from .collectives import gather

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def over_ranks(
    estimator: Callable[..., Tensor],
    group: ProcessGroup,
    rewards: Array,
    per_sample: Mapping[str, Array | None],
    **others: Any,
) -> Tensor:
    """``estimator`` of the samples of all ranks, in their order, of whose results this rank takes its own.

    All ranks have equally many samples. Integers and floats are gathered apart: labels are any integers.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"dp_group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    rewards = as_tensor("rewards", rewards)
    if rewards.dim() == 2:  # a group per row: rows of all ranks
        width = rewards.shape[1]
        flat = {name: None if x is None else as_tensor(name, x).reshape(-1) for name, x in per_sample.items()}
        if others.get("group_size") is None and flat.get("group_ids") is None:
            others["group_size"] = width
        return over_ranks(estimator, group, rewards.reshape(-1), flat, **others).reshape(rewards.shape)
    _checks.real("rewards", rewards)
    count = rewards.shape[0] if rewards.dim() else 0
    given = {"rewards": rewards, **{name: as_tensor(name, x) for name, x in per_sample.items() if x is not None}}
    for name, x in given.items():
        _checks.real(name, x)
        _checks.shape(name, x, (count,), "one per sample of this rank")
        _checks.same_device(name, x, "rewards", rewards)
    whole: dict[str, Tensor] = {}
    for floating in (True, False):
        names = [name for name, x in given.items() if x.is_floating_point() == floating]
        if names:
            dtype = torch.int64
            if floating:
                dtype = torch.float64 if any(given[n].dtype == torch.float64 for n in names) else torch.float32
            gathered = gather(torch.stack([given[name].detach().to(dtype) for name in names]), group)
            for name, x in zip(names, gathered.transpose(0, 1).reshape(len(names), -1), strict=True):
                whole[name] = x.to(given[name].dtype)
    first = group.rank() * count
    return estimator(whole.pop("rewards"), **whole, **others)[first : first + count]
