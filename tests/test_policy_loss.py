"""The policy loss against its definition, token by token in plain Python, and its contract at the edges."""

import itertools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck

import fusedpo
from fusedpo import backends
from fusedpo import objectives as O

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def _on_the_reference():
    with fusedpo.backend("reference"):
        yield


# --------------------------------------------------------------------------------------------------------- combinations

RATIOS = [
    O.TokenRatio(),
    O.SequenceRatio(),
    O.ForwardTrace(1),
    O.ForwardTrace(3),
    O.ForwardTrace(50),
    O.ForwardTrace(3, differentiate=True),
    O.ForwardTrace(50, differentiate=True),
    O.OnPolicy(),
]
REGIONS = [
    O.NoTrustRegion(),
    O.PPOClip(0.1, 0.2),
    O.PPOClip(0.1, 0.2, dual=1.3),
    O.PPOClip(0.1, 0.2, cap=1.05),
    O.PPOClip(0.1, 0.2, on="product"),
    O.PPOClip(0.1, 0.2, dual=1.3, cap=1.5, on="product"),
    O.CISPO(0.1, 0.2),
    O.CISPO(),
    O.BinaryTV(0.03, 0.05, cap=1.1),
    O.BinaryTV(0.03, 0.05, cap=None),
    O.BinaryKL(0.005, 0.01, cap=1.1),
    O.BinaryKL(0.005, 0.01, cap=None),
    O.SAPO(),
    O.SAPO(2.0, 0.5),
]
KLS = [
    None,
    *(O.KL(kind, 0.3) for kind in ("k1", "k2", "k3", "k3+")),
    O.KL("k3", 0.3, clamp=0.02),
    O.KL("k3+", 1, 0.02),
    *(O.KL(kind, 0.3, weighted=True) for kind in ("k1", "k3", "k3+")),
    O.KL("k3", 0.3, 0.02, weighted=True),
]
AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


def combinations():
    """Every ratio with every trust region that it goes with; the other parts take turns."""
    others = itertools.cycle(zip(itertools.cycle(KLS), itertools.cycle([0.0, 0.1]), range(len(KLS) * 10), strict=False))
    for ratio, region in itertools.product(RATIOS, REGIONS):
        kl, entropy_coef, i = next(others)
        try:
            yield O.Objective(ratio, region, kl, entropy_coef, AGGREGATIONS[i % 5])
        except ValueError:
            continue


def name_of(objective):
    return f"{objective.ratio}-{objective.trust_region}"


COMBINATIONS = list(combinations())
every_combination = pytest.mark.parametrize("objective", COMBINATIONS, ids=name_of)


