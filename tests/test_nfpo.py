"""NFPO: the N-step forward trace against its definition, its limits, and the exact policy gradient by enumeration."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.nfpo import STEPS, Tree, check_cumulative_sums_would_cancel, random_tokens, trace_only
from support.policy_loss import assert_same

import fusedpo
from fusedpo import objectives as O

NAN = math.nan


pytestmark = pytest.mark.usefixtures("on_the_reference")


def window(t, n, end, x):
    """The log of F at position t: the positions t+1 ... t+n-1 that its sequence, which stops before ``end``, has."""
    return math.fsum(x[k] for k in range(t + 1, min(t + n, end)))


# ------------------------------------------------------------------------------------------------------- the definition


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4), n=st.integers(1, 12), seed=st.integers(0, 99))
def test_value_and_gradient_token_by_token(lengths, n, seed):
    lp, olp, advantages, mask, cu_seqlens = random_tokens(lengths, seed)
    lp.requires_grad_()
    tokens = fusedpo.policy_loss(
        lp, olp, advantages, objective=O.nfpo(n, 0.1, 0.2), mask=mask, cu_seqlens=cu_seqlens, reduction="none"
    ).loss
    (gradient,) = torch.autograd.grad(tokens.sum(), lp)
    x = [(a - b) * m for a, b, m in zip(lp.tolist(), olp.tolist(), mask.tolist(), strict=True)]
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        for t in range(start, end):
            a, rho, trace = advantages[t].item(), math.exp(x[t]), math.exp(window(t, n, end, x))
            kept = mask[t].item()
            clipped = rho > 1.2 if a > 0 else rho < 0.9
            loss = trace * max(-a * rho, -a * min(max(rho, 0.9), 1.2))
            assert tokens[t].item() == pytest.approx(loss if kept else 0.0, rel=1e-12)
            assert gradient[t].item() == pytest.approx(-a * rho * trace if kept and not clipped else 0.0, rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 100, 2**40])
def test_padded_rows_are_sequences(n):
    lp, olp, advantages, mask, cu_seqlens = random_tokens([6, 6, 6])
    packed = fusedpo.policy_loss(lp, olp, advantages, objective=O.nfpo(n), mask=mask, cu_seqlens=cu_seqlens)
    padded = (x.reshape(3, 6) for x in (lp, olp, advantages))
    assert torch.equal(fusedpo.policy_loss(*padded, objective=O.nfpo(n), mask=mask.reshape(3, 6)).loss, packed.loss)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), n=st.integers(1, 12), width=st.integers(9, 20))
def test_packed_is_padded(lengths, n, width):
    *arrays, mask, cu_seqlens = random_tokens(lengths, dtype=torch.float32)
    inside = torch.arange(width) < torch.tensor(lengths)[:, None]

    def pad(x, value):
        return torch.full(inside.shape, value, dtype=x.dtype).masked_scatter(inside, x)

    for objective in (trace_only(n), trace_only(n, differentiate=True)):
        results = []
        for (lp, *others), keep, offsets in (
            (arrays, mask, cu_seqlens),
            ([pad(x, NAN) for x in arrays], pad(mask, False), None),
        ):
            lp = lp.clone().requires_grad_()
            tokens = fusedpo.policy_loss(
                lp, *others, objective=objective, mask=keep, cu_seqlens=offsets, reduction="none"
            ).loss
            (gradient,) = torch.autograd.grad(tokens.sum(), lp)
            results.append((tokens.detach(), gradient))
        for packed, padded in zip(*results, strict=True):
            assert_same(packed, padded[inside])
            assert not padded[~inside].any()


# --------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    "region",
    [O.PPOClip(0.1, 0.2), O.PPOClip(0.1, 0.2, dual=1.3, cap=1.1), O.BinaryTV(0.03, 0.05), O.CISPO(0.1), O.SAPO()],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_step_is_the_token_ratio_exactly(region, dtype):
    lp, olp, advantages, mask, cu_seqlens = random_tokens([5, 7, 1], dtype=dtype)
    lp.requires_grad_()
    results = []
    for ratio in (O.ForwardTrace(1), O.TokenRatio()):
        out = fusedpo.policy_loss(
            lp, olp, advantages, objective=O.Objective(ratio, region), mask=mask, cu_seqlens=cu_seqlens
        )
        results.append((out.loss, *torch.autograd.grad(out.loss, lp), *out.metrics.values()))
    assert all(itertools.starmap(torch.equal, zip(*results, strict=True)))


def test_nfpo_of_one_step_is_ppo():
    assert O.nfpo(1, 0.1, 0.3).trust_region == O.ppo(0.1, 0.3).trust_region
    assert O.nfpo(1).aggregation == O.ppo().aggregation


@pytest.mark.parametrize("n", [7, 8, 9, 64, 10**6, 2**40])
def test_a_long_window_is_the_suffix(n):
    lp, olp, _, mask, _ = random_tokens([7])
    tokens = fusedpo.policy_loss(
        lp, olp, -torch.ones(1, dtype=lp.dtype), objective=trace_only(n), mask=mask, reduction="none"
    ).loss
    x = (lp - olp).masked_fill(~mask, 0)
    suffix = x.flip(0).cumsum(0).flip(0).exp()
    torch.testing.assert_close(tokens, suffix.masked_fill(~mask, 0), rtol=1e-14, atol=0)


@pytest.mark.parametrize("differentiate", [False, True])
def test_on_policy_every_n_has_the_same_gradient(differentiate):
    lp, _, advantages, mask, cu_seqlens = random_tokens([5, 8])
    lp.requires_grad_()
    for n in (1, 2, 3, 5, 100):
        loss = fusedpo.policy_loss(
            lp,
            lp.detach(),
            advantages,
            objective=O.nfpo(n, differentiate=differentiate, aggregation="token-sum"),
            mask=mask,
            cu_seqlens=cu_seqlens,
        ).loss
        (gradient,) = torch.autograd.grad(loss, lp)
        assert torch.equal(gradient, -advantages.masked_fill(~mask, 0))


# ---------------------------------------------------------------------------- the exact policy gradient, by enumeration


@pytest.fixture
def tree():
    return Tree()


@pytest.mark.parametrize("n", [STEPS, STEPS + 1, 50])
def test_the_whole_suffix_differentiated_is_the_policy_improvement(tree, n):
    surrogate = tree.surrogate(n, differentiate=True)
    improvement = tree.expected_reward(tree.pi) - tree.expected_reward(tree.mu)
    torch.testing.assert_close(surrogate, improvement, rtol=0, atol=1e-12)
    torch.testing.assert_close(tree.gradient(surrogate), tree.gradient(improvement), rtol=0, atol=1e-12)


def test_the_whole_suffix_detached_is_the_suffix_correction(tree):
    gradient = tree.gradient(tree.surrogate(STEPS, differentiate=False))
    lp, old = tree.logprobs(tree.pi), tree.logprobs(tree.mu)
    suffix = (lp - old).detach().flip(-1).cumsum(-1).flip(-1).exp()  # rho_t S_t
    expected = tree.gradient((old.sum(-1).exp()[:, None] * tree.reward[:, None] * suffix * lp).sum())
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    exact = tree.gradient(tree.expected_reward(tree.pi))
    assert (gradient - exact).abs().max() > 1e-3  # no prefix correction: biased off policy


@pytest.mark.parametrize("n", [1, 2])
def test_bias_of_a_short_window(tree, n):
    lp, old = tree.logprobs(tree.pi), tree.logprobs(tree.mu)
    x, probability = (lp - old).detach(), old.sum(-1).exp()
    bias = 0.0
    for y, t in itertools.product(range(len(x)), range(STEPS)):
        trace, rest = x[y, t + 1 : t + n].sum().exp(), x[y, t + n :].sum().exp()
        bias += probability[y] * tree.reward[y] * (x[y, t].exp() - 1) * trace * (1 - rest)
    improvement = tree.expected_reward(tree.pi) - tree.expected_reward(tree.mu)
    torch.testing.assert_close(tree.surrogate(n, differentiate=True) - improvement, bias, rtol=0, atol=1e-12)
    assert bias.abs() > 1e-3


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_baseline_of_the_prefix_changes_nothing(tree, n):
    baseline = torch.linspace(-1, 2, len(tree.pi), dtype=torch.float64)[tree.rows]
    with_baseline = tree.surrogate(n, True, tree.reward[:, None] - baseline)
    torch.testing.assert_close(with_baseline, tree.surrogate(n, True), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        *(tree.gradient(x) for x in (with_baseline, tree.surrogate(n, True))), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("n", [1, 2, 3, 5, 20])
def test_weight_of_a_token_when_differentiated(n):
    lengths = [6, 1, 9]
    lp, olp, advantages, mask, cu_seqlens = random_tokens(lengths)
    region = O.PPOClip(0.1, 0.2)
    objective = O.Objective(O.ForwardTrace(n, differentiate=True), region, aggregation="token-sum")
    lp.requires_grad_()
    loss = fusedpo.policy_loss(lp, olp, advantages, objective=objective, mask=mask, cu_seqlens=cu_seqlens).loss
    (gradient,) = torch.autograd.grad(loss, lp)

    x = (lp - olp).detach().masked_fill(~mask, 0).tolist()
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        weights = []
        for t in range(start, end):
            a, rho = advantages[t].item(), math.exp(x[t])
            weights.append(a if mask[t] and (rho <= 1.2 if a > 0 else rho >= 0.9) else 0.0)
        for s in range(start, end):
            expected = weights[s - start] * math.exp(x[s] + window(s, n, end, x))
            for t in range(max(start, s - n + 1), s):
                expected += weights[t - start] * (math.exp(x[t]) - 1) * math.exp(window(t, n, end, x))
            assert gradient[s].item() == pytest.approx(-expected if mask[s] else 0.0, rel=1e-11, abs=1e-15)


# ---------------------------------------------------------------------------------------------------------------- leaks


def run(arrays, n, differentiate, mask, cu_seqlens):
    lp, olp, advantages = (x.clone() for x in arrays)
    lp.requires_grad_()
    tokens = fusedpo.policy_loss(
        lp,
        olp,
        advantages,
        objective=trace_only(n, differentiate),
        mask=mask,
        cu_seqlens=cu_seqlens,
        reduction="none",
    ).loss
    return tokens.detach(), torch.autograd.grad(tokens.sum(), lp)[0]


@pytest.mark.parametrize("differentiate", [False, True])
@pytest.mark.parametrize("n", [2, 4, 100])
@pytest.mark.parametrize("value", [3.0, NAN])
def test_a_token_reaches_its_windows_only(differentiate, n, value):
    *arrays, _, cu_seqlens = random_tokens([4, 8, 5])
    mask = torch.ones(17, dtype=torch.bool)
    before = run(arrays, n, differentiate, mask, cu_seqlens)
    changed = 8  # the fifth token of the second sequence
    arrays[0][changed] = value
    after = run(arrays, n, differentiate, mask, cu_seqlens)

    values_reached = {t for t in range(17) if 4 <= t <= changed < t + n}
    gradients_reached = values_reached | {t for w in values_reached for t in range(w, min(w + n, 12)) if differentiate}
    for (old, new), reached in zip(zip(before, after, strict=True), (values_reached, gradients_reached), strict=True):
        differs = {t for t in range(17) if not torch.equal(old[t], new[t])}
        assert differs == reached


@pytest.mark.parametrize("differentiate", [False, True])
def test_a_masked_token_counts_as_ratio_one(differentiate):
    *arrays, _, _ = random_tokens([9])
    mask = torch.ones(9, dtype=torch.bool)
    mask[[2, 5]] = False
    before = run(arrays, 4, differentiate, mask, None)
    for array in arrays:
        array[[2, 5]] = NAN
    after = run(arrays, 4, differentiate, mask, None)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)
        assert not new[[2, 5]].any()
    # and it takes a place: n counts positions
    x = (arrays[0] - arrays[1]).nan_to_num()
    expected = -arrays[2][1] * ((x[1] + x[3] + x[4]).exp() - differentiate * (x[3] + x[4]).exp())
    torch.testing.assert_close(after[0][1], expected, rtol=1e-14, atol=0)


def test_cumulative_sums_would_cancel():
    check_cumulative_sums_would_cancel()


# -------------------------------------------------------------------------------------------------------- clamps, clips


def test_the_log_trace_is_clamped_without_gradient():
    x = torch.tensor([0.0, 15.0, 15.0, 0.0, -15.0, -15.0, 0.0], dtype=torch.float64)
    lp = x.clone().requires_grad_()
    out = fusedpo.policy_loss(
        lp, torch.zeros_like(x), -torch.ones_like(x), objective=trace_only(3, differentiate=True), reduction="none"
    )
    rho = x.exp()
    assert out.metrics["trace_max"].item() == pytest.approx(math.exp(20))
    assert out.metrics["trace_min"].item() == pytest.approx(math.exp(-20))
    assert out.metrics["clamp_frac"].item() == pytest.approx(2 / 7)
    (gradient,) = torch.autograd.grad(out.loss[1], lp, retain_graph=True)
    window = torch.tensor([0, 1, 1, 1, 0, 0, 0])
    assert (gradient != 0).long().tolist() == window.tolist()  # log F = 15
    (gradient,) = torch.autograd.grad(out.loss[3], lp)
    assert gradient[3].item() == pytest.approx(rho[3].item() * math.exp(-20))
    assert not gradient[4:].any()  # log F = -30, clamped


def test_the_trace_multiplies_clamped_ratios():
    x = torch.tensor([0.0, 30.0, -15.0], dtype=torch.float64)
    out = fusedpo.policy_loss(x, torch.zeros_like(x), -torch.ones_like(x), objective=trace_only(3), reduction="none")
    assert out.loss[0].item() == pytest.approx(math.exp(20 - 15))


@pytest.mark.parametrize("on", ["ratio", "product"])
def test_cap_bounds_the_weight(on):
    x = torch.tensor([0.1, 0.15, 2.0, 0.0], dtype=torch.float64)
    lp = x.clone().requires_grad_()
    objective = O.Objective(O.ForwardTrace(2), O.PPOClip(0.2, 9.0, cap=3.0, on=on), aggregation="token-sum")
    out = fusedpo.policy_loss(lp, torch.zeros_like(x), torch.ones_like(x), objective=objective)
    out.loss.backward()
    weights = [math.exp(0.25), 3.0, 3.0, 1.0]
    assert (-lp.grad).tolist() == pytest.approx(weights)
    assert out.loss.item() == pytest.approx(-sum(weights))
    assert out.metrics["trace_max"].item() == pytest.approx(math.exp(2.0))


def test_the_clip_can_look_at_the_product():
    x = torch.tensor([0.1, 0.15, 0.0], dtype=torch.float64)
    lp = x.clone().requires_grad_()
    for on, expected in (
        ("ratio", [-math.exp(0.25), -math.exp(0.15), -1.0]),
        ("product", [0.0, -math.exp(0.15), -1.0]),
    ):
        objective = O.Objective(O.ForwardTrace(2), O.PPOClip(0.2, 0.2, on=on), aggregation="token-sum")
        loss = fusedpo.policy_loss(
            lp, torch.zeros_like(x), torch.ones_like(x), objective=objective, reduction="none"
        ).loss
        (gradient,) = torch.autograd.grad(loss.sum(), lp)
        assert gradient.tolist() == pytest.approx(expected)
        assert loss[0].item() == pytest.approx(-1.2 if on == "product" else -math.exp(0.25))


@pytest.mark.parametrize("n", [0, -1, 1.5, "2"])
def test_n_must_be_a_positive_integer(n):
    with pytest.raises(ValueError, match=r"ForwardTrace: n must be an integer >= 1"):
        O.nfpo(n)
