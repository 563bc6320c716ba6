"""The variance of the gradient under MaxPO and PKPO, exactly: where a centred signal helps, and where it does not."""

import runpy
from itertools import product
from pathlib import Path

import pytest
import torch

PLOT = runpy.run_path(str(Path(__file__).parents[1] / "bench" / "plot_maxpo.py"))
MANY, estimators, gradient_variance, ratios = (
    PLOT[name] for name in ("MANY", "estimators", "gradient_variance", "ratios")
)
NAMES = list(estimators(2))


def maxpo(p, n, k, answers=MANY):
    """Its variance over that of the signal that is not centred."""
    return ratios(round(p * answers), answers, n, k)["MaxPO"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("right", "answers", "n", "k"), [(1, 2, 4, 3), (1, 3, 4, 2), (2, 3, 5, 2), (3, 4, 4, 3)])
def test_against_enumeration_of_all_batches(name, right, answers, n, k):
    logits = torch.zeros(answers, dtype=torch.float64, requires_grad=True)
    scores = torch.func.jacrev(lambda x: x.log_softmax(0))(logits.detach())
    batches = torch.tensor(list(product(range(answers), repeat=n)))
    weight = estimators(k)[name]((batches < right).double().flatten(), group_size=n).view(-1, n)
    gradients = (weight[..., None] * scores[batches]).sum(1)
    expected = gradients.var(0, unbiased=False).sum().item()
    assert gradient_variance(estimators(k)[name], right, answers, n) == pytest.approx(expected, rel=1e-12)

    # All have the same mean: the gradient of the probability that one of k samples is right.
    pass_at_k = 1 - (1 - logits.softmax(0)[:right].sum()) ** k
    torch.testing.assert_close(gradients.mean(0), torch.autograd.grad(pass_at_k, logits)[0])


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (16, {0.02: 1.05, 0.05: 1.02, 0.1: 0.96, 0.25: 0.81, 0.5: 0.55, 0.75: 0.29}),
        (8, {0.02: 1.12, 0.05: 1.10, 0.1: 1.05, 0.25: 0.91, 0.5: 0.66, 0.75: 0.37}),
    ],
)
def test_centring_for_k_4(n, expected):
    """The figures of docs/maxpo.md. No two samples are alike, so variances are those of the weights alone."""
    for p, ratio in expected.items():
        assert maxpo(p, n, 4) == pytest.approx(ratio, abs=0.006)


def test_centring_helps_where_success_is_not_rare():
    for n in (8, 16, 64):
        assert maxpo(4 / n, n, 2) < 1
        assert maxpo(0.1 / n, n, 2) > 1
    # The closer k is to n, the more has to succeed: here, half of the samples.
    assert maxpo(0.4, 5, 4) > 1 > maxpo(0.6, 5, 4)


def test_centring_does_not_help_a_policy_with_few_answers():
    # Samples of the same answer share their gradient, so that the weights of all of them count together.
    assert maxpo(0.5, 16, 4, answers=2) > 2
    assert maxpo(0.125, 16, 4, answers=8) > 1.1
    assert maxpo(0.25, 5, 4, answers=8) > 1.5


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(("n", "k"), [(5, 4), (16, 4), (16, 2)])
def test_maxpo_has_a_lower_variance_than_the_other_leave_one_out_estimate(p, n, k):
    result = ratios(round(p * MANY), MANY, n, k)
    assert result["MaxPO"] < result["PKPO sloo"] < result["PKPO s"]
