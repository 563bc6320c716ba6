"""Teaches a small transformer to add by reinforcement learning: a trainer for language models in miniature.

    python examples/train_arithmetic.py                                       # NFPO with MaxPO advantages
    python examples/train_arithmetic.py --objective grpo --advantage rloo --loss fused
    python examples/train_arithmetic.py --quick                               # one-digit numbers, a few seconds

What a trainer needs of fusedpo is in `collect`, `estimate_advantages` and `update`; the rest is the task, the model and
the report.

The task: continue "37+48=" with the digits of the sum, the last one first, and an end token. The policy starts from a
short supervised warm-up on careless demonstrations: 35% of their digits are drawn at random. About one in four of its
answers is right then. From there on it learns from its own samples alone: reward 1 for the right answer, else 0.

With --loss both (the default) it is trained twice from one seed, by the fused kernels and by the same loss in plain
PyTorch ("eager"). The curves coincide until a difference in the last bits of a probability flips a sampled token; from
there on the two runs see different samples. The transformer dominates the time here: the vocabulary has 13 tokens. What
the fused loss saves where it has 151,936 is measured by compare_losses.py.

Writes arithmetic.json (settings and curves) and arithmetic.png to --out. Exits with 1 if the reward does not rise by
--min-rise or the two losses disagree: see `verdicts`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import fusedpo

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PLUS, EQUALS, END, VOCABULARY = 10, 11, 12, 13  # 0 to 9 are the digits
WRONG_DIGITS = 0.35  # share of the digits of the demonstrations that are drawn at random
BACKENDS = {"fused": "auto", "eager": "reference"}  # which implementations of fusedpo run
METRICS = ("loss", "clip_frac", "ratio_min", "ratio_mean", "ratio_max")
SHOWN = "reward {reward:.2f}  loss {loss:.3f}  clip {clip_frac:.2f}  max ratio {ratio_max:.2f}"
LAST = 5  # the reward at the end is the mean over this many steps
SAME = 3  # in so few steps, rounding leads the two losses to no different samples yet
QUICK = {"digits": 1, "warmup_steps": 200, "steps": 15, "prompts": 32, "minibatch": 64}

Curves = dict[str, list[float]]

# ----------------------------------------------------------------------------------------------------------------- task


def problems(count: int, digits: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Prompts `[count, 2 * digits + 2]`, as 3 7 + 4 8 =, and answers `[count, digits + 2]`, as 5 8 END END."""
    powers = 10 ** torch.arange(digits + 2)
    a, b = torch.randint(10**digits, (2, count, 1), generator=generator)
    plus, equals = torch.full_like(a, PLUS), torch.full_like(a, EQUALS)
    operands = [x // powers[:digits].flip(0) % 10 for x in (a, b)]
    prompts = torch.cat((operands[0], plus, operands[1], equals), dim=1)
    total = a + b
    answers = (total // powers % 10).masked_fill((total < powers) & (powers > 1), END)
    answers[:, -1] = END
    return prompts, answers


def up_to_end(answers: Tensor) -> Tensor:
    """Mask of the tokens of each answer, its first END included."""
    ends = answers == END
    return ends.cumsum(1) - ends.long() == 0


def join(prompts: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """The sequences, and the mask of their answers."""
    mask = torch.cat((torch.zeros_like(prompts, dtype=torch.bool), up_to_end(answers)), dim=1)
    return torch.cat((prompts, answers), dim=1), mask


# ---------------------------------------------------------------------------------------------------------------- model


class Transformer(nn.Module):
    """A causal transformer: token ids `[B, T]` to logits `[B, T, V]`."""

    def __init__(self, length: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(length, width)
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.tokens(ids) + self.positions.weight[:length]
        logits: Tensor = self.head(self.blocks(x, mask=causal, is_causal=True))
        return logits


@torch.no_grad()
def sample(policy: Transformer, prompts: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """`length` tokens after each prompt, END after the first END."""
    ids = prompts
    for _ in range(length):
        probabilities = policy(ids)[:, -1].softmax(-1)
        ids = torch.cat((ids, torch.multinomial(probabilities, 1, generator=generator)), 1)
    answers = ids[:, prompts.shape[1] :]
    return answers.masked_fill(~up_to_end(answers), END)


def warm_up(args: argparse.Namespace) -> Transformer:
    """Supervised training on careless demonstrations, from scratch."""
    policy = Transformer(length=3 * args.digits + 4)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(args.seed)
    for _ in progress("warm-up", args.warmup_steps):
        prompts, answers = problems(256, args.digits, generator)
        wrong = (torch.rand(answers.shape, generator=generator) < WRONG_DIGITS) & (answers != END)
        answers = torch.where(wrong, torch.randint(10, answers.shape, generator=generator), answers)
        input_ids, mask = join(prompts, answers)
        token_ids, mask = fusedpo.next_tokens(input_ids, mask)
        logprobs = fusedpo.token_logprobs(policy(input_ids), token_ids, mask=mask)
        step(optimizer, -logprobs.sum() / mask.sum())
    return policy


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


# ----------------------------------------------------------------------------------------------- reinforcement learning


class Rollouts(NamedTuple):
    """Samples of one step, those of one prompt side by side. Position t of `[B, T]` predicts `token_ids[:, t]`."""

    input_ids: Tensor  # [B, T]
    token_ids: Tensor  # [B, T]
    mask: Tensor  # [B, T]: predicts a token that the policy sampled
    old_logprobs: Tensor  # [B, T]
    entropy: Tensor  # [B, T]
    rewards: Tensor  # [B]


@torch.no_grad()
def collect(policy: Transformer, args: argparse.Namespace, generator: torch.Generator) -> Rollouts:
    """Samples a group of answers to each prompt, scores them, and records the log-probs they were sampled with."""
    prompts, answers = (
        x.repeat_interleave(args.group_size, dim=0) for x in problems(args.prompts, args.digits, generator)
    )
    samples = sample(policy, prompts, answers.shape[1], generator)
    rewards = (samples == answers).all(dim=1).float()
    input_ids, mask = join(prompts, samples)
    token_ids, mask = fusedpo.next_tokens(input_ids, mask)
    logprobs, entropy = fusedpo.token_logprobs(policy(input_ids), token_ids, mask=mask, return_entropy=True)
    return Rollouts(input_ids, token_ids, mask, logprobs, entropy, rewards)


def estimate_advantages(rollouts: Rollouts, args: argparse.Namespace) -> Tensor:
    """How good was each sample within its group: `[B]`."""
    options: dict[str, Any] = {"group_size": args.group_size}
    if args.advantage in ("maxpo", "pkpo", "passk"):
        options["k"] = args.k
    elif args.advantage == "opo":
        options["lengths"] = rollouts.mask.sum(dim=1)
    advantages: Tensor = fusedpo.advantages.compute(args.advantage, rollouts.rewards, **options)
    return advantages


def update(
    policy: Transformer,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    advantages: Tensor,
    objective: fusedpo.Objective,
    args: argparse.Namespace,
    generator: torch.Generator,
) -> dict[str, float]:
    """Several optimiser steps on one batch of samples; the means of the metrics over them."""
    history = []
    for _ in range(args.epochs):
        for rows in torch.randperm(advantages.numel(), generator=generator).split(args.minibatch):
            out = fusedpo.policy_loss_from_logits(
                policy(rollouts.input_ids[rows]),
                rollouts.token_ids[rows],
                rollouts.old_logprobs[rows],
                advantages[rows],
                objective=objective,
                mask=rollouts.mask[rows],
                inplace=True,  # nothing else reads these logits
            )
            step(optimizer, out.loss)
            history.append(out.metrics | {"loss": out.loss.detach()})
    return {name: torch.stack([metrics[name] for metrics in history]).mean().item() for name in METRICS}


def build_objective(args: argparse.Namespace) -> fusedpo.Objective:
    preset = fusedpo.objectives.PRESETS[args.objective]
    return preset(n=args.n) if args.objective == "nfpo" else preset()


def train(loss: str, policy: Transformer, args: argparse.Namespace) -> Curves:
    """Trains `policy` in place; returns a value per step of each metric."""
    # With the default 1e-8, Adam magnifies gradients of rounding noise to steps of full size.
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0)
    objective = build_objective(args)
    generator = torch.Generator().manual_seed(args.seed + 1)
    records: list[dict[str, float]] = []
    with fusedpo.backend(BACKENDS[loss]):
        for _ in progress(loss, args.steps, records):
            rollouts = collect(policy, args, generator)
            advantages = estimate_advantages(rollouts, args)
            metrics = update(policy, optimizer, rollouts, advantages, objective, args, generator)
            best_of_k = fusedpo.advantages.max_at_k(rollouts.rewards, k=args.k, group_size=args.group_size)
            entropy = rollouts.entropy.sum() / rollouts.mask.sum()
            records.append(
                {
                    "reward": rollouts.rewards.mean().item(),
                    "best_of_k": best_of_k.mean().item(),
                    "entropy": entropy.item(),
                    **metrics,
                }
            )
    return {name: [record[name] for record in records] for name in records[0]}


# --------------------------------------------------------------------------------------------------------------- report


def progress(title: str, total: int, records: list[dict[str, float]] | None = None) -> Iterator[int]:
    """`range(total)` under a bar that shows the latest of the records."""
    latest_column = TextColumn("{task.fields[latest]}")
    with Progress(TextColumn(f"{title:7}"), BarColumn(bar_width=8), TimeElapsedColumn(), latest_column) as bar:
        task = bar.add_task(title, total=total, latest="")
        for index in range(total):
            yield index
            latest = SHOWN.format_map(records[-1]) if records else ""
            bar.update(task, advance=1, latest=latest)


def final(curve: list[float]) -> float:
    return sum(curve[-LAST:]) / len(curve[-LAST:])


def table(runs: dict[str, Curves], k: int) -> Table:
    summary = Table("", *runs, title="Adding numbers: first step -> last steps")
    rows = {
        "mean reward": "reward",
        f"best of {k}": "best_of_k",
        "entropy (nats)": "entropy",
        "clip fraction": "clip_frac",
        "largest ratio": "ratio_max",
    }
    for title, name in rows.items():
        summary.add_row(title, *(f"{curves[name][0]:.3f} -> {final(curves[name]):.3f}" for curves in runs.values()))
    return summary


def plot(runs: dict[str, Curves], k: int, path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    panels = {
        "reward": {"reward": "mean", "best_of_k": f"best of {k}"},
        "likelihood ratio": {"ratio_max": "largest", "ratio_mean": "mean", "ratio_min": "smallest"},
        "clip fraction": {"clip_frac": ""},
        "entropy (nats)": {"entropy": ""},
    }
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=True):
        for loss, style in (("fused", "-"), ("eager", "--")):
            for index, (name, label) in enumerate(curves.items() if loss in runs else ()):
                color = f"C{2 * index + (loss == 'eager')}"
                axis.plot(runs[loss][name], style, color=color, label=f"{loss} {label}".rstrip())
        axis.set_title(title)
        axis.legend(fontsize="small")
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def verdicts(runs: dict[str, Curves], min_rise: float) -> Iterator[tuple[bool, str]]:
    """What must hold, and whether it does.

    The mean reward of the last steps is `min_rise` above that of the first. In the first SAME steps both runs see the
    same samples, and their losses are within 1e-5; the rewards of the last steps are within 0.1.
    """
    for loss, curves in runs.items():
        first, last = curves["reward"][0], final(curves["reward"])
        yield (
            last - first >= min_rise,
            f"{loss}: the reward rises by {last - first:.3f}, at least {min_rise} is asked for",
        )
    if len(runs) == 2:
        fused, eager = runs["fused"], runs["eager"]
        losses, rewards = (
            [abs(a - b) for a, b in zip(fused[name], eager[name], strict=True)] for name in ("loss", "reward")
        )
        same = next((step for step, difference in enumerate(rewards) if difference), len(rewards))
        agreed = max(losses[:SAME])
        yield (
            same >= min(SAME, len(rewards)) and agreed < 1e-5,
            f"the same rewards in the first {same} steps; losses within {agreed:.1e} in the first {SAME}",
        )
        gap = abs(final(fused["reward"]) - final(eager["reward"]))
        yield gap < 0.1, f"the rewards of the last steps within {gap:.3f}, those of any step within {max(rewards):.3f}"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    objectives = ("ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "dppo_tv", "dppo_kl", "nfpo")
    estimators = ("grpo", "dr_grpo", "rloo", "opo", "maxpo", "pkpo", "passk")
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("out"), help="directory for the plot and the curves")
    add("--loss", choices=("fused", "eager", "both"), default="both")
    add("--objective", choices=objectives, default="nfpo")
    add("--n", type=int, default=4, help="likelihood ratios in NFPO's product")
    add("--advantage", choices=estimators, default="maxpo")
    add("--k", type=int, default=2, help="of best of k, for maxpo, pkpo and passk")
    add("--digits", type=int, default=2, help="of each operand")
    add("--warmup-steps", type=int, default=400)
    add("--steps", type=int, default=45)
    add("--prompts", type=int, default=64, help="per step")
    add("--group-size", type=int, default=8, help="samples per prompt")
    add("--epochs", type=int, default=2, help="passes over the samples of a step")
    add("--minibatch", type=int, default=256, help="samples per optimiser step")
    add("--lr", type=float, default=5e-4)
    add("--min-rise", type=float, default=0.2, help="of the reward, without which the exit status is 1")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1, help="so small a model is fastest on one")
    add("--quick", action="store_true", help=" ".join(f"--{k.replace('_', '-')} {v}" for k, v in QUICK.items()))
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    start = warm_up(args)
    losses = tuple(BACKENDS) if args.loss == "both" else (args.loss,)
    runs = {loss: train(loss, copy.deepcopy(start), args) for loss in losses}

    settings = vars(args) | {"out": str(args.out), "torch": torch.__version__, "fusedpo": fusedpo.__version__}
    (args.out / "arithmetic.json").write_text(json.dumps({"settings": settings, "curves": runs}, indent=2) + "\n")
    plot(runs, args.k, args.out / "arithmetic.png")
    console = Console()
    console.print(table(runs, args.k))
    results = list(verdicts(runs, args.min_rise))
    for holds, claim in results:
        console.print(f"[{'green]yes' if holds else 'red]no '}[/]  {claim}", highlight=False, soft_wrap=True)
    console.print(f"{args.out / 'arithmetic.png'}, {args.out / 'arithmetic.json'}", highlight=False, soft_wrap=True)
    sys.exit(not all(holds for holds, _ in results))


if __name__ == "__main__":
    main()
