"""The policy loss against its definition, token by token in plain Python, and its contract at the edges."""

import math

import pytest
import torch
from support.policy_loss import (
    AGGREGATIONS,
    COMBINATIONS,
    DELTAS,
    EMPTY,
    KLS,
    NAN,
    check_against_definition,
    check_clip_fractions_count_the_tokens_whose_gradient_is_cut,
    check_extreme_distances_to_the_reference,
    check_extreme_log_ratios_stay_finite,
    check_masked_garbage_reaches_nothing,
    check_nan_at_a_kept_token_is_not_hidden,
    check_nothing_to_learn_from_is_a_connected_zero,
    clip,
    each_part_once,
    every_combination,
    kl_term,
    name_of,
    pack,
    policy_term,
    random_batch,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck

import fusedpo
from fusedpo import objectives as O

pytestmark = pytest.mark.usefixtures("on_the_reference")


# --------------------------------------------------------------------------------------------------------- combinations


# --------------------------------------------------------------------------------------- the definition, token by token


def define(objective, batch, live, frozen):
    """The loss of each token, in plain Python. ``frozen`` are the log-probs inside a stop-gradient."""
    losses = []
    for b, kept in enumerate(batch["mask"].tolist()):
        olp, advantages, ref, entropy, weights = (
            batch[name][b].tolist() for name in ("old_logprobs", "advantages", "ref_logprobs", "entropy", "is_weights")
        )
        x, x0 = (
            [clip(lp - o, -20, 20) if k else 0.0 for lp, o, k in zip(lps[b], olp, kept, strict=True)]
            for lps in (live, frozen)
        )
        row = []
        for t, keep in enumerate(kept):
            if not keep:
                row.append(0.0)
                continue
            token = (live[b][t], frozen[b][t], olp[t], advantages[t])
            loss = weights[t] * policy_term(objective, *token, *weights_of_token(objective.ratio, x, x0, kept, t))
            if objective.kl is not None:
                kl = kl_term(objective.kl, live[b][t] - ref[t], frozen[b][t] - ref[t], x[t])
                loss += objective.kl.coef * kl
            row.append(loss - objective.entropy_coef * entropy[t])
        losses.append(row)
    return losses


def weights_of_token(ratio, x, x0, kept, t):
    """rho and F, and both inside a stop-gradient."""
    if isinstance(ratio, O.SequenceRatio):
        mean = math.fsum(x0) / sum(kept)
        return math.exp(min(x[t] - x0[t] + mean, 10)), 1.0, math.exp(min(mean, 10)), 1.0
    if isinstance(ratio, O.ForwardTrace):
        trace, trace0 = (math.exp(clip(math.fsum(y[t + 1 : t + ratio.n]), -20, 20)) for y in (x, x0))
        return math.exp(x[t]), trace, math.exp(x0[t]), trace0
    return math.exp(x[t]), 1.0, math.exp(x0[t]), 1.0


@every_combination
def test_value_and_gradient_are_those_of_the_definition(objective):
    check_against_definition(objective, random_batch(), define)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_kl_entropy_and_aggregation(kl, aggregation, entropy_coef):
    check_against_definition(
        O.Objective(kl=kl, entropy_coef=entropy_coef, aggregation=aggregation), random_batch(seed=1), define
    )


def test_length_norm():
    batch = random_batch()
    check_against_definition(O.dr_grpo(length_norm=40.0), batch, define)
    free = fusedpo.policy_loss(**batch, objective=O.dr_grpo()).loss
    fixed = fusedpo.policy_loss(**batch, objective=O.dr_grpo(length_norm=5.0)).loss
    assert torch.equal(free, fixed)  # the padded width is 5


SMOOTH = [
    objective
    for objective in COMBINATIONS
    if isinstance(objective.trust_region, O.NoTrustRegion | O.SAPO)
    and (isinstance(objective.ratio, O.TokenRatio | O.OnPolicy) or getattr(objective.ratio, "differentiate", False))
]


@pytest.mark.parametrize("objective", SMOOTH, ids=name_of)
def test_gradcheck_where_nothing_is_detached(objective):
    batch = random_batch(2, 4)
    logprobs, entropy = batch.pop("logprobs"), batch.pop("entropy")
    objective = O.Objective(objective.ratio, objective.trust_region, O.KL("k3", 0.3), 0.1)

    def loss(logprobs, entropy):
        return fusedpo.policy_loss(logprobs, **batch, entropy=entropy, objective=objective).loss

    assert gradcheck(loss, (logprobs.requires_grad_(), entropy.requires_grad_()))


def test_ppo_is_the_minimum_of_two_surrogates():
    batch = random_batch(holes=False)
    lp, olp, a = (batch[name] for name in ("logprobs", "old_logprobs", "advantages"))
    lp = lp.requires_grad_()
    loss = fusedpo.policy_loss(lp, olp, a, objective=O.ppo(0.1, 0.2)).loss
    ratio = (lp - olp).exp()
    expected = -torch.minimum(ratio * a, ratio.clamp(0.9, 1.2) * a).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(*(torch.autograd.grad(x, lp)[0] for x in (loss, expected)), rtol=1e-13, atol=1e-14)


def test_a_tie_takes_the_gradient_of_the_unclipped_branch():
    lp = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    fusedpo.policy_loss(
        lp,
        None,
        torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64),
        objective=O.ppo(0.0, 0.0, aggregation="token-sum"),
    ).loss.backward()
    assert lp.grad.tolist() == [-1.0, 1.0, 0.0]


