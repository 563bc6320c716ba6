"""Sequences split over processes: losses, gradients and advantages are, bit for bit, those of one process."""

import pytest
import torch
from support import ranks
from support.recorded import presets
from torch.testing import assert_close

import fusedpo
from fusedpo import advantages
from fusedpo.distributed import ContextParallel, collectives, reduce_metrics

pytestmark = [ranks.needs_gloo, pytest.mark.slow]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def pack(world, dtype, seed=0):
    """Packed sequences whose lengths divide by twice the number of ranks, one of them empty, one masked."""
    g = rng(seed)
    lengths = torch.tensor([4, 2, 0, 6, 2]) * world
    cu = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    count = int(cu[-1])

    def randn():
        return torch.randn(count, generator=g, dtype=torch.float64)

    lp = -randn().abs() - 0.1
    mask = torch.rand(count, generator=g) < 0.7
    mask[cu[1] : cu[2]] = False
    given = {
        "old_logprobs": lp + 0.3 * randn(),
        "advantages": randn(),
        "ref_logprobs": lp + 0.3 * randn(),
        "is_weights": randn().exp(),
        "entropy": randn().abs(),
    }
    return lp.to(dtype), mask, cu, {name: x.to(dtype) for name, x in given.items()}


def layouts(group, count, cu):
    """Ways to split, and the positions that this rank holds."""
    rank, world = group.rank(), group.size()
    each = count // world
    yield ContextParallel(group), torch.arange(rank * each, (rank + 1) * each)
    chunks = torch.arange(count).chunk(2 * world)
    yield ContextParallel(group, "zigzag"), torch.cat((chunks[rank], chunks[2 * world - 1 - rank]))
    mine = []
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        if end > begin:
            parts = torch.arange(begin, end).chunk(2 * world)
            mine += [parts[rank], parts[2 * world - 1 - rank]]
    yield ContextParallel(group, "zigzag-sequences"), torch.cat(mine)
    shuffled = torch.randperm(count, generator=rng(5)).chunk(world)[rank]
    yield ContextParallel(group, positions=shuffled), shuffled


def total(group, x):
    return collectives.gather(x.detach().double()[None], group).sum()


def check_losses(group):
    for dtype in (torch.float32, torch.float64):
        lp, mask, cu, given = pack(group.size(), dtype)
        per_sequence = torch.randn(cu.numel() - 1, generator=rng(3)).to(dtype)
        for i, (name, objective) in enumerate(presets().items()):
            if i % 3 == 0:
                given = {**given, "advantages": per_sequence}
            options = {"objective": objective, "cu_seqlens": cu, "loss_scale": 1.5}
            if i % 4 == 1 and objective.aggregation != "token-sum":
                options["denominator"] = 7.0
            x, h = lp.clone().requires_grad_(), given["entropy"].clone().requires_grad_()
            want = fusedpo.policy_loss(x, **{**given, "entropy": h}, mask=mask, **options)
            want.loss.backward()
            every = list(layouts(group, lp.numel(), cu))
            for cp, mine in every if i % 5 == 0 else [every[i % 4]]:
                local = {n: t if t is per_sequence else t[mine] for n, t in given.items()}
                y, g = lp[mine].requires_grad_(), local["entropy"].clone().requires_grad_()
                out = fusedpo.policy_loss(y, **{**local, "entropy": g}, mask=mask[mine], cp=cp, **options)
                out.loss.backward()
                assert torch.equal(y.grad, x.grad[mine]), (name, cp.layout)
                if h.grad is not None:
                    assert torch.equal(g.grad, h.grad[mine])
                tolerance = 1e-12 if dtype == torch.float64 else 1e-5
                assert out.loss.dtype == want.loss.dtype
                assert_close(total(group, out.loss), want.loss.detach().double(), rtol=tolerance, atol=tolerance)
                assert all(torch.equal(out.metrics[m], want.metrics[m]) for m in want.metrics)
                if not getattr(objective.ratio, "differentiate", False):
                    per = {**options, "denominator": None, "reduction": "none"}
                    each = fusedpo.policy_loss(lp[mine], **local, mask=mask[mine], cp=cp, **per)
                    of_all = fusedpo.policy_loss(lp, **given, mask=mask, **per)
                    assert torch.equal(each.loss, of_all.loss[mine])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_losses_are_those_of_one_process(world):
    ranks.run(check_losses, world)


