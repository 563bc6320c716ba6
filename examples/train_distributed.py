"""The arithmetic task on several processes: data parallel times tensor parallel times context parallel.

    torchrun --nproc-per-node 2 examples/train_distributed.py --tensor 2     # the vocabulary split over two ranks
    torchrun --nproc-per-node 2 examples/train_distributed.py --context 2    # sequences split over two ranks
    torchrun --nproc-per-node 4 examples/train_distributed.py --tensor 2     # 2 x 2: batches split as well

What a trainer needs of fusedpo is in `loss_of`: the groups, this rank's part of each array, one denominator for the
batch of all ranks. The rest is plain torch.distributed: a mesh, a head of which each rank owns some rows, and the
gradients of what ranks share, summed. Attention over ranks is an engine's business: here every rank runs the
transformer on whole sequences and takes the hidden states of its tokens. All ranks sample the same answers from the
same weights.

With NCCL where there is a GPU for every rank, else gloo. The first rank then trains once more alone, from the same
start. Writes distributed.json and distributed.png to --out. Exits with 1 if the reward does not rise by --min-rise, or
if the losses of the first steps are not those of one process.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import train_arithmetic as arithmetic
from matplotlib import pyplot as plt
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

import fusedpo

SAME = 3  # steps after which a flipped sample may part the curves


class Ranks(NamedTuple):
    """The groups that this rank belongs to; None: not split."""

    data: ProcessGroup | None = None  # batches
    tensor: ProcessGroup | None = None  # vocabulary
    context: ProcessGroup | None = None  # sequences
    shared: ProcessGroup | None = None  # data and context: they hold the same weights, and parts of their gradient


def index(group: ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()


def size(group: ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def mesh_of(args: argparse.Namespace, device: str) -> Ranks:
    world = distributed.get_world_size()
    data = world // (args.tensor * args.context)
    names = ("data", "context", "tensor")
    mesh = distributed.init_device_mesh(device, (data, args.context, args.tensor), mesh_dim_names=names)
    shared = mesh["data", "context"]._flatten("shared")
    return Ranks(mesh.get_group("data"), mesh.get_group("tensor"), mesh.get_group("context"), shared.get_group())


class Policy(nn.Module):
    """The transformer of the arithmetic example, of whose head this rank owns some rows."""

    def __init__(self, whole: arithmetic.Transformer, ranks: Ranks) -> None:
        super().__init__()
        self.body, self.group = copy.deepcopy(whole), ranks.tensor
        self.rows = torch.arange(arithmetic.VOCABULARY).tensor_split(size(ranks.tensor))[index(ranks.tensor)]
        self.weight = nn.Parameter(whole.head.weight.detach()[self.rows].clone())
        self.bias = nn.Parameter(whole.head.bias.detach()[self.rows].clone())
        self.body.head = nn.Identity()

    def whole_head(self) -> tuple[Tensor, Tensor]:
        """For sampling: rows of other ranks are 0 here, so that the sum is the head."""
        with torch.no_grad():
            weight = self.weight.new_zeros(arithmetic.VOCABULARY, self.weight.shape[1])
            weight[self.rows] = self.weight
            bias = self.bias.new_zeros(arithmetic.VOCABULARY)
            bias[self.rows] = self.bias
            if self.group is not None:
                distributed.all_reduce(weight, group=self.group)
                distributed.all_reduce(bias, group=self.group)
        return weight, bias

    def sampler(self) -> nn.Module:
        head = nn.Linear(self.weight.shape[1], arithmetic.VOCABULARY)
        weight, bias = self.whole_head()
        head.weight, head.bias = nn.Parameter(weight), nn.Parameter(bias)
        return nn.Sequential(self.body, head)


def loss_of(
    policy: Policy, ranks: Ranks, batch: arithmetic.Rollouts, advantages: Tensor, objective: fusedpo.Objective
) -> fusedpo.PolicyLossOutput:
    """This rank's share of the loss of the whole mini-batch, in which all ranks have drawn the same rows."""
    mine = slice(index(ranks.data), None, size(ranks.data))
    ids, mask, old = batch.token_ids[mine], batch.mask[mine], batch.old_logprobs[mine]
    pad = -ids.shape[1] % size(ranks.context)  # ranks hold equally many tokens, the last of them masked ones
    ids, mask, old = (nn.functional.pad(x, (0, pad)) for x in (ids, mask, old))
    hidden = nn.functional.pad(policy.body(batch.input_ids[mine]), (0, 0, 0, pad))
    cp, where = None, torch.arange(ids.shape[1])
    if size(ranks.context) > 1:
        assert ranks.context is not None
        where = where.tensor_split(size(ranks.context))[index(ranks.context)]
        cp = fusedpo.ContextParallel(ranks.context, "contiguous")
    ids, mask, old = ids[:, where], mask[:, where], old[:, where]
    count = fusedpo.global_denominator(mask, objective, ranks.shared or alone(), cp=cp, gradients="sum")
    return fusedpo.policy_loss_from_hidden(
        hidden[:, where],
        policy.weight,
        ids,
        old,
        advantages[mine],
        objective=objective,
        bias=policy.bias,
        mask=mask,
        denominator=count,
        tp_group=ranks.tensor,
        vocab_start=int(policy.rows[0]) if size(ranks.tensor) > 1 else None,
        cp=cp,
    )


