"""Importance weights and rejection masks against plain loops, and their use in the loss."""

import itertools
import math

import pytest
import torch
from support.policy_loss import pack, random_batch

import fusedpo
from fusedpo import objectives as O
from fusedpo.corrections import CRITERIA, importance_weights, rejection_mask

INF, NAN = math.inf, math.nan


pytestmark = pytest.mark.usefixtures("on_the_reference")


def random_logprobs(rows=6, width=7, seed=0, spread=0.3):
    """Log-probs by the trainer, by the policy that sampled, and a mask with holes; the last sequence is masked."""
    batch = random_batch(rows, width, seed, spread=spread)
    return batch["logprobs"], batch["old_logprobs"], batch["mask"]


def log_ratios(old, rollout, mask):
    """Of the kept tokens of each sequence, by position."""
    return [
        {t: a - b for t, (a, b, k) in enumerate(zip(*row, strict=True)) if k}
        for row in zip(old.tolist(), rollout.tolist(), mask.tolist(), strict=True)
    ]


# --------------------------------------------------------------------------------------------------- importance weights


def define_weights(old, rollout, mask, level, mode, low, high, normalise):
    rows = log_ratios(old, rollout, mask)
    weights, kept = torch.zeros_like(old), torch.zeros_like(mask)
    for b, row in enumerate(rows):
        for t, x in row.items():
            w = math.exp(max(-20, min(20, x if level == "token" else math.fsum(row.values()))))
            outside = (low is not None and w < low) or (high is not None and w > high)
            if mode == "truncate":
                w = min(max(w, low or 0), high or INF)
            weights[b, t] = 0.0 if outside and mode != "truncate" else w
            kept[b, t] = not (outside and mode == "reject")
    if normalise:
        if level == "token":
            weights /= weights.sum() / kept.sum()
        else:
            means = [weights[b][k].mean() for b, k in enumerate(kept) if k.any()]
            weights /= sum(means) / len(means)
    return weights, kept


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask", "reject"])
@pytest.mark.parametrize(("low", "high"), [(None, 1.1), (0.8, None), (0.7, 1.3), (None, None)])
@pytest.mark.parametrize("normalise", [False, True])
def test_weights_are_those_of_the_definition(level, mode, low, high, normalise):
    arrays = random_logprobs(seed=1)
    expected = define_weights(*arrays, level, mode, low, high, normalise)
    old, rollout, mask = arrays
    options = {"level": level, "mode": mode, "low": low, "high": high, "normalise": normalise}
    result = importance_weights(old, rollout, mask=mask, **options)
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=0)
    assert not result[0][~mask].any()

    lengths = [7, 0, 4, 5, 1, 7]
    inside = torch.arange(7) < torch.tensor(lengths)[:, None]
    packed = pack({"old_logprobs": old, "rollout_logprobs": rollout, "mask": mask}, lengths)
    padded = importance_weights(old, rollout, mask=mask & inside, **options)
    for x, y in zip(importance_weights(**packed, **options), padded, strict=True):
        assert torch.equal(x, y[inside])


def test_the_default_is_truncation_of_tokens_at_two():
    old, rollout = torch.tensor([0.0, 0.0, 0.0, 0.0]), torch.tensor([-0.5, -3.0, 1.0, -100.0])
    weights, mask = importance_weights(old, rollout)
    torch.testing.assert_close(weights, torch.tensor([math.exp(0.5), 2.0, math.exp(-1.0), 2.0]))
    assert mask.all()
    assert mask.dtype == torch.bool


def test_log_ratios_are_clamped():
    old = torch.zeros(4, dtype=torch.float64)
    rollout = torch.tensor([-30.0, 30.0, -INF, INF], dtype=torch.float64)
    weights, _ = importance_weights(old, rollout, high=None)
    torch.testing.assert_close(weights.log(), torch.tensor([20.0, -20.0, 20.0, -20.0], dtype=torch.float64))
    weights, _ = importance_weights(old, torch.full_like(old, -15.0), high=None, level="sequence")
    torch.testing.assert_close(weights.log(), torch.full_like(old, 20.0))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask", "reject"])
