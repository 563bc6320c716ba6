"""The policy loss against its definition, token by token in plain Python, and its contract at the edges."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck

import fusedpo
from fusedpo import objectives as O
from fusedpo.reference import METRICS

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
    """Keyword arguments of policy_loss for a padded float64 batch; the last sequence is masked as a whole."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lp = (0.1 + 0.8 * torch.rand(rows, width, generator=g, dtype=torch.float64)).log()
    mask = torch.rand(rows, width, generator=g) < 0.75
    mask[-1] = False
    return {
        "logprobs": lp,
        "old_logprobs": (lp + spread * randn(rows, width)).clamp(max=-0.01),
        "advantages": randn(rows, width),
        "mask": mask if holes else torch.ones_like(mask),
        "ref_logprobs": lp + spread * randn(rows, width),
        "entropy": randn(rows, width).abs(),
        "is_weights": randn(rows, width).exp(),
    }


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
                loss += objective.kl.coef * kl_term(objective.kl, live[b][t] - ref[t], frozen[b][t] - ref[t])
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


def kl_term(kl, d, d0):
    def k3(d):
        return math.exp(clip(-d, -20, 20)) - 1 + clip(d, -20, 20)

    value = {"k1": d, "k2": d * d / 2, "k3": k3(d), "k3+": k3(d0) + (d * d - d0 * d0) / 2}[kl.kind]
    return value if kl.clamp is None else clip(value, -kl.clamp, kl.clamp)


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


# -------------------------------------------------------------------------------------------------------------- layouts


def pack(batch, lengths):
    """The first ``lengths[b]`` positions of each row, one after the other."""
    lengths = list(lengths)
    packed = {name: torch.cat([x[b, :n] for b, n in enumerate(lengths)]) for name, x in batch.items()}
    return packed | {"cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)}


@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4), index=st.integers(0, len(COMBINATIONS) - 1))
def test_packed_is_padded_bit_for_bit(lengths, index):
    objective = COMBINATIONS[index]
    if objective.aggregation == "seq-mean-token-sum-norm":  # the padded width is not known to a packed batch
        objective = O.Objective(
            objective.ratio, objective.trust_region, aggregation=objective.aggregation, length_norm=9
        )
    padded = {
        k: x.float() if x.is_floating_point() else x for k, x in random_batch(len(lengths), 8, holes=False).items()
    }
    padded["mask"] &= torch.arange(8) < torch.tensor(lengths)[:, None]
    padded["mask"][:, 2] = False
    packed = pack(padded, lengths)
    row = {name: x if name == "cu_seqlens" else x[None] for name, x in packed.items()}

    def run(batch, reduction):
        lp = batch["logprobs"].clone().requires_grad_()
        loss = fusedpo.policy_loss(**batch | {"logprobs": lp}, objective=objective, reduction=reduction).loss
        return loss.detach(), *torch.autograd.grad(loss.sum(), lp)

    for reduction in ("mean", "none"):
        loss, gradient = run(padded, reduction)
        packed_loss, packed_gradient = run(packed, reduction)
        row_loss, row_gradient = run(row, reduction)
        inside = torch.arange(8) < torch.tensor(lengths)[:, None]
        assert torch.equal(packed_gradient, gradient[inside])
        assert torch.equal(packed_gradient, row_gradient[0])
        assert torch.equal(packed_loss, loss if reduction == "mean" else loss[inside])
        assert torch.equal(packed_loss.reshape(row_loss.shape), row_loss)


def test_one_dimension_is_one_sequence():
    batch = {name: x[0] for name, x in random_batch(2, 6).items()}
    for objective in (O.gspo(), O.nfpo(3), O.grpo(), O.dr_grpo()):
        alone = fusedpo.policy_loss(**batch, objective=objective).loss
        as_row = fusedpo.policy_loss(**{name: x[None] for name, x in batch.items()}, objective=objective).loss
        assert torch.equal(alone, as_row)


@pytest.mark.parametrize("name", ["advantages", "is_weights"])
def test_values_per_sequence_are_broadcast(name):
    batch = random_batch(3, 4)
    per_sequence = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    per_token = per_sequence[:, None].expand(3, 4)

    def tokens(batch, value):
        return fusedpo.policy_loss(**batch | {name: value}, objective=O.ppo(), reduction="none").loss

    expected = tokens(batch, per_token)
    assert torch.equal(tokens(batch, per_sequence), expected)
    assert torch.equal(tokens(batch, per_sequence[:, None]), expected)

    lengths = [4, 0, 3]
    packed = pack(batch, lengths)
    flat = torch.cat([per_token[b, :n] for b, n in enumerate(lengths)])
    for value in (per_sequence, flat[None]):
        assert torch.equal(tokens(packed, value), tokens(packed, flat))
    row = {k: x if k == "cu_seqlens" else x[None] for k, x in packed.items()}
    for value in (per_sequence, flat):
        assert torch.equal(tokens(row, value), tokens(row, flat[None]))


