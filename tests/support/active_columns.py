"""Policies of which most columns are small, and what the operators of active columns promise, for any backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

ROWS, VOCAB = 12, 1500
THRESHOLD = 2.0**-8


def peaked(rows: int = ROWS, vocab: int = VOCAB, spread: float = 5.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that are rows of the identity: the gradient of the weight is that of the logits. And token ids."""
    g = torch.Generator().manual_seed(seed)
    weight = spread * torch.randn(vocab, rows, generator=g)
    return torch.eye(rows), weight, torch.randint(vocab, (rows,), generator=g)


class Operators:
    """Both, for the rows of a policy whose log-probs have the gradient 1."""

    def __init__(self, backend: str, device: str = "cpu") -> None:
        with torch.device("cpu"):
            _, weight, ids = peaked()
        self.logits, self.ids = weight.T.contiguous().to(device), ids.to(device)
        temperature, self.operators, self.backend = torch.ones((), device=device), torch.ops.fusedpo, backend
        stats = self.run("token_logprobs", self.logits, self.ids, temperature, None, False)[2]
        self.given = (torch.ones(ROWS, device=device), None, self.logits, self.ids, temperature, stats)

    def run(self, name: str, *args):
        return getattr(getattr(self.operators, name), self.backend)(*args)

    def active(self, threshold: float = THRESHOLD) -> Tensor:
        return self.run("active_columns", *self.given, threshold)

    def gradient_at_(self, active: Tensor, most: int) -> tuple[Tensor, Tensor]:
        return self.run("gradient_at_", *self.given, active, most)


def assert_operators_check(backend: str, device: str = "cpu") -> None:
    """What they index with, where it may be read."""
    these = Operators(backend, device)
    active = these.active()
    wrong = (active.roll(1), active[1:], active.long())
    for given in wrong if device == "cpu" else wrong[1:]:
        with pytest.raises(ValueError, match="^active must"):
            these.gradient_at_(given, VOCAB)
    for most in (-1, VOCAB + 1):
        with pytest.raises(ValueError, match="^most must be 0 to"):
            these.gradient_at_(active, most)
    with pytest.raises(ValueError, match="^threshold must"):
        these.active(0.0)


def assert_marked(backend: str, device: str = "cpu") -> None:
    """The columns above the threshold in some row, and the ids."""
    these = Operators(backend, device)
    active, p = these.active(), torch.softmax(these.logits.double(), -1).amax(0)
    assert active[p > THRESHOLD * (1 + 1e-4)].all()
    assert active[these.ids].all()
    active[these.ids] = False
    assert not active[p < THRESHOLD * (1 - 1e-4)].any()


def assert_written_up_to_most(backend: str, device: str = "cpu") -> None:
    """In front of the rows, in the order of the columns; nothing if there is one column more."""
    these = Operators(backend, device)
    before, active = these.logits.clone(), these.active()
    wanted = active.nonzero().squeeze(1)
    count = wanted.numel()
    columns, dropped = these.gradient_at_(active, count - 1)
    assert torch.equal(columns, wanted[:-1])
    assert torch.equal(these.logits, before)
    assert (dropped == 0).all()

    p = torch.softmax(before.double(), -1)
    gradient = torch.nn.functional.one_hot(these.ids, VOCAB) - p
    for most in (count, count + 3):
        these.logits.copy_(before)
        columns, dropped = these.gradient_at_(active, most)
        assert torch.equal(columns[:count], wanted)
        assert (columns[count:] == -1).all()
        assert torch.equal(these.logits[:, count:], before[:, count:])
        torch.testing.assert_close(these.logits[:, :count].double(), gradient[:, wanted], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(dropped.double(), p[:, ~active].sum(1), rtol=1e-4, atol=1e-6)
