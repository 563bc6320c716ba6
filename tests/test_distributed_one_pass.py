"""Sequences split over processes, from logits: loss and gradient in one pass, bit for bit those of one process."""

import pytest
import torch
from support import one_pass, ranks
from support.logprobs import peak_extra_bytes
from support.one_pass import OBJECTIVES, TWO_PASSES, Operators
from torch._dynamo.testing import CompileCounterWithBackend

import fusedpo
from fusedpo import backends, objectives
from fusedpo.distributed import ContextParallel, collectives

pytestmark = [
    ranks.needs_gloo,
    pytest.mark.slow,
    pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING)),
]
PER_TOKEN = ("logits", "token_ids", "old_logprobs", "ref_logprobs", "advantages", "is_weights", "mask", "temperature")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def layouts(group, count):
    yield ContextParallel(group)
    yield ContextParallel(group, "zigzag")
    yield ContextParallel(group, "zigzag-sequences")
    shuffled = torch.randperm(count, generator=rng(5)).chunk(group.size())[group.rank()]
    yield ContextParallel(group, positions=shuffled)


def local(batch, cp):
    """What this rank holds of a batch, and the positions of that in a row."""
    ids = batch["token_ids"]
    each = ids.narrow(-1, 0, ids.shape[-1] // cp.size)
    mine = cp.tokens("ids", each, batch.get("cu_seqlens")).order[cp.group.rank()]
    split = {n: x for n, x in batch.items() if n in PER_TOKEN and x is not None and x.shape[: ids.dim()] == ids.shape}
    return batch | {n: x.index_select(ids.dim() - 1, mine) for n, x in split.items()}, mine


def run(batch, objective, *, inplace=False, upstream=None, **options):
    """The output, the gradient of the logits, and whether they took one pass."""
    leaf = batch["logits"].clone().requires_grad_()
    others = {name: x for name, x in batch.items() if name != "logits"}
    with Operators() as operators:
        out = fusedpo.policy_loss_from_logits(leaf * 1, **others, objective=objective, inplace=inplace, **options)
        out.loss.backward(upstream)
    return out, leaf.grad, operators.one_pass()


def check(batch, objective, cp, *, one, **options):
    """Against one process. Bit for bit if both take one pass, or both two: a long window is summed in another order."""
    want, gradient, whole_took_one = run(batch, objective, **options)
    part, mine = local(batch, cp)
    out, found, took_one = run(part, objective, cp=cp, **options)
    name, dim = f"{objective}, {cp.layout}, positions: {cp.positions is not None}", batch["token_ids"].dim() - 1
    assert took_one == one, name
    dtype = gradient.dtype
    bits = dtype != torch.float64 and took_one == whole_took_one
    tolerance = 0 if bits else 1e-12 if dtype == torch.float64 else 1e-5 + torch.finfo(dtype).eps

    def same(x, y, tolerance=tolerance):
        options = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
        torch.testing.assert_close(x, y, **options, msg=lambda text: f"{name}: {text}")

    same(found, gradient.index_select(dim, mine))
    for x, y in zip(out[2:], want[2:], strict=True):
        same(x, y.index_select(dim, mine))
    for metric, x in out.metrics.items():
        same(x, want.metrics[metric])
    shares = collectives.gather(out.loss.detach().double()[None], cp.group).sum()
    assert out.loss.dtype == want.loss.dtype
    same(shares, want.loss.detach().double(), 1e-12 if dtype == torch.float64 else 1e-5)


def ahead_of(objective):
    return getattr(objective.ratio, "ahead", 0)


def check_objectives(group):
    world = group.size()
    lengths = [40 * world, 0, 16 * world, 40 * world]  # 96 tokens on each rank
    stretches = {"contiguous": 1, "zigzag": 2, "zigzag-sequences": 8}
    took_one = set()
    for i, (name, objective) in enumerate((OBJECTIVES | TWO_PASSES).items()):
        batch = one_pass.batch((96 * world,), 33, (torch.float32, torch.bfloat16)[i % 2], lengths)
        if i % 3 == 0:
            batch |= {"advantages": torch.randn(4, generator=rng(i))}
        options = {"loss_scale": 1.5}
        if i % 4 == 1 and objective.aggregation != "token-sum":
            options["denominator"] = 7.0
        ahead, every = ahead_of(objective), list(layouts(group, 96 * world))
        for cp in every if ahead == 3 else [every[i % 4]]:
            one = name in OBJECTIVES and (
                ahead == 0 or (cp.positions is None and 4 * stretches[cp.layout] * ahead <= 96)
            )
            check(batch, objective, cp, one=one, **options)
            took_one |= {(cp.layout, cp.positions is None, ahead != 0)} if one else set()
        if i % 4 == 0:
            double = {n: x.double() if n in PER_TOKEN and x.is_floating_point() else x for n, x in batch.items()}
            check(double, objective, every[i // 4 % 4], one=False, **options)
    assert took_one >= {(layout, True, window) for layout in stretches for window in (False, True)}
    assert took_one >= {("contiguous", False, False)}


@pytest.mark.parametrize("world", [2, 3])
def test_every_objective(world):
    ranks.run(check_objectives, world)


def check_padded(group):
    """Rows of a batch; advantages of sequences; windows of up to 256 tokens, longer than those that one block sums."""
    world = group.size()
    for ahead, each, rows in ((3, 30, 2), (17, 160, 1), (256, 2048, 1)):
        batch = one_pass.batch((rows, each * world), 9)
        batch |= {
            "advantages": torch.randn(rows, 1, generator=rng(2)),
            "is_weights": torch.rand(rows, generator=rng(3)),
        }
        objective = objectives.nfpo(ahead + 1, entropy_coef=0.1, aggregation="seq-mean-token-mean")
        for cp in list(layouts(group, each * world))[:2]:
            check(batch, objective, cp, one=True)
            check(batch | {"old_logprobs": None, "mask": None}, objective, cp, one=True, loss_scale=torch.tensor(3.0))
    check(one_pass.batch((2, 8 * world), 9), objectives.nfpo(4), ContextParallel(group), one=False)  # 12 of 16 rows
    check(one_pass.batch((2, 0), 9), objectives.ppo(), ContextParallel(group), one=True)


@pytest.mark.parametrize("world", [2, 3])
def test_padded_rows_and_long_windows(world):
    ranks.run(check_padded, world)


def check_masked(group):
    """Neither logits nor ids of masked tokens are read; a rank may have no other."""
    world = group.size()
    for objective in (objectives.ppo(entropy_coef=0.1), objectives.nfpo(3, entropy_coef=0.1)):
        batch = one_pass.batch((40 * world,), 21, kept=0.6)
        batch["mask"][: 40 if group.size() == 2 else 50] = False
        for inplace in (False, True):
            cp = ContextParallel(group)
            part, _ = local(batch, cp)
            _, expected, _ = run(part, objective, cp=cp, inplace=inplace)
            mask = part["mask"]
            poisoned = {
                name: x.masked_fill(~mask.reshape(mask.shape + (1,) * (x.dim() - 1)), torch.nan)
                if x.is_floating_point()
                else x
                for name, x in part.items()
            }
            poisoned["token_ids"] = part["token_ids"].masked_fill(~mask, -100)
            out, found, one = run(poisoned, objective, cp=cp, inplace=inplace)
            assert one
            assert torch.equal(found, expected)
            assert not found[~mask].any()
            assert not out.logprobs[~mask].any()
            check(batch, objective, cp, one=True, inplace=inplace)


@pytest.mark.parametrize("world", [2, 3])
def test_masked_tokens_are_not_read(world):
    ranks.run(check_masked, world)


def check_nan(group):
    """Of a token of another rank it reaches the windows that hold it, and no others."""
    batch = one_pass.batch((60 * group.size(),), 21, kept=1)
    batch["logits"][62, 0] = torch.nan
    for objective in (objectives.nfpo(5), objectives.ppo()):
        check(batch, objective, ContextParallel(group), one=True)


def test_nan_crosses_ranks_in_windows_alone():
    ranks.run(check_nan, 2)


def check_promises(group):
    cp = ContextParallel(group)
    for objective in (objectives.ppo(), objectives.nfpo(2)):
        part, _ = local(one_pass.batch((1, 32 * group.size()), 30), cp)
        _, gradient, _ = run(part, objective, cp=cp)
        _, scaled, _ = run(part, objective, cp=cp, upstream=torch.tensor(-2.5))
        assert torch.equal(scaled, gradient * -2.5)
        logits = part.pop("logits")
        leaf = logits.clone().requires_grad_()
        x = leaf * 1
        version, other = x._version, x.square().sum()
        out = fusedpo.policy_loss_from_logits(x, **part, objective=objective, cp=cp, inplace=True)
        assert x._version > version
        assert torch.equal(x.detach(), gradient)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()
        out.loss.backward(retain_graph=True)
        assert torch.equal(leaf.grad, gradient)
        with pytest.raises(RuntimeError, match="first backward has taken it"):
            out.loss.backward()
        leaf = logits.clone().requires_grad_()
        out = fusedpo.policy_loss_from_logits(leaf, **part, objective=objective, cp=cp)
        (found,) = torch.autograd.grad(out.loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            found.square().sum().backward()
        with torch.no_grad(), Operators() as operators:
            of_no_gradient = fusedpo.policy_loss_from_logits(leaf, **part, objective=objective, cp=cp, inplace=True)
        assert not operators.one_pass()
        assert torch.equal(of_no_gradient.loss, out.loss.detach())
        assert torch.equal(leaf.detach(), logits)


def test_what_one_process_promises():
    ranks.run(check_promises, 2)


def check_strides(group):
    """Rows that no single stride counts, which a window needs: their gradients are right, wherever they go."""
    cp = ContextParallel(group)
    batch = one_pass.batch((2, 30 * group.size()), 30)
    part, _ = local(batch, cp)
    for objective in (objectives.ppo(), objectives.nfpo(3)):
        _, expected, _ = run(part, objective, cp=cp)
        for inplace in (False, True):
            wide = torch.zeros(2, 31, 47)
            view = wide[:, 1:, 10:40]
            view.copy_(part["logits"])
            leaf = view.detach().requires_grad_()
            others = {name: x for name, x in part.items() if name != "logits"}
            out = fusedpo.policy_loss_from_logits(leaf, **others, objective=objective, cp=cp, inplace=inplace)
            out.loss.backward()
            assert torch.equal(leaf.grad, expected)
            view.zero_()
            assert not wide.any()


def test_logits_of_any_strides():
    ranks.run(check_strides, 2)


def check_memory(group):
    """In place nothing of the size of the logits is allocated, with windows too; otherwise the gradient alone."""
    cp = ContextParallel(group)
    part, _ = local(one_pass.batch((64 * group.size(),), 20_000, torch.bfloat16), cp)
    part["logits"].requires_grad_()
    for objective in (objectives.ppo(), objectives.nfpo(4)):
        for inplace in (False, True):
            part["logits"].grad = None
            most = 0 if inplace else part["logits"].numel() * 2
            peak = peak_extra_bytes(
                lambda objective=objective, inplace=inplace: fusedpo.policy_loss_from_logits(
                    **part, objective=objective, cp=cp, inplace=inplace
                ).loss.backward()
            )
            assert most <= peak <= most + 100_000


def test_memory():
    ranks.run(check_memory, 2)


def counted(patch):
    """The gathers that are made."""
    calls, gathers = [], collectives.all_gather

    def count(*args, **kwargs):
        calls.append(args)
        return gathers(*args, **kwargs)

    patch.setattr(collectives, "all_gather", count)
    return calls


def check_collectives(group):
    """What is known before the logits are read, and what the pass gives; whatever the mask keeps."""
    cp = ContextParallel(group)
    part, _ = local(one_pass.batch((32 * group.size(),), 20), cp)
    bare = {"logits": part["logits"], "token_ids": part["token_ids"], "old_logprobs": None, "advantages": torch.ones(1)}
    cases = [(part, objectives.ppo(), 2), (part, objectives.nfpo(4), 2), (part, objectives.gspo(), 1)]
    cases += [(part | {"mask": part["mask"] & False}, objectives.nfpo(4), 2), (bare, objectives.reinforce(), 1)]
    for batch, objective, count in cases:
        with pytest.MonkeyPatch.context() as patch:
            calls = counted(patch)
            run(batch, objective, cp=cp)
        assert len(calls) == count


def test_two_gathers_forward_and_nothing_backward():
    ranks.run(check_collectives, 2)


def check_compiled(group):
    """One graph for both lengths, with the collectives in it: it takes two passes, as on one device."""
    cp = ContextParallel(group)
    rank, world = group.rank(), group.size()

    def from_logits(logits, ids, old, advantages):
        objective = objectives.nfpo(4, entropy_coef=0.1)
        return fusedpo.policy_loss_from_logits(logits, ids, old, advantages, objective=objective, cp=cp).loss

    def of_columns(logits, ids, old, advantages):
        objective = objectives.gspo()
        start = logits.shape[-1] * rank
        return fusedpo.policy_loss_from_logits(
            logits, ids, old, advantages, objective=objective, tp_group=group, vocab_start=start
        ).loss

    for loss in (from_logits, of_columns):
        torch._dynamo.reset()
        graphs = CompileCounterWithBackend("aot_eager")
        compiled, compiled_times = torch.compile(loss, fullgraph=True, dynamic=True, backend=graphs), []
        for count in (10, 18):
            batch = one_pass.batch((count * world,), 12 * world, kept=1)
            part, _ = local(batch, cp)
            if loss is of_columns:
                part = batch | {"logits": batch["logits"].chunk(world, -1)[rank].contiguous()}
            results = []
            for function in (compiled, loss):
                leaf = part["logits"].clone().requires_grad_()
                value = function(leaf, part["token_ids"], part["old_logprobs"], part["advantages"])
                value.backward()
                results.append((value.detach(), leaf.grad))
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
            compiled_times.append(graphs.frame_count)
        assert len(set(compiled_times)) == 1, compiled_times  # the second length needs nothing anew


def test_compiled_with_a_group():
    ranks.run(check_compiled, 2)