def test_as_many_packed_tokens_as_sequences_are_per_token():
    lp, cu_seqlens = torch.zeros(3), torch.tensor([0, 2, 3, 3])
    advantages = torch.tensor([1.0, 2.0, 3.0])
    loss = fusedpo.policy_loss(lp, None, advantages, objective=O.ppo(), cu_seqlens=cu_seqlens, reduction="none").loss
    assert loss.tolist() == [-1.0, -2.0, -3.0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_mask_dtypes(dtype):
    batch = random_batch()
    expected = fusedpo.policy_loss(**batch, objective=O.ppo()).loss
    mask = batch["mask"].to(dtype) * 3
    assert torch.equal(fusedpo.policy_loss(**batch | {"mask": mask}, objective=O.ppo()).loss, expected)


def test_strided_and_expanded_arrays():
    batch = random_batch(3, 5)
    expected = fusedpo.policy_loss(**batch, objective=O.nfpo(3, kl=O.KL("k3", 0.1))).loss
    strided = {name: x.T.contiguous().T for name, x in batch.items()}
    assert torch.equal(fusedpo.policy_loss(**strided, objective=O.nfpo(3, kl=O.KL("k3", 0.1))).loss, expected)


# --------------------------------------------------------------------------------------------------- masked and extreme


@every_combination
def test_masked_garbage_reaches_nothing(objective):
    batch = random_batch(3, 6)
    garbage = torch.tensor([NAN, INF, -INF, 1e4, -1e30, NAN], dtype=torch.float64).expand(3, 6)
    spoilt = {
        name: x if name == "mask" else torch.where(batch["mask"], x, garbage.roll(i, 1))
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


@every_combination
@pytest.mark.parametrize(
    ("shape", "cu_seqlens"),
    [
        ((2, 3), None),
        ((0, 3), None),
        ((2, 0), None),
        ((0,), None),
        ((0,), [0]),
        ((0,), [0, 0, 0]),
        ((1, 0), [0, 0]),
        ((4,), [0, 0, 3, 3, 4]),
    ],
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


# ----------------------------------------------------------------------------------- reduction, denominator, loss_scale


@every_combination
def test_random_upstream_gradients_per_token(objective):
    batch = random_batch()
    upstream = torch.randn(3, 5, dtype=torch.float64)
    lp = batch["logprobs"].clone().requires_grad_()
    tokens = fusedpo.policy_loss(**batch | {"logprobs": lp}, objective=objective, reduction="none").loss
    assert tokens.shape == lp.shape
    assert not tokens[~batch["mask"]].any()
    (gradient,) = torch.autograd.grad(tokens, lp, upstream, retain_graph=True)
    expected = sum(
        upstream[b, t] * torch.autograd.grad(tokens[b, t], lp, retain_graph=True)[0] for b, t in batch["mask"].nonzero()
    )
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("aggregation", [a for a in AGGREGATIONS if a != "token-sum"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_with_a_common_denominator_are_the_batch(aggregation, as_tensor):
    objective = O.Objective(O.ForwardTrace(3), kl=O.KL("k3", 0.1), aggregation=aggregation)
    batch = random_batch(5, 4)
    kept = batch["mask"]
    count = kept.sum() if aggregation == "token-mean" else kept.any(1).sum()
    denominator = count if as_tensor else count.item()
    lp = batch["logprobs"].clone().requires_grad_()
    whole = fusedpo.policy_loss(**batch | {"logprobs": lp}, objective=objective).loss
    (expected,) = torch.autograd.grad(whole, lp)

    total = 0.0
    for rows in (slice(0, 1), slice(1, 3), slice(3, 5)):
        micro = {name: x[rows] for name, x in (batch | {"logprobs": lp}).items()}
        loss = fusedpo.policy_loss(**micro, objective=objective, denominator=denominator).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-13)
    torch.testing.assert_close(lp.grad, expected, rtol=1e-13, atol=1e-14)


def test_fractional_denominator():
    batch = random_batch()
    half = fusedpo.policy_loss(**batch, objective=O.grpo(), denominator=0.5).loss
    one = fusedpo.policy_loss(**batch, objective=O.grpo(), denominator=1.0).loss
    assert torch.equal(half, 2 * one)


@pytest.mark.parametrize("loss_scale", [0.25, 4, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_scale(loss_scale, reduction):
    batch = {name: x.float() if x.is_floating_point() else x for name, x in random_batch().items()}
    lp = batch["logprobs"].clone().requires_grad_()

    def run(**options):
        loss = fusedpo.policy_loss(**batch | {"logprobs": lp}, objective=O.nfpo(2), reduction=reduction, **options).loss
        return loss, *torch.autograd.grad(loss.sum(), lp)

    factor = float(loss_scale)
    loss, gradient = run()
    scaled, scaled_gradient = run(loss_scale=loss_scale)
    assert scaled.dtype == torch.float32
    assert torch.equal(scaled, factor * loss)
    assert torch.equal(scaled_gradient, factor * gradient)


# --------------------------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in random_batch().items()}
    lp = batch["logprobs"].requires_grad_()
    out = fusedpo.policy_loss(**batch, objective=O.nfpo(3, kl=O.KL("k3", 0.1), entropy_coef=0.1))
    result = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.loss.dtype == result
    assert {metric.dtype for metric in out.metrics.values()} == {result}
    out.loss.backward()
    assert lp.grad.dtype == dtype
    exact = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    expected = fusedpo.policy_loss(**exact, objective=O.nfpo(3, kl=O.KL("k3", 0.1), entropy_coef=0.1)).loss
    # float32 arithmetic on the same, rounded, input
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_only_logprobs_and_a_used_entropy_get_a_gradient():
    batch = random_batch()
    leaves = {name: x.requires_grad_() for name, x in batch.items() if x.is_floating_point()}
    leaves["denominator"], leaves["loss_scale"] = (torch.tensor(2.0, requires_grad=True) for _ in range(2))
    objective = O.nfpo(3, differentiate=True, kl=O.KL("k3+", 0.1), entropy_coef=0.1)
    fusedpo.policy_loss(**batch | leaves, objective=objective).loss.backward()
    assert {name for name, x in leaves.items() if x.grad is not None} == {"logprobs", "entropy"}
    leaves["entropy"].grad = None
    out = fusedpo.policy_loss(**batch | leaves, objective=O.ppo())
    out.loss.backward()
    assert leaves["entropy"].grad is None


def test_output_is_detached_but_for_the_loss():
    batch = random_batch()
    lp, entropy = batch["logprobs"].requires_grad_(), batch["entropy"].requires_grad_()
    out = fusedpo.policy_loss(**batch, objective=O.nfpo(2, kl=O.KL("k1", 0.1), entropy_coef=0.1))
    assert isinstance(out, fusedpo.PolicyLossOutput)
    assert out.loss.requires_grad
    assert tuple(out.metrics) == METRICS
    assert all(metric.dim() == 0 and not metric.requires_grad for metric in out.metrics.values())
    assert torch.equal(out.logprobs, lp)
    assert torch.equal(out.entropy, entropy)
    assert not out.logprobs.requires_grad
    assert not out.entropy.requires_grad
    del batch["entropy"]
    assert fusedpo.policy_loss(**batch, objective=O.ppo()).entropy is None


def test_no_old_logprobs_is_on_policy():
    batch = random_batch()
    lp = batch["logprobs"].requires_grad_()
    for objective in (O.ppo(), O.nfpo(3), O.gspo(), O.cispo()):
        loss = fusedpo.policy_loss(**batch | {"old_logprobs": None}, objective=objective).loss
        expected = fusedpo.policy_loss(**batch | {"old_logprobs": lp.detach()}, objective=objective).loss
        assert torch.equal(loss, expected)
        assert torch.equal(*(torch.autograd.grad(x, lp)[0] for x in (loss, expected)))


def test_arguments_are_left_alone():
    batch = random_batch()
    before = {name: (x.clone(), x._version) for name, x in batch.items()}
    for objective in COMBINATIONS:
        fusedpo.policy_loss(**batch, objective=objective)
    for name, (value, version) in before.items():
        assert torch.equal(batch[name], value)
        assert batch[name]._version == version


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


DETACHED, DIFFERENTIATED = O.ForwardTrace(2), O.ForwardTrace(2, differentiate=True)


@pytest.mark.parametrize(
    ("ratio", "region", "named"),
    [
        *((O.OnPolicy(), region, ("OnPolicy", type(region).__name__)) for region in REGIONS[1:]),
        (O.SequenceRatio(), O.BinaryTV(), ("SequenceRatio", "BinaryTV")),
        (O.SequenceRatio(), O.BinaryKL(), ("SequenceRatio", "BinaryKL")),
        (O.TokenRatio(), O.PPOClip(on="product"), ("PPOClip", "ForwardTrace")),
        (O.SequenceRatio(), O.PPOClip(on="product"), ("PPOClip", "ForwardTrace")),
        (DIFFERENTIATED, O.PPOClip(on="product"), ("PPOClip", "ForwardTrace")),
        (DIFFERENTIATED, O.CISPO(), ("CISPO", "ForwardTrace")),
        (DIFFERENTIATED, O.SAPO(), ("SAPO", "ForwardTrace")),
        (DIFFERENTIATED, O.PPOClip(cap=2.0), ("PPOClip", "ForwardTrace")),
        (DIFFERENTIATED, O.BinaryTV(), ("BinaryTV", "ForwardTrace")),
        (DIFFERENTIATED, O.BinaryKL(), ("BinaryKL", "ForwardTrace")),
    ],
    ids=str,
)
def test_parts_that_disagree_are_both_named(ratio, region, named):
    with pytest.raises(ValueError, match="Objective") as error:
        O.Objective(ratio, region)
    assert all(name in str(error.value) for name in named)


# --------------------------------------------------------------------------------------------------------------- errors


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


KL, BONUS = O.ppo(kl=O.KL("k3", 0.1)), O.ppo(entropy_coef=0.1)
WRONG = [
    (TypeError, "logprobs", {"logprobs": [0.0]}),
    (TypeError, "logprobs", {"logprobs": zeros(2, 3, dtype=torch.int64)}),
    (ValueError, "logprobs", {"logprobs": zeros(2, 3, 4)}),
    (ValueError, "logprobs", {"logprobs": zeros()}),
    (TypeError, "old_logprobs", {"old_logprobs": 0.0}),
    (TypeError, "old_logprobs", {"old_logprobs": zeros(2, 3, dtype=torch.int32)}),
    (ValueError, "old_logprobs", {"old_logprobs": zeros(2, 4)}),
    (ValueError, "old_logprobs", {"old_logprobs": zeros(2, 3, device="meta")}),
    (TypeError, "advantages", {"advantages": 1.0}),
    (TypeError, "advantages", {"advantages": zeros(2, dtype=torch.int64)}),
    (ValueError, "advantages", {"advantages": zeros(3)}),
    (ValueError, "advantages", {"advantages": zeros(1, 3)}),
    (ValueError, "advantages", {"advantages": zeros()}),
    (ValueError, "advantages", {"advantages": zeros(2, device="meta")}),
    (TypeError, "objective", {"objective": "ppo"}),
    (TypeError, "objective", {"objective": O.PPOClip()}),
    (TypeError, "mask", {"mask": [True]}),
    (TypeError, "mask", {"mask": zeros(2, 3, dtype=torch.complex64)}),
    (ValueError, "mask", {"mask": zeros(3, 2)}),
    (ValueError, "mask", {"mask": zeros(2, 3, device="meta")}),
    (TypeError, "ref_logprobs", {"ref_logprobs": zeros(2, 3, dtype=torch.bool)}),
    (ValueError, "ref_logprobs", {"ref_logprobs": zeros(2)}),
    (ValueError, "ref_logprobs", {"objective": KL}),
    (TypeError, "entropy", {"entropy": zeros(2, 3, dtype=torch.int64)}),
    (ValueError, "entropy", {"entropy": zeros(3)}),
    (ValueError, "entropy", {"entropy": zeros(2, 3, device="meta")}),
    (ValueError, "entropy", {"objective": BONUS}),
    (TypeError, "is_weights", {"is_weights": 2.0}),
    (ValueError, "is_weights", {"is_weights": zeros(6)}),
    (TypeError, "denominator", {"denominator": "8"}),
    (TypeError, "denominator", {"denominator": True}),
    (ValueError, "denominator", {"denominator": zeros(1)}),
    (ValueError, "denominator", {"denominator": zeros(device="meta")}),
    (ValueError, "denominator", {"denominator": -1.0}),
    (ValueError, "denominator", {"denominator": NAN}),
    (ValueError, "denominator", {"denominator": torch.tensor(-1.0)}),
    (ValueError, "denominator", {"denominator": 8, "objective": O.ppo(aggregation="token-sum")}),
    (ValueError, "denominator", {"denominator": 8, "reduction": "none"}),
    (TypeError, "loss_scale", {"loss_scale": None}),
    (ValueError, "loss_scale", {"loss_scale": zeros(2)}),
    (ValueError, "reduction", {"reduction": "sum"}),
    (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 6])}),
]
WRONG_PACKED = [
    (TypeError, "cu_seqlens", {"cu_seqlens": [0, 6]}),
    (TypeError, "cu_seqlens", {"cu_seqlens": zeros(2)}),
    (ValueError, "cu_seqlens", {"cu_seqlens": zeros(2, 1, dtype=torch.int64)}),
    (ValueError, "cu_seqlens", {"cu_seqlens": zeros(0, dtype=torch.int64)}),
    (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([1, 6])}),
    (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 5])}),
    (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 4, 3, 6])}),
    (ValueError, "cu_seqlens", {"cu_seqlens": zeros(2, dtype=torch.int64, device="meta")}),
    (ValueError, "advantages", {"advantages": zeros(3)}),
    (ValueError, "advantages", {"advantages": zeros(2, 3)}),
]


