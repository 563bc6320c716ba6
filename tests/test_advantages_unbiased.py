"""What each estimator estimates: its expectation over all batches of a small categorical policy, exactly."""

from functools import partial
from itertools import product
from statistics import fmean, median

import pytest
import torch

from fusedpo import advantages
from fusedpo.advantages import rank_weights

REWARDS = torch.tensor([0.0, 1.0, 1.0, 3.0], dtype=torch.float64)
BINARY = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
LOGITS = torch.tensor([0.1, -0.4, 0.5, -1.0], dtype=torch.float64)
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def true_gradient(statistic, k, reward):
    """Gradient with respect to the logits of the expected statistic of the sorted rewards of k samples."""
    logits = LOGITS.clone().requires_grad_()
    samples = torch.tensor(list(product(range(4), repeat=k)))
    values = torch.tensor([statistic(sorted(r)) for r in reward[samples].tolist()], dtype=torch.float64)
    return torch.autograd.grad((logits.log_softmax(0)[samples].sum(1).exp() * values).sum(), logits)[0]


def mean_estimate(estimator, n, reward):
    """Expectation over batches of n samples of the *sum* of ``A_i grad log pi(y_i)``."""
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(0)
    batches = torch.tensor(list(product(range(4), repeat=n)))
    weight = estimator(reward[batches].flatten(), group_size=n).view(-1, n)
    probability = logp[batches].sum(1).exp().detach()
    return torch.autograd.grad((probability[:, None] * weight * logp[batches]).sum(), logits)[0]


@pytest.mark.parametrize(("n", "k"), [(3, 1), (4, 2), (5, 3), (5, 4)])
@pytest.mark.parametrize("scale", ["mean", "unbiased"])
def test_maxpo(n, k, scale):
    factor = n / k if scale == "mean" else 1  # "mean": the mean of the samples estimates 1/k of the gradient
    estimate = mean_estimate(partial(advantages.maxpo, k=k, scale=scale), n, REWARDS)
    torch.testing.assert_close(estimate, factor * true_gradient(max, k, REWARDS), **CLOSE)


@pytest.mark.parametrize(("n", "k"), [(3, 1), (4, 2), (5, 3), (5, 4)])
@pytest.mark.parametrize(
    ("name", "statistic"), [("min", min), ("median", median), ("top", lambda s: fmean(s[1:] or s)), ("signed", None)]
)
@pytest.mark.parametrize("scale", ["mean", "unbiased"])
def test_order_statistic(n, k, name, statistic, scale):
    if name == "signed":
        weights = [0.5 - j**2 for j in range(k)]

        def statistic(s):
            return sum(w * x for w, x in zip(weights, s, strict=True))
    else:
        weights = rank_weights(name, k=k, m=max(k - 1, 1) if name == "top" else None)
    estimator = partial(advantages.order_statistic, k=k, weights=weights, scale=scale)
    factor = n / k if scale == "mean" else 1
    estimate = mean_estimate(estimator, n, REWARDS)
    torch.testing.assert_close(estimate, factor * true_gradient(statistic, k, REWARDS), **CLOSE)


@pytest.mark.parametrize("variant", ["s", "sloo", "sloo-1"])
@pytest.mark.parametrize(("n", "k"), [(4, 2), (5, 3)])
def test_pkpo(variant, n, k):
    estimate = mean_estimate(partial(advantages.pkpo, k=k, variant=variant), n, REWARDS)
    torch.testing.assert_close(estimate, true_gradient(max, k, REWARDS), **CLOSE)


def test_subtracting_the_mean_improvement_of_the_group_is_biased():
    def centred(r, group_size):
        improvement = advantages.pkpo(r, k=2, variant="sloo-1", group_size=group_size).view(-1, group_size)
        return (improvement - improvement.mean(1, keepdim=True)).flatten()

    assert not torch.allclose(mean_estimate(centred, 4, REWARDS), true_gradient(max, 2, REWARDS), rtol=1e-3)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_grpo_passk_without_std(n):
    estimate = mean_estimate(partial(advantages.grpo_passk, std=False), n, REWARDS)
    torch.testing.assert_close(estimate, true_gradient(max, n, REWARDS), **CLOSE)


@pytest.mark.parametrize(("n", "k"), [(3, 1), (5, 3), (4, 4)])
def test_passk_times_its_sigma_falls_short_by_k_over_n(n, k):
    def estimator(r, group_size):
        rate = advantages.max_at_k(r, k=k, group_size=group_size)
        return advantages.passk(r, k=k, group_size=group_size) * (rate * (1 - rate)).sqrt()

    estimate = mean_estimate(estimator, n, BINARY)
    torch.testing.assert_close(estimate, (n / k) * (1 - k / n) * true_gradient(max, k, BINARY), **CLOSE)


@pytest.mark.parametrize("n", [2, 4])
def test_group_baselines(n):
    gradient = true_gradient(fmean, 1, REWARDS)

    def check(estimator, factor):
        torch.testing.assert_close(mean_estimate(estimator, n, REWARDS), factor * gradient, **CLOSE)

    check(advantages.rloo, n)
    # A baseline that contains the sample itself takes 1/n of the gradient away.
    check(advantages.dr_grpo, n - 1)
    check(lambda r, **groups: advantages.opo(r, lengths=torch.ones_like(r), **groups), n - 1)
    check(lambda r, group_size: advantages.remax(r, baselines=torch.full_like(r, 0.7)), n)
    # RAFT drops negative rewards; here there are none.
    check(lambda r, group_size: advantages.raft(r), n)
    # Without the groups of equal rewards, the reward itself is not an unbiased weight.
    assert not torch.allclose(mean_estimate(advantages.reinforce_rej, n, REWARDS), n * gradient)
