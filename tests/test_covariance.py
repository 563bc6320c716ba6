"""Clip-Cov and KL-Cov: which tokens they choose, and what they do to the loss."""

import math

import pytest
import torch
from support.policy_loss import pack, random_batch

import fusedpo
from fusedpo import objectives as O
from fusedpo.aggregation import aggregate
from fusedpo.covariance import clip_cov_weights, kl_cov_penalty

NAN = math.nan


pytestmark = pytest.mark.usefixtures("on_the_reference")


def random_arrays(rows=6, width=9, seed=0):
    batch = random_batch(rows, width, seed)
    return batch["logprobs"], batch["old_logprobs"], batch["advantages"], batch["mask"]


def covariances(lp, a, mask):
    """By token, in plain Python."""
    kept = [tuple(index) for index in mask.nonzero().tolist()]
    mean_lp, mean_a = (math.fsum(x[i].item() for i in kept) / len(kept) for x in (lp, a))
    return {i: (a[i].item() - mean_a) * (lp[i].item() - mean_lp) for i in kept}


def zeros(weights, mask):
    return {tuple(index) for index in ((weights == 0) & mask).nonzero().tolist()}


LOW, HIGH = 0.01, 0.5


def candidates(lp, olp, a, mask):
    """Tokens with a covariance in the range that PPO's clip leaves alone."""
    found = set()
    for i, cov in covariances(lp, a, mask).items():
        ratio, advantage = math.exp(lp[i] - olp[i]), a[i].item()
        clipped = ratio > 1.1 if advantage > 0 else ratio < 0.9
        if LOW < cov < HIGH and not clipped:
            found.add(i)
    return found


def draw(lp, olp, a, mask, fraction, seed=0, **options):
    return clip_cov_weights(
        lp,
        olp,
        a,
        mask=mask,
        clip_low=0.1,
        clip_high=0.1,
        fraction=fraction,
        low=LOW,
        high=HIGH,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def test_clip_cov_draws_candidates_at_random():
    arrays = random_arrays()
    mask, expected = arrays[-1], candidates(*arrays)
    assert 4 < len(expected) < mask.sum() - 4
    for fraction in (1e-4, 0.05, 0.1):
        number = max(int(fraction * mask.sum().item()), 1)
        draws = [zeros(draw(*arrays, fraction, seed), mask) for seed in range(20)]
        assert {len(drawn) for drawn in draws} == {number}
        assert all(drawn <= expected for drawn in draws)
        assert len(set(map(frozenset, draws))) > 1
    everywhere = set().union(*(zeros(draw(*arrays, 1e-4, seed), mask) for seed in range(200)))
    assert everywhere == expected  # each of them can be drawn
    assert zeros(draw(*arrays, 1.0), mask) == expected  # never more than there are
    assert torch.equal(draw(*arrays, 0.1), draw(*arrays, 0.1))


def test_clip_cov_drops_the_loss_of_the_drawn_tokens_only():
    lp, olp, a, mask = random_arrays()
    weights = draw(lp, olp, a, mask, 0.1)
    lp.requires_grad_()
    loss = fusedpo.policy_loss(lp, olp, a, objective=O.ppo(0.1, 0.1), mask=mask, is_weights=weights).loss
    ratio = (lp - olp).exp()
    tokens = -torch.minimum(ratio * a, ratio.clamp(0.9, 1.1) * a)
    expected = (tokens * weights * mask).sum() / mask.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(*(torch.autograd.grad(x, lp)[0] for x in (loss, expected)), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("fraction", [1e-4, 0.1, 0.3])
def test_kl_cov_penalises_the_tokens_with_the_largest_covariance(fraction):
    lp, olp, a, mask = random_arrays()
    cov = covariances(lp, a, mask)
    number = max(int(fraction * len(cov)), 1)
    chosen = sorted(cov, key=cov.get, reverse=True)[:number]
    expected = torch.zeros_like(lp)
    slope = torch.zeros_like(lp)
    for i in chosen:
        expected[i], slope[i] = 0.7 * abs(lp[i] - olp[i]), 0.7 * math.copysign(1, lp[i] - olp[i])
    lp.requires_grad_()
    penalty = kl_cov_penalty(lp, olp, a, mask=mask, fraction=fraction, coef=0.7)
    torch.testing.assert_close(penalty, expected, rtol=1e-13, atol=0)
    assert torch.equal(torch.autograd.grad(penalty.sum(), lp)[0], slope)


def test_the_loss_of_kl_cov():
    lp, olp, a, mask = random_arrays()
    lp.requires_grad_()
    objective = O.Objective(O.TokenRatio(), O.NoTrustRegion())
    loss = fusedpo.policy_loss(lp, olp, a, objective=objective, mask=mask).loss
    loss = loss + aggregate(kl_cov_penalty(lp, olp, a, mask=mask, fraction=0.1), mask=mask)

    x = lp - olp
    cov = ((a - a[mask].mean()) * (lp - lp[mask].mean())).detach()
    chosen = mask & (cov >= cov[mask].topk(int(0.1 * mask.sum())).values[-1])
    expected = (-a * x.exp() + torch.where(chosen, 0.1 * x.abs(), 0))[mask].mean()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(*(torch.autograd.grad(y, lp)[0] for y in (loss, expected)), rtol=1e-12, atol=1e-15)


def both(lp, olp, a, mask, **options):
    weights = draw(lp, olp, a, mask, 0.1, **options)
    return weights.masked_fill(mask == 0, 1), kl_cov_penalty(lp, olp, a, mask=mask, fraction=0.1, **options)


def test_masked_garbage_reaches_nothing():
    *arrays, mask = random_arrays()
    spoilt = [x.masked_fill(~mask, NAN) for x in arrays]
    assert all(map(torch.equal, both(*spoilt, mask), both(*arrays, mask)))
    nothing = torch.full((2, 3), NAN)
    weights, penalty = both(nothing, nothing, nothing, torch.zeros(2, 3))
    assert torch.equal(weights, torch.ones(2, 3))
    assert torch.equal(penalty, torch.zeros(2, 3))


def test_advantages_per_sequence_and_packed():
    lp, olp, a, mask = random_arrays()
    a = a[:, 0]
    expected = both(lp, olp, a[:, None].expand_as(lp), mask)
    assert all(map(torch.equal, both(lp, olp, a, mask), expected))
    packed = pack({"lp": lp, "olp": olp, "mask": mask}, [9] * 6)
    for x, y in zip(both(**packed, a=a), expected, strict=True):
        torch.testing.assert_close(x, y.flatten(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("function", [clip_cov_weights, kl_cov_penalty])
@pytest.mark.parametrize(
    ("error", "argument", "given"),
    [
        (TypeError, "logprobs", {"logprobs": torch.zeros(2, 3).long()}),
        (ValueError, "old_logprobs", {"old_logprobs": torch.zeros(2)}),
        (ValueError, "advantages", {"advantages": torch.zeros(3)}),
        (ValueError, "mask", {"mask": torch.zeros(2)}),
        (ValueError, "fraction", {"fraction": 0.0}),
        (ValueError, "fraction", {"fraction": 1.5}),
    ],
)
def test_errors_name_the_argument(function, error, argument, given):
    right = {name: torch.zeros(2, 3) for name in ("logprobs", "old_logprobs", "advantages")}
    with pytest.raises(error, match=rf"^{argument}\b"):
        function(**right | given)
