"""One view of every layout: a padded batch ``[B, T]`` is a packed batch whose sequences all have ``T`` positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where each token of the flattened array stands. Methods take and return flat arrays ``[tokens]``."""

    shape: torch.Size
    """Shape of the array that was flattened."""
    sequence: Tensor
    """``[tokens]``: the sequence of each token."""
    before: Tensor
    """``[tokens]``: positions of its sequence before each token."""
    left: Tensor
    """``[tokens]``: positions from each token to the end of its sequence, its own included."""
    lengths: Tensor
    """``[num_sequences]``: positions of each sequence."""

    def per_token(self, x: Tensor) -> Tensor:
        """Flatten ``x``, which has a value per token or one per sequence (``[num_sequences]`` or ``[B, 1]``).

        Where a packed batch has as many tokens as sequences, ``x`` is per token.
        """
        if x.shape[-1:] == self.shape[-1:] and x.numel() == self.sequence.numel():
            return x.reshape(-1)
        return x.reshape(-1)[self.sequence]

    def kept(self, mask: Tensor | None) -> Tensor:
        """Which tokens ``mask`` keeps, all without one; bool."""
        return torch.ones_like(self.sequence, dtype=torch.bool) if mask is None else mask.reshape(-1) != 0

    def sum_per_sequence(self, x: Tensor) -> Tensor:
        """``[tokens] -> [num_sequences]``."""
        return x.new_zeros(self.lengths.shape).index_add(0, self.sequence, x)

    def place(self, kept: Tensor) -> Tensor:
        """How many tokens of its sequence are kept, up to each token and with it: integers, so the sums are exact."""
        total = kept.long().cumsum(0)
        position = torch.arange(total.numel(), device=total.device)
        return total - (total - kept.long())[position - self.before]

    def later(self, x: Tensor, by: int) -> Tensor:
        """``x`` at the position ``by`` further on in the same sequence, 0 beyond its end."""
        return x.roll(-by).masked_fill(self.left <= by, 0)

    def earlier(self, x: Tensor, by: int) -> Tensor:
        """``x`` at the position ``by`` earlier in the same sequence, 0 before its start."""
        return x.roll(by).masked_fill(self.before < by, 0)

    def sum_after(self, x: Tensor, count: int | Literal["all"]) -> Tensor:
        """The sum over the next ``count`` positions of the same sequence."""
        return self._sum(x, count, self.later)

    def sum_before(self, x: Tensor, count: int | Literal["all"]) -> Tensor:
        """The sum over the previous ``count`` positions of the same sequence."""
        return self._sum(x, count, self.earlier)

    def _sum(self, x: Tensor, count: int | Literal["all"], shift: Callable[[Tensor, int], Tensor]) -> Tensor:
        """A window sum in ``log2(count)`` shifted adds.

        Binary doubling, ``S_2w[t] = S_w[t] + S_w[t+w]``: no difference of cumulative sums, so nothing cancels and a NaN
        stays in the windows that hold it. The order of the additions does not depend on the layout.
        """
        if count == "all":
            # a number of tokens that is traced must not decide how often the loop runs
            for power in range(31 if torch.compiler.is_compiling() else x.numel().bit_length()):
                x = x + shift(x, 1 << power)
            return shift(x, 1)
        total = torch.zeros_like(x)
        offset, width = 1, 1
        while width <= count:
            if count & width:
                total = total + shift(x, offset)
                offset += width
            x = x + shift(x, width)
            width *= 2
        return total


def layout(tokens: Tensor, cu_seqlens: Tensor | None = None) -> Layout:
    """The layout of ``[B, T]`` or, as one sequence, ``[T]``; with ``cu_seqlens``, of packed ``[T]`` or ``[1, T]``."""
    if cu_seqlens is None:
        rows = tokens.shape[0] if tokens.dim() == 2 else 1
        cu_seqlens = torch.arange(rows + 1, device=tokens.device) * tokens.shape[-1]
    ends = cu_seqlens[1:].to(torch.int64)
    position = torch.arange(tokens.numel(), device=tokens.device)
    sequence = torch.bucketize(position, ends, right=True)
    lengths = cu_seqlens.to(torch.int64).diff()
    left = ends[sequence] - position
    return Layout(tokens.shape, sequence, lengths[sequence] - left, left, lengths)