@pytest.mark.parametrize(("error", "argument", "given"), WRONG)
def test_errors_name_the_argument(error, argument, given):
    right = {"logprobs": zeros(2, 3), "old_logprobs": None, "advantages": zeros(2), "objective": O.ppo()}
    with pytest.raises(error, match=rf"^{argument}\b"):
        fusedpo.policy_loss(**right | given)


@pytest.mark.parametrize(("error", "argument", "given"), WRONG_PACKED)
def test_errors_of_packed_arrays(error, argument, given):
    right = {
        "logprobs": zeros(6),
        "old_logprobs": None,
        "advantages": zeros(2),
        "objective": O.ppo(),
        "cu_seqlens": torch.tensor([0, 2, 6]),
    }
    with pytest.raises(error, match=rf"^{argument}\b"):
        fusedpo.policy_loss(**right | given)


FROM_TOKENS = [
    (ValueError, "old_logprobs", {"old_logprobs": zeros(2)}),
    (ValueError, "advantages", {"advantages": zeros(3)}),
    (ValueError, "mask", {"mask": zeros(2)}),
    (ValueError, "ref_logprobs", {"objective": KL}),
    (TypeError, "token_ids", {"token_ids": zeros(2, 3)}),
    (ValueError, "token_ids", {"token_ids": zeros(2, 3, 1, dtype=torch.int64)}),
    (ValueError, "temperature", {"temperature": 0.0}),
    (ValueError, "denominator", {"denominator": -1}),
    (TypeError, "loss_scale", {"loss_scale": "1"}),
]


