"""Losses of segments against their formulas in float64: values and gradients, from log-probs, logits, hidden states."""

from __future__ import annotations

import math

import pytest
import segments_oracle as oracle
import torch

import fusedpo
from fusedpo import backends
from fusedpo import objectives as O
from fusedpo.objectives import Preference

native = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))

B, T, S, V, H = 6, 7, 3, 23, 8

PRESETS = {
    "dpo": O.dpo(),
    "cdpo": O.dpo(0.7, label_smoothing=0.2),
    "sigmoid_norm": O.dpo(5.0, normalize=True),
    "ipo": O.ipo(),
    "ipo of sums": O.ipo(normalize=False),
    "slic": O.slic(0.4),
    "robust": O.robust_dpo(0.4, label_smoothing=0.3),
    "simpo": O.simpo(),
    "cpo": O.cpo(),
    "rpo": O.dpo(sft_coef=0.3, sft_aggregation="seq-mean-token-mean"),
    "orpo": O.orpo(),
    "rebel": O.rebel(0.5),
}


def random_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    mask = uniform(B, T) > 0.25
    mask[4] = False  # a pair without kept tokens in one member
    return {"lp": -2 * uniform(B, T) - 0.05, "ref": -2 * uniform(B, T), "mask": mask, "rewards": uniform(B)}