def test_k3_plus_has_the_value_of_k3_and_the_gradient_of_k2():
    d = torch.linspace(-2, 2, 9, dtype=torch.float64)
    zero = torch.zeros_like(d)

    def kl(kind, clamp=None):
        lp = d.clone().requires_grad_()
        objective = O.Objective(kl=O.KL(kind, 0.5, clamp), aggregation="token-sum")
        out = fusedpo.policy_loss(lp, None, zero, objective=objective, ref_logprobs=zero)
        out.loss.backward()
        return out.loss.detach(), lp.grad, out.metrics["kl"]

    value, gradient, metric = kl("k3+")
    assert torch.equal(value, kl("k3")[0])
    assert torch.equal(gradient, kl("k2")[1])
    torch.testing.assert_close(metric, (torch.exp(-d) - 1 + d).mean())
    _, gradient, _ = kl("k3+", clamp=0.5)
    outside = torch.exp(-d) - 1 + d > 0.5
    assert outside.any()
    assert torch.equal(gradient, (0.5 * d).masked_fill(outside, 0))


# --------------------------------------------------------------------------------------------------- masked and extreme


@every_combination
def test_masked_garbage_reaches_nothing(objective):
    check_masked_garbage_reaches_nothing(objective)


def test_garbage_advantage_of_a_masked_sequence():
    batch = random_batch(3, 4)  # the last sequence is masked
    advantages = torch.tensor([1.0, -1.0, NAN], dtype=torch.float64)
    clean = fusedpo.policy_loss(**batch | {"advantages": advantages.nan_to_num()}, objective=O.grpo()).loss
    assert torch.equal(fusedpo.policy_loss(**batch | {"advantages": advantages}, objective=O.grpo()).loss, clean)


@every_combination
def test_extreme_log_ratios_stay_finite(objective):
    for dtype in (torch.float32, torch.float64):
        check_extreme_log_ratios_stay_finite(objective, dtype)


def test_a_clamped_log_ratio_has_no_gradient():
    deltas = torch.tensor(DELTAS, dtype=torch.float64)
    lp = torch.full_like(deltas, -1.0).requires_grad_()
    objective = O.Objective(O.TokenRatio(), O.NoTrustRegion(), aggregation="token-sum")
    out = fusedpo.policy_loss(lp, lp.detach() - deltas, torch.ones_like(deltas), objective=objective)
    out.loss.backward()
    expected = [0.0 if abs(d) > 20 else -math.exp(d) for d in DELTAS]
    torch.testing.assert_close(lp.grad, torch.tensor(expected, dtype=torch.float64))
    assert out.metrics["clamp_frac"].item() == pytest.approx(8 / 11)
    assert out.metrics["ratio_max"].item() == pytest.approx(math.exp(20))
    assert out.metrics["ratio_min"].item() == pytest.approx(math.exp(-20))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k3+"])
