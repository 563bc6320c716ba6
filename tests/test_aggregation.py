"""Aggregation as a function of its own, the denominator of a batch on several ranks, and the loss of a value model."""

import itertools
import math
import socket
from types import SimpleNamespace

import pytest
import torch
from support import policy_loss as contract
from support.policy_loss import AGGREGATIONS, INF, NAN, pack, random_batch
from torch import distributed as dist
from torch.autograd import gradcheck
from torch.nn.parallel import DistributedDataParallel

import fusedpo
from fusedpo import objectives as O
from fusedpo.aggregation import aggregate, global_denominator
from fusedpo.values import value_loss


def define(values, mask, aggregation, length_norm=None):
    return contract.aggregate(SimpleNamespace(aggregation=aggregation, length_norm=length_norm), values, mask)


# ---------------------------------------------------------------------------------------------------------- aggregation


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregate(aggregation):
    batch = random_batch(4, 5)
    tokens, mask = batch["advantages"].masked_fill(~batch["mask"], NAN).requires_grad_(), batch["mask"]
    length_norm = 8.0 if aggregation.endswith("norm") else None
    result = aggregate(tokens, aggregation, mask=mask, length_norm=length_norm)
    expected = define(tokens.tolist(), mask.tolist(), aggregation, length_norm)
    assert result.item() == pytest.approx(expected, rel=1e-13)
    (gradient,) = torch.autograd.grad(result, tokens)
    assert gradient.isfinite().all()
    assert torch.equal(gradient != 0, mask)

    lengths = [5, 2, 0, 4]
    inside = torch.arange(5) < torch.tensor(lengths)[:, None]
    packed = pack({"tokens": tokens.detach(), "mask": mask}, lengths)
    padded = aggregate(tokens, aggregation, mask=mask & inside, length_norm=length_norm)
    assert torch.equal(aggregate(**packed, aggregation=aggregation, length_norm=length_norm), padded)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregate_is_the_reduction_of_the_policy_loss(aggregation):
    batch = random_batch()
    objective = O.Objective(aggregation=aggregation)
    tokens = fusedpo.policy_loss(**batch, objective=objective, reduction="none").loss
    assert torch.equal(
        aggregate(tokens, aggregation, mask=batch["mask"]), fusedpo.policy_loss(**batch, objective=objective).loss
    )
    if aggregation != "token-sum":
        whole = fusedpo.policy_loss(**batch, objective=objective, denominator=7).loss
        assert torch.equal(aggregate(tokens, aggregation, mask=batch["mask"], denominator=7), whole)


def test_nothing_to_aggregate_is_a_connected_zero():
    for shape in ((2, 3), (0, 3), (0,)):
        tokens = torch.full(shape, NAN, requires_grad=True)
        loss = aggregate(tokens, mask=torch.zeros(shape))
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(tokens.grad, torch.zeros(shape))


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (TypeError, "tokens", {"tokens": torch.zeros(2, 3, dtype=torch.int64)}),
        (ValueError, "tokens", {"tokens": torch.zeros(())}),
        (ValueError, "mask", {"mask": torch.zeros(3)}),
        (ValueError, "Objective: aggregation", {"aggregation": "mean"}),
        (ValueError, "Objective: length_norm", {"length_norm": 4.0}),
        (ValueError, "denominator", {"denominator": -1}),
        (ValueError, "denominator", {"denominator": 4, "aggregation": "token-sum"}),
        (TypeError, "denominator", {"denominator": "4"}),
    ],
)
def test_errors_of_aggregate(error, message, given):
    with pytest.raises(error, match=rf"^{message}\b"):
        aggregate(**{"tokens": torch.zeros(2, 3)} | given)


# --------------------------------------------------------------------------------------------------- global denominator


def test_what_is_counted():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0]])
    for dtype, aggregation in itertools.product((torch.bool, torch.int64, torch.float32), AGGREGATIONS):
        if aggregation == "token-sum":
            continue
        count = global_denominator(mask.to(dtype), O.Objective(aggregation=aggregation))
        assert count.item() == (3 if aggregation == "token-mean" else 2)
        assert count.dtype == torch.float32
    flat, offsets = mask.flatten(), torch.tensor([0, 1, 3, 6, 6, 9])
    assert global_denominator(flat, O.grpo(), cu_seqlens=offsets).item() == 3
    assert global_denominator(flat[None], O.grpo(), cu_seqlens=offsets).item() == 3
    assert global_denominator(flat, O.grpo()).item() == 1
    assert global_denominator(torch.zeros(0, 3), O.grpo()).item() == 0


