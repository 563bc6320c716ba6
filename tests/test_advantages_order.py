"""Order statistics against enumeration of all subsets, and what they have in common with MaxPO and RLOO."""

from fractions import Fraction
from itertools import combinations
from math import comb
from statistics import fmean, median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.advantages import OF_EIGHT as REWARDS

from fusedpo import advantages
from fusedpo.advantages import rank_weights

pytestmark = pytest.mark.usefixtures("implementation")

# Sums of at most a few hundred terms of order 1 in float64.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def statistics_of(k):
    """Each preset with its definition on a sorted subset, and weights of either sign."""
    yield rank_weights("max", k=k), max
    yield rank_weights("min", k=k), min
    yield rank_weights("median", k=k), median
    for m in range(1, k + 1):
        yield rank_weights("top", k=k, m=m), lambda s, m=m: fmean(s[-m:])
        yield rank_weights("bottom", k=k, m=m), lambda s, m=m: fmean(s[:m])
    signed = [(-1.0) ** j * (j + 0.3) for j in range(k)]
    yield signed, lambda s: sum(w * x for w, x in zip(signed, s, strict=True))


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize(("n", "k"), [(n, k) for n in range(2, 9) for k in range(1, n)])
def test_against_enumeration(name, n, k):
    r = REWARDS[name][-n:]
    subsets = [(set(subset), sorted(r[i] for i in subset)) for subset in combinations(range(n), k)]
    for weights, statistic in statistics_of(k):
        values = [(members, statistic(s)) for members, s in subsets]
        expected = [
            fmean(v for members, v in values if i in members) - fmean(v for members, v in values if i not in members)
            for i in range(n)
        ]
        result = advantages.order_statistic(double(r), k=k, weights=weights, group_size=n)
        torch.testing.assert_close(result, double(expected), **CLOSE)


@pytest.mark.parametrize("k", [1, 2, 5, 11])
def test_max_is_maxpo_and_mean_is_rloo(k):
    r = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    for scale in ("mean", "unbiased"):
        result = advantages.order_statistic(r, k=k, weights=rank_weights("max", k=k), scale=scale, group_size=12)
        torch.testing.assert_close(result, advantages.maxpo(r, k=k, scale=scale, group_size=12), **CLOSE)
    mean = advantages.order_statistic(r, k=k, weights=rank_weights("top", k=k, m=k), group_size=12)
    torch.testing.assert_close(mean, advantages.rloo(r, group_size=12) / k, **CLOSE)


@pytest.mark.parametrize("k", [1, 3])
def test_min_is_max_of_the_negated_rewards(k):
    r = double(REWARDS["ties"])
    low = advantages.order_statistic(r, k=k, weights=rank_weights("min", k=k), group_size=8)
    torch.testing.assert_close(low, -advantages.maxpo(-r, k=k, group_size=8), **CLOSE)


@pytest.mark.parametrize(("n", "k"), [(2, 1), (6, 2), (9, 8)])
def test_it_is_rloo_of_rewards_with_scaled_gaps(n, k):
    r = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort().values
    weights = [j + 0.5 for j in range(k)]
    population = comb(n - 2, k - 1)
    scaled = r.clone()
    for g in range(1, n):
        h = sum(w * comb(g - 1, b) * comb(n - 1 - g, k - 1 - b) for b, w in enumerate(weights)) / population
        scaled[g] = scaled[g - 1] + h * (r[g] - r[g - 1])
    result = advantages.order_statistic(r, k=k, weights=weights, group_size=n)
    torch.testing.assert_close(result, advantages.rloo(scaled, group_size=n), **CLOSE)


def test_ragged_groups_in_any_order_and_samples_left_out():
    sizes, weights = [4, 8, 5, 6], [0.5, -1.0, 2.0]
    ids = torch.repeat_interleave(torch.tensor([9, -3, 0, 2]), torch.tensor(sizes))
    rewards = torch.randn(23, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    apart = [advantages.order_statistic(r, k=3, weights=weights, group_size=len(r)) for r in rewards.split(sizes)]
    ids, rewards, expected = (torch.cat([x, x[:5]]) for x in (ids, rewards, torch.cat(apart)))
    mask = torch.arange(28) < 23
    order = torch.randperm(28, generator=torch.Generator().manual_seed(1))
    result = advantages.order_statistic(
        rewards.where(mask, float("nan"))[order], k=3, weights=weights, group_ids=ids[order], mask=mask[order]
    )
    torch.testing.assert_close(result, expected.where(mask, 0)[order], **CLOSE)


@settings(max_examples=40)
@given(data=st.data(), rewards=st.lists(st.integers(-5, 5), min_size=3, max_size=30))
def test_equal_rewards_get_bit_identical_advantages_and_all_sum_to_zero(data, rewards):
    n = len(rewards)
    k = data.draw(st.integers(1, n - 1))
    weights = data.draw(st.lists(st.floats(-1, 1), min_size=k, max_size=k))
    result = advantages.order_statistic(double(rewards), k=k, weights=weights, group_size=n)
    assert abs(result.sum()) <= 1e-15 * n * result.abs().sum() + 1e-300  # subnormal numbers have few digits
    for level in set(rewards):
        assert result[torch.tensor(rewards) == level].unique().numel() == 1


def exact(ascending, k, weights):
    """``q_i - U_k(-i)`` for integer rewards and weights, in rational arithmetic, by sums over ranks in the subset.

    Sample m has rank j in a subset with C(m, j) C(n-1-m, k-1-j) choices of the others.
    """
    n = len(ascending)

    def mean(samples, size, taken=None):
        """Over the subsets of ``size`` of ``samples``, each with ``taken`` besides."""
        total = 0
        for m, r in enumerate(samples):
            shift = taken is not None and taken < r
            for j in range(size):
                total += weights[j + shift] * r * comb(m, j) * comb(len(samples) - 1 - m, size - 1 - j)
        if taken is not None:
            below = sum(r < taken for r in samples)
            for j in range(size + 1):
                total += weights[j] * taken * comb(below, j) * comb(len(samples) - below, size - j)
        return Fraction(total, comb(len(samples), size))

    result = []
    for i in range(n):
        others = ascending[:i] + ascending[i + 1 :]
        result.append(float(mean(others, k - 1, ascending[i]) - mean(others, k)))
    return result


@pytest.mark.parametrize(("n", "k"), [(40, 1), (40, 7), (40, 39), (61, 30)])
def test_larger_groups_against_rational_arithmetic(n, k):
    generator = torch.Generator().manual_seed(k)
    ascending = torch.randperm(1000, generator=generator)[:n].sort().values
    weights = torch.randint(-9, 9, (k,), generator=generator).tolist()
    result = advantages.order_statistic(ascending.double(), k=k, weights=weights, group_size=n)
    expected = double(exact(ascending.tolist(), k, weights))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-13 * expected.abs().max().item())


