"""From text to what :func:`vineppo` takes: reasoning steps, the states between them, and values from rollouts."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from math import fsum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import _checks

Split = Callable[[str], Sequence[int]]


class Prefixes(Sequence[str]):
    """Prefixes of a text, each made when it is asked for: all of them at once grow with the square of their number."""

    def __init__(self, text: str, ends: Sequence[int]) -> None:
        self._text, self._ends = text, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._text[:end] for end in self._ends[index]]
        return self._text[: self._ends[index]]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} prefixes of a text of {len(self._text)} characters>"

    def keys(self) -> Iterator[Hashable]:
        """:func:`_key` of each prefix, in time that grows with the length of the text."""
        digest, start = hashlib.blake2b(digest_size=16), 0
        for end in self._ends:
            digest.update(_encoded(self._text[start:end]))
            start = end
            yield str, digest.digest()


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _key(state: Hashable) -> Hashable:
    """What stands for a state: a digest for a text, which :meth:`Prefixes.keys` knows for all prefixes at once."""
    return (str, hashlib.blake2b(_encoded(state), digest_size=16).digest()) if isinstance(state, str) else state


class Steps(NamedTuple):
    states: list[Prefixes]
    """Per text, a sequence of the prefix before each of its steps: the prompt first. Rollouts from these estimate the
    values. A prefix is made when it is asked for."""
    step_ids: Tensor
    """int64 ``[B, T]``: the step of each token, -1 for none."""


def segment_steps(
    texts: Sequence[str],
    offsets: Tensor | Sequence[Sequence[tuple[int, int]]],
    *,
    delimiter: str | Split = "\n",
    answer_prefix: str | None = None,
    starts: Sequence[int] | None = None,
    mask: Tensor | None = None,
) -> Steps:
    """Splits responses into reasoning steps, as VinePPO (2410.01679) does, and assigns tokens to them.

    ``texts``: B strings, prompt and response; ``starts``: the character at which each response starts (None: 0, there
    is no prompt. Equal prefixes are one state to :func:`pool_rollouts`, so leave prompts out only if there is just
    one). ``offsets``: for each token the characters ``(start, end)`` of the text that it covers, which a fast tokenizer
    returns as ``offset_mapping``; lists of lists, or an integer tensor ``[B, T, 2]``.

    A step ends where ``delimiter`` starts, which belongs to the next step. Empty pieces at the start are part of the
    first step. With ``answer_prefix``, which GSM8K has as ``"\\n#### "``, what follows its first occurrence and empty
    pieces before it are part of the last step. A function as ``delimiter`` returns the positions in a response at which
    steps after the first start.

    A token belongs to the step in which its first character lies, or to the prompt. One that covers no characters, such
    as EOS, belongs to the step of the token before it. Tokens of the prompt, and those with ``mask`` ``[B, T]`` 0,
    belong to none; padding of an offset tensor has to be masked, lists may differ in length.

    Raises ``TypeError`` for wrong types, ``ValueError`` for sizes that do not fit together, an empty delimiter or
    answer prefix, a start outside its text, and step starts that do not increase within the response.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of str, got a str")
    starts = [0] * len(texts) if starts is None else starts
    if len(starts) != len(texts):
        raise ValueError(f"starts must have one entry per text, got {len(starts)} for {len(texts)} texts")
    if answer_prefix == "":
        raise ValueError("answer_prefix must not be empty; None is for no answer part")
    if delimiter == "":
        raise ValueError("delimiter must not be empty")
    split = delimiter if callable(delimiter) else _at(delimiter, answer_prefix)
    bounds = [_bounds(text, start, split) for text, start in zip(texts, starts, strict=True)]
    states = [Prefixes(text, row[:-1]) for text, row in zip(texts, bounds, strict=True)]
    return Steps(states, _step_ids(bounds, _padded(offsets, len(texts)), mask))


def _at(delimiter: str, answer_prefix: str | None) -> Split:
    def split(response: str) -> list[int]:
        body = response.partition(answer_prefix)[0] if answer_prefix else response
        pieces = body.split(delimiter)
        filled = [i for i, piece in enumerate(pieces) if piece.strip()]
        if not filled:
            return []
        first, last = filled[0], filled[-1] if len(body) < len(response) else len(pieces) - 1
        ends = [end - len(delimiter) for end in accumulate(len(piece) + len(delimiter) for piece in pieces)]
        return ends[first:last]

    return split


