"""Advantages for the best of k samples, against enumeration of all subsets and against exact rational arithmetic."""

from fractions import Fraction
from functools import partial
from itertools import combinations, product
from math import comb, sqrt
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.advantages import OF_EIGHT

from fusedpo import _checks, advantages, backends
from fusedpo.reference.advantages import maxpo_leave_two_out, maxpo_quadratic

pytestmark = pytest.mark.usefixtures("implementation")

# Sums of at most a few hundred terms of order 1 in float64.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}

REWARDS = {
    **OF_EIGHT,
    "one best": [0.0] * 7 + [1.0],
    "one worst": [1.0] * 7 + [0.0],
}
CASES = [(name, n, k) for name in REWARDS for n in range(2, 9) for k in range(1, n)]


def expected_improvement(r, i, others, k):
    """Mean of ``max(r_i - max T, 0)`` over the subsets T of ``others`` with k - 1 samples."""
    return fmean(max(r[i] - max(r[j] for j in subset), 0) for subset in combinations(others, k - 1))


def leave_two_out(r, k):
    """The definition: expected improvement, minus that of the others in the group without i. For k >= 2."""
    indices = range(len(r))
    result = []
    for i in indices:
        without_i = [j for j in indices if j != i]
        baseline = fmean(expected_improvement(r, j, [m for m in without_i if m != j], k) for j in without_i)
        result.append(expected_improvement(r, i, without_i, k) - baseline)
    return result


def with_and_without(r, k):
    """``q_i`` and ``U_k(-i)`` for each i: means of the maximum over subsets that contain i and that do not."""
    subsets = list(combinations(range(len(r)), k))

    def mean(chosen):
        maxima = [max(r[j] for j in subset) for subset in chosen]
        return fmean(maxima) if maxima else None

    return [(mean([s for s in subsets if i in s]), mean([s for s in subsets if i not in s])) for i in range(len(r))]


def double(x):
    return torch.tensor(x, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- maxpo


@pytest.mark.parametrize(("name", "n", "k"), CASES)
def test_against_enumeration(name, n, k):
    r = REWARDS[name][-n:]
    closed = advantages.maxpo(double(r), k=k, group_size=n)
    torch.testing.assert_close(closed, double([q - u for q, u in with_and_without(r, k)]), **CLOSE)
    if k >= 2:
        torch.testing.assert_close(closed, double(leave_two_out(r, k)), **CLOSE)
        torch.testing.assert_close(closed, maxpo_leave_two_out(double(r), k=k), **CLOSE)
        torch.testing.assert_close(closed, maxpo_quadratic(double(r), k=k), **CLOSE)
    else:
        torch.testing.assert_close(closed, advantages.rloo(double(r), group_size=n), **CLOSE)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ragged_groups_in_any_order(k):
    sizes = [4, 8, 5, 6]
    ids = torch.repeat_interleave(torch.tensor([9, -3, 0, 2]), torch.tensor(sizes))
    rewards = torch.cat([double(REWARDS["ties"][:4]), double(REWARDS["distinct"]), double(REWARDS["ties"][:5])])
    rewards = torch.cat([rewards, double(REWARDS["binary"][:6])])
    expected = torch.cat([double([q - u for q, u in with_and_without(r.tolist(), k)]) for r in rewards.split(sizes)])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    result = advantages.maxpo(rewards[order], k=k, group_ids=ids[order])
    torch.testing.assert_close(result, expected[order], **CLOSE)


def test_samples_left_out_are_not_counted():
    r = double([5.0, 1.0, float("nan"), 3.0, 4.0, 9.0, 2.0, 2.0])
    mask = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1])
    result = advantages.maxpo(r, k=2, group_size=4, mask=mask)
    assert torch.equal(result[mask != 0], advantages.maxpo(r[mask != 0], k=2, group_size=3))
    assert (result[mask == 0] == 0).all()


@settings(max_examples=50)
@given(
    rewards=st.lists(st.integers(-5, 5), min_size=3, max_size=40),
    k=st.integers(1, 39),
    shift=st.integers(-100, 100),
)
def test_centred_shift_invariant_and_monotone(rewards, k, shift):
    n = len(rewards)
    k = min(k, n - 1)
    result = advantages.maxpo(double(rewards), k=k, group_size=n)
    rounding = n * 1e-15 * result.abs().max().item()
    assert abs(result.sum().item()) <= rounding
    # Integers are shifted without rounding, so not a bit may change.
    assert torch.equal(advantages.maxpo(double(rewards) + shift, k=k, group_size=n), result)
    ascending = result[double(rewards).argsort()]
    assert (ascending.diff() >= -rounding).all()


