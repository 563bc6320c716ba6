"""The head split over processes: losses and all gradients are those of one process; engines for real."""

import copy

import pytest
import torch
from support import ranks
from support.recorded import presets
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import fusedpo
from fusedpo.distributed import ContextParallel, collectives

pytestmark = [ranks.needs_gloo, pytest.mark.slow]
B, T, H, V = 2, 12, 6, 29
PPO = fusedpo.objectives.ppo()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(dtype=torch.float64):
    g = rng()
    states = torch.randn(B, T, H, generator=g, dtype=torch.float64)
    weight, bias = torch.randn(V, H, generator=g, dtype=torch.float64), torch.randn(V, generator=g, dtype=torch.float64)
    ids, mask = torch.randint(0, V, (B, T), generator=g), torch.rand(B, T, generator=g) < 0.7
    lp = fusedpo.reference.linear_token_logprobs(states, weight, ids, return_entropy=False)
    given = {
        "old_logprobs": lp + 0.3 * torch.randn(B, T, generator=g, dtype=torch.float64),
        "advantages": torch.randn(B, T, generator=g, dtype=torch.float64),
        "ref_logprobs": lp + 0.3 * torch.randn(B, T, generator=g, dtype=torch.float64),
        "is_weights": torch.rand(B, T, generator=g, dtype=torch.float64),
    }
    tensors = [x.to(dtype) for x in (states, weight, bias)]
    return *tensors, ids, mask, {name: x.to(dtype) for name, x in given.items()}


def columns(world, rank):
    starts = [0, *torch.arange(V).tensor_split(world)[0].shape]
    widths = [p.numel() for p in torch.arange(V).chunk(world)]
    starts = [sum(widths[:r]) for r in range(world)]
    return slice(starts[rank], starts[rank] + widths[rank])


def whole(objective, inputs, ids, **given):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = fusedpo.policy_loss_from_hidden(*leaves[:2], ids, objective=objective, bias=leaves[2], **given)
    out.loss.backward()
    return out, [x.grad for x in leaves]


def check_presets(group):
    rank, world = group.rank(), group.size()
    mine = columns(world, rank)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-5)):
        for i, (name, objective) in enumerate(presets().items()):
            states, weight, bias, ids, mask, given = batch()
            temperature = torch.linspace(0.7, 1.5, B * T, dtype=torch.float64).reshape(B, T)
            head = {"softcap": 5.0, "logit_scale": 0.7, "temperature": temperature}
            head = head if i % 3 == 0 else {}
            want, grads = whole(objective, (states, weight, bias), ids, mask=mask, **given, **head)
            parts = states.to(dtype), weight[mine].to(dtype), bias[mine].to(dtype)
            if i % 2:  # sequence parallel
                parts = (parts[0].chunk(world, 1)[rank], *parts[1:])
            leaves = [x.clone().requires_grad_() for x in parts]
            head = {n: x.to(dtype) if isinstance(x, torch.Tensor) else x for n, x in head.items()}
            out = fusedpo.policy_loss_from_hidden(
                *(leaves[0], leaves[1], ids),
                **{n: x.to(dtype) for n, x in given.items()},
                **head,
                objective=objective,
                bias=leaves[2],
                mask=mask,
                chunk_tokens=None if i % 4 else 5 + rank,  # chunks are a matter of each rank
                tp_group=group,
                vocab_start=mine.start,
            )
            out.loss.backward()
            seen = collectives.gather(out.logprobs, group)
            assert all(torch.equal(seen[0], x) for x in seen)
            expected = [grads[0].chunk(world, 1)[rank] if i % 2 else grads[0], grads[1][mine], grads[2][mine]]

            def message(text, name=name):
                return f"{name}: {text}"

            assert_close(out.loss.double(), want.loss, rtol=tolerance, atol=tolerance, msg=message)
            for leaf, gradient in zip(leaves, expected, strict=True):
                assert_close(leaf.grad.double(), gradient, rtol=tolerance, atol=tolerance, msg=message)


