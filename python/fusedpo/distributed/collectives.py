"""The collectives of this package: gathers of equal parts, which round nothing, and sums and maxima of a few numbers.

None is differentiable. What a caller differentiates is written out: the backwards of torch's differentiable collectives
add the gradients of ranks that hold one and the same loss, which multiplies it by their number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# torch 2.13 has renamed them
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending:
    """A gather that is under way. ``wait`` orders streams; on accelerators it does not block the host."""

    def __init__(self, source: Tensor, group: ProcessGroup) -> None:
        size = group.size()
        self.source = source.contiguous()  # kept until all ranks have it
        if torch.compiler.is_compiling():
            self.work = None
            self.result = torch.ops._c10d_functional.all_gather_into_tensor(self.source, size, group.group_name)
        else:
            # gloo takes the concatenated shape only
            self.result = self.source.new_empty((size * self.source.shape[0], *self.source.shape[1:]))
            self.work = all_gather(self.result, self.source, group=group, async_op=True)
        self.shape = (size, *self.source.shape)

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        elif torch.compiler.is_compiling():
            self.result = torch.ops._c10d_functional.wait_tensor(self.result)
        return self.result.reshape(self.shape)


def gather(source: Tensor, group: ProcessGroup) -> Tensor:
    """``[P, *source.shape]``, in the order of the ranks; ``source`` has one shape on all of them."""
    return Pending(source, group).wait()


class PendingSum:
    """A sum over the ranks that is under way, of a contiguous copy; ``wait`` returns it."""

    def __init__(self, source: Tensor, group: ProcessGroup, *, scattered: bool = False) -> None:
        size = group.size()
        if scattered:  # the part of this rank alone, along the first dimension
            self.source = source.contiguous()
            self.result = source.new_empty((source.shape[0] // size, *source.shape[1:]))
            self.work = reduce_scatter(self.result, self.source, group=group, async_op=True)
        else:
            self.result = source.clone(memory_format=torch.contiguous_format)
            self.work = dist.all_reduce(self.result, group=group, async_op=True)

    def wait(self) -> Tensor:
        self.work.wait()
        return self.result


def is_split(group: ProcessGroup | None) -> bool:
    """Whether anything is split over ``group``: a group of one rank is none."""
    return group is not None and group.size() > 1