@pytest.mark.parametrize(
    ("error", "argument", "given"),
    [*FROM_TOKENS, (TypeError, "logits", {"logits": 1.0}), (ValueError, "logits", {"logits": zeros(2, 1, 3, 5)})],
)
def test_errors_from_logits(error, argument, given):
    right = {
        "logits": zeros(2, 3, 5),
        "token_ids": zeros(2, 3, dtype=torch.int64),
        "old_logprobs": None,
        "advantages": zeros(2),
        "objective": O.ppo(),
    }
    with pytest.raises(error, match=rf"^{argument}\b"):
        fusedpo.policy_loss_from_logits(**right | given)


@pytest.mark.parametrize(
    ("error", "argument", "given"),
    [
        *FROM_TOKENS,
        (TypeError, "hidden", {"hidden": 1.0}),
        (ValueError, "hidden", {"hidden": zeros(4)}),
        (ValueError, "num_live", {"num_live": -1}),
        (ValueError, "num_live", {"num_live": 7}),
        (TypeError, "num_live", {"num_live": 2.0}),
    ],
)
def test_errors_from_hidden(error, argument, given):
    right = {
        "hidden": zeros(2, 3, 4),
        "weight": zeros(5, 4),
        "token_ids": zeros(2, 3, dtype=torch.int64),
        "old_logprobs": None,
        "advantages": zeros(2),
        "objective": O.ppo(),
    }
    with pytest.raises(error, match=rf"^{argument}\b"):
        fusedpo.policy_loss_from_hidden(**right | given)