def test_extreme_distances_to_the_reference(kind):
    check_extreme_distances_to_the_reference(kind)


@every_combination
def test_nan_at_a_kept_token_is_not_hidden(objective):
    check_nan_at_a_kept_token_is_not_hidden(objective)


def test_nan_leaves_the_gradient_of_other_tokens_alone():
    batch = random_batch(2, 6, holes=False)
    lp = batch["logprobs"].clone()
    lp[0, 3] = NAN
    gradients = []
    for leaf in (batch["logprobs"].requires_grad_(), lp.requires_grad_()):
        loss = fusedpo.policy_loss(**batch | {"logprobs": leaf}, objective=O.ppo()).loss
        gradients += torch.autograd.grad(loss, leaf)
    clean, spoilt = gradients
    others = torch.ones_like(lp, dtype=torch.bool)
    others[0, 3] = False
    assert torch.equal(spoilt[others], clean[others])


# ---------------------------------------------------------------------------------------------------------------- empty


# Without tokens a part fails by itself; all tokens masked, without tokens in one way or another, empty sequences.
@pytest.mark.parametrize("objective", each_part_once(COMBINATIONS), ids=name_of)
@pytest.mark.parametrize(
    ("shape", "cu_seqlens"),
    [((2, 3), None), *EMPTY, ((4,), [0, 0, 3, 3, 4])],
)
def test_nothing_to_learn_from_is_a_connected_zero(objective, shape, cu_seqlens):
    check_nothing_to_learn_from_is_a_connected_zero(objective, shape, cu_seqlens)


@pytest.mark.parametrize("denominator", [0, 0.0, torch.tensor(0), torch.tensor(0.0)])
def test_a_denominator_of_zero_counts_as_one(denominator):
    batch = random_batch()
    loss = fusedpo.policy_loss(**batch, objective=O.ppo(), denominator=denominator).loss
    assert torch.equal(loss, fusedpo.policy_loss(**batch, objective=O.ppo(), denominator=1).loss)


def test_a_single_token():
    for objective in COMBINATIONS:
        lp = torch.tensor([-1.0], requires_grad=True)
        out = fusedpo.policy_loss(
            lp, None, torch.tensor([1.0]), objective=objective, ref_logprobs=lp.detach(), entropy=torch.zeros(1)
        )
        out.loss.backward()
        assert lp.grad.item() == pytest.approx(-1.0 + (0.3 if objective.kl and objective.kl.kind == "k1" else 0.0))


# -------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_by_their_definitions():
    batch = random_batch(4, 8, seed=2)
    objective = O.nfpo(3, 0.1, 0.2, kl=O.KL("k3", 0.1))
    metrics = fusedpo.policy_loss(**batch, objective=objective).metrics
    kept = [tuple(index) for index in batch["mask"].nonzero().tolist()]
    x = ((batch["logprobs"] - batch["old_logprobs"]) * batch["mask"]).tolist()
    rho = [math.exp(x[b][t]) for b, t in kept]
    trace = [math.exp(sum(x[b][t + 1 : t + 3])) for b, t in kept]
    positive = [batch["advantages"][b, t].item() > 0 for b, t in kept]
    d = [(batch["logprobs"] - batch["ref_logprobs"])[b, t].item() for b, t in kept]
    weights = [r * f for r, f in zip(rho, trace, strict=True)]
    n = len(kept)
    low = sum(not a and r < 0.9 for a, r in zip(positive, rho, strict=True)) / n
    high = sum(a and r > 1.2 for a, r in zip(positive, rho, strict=True)) / n
    assert low > 0
    assert high > 0
    expected = {
        "tokens": n,
        "clip_frac": low + high,
        "clip_frac_low": low,
        "clip_frac_high": high,
        "ratio_mean": sum(rho) / n,
        "ratio_min": min(rho),
        "ratio_max": max(rho),
        "trace_mean": sum(trace) / n,
        "trace_min": min(trace),
        "trace_max": max(trace),
        "approx_kl": sum(-math.log(r) for r in rho) / n,
        "approx_kl_k3": sum(r - 1 - math.log(r) for r in rho) / n,
        "kl": sum(math.exp(-y) - 1 + y for y in d) / n,
        "entropy": sum(batch["entropy"][b, t].item() for b, t in kept) / n,
        "ess": sum(weights) ** 2 / (n * sum(w * w for w in weights)),
        "clamp_frac": 0.0,
    }
    assert {name: metric.item() for name, metric in metrics.items()} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("objective", [c for c in COMBINATIONS if not isinstance(c.trust_region, O.CISPO)], ids=name_of)
