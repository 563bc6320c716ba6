"""OREO, soft values and interpolated advantages against their definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fusedpo
from fusedpo import advantages as A

B, T, S = 4, 8, 3
BETA = 0.3


def random_batch():
    mask = torch.rand(B, T) > 0.25
    mask[2] = False
    steps = torch.arange(T).mul(S).div(T, rounding_mode="floor").expand(B, T).clone()
    steps[0, :2] = -1  # tokens before the first step
    return {
        "lp": -torch.rand(B, T, dtype=torch.float64),
        "ref": -torch.rand(B, T, dtype=torch.float64),
        "values": torch.randn(B, T, dtype=torch.float64),
        "rewards": torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64),
        "mask": mask,
        "steps": steps,
    }


def states_of(kept, steps, gradient):
    """The kept tokens before which there is a state."""
    if gradient == "sequence":
        return kept[:1]
    if steps is None:
        return kept
    return [t for i, t in enumerate(kept) if steps[t] >= 0 and steps[t] not in {int(steps[u]) for u in kept[:i]}]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("gradient", "by_step"),
    [("token", False), ("step", True), ("suffix", False), ("suffix", True), ("sequence", False)],
)
def test_oreo(gradient, by_step, packed):
    """Losses from their sums; the coefficient of every token as the paper's gradient has it."""
    batch = random_batch()
    lp, ref, values, mask = (batch[name] for name in ("lp", "ref", "values", "mask"))
    steps = batch["steps"] if by_step else None
    losses, (of_values, coefficients) = [], torch.zeros(2, B, T, dtype=torch.float64).unbind()
    rows = [b for b in range(B) if mask[b].any()]
    for b in rows:
        kept = [t for t in range(T) if mask[b, t]]
        row_steps = None if steps is None else [int(s) for s in steps[b]]
        states = states_of(kept, row_steps, gradient)
        deltas = {}
        for t in states:
            ahead = sum((lp[b, u] - ref[b, u]).item() for u in kept if u >= t)
            deltas[t] = values[b, t].item() - batch["rewards"][b].item() + BETA * ahead
        losses.append(sum(d * d for d in deltas.values()) / len(states))
        share = 2 / (len(rows) * len(states))
        for t, d in deltas.items():
            of_values[b, t] = share * d
            through = {
                "token": [t],
                "step": [u for u in kept if row_steps and row_steps[u] == row_steps[t]],
                "suffix": [u for u in kept if u >= t],
                "sequence": kept,
            }[gradient]
            for u in through:
                coefficients[b, u] += share * BETA * d
    expected = sum(losses) / len(rows)

    options = {"mask": mask, "step_ids": steps, "num_steps": S if by_step else None}
    inputs = [lp.masked_fill(~mask, float("nan")), ref.masked_fill(~mask, float("nan")), values]
    if packed:
        options = {k: v.reshape(-1) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        options["cu_seqlens"] = torch.arange(B + 1) * T
        inputs = [x.reshape(-1) for x in inputs]
    inputs[0].requires_grad_()
    inputs[2].requires_grad_()
    out = fusedpo.oreo_loss(*inputs, batch["rewards"], beta=BETA, gradient=gradient, **options)
    assert out.policy_loss.item() == pytest.approx(expected, rel=1e-12)
    assert out.value_loss.item() == pytest.approx(expected, rel=1e-12)
    assert out.metrics["sequences"] == len(rows)
    gradients = torch.autograd.grad(out.policy_loss, inputs[0], torch.tensor(1.7, dtype=torch.float64))[0]
    torch.testing.assert_close(gradients.reshape(B, T), 1.7 * coefficients)
    gradients = torch.autograd.grad(out.value_loss, inputs[2])[0]
    torch.testing.assert_close(gradients.reshape(B, T), of_values)


def test_oreo_clips_the_sums_that_the_values_see():
    lp, ref, values = torch.full((1, 2), 3.0), torch.zeros(1, 2), torch.zeros(1, 2)
    out = fusedpo.oreo_loss(lp, ref, values, torch.ones(1), beta=1.0, clip_log=4.0)
    assert out.policy_loss.item() == pytest.approx(((6 - 1) ** 2 + (3 - 1) ** 2) / 2)
    assert out.value_loss.item() == pytest.approx(((4 - 1) ** 2 + (3 - 1) ** 2) / 2)


def test_oreo_is_at_rest_at_the_soft_optimum():
    """One decision: ``pi* = ref exp((R - V) / b)`` and the soft value give the residual 0."""
    ref, r = torch.randn(5, dtype=torch.float64).log_softmax(0), torch.rand(5, dtype=torch.float64)
    value = BETA * (ref + r / BETA).logsumexp(0)
    lp = (ref + (r - value) / BETA)[:, None]
    out = fusedpo.oreo_loss(lp, ref[:, None], value.expand(5, 1), r, beta=BETA)
    assert out.policy_loss < 1e-28


def test_oreo_compiles():
    batch = random_batch()
    lp = batch["lp"].requires_grad_()

    def loss(lp):
        arguments = (batch["ref"], batch["values"], batch["rewards"])
        return fusedpo.oreo_loss(lp, *arguments, beta=BETA, gradient="suffix", mask=batch["mask"]).policy_loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(lp), lp)[0] for f in (loss, compiled)))