def random_batch(rows=3, width=5, seed=0, holes=True, spread=0.25):
    """Keyword arguments of policy_loss for a padded batch; the last sequence is masked as a whole.

    float64, or the float32 in which kernels compute where one is forced.
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lp = (0.1 + 0.8 * torch.rand(rows, width, generator=g, dtype=torch.float64)).log()
    mask = torch.rand(rows, width, generator=g) < 0.75
    mask[-1] = False
    batch = {
        "logprobs": lp,
        "old_logprobs": (lp + spread * randn(rows, width)).clamp(max=-0.01),
        "advantages": randn(rows, width),
        "mask": mask if holes else torch.ones_like(mask),
        "ref_logprobs": lp + spread * randn(rows, width),
        "entropy": randn(rows, width).abs(),
        "is_weights": randn(rows, width).exp(),
    }
    if backends._forced in ("native", "triton"):
        batch = {name: x.float() if x.is_floating_point() else x for name, x in batch.items()}
    return batch


def tolerance(x):
    """For sums of some ten terms of size 1 that are computed in two orders."""
    eps = torch.finfo(x.dtype).eps
    return {"rtol": 20 * eps, "atol": 20 * eps}


def assert_same(got, want):
    """Bit for bit. The reference to some roundings: PyTorch computes what is left after the last whole vector in
    another way, so that the result for a token depends on how many there are.
    """
    if backends.forced() == "reference":
        torch.testing.assert_close(got, want, **tolerance(want))
    else:
        assert torch.equal(got, want)


def pack(batch, lengths):
    """The first ``lengths[b]`` positions of each row, one after the other."""
    lengths = list(lengths)
    packed = {name: torch.cat([x[b, :n] for b, n in enumerate(lengths)]) for name, x in batch.items()}
    return packed | {"cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)}


# --------------------------------------------------------------------------------------- the definition, token by token


def clip(x, low, high):
    return max(low, min(high, x))


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


def policy_term(objective, lp, lp0, olp, a, rho, trace, rho0, trace0):
    region = objective.trust_region
    if isinstance(objective.ratio, O.OnPolicy):
        return -a * lp
    if isinstance(objective.ratio, O.ForwardTrace) and objective.ratio.differentiate:
        return -a * (rho - 1) * trace if keeps_gradient(region, lp0, olp, a, rho0) else 0.0
    if isinstance(region, O.NoTrustRegion):
        return -a * rho * trace0
    if isinstance(region, O.PPOClip):
        if region.cap is not None:
            trace0 = min(trace0, region.cap / rho0)
        ratio, weight = (rho * trace0, 1.0) if region.on == "product" else (rho, trace0)
        loss = max(-a * ratio, -a * clip(ratio, 1 - region.low, 1 + region.high))
        if region.dual is not None and a < 0:
            loss = min(loss, -a * region.dual)
        return weight * loss
    if isinstance(region, O.CISPO):
        return -a * clip(rho0, 1 - region.low, 1 + region.high) * trace0 * lp
    if isinstance(region, O.SAPO):
        tau = region.tau_pos if a > 0 else region.tau_neg
        return -a * 4 / tau / (1 + math.exp(-tau * (rho - 1))) * trace0
    weight = rho0 * trace0 if region.cap is None else min(rho0 * trace0, region.cap)
    return -a * weight * lp if keeps_gradient(region, lp0, olp, a, rho0) else 0.0


def keeps_gradient(region, lp, olp, a, rho):
    p, p_old = math.exp(lp), math.exp(olp)
    if isinstance(region, O.PPOClip):
        dual = INF if region.dual is None else region.dual
        return rho <= 1 + region.high if a > 0 else 1 - region.low <= rho <= dual
    if isinstance(region, O.BinaryTV):
        return p - p_old <= region.high if a > 0 else p - p_old >= -region.low
    if isinstance(region, O.BinaryKL):
        kl = p_old * (olp - lp) + (1 - p_old) * math.log((1 - p_old + 1e-8) / (1 - p + 1e-8))
        return kl <= region.high or p <= p_old if a > 0 else kl <= region.low or p >= p_old
    return True


def kl_term(kl, d, d0, log_ratio):
    def k3(d):
        return math.exp(clip(-d, -20, 20)) - 1 + clip(d, -20, 20)

    value = {"k1": d, "k2": d * d / 2, "k3": k3(d), "k3+": k3(d0) + (d * d - d0 * d0) / 2}[kl.kind]
    value = value if kl.clamp is None else clip(value, -kl.clamp, kl.clamp)
    return value * math.exp(log_ratio) if kl.weighted else value


def aggregate(objective, losses, mask):
    kept = [[loss for loss, keep in zip(*row, strict=True) if keep] for row in zip(losses, mask, strict=True)]
    kept = [row for row in kept if row]
    total = math.fsum(itertools.chain(*kept))
    if objective.aggregation == "token-sum":
        return total
    if objective.aggregation == "token-mean":
        return total / sum(map(len, kept))
    if objective.aggregation == "seq-mean-token-mean":
        return math.fsum(math.fsum(row) / len(row) for row in kept) / len(kept)
    if objective.aggregation == "seq-mean-token-sum":
        return total / len(kept)
    return total / len(kept) / (objective.length_norm or len(mask[0]))


def check_against_definition(objective, batch):
    lp, mask = batch["logprobs"], batch["mask"].tolist()
    live, frozen = lp.tolist(), lp.tolist()
    leaf = lp.clone().requires_grad_()
    out = fusedpo.policy_loss(**batch | {"logprobs": leaf}, objective=objective)
    tokens = fusedpo.policy_loss(**batch, objective=objective, reduction="none").loss
    (gradient,) = torch.autograd.grad(out.loss, leaf)

    losses = define(objective, batch, live, frozen)
    torch.testing.assert_close(tokens, torch.tensor(losses, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert out.loss.item() == pytest.approx(aggregate(objective, losses, mask), rel=1e-12, abs=1e-12)

    h = 1e-5  # the error of a central difference is of the order h^2, and eps / h
    expected = torch.zeros_like(lp)
    for b, t in batch["mask"].nonzero().tolist():
        values = []
        for step in (h, -h):
            live[b][t] = frozen[b][t] + step
            values.append(aggregate(objective, define(objective, batch, live, frozen), mask))
        live[b][t] = frozen[b][t]
        expected[b, t] = (values[0] - values[1]) / (2 * h)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8)


@every_combination
def test_value_and_gradient_are_those_of_the_definition(objective):
    check_against_definition(objective, random_batch())


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_kl_entropy_and_aggregation(kl, aggregation, entropy_coef):
    check_against_definition(
        O.Objective(kl=kl, entropy_coef=entropy_coef, aggregation=aggregation), random_batch(seed=1)
    )


def test_length_norm():
    batch = random_batch()
    check_against_definition(O.dr_grpo(length_norm=40.0), batch)
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
    batch = random_batch(3, 6)
    garbage = torch.tensor([NAN, INF, -INF, 1e4, -1e30, NAN], dtype=torch.float64).expand(3, 6)
    spoilt = {
        name: x if name == "mask" else torch.where(batch["mask"], x, garbage.roll(i, 1).to(x.dtype))
        for i, (name, x) in enumerate(batch.items())
    }

    def run(batch):
        leaves = {name: batch[name].clone().requires_grad_() for name in ("logprobs", "entropy")}
        out = fusedpo.policy_loss(**batch | leaves, objective=objective)
        tokens = fusedpo.policy_loss(**batch, objective=objective, reduction="none").loss
        used = [leaves["logprobs"]] + [leaves["entropy"]] * (objective.entropy_coef != 0)
        return out.loss, tokens, *torch.autograd.grad(out.loss, used), *out.metrics.values()

    for result, expected in zip(run(spoilt), run(batch), strict=True):
        assert torch.equal(result, expected)
        if result.dim() == 2:
            assert not result[~batch["mask"]].any()


def test_garbage_advantage_of_a_masked_sequence():
    batch = random_batch(3, 4)  # the last sequence is masked
    advantages = torch.tensor([1.0, -1.0, NAN], dtype=torch.float64)
    clean = fusedpo.policy_loss(**batch | {"advantages": advantages.nan_to_num()}, objective=O.grpo()).loss
    assert torch.equal(fusedpo.policy_loss(**batch | {"advantages": advantages}, objective=O.grpo()).loss, clean)


DELTAS = [0.0, 19.9, -19.9, 20.1, -20.1, 89.0, -89.0, 1e4, -1e4, INF, -INF]


@every_combination
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_ratios_stay_finite(objective, dtype):
    deltas = torch.tensor(DELTAS, dtype=dtype).repeat(2)
    lp = torch.full_like(deltas, -1.0).requires_grad_()
    objective = O.Objective(objective.ratio, objective.trust_region)
    advantages = torch.ones_like(deltas)
    advantages[len(DELTAS) :] = -1
    out = fusedpo.policy_loss(lp, lp.detach() - deltas, advantages, objective=objective)
    out.loss.backward()
    assert out.loss.isfinite()
    assert lp.grad.isfinite().all()
    assert all(metric.isfinite() for metric in out.metrics.values())


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
    deltas = torch.tensor([d for d in DELTAS if math.isfinite(d)], dtype=torch.float32)
    lp = torch.full_like(deltas, -1.0).requires_grad_()
    objective = O.ppo(kl=O.KL(kind, 1.0))
    out = fusedpo.policy_loss(lp, None, torch.zeros_like(lp), objective=objective, ref_logprobs=lp.detach() - deltas)
    out.loss.backward()
    assert out.loss.isfinite()
    assert lp.grad.isfinite().all()


@every_combination
def test_nan_at_a_kept_token_is_not_hidden(objective):
    batch = random_batch(2, 6, holes=False)
    batch["logprobs"][0, 3] = NAN
    tokens = fusedpo.policy_loss(**batch, objective=objective, reduction="none").loss
    assert tokens[0, 3].isnan()
    assert tokens[1].isfinite().all()
    assert fusedpo.policy_loss(**batch, objective=objective).loss.isnan()


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


# shape and cu_seqlens of batches without a token
EMPTY = [((0, 3), None), ((2, 0), None), ((0,), None), ((0,), [0]), ((0,), [0, 0, 0]), ((1, 0), [0, 0])]


@every_combination
@pytest.mark.parametrize(
    ("shape", "cu_seqlens"),
    [((2, 3), None), *EMPTY, ((4,), [0, 0, 3, 3, 4])],
)
def test_nothing_to_learn_from_is_a_connected_zero(objective, shape, cu_seqlens):
    lp, entropy = (torch.full(shape, NAN, requires_grad=True) for _ in range(2))
    out = fusedpo.policy_loss(
        lp,
        torch.full(shape, NAN),
        torch.full(shape, NAN),
        objective=objective,
        mask=torch.zeros(shape, dtype=torch.bool),
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens),
        ref_logprobs=torch.full(shape, NAN),
        entropy=entropy,
    )
    assert out.loss.item() == 0.0
    out.loss.backward()
    assert torch.equal(lp.grad, torch.zeros(shape))
    if objective.entropy_coef != 0:
        assert torch.equal(entropy.grad, torch.zeros(shape))
    assert all(metric.item() == 0.0 for metric in out.metrics.values())


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
    batch = random_batch(4, 8, seed=3) | {"ref_logprobs": None}
    ratio, region = objective.ratio, objective.trust_region

    def run(ratio):
        lp = batch["logprobs"].clone().requires_grad_()
        out = fusedpo.policy_loss(**batch | {"logprobs": lp}, objective=O.Objective(ratio, region))
        low, high = (out.metrics[f"clip_frac_{side}"].item() for side in ("low", "high"))
        assert out.metrics["clip_frac"].item() == pytest.approx(low + high)
        return low, high, torch.autograd.grad(out.loss, lp)[0]

    if getattr(ratio, "differentiate", False):  # the same mask; other tokens' windows keep the gradient from 0
        assert run(ratio)[:2] == run(O.ForwardTrace(ratio.n))[:2]
        return
    low, high, gradient = run(ratio)
    cut, positive = (gradient == 0)[batch["mask"]], (batch["advantages"] > 0)[batch["mask"]]
    assert low + high == pytest.approx(cut.double().mean().item())
    if getattr(region, "dual", None) is None:
        assert high == pytest.approx((cut & positive).double().mean().item())


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
    check_against_definition(preset(), random_batch(seed=4))


# -------------------------------------------------------------------------------------------------------------- tracing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "packed"),
    [
        (O.nfpo(4, trust_region=O.PPOClip(dual=3.0, cap=20.0, on="product"), kl=O.KL("k3+", 0.1, 10.0)), False),
        (O.nfpo(4, differentiate=True, trust_region=O.BinaryKL(cap=None), aggregation="seq-mean-token-sum-norm"), True),
        (O.gspo(), True),
    ],
    ids=["nfpo", "differentiated", "gspo"],
)
def test_compiles_without_a_break(objective, packed):
    def loss(batch):
        return fusedpo.policy_loss(**batch, objective=objective)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
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