def _bounds(text: str, start: int, split: Split) -> list[int]:
    """Where the steps start, and the end of the last."""
    if not isinstance(text, str):
        raise TypeError(f"texts must be a sequence of str, got one of {type(text).__name__}")
    if not 0 <= start <= len(text):
        raise ValueError(f"starts must lie in their texts, got {start} for one of {len(text)} characters")
    bounds = [start, *(start + cut for cut in split(text[start:])), len(text)]
    for i, (before, bound) in enumerate(pairwise(bounds[:-1])):
        if not before < bound <= len(text):
            raise ValueError(
                f"delimiter must return increasing positions in a response of {len(text) - start} characters, "
                f"got {bound - start} at index {i}"
            )
    return bounds


def _padded(offsets: Tensor | Sequence[Sequence[tuple[int, int]]], batch: int) -> Tensor:
    """``[B, T, 2]``; -1 beyond the end of a list."""
    if not isinstance(offsets, Tensor):
        if len(offsets) != batch:
            raise ValueError(f"offsets must have one entry per text, got {len(offsets)} for {batch} texts")
        if not batch:
            return torch.empty(0, 0, 2, dtype=torch.int64)
        rows = [torch.tensor(row, dtype=torch.int64).view(-1, 2) for row in offsets]
        return pad_sequence(rows, batch_first=True, padding_value=-1)
    _checks.integer("offsets", offsets)
    if offsets.dim() != 3 or offsets.shape[0] != batch or offsets.shape[2] != 2:
        raise ValueError(f"offsets must have shape [{batch}, T, 2], got {list(offsets.shape)}")
    return offsets.long()


def _step_ids(bounds: list[list[int]], offsets: Tensor, mask: Tensor | None) -> Tensor:
    first, end = offsets.unbind(-1)
    _checks.mask(mask, tuple(first.shape), "one per token", "offsets", offsets)
    if not bounds:
        return first
    longest = max(map(len, bounds))
    edges = torch.tensor([row + row[-1:] * (longest - len(row)) for row in bounds], device=first.device)
    steps = torch.searchsorted(edges, first.contiguous(), right=True) - 1
    steps = steps.where(first < edges[:, -1:], -1)
    covers = first < end
    # The last token up to this one that covers characters.
    source = torch.arange(first.shape[1], device=first.device).where(covers, -1).cummax(1).values
    steps = steps.gather(1, source.clamp(min=0)).where((source >= 0) & (first >= 0), -1)
    return steps if mask is None else steps.where(mask != 0, -1)


def pool_rollouts(
    states: Sequence[Sequence[Hashable]],
    rollouts: Iterable[tuple[Hashable, float]],
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Monte-Carlo values for :func:`vineppo`: at each state the mean return of all rollouts from it, ``[B, S + 1]``.

    ``states``: B sequences of at most S states, such as the prefixes of :func:`segment_steps`. ``rollouts``: pairs of a
    state and the return of one rollout from it, in any order; equal states share their rollouts, wherever they occur.
    nan where there are none, as in the columns beyond the last state of a row: a terminal value is not estimated.
    Raises ``ValueError`` for a rollout from a state that is not in ``states``.
    """
    returns: dict[Hashable, list[float]] = defaultdict(list)
    for state, value in rollouts:
        returns[state].append(float(value))
    by_key = {_key(state): state for state in returns}
    keys = [list(row.keys() if isinstance(row, Prefixes) else map(_key, row)) for row in states]
    unknown = by_key.keys() - {key for row in keys for key in row}
    if unknown:
        example = _checks.brief(by_key[unknown.pop()])
        raise ValueError(
            f"rollouts must start from a state in states, got {len(unknown) + 1} that do not, as {example}"
        )
    means = {key: fsum(returns[state]) / len(returns[state]) for key, state in by_key.items()}
    steps = max(map(len, keys), default=0)
    rows = [[means.get(key, torch.nan) for key in row] + [torch.nan] * (steps + 1 - len(row)) for row in keys]
    return torch.tensor(rows, dtype=dtype).view(len(states), steps + 1)
