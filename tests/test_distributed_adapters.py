"""Adapters where a trainer splits the vocabulary, or sequences, over two processes: results are those of one process.

The trainer is written here as far as a loss sees it: which part a rank holds, and how log-probs are gathered.
"""

import copy
import enum
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from support import ranks
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing import assert_close

import fusedpo
from fusedpo.distributed import ContextParallel
from fusedpo.integrations import _common, nemo_rl, prime_rl, skyrl, slime, torchtitan

pytestmark = [ranks.needs_gloo, pytest.mark.slow]
B, T, V, H = 3, 8, 30, 6
FLOAT64 = {"rtol": 1e-11, "atol": 1e-12}
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def stand_in(patch, name, **attributes):
    module = types.ModuleType(name)
    vars(module).update(attributes)
    patch.setitem(sys.modules, name, module)
    return module


def megatron(patch, tp=None, cp=None):
    stand_in(
        patch,
        "megatron.core.parallel_state",
        get_tensor_model_parallel_group=lambda: tp,
        get_context_parallel_group=lambda: cp,
        get_context_parallel_world_size=lambda: 1 if cp is None else cp.size(),
        get_data_parallel_world_size=lambda: 1,
    )


def columns(group):
    width = V // group.size()
    return slice(group.rank() * width, (group.rank() + 1) * width)


def chosen(logits, ids):
    return logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


def gradients(value, *leaves):
    return torch.autograd.grad(value, leaves)


class Gathered(torch.autograd.Function):
    """Log-probs of all ranks, in order, as trainers gather them: the gradient is the sum of those of all ranks."""

    @staticmethod
    def forward(ctx, local, where):
        ctx.where = where
        return where.gathered(local)[0]

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.where.cp.group)
        return ctx.where.own(total), None


# ------------------------------------------------------------------------------------- log-probs of a split vocabulary

MODULES = {
    nemo_rl: "nemo_rl.distributed.model_utils",
    skyrl: "skyrl.backends.skyrl_train.distributed.megatron.model_utils",
}


def check_logprobs(group):
    """The functions of NeMo-RL and SkyRL that :func:`patch_logprobs` replaces, called as they call them."""
    rank, world, mine = group.rank(), group.size(), columns(group)
    logits, ids, upstream = 3 * randn(B, T, V), torch.randint(0, V, (B, T), generator=rng()), randn(B, T, seed=1)
    x = logits.clone().requires_grad_()
    want = chosen(x, ids)
    (of_logits,) = gradients((want * upstream).sum(), x)
    entropy = -(x.softmax(-1) * x.log_softmax(-1)).sum(-1)
    (of_entropy,) = gradients((entropy * upstream).sum(), x)
    hidden, weight = randn(T, B, H, seed=2).requires_grad_(), randn(V, H, seed=3).requires_grad_()
    from_hidden = chosen((hidden @ weight.T).transpose(0, 1), ids)
    of_hidden, of_weight = gradients((from_hidden * upstream).sum(), hidden, weight)

    for adapter, name in MODULES.items():
        with pytest.MonkeyPatch.context() as patch:
            module = stand_in(patch, name, **{own.__name__: object() for own in adapter._LOGPROBS})
            megatron(patch, tp=group)
            adapter.patch_logprobs()
            for apply, more in (
                (module.DistributedLogprob.apply, (group,)),
                (module.ChunkedDistributedLogprob.apply, (3, group)),
            ):
                y = logits[..., mine].clone().requires_grad_()
                found = apply(y, ids, mine.start, mine.stop, *more)
                assert_close(found, want, **FLOAT64)
                assert_close(gradients((found * upstream).sum(), y)[0], of_logits[..., mine], **FLOAT64)
                alone = apply(y, ids, mine.start, mine.stop, *more, True)
                assert torch.equal(alone, found)
                assert not alone.requires_grad
            cut = slice(0, 17) if rank == 0 else slice(17, V)
            uneven = module.DistributedLogprob.apply(logits[..., cut], ids, cut.start, cut.stop, group)
            assert_close(uneven, want, **FLOAT64)
            if adapter is skyrl:
                found = module._VocabParallelEntropy.apply(y)
                assert_close(found, entropy, **FLOAT64)
                assert_close(gradients((found * upstream).sum(), y)[0], of_entropy[..., mine], **FLOAT64)
            else:
                h = hidden.detach().chunk(world)[rank].clone().requires_grad_()
                w = weight.detach()[mine].clone().requires_grad_()
                apply = module.ChunkedDistributedHiddenStatesToLogprobs.apply
                found = apply(h, ids, w, mine.start, mine.stop, 3, group)
                assert_close(found, from_hidden, **FLOAT64)
                found_h, found_w = gradients((found * upstream).sum(), h, w)
                assert_close(found_h, of_hidden.chunk(world)[rank], **FLOAT64)
                assert_close(found_w, of_weight[mine], **FLOAT64)
                assert not apply(h, ids, w, mine.start, mine.stop, 3, group, True).requires_grad
            adapter.unpatch_logprobs()


