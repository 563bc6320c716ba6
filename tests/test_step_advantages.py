"""GAE, REINFORCE++ and VinePPO against recursions written as loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedpo import advantages

NAN = math.nan
CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # float64 sums of some hundred terms of order 1


def gae_loop(rewards, values, mask, gamma, lam):
    """The textbook recursion over one sequence, masked tokens passed over."""
    advantages_, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    next_value = next_advantage = 0.0
    for t in reversed(range(len(rewards))):
        if mask[t]:
            delta = rewards[t] + gamma * next_value - values[t]
            next_advantage = delta + gamma * lam * next_advantage
            next_value = values[t]
            advantages_[t], returns[t] = next_advantage, next_advantage + values[t]
    return advantages_, returns


def to_go_loop(rewards, mask, gamma):
    result, running = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        if mask[t]:
            running = rewards[t] + gamma * running
            result[t] = running
    return result


def whiten_loop(rows, masks):
    flat = [x for row, mask in zip(rows, masks, strict=True) for x, m in zip(row, mask, strict=True) if m]
    mean = math.fsum(flat) / len(flat)
    variance = math.fsum((x - mean) ** 2 for x in flat) / (len(flat) - 1)
    scale = 1 / math.sqrt(variance + 1e-8)
    return [
        [(x - mean) * scale if m else 0.0 for x, m in zip(*pair, strict=True)] for pair in zip(rows, masks, strict=True)
    ]


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def batch(rows, length, seed=0, kept=0.6):
    """Rewards, values and mask ``[rows, length]``: nan and inf where the mask leaves out, as it does all of row 0."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, length, dtype=torch.float64, generator=generator)
    mask = torch.rand(rows, length, generator=generator) < kept
    mask[0] = False
    return rewards.where(mask, NAN), values.where(mask, math.inf), mask


# --------------------------------------------------------------------------------------------------------------- gae


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (1.0, 0.0), (0.0, 1.0), (0.5, 0.3)])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 129])
def test_gae_against_the_recursion(gamma, lam, length):
    rewards, values, mask = batch(5, length)
    result = advantages.gae(rewards, values, mask=mask, gamma=gamma, lam=lam)
    for b in range(5):
        expected = gae_loop(rewards[b].tolist(), values[b].tolist(), mask[b].tolist(), gamma, lam)
        torch.testing.assert_close(result.advantages[b], double(expected[0]), **CLOSE)
        torch.testing.assert_close(result.returns[b], double(expected[1]), **CLOSE)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    mask_seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    two_dimensional=st.booleans(),
)
def test_packed_sequences_do_not_touch_each_other(lengths, mask_seed, dtype, two_dimensional):
    total = sum(lengths)
    generator = torch.Generator().manual_seed(mask_seed)
    rewards, values = torch.randn(2, total, dtype=torch.float64, generator=generator)
    mask = torch.rand(total, generator=generator) < 0.7
    rewards = rewards.where(mask, NAN)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    shape = (1, total) if two_dimensional else (total,)
    arguments = {"mask": mask.view(shape), "cu_seqlens": cu_seqlens, "gamma": 0.9, "lam": 0.8}
    result = advantages.gae(rewards.view(shape), values.view(shape), **arguments)
    assert result.advantages.shape == result.returns.shape == shape
    pieces = zip(*(x.split(lengths) for x in (rewards, values, mask)), strict=True)
    expected = [gae_loop(r.tolist(), v.tolist(), m.tolist(), 0.9, 0.8) for r, v, m in pieces]
    for field, got in enumerate(result):
        torch.testing.assert_close(got.flatten(), double([x for pair in expected for x in pair[field]]), **CLOSE)


def test_one_dimension_is_one_sequence():
    rewards, values, mask = (x[1] for x in batch(2, 33))
    one = advantages.gae(rewards, values, mask=mask, gamma=0.9, lam=0.9)
    rows = advantages.gae(rewards[None], values[None], mask=mask[None], gamma=0.9, lam=0.9)
    assert torch.equal(one.advantages, rows.advantages[0])


