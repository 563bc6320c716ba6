"""One view of every layout: a padded batch ``[B, T]`` is a packed batch whose sequences all have ``T`` positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where each token of the flattened array stands. Methods take and return flat arrays ``[tokens]``."""

    shape: torch.Size
    """Shape of the array that was flattened."""
    sequence: Tensor
    """``[tokens]``: the sequence of each token."""
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

    def sum_per_sequence(self, x: Tensor) -> Tensor:
        """``[tokens] -> [num_sequences]``."""
        return x.new_zeros(self.lengths.shape).index_add(0, self.sequence, x)

    def ahead(self, x: Tensor, by: int) -> Tensor:
        """``x`` at the position ``by`` further on in the same sequence, 0 beyond its end."""
        return x.roll(-by).masked_fill(self.left <= by, 0)

    def sum_ahead(self, x: Tensor, count: int) -> Tensor:
        """The sum over the next ``count`` positions of the same sequence, in ``log2(count)`` shifted adds.

        Binary doubling, ``S_2w[t] = S_w[t] + S_w[t+w]``: no difference of cumulative sums, so nothing cancels and a NaN
        stays in the windows that hold it. The order of the additions does not depend on the layout.
        """
        total = torch.zeros_like(x)
        offset, width = 1, 1
        while width <= count:
            if count & width:
                total = total + self.ahead(x, offset)
                offset += width
            x = x + self.ahead(x, width)
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
    return Layout(tokens.shape, sequence, ends[sequence] - position, cu_seqlens.to(torch.int64).diff())
