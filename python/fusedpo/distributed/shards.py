"""Which columns of the vocabulary this rank holds: from arguments, or from the placements of a DTensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from .. import _checks
from .collectives import gather, is_split

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MAX_COLUMNS = 1 << 24  # a header is made of float32 numbers


class Shard(NamedTuple):
    """Columns ``[start, start + width)`` of the vocabulary, the first ``valid`` of which are no padding."""

    group: ProcessGroup | None  # None: all columns are here
    start: int
    width: int
    valid: int
    vocab_size: int  # 0: all columns of all ranks count


def of_arguments(
    name: str, width: int, tp_group: ProcessGroup | None, vocab_start: int | None, vocab_size: int | None
) -> Shard:
    """For ``width`` columns of the argument ``name``."""
    if tp_group is not None and not isinstance(tp_group, dist.ProcessGroup):
        raise TypeError(f"tp_group must be a torch.distributed.ProcessGroup or None, got {type(tp_group).__name__}")
    if tp_group is not None and tp_group.rank() < 0:
        raise ValueError("tp_group must be a group that this rank belongs to")
    if vocab_size is not None:
        _checks.whole_number("vocab_size", vocab_size, at_least=1, expected="an int or None")
    if vocab_start is not None:
        _checks.whole_number("vocab_start", vocab_start, at_least=0, expected="an int or None")
    if not is_split(tp_group):
        if vocab_start not in (None, 0):
            raise ValueError(f"vocab_start must be None without a tp_group of several ranks, got {vocab_start}")
        if width == 0 or (vocab_size or 0) > width:
            raise ValueError(f"{name} must have at least vocab_size={vocab_size or 1} columns, got {width}")
        return Shard(None, 0, width, vocab_size or width, vocab_size or 0)
    assert tp_group is not None
    start = tp_group.rank() * width if vocab_start is None else int(vocab_start)
    if start + width >= MAX_COLUMNS:
        raise ValueError(f"{name} must end before column {MAX_COLUMNS} of the vocabulary, got {start + width}")
    valid = width if vocab_size is None else max(0, min(width, vocab_size - start))
    return Shard(tp_group, start, width, valid, vocab_size or 0)


class Placed(NamedTuple):
    """Where a DTensor lies: its mesh, which dimension of that splits the vocabulary, and the placements of its rows."""

    mesh: Any
    dim: int
    rows: tuple[Any, ...]  # of each mesh dimension; Replicate() in place of the vocabulary's

    def local(self, name: str, x: Any) -> Any:
        """Another argument, unwrapped if it is a DTensor that is placed like the rows."""
        if not _checks.is_dtensor(x):
            return x
        if x.device_mesh != self.mesh or tuple(x.placements) != self.rows:
            raise TypeError(
                f"{name} must be a plain tensor of the rows of this rank, or a DTensor placed like them, "
                f"{list(self.rows)} on {self.mesh}, got {list(x.placements)} on {x.device_mesh}"
            )
        return x.to_local()


def placed(name: str, x: Any, vocab_dim: int, *, rows: bool = True) -> Placed:
    """What the placements of a DTensor say, whose dimension ``vocab_dim`` is the vocabulary."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Split

    vocab_dim %= x.dim()
    splits = []
    for dim, placement in enumerate(x.placements):
        if type(placement) not in (Split, Replicate):
            raise TypeError(f"{name} must be placed by Shard and Replicate alone, got {list(x.placements)}")
        if isinstance(placement, Split) and placement.dim % x.dim() == vocab_dim:
            splits.append(dim)
        elif isinstance(placement, Split) and not rows:
            raise TypeError(f"{name} must be split along the vocabulary alone, got {list(x.placements)}")
    if len(splits) > 1:
        raise TypeError(f"{name} must be split along the vocabulary by one mesh dimension, got {list(x.placements)}")
    if not splits:
        raise TypeError(
            f"{name} must be a plain tensor where it holds the whole vocabulary, got a DTensor placed "
            f"{list(x.placements)}: {name}.to_local()"
        )
    around = [Replicate() if dim == splits[0] else p for dim, p in enumerate(x.placements)]
    return Placed(x.device_mesh, splits[0], tuple(around))


def of_placement(
    name: str,
    x: Any,
    where: Placed,
    vocab_dim: int,
    tp_group: ProcessGroup | None,
    vocab_start: int | None,
    vocab_size: int | None,
) -> Shard:
    """The shard that a DTensor is; arguments may say the same, and nothing else."""
    group: ProcessGroup = where.mesh.get_group(where.dim)
    ranks, rank = where.mesh.size(where.dim), where.mesh.get_local_rank(where.dim)
    each = -(-x.shape[vocab_dim] // ranks)  # as torch.chunk cuts
    start = min(rank * each, x.shape[vocab_dim])
    width = min(each, x.shape[vocab_dim] - start)
    if tp_group is not None and tp_group.group_name != group.group_name:
        raise ValueError(f"tp_group must be None or the group of the mesh dimension that splits {name}")
    if vocab_start is not None and vocab_start != start:
        raise ValueError(f"vocab_start must be None or {start}, where {name} is placed, got {vocab_start}")
    return of_arguments(name, width, group, start if is_split(group) else None, vocab_size)


def check_headers(parts: Tensor) -> int | None:
    """The size of the vocabulary by what all ranks say, where that may be read; all raise if they disagree.

    Elsewhere what they disagree on gives NaN.
    """
    if not _checks.values_are_free(parts):
        return None
    headers = parts[:, 0, :3].tolist()
    ends, problems = 0, False
    for start, width, size in headers:
        problems = problems or start != ends or size != headers[0][2]
        ends += width
    if problems or headers[0][2] > ends:
        ranges = [f"[{start:.0f}, {start + width:.0f})" for start, width, _ in headers]
        sizes = sorted({int(size) for _, _, size in headers})
        raise ValueError(
            "vocab_start must make the columns of the ranks follow each other from 0 on, and vocab_size be one number "
            f"that is not larger than their end; got the columns {', '.join(ranges)} and vocab_size "
            f"{', '.join(str(size or None) for size in sizes)}"
        )
    return int(headers[0][2] or ends)


def check_same_rows(shard: Shard, *tensors: Tensor | None) -> None:
    """Under ``FUSEDPO_DEBUG=1``: ranks hold the same ids, masks and numbers of them. A gather of others would hang."""
    if not _checks.DEBUG or shard.group is None:
        return
    numbers = []
    for x in tensors:
        if x is not None:
            flat = x.detach().reshape(-1).to(torch.float64)
            weight = torch.arange(1, flat.numel() + 1, device=flat.device, dtype=torch.float64)
            numbers += [weight.new_tensor(float(flat.numel())), (flat.nan_to_num() * weight).sum()]
        else:
            numbers += [torch.full((), -1.0, dtype=torch.float64)] * 2
    device = next(x.device for x in tensors if x is not None)
    seen = gather(torch.stack([x.to(device) for x in numbers]), shard.group)
    if not bool((seen == seen[0]).all()):
        raise ValueError("token_ids, mask and temperature must be the same on all ranks of tp_group")