# ---------------------------------------------------------------------------------------- from logits and hidden states


def random_rows(rows=2, width=4, vocab=6, size=3):
    g = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    batch = random_batch(rows, width, seed=6)
    for name in ("logprobs", "entropy"):
        del batch[name]
    batch["token_ids"] = torch.randint(vocab, (rows, width), generator=g)
    return randn(rows, width, size), randn(vocab, size), batch


COMPOSED = [O.ppo(), O.nfpo(3, entropy_coef=0.1, kl=O.KL("k3", 0.1)), O.gspo(), O.reinforce(entropy_coef=0.1)]


@pytest.mark.parametrize("objective", COMPOSED, ids=name_of)
@pytest.mark.parametrize("packed", [False, True])
def test_from_logits_is_the_loss_of_the_logprobs(objective, packed):
    hidden, weight, batch = random_rows()
    logits = hidden @ weight.T
    options = {"objective": objective, "denominator": 7.0, "loss_scale": 0.5}
    if packed:
        logits, batch = logits.flatten(0, 1), {name: x.flatten() for name, x in batch.items()}
        options["cu_seqlens"] = torch.tensor([0, 3, 8])
    ids = batch.pop("token_ids")

    leaf = logits.clone().requires_grad_()
    out = fusedpo.policy_loss_from_logits(
        leaf, ids.masked_fill(~batch["mask"], -100), **batch, temperature=0.7, **options
    )
    out.loss.backward()

    other = logits.clone().requires_grad_()
    logp = (other / 0.7).log_softmax(-1)
    chosen, entropy = logp.gather(-1, ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1)
    expected = fusedpo.policy_loss(chosen, **batch, entropy=entropy, **options)
    expected.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(leaf.grad, other.grad)
    torch.testing.assert_close(out.metrics, expected.metrics)
    for result, value in ((out.logprobs, chosen), (out.entropy, entropy)):
        assert not result.requires_grad
        torch.testing.assert_close(result, value.detach().masked_fill(~batch["mask"], 0))