def pairs_of(layout, number):
    if layout == "halves":
        return [(i, i + number // 2) for i in range(number // 2)]
    return [(2 * i, 2 * i + 1) for i in range(number // 2)]


def both_gradients(lp, product, expected):
    """Loss and gradient with an upstream gradient of 1.7, of the product and of the oracle."""
    results = []
    for function in (product, expected):
        leaf = lp.detach().clone().requires_grad_()
        loss = function(leaf)
        loss.backward(torch.tensor(1.7, dtype=loss.dtype))
        results.append((loss.detach(), leaf.grad))
    return results


def check(lp, product, expected, tolerance=1e-12):
    (loss, gradient), (wanted, wanted_gradient) = both_gradients(lp, product, expected)
    torch.testing.assert_close(loss, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("name", PRESETS)
def test_presets(name, layout):
    objective, batch = PRESETS[name], random_batch()
    lp, mask = batch["lp"], batch["mask"]
    ref = None if objective.reference_free else batch["ref"]
    pairs, where = pairs_of(layout, B), oracle.segments(lp.shape, mask)
    per_pair = {}
    if name == "rebel":
        per_pair["targets"] = torch.stack([batch["rewards"][w] - batch["rewards"][l] for w, l in pairs])  # noqa: E741

    def product(lp):
        return fusedpo.preference_loss(lp, ref, objective=objective, pairs=layout, mask=mask, **per_pair).loss

    def expected(lp):
        loss = oracle.preference(lp, ref, where, pairs, objective, **per_pair)
        if objective.sft_coef:
            loss = loss + objective.sft_coef * oracle.nll(lp, where, where, pairs, objective.sft_aggregation)
        return loss

    check(lp, product, expected)


def test_everything_per_pair_steps_packed():
    """Steps of packed sequences, pairs by number of which some do not count, segments in several pairs."""
    batch = random_batch()
    lp, ref, mask = (batch[name].flatten() for name in ("lp", "ref", "mask"))
    cu_seqlens = torch.tensor([0, 11, 11, 30, B * T])
    steps = torch.randint(-1, S, (B * T,))
    steps[:11] = steps[:11].clamp(max=1)  # sequence 0 has no step 2
    where = oracle.segments(lp.shape, mask, cu_seqlens, steps, S)
    pairs = torch.tensor([[0, 1], [0, 7], [6, 0], [2, 6], [8, 9], [9, 4], [-1, 3], [10, -1], [9, 10], [11, 9]])
    number = len(pairs)
    assert sum(oracle.counts(where, pair) for pair in pairs.tolist()) == 6
    per_pair = {name: torch.rand(number, dtype=torch.float64) for name in ("weights", "margins", "label_smoothing")}
    weights = torch.rand(lp.shape, dtype=torch.float64)
    objective = O.dpo(0.8)

    def product(lp):
        options = {"cu_seqlens": cu_seqlens, "step_ids": steps, "num_steps": S, "token_weights": weights, **per_pair}
        return fusedpo.preference_loss(lp, ref, objective=objective, pairs=pairs, mask=mask, **options).loss

    check(
        lp,
        product,
        lambda lp: oracle.preference(lp, ref, where, pairs.tolist(), objective, token_weights=weights, **per_pair),
    )


def test_halves_and_interleaved_pair_the_same_steps():
    batch = random_batch()
    steps, lp, ref = torch.randint(0, S, (B, T)), batch["lp"], batch["ref"]
    for layout in ("halves", "interleaved"):
        pairs = [(w * S + s, l * S + s) for w, l in pairs_of(layout, B) for s in range(S)]  # noqa: E741
        options = {"objective": O.ipo(), "step_ids": steps, "num_steps": S}
        given = fusedpo.preference_loss(lp, ref, pairs=torch.tensor(pairs), **options)
        torch.testing.assert_close(fusedpo.preference_loss(lp, ref, pairs=layout, **options).loss, given.loss)


def test_padded_is_packed():
    batch = random_batch()
    lp, ref, mask = batch["lp"], batch["ref"], batch["mask"]
    objective = O.dpo(sft_coef=0.5)
    padded = fusedpo.preference_loss(lp.requires_grad_(), ref, objective=objective, mask=mask)
    flat = lp.detach()[mask].requires_grad_()
    cu_seqlens = torch.tensor([0, *mask.sum(1).cumsum(0).tolist()])
    packed = fusedpo.preference_loss(flat, ref[mask], objective=objective, cu_seqlens=cu_seqlens)
    padded.loss.backward()
    packed.loss.backward()
    torch.testing.assert_close(packed.loss, padded.loss)
    torch.testing.assert_close(flat.grad, lp.grad[mask])
    torch.testing.assert_close(packed.metrics, padded.metrics)


def test_what_masked_tokens_hold_is_not_read():
    batch = random_batch()
    mask, nan = batch["mask"], float("nan")
    objective = O.dpo(sft_coef=1.0)
    lp = batch["lp"].masked_fill(~mask, nan).requires_grad_()
    out = fusedpo.preference_loss(lp, batch["ref"].masked_fill(~mask, nan), objective=objective, mask=mask)
    out.loss.backward()
    assert out.loss.isfinite()
    assert (lp.grad[~mask] == 0).all()
    assert all(value.isfinite() for value in out.metrics.values())
    clean = fusedpo.preference_loss(batch["lp"], batch["ref"], objective=objective, mask=mask)
    assert torch.equal(out.loss, clean.loss)


@pytest.mark.parametrize("objective", [O.dpo(), O.orpo(), O.kto(), O.ipo(), O.cpo()], ids=lambda o: o.link)
def test_no_unit_gives_zero(objective):
    lp = torch.randn(4, 3, requires_grad=True)
    options = {"labels": torch.ones(4), "reference_point": 0.0} if objective.link == "kto" else {}
    out = fusedpo.preference_loss(
        lp, None if objective.reference_free else lp.detach(), objective=objective, mask=torch.zeros(4, 3), **options
    )
    out.loss.backward()
    assert out.loss == 0
    assert (lp.grad == 0).all()


def test_kto():
    batch = random_batch()
    objective = O.kto(0.6, desirable_weight=1.3, undesirable_weight=0.4)
    labels, z0, lp = torch.tensor([1, 0, 1, 1, -1, 0]), torch.tensor(0.3), batch["lp"]
    where = oracle.segments(lp.shape, batch["mask"])

    def product(lp):
        options = {"labels": labels, "reference_point": z0, "mask": batch["mask"]}
        return fusedpo.preference_loss(lp, batch["ref"], objective=objective, **options).loss

    check(lp, product, lambda lp: oracle.kto(lp, batch["ref"], where, labels, 0.3, objective), 1e-7)


def test_extreme_margins_saturate():
    """A margin of +-1e4: loss and gradient are the limits, none is nan or infinite."""
    lp = torch.tensor([[-1e4], [-1e-3], [-1e-3], [-1e4]], requires_grad=True)  # halves: (0, 2) wrong, (1, 3) right
    ref = torch.zeros(4, 1)
    for objective in (O.dpo(1.0), O.dpo(1.0, label_smoothing=0.1), O.slic(1.0), O.robust_dpo(1.0), O.cpo(1.0)):
        given = None if objective.reference_free else ref
        (gradient,) = torch.autograd.grad(fusedpo.preference_loss(lp, given, objective=objective).loss, lp)
        assert gradient.isfinite().all()
        e, sft = objective.label_smoothing, objective.sft_coef
        scale = 1 / (1 - 2 * e) if objective.link == "robust" else 1
        wrong = -(1 - e) * scale / 2
        assert gradient[0, 0].item() == pytest.approx(wrong - sft / 2)
        assert gradient[1, 0].item() == pytest.approx(
            (-wrong * e / (1 - e) if e else 0) * (-1 if scale > 1 else 1) - sft / 2
        )
    certain = torch.zeros(2, 3, requires_grad=True)  # probability 1, where the odds are infinite
    loss = fusedpo.preference_loss(certain, None, objective=O.orpo()).loss
    loss.backward()
    assert loss.isfinite()
    assert certain.grad.isfinite().all()


def test_small_gradients_keep_their_digits():
    """Label smoothing: ``e - sigmoid(-b d)``, where ``sigmoid(b d)`` has been rounded to 1."""
    lp = torch.tensor([[20.0], [0.0]], requires_grad=True)
    fusedpo.preference_loss(lp, torch.zeros(2, 1), objective=O.dpo(1.0)).loss.backward()
    assert lp.grad[0, 0].item() == pytest.approx(-1 / (1 + math.exp(20)), rel=1e-6)


def test_denominators_and_scale():
    """Two halves of a batch, divided by what the whole has, add up to the loss of the whole."""
    batch = random_batch()
    objective = O.dpo(sft_coef=0.5)
    lp, ref, mask = batch["lp"], batch["ref"], batch["mask"]
    whole = fusedpo.preference_loss(lp, ref, objective=objective, pairs="interleaved", mask=mask)
    tokens = sum(int(mask[w].sum()) for w, l in pairs_of("interleaved", B) if mask[w].any() and mask[l].any())  # noqa: E741
    parts = [
        fusedpo.preference_loss(
            lp[rows],
            ref[rows],
            objective=objective,
            pairs="interleaved",
            mask=mask[rows],
            denominator=whole.metrics["pairs"],
            sft_denominator=tokens,
            loss_scale=torch.tensor(3.0),
        ).loss
        for rows in (slice(0, 2), slice(2, B))
    ]
    torch.testing.assert_close(sum(parts), 3 * whole.loss)


def test_metrics():
    batch = random_batch()
    lp, ref, mask = batch["lp"], batch["ref"], batch["mask"]
    metrics = fusedpo.preference_loss(lp, ref, objective=O.dpo(0.2), pairs="interleaved", mask=mask).metrics
    z, logps = ((x * mask).sum(1) for x in (lp - ref, lp))
    w, l = torch.tensor([0, 2]), torch.tensor([1, 3])  # noqa: E741
    expected = {
        "rewards_chosen": 0.2 * z[w].mean(),
        "rewards_rejected": 0.2 * z[l].mean(),
        "rewards_margins": 0.2 * (z[w] - z[l]).mean(),
        "rewards_accuracies": (z[w] > z[l]).double().mean(),
        "logps_chosen": logps[w].mean(),
        "logps_rejected": logps[l].mean(),
        "pairs": torch.tensor(2.0),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-6), name
        assert not metrics[name].requires_grad


# ------------------------------------------------------------------------------------------- from logits, hidden states


def head_batch(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, H, generator=generator, dtype=dtype)
    weight = torch.randn(V, H, generator=generator, dtype=dtype)
    ids = torch.randint(0, V, (B, T), generator=generator)
    return hidden, weight, ids


def logprobs_of(logits, ids):
    return logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


@pytest.mark.parametrize("name", ["dpo", "cpo", "ipo", "orpo"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_from_logits_and_hidden(name, dtype):
    objective, batch = PRESETS[name], random_batch()
    hidden, weight, ids = head_batch(dtype)
    mask = batch["mask"]
    ref = None if objective.reference_free else batch["ref"].to(dtype)
    sft_mask = torch.rand(B, T) > 0.3 if objective.sft_coef else None
    options = {"objective": objective, "mask": mask, "sft_mask": sft_mask}

    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    lp = logprobs_of(exact[0] @ exact[1].t() / 1.3, ids)
    pairs, where = pairs_of("halves", B), oracle.segments(lp.shape, mask)
    loss = oracle.preference(lp, None if ref is None else ref.double(), where, pairs, objective)
    if objective.sft_coef:
        sft_where = oracle.segments(lp.shape, sft_mask)
        loss = loss + objective.sft_coef * oracle.nll(lp, where, sft_where, pairs, objective.sft_aggregation)
    (2.5 * loss).backward()
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-6}

    def compare(out, leaves):
        torch.testing.assert_close(out.loss.double(), loss.detach(), **tolerance)
        gradients = torch.autograd.grad(out.loss, leaves, torch.tensor(2.5, dtype=out.loss.dtype))
        for got, want in zip(gradients, exact, strict=True):
            torch.testing.assert_close(got.double(), want.grad, **tolerance)

    for inplace in (False, True):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        logits = leaves[0] @ leaves[1].t()
        out = fusedpo.preference_loss_from_logits(logits, ids, ref, temperature=1.3, inplace=inplace, **options)
        compare(out, leaves)

    for chunk, products in ((None, 3), (2 * T, 3), (3, 4)):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        out = fusedpo.preference_loss_from_hidden(*leaves, ids, ref, temperature=1.3, chunk_tokens=chunk, **options)
        by_kernels = dtype == torch.float32 and backends.NATIVE_MISSING is None
        assert out.metrics["products"] == (products if by_kernels else 4)
        compare(out, leaves)
        used = mask if sft_mask is None else mask | sft_mask
        assert out.metrics["rows"] <= used.sum()


@native
def test_from_hidden_keeps_what_belongs_together_in_one_chunk():
    """Pairs that share a segment: chunks of a whole component, in no order, with a softcap and a bias."""
    hidden, weight, ids = head_batch(torch.float32)
    bias = torch.randn(V)
    ref = torch.randn(B, T)
    pairs = torch.tensor([[0, 3], [3, 5], [1, 4], [2, -1]])
    options = {"objective": O.dpo(0.5), "pairs": pairs, "softcap": 5.0, "bias": bias}

    def run(chunk):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        out = fusedpo.preference_loss_from_hidden(*leaves, ids, ref, chunk_tokens=chunk, **options)
        return out, torch.autograd.grad(out.loss, leaves)

    (three, gradients), (four, wanted) = run(3 * T), run(2 * T)
    assert (three.metrics["products"], four.metrics["products"]) == (3, 4)
    assert three.metrics["rows"] == 5 * T  # sequence 2 is in no pair
    torch.testing.assert_close(three.loss, four.loss)
    torch.testing.assert_close(three.logprobs, four.logprobs)
    torch.testing.assert_close(three.entropy, four.entropy)
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@native
def test_from_hidden_with_a_frozen_head_or_without_gradient():
    hidden, weight, ids = head_batch(torch.float32)
    ref = torch.randn(B, T)
    out = fusedpo.preference_loss_from_hidden(hidden.requires_grad_(), weight, ids, ref, objective=O.dpo())
    assert out.metrics["products"] == 2
    out.loss.backward()
    with pytest.raises(RuntimeError, match="second"):
        out.loss.backward()
    with torch.no_grad():
        alone = fusedpo.preference_loss_from_hidden(hidden, weight, ids, ref, objective=O.dpo())
    assert alone.metrics["products"] == 1
    torch.testing.assert_close(alone.loss, out.loss.detach())


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_shared_prefixes_are_not_evaluated(layout):
    """The same loss and the same gradient of the weight, from fewer rows."""
    hidden, weight, ids = head_batch(torch.float32)
    ref = torch.randn(B, T)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, 0] = False  # a prompt
    shared = [4, 0, T]  # in the last pair the chosen one is the start of the rejected one
    for (w, l), number in zip(pairs_of(layout, B), shared, strict=True):  # noqa: E741
        ids[l, 1 : 1 + number], hidden[l, :number] = ids[w, 1 : 1 + number], hidden[w, :number]
        hidden[l, : number + 1], ref[l, : number + 1] = hidden[w, : number + 1], ref[w, : number + 1]
        if number < T:
            ids[l, 1 + number] = (ids[w, 1 + number] + 1) % V
        else:
            mask[w, 5:] = False

    def run(**options):
        leaf = weight.clone().requires_grad_()
        out = fusedpo.preference_loss_from_hidden(
            hidden, leaf, ids, ref, objective=O.dpo(0.5), pairs=layout, mask=mask, **options
        )
        return out, torch.autograd.grad(out.loss, leaf)[0]

    (whole, wanted), (less, gradient) = run(), run(skip_shared_prefix=True)
    assert whole.metrics["rows"] - less.metrics["rows"] == 2 * (4 + 4)
    torch.testing.assert_close(less.loss, whole.loss)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    assert less.metrics["pairs"] == 3


def test_compile():
    batch = random_batch()
    objective = O.dpo(sft_coef=0.1)
    lp = batch["lp"].float().requires_grad_()
    hidden, weight, ids = head_batch(torch.float32)
    logits = (hidden @ weight.t()).requires_grad_()
    ref = batch["ref"].float()

    def from_logprobs(lp):
        return fusedpo.preference_loss(lp, ref, objective=objective, mask=batch["mask"]).loss

    def from_logits(logits):
        return fusedpo.preference_loss_from_logits(logits, ids, ref, objective=O.ipo(), mask=batch["mask"]).loss

    for function, leaf in ((from_logprobs, lp), (from_logits, logits)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        gradients = [torch.autograd.grad(f(leaf), leaf)[0] for f in (function, compiled)]
        torch.testing.assert_close(*gradients)


# ----------------------------------------------------------------------------------------------------------- regression


def test_regression_and_its_edges():
    batch = random_batch()
    lp, ref, mask = batch["lp"], batch["ref"], batch["mask"]
    steps = torch.randint(-1, S, (B, T))
    targets = torch.randn(B, S, dtype=torch.float64)
    targets[0, 1] = float("nan")
    weights = torch.rand(B, S, dtype=torch.float64)
    where = oracle.segments(lp.shape, mask, None, steps, S)

    def product(lp):
        options = {"mask": mask, "step_ids": steps, "num_steps": S, "weights": weights}
        return fusedpo.regression_loss(lp, ref, targets, beta=0.3, scale=0.5, **options).loss

    def expected(lp):
        terms = [
            0.5 * w * (0.3 * z - t) ** 2
            for z, t, w, tokens in zip(
                oracle.sums(lp, ref, where), targets.flatten(), weights.flatten(), where, strict=True
            )
            if tokens and not t.isnan()
        ]
        return sum(terms) / len(terms)

    check(lp, product, expected)


def test_a_star_po_is_at_rest_at_its_optimum():
    """``pi* = ref exp((r - V) / b)``: every residual is 0, so is the gradient."""
    ref, rewards, beta = torch.randn(8, dtype=torch.float64).log_softmax(0), torch.rand(8, dtype=torch.float64), 0.2
    value = beta * (ref + rewards / beta).logsumexp(0)
    lp = (ref + (rewards - value) / beta)[:, None].requires_grad_()
    out = fusedpo.regression_loss(lp, ref[:, None], rewards - value, beta=beta)
    out.loss.backward()
    assert out.loss < 1e-28
    assert lp.grad.abs().max() < 1e-14


def test_direct_advantage_moves_as_the_regularised_objective_does():
    """At one state, its expected gradient is ``-1 / b`` times that of ``E[A] - b KL(pi || ref)``."""
    beta = 0.3
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ref, a = torch.randn(5, dtype=torch.float64).log_softmax(0), torch.randn(5, dtype=torch.float64)
    lp = x.log_softmax(0)
    p = lp.exp()
    (wanted,) = torch.autograd.grad((p * a).sum() - beta * (p * (lp - ref)).sum(), x, retain_graph=True)
    loss = fusedpo.regression_loss(
        lp[:, None], ref[:, None], a, beta=beta, scale=0.5 / beta**2, weights=p.detach(), denominator=1
    ).loss
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(-beta * gradient, wanted)


# ---------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("how", ["best_worst", "all"])
def test_pairs_from_rewards(how):
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.5, 2.0, 2.0, float("nan"), 7.0, 1.0, 0.9])
    groups = torch.tensor([5, 5, 5, 5, 1, 1, 1, 3, 2, 2])
    pairs = fusedpo.pairs_from_rewards(rewards, group_ids=groups, how=how, margin=0.2)
    if how == "best_worst":
        assert pairs.tolist() == [[0, 1]]
    else:
        assert pairs.tolist() == [[0, 1], [0, 3], [2, 1], [2, 3], [3, 1]]
    assert fusedpo.pairs_from_rewards(torch.ones(4), group_size=2, how=how).shape == (0, 2)
    masked = fusedpo.pairs_from_rewards(rewards[:4], group_size=4, how=how, mask=torch.tensor([0, 1, 0, 1]))
    assert masked.tolist() == [[3, 1]]


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "build",
    [
        lambda: Preference("sigmod"),
        lambda: Preference(beta=0.0),
        lambda: Preference(label_smoothing=1.5),
        lambda: Preference("robust", label_smoothing=0.5),
        lambda: Preference("hinge", label_smoothing=0.1),
        lambda: Preference("sigmoid", target=1.0),
        lambda: Preference("odds"),
        lambda: Preference("kto", margin=1.0),
        lambda: Preference("kto", sft_coef=1.0),
        lambda: Preference("sigmoid", desirable_weight=2.0),
        lambda: Preference(sft_aggregation="mean"),
        lambda: O.rebel(0.0),
    ],
)
def test_parts_that_disagree(build):
    with pytest.raises(ValueError, match="Preference|rebel"):
        build()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ref_logprobs": None}, ValueError, "ref_logprobs"),
        ({"objective": O.simpo()}, ValueError, "ref_logprobs"),
        ({"objective": O.ppo()}, TypeError, "objective"),
        ({"objective": O.rebel()}, ValueError, "targets"),
        ({"objective": O.kto()}, ValueError, "labels"),
        ({"objective": O.kto(), "labels": torch.ones(4)}, ValueError, "reference_point"),
        ({"labels": torch.ones(4)}, ValueError, "labels"),
        ({"targets": torch.ones(2)}, ValueError, "targets"),
        ({"pairs": "thirds"}, ValueError, "pairs"),
        ({"pairs": torch.tensor([[0, 4]])}, ValueError, "pairs"),
        ({"pairs": torch.tensor([0, 1])}, ValueError, "pairs"),
        ({"pairs": torch.tensor([[0.0, 1.0]])}, TypeError, "pairs"),
        ({"weights": torch.ones(3)}, ValueError, "weights"),
        ({"label_smoothing": torch.tensor([0.1, 1.2])}, ValueError, "label_smoothing"),
        ({"objective": O.slic(), "label_smoothing": torch.zeros(2)}, ValueError, "label_smoothing"),
        ({"denominator": -1.0}, ValueError, "denominator"),
        ({"sft_mask": torch.ones(4, 3)}, ValueError, "sft_mask"),
        ({"logprobs": torch.zeros(3, 3), "ref_logprobs": torch.zeros(3, 3)}, ValueError, "even"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    given = {"logprobs": torch.zeros(4, 3), "ref_logprobs": torch.zeros(4, 3), "objective": O.dpo(), **change}
    with pytest.raises(error, match=message):
        fusedpo.preference_loss(given.pop("logprobs"), given.pop("ref_logprobs"), **given)


def test_what_cannot_skip_a_prefix_says_so():
    logits, ids = torch.zeros(4, 3, V), torch.zeros(4, 3, dtype=torch.int64)
    for objective, pairs in ((O.ipo(), "halves"), (O.dpo(sft_coef=1.0), "halves"), (O.dpo(), torch.tensor([[0, 1]]))):
        with pytest.raises(ValueError, match="skip_shared_prefix"):
            fusedpo.preference_loss_from_logits(
                logits, ids, torch.zeros(4, 3), objective=objective, pairs=pairs, skip_shared_prefix=True
            )