@pytest.mark.parametrize("world", [2, 3])
def test_every_preset(world):
    ranks.run(check_presets, world)


def check_edges(group):
    rank, world = group.rank(), group.size()
    mine = columns(world, rank)
    states, weight, bias, ids, mask, given = batch(torch.float32)
    split = {"tp_group": group, "vocab_start": mine.start}
    nothing = torch.zeros_like(mask)
    calls = []
    for kept in (mask, nothing):
        leaves = [x.clone().requires_grad_() for x in (states, weight[mine])]
        calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ((collectives, "all_gather"), (collectives.dist, "all_reduce")):
                real = getattr(owner, name)

                def counted(*args, real=real, name=name, **kwargs):
                    calls.append(name)
                    return real(*args, **kwargs)

                patch.setattr(owner, name, counted)
            out = fusedpo.policy_loss_from_hidden(*leaves, ids, **given, mask=kept, objective=PPO, **split)
            out.loss.backward()
        assert calls == ["all_gather", "all_reduce"]
        assert out.metrics["rows"] == kept.sum()
    assert all(not x.grad.any() for x in leaves)
    # columns after vocab_size are padding
    want, grads = whole(PPO, (states, weight[:20], bias[:20]), ids % 20, mask=mask, **given)
    leaves = [x.clone().requires_grad_() for x in (states, weight[mine], bias[mine])]
    out = fusedpo.policy_loss_from_hidden(
        *leaves[:2], ids % 20, **given, mask=mask, objective=PPO, bias=leaves[2], vocab_size=20, **split
    )
    out.loss.backward()
    assert_close(out.loss, want.loss, rtol=1e-5, atol=1e-6)
    assert_close(leaves[0].grad, grads[0], rtol=1e-4, atol=1e-6)
    padded = nn.functional.pad(grads[1], (0, 0, 0, V - 20))[mine]
    assert_close(leaves[1].grad, padded, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="token_ids must have shape"):
        fusedpo.policy_loss_from_hidden(states[:, :5], weight[mine], ids, **given, objective=PPO, **split)
    with pytest.raises(ValueError, match="vocab_start must make the columns"):
        fusedpo.policy_loss_from_hidden(states, weight[mine], ids, **given, objective=PPO, tp_group=group)
    skipped = {**given, "advantages": given["advantages"].where(mask, 0)}
    out = fusedpo.policy_loss_from_hidden(
        *(states, weight[mine], ids), **skipped, objective=PPO, skip_zero_advantages=True, **split
    )
    assert out.metrics["rows"] == mask.sum()


def test_counts_padding_and_refusals():
    ranks.run(check_edges, 3)