@pytest.mark.parametrize("k", [2, 7, 100, 299])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_get_bit_identical_advantages(k, dtype):
    generator = torch.Generator().manual_seed(k)
    levels = torch.randn(20, dtype=dtype, generator=generator)
    level = torch.randint(20, (300,), generator=generator)
    for estimator in (advantages.maxpo, *(partial(advantages.pkpo, variant=v) for v in ("s", "sloo", "sloo-1"))):
        result = estimator(levels[level], k=k, group_size=300)
        for i in range(20):
            assert result[level == i].unique().numel() == 1


@pytest.mark.parametrize("n", [3, 6, 16])
def test_k_of_n_minus_1_rewards_the_lead_of_the_best(n):
    r = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    top = r.topk(2)
    lead = top.values[0] - top.values[1]
    expected = (-lead / (n - 1)).expand(n).clone()
    expected[top.indices[0]] = lead
    torch.testing.assert_close(advantages.maxpo(r, k=n - 1, group_size=n), expected, **CLOSE)


@pytest.mark.parametrize("n", [5, 16])
def test_binary_rewards(n):
    for right, k in product(range(n + 1), range(1, n)):
        wrong = n - right
        r = double([1.0] * right + [0.0] * wrong)
        a = comb(wrong, k) / comb(n - 1, k) if 0 < right < n else 0.0
        b = -right / wrong * a if wrong else 0.0
        torch.testing.assert_close(advantages.maxpo(r, k=k, group_size=n), double([a] * right + [b] * wrong), **CLOSE)


def exact_maxpo(ascending, k):
    """``q_i - U_k(-i)`` for sorted integer rewards in rational arithmetic, by sums over the rank of the maximum."""
    n = len(ascending)
    with_i = [comb(m - 1, k - 2) * r if m and k > 1 else 0 for m, r in enumerate(ascending)]
    lower = [comb(m, k - 1) * r for m, r in enumerate(ascending)]
    upper = [comb(m - 1, k - 1) * r if m else 0 for m, r in enumerate(ascending)]
    with_above, without = sum(with_i), sum(upper)
    result = []
    for p, r in enumerate(ascending):
        with_above -= with_i[p]
        without -= upper[p]
        q = Fraction(comb(p, k - 1) * r + with_above, comb(n - 1, k - 1))
        result.append(float(q - Fraction(without, comb(n - 1, k))))
        without += lower[p]
    return result


@pytest.mark.parametrize("k", [1, 2, 3, 32, 512, 1000, 1022, 1023])
def test_large_group_against_rational_arithmetic(k):
    n = 1024
    ascending = torch.randint(-500, 500, (n,), generator=torch.Generator().manual_seed(k)).sort().values
    result = advantages.maxpo(ascending.double(), k=k, group_size=n)
    expected = double(exact_maxpo(ascending.tolist(), k))
    # Products and sums of up to n factors and terms: their errors grow with log2(n) = 10, relative to the largest term.
    scale = expected.abs().max().item()
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-14 * scale)
    in_float32 = advantages.maxpo(ascending.float(), k=k, group_size=n)
    assert torch.equal(in_float32, result.float())


def test_large_group_is_finite_and_centred_for_every_k():
    n = 1024
    r = torch.randn(n, generator=torch.Generator().manual_seed(0))
    for k in range(1, n):
        result = advantages.maxpo(r, k=k, group_size=n)
        assert result.isfinite().all()
        # Each entry is rounded to float32 on its own.
        assert abs(result.double().sum()) <= 2**-24 * result.double().abs().sum()
        assert result.argmax() == r.argmax()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_unbiased_scale(k):
    r = torch.randn(12, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0] * 5 + [1] * 7)
    sizes = torch.tensor([5] * 5 + [7] * 7)
    mean = advantages.maxpo(r, k=k, group_ids=ids)
    torch.testing.assert_close(advantages.maxpo(r, k=k, group_ids=ids, scale="unbiased"), mean * k / sizes)


# ---------------------------------------------------------------------------------------------- pkpo, passk, max@k


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize(("n", "k"), [(n, k) for n in range(1, 8) for k in range(1, n + 1)])
def test_pkpo_and_max_at_k_against_enumeration(name, n, k):
    r = REWARDS[name][-n:]

    def check(variant, expected):
        result = advantages.pkpo(double(r), k=k, variant=variant, group_size=n)
        torch.testing.assert_close(result, double(expected), **CLOSE)

    means = with_and_without(r, k)
    check("s", [k / n * q for q, _ in means])
    if k < n:
        check("sloo", [k / n * q - k / (n - 1) * u for q, u in means])
    if k > 1:
        others = [[j for j in range(n) if j != i] for i in range(n)]
        check("sloo-1", [k / n * expected_improvement(r, i, others[i], k) for i in range(n)])
    best = fmean(max(subset) for subset in combinations(r, k))
    torch.testing.assert_close(advantages.max_at_k(double(r), k=k, group_size=n), double([best] * n), **CLOSE)