def alone() -> ProcessGroup:
    """Of this rank; every rank of the world makes one of each."""
    return ALONE[distributed.get_rank()]


ALONE: list[ProcessGroup] = []


def train(whole: arithmetic.Transformer, ranks: Ranks, args: argparse.Namespace) -> dict[str, list[float]]:
    policy = Policy(whole, ranks)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0)
    objective = fusedpo.objectives.nfpo(n=4)
    generator = torch.Generator().manual_seed(args.seed + 1)
    curves: dict[str, list[float]] = {"reward": [], "loss": []}
    for _ in range(args.steps):
        batch = arithmetic.collect(policy.sampler(), args, generator)
        advantages = fusedpo.advantages.maxpo(batch.rewards, k=2, group_size=args.group_size)
        losses = []
        for rows in torch.randperm(advantages.numel(), generator=generator).split(args.minibatch):
            part = arithmetic.Rollouts(*(x[rows] for x in batch))
            out = loss_of(policy, ranks, part, advantages[rows], objective)
            optimizer.zero_grad()
            out.loss.backward()
            share = out.loss.detach().clone()
            if ranks.shared is not None:
                for tensor in (share, *(p.grad for p in policy.parameters())):
                    distributed.all_reduce(tensor, group=ranks.shared)
            optimizer.step()
            losses.append(share.item())
        curves["reward"].append(batch.rewards.mean().item())
        curves["loss"].append(sum(losses) / len(losses))
    return curves


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("out"))
    add("--tensor", type=int, default=1, help="ranks between which the vocabulary is split")
    add("--context", type=int, default=1, help="ranks between which sequences are split")
    add("--digits", type=int, default=1, help="of each operand; sequences have 3 digits + 4 tokens")
    add("--warmup-steps", type=int, default=200)
    add("--steps", type=int, default=15)
    add("--prompts", type=int, default=32, help="per step")
    add("--group-size", type=int, default=8)
    add("--minibatch", type=int, default=64)
    add("--lr", type=float, default=5e-4)
    add("--min-rise", type=float, default=0.2)
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")) and torch.cuda.is_available()
    device = "cuda" if gpus else "cpu"
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.set_default_device("cuda")
    distributed.init_process_group("nccl" if gpus else "gloo")
    ranks = mesh_of(args, device)
    ALONE.extend(distributed.new_group([rank]) for rank in range(distributed.get_world_size()))
    torch.manual_seed(args.seed)
    start = arithmetic.warm_up(args)
    runs = {"split": train(start, ranks, args)}
    status = 0
    if distributed.get_rank() == 0:
        runs["one process"] = train(start, Ranks(), args)
        status = report(runs, args, size(ranks.data))
    distributed.barrier()
    distributed.destroy_process_group()
    sys.exit(status)


def report(runs: dict[str, dict[str, list[float]]], args: argparse.Namespace, data: int) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    settings = vars(args) | {"out": str(args.out), "data": data, "torch": torch.__version__}
    (args.out / "distributed.json").write_text(json.dumps({"settings": settings, "curves": runs}, indent=2) + "\n")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, name in zip(axes, ("reward", "loss"), strict=True):
        for (title, curves), style in zip(runs.items(), ("-", "--"), strict=True):
            axis.plot(curves[name], style, label=title)
        axis.set_title(name)
        axis.legend()
    figure.savefig(args.out / "distributed.png", dpi=120)
    split, one = runs["split"], runs["one process"]
    rise = arithmetic.final(split["reward"]) - split["reward"][0]
    apart = max(abs(a - b) for a, b in zip(split["loss"][:SAME], one["loss"][:SAME], strict=True))
    shape = f"data {data} x context {args.context} x tensor {args.tensor}"
    print(f"{shape}: the reward rises by {rise:.3f}; the first {SAME} losses are within {apart:.1e} of one process")
    return int(rise < args.min_rise or apart > 1e-4)


if __name__ == "__main__":
    main()
