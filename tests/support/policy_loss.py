"""Batches and objectives for the policy losses, their definition by token, and checks that every backend passes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fusedpo
from fusedpo import backends
from fusedpo import objectives as O

INF, NAN = math.inf, math.nan
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


def combinations(pairs):
    """Objectives of the ``pairs`` of ratio and trust region that go together; the other parts take turns."""
    i = 0
    for ratio, region in pairs:
        try:
            yield O.Objective(ratio, region, KLS[i % len(KLS)], 0.1 * (i % 2), AGGREGATIONS[i % 5])
            i += 1
        except ValueError:
            continue


def name_of(objective):
    return f"{objective.ratio}-{objective.trust_region}"


COMBINATIONS = list(combinations(itertools.product(RATIOS, REGIONS)))
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


def clip(x, low, high):
    return max(low, min(high, x))


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


def check_masked_garbage_reaches_nothing(objective):
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


DELTAS = [0.0, 19.9, -19.9, 20.1, -20.1, 89.0, -89.0, 1e4, -1e4, INF, -INF]


def check_extreme_log_ratios_stay_finite(objective, dtype):
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


def check_extreme_distances_to_the_reference(kind):
    deltas = torch.tensor([d for d in DELTAS if math.isfinite(d)], dtype=torch.float32)
    lp = torch.full_like(deltas, -1.0).requires_grad_()
    objective = O.ppo(kl=O.KL(kind, 1.0))
    out = fusedpo.policy_loss(lp, None, torch.zeros_like(lp), objective=objective, ref_logprobs=lp.detach() - deltas)
    out.loss.backward()
    assert out.loss.isfinite()
    assert lp.grad.isfinite().all()


def check_nan_at_a_kept_token_is_not_hidden(objective):
    batch = random_batch(2, 6, holes=False)
    batch["logprobs"][0, 3] = NAN
    tokens = fusedpo.policy_loss(**batch, objective=objective, reduction="none").loss
    assert tokens[0, 3].isnan()
    assert tokens[1].isfinite().all()
    assert fusedpo.policy_loss(**batch, objective=objective).loss.isnan()


def check_against_definition(objective, batch, define):
    """Losses of tokens, the loss and, by central differences, its gradient. ``define(objective, batch, live, frozen)``
    gives the loss of each token, in plain Python; ``frozen`` are the log-probs inside a stop-gradient.
    """
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


def each_part_once(objectives):
    """The first objective with each ratio, trust region, KL and aggregation, for what is no matter of their product."""
    seen, chosen = set(), []
    for objective in objectives:
        parts = {repr(x) for x in (objective.ratio, objective.trust_region, objective.kl, objective.aggregation)}
        if parts - seen:
            chosen.append(objective)
            seen |= parts
    return chosen


# shape and cu_seqlens of batches without a token
EMPTY = [((0, 3), None), ((2, 0), None), ((0,), None), ((0,), [0]), ((0,), [0, 0, 0]), ((1, 0), [0, 0])]


def check_nothing_to_learn_from_is_a_connected_zero(objective, shape, cu_seqlens):
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


def check_clip_fractions_count_the_tokens_whose_gradient_is_cut(objective):
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