def test_masked_garbage_reaches_nothing(level, mode):
    old, rollout, mask = random_logprobs()
    options = {"mask": mask, "level": level, "mode": mode, "low": 0.8, "high": 1.2, "normalise": True}
    expected = importance_weights(old, rollout, **options)
    for garbage in (NAN, INF, -INF):
        spoilt = (x.masked_fill(~mask, garbage) for x in (old, rollout))
        assert all(map(torch.equal, importance_weights(*spoilt, **options), expected))


def test_nothing_is_kept():
    old = torch.full((2, 3), NAN)
    for mode, normalise in itertools.product(("truncate", "reject"), (False, True)):
        weights, mask = importance_weights(
            old, old, mask=torch.zeros(2, 3), mode=mode, normalise=normalise, level="sequence"
        )
        assert not weights.any()
        assert not mask.any()
    weights, mask = importance_weights(torch.zeros(3), torch.ones(3), mode="reject", low=0.5, normalise=True)
    assert not weights.any()
    assert not mask.any()


def test_weights_carry_no_gradient():
    old, rollout, mask = random_logprobs()
    weights, _ = importance_weights(old.requires_grad_(), rollout.requires_grad_(), mask=mask)
    assert not weights.requires_grad
    assert weights.dtype == torch.float64
    assert importance_weights(old.bfloat16(), rollout.bfloat16())[0].dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------ rejection


def define_rejection(old, rollout, mask, criteria):
    passed = mask.clone()
    for b, row in enumerate(log_ratios(old, rollout, mask)):
        for name, bound in criteria.items():
            level, kind = name.rsplit("_", 1)
            values = {}
            for t, x in row.items():
                x = max(-20.0, min(20.0, x))
                values[t] = {"k1": -x, "k2": x * x / 2, "k3": math.exp(x) - 1 - x}[kind]
            if level != "token" and row:
                total = math.fsum(values.values())
                value = {"seq_sum": total, "seq_mean": total / len(row), "seq_max": max(values.values())}[level]
                values = dict.fromkeys(values, value)
            for t, value in values.items():
                if kind == "k1":
                    low, high = bound if isinstance(bound, tuple) else (1 / bound, bound)
                    passed[b, t] &= low <= math.exp(value) <= high
                else:
                    passed[b, t] &= value <= bound
    return passed


BOUNDS = {
    "token_k1": (0.8, 1.4),
    "token_k2": 0.05,
    "token_k3": 0.04,
    "seq_sum_k1": 2.0,
    "seq_sum_k2": 0.3,
    "seq_sum_k3": 0.4,
    "seq_mean_k1": (0.9, 1.2),
    "seq_mean_k2": 0.06,
    "seq_mean_k3": 0.07,
    "seq_max_k2": 0.2,
    "seq_max_k3": 0.25,
}
assert set(BOUNDS) == set(CRITERIA)


@pytest.mark.parametrize("name", CRITERIA)
def test_rejection_is_that_of_the_definition(name):
    criteria, results = {name: BOUNDS[name]}, []
    for seed in range(4):
        old, rollout, mask = random_logprobs(6, 8, seed)
        result = rejection_mask(old, rollout, criteria, mask=mask)
        assert torch.equal(result, define_rejection(old, rollout, mask, criteria))
        results.append(result[mask])

        lengths = [8, 3, 0, 5, 1, 8]
        inside = torch.arange(8) < torch.tensor(lengths)[:, None]
        packed = pack({"old_logprobs": old, "rollout_logprobs": rollout, "mask": mask}, lengths)
        padded = rejection_mask(old, rollout, criteria, mask=mask & inside)
        assert torch.equal(rejection_mask(**packed, criteria=criteria), padded[inside])
    assert 0 < torch.cat(results).double().mean() < 1  # some pass, some do not