@pytest.mark.parametrize("k", [1, 2, 32, 512, 1000, 1022, 1023])
def test_large_group(k):
    n = 1024
    r = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    best = advantages.order_statistic(r, k=k, weights=rank_weights("max", k=k), group_size=n)
    # Products of up to n factors and sums of as many terms.
    torch.testing.assert_close(best, advantages.maxpo(r, k=k, group_size=n), rtol=1e-11, atol=1e-13)
    middle = advantages.order_statistic(r, k=k, weights=rank_weights("median", k=k), group_size=n)
    assert middle.isfinite().all()
    assert abs(middle.sum()) <= 1e-12 * middle.abs().sum()
    assert (middle[r.argsort()].diff() >= -1e-15).all()  # a statistic that grows with each reward


# ------------------------------------------------------------------------------------------------------- rank_weights


def test_rank_weights():
    assert rank_weights("max", k=3) == [0, 0, 1]
    assert rank_weights("min", k=3) == [1, 0, 0]
    assert rank_weights("median", k=3) == [0, 1, 0]
    assert rank_weights("median", k=4) == [0, 0.5, 0.5, 0]
    assert rank_weights("median", k=1) == [1]
    assert rank_weights("top", k=4, m=2) == [0, 0, 0.5, 0.5]
    assert rank_weights("bottom", k=4, m=2) == [0.5, 0.5, 0, 0]
    assert rank_weights("top", k=2, m=2) == [0.5, 0.5]
    # Conditional value at risk at level 0.3 of 5 samples: the lowest counts fully, the second by half.
    assert rank_weights("bottom", k=5, m=0.3 * 5) == pytest.approx([2 / 3, 1 / 3, 0, 0, 0])
    assert rank_weights("bottom", k=5, m=0.25) == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("statistic", "kwargs", "error", "match"),
    [
        ("mode", {"k": 3}, ValueError, "statistic must be one of .*'median'.*got 'mode'"),
        ("max", {"k": 0}, ValueError, "k must be >= 1, got 0"),
        ("max", {"k": 1.5}, TypeError, "k must be an int"),
        ("max", {"k": 3, "m": 1}, ValueError, "m is for 'top' and 'bottom'.*m=1 for 'max'"),
        ("top", {"k": 3}, ValueError, "m is for 'top' and 'bottom'.*m=None for 'top'"),
        ("top", {"k": 3, "m": 4}, ValueError, "m must be > 0 and at most k=3, got 4"),
        ("bottom", {"k": 3, "m": 0.0}, ValueError, "m must be > 0 and at most k=3, got 0"),
        ("bottom", {"k": 3, "m": "1"}, TypeError, "m must be a float, got str"),
    ],
)
def test_rank_weights_errors(statistic, kwargs, error, match):
    with pytest.raises(error, match=match):
        rank_weights(statistic, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"k": 2, "weights": torch.ones(2)}, TypeError, "weights must be a sequence of 2 floats, got Tensor"),
        ({"k": 3, "weights": "max"}, TypeError, "weights must be a sequence of 3 floats, got str"),
        ({"k": 2, "weights": [1.0, "0"]}, TypeError, "weights must be a float, got str"),
        ({"k": 2, "weights": [1.0]}, ValueError, "weights must have k=2 entries.*got 1"),
        ({"k": 2, "weights": [1.0, float("nan")]}, ValueError, "weights must be finite"),
        ({"k": 4, "weights": [0.0] * 4}, ValueError, "k must be at most .* - 1, got k=4, but group_size is 4"),
        ({"k": 2, "weights": [0.0, 1.0], "scale": "sum"}, ValueError, "scale must be .*'unbiased'.*'sum'"),
    ],
)
def test_errors_name_the_argument(kwargs, error, match):
    with pytest.raises(error, match=match):
        advantages.order_statistic(torch.arange(8.0), group_size=4, **kwargs)