@pytest.mark.parametrize(
    ("error", "message", "mask", "objective"),
    [
        (TypeError, "objective", torch.ones(2, 3), 0.2),
        (ValueError, "objective", torch.ones(2, 3), O.ppo(aggregation="token-sum")),
        (TypeError, "mask", [[1]], O.ppo()),
        (ValueError, "mask", torch.ones(2, 3, 4), O.ppo()),
    ],
)
def test_errors_of_global_denominator(error, message, mask, objective):
    with pytest.raises(error, match=rf"^{message}\b"):
        global_denominator(mask, objective)


FEATURES = 3
OBJECTIVES = [O.ppo(0.1, 0.2), O.grpo(0.1, 0.2), O.dr_grpo(0.1, 0.2, length_norm=16.0)]


def features_and_batch():
    """Eight sequences with very different numbers of kept tokens, whose log-probs a linear model predicts."""
    batch = random_batch(8, 6, seed=7)
    batch["mask"] &= torch.arange(6) < torch.tensor([6, 5, 6, 4, 1, 0, 2, 1])[:, None]
    features = torch.randn(8, 6, FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    del batch["logprobs"]
    return features, batch


def linear_model():
    model = torch.nn.Linear(FEATURES, 1, bias=False, dtype=torch.float64)
    torch.nn.init.constant_(model.weight, 0.1)
    return model


def accumulate(model, features, batch, objective, denominator, rows):
    """Gradient of the loss, in micro-batches of the given rows."""
    for row in rows:
        micro = {name: x[row] for name, x in batch.items()}
        lp = model(features[row])[..., 0]
        fusedpo.policy_loss(lp, **micro, objective=objective, denominator=denominator).loss.backward()


def train_on_rank(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    features, batch = features_and_batch()
    mine = slice(4 * rank, 4 * rank + 4)  # rank 0 has most of the tokens
    for i, objective in enumerate(OBJECTIVES):
        model = DistributedDataParallel(linear_model())
        denominator = global_denominator(batch["mask"][mine], objective)
        rows = [slice(mine.start, mine.start + 1), slice(mine.start + 1, mine.stop)]
        with model.no_sync():
            accumulate(model, features, batch, objective, denominator, rows[:1])
        accumulate(model, features, batch, objective, denominator, rows[1:])
        results[rank, i] = model.module.weight.grad[0]
    alone = [dist.new_group([r]) for r in range(2)][rank]
    results[rank, -1] = global_denominator(batch["mask"][mine], O.ppo(), group=alone)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_two_ranks_take_the_mean_of_the_whole_batch():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    results = torch.zeros(2, len(OBJECTIVES) + 1, FEATURES, dtype=torch.float64).share_memory_()
    torch.multiprocessing.spawn(train_on_rank, (port, results), nprocs=2)
    features, batch = features_and_batch()
    for i, objective in enumerate(OBJECTIVES):
        model = linear_model()
        accumulate(model, features, batch, objective, None, [slice(0, 8)])
        expected = model.weight.grad[0]
        assert expected.abs().min() > 1e-3
        for rank in range(2):
            torch.testing.assert_close(results[rank, i], expected, rtol=1e-6, atol=0)  # the count is float32
    kept = batch["mask"].view(2, -1).sum(1)
    assert torch.equal(results[:, -1, 0], kept.double())  # a group of one rank


# -------------------------------------------------------------------------------------------------------------- values


def random_values(seed=0):
    batch = random_batch(4, 6, seed)
    return batch["advantages"], batch["ref_logprobs"], batch["advantages"] + 0.5 * batch["entropy"], batch["mask"]


def define_value_loss(values, old, returns, mask, clip):
    """The loss of each token, its derivative, and whether the clip acted."""
    losses, slopes, clipped = [], torch.zeros_like(values), torch.zeros_like(mask)
    for b, row in enumerate(values.tolist()):
        losses.append([])
        for t, v in enumerate(row):
            r, o = returns[b, t].item(), old[b, t].item()
            bounded = max(o - clip, min(o + clip, v)) if clip is not None else v
            losses[-1].append(max((v - r) ** 2, (bounded - r) ** 2) / 2)
            clipped[b, t] = (bounded - r) ** 2 > (v - r) ** 2
            slopes[b, t] = 0.0 if clipped[b, t] else v - r
    return losses, slopes.masked_fill(~mask, 0), clipped & mask


@pytest.mark.parametrize("clip", [None, 0.0, 0.2, 0.5])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_value_loss(clip, aggregation):
    values, old, returns, mask = random_values()
    leaf = values.clone().requires_grad_()
    out = value_loss(leaf, old, returns, clip=clip, mask=mask, aggregation=aggregation)
    losses, slopes, clipped = define_value_loss(values, old, returns, mask, clip)
    assert out.loss.item() == pytest.approx(define(losses, mask.tolist(), aggregation), rel=1e-13)
    assert out.clip_frac.item() == pytest.approx((clipped.sum() / mask.sum()).item(), rel=1e-6)
    assert (out.clip_frac > 0) == (clip is not None)
    aggregate(values.clone().requires_grad_(), aggregation, mask=mask)
    weights = torch.zeros_like(values, requires_grad=True)
    (weight,) = torch.autograd.grad(aggregate(weights, aggregation, mask=mask), weights)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    torch.testing.assert_close(gradient, weight * slopes, rtol=1e-13, atol=1e-16)
    scaled = value_loss(leaf, old, returns, clip=clip, mask=mask, aggregation=aggregation, loss_scale=torch.tensor(0.5))
    assert torch.equal(scaled.loss, out.loss / 2)


def test_value_loss_passes_gradcheck():
    values, old, returns, mask = random_values()
    assert gradcheck(
        lambda v: value_loss(v, old, returns, clip=0.3, mask=mask).loss, (values.requires_grad_(),), atol=1e-7
    )


def test_only_values_get_a_gradient():
    leaves = [x.requires_grad_() for x in random_values()[:3]]
    value_loss(*leaves, clip=0.2).loss.backward()
    assert [x.grad is None for x in leaves] == [False, True, True]


def test_value_loss_without_clip_needs_no_old_values():
    values, old, returns, mask = random_values()
    losses = [value_loss(values, o, returns, clip=None, mask=mask).loss for o in (None, old)]
    assert torch.equal(*losses)


def test_masked_values_reach_nothing():
    values, old, returns, mask = random_values()

    def run(*arrays):
        leaf = arrays[0].clone().requires_grad_()
        out = value_loss(leaf, *arrays[1:], clip=0.2, mask=mask, denominator=5)
        return *out, *torch.autograd.grad(out.loss, leaf)

    spoilt = (x.masked_fill(~mask, g) for x, g in ((values, NAN), (old, INF), (returns, -INF)))
    assert all(map(torch.equal, run(*spoilt), run(values, old, returns)))
    empty = torch.full((2, 3), NAN, requires_grad=True)
    loss = value_loss(empty, None, empty, clip=None, mask=torch.zeros(2, 3)).loss
    loss.backward()
    assert loss.item() == 0
    assert not empty.grad.any()


def test_packed_values():
    values, old, returns, mask = random_values()
    lengths = [6, 0, 3, 5]
    inside = torch.arange(6) < torch.tensor(lengths)[:, None]
    packed = pack({"values": values, "old_values": old, "returns": returns, "mask": mask}, lengths)
    for aggregation in ("token-mean", "seq-mean-token-mean"):
        expected = value_loss(values, old, returns, clip=0.2, mask=mask & inside, aggregation=aggregation)
        result = value_loss(**packed, clip=0.2, aggregation=aggregation)
        assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (TypeError, "values", {"values": torch.zeros(2, 3, dtype=torch.int64)}),
        (ValueError, "values", {"values": torch.zeros(2, 3, 1)}),
        (TypeError, "old_values", {"old_values": 0.0}),
        (ValueError, "old_values", {"old_values": torch.zeros(2)}),
        (ValueError, "old_values", {"old_values": None}),
        (ValueError, "returns", {"returns": torch.zeros(3, 2)}),
        (TypeError, "clip", {"clip": "0.2"}),
        (ValueError, "clip", {"clip": -0.1}),
        (ValueError, "clip", {"clip": math.nan}),
        (ValueError, "Objective: length_norm", {"length_norm": 3.0}),
        (ValueError, "denominator", {"denominator": 3, "aggregation": "token-sum"}),
        (TypeError, "loss_scale", {"loss_scale": "1"}),
    ],
)
def test_errors_of_value_loss(error, message, given):
    right = {"values": torch.zeros(2, 3), "old_values": torch.zeros(2, 3), "returns": torch.zeros(2, 3), "clip": 0.2}
    with pytest.raises(error, match=rf"^{message}\b"):
        value_loss(**right | given)
