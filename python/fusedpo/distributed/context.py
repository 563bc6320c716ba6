"""Context parallelism: the tokens of a sequence split over ranks, and which rank holds which.

Whatever has a value per token is gathered, a few floats each, and the operators of one device run on the whole of it on
every rank: results are, bit for bit, those of one device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from .. import _checks
from .collectives import gather

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LAYOUTS = ("contiguous", "zigzag", "zigzag-sequences")

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class ContextParallel:
    """Which tokens of each sequence, or of a pack of sequences, this rank holds.

    With P ranks, the rank r of which holds ``T / P`` of the T tokens of each row:

    * ``"contiguous"``: those from ``r T / P`` on (Ulysses, ring attention over a pack).
    * ``"zigzag"``: chunk r and chunk ``2 P - 1 - r`` of ``2 P`` equal ones (torch's ``context_parallel``, torchtitan).
    * ``"zigzag-sequences"``: the same of every packed sequence (Megatron and Transformer Engine, ``qkv_format="thd"``).

    Args:
        group: the ranks between which sequences are split, in the order of their chunks.
        layout: one of the above.
        positions: int64 ``[T / P]`` instead of a layout: where in its row each token of this rank stands.

    Where a function takes ``cp=``, arrays with a value per token hold those of this rank, ``[T / P]``, ``[1, T / P]``
    or ``[B, T / P]``, and so do results; ``cu_seqlens``, and arrays with a value per sequence, are those of the whole.
    All ranks of the group call, one without a kept token too.
    """

    group: ProcessGroup
    layout: Literal["contiguous", "zigzag", "zigzag-sequences"] = "contiguous"
    positions: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.group, dist.ProcessGroup):
            raise TypeError(f"group must be a torch.distributed.ProcessGroup, got {type(self.group).__name__}")
        if self.group.rank() < 0:
            raise ValueError("group must be one that this rank belongs to")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {_checks.brief(self.layout)}")
        if self.positions is not None:
            _checks.integer("positions", self.positions)
            if self.positions.dim() != 1:
                raise ValueError(f"positions must have shape [T_local], got {list(self.positions.shape)}")
            if self.layout != "contiguous":
                raise ValueError(f"positions take the place of a layout, got layout={self.layout!r} besides")

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.group.size()

    def tokens(self, name: str, local: Tensor, cu_seqlens: Tensor | None, *, features: int = 0) -> Tokens:
        """Where the tokens of ``local``, the argument ``name``, stand; the shape without its last ``features``."""
        _checks.is_tensor(name, local)
        shape = local.shape[: local.dim() - features]
        if len(shape) not in (1, 2):
            raise ValueError(f"{name} must hold tokens [B, T] or [T], got the shape {list(local.shape)}")
        count, ranks = shape[-1], self.size
        whole = torch.Size((*shape[:-1], count * ranks))
        if self.layout != "contiguous" and count % 2 != 0 and self.layout == "zigzag":
            raise ValueError(f"{name} must hold an even number of tokens with layout='zigzag', got {count}")
        if cu_seqlens is not None:
            _checks.cu_seqlens(cu_seqlens, whole.numel(), f"{name} on all ranks", local)
        elif self.layout == "zigzag-sequences":
            raise ValueError("cu_seqlens is needed by layout='zigzag-sequences', got None")
        if self.positions is not None and self.positions.numel() != count:
            raise ValueError(
                f"positions must hold one of each of the {count} tokens of {name}, got {self.positions.numel()}"
            )
        return Tokens(self, shape, whole, self._order(count, cu_seqlens, local.device))

    def _order(self, count: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
        """``[P, count]``: the positions of the tokens of every rank."""
        ranks = self.size
        if self.positions is not None:
            order = gather(self.positions.to(device, torch.int64), self.group)
            if _checks.values_are_free(order) and not torch.equal(
                order.flatten().sort().values, torch.arange(ranks * count)
            ):
                raise ValueError(f"positions must be each of 0 to {ranks * count - 1} once, over all ranks")
            return order
        rank = torch.arange(ranks, device=device)[:, None]
        place = torch.arange(count, device=device)
        if self.layout == "contiguous":
            return rank * count + place
        if self.layout == "zigzag":
            chunk, begin = torch.full_like(place, count // 2), torch.zeros_like(place)
        else:
            assert cu_seqlens is not None
            offsets = cu_seqlens.to(torch.int64)
            if _checks.values_are_free(cu_seqlens) and bool((offsets.diff() % (2 * ranks) != 0).any()):
                raise ValueError(
                    f"cu_seqlens must hold sequences whose lengths divide by {2 * ranks}, twice the number of ranks, "
                    "with layout='zigzag-sequences'"
                )
            own = offsets // ranks  # offsets of the parts of sequences that a rank holds
            sequence = torch.bucketize(place, own[1:], right=True)
            chunk, begin = own.diff()[sequence] // 2, offsets[sequence]
            place = place - own[sequence]
        first = place < chunk
        return begin + torch.where(first, rank * chunk + place, (2 * ranks - 2 - rank) * chunk + place)


@dataclass(frozen=True)
class Tokens:
    """The tokens that the ranks hold, and how those of all of them become whole rows."""

    cp: ContextParallel
    shape: torch.Size  # on this rank
    whole: torch.Size
    order: Tensor  # [P, tokens per rank]: positions in the row

    def check(self, name: str, x: Tensor) -> None:
        _checks.is_tensor(name, x)
        _checks.shape(name, x, tuple(self.shape), "one value per token of this rank")

    def is_per_token(self, x: Tensor) -> bool:
        """Or per sequence, and then whole."""
        return x.shape[-1:] == self.shape[-1:] and x.numel() == self.shape.numel()

    def stand_in(self, x: Tensor | None) -> Tensor | None:
        """Something of dtype, device and whole shape of an array per token, for checks that read no values."""
        return None if x is None else x.new_zeros(()).expand(self.whole)

    def gathered(self, *local: Tensor | None) -> list[Tensor | None]:
        """Whole arrays of the same dtypes, by one gather for all of them; an array that is None stays None."""
        given = [x for x in local if x is not None]
        if not given:
            return [None] * len(local)
        dtype = torch.float32
        if not any(x.is_floating_point() for x in given):
            dtype = torch.int64
        elif any(x.dtype in (torch.float64, torch.int32, torch.int64) for x in given):
            dtype = torch.float64
        rows = [x.detach().to(dtype).reshape(-1) for x in given]
        parts = gather(torch.stack(rows), self.cp.group)  # [P, arrays, rows * tokens per rank]
        ranks, count, lines = *self.order.shape, self.shape[:-1].numel()
        parts = parts.reshape(ranks, len(given), lines, count)
        parts = parts.permute(1, 2, 0, 3).reshape(len(given), lines, ranks * count)
        whole = torch.empty_like(parts).index_copy_(-1, self.order.reshape(-1), parts).reshape(len(given), *self.whole)
        results = iter(whole.unbind())
        return [None if x is None else next(results).to(x.dtype) for x in local]

    def own(self, whole: Tensor) -> Tensor:
        """Of an array per token, what this rank holds."""
        mine = self.order[self.cp.group.rank()]
        return whole.reshape(self.whole).index_select(-1, mine).reshape(self.shape)

    def spread(self, x: Tensor, fill: float) -> Tensor:
        """The array of all tokens that has ``x`` at those of this rank."""
        mine = self.order[self.cp.group.rank()]
        return x.new_full(self.whole, fill).index_copy_(-1, mine, x.reshape(self.shape))

    def flat_positions(self) -> Tensor:
        """Where the tokens of this rank stand in the flattened array of all tokens, ascending unless ``positions`` are
        given.
        """
        mine = self.order[self.cp.group.rank()]
        rows = torch.arange(self.whole[:-1].numel(), device=mine.device) * self.whole[-1]
        return (rows[:, None] + mine).reshape(-1)

    def stretches(self, cu_seqlens: Tensor | None) -> int | None:
        """Of how many stretches of neighbours this rank's tokens consist at most; None: nobody knows."""
        if self.cp.positions is not None:
            return None
        if self.cp.layout == "zigzag-sequences":
            assert cu_seqlens is not None
            return 2 * (cu_seqlens.numel() - 1)
        return self.shape[:-1].numel() * (1 if self.cp.layout == "contiguous" else 2)

    def looked_at_by_others(self, ahead: int, cu_seqlens: Tensor | None) -> Tensor:
        """Which tokens of this rank are among the ``ahead`` tokens after one that another rank holds; bool."""
        mine, width = self.order[self.cp.group.rank()], self.whole[-1]
        position = torch.arange(width, device=mine.device)
        # the last position, up to each, that another rank holds: at those of this rank, the last before it
        others = position.index_fill(0, mine, -ahead - 1).cummax(0).values
        begin = torch.zeros_like(position)
        if cu_seqlens is not None:
            offsets = cu_seqlens.to(torch.int64)
            begin = offsets[torch.bucketize(position, offsets[1:], right=True)]
        looked_at = (position - others <= ahead) & (others >= begin)
        return looked_at[mine].expand(self.shape)


def on_whole_sequences(
    function: Callable[..., Result],
    cp: ContextParallel,
    cu_seqlens: Tensor | None,
    per_token: dict[str, Any],
    **others: Any,
) -> Result:
    """``function`` of whole arrays, of whose results, a tensor per token or a tuple of them, this rank takes its own.

    ``per_token``: arguments of this rank, the first of which says where the tokens stand.
    """
    name, first = next(iter(per_token.items()))
    where = cp.tokens(name, first, cu_seqlens)
    for argument, x in per_token.items():
        if x is not None:
            where.check(argument, x)
    whole = dict(zip(per_token, where.gathered(*per_token.values()), strict=True))
    result: Any = function(**whole, cu_seqlens=cu_seqlens, **others)
    if isinstance(result, Tensor):
        return where.own(result)  # type: ignore[return-value]
    results = [where.own(x) for x in result]
    return type(result)(*results) if hasattr(result, "_fields") else tuple(results)  # type: ignore[return-value]
