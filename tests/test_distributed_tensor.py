"""The vocabulary split over processes: log-probs, losses and gradients are those of one process."""

import sys
import types

import pytest
import torch
from support import ranks
from support.recorded import presets
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing import assert_close

import fusedpo
from fusedpo.distributed import collectives
from fusedpo.distributed import tensor as tensor_parallel

pytestmark = [ranks.needs_gloo, pytest.mark.slow]
B, T, V = 3, 8, 37
WIDTHS = {
    "even": None,
    "uneven": {2: [19, 18], 3: [13, 13, 11], 4: [10, 10, 10, 7]},
    "empty": {2: [37, 0], 3: [0, 30, 7]},
}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(dtype=torch.float64):
    g = rng()
    logits = 3 * torch.randn(B, T, V, generator=g, dtype=torch.float64)
    ids = torch.randint(0, V, (B, T), generator=g)
    mask = torch.rand(B, T, generator=g) < 0.7
    mask[1] = False
    lp = fusedpo.reference.token_logprobs(logits, ids)
    given = {
        "old_logprobs": lp + 0.3 * torch.randn(B, T, generator=g, dtype=torch.float64),
        "advantages": torch.randn(B, T, generator=g, dtype=torch.float64),
        "ref_logprobs": lp + 0.3 * torch.randn(B, T, generator=g, dtype=torch.float64),
        "is_weights": torch.rand(B, T, generator=g, dtype=torch.float64),
    }
    return logits.to(dtype), ids, mask, {name: x.to(dtype) for name, x in given.items()}