def check_padded_and_from_logits(group):
    rank, world = group.rank(), group.size()
    g = rng()
    rows, width, vocab = 3, 4 * world, 19
    logits = torch.randn(rows, width, vocab, generator=g)
    ids = torch.randint(0, vocab, (rows, width), generator=g)
    mask = torch.rand(rows, width, generator=g) < 0.7
    mask[:, : width // world] = False  # rank 0 has no kept token, in the contiguous layout
    old, a = -torch.rand(rows, width, generator=g) - 2, torch.randn(rows, 1, generator=g)
    objective = fusedpo.objectives.nfpo(n=4, entropy_coef=0.1, aggregation="seq-mean-token-mean")
    whole = logits.clone().requires_grad_()
    with fusedpo.backend("auto"):
        lp, h = fusedpo.token_logprobs(whole, ids, mask=mask, return_entropy=True)
        want = fusedpo.policy_loss(lp, old, a, entropy=h, mask=mask, objective=objective)
    want.loss.backward()
    for cp in (ContextParallel(group), ContextParallel(group, "zigzag")):
        mine = cp.tokens("ids", ids.chunk(world, 1)[rank], None).order[rank]
        local = logits[:, mine].clone().requires_grad_()
        out = fusedpo.policy_loss_from_logits(
            local, ids[:, mine], old[:, mine], a, mask=mask[:, mine], objective=objective, cp=cp
        )
        out.loss.backward()
        assert torch.equal(local.grad, whole.grad[:, mine])
        assert_close(total(group, out.loss), want.loss.detach().double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("world", [2, 3])
def test_padded_rows_and_logits(world):
    ranks.run(check_padded_and_from_logits, world)


def check_others(group):
    world = group.size()
    lp, mask, cu, given = pack(world, torch.float32)
    ids = torch.randint(0, 99, lp.shape, generator=rng(9))
    rewards, values = torch.randn(lp.shape, generator=rng(4)).where(mask, 0), given["entropy"]
    boot = torch.randn(cu.numel() - 1, generator=rng(6))
    whiten = {"mask": mask, "cu_seqlens": cu}
    calls = {
        "next_tokens": (fusedpo.next_tokens, {"input_ids": ids, "mask": mask}, {}),
        "gae": (
            advantages.gae,
            {"rewards": rewards, "values": values, "mask": mask},
            {"gamma": 0.9, "lam": 0.8, "bootstrap": boot},
        ),
        "vtrace": (
            advantages.vtrace,
            {"rewards": rewards, "values": values, "logprobs": lp, "old_logprobs": given["old_logprobs"], "mask": mask},
            {"gamma": 0.9},
        ),
        "reward_to_go": (advantages.reward_to_go, {"rewards": rewards, "mask": mask}, {"gamma": 0.9}),
        "reinforce_plus_plus": (advantages.reinforce_plus_plus, {"rewards": rewards, "mask": mask}, {"gamma": 0.9}),
        "to_tokens": (advantages.to_tokens, {"mask": mask}, {"advantages": boot}),
    }
    for cp, mine in layouts(group, lp.numel(), cu):
        for name, (function, per_token, others) in calls.items():
            want = function(**per_token, **others, cu_seqlens=cu)
            got = function(**{n: x[mine] for n, x in per_token.items()}, **others, cu_seqlens=cu, cp=cp)
            pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
            assert all(torch.equal(g, w[mine]) for g, w in pairs), (name, cp.layout)
        for aggregation in ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
            x, y = values.double().requires_grad_(), values[mine].double().requires_grad_()
            want = fusedpo.aggregate(x, aggregation, **whiten)
            got = fusedpo.aggregate(y, aggregation, mask=mask[mine], cu_seqlens=cu, cp=cp)
            assert_close(total(group, got), want.detach(), rtol=1e-12, atol=1e-12)
            assert torch.equal(torch.autograd.grad(got, y)[0], torch.autograd.grad(want, x)[0][mine])
            if aggregation != "token-sum":
                objective = fusedpo.Objective(aggregation=aggregation)
                alone = mask.sum() if aggregation == "token-mean" else 3
                for gradients, count in (("mean", alone / world), ("sum", alone)):
                    den = fusedpo.global_denominator(mask[mine], objective, group, cu, cp=cp, gradients=gradients)
                    assert den == torch.as_tensor(count, dtype=torch.float32)
        whitened = advantages.whiten(values[mine].double(), mask=mask[mine], group=group)
        assert_close(whitened, advantages.whiten(values.double(), mask=mask)[mine], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world", [2, 3])
def test_targets_advantages_and_denominators(world):
    ranks.run(check_others, world)


def check_nothing(group):
    """No token at all, and tokens none of which is kept."""
    cp, objective = ContextParallel(group), fusedpo.objectives.grpo()
    for shape in ((2, 0), (0, 4), (2, 4)):
        x = torch.zeros(shape, requires_grad=True)
        mask = torch.zeros(shape, dtype=torch.bool)
        out = fusedpo.policy_loss(x, None, torch.ones(shape), objective=objective, mask=mask, cp=cp)
        out.loss.backward()
        assert out.loss == 0
        assert not x.grad.any()


def test_no_token():
    ranks.run(check_nothing, 2)


def check_refusals(group):
    lp, mask, cu, _given = pack(group.size(), torch.float32)
    each = lp.numel() // group.size()
    x, a, ppo = lp[:each], lp[:each], fusedpo.objectives.ppo()
    with pytest.raises(ValueError, match="cu_seqlens is needed by layout='zigzag-sequences'"):
        fusedpo.policy_loss(x, None, a, objective=ppo, cp=ContextParallel(group, "zigzag-sequences"))
    odd = cu.clone()
    odd[1] += 1
    with pytest.raises(ValueError, match="lengths divide by"):
        fusedpo.policy_loss(x, None, a, objective=ppo, cu_seqlens=odd, cp=ContextParallel(group, "zigzag-sequences"))
    with pytest.raises(ValueError, match="logprobs must hold an even number"):
        fusedpo.policy_loss(x[:3], None, a[:3], objective=ppo, cp=ContextParallel(group, "zigzag"))
    with pytest.raises(ValueError, match="positions must hold one of each"):
        fusedpo.policy_loss(x, None, a, objective=ppo, cp=ContextParallel(group, positions=torch.arange(each + 1)))
    with pytest.raises(ValueError, match="positions must be each of 0 to"):
        fusedpo.policy_loss(x, None, a, objective=ppo, cp=ContextParallel(group, positions=torch.arange(each)))
    with pytest.raises(ValueError, match="mask must have shape"):
        fusedpo.policy_loss(x, None, a, objective=ppo, mask=mask, cp=ContextParallel(group))
    with pytest.raises(ValueError, match="cu_seqlens must start with 0 and end with the number"):
        fusedpo.policy_loss(x, None, a, objective=ppo, cu_seqlens=cu // group.size(), cp=ContextParallel(group))
    objective = fusedpo.objectives.nfpo(n=2, differentiate=True)
    with pytest.raises(ValueError, match="reduction must be 'mean' with cp and a differentiated trace"):
        fusedpo.policy_loss(x, None, a, objective=objective, reduction="none", cp=ContextParallel(group))


def test_refusals():
    ranks.run(check_refusals, 2)
    with pytest.raises(TypeError, match="group must be"):
        ContextParallel(None)


def check_metrics(group):
    rank, world = group.rank(), group.size()
    lp, mask, _cu, given = pack(world, torch.float64)
    objective = fusedpo.objectives.grpo(clip_low=0.1, clip_high=0.1)
    mask[lp.numel() // world * (world - 1) :] = False  # the last rank has none
    whole = fusedpo.policy_loss(lp, **given, mask=mask, objective=objective).metrics
    mine = torch.arange(lp.numel()).chunk(world)[rank].chunk(2)  # two micro-batches
    parts = [
        fusedpo.policy_loss(lp[m], **{n: x[m] for n, x in given.items()}, mask=mask[m], objective=objective).metrics
        for m in mine
    ]
    found = reduce_metrics(parts, group)
    assert list(found) == list(whole)
    for name in whole:
        assert_close(
            found[name], whole[name].float(), rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def check_groups(group):
    rank, world = group.rank(), group.size()
    rewards = torch.randn(4 * world, generator=rng())
    ids = torch.randint(0, 3, (4 * world,), generator=rng(1))
    ids[:3] = torch.arange(3)
    lengths, mine = torch.randint(1, 9, (4 * world,), generator=rng(2)), slice(4 * rank, 4 * rank + 4)
    kept = torch.rand(4 * world, generator=rng(3)) < 0.8
    for name, options in {
        "grpo": {},
        "dr_grpo": {},
        "rloo": {},
        "gpg": {},
        "reinforce_rej": {},
        "opo": {"lengths": lengths},
        "reinforce_plus_plus_baseline": {"lengths": lengths},
        "maxpo": {"k": 2, "small_groups": "zero"},
        "pkpo": {"k": 2, "small_groups": "zero"},
        "remax": {"baselines": rewards.flip(0)},
    }.items():
        grouped = {} if name == "remax" else {"group_ids": ids}
        want = advantages.compute(name, rewards, **options, **grouped, mask=kept)
        local = {n: x[mine] if isinstance(x, torch.Tensor) else x for n, x in {**options, **grouped}.items()}
        got = advantages.compute(name, rewards[mine], **local, mask=kept[mine], dp_group=group)
        assert torch.equal(got, want[mine]), name
    greedy = torch.randn(2 * world, generator=rng(4))  # one per prompt of two samples
    local, pairs = greedy[2 * rank : 2 * rank + 2], rewards.reshape(-1, 2)
    want = advantages.remax(rewards, baselines=greedy, group_size=2)
    assert torch.equal(advantages.remax(rewards[mine], baselines=local, group_size=2, dp_group=group), want[mine])
    rows = advantages.remax(pairs[2 * rank : 2 * rank + 2], baselines=local.tolist(), dp_group=group)
    assert torch.equal(rows, want[mine].reshape(-1, 2))
    want = advantages.remax(rewards, baselines=greedy, group_ids=ids)
    assert torch.equal(
        advantages.remax(rewards[mine], baselines=greedy, group_ids=ids[mine], dp_group=group), want[mine]
    )
    each = advantages.remax(pairs, baselines=greedy.repeat_interleave(2).reshape(-1, 2))
    two = advantages.remax(
        pairs[2 * rank : 2 * rank + 2], baselines=local.repeat_interleave(2).reshape(-1, 2), dp_group=group
    )
    assert torch.equal(two, each[2 * rank : 2 * rank + 2])
    # Lists, of whose values the kinds would depend on the rank: None, strings, whole numbers
    scores, names = [1, 0, None, 2, 0.5, 1.0, 0.0, 0.25][: 4 * world], list("abbaabba")[: 4 * world]
    want = advantages.rloo(scores, group_ids=names, trajectory_ids=list("pqrstuvw")[: 4 * world])
    got = advantages.rloo(scores[mine], group_ids=names[mine], trajectory_ids=list("pqrstuvw")[mine], dp_group=group)
    assert torch.equal(got, want[mine])
    for options, message in (
        (
            {"group_ids": ([0, 0, 1, 1], list("aabb"))[rank]},
            "group_ids, got integers, labels that are no integers",
        ),
        ({"group_size": 2, "mask": (torch.ones(4), None)[rank]}, "same mask, got floats, nothing"),
        ({"rewards": rewards[: 4 + 2 * rank], "group_size": 2}, "same samples, got 4, 6"),
        ({"rewards": (rewards[:4], rewards[:4].double())[rank], "group_size": 2}, "same rewards, got floats, float64"),
        ({"rewards": (rewards[:8].view(4, 2), rewards[:4])[rank], "group_size": (None, 2)[rank]}, "in a row, got 2, 1"),
    ):
        with pytest.raises(ValueError, match=message):
            advantages.grpo(**{"rewards": rewards[mine]} | options, dp_group=group)
    for other, message in (
        (None, "same baselines, got floats, nothing"),
        (torch.ones(4).double(), "same baselines, got floats, float64"),
        (torch.ones(2), "same number of baselines, got 4, 2"),
        (torch.ones(2, 2), "same dimensions of baselines, got 1, 2"),
    ):
        with pytest.raises(ValueError, match=message):
            advantages.remax(rewards[mine], baselines=(torch.ones(4), other)[rank], dp_group=group)
    want = advantages.grpo(rewards, group_size=2 * world)
    assert torch.equal(advantages.grpo(rewards[mine], group_size=2 * world, dp_group=group), want[mine])


def test_metrics_and_groups_over_ranks():
    ranks.run(check_metrics, 3)
    ranks.run(check_groups, 2)


def check_both(group):
    """2 x 2: columns over pairs of neighbours, tokens over the others."""
    from torch import distributed as dist

    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    cp, tp = ContextParallel(mesh.get_group("cp"), "zigzag"), mesh.get_group("tp")
    g = rng()
    logits = torch.randn(2, 8, 21, generator=g, dtype=torch.float64)
    ids = torch.randint(0, 21, (2, 8), generator=g)
    old, a = -torch.rand(2, 8, generator=g).double() - 2, torch.randn(2, 8, generator=g).double()
    mine = cp.tokens("ids", ids[:, :4], None).order[cp.group.rank()]
    columns = slice(0, 11) if tp.rank() == 0 else slice(11, 21)
    for name, objective in presets().items():
        if objective.kl is not None:
            continue
        whole = logits.clone().requires_grad_()
        want = fusedpo.policy_loss_from_logits(whole, ids, old, a, objective=objective)
        want.loss.backward()
        x = logits[:, mine, columns].clone().requires_grad_()
        out = fusedpo.policy_loss_from_logits(
            *(x, ids[:, mine], old[:, mine], a[:, mine]),
            objective=objective,
            tp_group=tp,
            vocab_start=columns.start,
            cp=cp,
        )
        out.loss.backward()
        assert_close(
            x.grad, whole.grad[:, mine, columns], rtol=1e-12, atol=1e-12, msg=lambda t, name=name: f"{name}: {t}"
        )
        assert_close(total(cp.group, out.loss), want.loss.detach(), rtol=1e-12, atol=1e-12)


def test_both_at_once():
    ranks.run(check_both, 4)