@pytest.mark.parametrize(
    "change",
    [
        {"gradient": "tokens"},
        {"gradient": "step"},
        {"gradient": "token", "step_ids": torch.zeros(2, 3, dtype=torch.int64)},
        {"rewards": torch.zeros(3)},
        {"values": torch.zeros(2)},
        {"beta": 0.0},
        {"clip_log": -1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_oreo_errors(change):
    given = {"values": torch.zeros(2, 3), "rewards": torch.zeros(2), "beta": 0.1, **change}
    with pytest.raises(ValueError, match="|".join(change)):
        fusedpo.oreo_loss(torch.zeros(2, 3), torch.zeros(2, 3), given.pop("values"), given.pop("rewards"), **given)


# ----------------------------------------------------------------------------------------------------------- soft value


@pytest.mark.parametrize("beta", [1e-3, 0.5, 3.0, 1e6])
def test_soft_value(beta):
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.3, 7.0, float("nan")], dtype=torch.float64)
    groups, mask = torch.tensor([3, 3, 3, 3, 8, 5, 3]), torch.tensor([1, 1, 1, 1, 1, 0, 0])
    value = A.soft_value(rewards, beta=beta, group_ids=groups, mask=mask)
    # binary, 2 of 4 right: beta log(1 + (e^(1 / beta) - 1) / 2), which overflows as it stands
    expected = 1 + beta * math.log((1 + math.exp(-1 / beta)) / 2)
    torch.testing.assert_close(value[:4], torch.full((4,), expected, dtype=torch.float64), rtol=1e-9, atol=0)
    assert value[4:].tolist() == [0.3, 0.0, 0.0]


def test_soft_value_lies_between_its_limits():
    rewards = torch.randn(12)
    limits = [A.soft_value(rewards, beta=beta, group_size=4) for beta in (0.0, 1e-2, 1.0, 1e9, math.inf)]
    for higher, lower in itertools.pairwise(limits):
        assert (higher >= lower - 1e-6).all()
    torch.testing.assert_close(limits[0][::4], rewards.view(3, 4).amax(1))
    torch.testing.assert_close(limits[-1][::4], rewards.view(3, 4).mean(1))
    torch.testing.assert_close(limits[-2], limits[-1])
    with pytest.raises(ValueError, match="beta"):
        A.soft_value(rewards, beta=-1.0, group_size=4)


@pytest.mark.parametrize(("p", "bias"), [(0.1, -0.040), (0.5, -0.021)])
def test_soft_value_of_few_samples_is_biased(p, bias):
    """Enumerated: the number of right ones among 8 is binomial."""
    mean = 0.0
    for right in range(9):
        rewards = torch.tensor([1.0] * right + [0.0] * (8 - right), dtype=torch.float64)
        probability = math.comb(8, right) * p**right * (1 - p) ** (8 - right)
        mean += probability * A.soft_value(rewards, beta=0.5, group_size=8)[0].item()
    exact = 0.5 * math.log(1 - p + p * math.exp(2))
    assert mean - exact == pytest.approx(bias, abs=6e-4)


# ---------------------------------------------------------------------------------------------------------- interpolate


def test_interpolate():
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 1, 0, 0, 0], [1] * 8, [0] * 8])
    places = torch.tensor([[1, 4, -1], [-1, 2, -1], [-1, -1, -1], [0, 1, 2]])
    anchors = torch.tensor([[3.0, 9.0, math.nan], [math.nan, 2.0, math.nan], [math.nan] * 3, [1.0, 2.0, 3.0]])
    got = A.interpolate(anchors, places, mask)
    assert got.tolist() == [[3, 3, 0, 5, 7, 9, 0, 9], [0, 2, 2, 2, 2, 0, 0, 0], [0] * 8, [0] * 8]
    assert A.interpolate(anchors[:, :0], places[:, :0], mask).tolist() == [[0] * 8] * 4
    assert A.interpolate(anchors.double(), places.int(), mask.bool()).dtype == torch.float64
    with pytest.raises(ValueError, match="ascend"):
        A.interpolate(anchors, places.flip(1), mask)