def check_tensor_and_context(group):
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    cp, tp = ContextParallel(mesh.get_group("cp"), "zigzag"), mesh.get_group("tp")
    states, weight, bias, ids, mask, given = batch()
    mine, tokens = columns(2, tp.rank()), cp.tokens("ids", ids[:, : T // 2], None).order[cp.group.rank()]
    objective = fusedpo.objectives.nfpo(n=4, entropy_coef=0.1)
    want, grads = whole(objective, (states, weight, bias), ids, mask=mask, **given)
    leaves = [x.clone().requires_grad_() for x in (states[:, tokens], weight[mine], bias[mine])]
    out = fusedpo.policy_loss_from_hidden(
        *(leaves[0], leaves[1], ids[:, tokens]),
        **{n: x[:, tokens] for n, x in given.items()},
        mask=mask[:, tokens],
        objective=objective,
        bias=leaves[2],
        tp_group=tp,
        vocab_start=mine.start,
        cp=cp,
    )
    out.loss.backward()
    assert_close(leaves[0].grad, grads[0][:, tokens], rtol=1e-12, atol=1e-12)
    summed = collectives.gather(leaves[1].grad, cp.group).sum(0)
    assert_close(summed, grads[1][mine], rtol=1e-12, atol=1e-12)
    assert all(torch.equal(out.metrics[n].double(), x.double()) for n, x in want.metrics.items() if n == "tokens")


def test_with_sequences_that_are_split():
    ranks.run(check_tensor_and_context, 4)


class Model(nn.Module):
    """Something with a head, which is used inside of its forward, or not."""

    def __init__(self, head=None):
        super().__init__()
        self.body = nn.Linear(H, H, dtype=torch.float64)
        self.head = head or nn.Linear(H, V, dtype=torch.float64)

    def forward(self, x, *args, **kwargs):
        hidden = torch.tanh(self.body(x))
        return self.loss(hidden, *args, **kwargs) if args else hidden

    def loss(self, hidden, ids, **given):
        if isinstance(self.head, fusedpo.nn.LossHead):
            return self.head(hidden, ids, **given)
        return fusedpo.policy_loss_from_hidden(hidden, self.head.weight, ids, bias=self.head.bias, **given)


def gradients(model):
    found = {}
    for name, p in model.named_parameters():
        g = p.grad
        found[name.removeprefix("module.")] = g.full_tensor() if isinstance(g, DTensor) else g
    return found


def check_engines(group):
    """Two ranks with a row each; the second one's row has fewer tokens."""
    rank, _world = group.rank(), group.size()
    torch.manual_seed(3)
    start = Model()
    states, _, _, ids, mask, given = batch()
    mask[1, 3:] = False
    for objective in (PPO, fusedpo.objectives.grpo(clip_low=0.1, clip_high=0.2)):
        alone = copy.deepcopy(start)
        alone(states, ids, **given, mask=mask, objective=objective).loss.backward()
        want = gradients(alone)
        mine = slice(rank, rank + 1)
        local = {n: x[mine] for n, x in given.items()}
        count = fusedpo.global_denominator(mask[mine], objective, group)
        mesh = dist.DeviceMesh.from_group(group, "cpu")
        call = {**local, "mask": mask[mine], "objective": objective, "denominator": count}

        def check(model, forward=None, call=call, mine=mine, want=want):
            (forward or model)(states[mine], ids[mine], **call).loss.backward()
            for name, gradient in gradients(model).items():
                assert_close(gradient, want[name], rtol=1e-12, atol=1e-14, msg=lambda t, name=name: f"{name}: {t}")

        check(DistributedDataParallel(copy.deepcopy(start), process_group=group))
        check(fully_shard(copy.deepcopy(start), mesh=mesh))  # inside the forward of the root
        headed = copy.deepcopy(start)
        headed.head = fusedpo.nn.LossHead.of(headed.head)
        fully_shard(headed.head, mesh=mesh)  # in the forward of a module of its own
        check(fully_shard(headed, mesh=mesh))
        method = fully_shard(copy.deepcopy(start), mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(method, "loss")
        check(method, lambda x, ids, model=method, **given: model.loss(model(x), ids, **given))
        kept = fully_shard(copy.deepcopy(start), mesh=mesh, reshard_after_forward=False)
        check(kept, lambda x, ids, model=kept, **given: model.loss(model(x), ids, **given))

        sharded = fully_shard(copy.deepcopy(start), mesh=mesh, reshard_after_forward=True)
        hidden = sharded(states[mine])
        with pytest.raises(TypeError, match=r"weight must be a whole.*LossHead.*register_fsdp_forward_method"):
            sharded.loss(hidden, ids[mine], **call)
        partial = {"grad_placements": [Partial("avg")]}
        weight, bias = (p.full_tensor(**partial) for p in (sharded.head.weight, sharded.head.bias))
        fusedpo.policy_loss_from_hidden(hidden, weight, ids[mine], bias=bias, **call).loss.backward()
        for name, gradient in gradients(sharded).items():
            assert_close(gradient, want[name], rtol=1e-12, atol=1e-14)


def test_engines_average_to_the_gradient_of_the_whole_batch():
    ranks.run(check_engines, 2)


def check_dtensors(group):
    world = group.size()
    mesh = dist.DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    states, weight, bias, ids, mask, given = batch()
    want, grads = whole(PPO, (states, weight, bias), ids, mask=mask, **given)
    for placement in (Replicate(), Shard(1)):
        leaves = [
            distribute_tensor(x, mesh, [p]).requires_grad_()
            for x, p in ((states, placement), (weight, Shard(0)), (bias, Shard(0)))
        ]
        out = fusedpo.policy_loss_from_hidden(*leaves[:2], ids, **given, mask=mask, objective=PPO, bias=leaves[2])
        out.loss.backward()
        assert_close(out.loss, want.loss, rtol=1e-12, atol=1e-12)
        for leaf, gradient in zip(leaves, grads, strict=True):
            assert_close(leaf.grad.full_tensor(), gradient, rtol=1e-12, atol=1e-12)
    # plain hidden states, the same on all ranks: tp_group says that this is no weight of FSDP2
    leaves = [
        states.clone().requires_grad_(),
        *(distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (weight, bias)),
    ]
    call = {**given, "mask": mask, "objective": PPO}
    out = fusedpo.policy_loss_from_hidden(*leaves[:2], ids, **call, bias=leaves[2], tp_group=group)
    out.loss.backward()
    assert_close(leaves[0].grad, grads[0], rtol=1e-12, atol=1e-12)
    assert_close(leaves[1].grad.full_tensor(), grads[1], rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="weight must be a whole.*GatheredParameters"):
        fusedpo.policy_loss_from_hidden(*leaves[:2], ids, **call)
    with pytest.raises(TypeError, match="hidden must be split along its rows"):
        fusedpo.policy_loss_from_hidden(distribute_tensor(states, mesh, [Shard(2)]), leaves[1], ids, **call)
    # logits of parallelize_module, uneven columns
    model = parallelize_module(Model(), mesh, {"head": ColwiseParallel(use_local_output=False)})
    reference = Model(nn.Linear(H, V, dtype=torch.float64))
    reference.load_state_dict(
        {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.state_dict().items()}
    )
    for m in (model, reference):
        logits = m.head(m(states))
        fusedpo.policy_loss_from_logits(logits, ids, **call).loss.backward()
    theirs = gradients(reference)
    for name, gradient in gradients(model).items():
        assert_close(gradient, theirs[name], rtol=1e-12, atol=1e-13)
    assert world > 1


@pytest.mark.parametrize("world", [2, 3])
def test_dtensors(world):
    ranks.run(check_dtensors, world)


def check_fsdp_and_tensor_parallel(group):
    """2 x 2: inside the forward, the weight is a DTensor on the mesh of the vocabulary alone."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(3)
    start = Model()
    states, _, _, ids, mask, given = batch()
    alone = copy.deepcopy(start)
    alone(states, ids, **given, mask=mask, objective=PPO).loss.backward()
    want = gradients(alone)
    model = copy.deepcopy(start)
    model.head = fusedpo.nn.LossHead.of(model.head)
    for name in ("weight", "bias"):
        p = distribute_tensor(getattr(model.head, name).detach(), mesh["tp"], [Shard(0)])
        setattr(model.head, name, nn.Parameter(p))
    fully_shard(model.head, mesh=mesh["dp"])
    for name in ("weight", "bias"):
        p = distribute_tensor(getattr(model.body, name).detach(), mesh["tp"], [Replicate()])
        setattr(model.body, name, nn.Parameter(p))
    fully_shard(model, mesh=mesh["dp"])
    row = mesh.get_local_rank("dp")
    mine = slice(row, row + 1)
    count = fusedpo.global_denominator(mask[mine], PPO, mesh.get_group("dp"))
    x = distribute_tensor(states[mine], mesh["tp"], [Replicate()])
    local = {n: t[mine] for n, t in given.items()}
    model(x, ids[mine], **local, mask=mask[mine], objective=PPO, denominator=count).loss.backward()
    for name, gradient in gradients(model).items():
        assert_close(gradient, want[name], rtol=1e-12, atol=1e-14, msg=lambda t, name=name: f"{name}: {t}")


def test_fsdp_and_tensor_parallel():
    ranks.run(check_fsdp_and_tensor_parallel, 4)