def test_log_probs_of_nemo_rl_and_skyrl():
    ranks.run(check_logprobs, 2)


# --------------------------------------------------------------------------------- losses that get the whole sequences


def check_loss(group, loss, layout, logprobs=None):
    """``loss`` of log-probs ``[B, T]`` over a split vocabulary, and over split sequences; returns what it returned."""
    mine, cp = columns(group), ContextParallel(group, layout)
    logits, ids = 3 * randn(B, T, V), torch.randint(0, V, (B, T), generator=rng())
    x = logits.clone().requires_grad_()
    want = loss(chosen(x, ids))
    (gradient,) = gradients(want[0], x)
    assert gradient.any()

    y = logits[..., mine].clone().requires_grad_()
    of_vocabulary = loss(_common.DistributedLogprob.apply(y, ids, mine.start, mine.stop, group))
    assert_close(of_vocabulary[0], want[0], **FLOAT64)
    assert_close(gradients(of_vocabulary[0], y)[0], gradient[..., mine], **FLOAT64)

    where = cp.tokens("ids", ids[:, : T // cp.size], None)
    at = where.order[group.rank()]
    z = logits[:, at].clone().requires_grad_()
    of_sequences = loss(Gathered.apply((logprobs or chosen)(z * 1, where.own(ids)), where))
    assert_close(of_sequences[0], want[0], **FLOAT64)
    assert_close(gradients(of_sequences[0] / cp.size, z)[0], gradient[:, at], **FLOAT64)
    return want, of_vocabulary, of_sequences


def tokens(seed):
    """Old log-probs, advantages, and which tokens count: the first sequence begins on one rank and ends on another."""
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 2] = mask[1, :5] = False
    return randn(B, T, seed=seed) - 3, randn(B, T, seed=seed + 1), mask


def check_nemo_rl(group):
    class LossType(enum.Enum):
        TOKEN_LEVEL = "token_level"
        SEQUENCE_LEVEL = "sequence_level"

    old, advantages, mask = tokens(4)
    data = {
        "advantages": advantages,
        "prev_logprobs": old,
        "generation_logprobs": old + 0.1 * randn(B, T, seed=6),
        "token_mask": mask.double(),
        "sample_mask": torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64),
    }
    config = {"reference_policy_kl_penalty": 0.0, "use_importance_sampling_correction": True}
    counts = torch.tensor(5.0), torch.tensor(40.0)
    kinds = enum.Enum("LossInputType", ["LOGPROB"])
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, "nemo_rl.algorithms.loss.interfaces", LossType=LossType, LossInputType=kinds)
        for token_level in (True, False):
            function = nemo_rl.ClippedPGLossFn({**config, "token_level_loss": token_level}, objective="nfpo", n=4)
            # position t predicts token t + 1, and that of the last one is dropped
            results = check_loss(group, lambda lp: function(lp[:, :-1], data, *counts), "zigzag")  # noqa: B023
            for _, metrics in results[1:]:
                assert metrics == pytest.approx(results[0][1], rel=1e-6)