def test_all_criteria_must_pass():
    old, rollout, mask = random_logprobs(6, 8)
    criteria = {"token_k1": (0.6, 1.5), "seq_mean_k3": 0.1, "seq_max_k2": 0.5}
    expected = mask
    for name, bound in criteria.items():
        expected = expected & rejection_mask(old, rollout, {name: bound}, mask=mask)
    result = rejection_mask(old, rollout, criteria, mask=mask)
    assert torch.equal(result, expected)
    assert torch.equal(result, define_rejection(old, rollout, mask, criteria))
    assert torch.equal(rejection_mask(old, rollout, {}, mask=mask), mask)


@pytest.mark.parametrize("name", CRITERIA)
def test_masked_garbage_rejects_nothing(name):
    old, rollout, mask = random_logprobs(6, 8)
    expected = rejection_mask(old, rollout, {name: BOUNDS[name]}, mask=mask)
    spoilt = (x.masked_fill(~mask, garbage) for x, garbage in ((old, NAN), (rollout, INF)))
    assert torch.equal(rejection_mask(*spoilt, {name: BOUNDS[name]}, mask=mask), expected)


def test_a_token_without_log_prob_is_rejected():
    old, rollout = torch.zeros(2, 3), torch.zeros(2, 3)
    rollout[0, 1] = NAN
    assert rejection_mask(old, rollout, {"token_k1": 2.0}).tolist() == [[True, False, True], [True, True, True]]
    assert rejection_mask(old, rollout, {"seq_max_k2": 2.0}).tolist() == [[False] * 3, [True] * 3]


def test_mis_is_the_rejection_of_sequences_and_its_weights():
    old, rollout, mask = random_logprobs(8, 6)
    weights, kept = importance_weights(old, rollout, mask=mask, level="sequence", mode="reject", low=0.8, high=1.25)
    assert torch.equal(kept, rejection_mask(old, rollout, {"seq_sum_k1": 1.25}, mask=mask))
    truncated, _ = importance_weights(old, rollout, mask=kept, level="sequence", high=1.25)
    assert torch.equal(weights, truncated)
    assert 0 < kept.sum() < mask.sum()


# ---------------------------------------------------------------------------------------------------------- in the loss


def test_decoupled_ppo():
    batch = random_batch()
    lp, proximal, mask = batch["logprobs"].requires_grad_(), batch["old_logprobs"], batch["mask"]
    behaviour, a = batch["ref_logprobs"], batch["advantages"]
    is_weights, mask = importance_weights(proximal, behaviour, mask=mask, high=None)
    loss = fusedpo.policy_loss(lp, proximal, a, objective=O.ppo(0.1, 0.2), mask=mask, is_weights=is_weights).loss

    ratio, weight = (lp - proximal).exp(), (proximal - behaviour).exp()
    expected = -(weight * torch.minimum(ratio * a, ratio.clamp(0.9, 1.2) * a))[mask].mean()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(*(torch.autograd.grad(x, lp)[0] for x in (loss, expected)), rtol=1e-12, atol=1e-14)


def test_masked_weights_count_in_the_denominator_and_rejected_tokens_do_not():
    lp, a = torch.full((4,), -1.0), torch.ones(4)
    rollout = torch.tensor([-1.0, -1.0, -1.0, -5.0])
    losses = []
    for mode in ("mask", "reject"):
        is_weights, mask = importance_weights(lp, rollout, mode=mode)
        losses.append(fusedpo.policy_loss(lp, lp, a, objective=O.ppo(), mask=mask, is_weights=is_weights).loss.item())
    assert losses == [-0.75, -1.0]


# --------------------------------------------------------------------------------------------------------------- errors

LP = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("error", "argument", "given"),
    [
        (TypeError, "old_logprobs", {"old_logprobs": [0.0]}),
        (TypeError, "old_logprobs", {"old_logprobs": LP.long()}),
        (ValueError, "old_logprobs", {"old_logprobs": torch.zeros(2, 3, 4)}),
        (TypeError, "rollout_logprobs", {"rollout_logprobs": LP.bool()}),
        (ValueError, "rollout_logprobs", {"rollout_logprobs": torch.zeros(2, 4)}),
        (ValueError, "rollout_logprobs", {"rollout_logprobs": LP.to("meta")}),
        (ValueError, "mask", {"mask": torch.zeros(3, 2)}),
        (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 6])}),
    ],
)
def test_errors_name_the_argument(error, argument, given):
    right = {"old_logprobs": LP, "rollout_logprobs": LP}
    with pytest.raises(error, match=rf"^{argument}\b"):
        importance_weights(**right | given)
    with pytest.raises(error, match=rf"^{argument}\b"):
        rejection_mask(**right | given, criteria={})


