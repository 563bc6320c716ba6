"""Estimators for tokens and steps against recursions written as loops."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedpo import advantages

pytestmark = pytest.mark.usefixtures("implementation")
NAN = math.nan
CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # float64 sums of some hundred terms of order 1


def gae_loop(rewards, values, mask, gamma, lam, bootstrap=0.0):
    """The textbook recursion over one sequence, masked tokens passed over."""
    advantages_, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    next_value, next_advantage = bootstrap, 0.0
    for t in reversed(range(len(rewards))):
        if mask[t]:
            delta = rewards[t] + gamma * next_value - values[t]
            next_advantage = delta + gamma * lam * next_advantage
            next_value = values[t]
            advantages_[t], returns[t] = next_advantage, next_advantage + values[t]
    return advantages_, returns


def vtrace_loop(rewards, values, log_ratios, mask, gamma, lam, rho_bar, c_bar, bootstrap=0.0):
    result, targets = [0.0] * len(rewards), [0.0] * len(rewards)
    next_value = next_target = bootstrap
    for t in reversed(range(len(rewards))):
        if mask[t]:
            ratio = math.exp(log_ratios[t])
            rho, c = min(rho_bar, ratio), lam * min(c_bar, ratio)
            result[t] = rho * (rewards[t] + gamma * next_target - values[t])
            delta = rho * (rewards[t] + gamma * next_value - values[t])
            next_target = targets[t] = values[t] + delta + gamma * c * (next_target - next_value)
            next_value = values[t]
    return result, targets


def to_go_loop(rewards, mask, gamma, bootstrap=0.0):
    result, running = [0.0] * len(rewards), bootstrap
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


@pytest.mark.parametrize("kept", [0.0, 0.5, 2.0])
def test_bootstrap(kept):
    """The value after the last token of a sequence that was cut off, padded, packed, and masked at the end."""
    rewards, values, mask = batch(5, 12, kept=kept)
    bootstrap = double([0.7, -1.0, 0.0, 2.0, 0.3])
    result = advantages.gae(rewards, values, mask=mask, gamma=0.9, lam=0.8, bootstrap=bootstrap)
    to_go = advantages.reward_to_go(rewards, mask=mask, gamma=0.9, bootstrap=bootstrap)
    for b in range(5):
        row = rewards[b].tolist(), values[b].tolist(), mask[b].tolist()
        expected = gae_loop(*row, 0.9, 0.8, bootstrap[b].item())
        torch.testing.assert_close(torch.stack(list(result))[:, b], double(expected), **CLOSE)
        torch.testing.assert_close(to_go[b], double(to_go_loop(row[0], row[2], 0.9, bootstrap[b].item())), **CLOSE)

    # Sequences of 12, 0, 24, 12, 12 tokens: one without tokens has a bootstrap value too.
    cu_seqlens = torch.tensor([0, 12, 12, 36, 48, 60])
    packed = {"mask": mask.flatten(), "cu_seqlens": cu_seqlens, "gamma": 0.9, "bootstrap": bootstrap}
    flat = advantages.gae(rewards.flatten(), values.flatten(), lam=0.8, **packed)
    flat_to_go = advantages.reward_to_go(rewards.flatten(), **packed)
    for i, (a, b) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        row = [x.flatten()[a:b].tolist() for x in (rewards, values, mask)]
        expected = gae_loop(*row, 0.9, 0.8, bootstrap[i].item())
        torch.testing.assert_close(torch.stack(list(flat))[:, a:b], double(expected), **CLOSE)
        expected = to_go_loop(row[0], row[2], 0.9, bootstrap[i].item())
        torch.testing.assert_close(flat_to_go[a:b], double(expected), **CLOSE)


def test_bootstrap_continues_what_was_cut_off():
    """The estimates of the first half do not change if the rest is replaced by its value."""
    rewards, values, _ = (x[1] for x in batch(2, 20, kept=2))
    whole = advantages.gae(rewards, values, gamma=0.95, lam=0.0)
    half = advantages.gae(rewards[:10], values[:10], gamma=0.95, lam=0.0, bootstrap=values[10:11])
    torch.testing.assert_close(half.advantages, whole.advantages[:10], **CLOSE)
    to_go = advantages.reward_to_go(rewards, gamma=0.95)
    half = advantages.reward_to_go(rewards[:10], gamma=0.95, bootstrap=to_go[10:11])
    torch.testing.assert_close(half, to_go[:10], **CLOSE)


def test_one_dimension_is_one_sequence():
    rewards, values, mask = (x[1] for x in batch(2, 33))
    one = advantages.gae(rewards, values, mask=mask, gamma=0.9, lam=0.9)
    rows = advantages.gae(rewards[None], values[None], mask=mask[None], gamma=0.9, lam=0.9)
    assert torch.equal(one.advantages, rows.advantages[0])


def test_a_token_left_out_costs_no_discount():
    kept = torch.tensor([1, 0, 0, 1])
    result = advantages.gae(
        torch.tensor([0.0, NAN, NAN, 1]), torch.tensor([0.0, 5, 5, 0]), mask=kept, gamma=0.5, lam=1.0
    )
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


# ------------------------------------------------------------------------------------------------------------ vtrace


def vtrace_batch(rows=5, length=40):
    rewards, values, mask = batch(rows, length)
    new, old = torch.randn(2, rows, length, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return rewards, values, new.where(mask, NAN), old.where(mask, -math.inf), mask


@pytest.mark.parametrize(("rho_bar", "c_bar"), [(1.0, 1.0), (2.0, 0.5), (math.inf, math.inf)])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (0.9, 0.0)])
@pytest.mark.parametrize("bootstrap", [None, double([0.5, -1.0, 0.0, 2.0, 1.0])])
def test_vtrace_against_the_recursion(rho_bar, c_bar, gamma, lam, bootstrap):
    rewards, values, new, old, mask = vtrace_batch()
    parameters = {"gamma": gamma, "lam": lam, "rho_bar": rho_bar, "c_bar": c_bar, "bootstrap": bootstrap}
    padded = advantages.vtrace(rewards, values, logprobs=new, old_logprobs=old, mask=mask, **parameters)
    for b in range(5):
        row = [x[b].tolist() for x in (rewards, values, new - old, mask)]
        expected = vtrace_loop(*row, gamma, lam, rho_bar, c_bar, 0.0 if bootstrap is None else bootstrap[b].item())
        torch.testing.assert_close(torch.stack(list(padded))[:, b], double(expected), rtol=1e-11, atol=1e-11)
    flat = [x.flatten() for x in (rewards, values, new, old, mask)]
    packed = advantages.vtrace(
        *flat[:2],
        logprobs=flat[2],
        old_logprobs=flat[3],
        mask=flat[4],
        cu_seqlens=torch.arange(0, 201, 40),
        **parameters,
    )
    for got, expected in zip(packed, padded, strict=True):
        torch.testing.assert_close(got.view(5, 40), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("lam", [1.0, 0.8])
def test_vtrace_on_policy_is_gae(lam):
    rewards, values, mask = batch(4, 30)
    logprobs = torch.randn(4, 30)
    result = advantages.vtrace(rewards, values, logprobs=logprobs, old_logprobs=logprobs, mask=mask, gamma=0.9, lam=lam)
    expected = advantages.gae(rewards, values, mask=mask, gamma=0.9, lam=lam)
    torch.testing.assert_close(result.returns, expected.returns, **CLOSE)
    assert torch.allclose(result.advantages, expected.advantages, atol=1e-12) == (lam == 1)


@pytest.mark.parametrize("difference", [1e4, -1e4, math.inf, -math.inf])
def test_vtrace_of_extreme_ratios_is_finite(difference):
    rewards, values, _ = batch(2, 8, kept=2)
    new = torch.zeros(1, 8)
    result = advantages.vtrace(
        rewards[1:], values[1:], logprobs=new + difference, old_logprobs=new, gamma=0.99, rho_bar=math.inf, c_bar=1.0
    )
    assert result.advantages.isfinite().all()
    assert result.returns.isfinite().all()


def test_vtrace_dtypes_and_gradients():
    x = torch.rand(2, 5, requires_grad=True)
    result = advantages.vtrace(x, x.half(), logprobs=x.double(), old_logprobs=x, gamma=1.0)
    assert result.advantages.dtype == result.returns.dtype == torch.float32
    assert not result.advantages.requires_grad
    precise = advantages.vtrace(x.double(), x, logprobs=x, old_logprobs=x, gamma=1.0)
    assert precise.returns.dtype == torch.float64


# ------------------------------------------------------------------------- reward-to-go, reinforce++ and whitening


@pytest.mark.parametrize("gamma", [1.0, 0.97, 0.0])
def test_reward_to_go_against_the_recursion(gamma):
    rewards, _, mask = batch(4, 50)
    result = advantages.reward_to_go(rewards, mask=mask, gamma=gamma)
    to_go = [to_go_loop(r, m, gamma) for r, m in zip(rewards.tolist(), mask.tolist(), strict=True)]
    torch.testing.assert_close(result, double(to_go), **CLOSE)


def test_reward_to_go_defaults_to_the_sum_of_what_is_left():
    assert advantages.reward_to_go(torch.tensor([1, 0, 2])).tolist() == [3, 2, 2]
    assert advantages.reward_to_go(torch.tensor([1, 0, 2], dtype=torch.float64)).dtype == torch.float64


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


# --------------------------------------------------------------------------------------------------------- to_tokens


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_to_tokens(mask_dtype):
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).to(mask_dtype)
    samples = torch.tensor([2.0, NAN, -1.0])
    expected = [[2, 2, 0, 2], [0, 0, 0, 0], [-1, 0, 0, 0]]
    assert advantages.to_tokens(samples, mask).tolist() == expected
    packed = torch.cat([mask[0], mask[2]])
    cu_seqlens = torch.tensor([0, 4, 4, 8], dtype=torch.int32)
    assert advantages.to_tokens(samples, packed, cu_seqlens=cu_seqlens).tolist() == expected[0] + expected[2]
    assert advantages.to_tokens(samples, packed[None], cu_seqlens=cu_seqlens).tolist() == [expected[0] + expected[2]]
    assert advantages.to_tokens(samples[2:], mask[2]).tolist() == expected[2]
    assert advantages.to_tokens(samples.double(), mask).dtype == torch.float64
    assert advantages.to_tokens(samples.long().bool(), mask).dtype == torch.float32
    assert advantages.to_tokens(samples[:0], mask[:0]).shape == (0, 4)


# ----------------------------------------------------------------------------------------------------- rewards_on_kept


def moved(rewards, mask, bounds):
    """By a loop: to the last kept token before, else to the first, else nowhere."""
    result = [0.0] * len(rewards)
    for start, end in itertools.pairwise(bounds):
        kept = [t for t in range(start, end) if mask[t]]
        for t in range(start, end):
            if kept and (mask[t] or not math.isnan(rewards[t])):
                result[max((k for k in kept if k <= t), default=kept[0])] += rewards[t]
    return result


@given(st.data(), st.integers(0, 12))
@settings(max_examples=100)
def test_rewards_on_kept_against_a_loop(data, length):
    mask = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    number = st.integers(-3, 3).map(float)
    rewards = [data.draw(number if kept else number | st.just(NAN)) for kept in mask]
    bounds = [0, *sorted(data.draw(st.lists(st.integers(0, length), max_size=3))), length]
    r, m = torch.tensor(rewards), torch.tensor(mask, dtype=torch.bool)
    packed = advantages.rewards_on_kept(r, m, cu_seqlens=torch.tensor(bounds))
    assert packed.tolist() == moved(rewards, mask, bounds)
    assert advantages.rewards_on_kept(r, m).tolist() == moved(rewards, mask, [0, length])
    rows = advantages.rewards_on_kept(torch.stack([r, r.nan_to_num(2)]), torch.stack([m, ~m]))
    assert rows[0].tolist() == moved(rewards, mask, [0, length])
    assert rows[1].tolist() == moved(r.nan_to_num(2).tolist(), (~m).tolist(), [0, length])


def test_rewards_on_kept_dtypes():
    mask = torch.tensor([1, 0])
    for rewards in (torch.tensor([0, 1]), torch.tensor([False, True]), torch.tensor([0.0, 1.0]).bfloat16()):
        result = advantages.rewards_on_kept(rewards, mask)
        assert (result.tolist(), result.dtype) == ([1, 0], torch.float32)
    inf = advantages.rewards_on_kept(torch.tensor([1.0, 2.0, -math.inf], dtype=torch.float64), torch.tensor([1, 1, 0]))
    assert (inf.tolist(), inf.dtype) == ([1, -math.inf, 0], torch.float64)


ZEROS = torch.zeros(2, 3)
READ_REWARDS = {
    "reward_to_go": lambda r, m: advantages.reward_to_go(r, mask=m),
    "gae": lambda r, m: advantages.gae(r, ZEROS, mask=m, gamma=1.0, lam=0.9),
    "vtrace": lambda r, m: advantages.vtrace(r, ZEROS, logprobs=ZEROS, old_logprobs=ZEROS, mask=m, gamma=1.0),
    "reinforce_plus_plus": lambda r, m: advantages.reinforce_plus_plus(r, mask=m),
    "optimal_token_baseline": lambda r, m: advantages.optimal_token_baseline(
        r, old_logprobs=ZEROS, sum_pi_squared=ZEROS, mask=m, group_size=2
    ),
}


@pytest.mark.parametrize("name", READ_REWARDS)
def test_a_reward_at_a_skipped_token_is_not_lost_in_silence(name):
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
    for lost in (0.5, -math.inf):
        rewards = torch.tensor([[0, 0, lost], [0, 0, 1]])
        with pytest.raises(ValueError, match=rf"rewards must be 0 where mask is 0, got {lost}.*rewards_on_kept"):
            READ_REWARDS[name](rewards, mask)
    READ_REWARDS[name](advantages.rewards_on_kept(rewards, mask), mask)
    READ_REWARDS[name](torch.tensor([[1, 2, NAN], [NAN, 0, 1]]), mask)  # nothing that stands there is read


# ------------------------------------------------------------------------------------------- optimal token baseline


@pytest.mark.parametrize("with_is_weights", [False, True])
def test_optimal_token_baseline_against_a_loop(with_is_weights):
    generator = torch.Generator().manual_seed(0)
    rewards, old, squares, weights = torch.rand(4, 6, 9, dtype=torch.float64, generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 7, 5, 0])[:, None]
    mask[0, 2] = False
    old = old.log()
    ids = torch.tensor([5, 5, -2, 5, 8, -2])
    garbage = (x.where(mask, NAN) for x in (rewards, old, squares, weights))
    arguments = dict(zip(("rewards", "old_logprobs", "sum_pi_squared", "is_weights"), garbage, strict=True))
    if not with_is_weights:
        arguments["is_weights"], weights = None, torch.ones(6, 9)
    result = advantages.optimal_token_baseline(**arguments, mask=mask, group_ids=ids)

    energy = (1 - 2 * old.exp() + squares) * weights**2 * mask
    for b in range(6):
        for t in range(9):
            group = [i for i in range(6) if ids[i] == ids[b] and mask[i, t]]
            returns = {i: (rewards[i] * mask[i])[t:].sum() for i in group}
            total = {i: energy[i, : t + 1].sum() for i in group}
            expected = 0.0
            if mask[b, t]:
                baseline = sum(total[i] * returns[i] for i in group) / (sum(total.values()) + 1e-8)
                expected = returns[b] - (baseline if len(group) > 1 else 0)
            torch.testing.assert_close(result[b, t], torch.as_tensor(expected, dtype=torch.float64), **CLOSE)


def test_optimal_token_baseline_by_group_size_and_empty():
    rewards, old, squares = torch.rand(3, 4, 5)
    by_size = advantages.optimal_token_baseline(rewards, old_logprobs=old, sum_pi_squared=squares, group_size=2)
    ids = torch.tensor([3, 3, 1, 1])
    by_ids = advantages.optimal_token_baseline(rewards, old_logprobs=old, sum_pi_squared=squares, group_ids=ids)
    assert torch.equal(by_size, by_ids)
    assert by_size.dtype == torch.float32
    for shape in ((0, 5), (4, 0)):
        x = torch.empty(shape)
        assert advantages.optimal_token_baseline(x, old_logprobs=x, sum_pi_squared=x, group_size=2).shape == shape


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
VTRACE = {"values": X, "logprobs": X, "old_logprobs": X, "gamma": 1.0}
TOKEN_BASELINE = {"old_logprobs": X, "sum_pi_squared": X, "group_size": 2}


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
        ("gae", X, {"values": X, "bootstrap": X[0], **UNIT}, ValueError, r"bootstrap .*\[2\] .*per sequence.*\[6\]"),
        ("gae", X, {"values": X, "bootstrap": 1.0, **UNIT}, TypeError, r"bootstrap must be a torch\.Tensor"),
        ("reward_to_go", X[0], {"bootstrap": X[:, 0]}, ValueError, r"bootstrap .*\[1\] .*\[2\]"),
        (
            "reward_to_go",
            X[0],
            {"bootstrap": X[:, 0], "cu_seqlens": torch.tensor([0, 1, 2, 6])},
            ValueError,
            r"bootstrap .*\[3\] .*\[2\]",
        ),
        ("reward_to_go", X, {"bootstrap": X[:, 0].to("meta")}, ValueError, "bootstrap .*device"),
        ("vtrace", X, {**VTRACE, "logprobs": X[:, 1:]}, ValueError, r"logprobs .*\[2, 6\].*\[2, 5\]"),
        ("vtrace", X, {**VTRACE, "old_logprobs": X.long()}, TypeError, "old_logprobs .*int64"),
        ("vtrace", X, {**VTRACE, "rho_bar": 0.0}, ValueError, "rho_bar must be > 0, got 0.0"),
        ("vtrace", X, {**VTRACE, "c_bar": -1}, ValueError, "c_bar must be > 0, got -1"),
        ("vtrace", X, {**VTRACE, "lam": 2.0}, ValueError, r"lam .*\[0, 1\], got 2.0"),
        ("optimal_token_baseline", X[0], TOKEN_BASELINE, ValueError, r"rewards .*\[B, T\].*\[6\]"),
        ("optimal_token_baseline", X, {**TOKEN_BASELINE, "group_size": 4}, ValueError, "group_size .*4 for 2 samples"),
        (
            "optimal_token_baseline",
            X,
            {**TOKEN_BASELINE, "sum_pi_squared": X[0]},
            ValueError,
            r"sum_pi_squared .*\[6\]",
        ),
        ("optimal_token_baseline", X, {**TOKEN_BASELINE, "is_weights": X[0]}, ValueError, r"is_weights .*\[6\]"),
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
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed\.ProcessGroup, got str"):
        advantages.whiten(X, group="world")


def test_to_tokens_errors():
    with pytest.raises(TypeError, match=r"mask must be a torch\.Tensor"):
        advantages.to_tokens(X[:, 0], 6)
    with pytest.raises(ValueError, match=r"mask must have shape .*\[1, 2, 6\]"):
        advantages.to_tokens(X[:, 0], X[None])
    with pytest.raises(ValueError, match=r"advantages .*\[2\] .*per sequence.*\[2, 6\]"):
        advantages.to_tokens(X, X)