def test_a_token_left_out_costs_no_discount():
    kept = torch.tensor([1, 0, 0, 1])
    result = advantages.gae(torch.tensor([0, 9, 9, 1]), torch.tensor([0.0, 5, 5, 0]), mask=kept, gamma=0.5, lam=1.0)
    assert result.advantages.tolist() == [0.5, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gae_dtypes(dtype):
    rewards, values, _ = batch(3, 20, kept=2)
    rewards, values = rewards[1:].to(dtype), values[1:].to(dtype)
    result = advantages.gae(rewards, values, gamma=0.99, lam=0.95)
    precise = advantages.gae(rewards.double(), values.double(), gamma=0.99, lam=0.95)
    assert result.advantages.dtype == torch.float32
    assert precise.returns.dtype == torch.float64
    assert torch.equal(result.advantages, precise.advantages.float())
    assert torch.equal(result.returns, precise.returns.float())
    assert advantages.gae(rewards, values.double(), gamma=0.99, lam=0.95).returns.dtype == torch.float64


def test_gae_carries_no_gradient():
    rewards = torch.ones(2, 3, requires_grad=True)
    result = advantages.gae(rewards, torch.ones(2, 3, requires_grad=True), gamma=1.0, lam=1.0)
    assert not result.advantages.requires_grad
    assert not result.returns.requires_grad


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_no_tokens(shape):
    x = torch.empty(shape)
    assert advantages.gae(x, x, gamma=1.0, lam=1.0).advantages.shape == shape
    assert advantages.reinforce_plus_plus(x).shape == shape


# --------------------------------------------------------------------------------------- reinforce++ and whitening


@pytest.mark.parametrize("gamma", [1.0, 0.97, 0.0])
def test_reinforce_plus_plus_against_the_recursion(gamma):
    rewards, _, mask = batch(4, 50)
    result = advantages.reinforce_plus_plus(rewards, mask=mask, gamma=gamma)
    to_go = [to_go_loop(r, m, gamma) for r, m in zip(rewards.tolist(), mask.tolist(), strict=True)]
    torch.testing.assert_close(result, double(whiten_loop(to_go, mask.tolist())), **CLOSE)


def test_reinforce_plus_plus_packed():
    rewards, _, mask = batch(4, 10)
    packed = advantages.reinforce_plus_plus(
        rewards.flatten(), mask=mask.flatten(), cu_seqlens=torch.arange(0, 41, 10), gamma=0.9
    )
    torch.testing.assert_close(packed.view(4, 10), advantages.reinforce_plus_plus(rewards, mask=mask, gamma=0.9))


def test_reinforce_plus_plus_defaults():
    rewards = torch.tensor([[0, 0, 1], [0, 0, 0]])
    result = advantages.reinforce_plus_plus(rewards)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, double(whiten_loop([[1.0] * 3, [0.0] * 3], [[1] * 3] * 2)).float())


