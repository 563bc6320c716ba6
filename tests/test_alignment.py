"""Values per token, from where an inference engine puts them to where the logits that predict them stand."""

import pytest
import torch

import fusedpo
from fusedpo import objectives

LENGTHS = [3, 0, 1, 4]
CU = torch.tensor([0, 3, 3, 4, 8], dtype=torch.int32)


def by_loops(x: torch.Tensor, fill: float) -> torch.Tensor:
    pieces = [[*part.tolist()[1:], fill] if part.numel() else [] for part in x.split(LENGTHS)]
    return torch.tensor([value for piece in pieces for value in piece], dtype=x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("row", [False, True])
def test_shift_stays_within_its_sequence(dtype, row):
    x = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8]).to(dtype)
    got = fusedpo.shift(x[None] if row else x, CU, fill=0)
    assert got.dtype == dtype
    assert got.shape == ((1, 8) if row else (8,))
    assert torch.equal(got.reshape(-1), by_loops(x, 0))


def test_shift_moves_padded_rows_fills_and_is_differentiable():
    x = torch.tensor([[0.5, 1.5, 2.5], [3.0, 4.0, 5.0]], requires_grad=True)
    got = fusedpo.shift(x, fill=-1)
    assert got.tolist() == [[1.5, 2.5, -1.0], [4.0, 5.0, -1.0]]
    got.backward(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert x.grad.tolist() == [[0.0, 1.0, 2.0], [0.0, 4.0, 5.0]]
    assert fusedpo.shift(torch.tensor([3.0, 4.0])).tolist() == [4.0, 0.0]


@pytest.mark.parametrize("packed", [False, True])
def test_an_engines_logprobs_give_an_on_policy_ratio_once_they_are_shifted(packed):
    """Not shifted, they are those of other tokens, which nothing can tell from a policy that has moved."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (4, 9), generator=generator)
    logits = 3 * torch.randn(4, 9, 11, generator=generator)
    cu = None
    if packed:
        ids, logits, cu = ids.reshape(-1), logits.reshape(36, 11), fusedpo.cu_seqlens(lengths=[9, 9, 18])
    token_ids, mask = fusedpo.next_tokens(ids, cu_seqlens=cu)
    aligned = fusedpo.token_logprobs(logits, token_ids, mask=mask)
    by_engine = aligned.roll(1)  # the log-prob of token t at position t
    loss = {"objective": objectives.ppo(), "mask": mask, "cu_seqlens": cu}
    advantages = torch.ones(ids.shape)
    right = fusedpo.policy_loss(aligned, fusedpo.shift(by_engine, cu), advantages, **loss)
    wrong = fusedpo.policy_loss(aligned, by_engine, advantages, **loss)
    assert right.metrics["clip_frac"] == 0
    assert right.metrics["approx_kl"] == 0
    assert wrong.metrics["clip_frac"] > 0.3


def test_ignored_ids_are_not_kept():
    labels = torch.tensor([[-100, -100, 7, 8, -100]])
    token_ids, mask = fusedpo.next_tokens(labels)
    assert token_ids.tolist() == [[-100, 7, 8, -100, 0]]
    assert mask.tolist() == [[False, True, True, False, False]]
    assert fusedpo.next_tokens(labels, ignore_index=8)[1].tolist() == [[True, True, False, True, False]]
    assert fusedpo.next_tokens(labels, ignore_index=None)[1].tolist() == [[True] * 4 + [False]]
    both = fusedpo.next_tokens(labels, torch.tensor([[1, 1, 0, 1, 1]]))[1]
    assert both.tolist() == [[False, False, True, False, False]]


def test_padding_neither_predicts_nor_is_predicted():
    ids, attention_mask = (
        torch.tensor([[0, 0, 5, 6, 7], [5, 6, 7, 0, 0]]),
        torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]),
    )
    _, mask = fusedpo.next_tokens(ids, attention_mask=attention_mask)
    assert mask.tolist() == [[False, False, True, True, False], [True, True, False, False, False]]
    _, mask = fusedpo.next_tokens(ids, torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]), attention_mask=attention_mask)
    assert mask.tolist() == [[False, False, True, True, False], [False, True, False, False, False]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"lengths": LENGTHS}, [0, 3, 3, 4, 8]),
        ({"lengths": torch.tensor(LENGTHS)}, [0, 3, 3, 4, 8]),
        ({"lengths": []}, [0]),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3]])}, [0, 3, 4, 8]),
        ({"position_ids": torch.tensor([0, 1, 0, 0, 0])}, [0, 2, 3, 4, 5]),  # padding at the end: sequences of one
        ({"position_ids": torch.tensor([7, 8, 0, 1])}, [0, 2, 4]),  # the rest of a sequence
        ({"position_ids": torch.zeros(0, dtype=torch.int64)}, [0]),
        ({"attention_mask": torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1]])}, [0, 2, 2, 5]),
    ],
)
def test_cu_seqlens(given, expected):
    got = fusedpo.cu_seqlens(**given)
    assert got.tolist() == expected
    assert got.dtype == torch.int32


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "exactly one of lengths, position_ids and attention_mask is needed, got 0"),
        ({"lengths": [1], "attention_mask": torch.ones(1, 1)}, ValueError, "got 2"),
        ({"lengths": [2, -1]}, ValueError, "lengths must be >= 0, got -1"),
        ({"lengths": [[2]]}, ValueError, r"lengths must be integers \[num_sequences\]"),
        ({"lengths": [0.5]}, ValueError, r"lengths must be integers \[num_sequences\]"),
        ({"position_ids": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"position_ids must have shape \[T\]"),
        ({"attention_mask": torch.ones(3)}, ValueError, r"attention_mask must have shape \[B, T\]"),
    ],
)
def test_errors_of_cu_seqlens(given, error, message):
    with pytest.raises(error, match=message):
        fusedpo.cu_seqlens(**given)


def test_errors_name_the_argument():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"x must have shape \[T\] or \[1, T\] with cu_seqlens"):
        fusedpo.shift(x, torch.tensor([0, 6]))
    with pytest.raises(TypeError, match="x must be a torch.Tensor, got list"):
        fusedpo.shift([1.0])
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[2, 3\]"):
        fusedpo.next_tokens(x.long(), attention_mask=torch.ones(3, 2))
    with pytest.raises(TypeError, match="ignore_index must be an int or None, got str"):
        fusedpo.next_tokens(x.long(), ignore_index="pad")