def test_clip_fractions_count_the_tokens_whose_gradient_is_cut(objective):
    check_clip_fractions_count_the_tokens_whose_gradient_is_cut(objective)


def test_cispo_counts_clipped_weights():
    old = torch.tensor([0.5, 2.0, 4.0, 1.0], dtype=torch.float64).log().neg()
    for sign in (1.0, -1.0):
        metrics = fusedpo.policy_loss(torch.zeros_like(old), old, sign * torch.ones(4), objective=O.cispo(0.1)).metrics
        assert metrics["clip_frac_low"].item() == 0.25
        assert metrics["clip_frac_high"].item() == 0.5


def test_dual_clip_counts_as_high():
    lp = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    old, advantage = torch.tensor([-2.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)
    out = fusedpo.policy_loss(lp, old, advantage, objective=O.ppo(dual=3.0))
    out.loss.backward()
    assert out.loss.item() == 3.0
    assert lp.grad.item() == 0.0
    assert out.metrics["clip_frac_high"].item() == 1.0
    assert out.metrics["clip_frac_low"].item() == 0.0


def test_effective_sample_size_does_not_overflow():
    lp = torch.zeros(4)
    out = fusedpo.policy_loss(lp, torch.full((4,), -20.0), lp, objective=O.nfpo(8))
    # weights e^40, e^40, e^40, e^20
    assert out.metrics["ess"].item() == pytest.approx(3 / 4)


# -------------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("preset", "aggregation"),
    [
        *((preset, "token-mean") for preset in (O.ppo, O.dapo, O.cispo, O.nfpo, O.reinforce, O.opo)),
        *((preset, "seq-mean-token-mean") for preset in (O.grpo, O.gspo, O.sapo)),
        *((preset, "seq-mean-token-sum-norm") for preset in (O.dr_grpo, O.dppo_tv, O.dppo_kl)),
    ],
)
def test_default_aggregation_of_presets(preset, aggregation):
    assert preset().aggregation == aggregation
    check_against_definition(preset(), random_batch(seed=4), define)


# -------------------------------------------------------------------------------------------------------------- tracing


@pytest.mark.slow
@pytest.mark.parametrize(
    # AOTAutograd, which takes longer, sees one padded batch here and a packed one in test_objective_parts.py
    ("objective", "packed", "backend"),
    [
        (
            O.nfpo(4, trust_region=O.PPOClip(dual=3.0, cap=20.0, on="product"), kl=O.KL("k3+", 0.1, 10.0)),
            False,
            "aot_eager",
        ),
        (
            O.nfpo(4, differentiate=True, trust_region=O.BinaryKL(cap=None), aggregation="seq-mean-token-sum-norm"),
            True,
            "eager",
        ),
        (O.gspo(), True, "eager"),
    ],
    ids=["nfpo", "differentiated", "gspo"],
)
def test_compiles_without_a_break(objective, packed, backend):
    def loss(batch):
        return fusedpo.policy_loss(**batch, objective=objective)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows, width in ((2, 5), (3, 7)):
        batch = random_batch(rows, width)
        if packed:
            batch = pack(batch, [width - 2] * rows)
        batch["logprobs"] = batch["logprobs"].requires_grad_()
        out, expected = compiled(batch), loss(batch)
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(out.metrics, expected.metrics)
        gradients = [torch.autograd.grad(o.loss, batch["logprobs"])[0] for o in (out, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-15)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] > 0  # other sizes compile nothing anew