def check_skyrl(group):
    old, advantages, mask = tokens(7)
    config = SimpleNamespace(off_policy_correction=None, eps_clip_low=0.2, eps_clip_high=0.3)
    for name, options in (("nfpo", {"n": 4}), ("gspo", {})):
        function = skyrl.policy_loss_fn(name, **options)
        results = check_loss(
            group,
            lambda lp: function(lp, old, advantages, config, mask.double()),  # noqa: B023
            "contiguous",
            skyrl.logprobs_from_logits,
        )
        assert results[0][1] == results[1][1] == results[2][1]


def test_losses_of_nemo_rl_and_skyrl():
    ranks.run(check_nemo_rl, 2)
    ranks.run(check_skyrl, 2)


# ------------------------------------------------------------------------------------------------------------- prime-rl


def check_prime_rl(group):
    """A pack of two samples, cut in the middle of one; FSDP2 shards the head over the same ranks."""
    world, lengths = group.size(), [5, 11]
    count = sum(lengths)
    hidden, ids = randn(1, count, H), torch.randint(0, V, (1, count), generator=rng())
    labels = ids.roll(-1, 1)
    temperature = torch.tensor([0.5, 1.0, 2.0])[torch.randint(0, 3, (1, count), generator=rng(1))]
    old, advantages = randn(count, seed=2) - 3, randn(count, seed=3)
    mask = torch.ones(count, dtype=torch.bool)
    mask[[0, 1, 5]] = False

    def loss(logprobs):
        """prime-rl shifts log-probs to the tokens that they are of, and calls the loss with one sample at a time."""
        shifted = torch.cat((logprobs.new_zeros(1), logprobs[0, :-1]))
        parts = (x.split(lengths) for x in (shifted, old, advantages, mask))
        total = 0
        for lp, inference, a, kept in zip(*parts, strict=True):
            inputs = SimpleNamespace(trainer_logprobs=lp, inference_logprobs=inference, advantages=a, loss_mask=kept)
            inputs.ref_logprobs = inputs.loss_weights = None
            total = total + prime_rl.policy_loss(inputs, objective="nfpo", n=4).loss
        return total / mask.sum()

    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, "prime_rl.trainer.rl.loss", LossOutputs=SimpleNamespace)
        head = prime_rl.FusedOutputLinear(H, V, chunk_size=3).double()
        sharded = copy.deepcopy(head)
        with torch.no_grad():
            head.weight.copy_(randn(V, H, seed=4))
            sharded.weight.copy_(head.weight)
        fully_shard(sharded, mesh=DeviceMesh.from_group(group, "cpu"))
        x = hidden.clone().requires_grad_()
        want = loss(head(x, labels, temperature)["logprobs"])
        want.backward()

        where = ContextParallel(group).tokens("labels", labels[:, : count // world], None)
        y = hidden.chunk(world, 1)[group.rank()].clone().requires_grad_()
        out = sharded(y, where.own(labels), where.own(temperature))
        found = loss(Gathered.apply(out["logprobs"], where))
        assert_close(found, want, **FLOAT64)
        (found / world).backward()  # prime-rl divides by the tokens of all ranks, those of one sequence among them
        assert_close(y.grad, x.grad.chunk(world, 1)[group.rank()], **FLOAT64)
        mean = sharded.weight.grad.full_tensor()  # which prime-rl undoes
        assert_close(mean * world, head.weight.grad, **FLOAT64)


def test_prime_rl():
    ranks.run(check_prime_rl, 2)


# ----------------------------------------------------------------------------------------------------------- torchtitan


def check_torchtitan(group):
    mine, cp = columns(group), ContextParallel(group, "zigzag")
    logits, ids = 3 * randn(B, T, V), torch.randint(0, V, (B, T), generator=rng())
    _, advantages, mask = tokens(10)
    old = chosen(logits, ids) + 0.3 * randn(B, T, seed=12)
    old[0, 3] = -torch.inf  # dropped
    given = {"generator_logprobs": old, "advantages": advantages, "loss_mask": mask}

    def call(x, at=slice(None), **split):
        local = {name: value[:, at] for name, value in given.items()}
        return torchtitan.PolicyLoss("nfpo", n=3, **split)(x, ids[:, at], 40.0, **local)

    x = logits.clone().requires_grad_()
    want, metrics = call(x)
    (gradient,) = gradients(want, x)

    y = logits[..., mine].clone().requires_grad_()
    mesh = DeviceMesh.from_group(group, "cpu")
    sharded = distribute_tensor(logits, mesh, [Shard(2)]).requires_grad_()
    for leaf, split in ((y, {"tp_group": group}), (sharded, {})):
        found, logged = call(leaf, **split)
        assert_close(found, want, **FLOAT64)
        assert_close(logged, metrics, **FLOAT32)
        (of_columns,) = gradients(found, leaf)
        of_columns = of_columns.to_local() if leaf is sharded else of_columns
        assert_close(of_columns, gradient[..., mine], **FLOAT64)

    at = cp.tokens("ids", ids[:, : T // cp.size], None).order[group.rank()]
    z = logits[:, at].clone().requires_grad_()
    share, logged = call(z, at, cp=cp)
    assert_close(gradients(share, z)[0], gradient[:, at], **FLOAT64)
    for name, value in logged.items():  # torchtitan adds them up over ranks, but for the largest
        total = value.double()
        dist.all_reduce(total, op=dist.ReduceOp.MAX if name.endswith("max") else dist.ReduceOp.SUM, group=group)
        assert_close(total, metrics[name].double(), **FLOAT32)


def test_torchtitan():
    ranks.run(check_torchtitan, 2)


# ---------------------------------------------------------------------------------------------------------------- slime

TOTALS, RESPONSES = [9, 4, 14], [6, 2, 5]


def slime_args(**settings):
    given = {"eps_clip": 0.2, "eps_clip_high": 0.3, "entropy_coef": 0.02, "rollout_temperature": 0.7}
    given |= {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "low_var_kl", "use_unbiased_kl": True}
    given |= {"advantage_estimator": "grpo", "n_samples_per_prompt": 3, "tis_clip": 2.0, "tis_clip_low": 0.5}
    return SimpleNamespace(**given | settings)


def slime_batch():
    def lists(seed, size=RESPONSES):
        return list(randn(sum(size), seed=seed).float().split(size))

    masks = [torch.ones(response, dtype=torch.int64) for response in RESPONSES]
    masks[0][2] = 0  # a tool's token
    return {
        "unconcat_tokens": list(torch.randint(0, V, (sum(TOTALS),), generator=rng()).split(TOTALS)),
        "total_lengths": TOTALS,
        "response_lengths": RESPONSES,
        "loss_masks": masks,
        "advantages": lists(1),
        "log_probs": [x - 3 for x in lists(2)],
        "ref_log_probs": [x - 3 for x in lists(3)],
        "rollout_log_probs": [x - 3 for x in lists(4)],
    }


def slime_reducer(masks, whole_masks):
    def reduce(x):
        parts = zip(x.split([len(mask) for mask in masks]), masks, whole_masks, strict=True)
        return sum((part * mask).sum() / whole.sum().clamp(min=1) for part, mask, whole in parts)

    return reduce


def zigzag(group):
    """Of each sample, the positions that this rank holds of chunks of equal length, past its end too."""
    last = 2 * group.size() - 1
    for total in TOTALS:
        size = -(-total // (last + 1))
        yield torch.cat([torch.arange(size) + chunk * size for chunk in (group.rank(), last - group.rank())])


def check_slime(group):
    batch, logits = slime_batch(), randn(sum(TOTALS) + 2, V, seed=9).float().mul_(3)
    mine = columns(group)
    rows, local, start = [], dict.fromkeys(("advantages", "log_probs", "ref_log_probs", "rollout_log_probs"), ()), 0
    masks = []
    for i, (positions, total, response) in enumerate(zip(zigzag(group), TOTALS, RESPONSES, strict=True)):
        rows.append(torch.where(positions < total, start + positions, -1))
        predicts = positions[(positions >= total - response - 1) & (positions < total - 1)] - (total - response - 1)
        local = {key: [*values, batch[key][i][predicts]] for key, values in local.items()}
        masks.append(batch["loss_masks"][i][predicts])
        start += total
    rows = torch.cat((*rows, torch.tensor([-1, -1])))  # padding last

    for settings in ({}, {"fusedpo_objective": "nfpo", "fusedpo_options": {"n": 4}}, {"advantage_estimator": "gspo"}):
        args, reduce = slime_args(**settings), slime_reducer(batch["loss_masks"], batch["loss_masks"])
        with pytest.MonkeyPatch.context() as patch:
            megatron(patch)
            x = logits[None].clone().requires_grad_()
            want, log = slime.policy_loss(args, batch, x, reduce)
            (gradient,) = gradients(want, x)

            megatron(patch, tp=group)
            y = logits[None, :, mine].clone().requires_grad_()
            found, _ = slime.policy_loss(args, batch, y, reduce)
            assert_close(found, want, **FLOAT32)
            assert_close(gradients(found, y)[0], gradient[..., mine], **FLOAT32)

            megatron(patch, cp=group)
            z = logits[rows].masked_fill(rows[:, None] < 0, torch.nan)[None].requires_grad_()
            reduce = slime_reducer(masks, batch["loss_masks"])
            share, logged = slime.policy_loss(args, {**batch, **local}, z, reduce)
            expected = gradient[:, rows].masked_fill(rows[:, None] < 0, 0)
            assert_close(gradients(share, z)[0], expected, **FLOAT32)
            assert set(logged) == set(log)
            for name, value in logged.items():
                value = value.clone()
                dist.all_reduce(value, group=group)
                assert_close(value, log[name], **FLOAT32)
            with pytest.raises(NotImplementedError, match="allgather_cp=True"):
                slime.policy_loss(slime_args(allgather_cp=True), {**batch, **local}, z, reduce)

    check_slime_others(group, batch, local, masks)


def check_slime_others(group, batch, local, masks):
    """Advantages and importance weights, of the tokens that this rank holds."""
    args = slime_args(fusedpo_advantage="maxpo", fusedpo_advantage_options={"k": 2})
    rewards = [1.0, 0.0, 0.5]
    old, rollout = (torch.cat(local[key]) for key in ("log_probs", "rollout_log_probs"))
    lengths = {"total_lengths": TOTALS, "response_lengths": RESPONSES}
    with pytest.MonkeyPatch.context() as patch:
        megatron(patch, cp=group)
        data = {"rewards": rewards, "loss_masks": batch["loss_masks"], "kl": local["log_probs"]}
        slime.advantages(args, data)
        want = fusedpo.advantages.maxpo(torch.tensor(rewards), k=2, group_size=3)
        for values, mask, value in zip(data["advantages"], masks, want, strict=True):
            assert torch.equal(values, value.expand(len(mask)))
        loss, _, metrics = slime.tis(
            args,
            pg_loss=torch.ones_like(old),
            train_log_probs=local["log_probs"],
            rollout_log_probs=local["rollout_log_probs"],
            loss_masks=batch["loss_masks"],
            **lengths,
        )
        kept = torch.cat(masks) != 0
        assert_close(loss, (old - rollout).exp().clamp(0.5, 2.0).masked_fill(~kept, 0), **FLOAT32)
        assert_close(metrics["tis"], (old - rollout).exp().masked_fill(~kept, 0), **FLOAT32)


def test_slime():
    ranks.run(check_slime, 2)
