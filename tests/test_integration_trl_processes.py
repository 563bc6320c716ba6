"""Two processes over gloo: ``FusedGRPOTrainer``, which share groups of samples, and FSDP2, which share the weights."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("trl", reason="trl is not installed (extra [peers])")

from support import ranks
from support.trl_training import HIDDEN, REUSE, assert_same, builder, make_tokenizer, model, train
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trl import GRPOTrainer

from fusedpo import advantages, next_tokens, objectives
from fusedpo.integrations.trl.heads import HiddenHead, LogitsHead, add_fused_forward
from fusedpo.integrations.trl.lm_head import add_fused_lm_head

PROCESSES = 2
CONFIG = {"per_device_train_batch_size": 2, "num_generations": 4, "max_steps": 4, "ddp_backend": "gloo"}


def work(rank: int, port: int, path: Path) -> None:
    torch.set_num_threads(1)
    share_weights(rank, path)
    share_groups(rank, port, path)


def share_groups(rank: int, port: int, path: Path) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    ranks.be_started_by_torchrun(rank, PROCESSES, port)
    build = builder(make_tokenizer(), path)

    for loss_type in ("grpo", "bnpo", "dapo"):  # one of each normalisation
        config = {"loss_type": loss_type, "epsilon": 0.02} | CONFIG | REUSE
        expected = train(build(GRPOTrainer, **config))
        for fused in ({}, HIDDEN) if loss_type == "dapo" else ({},):  # the loss from hidden states takes what they take
            trainer = build(fused=fused, **config)
            assert trainer.accelerator.num_processes == PROCESSES
            assert_same(train(trainer), expected)

    trainer = build(fused={"advantage_estimator": ("maxpo", {"k": 2})}, **CONFIG, gradient_accumulation_steps=2)
    output = trainer._generate_and_score_completions([{"prompt": "w1"}] * 2)
    rewards = trainer._rewards_per_func[:, 0].float()
    expected = advantages.maxpo(rewards, k=2, group_size=4)
    torch.testing.assert_close(output["advantages"], expected[2 * rank : 2 * rank + 2])
    torch.distributed.barrier()  # gloo aborts a process whose peer has gone
    torch.distributed.destroy_process_group()


def share_weights(rank: int, path: Path) -> None:
    """FSDP2: the fused head of a sharded model, and the fused forwards, beside the same model in one piece."""
    torch.distributed.init_process_group("gloo", f"file://{path / 'rendezvous'}", rank=rank, world_size=PROCESSES)
    mesh = torch.distributed.init_device_mesh("cpu", (PROCESSES,))
    batches = [torch.randint(2, 40, (2, 6), generator=torch.Generator().manual_seed(r)) for r in range(PROCESSES)]
    heads = LogitsHead(), HiddenHead(chunk_tokens=5, in_float32=False)

    def loss(policy: Any, ids: torch.Tensor) -> torch.Tensor:
        out = policy(input_ids=ids, labels=ids, fused_lm_head=True)
        token_ids, mask = next_tokens(ids)
        total = out.loss + out.entropy.mean()
        given = {"token_ids": token_ids, "mask": mask}
        for head in heads:
            run = functools.partial(head, width=6)
            (logprobs, entropy), _ = policy(input_ids=ids, fused=functools.partial(run, loss=False, options=given))
            batch = {"old_logprobs": logprobs.detach() - 0.1, "advantages": torch.linspace(-1, 1, 12).view(2, 6)}
            options = {**given, **batch, "objective": objectives.nfpo(n=2, entropy_coef=0.1)}
            result, _ = policy(input_ids=ids, fused=functools.partial(run, loss=True, options=options))
            total = total + (logprobs * entropy).mean() + result.loss
        return total

    for head_apart in (False, True):  # in the root's group it is whole during the forward, apart it is a shard
        whole = model(num_hidden_layers=2)
        add_fused_lm_head(whole, temperature=0.8, outputs=("log_probs", "entropy"))
        add_fused_forward(whole)
        policy = copy.deepcopy(whole)
        for module in (*policy.model.layers, *([policy.lm_head] if head_apart else [])):
            fully_shard(module, mesh=mesh)
        fully_shard(policy, mesh=mesh)
        (sum(loss(whole, ids) for ids in batches) / PROCESSES).backward()
        loss(policy, batches[rank]).backward()
        assert_gradients(policy, whole, head_apart)
    split_sequences(rank, mesh)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class Gathered(torch.autograd.Function):
    """Keys or values ``[B, heads, T / P, D]`` of all ranks; a rank's loss is its share, so that gradients add up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(PROCESSES)]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total.chunk(PROCESSES, 2)[torch.distributed.get_rank()]


def split_sequences(rank: int, mesh: Any) -> None:
    """Context parallelism as SFT calls the head: chunks of each sequence, shifted labels, the number of all of them.

    torch splits attention on GPUs alone; here each rank gathers keys and values.
    """
    first, second, third, fourth = torch.arange(8).chunk(2 * PROCESSES)
    of_ranks = torch.cat((first, fourth, second, third))
    mine = of_ranks.chunk(PROCESSES)[rank]

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
        key, value = (Gathered.apply(x).repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        causal = mine[:, None] >= of_ranks
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, causal, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("gathered", attention)
    ids = torch.randint(2, 40, (2, 8), generator=torch.Generator().manual_seed(7))
    labels = ids.masked_fill(torch.arange(8) < 3, -100)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    whole = model(num_hidden_layers=2)
    add_fused_lm_head(whole, outputs=("log_probs", "entropy"))
    policy = copy.deepcopy(whole)
    policy.set_attn_implementation("gathered")
    for layer in policy.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    given = {"fused_lm_head": True, "num_items_in_batch": (shifted != -100).sum()}
    want = whole(input_ids=ids, labels=labels, **given)
    want.loss.backward()
    position_ids = mine[None].expand(2, -1)
    got = policy(input_ids=ids[:, mine], position_ids=position_ids, shift_labels=shifted[:, mine], **given)
    (got.loss * PROCESSES).backward()  # FSDP2 averages
    for name in ("log_probs", "entropy"):
        expected = torch.nn.functional.pad(getattr(want, name), (0, 1))[:, mine]
        torch.testing.assert_close(getattr(got, name), expected, rtol=1e-4, atol=1e-5)
    assert_gradients(policy, whole, "split sequences")


def assert_gradients(policy: Any, whole: Any, at: Any) -> None:
    for (name, got), want in zip(policy.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(got, DTensor)
        torch.testing.assert_close(
            got.grad.full_tensor(),
            want.grad,
            rtol=1e-4,
            atol=1e-5,
            msg=lambda m, at=(name, at): f"{at}: {m}",
        )


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Both in the same processes, which import the trainers once."""
    ranks.start(work, PROCESSES, tmp_path)