@pytest.mark.parametrize("variant", ["s", "sloo", "sloo-1"])
@pytest.mark.parametrize("k", [2, 512, 1023])
def test_pkpo_large_group(variant, k):
    n = 1024
    r = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = advantages.pkpo(r, k=k, variant=variant, group_size=n)
    best = advantages.max_at_k(r, k=k, group_size=n)[0]
    fewer = advantages.max_at_k(r, k=k - 1, group_size=n)[0]
    # Sums over the group: every subset of size k is counted by each of its members.
    total = {"s": k * best, "sloo": -k / (n - 1) * best, "sloo-1": k * (best - fewer)}[variant]
    torch.testing.assert_close(result.sum(), total, rtol=1e-11, atol=1e-11)


def test_max_at_k_of_ragged_groups():
    result = advantages.max_at_k(
        torch.tensor([1.0, 9.0, 2.0, 3.0, 4.0]),
        k=2,
        group_ids=torch.tensor([0, 1, 0, 0, 1]),
        mask=torch.tensor([1, 1, 1, 1, 1]),
    )
    torch.testing.assert_close(result, torch.tensor([8 / 3, 9.0, 8 / 3, 8 / 3, 9.0]))
    assert (advantages.max_at_k(torch.full((7,), 0.1), k=3, group_size=7) == 0.1).all()


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_passk_formula(n):
    for right, k in product(range(n + 1), range(1, n + 1)):
        wrong = n - right
        rate = 1 - comb(wrong, k) / comb(n, k)
        sigma = sqrt(rate * (1 - rate))
        a = b = 0.0
        if sigma > 0:
            a = (1 - rate) / sigma
            b = (1 - rate - comb(wrong - 1, k - 1) / comb(n - 1, k - 1)) / sigma
        result = advantages.passk(torch.tensor([True] * right + [False] * wrong), k=k, group_size=n)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, torch.tensor([a] * right + [b] * wrong), rtol=1e-6, atol=1e-7)


def test_passk_reads_no_sample_left_out():
    r = torch.tensor([0.0, 1.0, float("nan"), 0.5, 1.0, 0.0])
    result = advantages.passk(r, k=2, group_size=6, mask=torch.tensor([1, 1, 0, 0, 1, 1]))
    expected = advantages.passk(torch.tensor([0, 1, 1, 0]), k=2, group_size=4)
    assert result.tolist() == [*expected[:2].tolist(), 0, 0, *expected[2:].tolist()]


def test_passk_is_scaled_maxpo():
    r, n, k = double(REWARDS["binary"]), 8, 3
    rate = advantages.max_at_k(r, k=k, group_size=n)
    expected = advantages.maxpo(r, k=k, group_size=n) * (n - k) / n / (rate * (1 - rate)).sqrt()
    torch.testing.assert_close(advantages.passk(r, k=k, group_size=n), expected, **CLOSE)


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("n", [2, 3, 8])
def test_grpo_passk_is_what_the_best_adds(name, n):
    r = REWARDS[name][-n:]
    expected = double([max(max(r) - max(r[:i] + r[i + 1 :]), 0) for i in range(n)])
    torch.testing.assert_close(advantages.grpo_passk(double(r), std=False, group_size=n), expected, **CLOSE)
    scaled = expected / (stdev(r) + 1e-6)
    torch.testing.assert_close(advantages.grpo_passk(double(r), group_size=n), scaled, **CLOSE)
    torch.testing.assert_close(advantages.grpo_passk(double(r), eps=0.5, group_size=n), expected / (stdev(r) + 0.5))


def test_grpo_passk_of_ragged_groups():
    result = advantages.grpo_passk(
        torch.tensor([3.0, float("nan"), 1.0, 5.0, 0.5, 5.0, 2.0]),
        std=False,
        group_ids=torch.tensor([0, 0, 1, 9, 0, 9, 1]),
        mask=torch.tensor([1, 0, 1, 1, 1, 1, 1]),
    )
    assert result.tolist() == [2.5, 0, 0, 0, 0, 0, 1]


