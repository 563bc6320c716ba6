"""Groups of samples that are spread over data-parallel ranks: a few numbers per sample are gathered."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from .. import _checks
from ..advantages.samples import Array, as_labels, as_tensor, missing
from .collectives import gather

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def over_ranks(estimator: Callable[..., Tensor], group: ProcessGroup, rewards: Array, **arguments: Any) -> Tensor:
    """``estimator`` of the samples of all ranks, in their order, of whose results this rank takes its own.

    All ranks have equally many samples, and what is given is given on all of them, of one kind; ValueError on all of
    them otherwise, where no device is waited for.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"dp_group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    own, hashed = _per_sample(rewards, arguments)
    rewards = own["rewards"]
    _checks.real("rewards", rewards)
    if not rewards.dim():
        raise ValueError("rewards must have shape [G], one per sample, or [prompts, samples], got []")
    for name, x in own.items():
        _checks.real(name, x)
        if x.numel() != rewards.numel():
            raise ValueError(f"{name} must have {rewards.numel()} values, one per sample of this rank, got {x.numel()}")
        _checks.same_device(name, x, "rewards", rewards)
    baselines = arguments.get("baselines")
    if baselines is not None:
        baselines = arguments["baselines"] = as_tensor("baselines", baselines, rewards)
        _checks.real("baselines", baselines)
        _checks.same_device("baselines", baselines, "rewards", rewards)
    _check_that_ranks_agree(own, baselines, hashed, group)
    # With labels there is one per label of the whole batch; else they belong to the samples of this rank.
    if baselines is not None and "group_ids" not in own and baselines.dim():
        arguments |= _of_all_ranks({"baselines": baselines}, group)
    first, count = group.rank() * rewards.shape[0], rewards.shape[0]
    return estimator(**_of_all_ranks(own, group), **arguments)[first : first + count]


def _per_sample(rewards: Array, arguments: dict[str, Any]) -> tuple[dict[str, Tensor], set[str]]:
    """What has a value per sample, taken out of ``arguments``; and the names of labels that are hashes now.

    Dtypes do not depend on the values of a rank.
    """
    given = {name: x for name in ("mask", "lengths") if (x := arguments.pop(name, None)) is not None}
    scores = as_tensor("rewards", rewards)
    if not isinstance(rewards, Tensor):  # a reward of None, here or on another rank
        lost = missing(rewards)
        kept = torch.ones(scores.shape, dtype=torch.bool) if lost is None else ~lost.view(scores.shape)
        given["mask"] = kept if "mask" not in given else kept & (as_tensor("mask", given["mask"]).cpu() != 0)
        scores = scores.to(torch.get_default_dtype())
    own = {"rewards": scores, **{name: as_tensor(name, x, scores) for name, x in given.items()}}
    hashed = set()
    for name in ("group_ids", "trajectory_ids"):
        if (labels := arguments.pop(name, None)) is not None:
            hashes: dict[object, int] = {}
            own[name] = as_labels(name, labels, scores, number=partial(_hash, hashes=hashes))
            hashed |= {name} if hashes else set()
    return own, hashed


def _hash(label: object, hashes: dict[object, int]) -> int:
    """The same on all ranks, which number what they have in an order of their own; two share one at odds of 2^-63.

    It is kept in ``hashes``.
    """
    hashes[label] = int.from_bytes(blake2b(repr(label).encode(), digest_size=8).digest(), signed=True)
    return hashes[label]


KINDS = ("nothing", "integers", "floats", "float64", "labels that are no integers")


def _check_that_ranks_agree(
    own: dict[str, Tensor], baselines: Tensor | None, hashed: set[str], group: ProcessGroup
) -> None:
    """What one of them alone has would never arrive, and labels of two kinds never meet."""

    def kind(name: str, x: Tensor | None) -> int:
        if x is None or name in hashed:
            return 0 if x is None else 4
        return x.is_floating_point() + 1 + (x.dtype == torch.float64)

    rewards = own["rewards"]
    if not _checks.values_are_free(rewards):
        return
    names = ("rewards", "mask", "lengths", "group_ids", "trajectory_ids")
    kinds = {name: kind(name, own.get(name)) for name in names} | {"baselines": kind("baselines", baselines)}
    said = {"samples": rewards.shape[0], "samples in a row": rewards.shape[1:].numel(), **kinds}
    said["number of baselines"] = -1 if baselines is None else baselines.numel()
    said["dimensions of baselines"] = -1 if baselines is None else baselines.dim()
    of_ranks = gather(torch.tensor(list(said.values()), device=rewards.device), group)
    for what, values in zip(said, of_ranks.T.tolist(), strict=True):
        if len(set(values)) > 1:
            found = ", ".join(KINDS[value] if what in kinds else str(value) for value in values)
            raise ValueError(f"all ranks of dp_group must have the same {what}, got {found}")


def _of_all_ranks(own: dict[str, Tensor], group: ProcessGroup) -> dict[str, Tensor]:
    """Integers and floats are gathered apart: labels are any integers."""
    whole: dict[str, Tensor] = {}
    for floating in (True, False):
        given = {name: x.detach() for name, x in own.items() if x.is_floating_point() == floating}
        if given:
            dtype = torch.int64
            if floating:
                dtype = torch.float64 if any(x.dtype == torch.float64 for x in given.values()) else torch.float32
            gathered = gather(torch.stack([x.reshape(-1).to(dtype) for x in given.values()]), group)
            for (name, x), of_all in zip(given.items(), gathered.unbind(1), strict=True):
                whole[name] = of_all.reshape(-1, *x.shape[1:]).to(x.dtype)
    return whole
