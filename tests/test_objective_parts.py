"""Windows on both sides of a token; trust regions by place, sequence and prefix: against definitions in plain loops."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import policy_loss as contract
from support.nfpo import Tree, random_tokens
from support.parts import REGIONS, TRACES
from support.policy_loss import NAN, check_against_definition, clip, kl_term, name_of, pack, random_batch
from torch._dynamo.testing import CompileCounterWithBackend

import fusedpo
from fusedpo import objectives as O

pytestmark = pytest.mark.usefixtures("on_the_reference")


# The new windows with every trust region, the new trust regions with every ratio.
RATIOS = [O.TokenRatio(), O.SequenceRatio(), O.ForwardTrace(3), O.ForwardTrace(3, True), O.OnPolicy()]
PAIRS = [*itertools.product(TRACES, contract.REGIONS + REGIONS), *itertools.product(RATIOS, REGIONS)]
COMBINATIONS = list(contract.combinations(PAIRS))
every_combination = pytest.mark.parametrize("objective", COMBINATIONS, ids=name_of)


# --------------------------------------------------------------------------------------- the definition, token by token


class Row:
    """One sequence: what its tokens hold. ``x`` is the log-ratio, 0 at masked tokens; ``x0`` inside a stop-gradient."""

    def __init__(self, batch, b, live, frozen):
        self.kept = batch["mask"][b].tolist()
        self.olp, self.a = batch["old_logprobs"][b].tolist(), batch["advantages"][b].tolist()
        self.lp, self.lp0 = live[b], frozen[b]
        self.x, self.x0 = (
            [clip(lp - o, -20, 20) if k else 0.0 for lp, o, k in zip(lps, self.olp, self.kept, strict=True)]
            for lps in (self.lp, self.lp0)
        )
        self.length = sum(self.kept)

    def place(self, t):
        return sum(self.kept[: t + 1])

    def trace(self, x, t, ratio):
        if not isinstance(ratio, O.Trace | O.ForwardTrace):
            return 1.0
        back, ahead = (len(x) if n == "all" else n for n in (ratio.back, ratio.ahead))
        return math.exp(clip(math.fsum(x[max(t - back, 0) : t] + x[t + 1 : t + 1 + ahead]), -20, 20))

    def ratio(self, x, t, ratio):
        if isinstance(ratio, O.SequenceRatio):
            return math.exp(min(x[t] - self.x0[t] + math.fsum(self.x0) / self.length, 10))
        return math.exp(x[t])

    def keeps(self, region, t):
        """Whether the mask of CPPO keeps the token: Algorithm 1 of the paper."""
        spent = weights = 0.0
        for s in range(t + 1):
            if not self.kept[s]:
                continue
            weight = 1 - (1 - region.min_weight) / max(self.length - 1, 1) * (self.place(s) - 1)
            z = weight * abs(math.exp(self.lp0[s]) - math.exp(self.olp[s]))
            threshold = min(region.threshold, region.threshold + region.budget * weights - spent)
            spent, weights = spent + z, weights + weight
        return self.a[t] * (math.exp(self.x0[t]) - 1) <= 0 or z <= threshold


def policy_term(objective, row, t):
    ratio, region, a = objective.ratio, objective.trust_region, row.a[t]
    rho, rho0 = (row.ratio(x, t, ratio) for x in (row.x, row.x0))
    trace, trace0 = (row.trace(x, t, ratio) for x in (row.x, row.x0))
    if isinstance(region, O.CPPO):
        if not row.keeps(region, t):
            return 0.0
        return -a * (rho - 1) * trace if getattr(ratio, "differentiate", False) else -a * rho * trace0
    if isinstance(region, O.LogClip):
        w, scale = math.log(rho * trace0), row.place(t) ** region.power
        loss = max(-a * math.exp(w), -a * math.exp(clip(w, -region.low * scale, region.high * scale)))
        return min(loss, -a * math.exp(region.dual * scale)) if a < 0 and region.dual else loss
    if isinstance(region, O.VESPO):
        k, rate = (region.k_pos, region.lambda_pos) if a >= 0 else (region.k_neg, region.lambda_neg)
        w = clip(rho0 * trace0, 1e-8, math.exp(20))
        return -a * math.exp(rate) * w**k * math.exp(-rate * w) * row.lp[t]
    if isinstance(region, O.GMPO):
        clipped, clipped0 = (
            [min(y, region.high) if a > 0 else max(y, -region.low) for y, a in zip(x, row.a, strict=True)]
            for x in (row.x, row.x0)
        )
        mean = math.fsum(c for c, k in zip(clipped0, row.kept, strict=True) if k) / row.length
        return -a * math.exp(clipped[t] - clipped0[t] + mean)
    if isinstance(region, O.DRO):
        return -(a * row.lp[t] - region.beta / 2 * (row.lp[t] - row.olp[t]) ** 2)
    if isinstance(ratio, O.Trace):  # the formulas of regions that any trace goes with
        objective = dataclasses.replace(objective, ratio=O.ForwardTrace(1, ratio.differentiate))
    return contract.policy_term(objective, row.lp[t], row.lp0[t], row.olp[t], a, rho, trace, rho0, trace0)


def define(objective, batch, live, frozen):
    losses = []
    for b, kept in enumerate(batch["mask"].tolist()):
        row, ref = Row(batch, b, live, frozen), batch["ref_logprobs"][b].tolist()
        losses.append([0.0] * len(kept))
        for t in (t for t, k in enumerate(kept) if k):
            loss = batch["is_weights"][b, t].item() * policy_term(objective, row, t)
            if objective.kl is not None:
                loss += objective.kl.coef * kl_term(objective.kl, row.lp[t] - ref[t], row.lp0[t] - ref[t], row.x[t])
            losses[-1][t] = loss - objective.entropy_coef * batch["entropy"][b, t].item()
    return losses


@every_combination
def test_value_and_gradient_are_those_of_the_definition(objective):
    check_against_definition(objective, random_batch(3, 6), define)


@pytest.mark.parametrize(
    ("preset", "aggregation"),
    [
        *((preset, "token-mean") for preset in (O.ctpo(), O.vespo(), O.dro(0.1))),
        *((preset, "seq-mean-token-mean") for preset in (O.gmpo(), O.two_sided_grpo(delta=1.3))),
        (O.luspo(), "seq-mean-token-sum"),
        (O.cppo(), "seq-mean-token-sum-norm"),
        (O.cppo(length_norm=30.0), "seq-mean-token-sum-norm"),
    ],
)
def test_presets(preset, aggregation):
    assert preset.aggregation == aggregation
    check_against_definition(preset, random_batch(seed=4), define)


# ------------------------------------------------------------------------------------------- the contract of every part


@every_combination
def test_masked_garbage_reaches_nothing(objective):
    contract.check_masked_garbage_reaches_nothing(objective)


@every_combination
def test_extreme_log_ratios_stay_finite(objective):
    if isinstance(objective.trust_region, O.DRO):
        return  # the penalty of an infinite log-ratio is infinite
    for dtype in (torch.float32, torch.float64):
        contract.check_extreme_log_ratios_stay_finite(objective, dtype)


@pytest.mark.parametrize("objective", COMBINATIONS + contract.COMBINATIONS, ids=name_of)
def test_nan_at_a_kept_token_is_not_hidden(objective):
    bare = O.Objective(objective.ratio, objective.trust_region)
    batch = random_batch(2, 6, holes=False)
    batch["logprobs"][0, 3] = NAN
    for sign in (1, -1):
        batch["advantages"] = batch["advantages"].abs() * sign
        tokens = fusedpo.policy_loss(**batch, objective=bare, reduction="none").loss
        assert tokens[0, 3].isnan()
        assert tokens[1].isfinite().all()
        assert fusedpo.policy_loss(**batch, objective=bare).loss.isnan()


def test_the_binary_divergence_from_an_impossible_token():
    # p_old = 0: the divergence is -log(1 - p)
    lp, old = torch.tensor([0.04, 0.06]).log(), torch.full((2,), -math.inf)
    tokens = fusedpo.policy_loss(
        lp, old, torch.ones(2), objective=O.Objective(O.TokenRatio(), O.BinaryKL(0.05, 0.05)), reduction="none"
    ).loss
    assert (tokens != 0).tolist() == [True, False]


# Without tokens a part fails by itself; all tokens masked, no tokens, no tokens packed, empty sequences.
@pytest.mark.parametrize("objective", contract.each_part_once(COMBINATIONS), ids=name_of)
@pytest.mark.parametrize(
    ("shape", "cu_seqlens"), [((2, 3), None), ((0, 3), None), ((0,), [0, 0]), ((4,), [0, 0, 3, 3, 4])]
)
def test_nothing_to_learn_from_is_a_connected_zero(objective, shape, cu_seqlens):
    contract.check_nothing_to_learn_from_is_a_connected_zero(objective, shape, cu_seqlens)


@every_combination
def test_clip_fractions_count_the_tokens_whose_gradient_is_cut(objective):
    if isinstance(objective.trust_region, O.CISPO | O.DRO) or getattr(objective.ratio, "differentiate", False):
        return  # CISPO counts weights; DRO cuts nothing, and is stationary where the policy has not moved
    contract.check_clip_fractions_count_the_tokens_whose_gradient_is_cut(objective)


@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4), index=st.integers(0, len(COMBINATIONS) - 1))
def test_packed_is_padded(lengths, index):
    objective = dataclasses.replace(COMBINATIONS[index], aggregation="seq-mean-token-sum")
    padded = {
        name: x.float() if x.is_floating_point() else x
        for name, x in random_batch(len(lengths), 8, holes=False).items()
    }
    inside = torch.arange(8) < torch.tensor(lengths)[:, None]
    padded["mask"] &= inside
    padded["mask"][:, 2] = False
    results = []
    for batch in (padded, pack(padded, lengths)):
        lp = batch["logprobs"].clone().requires_grad_()
        out = fusedpo.policy_loss(**batch | {"logprobs": lp}, objective=objective)
        results.append((out.loss, *torch.autograd.grad(out.loss, lp)))
    (loss, gradient), (packed_loss, packed_gradient) = results
    contract.assert_same(packed_loss, loss)
    contract.assert_same(packed_gradient, gradient[inside])


def test_one_token_on_policy():
    for objective in COMBINATIONS:
        lp = torch.tensor([-1.0], requires_grad=True)
        bare = O.Objective(objective.ratio, objective.trust_region)
        fusedpo.policy_loss(lp, None, torch.tensor([1.0]), objective=bare).loss.backward()
        assert lp.grad.item() == -1.0


# -------------------------------------------------------------------------------------------------------------- windows


def run(ratio, region, arrays, mask, cu_seqlens=None):
    lp, olp, advantages = arrays
    lp = lp.clone().requires_grad_()
    out = fusedpo.policy_loss(
        lp, olp, advantages, objective=O.Objective(ratio, region), mask=mask, cu_seqlens=cu_seqlens
    )
    return [out.loss, *torch.autograd.grad(out.loss, lp), *out.metrics.values()]


def traces(back, ahead, x, mask=None, cu_seqlens=None):
    """F of each token, for log-ratios ``x``."""
    objective = O.Objective(O.Trace(back, ahead), O.NoTrustRegion())
    weights = fusedpo.policy_loss(
        x,
        torch.zeros_like(x),
        -torch.ones_like(x),
        objective=objective,
        mask=mask,
        cu_seqlens=cu_seqlens,
        reduction="none",
    ).loss  # rho F
    return weights / x.exp()


@pytest.mark.parametrize("region", contract.REGIONS + REGIONS[:-2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_window_is_the_token_ratio_exactly(region, dtype):
    *arrays, mask, cu_seqlens = random_tokens([5, 7, 1], dtype=dtype)
    if getattr(region, "on", None) == "product":
        return  # it needs a trace
    results = [run(ratio, region, arrays, mask, cu_seqlens) for ratio in (O.Trace(0, 0), O.TokenRatio())]
    assert all(itertools.starmap(torch.equal, zip(*results, strict=True)))


@pytest.mark.parametrize("n", [1, 2, 3, 6, 8, 100])
@pytest.mark.parametrize("differentiate", [False, True])
def test_a_window_ahead_is_the_forward_trace_exactly(n, differentiate):
    *arrays, mask, cu_seqlens = random_tokens([5, 7, 1], dtype=torch.float32)
    results = [
        run(ratio, O.PPOClip(0.1, 0.2), arrays, mask, cu_seqlens)
        for ratio in (O.Trace(0, n - 1, differentiate), O.ForwardTrace(n, differentiate))
    ]
    assert all(itertools.starmap(torch.equal, zip(*results, strict=True)))


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4), back=st.integers(0, 10), ahead=st.integers(0, 10))
def test_windows_of_packed_sequences(lengths, back, ahead):
    lp, olp, _, mask, cu_seqlens = random_tokens(lengths)
    x = lp - olp
    result = traces(back, ahead, x, mask, cu_seqlens).tolist()
    y = x.masked_fill(~mask, 0).tolist()
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        for t in (t for t in range(start, end) if mask[t]):
            window = y[max(t - back, start) : t] + y[t + 1 : min(t + 1 + ahead, end)]
            assert result[t] == pytest.approx(math.exp(math.fsum(window)), rel=1e-13)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9])
def test_all_is_as_far_as_the_sequence_goes(length):
    x = 0.3 * torch.randn(length + 3, dtype=torch.float64)
    offsets = torch.tensor([0, 3, length + 3])
    for back, ahead in (("all", 0), (0, "all"), ("all", "all")):
        numbers = [2**40 if n == "all" else n for n in (back, ahead)]
        expected = traces(*numbers, x, cu_seqlens=offsets)
        torch.testing.assert_close(traces(back, ahead, x, cu_seqlens=offsets), expected, rtol=1e-14, atol=0)
    own = x[3:]
    prefix = traces("all", 0, x, cu_seqlens=offsets)[3:] * own.exp()
    torch.testing.assert_close(prefix, own.cumsum(0).exp(), rtol=1e-13, atol=0)
    product = traces("all", "all", x, cu_seqlens=offsets)[3:] * own.exp()
    torch.testing.assert_close(product, own.sum().exp().expand(length), rtol=1e-13, atol=0)


def test_a_window_behind_mirrors_one_ahead_exactly():
    x = torch.randn(13)
    for n in (1, 2, 5, 12, 50, "all"):
        assert torch.equal(traces(n, 0, x.flip(0)).flip(0), traces(0, n, x))


@pytest.mark.parametrize("differentiate", [False, True])
@pytest.mark.parametrize("value", [3.0, NAN])
def test_a_token_reaches_its_windows_only(differentiate, value):
    *arrays, _, cu_seqlens = random_tokens([4, 8, 5])
    objective = O.Objective(O.Trace(1, 2, differentiate), O.NoTrustRegion())

    def tokens():
        lp = arrays[0].clone().requires_grad_()
        loss = fusedpo.policy_loss(lp, *arrays[1:], objective=objective, cu_seqlens=cu_seqlens, reduction="none").loss
        return loss.detach(), torch.autograd.grad(loss.sum(), lp)[0]

    before = tokens()
    arrays[0][10] = value  # the seventh token of the second sequence, whose tokens are 4 ... 11
    after = tokens()
    values_reached = {8, 9, 10, 11}
    gradients_reached = {7, *values_reached} if differentiate else values_reached
    for old, new, reached in zip(before, after, (values_reached, gradients_reached), strict=True):
        assert {t for t in range(17) if not torch.equal(old[t], new[t])} == reached


def test_the_log_trace_of_both_sides_is_clamped_together():
    x = torch.tensor([15.0, 0.0, 15.0, -12.0, -15.0], dtype=torch.float64)
    expected = torch.tensor([-12.0, 3.0, -12.0, 15.0, 18.0], dtype=torch.float64)
    torch.testing.assert_close(traces("all", "all", x).log(), expected, rtol=0, atol=1e-13)
    assert traces("all", "all", x[:3])[1].log().item() == pytest.approx(20.0)
    assert traces("all", "all", -x[:3])[1].log().item() == pytest.approx(-20.0)


@pytest.mark.parametrize("back", ["all", 2, 3, 50])
def test_the_whole_prefix_differentiated_is_the_policy_improvement(back):
    tree = Tree()
    old = tree.logprobs(tree.mu)
    surrogate = -fusedpo.policy_loss(
        tree.logprobs(tree.pi),
        old,
        tree.reward,
        objective=O.Objective(O.Trace(back, 0, differentiate=True), O.NoTrustRegion(), aggregation="token-sum"),
        is_weights=old.sum(-1).exp(),
    ).loss
    improvement = tree.expected_reward(tree.pi) - tree.expected_reward(tree.mu)
    torch.testing.assert_close(surrogate, improvement, rtol=0, atol=1e-12)
    torch.testing.assert_close(tree.gradient(surrogate), tree.gradient(improvement), rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------- formulas as in their sources


def per_sequence(seed=0, rows=4, width=7):
    """Log-probs, old log-probs, advantages [B], mask; every sequence has a kept token, as the sources require."""
    batch = random_batch(rows, width, seed)
    mask = batch["mask"]
    mask[:, 0] = True
    return batch["logprobs"].requires_grad_(), batch["old_logprobs"], batch["advantages"][:, 0], mask


def assert_same_loss_and_gradient(loss, expected, lp):
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    gradients = (torch.autograd.grad(x, lp, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)


def ours(objective, lp, olp, advantages, mask):
    return fusedpo.policy_loss(lp, olp, advantages, objective=objective, mask=mask).loss


@pytest.mark.parametrize("seed", range(3))
def test_two_sided_clip_as_in_trl(seed):
    lp, olp, a, mask = per_sequence(seed)
    ratio = (lp - olp).exp()
    for delta in (1.21, 1.5, 4.0):
        clipped = ratio.clamp(0.8, 1.2)
        loss = -torch.min(ratio.clamp(max=delta) * a[:, None], clipped * a[:, None])
        expected = ((loss * mask).sum(1) / mask.sum(1)).mean()
        assert_same_loss_and_gradient(ours(O.two_sided_grpo(delta=delta), lp, olp, a, mask), expected, lp)


@pytest.mark.parametrize("seed", range(3))
def test_luspo_as_in_trl(seed):
    lp, olp, a, mask = per_sequence(seed)
    s = (((lp - olp) * mask).sum(1) / mask.sum(1)).exp()[:, None]
    loss = -torch.min(s * a[:, None], s.clamp(0.9, 1.1) * a[:, None])
    assert_same_loss_and_gradient(ours(O.luspo(0.1, 0.1), lp, olp, a, mask), (loss * mask).sum(1).mean(), lp)


@pytest.mark.parametrize("seed", range(3))
def test_vespo_as_in_trl(seed):
    lp, olp, a, mask = per_sequence(seed)
    log_w = ((lp - olp).detach() * mask).sum(1).clamp(math.log(1e-8), 20)
    k, rate = torch.where(a >= 0, 2.0, 3.0), torch.where(a >= 0, 3.0, 2.0)
    phi = (rate + k * log_w - rate * log_w.exp()).exp()[:, None]
    expected = (-phi * a[:, None] * lp * mask).sum() / mask.sum()
    assert_same_loss_and_gradient(ours(O.vespo(), lp, olp, a, mask), expected, lp)


@pytest.mark.parametrize("seed", range(3))
def test_gmpo_as_in_verl(seed):
    lp, olp, a, mask = per_sequence(seed)
    x, sign = lp - olp, a.sign()[:, None]
    x = sign * torch.min(sign * x, sign * x.clamp(-0.1, 0.15))
    expected = (-a * ((x * mask).sum(1) / mask.sum(1)).exp()).mean()
    assert_same_loss_and_gradient(ours(O.gmpo(0.1, 0.15), lp, olp, a, mask), expected, lp)


@pytest.mark.parametrize("seed", range(3))
def test_ctpo_as_its_authors_code(seed):
    lp, olp, a, mask = per_sequence(seed)
    a, x = a[:, None], (lp - olp).detach()
    log_ratio = ((x * mask).cumsum(1) + lp - lp.detach()).clamp(max=10)
    scale = mask.cumsum(1).clamp(min=1).double() ** 0.5
    clipped = torch.minimum(torch.maximum(log_ratio, -0.025 * scale), 0.05 * scale).exp()
    loss = torch.maximum(-a * log_ratio.exp(), -a * clipped)
    loss = torch.where(a < 0, torch.minimum(loss, -a * (0.05 * scale).exp()), loss)
    assert_same_loss_and_gradient(ours(O.ctpo(), lp, olp, a, mask), (loss * mask).sum() / mask.sum(), lp)


@pytest.mark.parametrize("seed", range(3))
def test_dro_as_in_verl_and_as_a_penalty_on_the_old_policy(seed):
    lp, olp, a, mask = per_sequence(seed)
    loss = -(lp * a[:, None] - 0.5 * 0.7 * (lp - olp).square())
    expected = (loss * mask).sum() / mask.sum()
    assert_same_loss_and_gradient(ours(O.dro(0.7), lp, olp, a, mask), expected, lp)
    penalised = fusedpo.policy_loss(
        lp, olp, a, objective=O.reinforce(kl=O.KL("k2", 0.7)), mask=mask, ref_logprobs=olp
    ).loss
    assert_same_loss_and_gradient(penalised, expected, lp)


def test_cppo_tightens_with_the_place_and_with_what_the_prefix_spent():
    # all move by the same total variation of 0.1, away from the old policy
    old = torch.full((8,), 0.5, dtype=torch.float64)
    lp, a = (old + 0.1).log(), torch.ones(8, dtype=torch.float64)

    def dropped(**options):
        tokens = fusedpo.policy_loss(lp, old.log(), a, objective=O.cppo(**options), reduction="none").loss
        return (tokens == 0).nonzero().flatten().tolist()

    assert dropped(threshold=0.2, budget=1.0) == []
    # the weights fall from 1 to 0.8: 0.1 w_t <= 0.09 from the middle on
    assert dropped(threshold=0.09, budget=1.0) == [0, 1, 2, 3]
    # no budget: the sum may be 0.25, the first two tokens spend it
    assert dropped(threshold=0.25, budget=0.0) == [2, 3, 4, 5, 6, 7]
    # a budget of a little less than is spent lasts longer
    assert dropped(threshold=0.25, budget=0.06) == [5, 6, 7]
    # what moves back is kept, whatever was spent
    tokens = fusedpo.policy_loss(lp, old.log(), -a, objective=O.cppo(0.0, 0.0), reduction="none").loss
    assert not (tokens == 0).any()


def test_a_masked_token_takes_no_place():
    batch = {name: x[:1] for name, x in random_batch(1, 8, holes=False).items()}
    batch["mask"] = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1]]) != 0
    kept = batch["mask"][0]
    for region in (O.LogClip(0.02, 0.02, 0.04, 0.5), O.CPPO(0.04, 0.01)):
        objective = O.Objective(O.Trace("all", 0), region)
        tokens = fusedpo.policy_loss(**batch, objective=objective, reduction="none").loss
        alone = fusedpo.policy_loss(
            **{name: x[:, kept] for name, x in batch.items()}, objective=objective, reduction="none"
        ).loss
        torch.testing.assert_close(tokens[:, kept], alone, rtol=1e-14, atol=0)


def test_vespo_weighs_the_unmoved_sequence_by_one_and_the_far_one_by_nothing():
    lp = torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0]])
    x = torch.tensor([[0.5, -0.5], [3.0, 3.0], [-9.0, -9.0]])
    tokens = fusedpo.policy_loss(lp, lp - x, torch.ones(3), objective=O.vespo(), reduction="none").loss
    torch.testing.assert_close(tokens[0], torch.ones(2))
    assert tokens[1].abs().max() == 0
    assert 0 < tokens[2].abs().max() < 1e-12


# --------------------------------------------------------------------------------------------------------------- errors

DETACHED, DIFFERENTIATED = O.Trace(1, 1), O.Trace(1, 1, differentiate=True)


@pytest.mark.parametrize(
    ("ratio", "region", "named"),
    [
        *((O.OnPolicy(), region, ("OnPolicy", type(region).__name__)) for region in REGIONS[:-1]),
        *((ratio, O.DRO(1.0), ("DRO", type(ratio).__name__)) for ratio in (O.TokenRatio(), DETACHED)),
        *((ratio, O.GMPO(), ("GMPO", type(ratio).__name__)) for ratio in (O.TokenRatio(), DETACHED)),
        (O.SequenceRatio(), O.CPPO(), ("SequenceRatio", "CPPO")),
        *((DIFFERENTIATED, region, ("Trace", type(region).__name__)) for region in (O.LogClip(0.1, 0.1), O.VESPO())),
        (O.ForwardTrace(2, True), O.VESPO(), ("ForwardTrace", "VESPO")),
        (DIFFERENTIATED, O.PPOClip(cap=2.0), ("Trace", "PPOClip")),
        (DIFFERENTIATED, O.PPOClip(on="product"), ("Trace", "PPOClip")),
    ],
    ids=str,
)
def test_parts_that_disagree_are_both_named(ratio, region, named):
    with pytest.raises(ValueError, match=r"^Objective: ") as error:
        O.Objective(ratio, region)
    assert all(name in str(error.value) for name in named)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: O.Trace(-1), "Trace: back and ahead"),
        (lambda: O.Trace(0, 1.5), "Trace: back and ahead"),
        (lambda: O.Trace("every"), "Trace: back and ahead"),
        (lambda: O.LogClip(-0.1, 0.1), "LogClip: low and high"),
        (lambda: O.LogClip(0.1, NAN), "LogClip: low and high"),
        (lambda: O.LogClip(0.1, 0.1, dual=0.0), "LogClip: dual"),
        (lambda: O.CPPO(-0.1), "CPPO: threshold and budget"),
        (lambda: O.CPPO(budget=NAN), "CPPO: threshold and budget"),
        (lambda: O.CPPO(min_weight=0.0), "CPPO: min_weight"),
        (lambda: O.CPPO(min_weight=1.1), "CPPO: min_weight"),
        (lambda: O.VESPO(k_neg=-1.0), "VESPO: k_pos and k_neg"),
        (lambda: O.VESPO(lambda_pos=0.0), "VESPO: lambda_pos and lambda_neg"),
        (lambda: O.GMPO(-0.1), "GMPO: low and high"),
        (lambda: O.DRO(0.0), "DRO: beta"),
        (lambda: O.two_sided_grpo(delta=0.0), "two_sided_grpo: delta"),
        (lambda: O.Objective(aggregation="mean"), "Objective: aggregation"),
        (lambda: O.Objective(length_norm=3.0), "Objective: length_norm"),
        (lambda: O.dr_grpo(length_norm=0.0), "Objective: length_norm"),
        (lambda: O.KL("k4", 1.0), "KL: kind"),
    ],
)
def test_values_outside_the_domain(build, message):
    with pytest.raises(ValueError, match=rf"^{message}\b"):
        build()


# -------------------------------------------------------------------------------------------------------------- tracing


@pytest.mark.slow
@pytest.mark.parametrize(
    # a sum over the prefix that autograd sees, and a budget that it does not
    ("objective", "backend"),
    [(O.ctpo(), "aot_eager"), (O.cppo(length_norm=9.0), "eager")],
    ids=["ctpo", "cppo"],
)
def test_compiles_once_for_all_sizes(objective, backend):
    def loss(batch):
        return fusedpo.policy_loss(**batch, objective=objective).loss

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows, width in ((2, 5), (5, 19)):
        batch = pack(random_batch(rows, width), [width - 2] * rows)
        lp = batch["logprobs"].requires_grad_()
        result, expected = compiled(batch), loss(batch)
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(*(torch.autograd.grad(x, lp)[0] for x in (result, expected)), rtol=1e-12, atol=1e-15)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] > 0  # other sizes compile nothing anew


@pytest.mark.slow
def test_an_objective_can_be_built_where_dynamo_traces():
    def loss(lp, olp, a, low, n):
        O.Objective(O.Trace(n, "all"), O.LogClip(low, 0.2, dual=0.3), aggregation="seq-mean-token-sum")
        O.cppo(low, length_norm=7.0), O.dppo_kl(low), O.gmpo(low), O.dro(low), O.vespo(k_pos=low), O.sapo(low)
        objective = O.nfpo(n, low, 0.28, kl=O.KL("k3", 0.1, clamp=10.0))
        return fusedpo.policy_loss(lp, olp, a, objective=objective, ref_logprobs=olp).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="eager")
    batch = random_batch(2, 5)
    arrays = [batch[name] for name in ("logprobs", "old_logprobs", "advantages")]
    for low, n in ((0.1, 3), (0.15, 4)):
        torch.testing.assert_close(compiled(*arrays, low, n), loss(*arrays, low, n), rtol=1e-13, atol=1e-15)