@pytest.mark.parametrize(
    ("argument", "given"),
    [
        ("level", {"level": "turn"}),
        ("mode", {"mode": "clip"}),
        ("low and high", {"low": 0.0}),
        ("low and high", {"high": -1.0}),
        ("low and high", {"high": NAN}),
        ("low and high", {"low": 3.0}),
    ],
)
def test_options_outside_the_domain(argument, given):
    with pytest.raises(ValueError, match=rf"^{argument}\b"):
        importance_weights(LP, LP, **given)


@pytest.mark.parametrize(
    "criteria",
    [
        {"seq_max_k1": 2.0},
        {"k1": 2.0},
        {"token_k1": 0.0},
        {"token_k1": 0.5},
        {"seq_sum_k1": (0.0, 2.0)},
        {"seq_sum_k1": (3.0, 2.0)},
        {"token_k2": 0.0},
        {"token_k3": (0.1, 0.2)},
    ],
)
def test_criteria_outside_the_domain(criteria):
    with pytest.raises(ValueError, match=r"^criteria\b"):
        rejection_mask(LP, LP, criteria)


@pytest.mark.slow
def test_compiles_without_a_break():
    def loss(lp, old, rollout, a, mask):
        weights, mask = importance_weights(old, rollout, mask=mask, level="sequence", mode="mask", normalise=True)
        mask = rejection_mask(old, rollout, {"seq_max_k3": 0.5, "token_k1": 2.0}, mask=mask)
        return fusedpo.policy_loss(lp, old, a, objective=O.ppo(), mask=mask, is_weights=weights).loss

    batch = random_batch(3, 5)
    names = ("logprobs", "old_logprobs", "ref_logprobs", "advantages", "mask")
    arrays = [batch[name] for name in names]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arrays), loss(*arrays))


# ----------------------------------------------------------------------------------------------------------------- verl


@pytest.fixture
def verl():
    return pytest.importorskip(
        "verl.trainer.ppo.rollout_corr_helper", reason="verl is not installed", exc_type=ImportError
    )


def log_ratios_with_outliers():
    """Beyond the clamp at two tokens; one sequence is masked."""
    old, rollout, mask = random_logprobs(rows=12, seed=3, spread=0.4)
    mask[:2, :2] = True
    log_ratio = (old - rollout).float()
    log_ratio[0, 0], log_ratio[1, 1] = 50, -60
    return log_ratio, mask


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("threshold", "mode", "low"), [(2.0, "truncate", None), ("0.5_2.0", "mask", 0.5)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_are_verls(verl, level, threshold, mode, low, normalise):
    log_ratio, mask = log_ratios_with_outliers()
    expected, _ = verl.compute_rollout_correction_weights(log_ratio, mask.float(), level, threshold, normalise)
    options = {"level": level, "mode": mode, "low": low, "high": 2.0, "normalise": normalise}
    weights, _ = importance_weights(log_ratio, torch.zeros_like(log_ratio), mask=mask, **options)
    assert expected.any()
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("name", CRITERIA)
def test_rejections_are_verls(verl, name):
    assert set(CRITERIA) == verl.SUPPORTED_ROLLOUT_RS_OPTIONS
    log_ratio, mask = log_ratios_with_outliers()
    pairs = [(2.0, 2.0), ("0.5_3.0", (0.5, 3.0))] if name.endswith("k1") else [(0.5, 0.5)]
    for threshold, bounds in pairs:
        expected, _ = verl.compute_rollout_rejection_mask(log_ratio, mask.float(), name, threshold)
        passed = rejection_mask(log_ratio, torch.zeros_like(log_ratio), {name: bounds}, mask=mask)
        assert 0 < passed.sum() < mask.sum()
        torch.testing.assert_close(passed, expected.bool())