def bounds(world, rank, kind):
    widths = [-(-V // world)] * world if kind == "even" else WIDTHS[kind][world]
    start = sum(widths[:rank])
    return start, widths[rank]


def equal_on_all(group, *tensors):
    for x in tensors:
        seen = collectives.gather(x.detach(), group) if x.dim() else collectives.gather(x.detach()[None], group)
        assert all(torch.equal(seen[0].nan_to_num(7), other.nan_to_num(7)) for other in seen)


def check_logprobs(group):
    rank, world = group.rank(), group.size()
    logits, ids, mask, _ = batch()
    upstream = torch.randn(B, T, generator=rng(1), dtype=torch.float64), torch.randn(B, T, generator=rng(2)).double()
    whole = logits.clone().requires_grad_()
    want = fusedpo.reference.token_logprobs(whole, ids, mask=mask, return_entropy=True)
    torch.autograd.backward(want, upstream)
    for kind in ("uneven", "empty"):
        if kind == "empty" and world == 4:
            continue
        start, width = bounds(world, rank, kind)
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
            columns = slice(start, start + width)
            x = logits[..., columns].to(dtype).requires_grad_()
            options = {"tp_group": group, "vocab_start": start, "mask": mask, "return_entropy": True}
            got = fusedpo.token_logprobs(x, ids, **options)
            torch.autograd.backward(got, [u.to(dtype) for u in upstream])
            equal_on_all(group, *got)
            for g, w in zip((*got, x.grad), (*want, whole.grad[..., columns]), strict=True):
                assert_close(g.double(), w, rtol=tolerance, atol=tolerance)
            y = logits[..., columns].to(dtype).clone().requires_grad_()
            leaf = y * 1
            again = fusedpo.token_logprobs(leaf, ids, inplace_backward=True, **options)
            torch.autograd.backward(again, [u.to(dtype) for u in upstream])
            assert torch.equal(y.grad, x.grad)
            tensor_parallel.HALVES_FROM, pieces = 0, tensor_parallel.pieces
            tensor_parallel.pieces = lambda rows, shard, device, cut=pieces: cut(rows, shard, torch.device("cuda"))
            halves = fusedpo.token_logprobs(x.detach(), ids, **options)
            tensor_parallel.pieces = pieces
            assert all(map(torch.equal, halves, got))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_logprobs_and_gradients_are_those_of_one_process(world):
    ranks.run(check_logprobs, world)


def check_padding(group):
    rank, world = group.rank(), group.size()
    logits, ids, mask, given = batch()
    ids = ids % 20
    start, width = bounds(world, rank, "uneven")
    padded = logits.clone()
    padded[..., 20:] = torch.nan
    whole = logits[..., :20].clone().requires_grad_()
    want = fusedpo.policy_loss_from_logits(whole, ids, **given, mask=mask, objective=fusedpo.objectives.ppo())
    want.loss.backward()
    x = padded[..., start : start + width].clone().requires_grad_()
    out = fusedpo.policy_loss_from_logits(
        *(x, ids),
        **given,
        mask=mask,
        objective=fusedpo.objectives.ppo(),
        tp_group=group,
        vocab_start=start,
        vocab_size=20,
    )
    out.loss.backward()
    assert_close(out.loss, want.loss, rtol=1e-12, atol=1e-12)
    gradient = torch.nn.functional.pad(whole.grad, (0, V - 20))[..., start : start + width]
    assert_close(x.grad, gradient, rtol=1e-12, atol=1e-12)


def test_padded_columns_never_contribute():
    ranks.run(check_padding, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("inplace", [False, True])
def test_padded_columns_of_one_device_do_not_either(dtype, inplace):
    logits, ids, mask, given = batch(dtype)
    ids = ids % 20
    whole = logits[..., :20].clone().requires_grad_()
    want = fusedpo.policy_loss_from_logits(whole, ids, **given, mask=mask, objective=fusedpo.objectives.nfpo(n=4))
    want.loss.backward()
    padded = logits.clone()
    padded[..., 20:] = torch.inf
    leaf = padded.requires_grad_()
    out = fusedpo.policy_loss_from_logits(
        *(leaf * 1, ids), **given, mask=mask, objective=fusedpo.objectives.nfpo(n=4), vocab_size=20, inplace=inplace
    )
    out.loss.backward()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert_close(out.loss, want.loss, rtol=tolerance, atol=tolerance)
    assert_close(leaf.grad[..., :20], whole.grad, rtol=tolerance, atol=tolerance)
    assert leaf.grad[..., 20:].nan_to_num(7).eq(0).all()


def check_presets(group):
    rank, world = group.rank(), group.size()
    start, width = bounds(world, rank, "uneven")
    logits, ids, mask, given = batch()
    for name, objective in presets().items():
        whole = logits.clone().requires_grad_()
        want = fusedpo.policy_loss_from_logits(whole, ids, **given, mask=mask, objective=objective)
        want.loss.backward()
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
            x = logits[..., start : start + width].to(dtype).requires_grad_()
            tokens = {key: value.to(dtype) for key, value in given.items()}
            out = fusedpo.policy_loss_from_logits(
                x, ids, **tokens, mask=mask, objective=objective, tp_group=group, vocab_start=start
            )
            out.loss.backward()
            equal_on_all(group, out.loss, *out.metrics.values())

            def message(text, name=name):
                return f"{name}: {text}"

            assert_close(out.loss.double(), want.loss, rtol=tolerance, atol=tolerance, msg=message)
            gradient = whole.grad[..., start : start + width]
            assert_close(x.grad.double(), gradient, rtol=tolerance, atol=tolerance, msg=message)


@pytest.mark.parametrize("world", [2, 3])
def test_every_preset(world):
    ranks.run(check_presets, world)


def check_refusals(group):
    rank, world = group.rank(), group.size()
    logits, ids, _mask, _given = batch()
    start, width = bounds(world, rank, "uneven")
    x = logits[..., start : start + width]
    with pytest.raises(ValueError, match=r"vocab_start must make the columns.*\[0, 13\), \[13, 26\), \[22, 33\)"):
        fusedpo.token_logprobs(x, ids, tp_group=group)  # the default start, of uneven shards
    with pytest.raises(ValueError, match="vocab_size be one number"):
        fusedpo.token_logprobs(x, ids, tp_group=group, vocab_start=start, vocab_size=30 + (rank == 0))
    with pytest.raises(ValueError, match=r"token_ids must be in \[0, 37\)"):
        fusedpo.token_logprobs(x, ids + V, tp_group=group, vocab_start=start)
    with pytest.raises(ValueError, match=r"token_ids must be in \[0, 5\)"):
        fusedpo.token_logprobs(x, ids % 6, tp_group=group, vocab_start=start, vocab_size=5)
    with pytest.raises(ValueError, match="vocab_start must be None without a tp_group"):
        fusedpo.token_logprobs(x, ids, vocab_start=3)
    with pytest.raises(TypeError, match="tp_group must be"):
        fusedpo.token_logprobs(x, ids, tp_group=2)
    with pytest.raises(ValueError, match="vocab_size must be >= 1"):
        fusedpo.token_logprobs(x, ids, tp_group=group, vocab_size=0)


def test_shards_that_contradict_each_other_raise_on_all_ranks():
    ranks.run(check_refusals, 3)


def counted(patch):
    """How many collectives a call makes."""
    calls = []
    gathers = collectives.all_gather

    def count(*args, **kwargs):
        calls.append("gather")
        return gathers(*args, **kwargs)

    patch.setattr(collectives, "all_gather", count)
    patch.setattr(collectives.dist, "all_reduce", lambda *_, **__: calls.append("reduce"))
    return calls


def check_count(group):
    rank, world = group.rank(), group.size()
    logits, ids, mask, given = batch()
    start, width = bounds(world, rank, "uneven")
    for rows, kept in ((slice(0, B), mask), (slice(0, B), torch.zeros_like(mask)), (slice(0, 0), mask)):
        x = logits[rows, :, start : start + width].clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            calls = counted(patch)
            out = fusedpo.policy_loss_from_logits(
                *(x, ids[rows]),
                **{name: t[rows] for name, t in given.items()},
                mask=kept[rows],
                objective=fusedpo.objectives.ppo(),
                tp_group=group,
                vocab_start=start,
            )
            assert calls == ["gather"]
            out.loss.backward()
            assert calls == ["gather"]
        assert x.grad is not None


def test_one_gather_forward_and_nothing_backward():
    ranks.run(check_count, 2)


def check_dtensors(group):
    world = group.size()
    if world == 4:
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        placements = [Shard(0), Shard(2)]
    else:
        mesh = dist.DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
        placements = [Shard(2)]
    logits, ids, mask, given = batch()
    logits, ids, mask = logits[:2], ids[:2], mask[:2] | True
    given = {name: x[:2] for name, x in given.items()}
    whole = logits.clone().requires_grad_()
    objective = fusedpo.objectives.ppo(aggregation="token-sum")
    fusedpo.policy_loss_from_logits(whole, ids, **given, mask=mask, objective=objective).loss.backward()
    rows = [p if p == Shard(0) else Replicate() for p in placements]

    def local(x):
        return distribute_tensor(x, mesh, rows).to_local()

    leaf = distribute_tensor(logits, mesh, placements).requires_grad_()
    out = fusedpo.policy_loss_from_logits(
        leaf,
        distribute_tensor(ids, mesh, rows),
        **{n: local(x) for n, x in given.items()},
        mask=local(mask),
        objective=objective,
    )
    out.loss.backward()
    assert type(out.loss) is torch.Tensor
    assert isinstance(leaf.grad, DTensor)
    assert_close(leaf.grad.full_tensor(), whole.grad, rtol=1e-12, atol=1e-12)
    tp = mesh.get_group(len(placements) - 1)
    again = fusedpo.token_logprobs(leaf, local(ids), tp_group=tp)
    assert torch.equal(again.masked_fill(~local(mask), 0), out.logprobs)
    with pytest.raises(ValueError, match="vocab_start must be None or"):
        fusedpo.token_logprobs(leaf, local(ids), vocab_start=36)
    replicated = distribute_tensor(logits, mesh, [Replicate()] * len(placements))
    with pytest.raises(TypeError, match=r"logits must be a plain tensor.*logits\.to_local"):
        fusedpo.token_logprobs(replicated, ids)
    # a use of the DTensor that was saved before is found out
    moved = distribute_tensor(logits.float(), mesh, placements).requires_grad_() * 1
    square = moved.square()
    fusedpo.token_logprobs(moved, local(ids), inplace_backward=True).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@pytest.mark.parametrize("world", [3, 4])
def test_placements_say_where_the_columns_are(world):
    ranks.run(check_dtensors, world)


def check_oracles(group):
    """Other people's functions on the same shards; they take even ones."""
    from torch.distributed.tensor.parallel import loss_parallel

    rank, world = group.rank(), group.size()
    g = rng()
    logits = 2 * torch.randn(6, 40, generator=g)
    ids = torch.randint(0, 40, (6,), generator=g)
    shard = logits.chunk(world, -1)[rank]

    def ours(leaf):
        logprobs, entropy = fusedpo.token_logprobs(leaf, ids, tp_group=group, return_entropy=True)
        return logprobs, entropy

    leaf = shard.clone().requires_grad_()
    logprobs, entropy = ours(leaf)
    gradient = torch.autograd.grad(logprobs.sum(), leaf, retain_graph=True)[0]
    of_entropy = torch.autograd.grad(entropy.sum(), leaf)[0]

    mesh = dist.DeviceMesh.from_group(group, "cpu")
    theirs = distribute_tensor(logits, mesh, [Shard(1)]).requires_grad_()
    with loss_parallel():
        loss = torch.nn.functional.cross_entropy(theirs, ids, reduction="sum")
        loss.backward()
    assert_close(-loss.full_tensor(), logprobs.sum(), rtol=1e-6, atol=1e-6)
    assert_close(-theirs.grad.to_local(), gradient, rtol=1e-5, atol=1e-6)

    try:
        import megatron.core  # noqa: F401
    except ImportError:
        return False
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import cross_entropy

    for module in (parallel_state, cross_entropy):
        module.get_tensor_model_parallel_group = lambda *_, **__: group
        module.get_tensor_model_parallel_rank = lambda: rank
        module.get_tensor_model_parallel_world_size = lambda: world
    theirs = shard.clone().requires_grad_()
    found = -cross_entropy.vocab_parallel_cross_entropy((theirs * 1)[:, None], ids[:, None])[:, 0]
    found.sum().backward()
    assert_close(found, logprobs, rtol=1e-6, atol=1e-6)
    assert_close(theirs.grad, gradient, rtol=1e-5, atol=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda *_, **__: lambda function: function)
        from verl.utils.megatron.tensor_parallel import vocab_parallel_entropy

        theirs = shard.clone().requires_grad_()
        found = vocab_parallel_entropy(theirs * 1)
        assert_close(found, entropy, rtol=1e-6, atol=1e-6)
        found.sum().backward()
        assert_close(theirs.grad, of_entropy, rtol=1e-5, atol=1e-6)
    return True


def test_against_loss_parallel_megatron_and_verl():
    ranks.run(check_oracles, 2)


def check_adapters(group):
    from fusedpo.integrations import areal, slime, verl

    logits = torch.randn(6, 40, generator=rng())
    ids = torch.randint(0, 40, (6,), generator=rng(1))
    shard = logits.chunk(group.size(), -1)[group.rank()]
    want = fusedpo.token_logprobs(logits, ids, return_entropy=True)
    found, entropy = slime.calculate_log_probs_and_entropy(shard, ids, group, with_entropy=True)
    assert_close(found[:, 0], want[0], rtol=1e-6, atol=1e-6)
    assert_close(entropy, want[1], rtol=1e-6, atol=1e-6)
    assert torch.equal(slime.calculate_log_probs_and_entropy(shard, ids, group)[0], found)
    assert torch.equal(areal.gather_logprobs(shard, ids, tp_group=group), found[:, 0])
    assert torch.equal(areal.gather_logprobs_entropy(shard, ids, tp_group=group)[1], entropy)
    state = types.ModuleType("megatron.core.parallel_state")
    state.get_tensor_model_parallel_group = lambda: group
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "megatron.core.parallel_state", state)
        patch.setattr(verl.importlib, "import_module", lambda name: sys.modules[name])
        assert torch.equal(verl.vocab_parallel_log_probs_from_logits(shard, ids), found[:, 0])
        assert torch.equal(verl.vocab_parallel_entropy(shard), entropy)
        assert torch.equal(verl.vocab_parallel_entropy_with_chunking(shard, 2), entropy)


def test_log_probs_of_slime_and_areal():
    ranks.run(check_adapters, 2)


def check_compiled(group):
    """One graph for three lengths, with the collective and the row kernels in it."""
    rank, world = group.rank(), group.size()
    start, width = bounds(world, rank, "uneven")

    def loss(x, ids):
        logprobs, entropy = fusedpo.token_logprobs(x, ids, tp_group=group, vocab_start=start, return_entropy=True)
        return (logprobs * 2 - entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 6, 9):
        logits = torch.randn(rows, V, generator=rng(rows))[:, start : start + width].contiguous()
        ids = torch.randint(0, V, (rows,), generator=rng(rows))
        results = []
        for function in (compiled, loss):
            x = logits.clone().requires_grad_()
            value = function(x, ids)
            value.backward()
            results.append((value.detach(), x.grad))
        for found, want in zip(*results, strict=True):
            assert_close(found, want, rtol=1e-6, atol=1e-6)


def test_compiled_with_a_group():
    ranks.run(check_compiled, 2)


def test_what_takes_no_split_vocabulary_says_what_does():
    logits, ids = torch.randn(2, 4, 8), torch.zeros(2, 4, dtype=torch.long)
    states, weight = torch.randn(2, 4, 3), torch.randn(8, 3)
    dpo = fusedpo.objectives.dpo(beta=0.1)
    from_logits, from_hidden = "token_logprobs.*tp_group=tp_group", "linear_token_logprobs.*tp_group=tp_group"
    calls = [
        (from_logits, lambda **o: fusedpo.token_statistics(logits, ids, **o)),
        (from_hidden, lambda **o: fusedpo.linear_token_statistics(states, weight, ids, **o)),
        (from_logits, lambda **o: fusedpo.preference_loss_from_logits(logits, ids, None, objective=dpo, **o)),
        (from_hidden, lambda **o: fusedpo.preference_loss_from_hidden(states, weight, ids, None, objective=dpo, **o)),
        ("gather the logits", lambda **o: fusedpo.exact_kl(logits, logits, **o)),
        ("gather the logits", lambda **o: fusedpo.exact_kl_from_hidden(states, weight, states, weight, **o)),
    ]
    for way, call in calls:
        for name in ("tp_group", "vocab_start", "vocab_size", "cp"):
            with pytest.raises(TypeError, match=f" takes no {name}, what it reads must be whole: .*{way}"):
                call(**{name: None})


def check_preferences(group):
    """The way that works for a preference loss: of log-probs, which are the same on all ranks."""
    logits, ids, _, given = batch()
    logits, ids, ref = logits[:2], ids[:2], given["ref_logprobs"][:2]
    start, width = bounds(group.size(), group.rank(), "uneven")
    objective = fusedpo.objectives.dpo(beta=0.1)
    whole = logits.clone().requires_grad_()
    want = fusedpo.preference_loss_from_logits(whole, ids, ref, objective=objective)
    want.loss.backward()
    x = logits[..., start : start + width].clone().requires_grad_()
    logprobs = fusedpo.token_logprobs(x, ids, tp_group=group, vocab_start=start)
    out = fusedpo.preference_loss(logprobs, ref, objective=objective)
    out.loss.backward()
    assert_close(out.loss, want.loss, rtol=1e-12, atol=1e-12)
    assert_close(x.grad, whole.grad[..., start : start + width], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world", [2, 3])
def test_preference_losses_of_split_log_probs(world):
    ranks.run(check_preferences, world)
