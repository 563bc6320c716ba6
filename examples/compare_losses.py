"""What replacing an eager loss by the fused one changes: time, memory and accuracy at the vocabulary of a real model.

    python examples/compare_losses.py                                  # V = 151,936, 256 tokens, float32 and bfloat16
    python examples/compare_losses.py --tokens 512 --repeats 15
    python examples/compare_losses.py --quick                          # half the tokens, measured once

Three ways to the same number, PPO's clipped loss, and to its gradient with respect to the logits, on the CPU:

eager            plain PyTorch as trainers write it: `log_softmax` in float32, gather, ratio, clip, mean
fused            `fusedpo.policy_loss_from_logits`; entropies and metrics come with it
fused in place   the same with `inplace=True`: the gradient overwrites the logits

Time: median over the repetitions of loss and gradient, the three in turn, after an unmeasured call of each.
Memory: the largest growth of the process's resident memory during such a call, in multiples of the size of the logits;
the gradient counts, the logits do not. Measured on Linux only; small allocations do not show, they reuse freed memory.
Error: the largest difference from the eager computation in float64, of the loss relative to the loss, of the gradient
relative to its largest element. The gradient is rounded to the dtype of the logits.

Only the loss is measured: its share of a training step depends on the model. Ratios hold within a run; times cannot be
compared between machines. Writes losses.json and losses.png to --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fusedpo

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CLIP = 0.2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUICK = {"tokens": 128, "repeats": 1}

# --------------------------------------------------------------------------------------------------------------- losses


class Batch(NamedTuple):
    """T sampled tokens of one sequence, none of them masked."""

    logits: Tensor  # [T, V]
    token_ids: Tensor  # [T]
    old_logprobs: Tensor  # [T]
    advantages: Tensor  # [T]


def eager_loss(batch: Batch) -> Tensor:
    dtype = torch.promote_types(batch.logits.dtype, torch.float32)
    logprobs = torch.log_softmax(batch.logits.to(dtype), dim=-1).gather(-1, batch.token_ids.unsqueeze(-1)).squeeze(-1)
    ratio = (logprobs - batch.old_logprobs).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(ratio * batch.advantages, clipped * batch.advantages).mean()


def fused_loss(batch: Batch, inplace: bool = False) -> Tensor:
    objective = fusedpo.objectives.ppo(clip_low=CLIP, clip_high=CLIP)
    return fusedpo.policy_loss_from_logits(*batch, objective=objective, inplace=inplace).loss


LOSSES: dict[str, Callable[[Batch], Tensor]] = {
    "eager": eager_loss,
    "fused": fused_loss,
    "fused in place": lambda batch: fused_loss(batch, inplace=True),
}


def loss_and_gradient(loss: Callable[[Batch], Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    value = loss(batch)
    (gradient,) = torch.autograd.grad(value, batch.logits)
    return value.detach(), gradient


def make_batch(tokens: int, vocab: int, dtype: torch.dtype, generator: torch.Generator) -> Batch:
    """Tokens drawn from the policy, old log-probs at some distance from it, so that part of the ratios are clipped."""
    logits = torch.empty(tokens, vocab, dtype=dtype).normal_(std=3.0, generator=generator)
    probabilities = logits.float().softmax(-1)
    token_ids = torch.multinomial(probabilities, 1, generator=generator)
    noise, advantages = torch.randn(2, tokens, generator=generator)
    old_logprobs = probabilities.gather(-1, token_ids).squeeze(-1).log() + 0.2 * noise
    return Batch(logits.requires_grad_(), token_ids.squeeze(-1), old_logprobs, advantages)


# --------------------------------------------------------------------------------------------------------- measurements


def fresh(batch: Batch) -> Batch:
    """The batch with logits of its own, for a loss that may overwrite them."""
    return batch._replace(logits=batch.logits.detach().clone().requires_grad_())


def errors(loss: Callable[[Batch], Tensor], batch: Batch, truth: tuple[Tensor, Tensor]) -> tuple[float, float]:
    value, gradient = loss_and_gradient(loss, fresh(batch))
    loss_error = (value - truth[0]).abs() / truth[0].abs()
    gradient_error = (gradient - truth[1]).abs().max() / truth[1].abs().max()
    return loss_error.item(), gradient_error.item()


def seconds(loss: Callable[[Batch], Tensor], batch: Batch) -> float:
    batch = fresh(batch)
    start = time.perf_counter()
    loss_and_gradient(loss, batch)
    return time.perf_counter() - start


def resident(field: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at most since `extra_bytes` last started (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def extra_bytes(loss: Callable[[Batch], Tensor], batch: Batch) -> int | None:
    """By how much the resident memory grew, at its peak, over what it was before the call."""
    batch = fresh(batch)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present value
    except OSError:
        return None
    before = resident("VmRSS")
    loss_and_gradient(loss, batch)
    return resident("VmHWM") - before


class Result(NamedTuple):
    dtype: str
    loss: str
    seconds: list[float]
    extra_bytes: int | None
    logits_bytes: int
    loss_error: float
    gradient_error: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def extra_memory(self) -> float:
        """In multiples of the size of the logits; nan where it was not measured."""
        return float("nan") if self.extra_bytes is None else self.extra_bytes / self.logits_bytes


def measure(dtype: str, args: argparse.Namespace) -> list[Result]:
    batch = make_batch(args.tokens, args.vocab, DTYPES[dtype], torch.Generator().manual_seed(args.seed))
    truth = loss_and_gradient(eager_loss, batch._replace(logits=batch.logits.detach().double().requires_grad_()))
    accuracy = {name: errors(loss, batch, truth) for name, loss in LOSSES.items()}  # the unmeasured call
    del truth
    memory = {name: extra_bytes(loss, batch) for name, loss in LOSSES.items()}
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    for _ in range(args.repeats):
        for name, loss in LOSSES.items():
            times[name].append(seconds(loss, batch))
    size = batch.logits.numel() * batch.logits.element_size()
    return [Result(dtype, name, times[name], memory[name], size, *accuracy[name]) for name in LOSSES]


# --------------------------------------------------------------------------------------------------------------- report


def table(results: list[Result], args: argparse.Namespace) -> Table:
    title = f"PPO's loss and its gradient: {args.tokens} tokens, V = {args.vocab:,}, threads: {args.threads}"
    summary = Table(title=title, caption="extra memory: in multiples of the size of the logits")
    for heading in ("logits", "loss", "time", "faster", "extra\nmemory", "loss\nerror", "gradient\nerror"):
        summary.add_column(heading, justify="left" if heading in ("logits", "loss") else "right")
    for r in results:
        eager = next(x for x in results if x.dtype == r.dtype and x.loss == "eager")
        memory = "-" if r.extra_bytes is None else f"{r.extra_memory:.2f}"
        faster = f"{eager.median / r.median:.1f}x"
        cells = (f"{r.median * 1e3:.1f} ms", faster, memory, f"{r.loss_error:.1e}", f"{r.gradient_error:.1e}")
        summary.add_row(r.dtype, r.loss, *cells, end_section=r.loss == list(LOSSES)[-1])
    return summary


def plot(results: list[Result], path: Path) -> None:
    panels: dict[str, Callable[[Result], float]] = {
        "time (ms)": lambda r: r.median * 1e3,
        "peak extra memory / size of the logits": lambda r: round(r.extra_memory, 2),
        "gradient error against float64": lambda r: r.gradient_error,
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    width = 0.8 / len(LOSSES)
    for axis, (title, height) in zip(axes, panels.items(), strict=True):
        for index, loss in enumerate(LOSSES):
            heights = [height(r) for r in results if r.loss == loss]
            bars = axis.bar([d + index * width for d in range(len(DTYPES))], heights, width, label=loss)
            axis.bar_label(bars, fmt="%.3g", fontsize="small")
        axis.set_xticks([d + width for d in range(len(DTYPES))], list(DTYPES))
        axis.set_title(title)
    axes[-1].set_yscale("log")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("out"), help="directory for the plot and the figures")
    add("--vocab", type=int, default=151_936)
    add("--tokens", type=int, default=256)
    add("--repeats", type=int, default=7)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help=" ".join(f"--{name} {value}" for name, value in QUICK.items()))
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    results = [result for dtype in DTYPES for result in measure(dtype, args)]

    settings = vars(args) | {"out": str(args.out), "torch": torch.__version__, "fusedpo": fusedpo.__version__}
    settings["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    record = {"settings": settings, "results": [r._asdict() for r in results]}
    (args.out / "losses.json").write_text(json.dumps(record, indent=2) + "\n")
    plot(results, args.out / "losses.png")
    console = Console()
    console.print(table(results, args))
    console.print(f"{args.out / 'losses.png'}, {args.out / 'losses.json'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