def test_whiten():
    rewards, _, mask = batch(3, 40)
    result = advantages.whiten(rewards, mask=mask)
    torch.testing.assert_close(result, double(whiten_loop(rewards.tolist(), mask.tolist())), **CLOSE)
    everything = torch.randn(3, 4, 5)
    whole = advantages.whiten(everything)
    torch.testing.assert_close(whole.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(whole.std(), torch.tensor(1.0), atol=1e-6, rtol=0)


def test_whitening_one_token_or_none_gives_zero():
    x = torch.tensor([3.0, NAN])
    assert advantages.whiten(x, mask=torch.tensor([1, 0])).tolist() == [0, 0]
    assert advantages.whiten(x, mask=torch.tensor([0, 0])).tolist() == [0, 0]


# ----------------------------------------------------------------------------------------------------------- vineppo


def vineppo_loop(values, step_rewards, step_ids):
    values = [*values[:-1], 0.0 if math.isnan(values[-1]) else values[-1]]
    missing = [math.isnan(v) for v in values]
    for s in reversed(range(len(step_rewards))):
        if missing[s]:
            values[s] = step_rewards[s] + values[s + 1]
    steps = [r + values[s + 1] - values[s] for s, r in enumerate(step_rewards)]
    return [steps[s] if s >= 0 else 0.0 for s in step_ids]


def steps_batch(batch_size=6, steps=5, tokens=23):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(batch_size, steps + 1, dtype=torch.float64, generator=generator)
    step_rewards = torch.randn(batch_size, steps, dtype=torch.float64, generator=generator)
    step_ids = torch.randint(-1, steps, (batch_size, tokens), generator=generator)
    return values, step_rewards, step_ids


@pytest.mark.parametrize("missing", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_vineppo_against_a_loop(missing, dtype):
    values, step_rewards, step_ids = steps_batch()
    values[torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < missing] = NAN
    result = advantages.vineppo(values, step_rewards=step_rewards, step_ids=step_ids.to(dtype))
    rows = zip(values.tolist(), step_rewards.tolist(), step_ids.tolist(), strict=True)
    torch.testing.assert_close(result, double([vineppo_loop(*row) for row in rows]), **CLOSE)


def test_vineppo_telescopes():
    values, step_rewards, _ = steps_batch()
    values[:, -1] = 0
    step_rewards[:, :-1] = 0
    per_step = advantages.vineppo(values, step_rewards=step_rewards, step_ids=torch.arange(5).expand(6, 5))
    torch.testing.assert_close(per_step.sum(1), step_rewards[:, -1] - values[:, 0], **CLOSE)


def test_vineppo_step_without_estimate_has_advantage_exactly_zero():
    values = torch.full((1, 51), NAN, dtype=torch.float64)
    values[0, 0] = 0.3
    step_rewards = torch.randn(1, 50, dtype=torch.float64)
    result = advantages.vineppo(values, step_rewards=step_rewards, step_ids=torch.arange(50)[None])
    torch.testing.assert_close(result[0, 0], step_rewards.sum() - 0.3, **CLOSE)
    assert (result[0, 1:] == 0).all()


def test_vineppo_rows_with_fewer_steps():
    short = advantages.vineppo(
        double([[0.4, 0.6, 0.0]]), step_rewards=double([[0, 1.0]]), step_ids=torch.tensor([[0, 1]])
    )
    padded = advantages.vineppo(
        double([[0.4, 0.6, NAN, NAN, NAN]]), step_rewards=double([[0, 1.0, 0, 0]]), step_ids=torch.tensor([[0, 1]])
    )
    torch.testing.assert_close(padded, short, **CLOSE)


def test_vineppo_whitened():
    values, step_rewards, step_ids = steps_batch()
    plain = advantages.vineppo(values, step_rewards=step_rewards, step_ids=step_ids)
    whitened = advantages.vineppo(values, step_rewards=step_rewards, step_ids=step_ids, whiten=True)
    torch.testing.assert_close(whitened, advantages.whiten(plain, mask=step_ids >= 0), **CLOSE)
    assert (whitened[step_ids < 0] == 0).all()


def test_vineppo_dtypes_and_empty_shapes():
    values, step_rewards, step_ids = steps_batch()
    result = advantages.vineppo(values.half(), step_rewards=step_rewards.float(), step_ids=step_ids)
    assert result.dtype == torch.float32
    no_steps = advantages.vineppo(torch.ones(2, 1), step_rewards=torch.ones(2, 0), step_ids=torch.full((2, 3), -1))
    assert no_steps.tolist() == [[0, 0, 0], [0, 0, 0]]


# ------------------------------------------------------------------------------------------------------------ errors

X = torch.ones(2, 6)
STEPS = {"step_rewards": torch.ones(2, 5), "step_ids": torch.zeros(2, 3, dtype=torch.int64)}
UNIT = {"gamma": 1.0, "lam": 1.0}


@pytest.mark.parametrize(
    ("name", "first", "kwargs", "error", "match"),
    [
        ("gae", [1.0], {"values": X, **UNIT}, TypeError, "rewards must be a torch.Tensor"),
        ("gae", X.view(1, 2, 6), {"values": X, **UNIT}, ValueError, r"rewards .*\[B, T\] or \[T\].*\[1, 2, 6\]"),
        ("gae", X, {"values": X[:, 1:], **UNIT}, ValueError, r"values .*\[2, 6\].*\[2, 5\]"),
        ("gae", X, {"values": X.long(), **UNIT}, TypeError, "values .*int64"),
        ("gae", X, {"values": X.to("meta"), **UNIT}, ValueError, "values .*device"),
        ("gae", X, {"values": X, "mask": X[0], **UNIT}, ValueError, r"mask .*\[2, 6\].*\[6\]"),
        ("gae", X, {"values": X, "gamma": 1.5, "lam": 1.0}, ValueError, r"gamma .*\[0, 1\], got 1.5"),
        ("gae", X, {"values": X, "gamma": 1.0, "lam": -0.1}, ValueError, r"lam .*\[0, 1\], got -0.1"),
        ("gae", X, {"values": X, "gamma": 1.0, "lam": "1"}, TypeError, "lam must be a float, got str"),
        ("gae", X, {"values": X, "gamma": NAN, "lam": 1.0}, ValueError, r"gamma .*\[0, 1\], got nan"),
        (
            "gae",
            X,
            {"values": X, "cu_seqlens": torch.tensor([0, 12]), **UNIT},
            ValueError,
            r"rewards .*\[T\] or \[1, T\] with cu_seqlens.*\[2, 6\]",
        ),
        (
            "gae",
            X[0],
            {"values": X[0], "cu_seqlens": torch.tensor([0, 7]), **UNIT},
            ValueError,
            "cu_seqlens must start with 0 and end with .*6",
        ),
        ("reinforce_plus_plus", X, {"gamma": 2}, ValueError, r"gamma .*\[0, 1\], got 2"),
        ("reinforce_plus_plus", X, {"mask": X.to(torch.complex64)}, TypeError, "mask .*complex64"),
        ("vineppo", X.long(), STEPS, TypeError, "values .*int64"),
        ("vineppo", X[0], STEPS, ValueError, r"values .*\[B, S \+ 1\].*\[6\]"),
        ("vineppo", X, {**STEPS, "step_rewards": X}, ValueError, r"step_rewards .*\[2, 5\].*\[2, 6\]"),
        ("vineppo", X, {**STEPS, "step_ids": X}, TypeError, "step_ids .*float32"),
        ("vineppo", X, {**STEPS, "step_ids": STEPS["step_ids"][:1]}, ValueError, r"step_ids .*\[2, T\].*\[1, 3\]"),
        ("vineppo", X, {**STEPS, "step_ids": STEPS["step_ids"] + 5}, ValueError, "step_ids .*steps 5, got 5"),
    ],
)
def test_errors_name_the_argument(name, first, kwargs, error, match):
    with pytest.raises(error, match=match):
        advantages.compute(name, first, **kwargs)


def test_whiten_errors():
    with pytest.raises(TypeError, match=r"advantages must be a torch\.Tensor"):
        advantages.whiten([1.0, 2.0])
    with pytest.raises(ValueError, match=r"mask .*\[2, 6\].*\[6\]"):
        advantages.whiten(X, mask=X[0])