@pytest.mark.parametrize("objective", COMPOSED, ids=name_of)
@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_from_hidden_is_from_logits(objective, chunk_tokens):
    hidden, weight, batch = random_rows()
    bias = torch.linspace(-1, 1, 6, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    out = fusedpo.policy_loss_from_hidden(
        *leaves[:2],
        **batch,
        bias=leaves[2],
        softcap=4.0,
        logit_scale=0.5,
        temperature=0.7,
        chunk_tokens=chunk_tokens,
        num_live=int(batch["mask"].sum()),
        objective=objective,
    )
    others = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    logits = 4.0 * torch.tanh(0.5 * (others[0] @ others[1].T + others[2]) / 4.0)
    expected = fusedpo.policy_loss_from_logits(logits, **batch, temperature=0.7, objective=objective)
    torch.testing.assert_close(out, expected)
    gradients = [torch.autograd.grad(*pair) for pair in ((out.loss, leaves), (expected.loss, others))]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("objective", COMPOSED, ids=name_of)
def test_masked_rows_are_not_read(objective):
    hidden, weight, batch = random_rows()
    masked = ~batch["mask"]

    def gradients(hidden, ids):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = fusedpo.policy_loss_from_hidden(*leaves, ids, **batch, objective=objective).loss
        return loss, *torch.autograd.grad(loss, leaves)

    ids = batch.pop("token_ids")
    expected = gradients(hidden, ids)
    hidden[masked] = NAN
    for result, value in zip(gradients(hidden, ids.masked_fill(masked, -100)), expected, strict=True):
        assert torch.equal(result, value)


def test_the_entropy_is_differentiated_only_with_a_coefficient():
    hidden, weight, batch = random_rows()
    batch["advantages"] = torch.zeros(2, dtype=torch.float64)
    for coef in (0.0, 0.1):
        logits = (hidden @ weight.T).requires_grad_()
        fusedpo.policy_loss_from_logits(logits, **batch, objective=O.ppo(entropy_coef=coef)).loss.backward()
        assert logits.grad.any().item() == (coef != 0)


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


@pytest.mark.slow
def test_from_logits_and_hidden_compile_without_a_break():
    hidden, weight, batch = random_rows()
    objective = O.nfpo(3, entropy_coef=0.1)

    def losses(hidden, weight, batch):
        from_logits = fusedpo.policy_loss_from_logits(hidden @ weight.T, **batch, objective=objective, temperature=0.7)
        from_hidden = fusedpo.policy_loss_from_hidden(hidden, weight, **batch, objective=objective, chunk_tokens=4)
        return from_logits.loss, from_hidden.loss

    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, dynamic=True, backend="aot_eager")
    results, expected = compiled(*leaves, batch), losses(*leaves, batch)
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(*(torch.autograd.grad(sum(r), leaves) for r in (results, expected)))