def test_grpo_passk_where_data_is_not_read_single_samples_are_nan(monkeypatch):
    monkeypatch.setattr(_checks, "values_are_free", lambda *tensors: False)
    monkeypatch.setattr(backends, "_forced", "reference")  # the native kernel reads it, and raises
    result = advantages.grpo_passk(torch.tensor([1.0, 2.0, 4.0]), std=False, group_ids=torch.tensor([0, 1, 0]))
    assert result.isnan().tolist() == [False, True, False]


# ------------------------------------------------------------------------------------------------------------ errors

R6, IDS6 = torch.arange(6.0), torch.tensor([5, 5, 5, 5, 8, 8])
BINARY6 = torch.tensor([0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize(
    ("name", "rewards", "kwargs", "error", "match"),
    [
        ("maxpo", R6, {"k": 0, "group_size": 3}, ValueError, "k must be >= 1, got 0"),
        ("maxpo", R6, {"k": 2.0, "group_size": 3}, TypeError, "k must be an int, got float"),
        ("maxpo", R6, {"k": 3, "group_size": 3}, ValueError, "k must be at most .* - 1, got k=3, but group_size is 3"),
        ("maxpo", R6, {"k": 1, "group_size": 1}, ValueError, "k must be at most .* - 1, got k=1, but group_size is 1"),
        ("maxpo", R6, {"k": 2, "group_ids": IDS6}, ValueError, "k must be .*k=2, but group 8 has size 2"),
        (
            "maxpo",
            R6,
            {"k": 2, "group_size": 3, "mask": BINARY6},
            ValueError,
            "k must be .*k=2, but group 0 has size 1",
        ),
        ("maxpo", R6, {"k": 2, "group_size": 3, "scale": "sum"}, ValueError, "scale must be .*'unbiased'.*'sum'"),
        ("pkpo", R6, {"k": 4, "group_size": 3, "variant": "s"}, ValueError, "k must be at most the size of the group,"),
        ("pkpo", R6, {"k": 3, "group_size": 3, "variant": "sloo"}, ValueError, "k must be at most .* - 1"),
        ("pkpo", R6, {"k": 1, "group_size": 3}, ValueError, "k must be >= 2, got 1"),
        ("pkpo", R6, {"k": 2, "group_size": 3, "variant": "loo"}, ValueError, "variant must be .*'sloo-1'.*'loo'"),
        ("passk", R6, {"k": 2, "group_size": 3}, ValueError, "rewards must be 0 or 1 .*2.0"),
        ("grpo_passk", R6, {"group_size": 1}, ValueError, "group must have at least 2 samples, but group_size is 1"),
        (
            "grpo_passk",
            R6,
            {"group_size": 3, "mask": BINARY6},
            ValueError,
            "at least 2 samples, but group 0 has size 1",
        ),
        ("grpo_passk", R6, {"group_size": 3, "eps": 0}, ValueError, "eps must be > 0, got 0"),
        ("passk", BINARY6, {"k": 4, "group_size": 3}, ValueError, "k must be at most the size of the group,"),
    ],
)
def test_errors_name_the_argument(name, rewards, kwargs, error, match):
    with pytest.raises(error, match=match):
        advantages.compute(name, rewards, **kwargs)


def test_max_at_k_errors():
    with pytest.raises(ValueError, match=r"k must be .*k=3, but group 8 has size 2"):
        advantages.max_at_k(R6, k=3, group_ids=IDS6)


def test_a_group_without_kept_samples_does_not_count_as_too_small():
    result = advantages.maxpo(R6, k=2, group_size=3, mask=torch.tensor([0, 0, 0, 1, 1, 1]))
    assert result.isfinite().all()
    assert result[3:].abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("maxpo", {"k": 2}),
        ("pkpo", {"k": 2, "variant": "sloo"}),
        ("pkpo", {"k": 3, "variant": "s"}),
        ("pkpo", {"k": 3, "variant": "sloo-1"}),
        ("passk", {"k": 3}),
        ("order_statistic", {"k": 2, "weights": [1.0, 0.5]}),
    ],
)
def test_where_data_is_not_read_too_small_groups_are_nan(name, kwargs, monkeypatch):
    monkeypatch.setattr(_checks, "values_are_free", lambda *tensors: False)
    monkeypatch.setattr(backends, "_forced", "reference")  # the native kernel reads it, and raises
    result = advantages.compute(name, BINARY6, group_ids=IDS6, mask=torch.tensor([1, 1, 0, 1, 1, 1]), **kwargs)
    assert result.isnan().tolist() == [False, False, False, False, True, True]
    assert result[2] == 0
