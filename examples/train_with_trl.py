"""TRL's GRPOTrainer and fusedpo's FusedGRPOTrainer side by side: the same training, with another loss.

    python examples/train_with_trl.py                                  # NFPO with MaxPO advantages as the third curve
    python examples/train_with_trl.py --tokens 128 --objective opo --advantage opo
    python examples/train_with_trl.py --quick                          # a few seconds

Nothing is downloaded: the models are tiny and random, the tokenizer is built here.

First, the cost of the loss at the vocabulary of a real model. Both trainers train a transformer of one narrow layer
for a few steps on the same samples, so that head and loss are nearly all of a step. Three ways:

TRL                   `GRPOTrainer`: log-probs and entropy in tiles of the vocabulary, the loss in plain PyTorch
fusedpo               `FusedGRPOTrainer`: one function from the logits of the completions to loss and gradient
fusedpo from_hidden   the same with `from_hidden=True`: logits of --chunk-tokens tokens at a time

Time: median over the steps of forward, loss and backward; the first step, which generates, does not count. Memory: the
largest growth of the process's resident memory in such a step (Linux only). Ratios hold within a run and on this
machine; in a real model the head is a part of the step, and a GPU has other bottlenecks.

Then the curves: the sum of two digits, half a point for each of its digits, from a random model. TRL's and fusedpo's
training from one seed coincide until the last bits of a probability flip a sampled token; the third curve has an
objective and advantages that TRL does not have.

Writes trl.json (settings, figures and curves) and trl.png to --out. Exits with 1 if a reward does not rise by
--min-rise or the losses disagree: see `verdicts`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
import transformers
import trl
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

import fusedpo
from fusedpo.integrations.trl import FusedGRPOTrainer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

SYMBOLS = ["<pad>", "<eos>", *"0123456789+="]
LAST = 5  # the reward at the end is the mean over this many steps
QUICK = {"vocab": 20_000, "tokens": 32, "loss_steps": 2, "steps": 30}

Curves = dict[str, list[float]]

# ---------------------------------------------------------------------------------------------------- model and trainer


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def build_model(vocab: int, width: int, seed: int) -> Qwen2ForCausalLM:
    transformers.set_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return Qwen2ForCausalLM(config)


def build_config(out: Path, seed: int, **options: Any) -> GRPOConfig:
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    plain = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "lr_scheduler_type": "constant"}
    return GRPOConfig(str(out / "trl"), seed=seed, **quiet | plain | options)


class Bar(transformers.TrainerCallback):
    """A line of progress; TRL's metrics go to `trainer.state.log_history`, not to the screen."""

    def __init__(self, title: str) -> None:
        columns = (BarColumn(bar_width=8), TimeElapsedColumn(), TextColumn("{task.fields[latest]}"))
        self.progress = Progress(TextColumn(f"{title:28}"), *columns)

    def on_train_begin(self, args: GRPOConfig, state: Any, control: Any, **_: Any) -> None:
        self.progress.start()
        self.task = self.progress.add_task("", total=state.max_steps, latest="")

    def on_log(self, args: GRPOConfig, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            reward = f"reward {logs['reward']:.2f}  " if "reward" in logs else ""
            self.progress.update(self.task, advance=1, latest=f"{reward}loss {logs['loss']:.3f}")

    def on_train_end(self, args: GRPOConfig, state: Any, control: Any, **_: Any) -> None:
        self.progress.stop()


def train(title: str, trainer: GRPOTrainer) -> Curves:
    """Trains; returns a value per step of each metric that every step has."""
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(Bar(title))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {name: [log[name] for log in logs] for name in logs[0] if all(name in log for log in logs)}


# ----------------------------------------------------------------------------------------------------- cost of the loss


def resident(field: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at most since the peak was last set (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


class Measured(GRPOTrainer):
    """Records time and growth of memory of every training step that does not generate."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._buffered_inputs is None:
            self.seconds: list[float] = []
            self.extra_bytes: list[int] = []
            return super().training_step(*args, **kwargs)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present value
            before = resident("VmRSS")
        except OSError:
            before = None
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self.seconds.append(time.perf_counter() - start)
        if before is not None:
            self.extra_bytes.append(resident("VmHWM") - before)
        return loss


class MeasuredFused(FusedGRPOTrainer, Measured):
    pass


class Cost(NamedTuple):
    seconds: list[float]
    extra_bytes: list[int]
    losses: list[float]

    @property
    def milliseconds(self) -> float:
        return statistics.median(self.seconds) * 1e3

    @property
    def megabytes(self) -> float:
        """The largest growth of memory; nan where it was not measured."""
        return max(self.extra_bytes, default=float("nan")) / 2**20


def measure(args: argparse.Namespace) -> dict[str, Cost]:
    ways: dict[str, tuple[type[GRPOTrainer], dict[str, Any]]] = {
        "TRL": (Measured, {}),
        "fusedpo": (MeasuredFused, {}),
        "fusedpo from_hidden": (MeasuredFused, {"from_hidden": True, "chunk_tokens": args.chunk_tokens}),
    }
    config = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": args.tokens // 4}
    config |= {"num_iterations": args.loss_steps + 1, "max_steps": args.loss_steps + 1, "optim": "sgd"}
    costs = {}
    for name, (trainer_class, options) in ways.items():
        trainer = trainer_class(
            build_model(args.vocab, args.width, args.seed),
            lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
            build_config(args.out, args.seed, learning_rate=0.1, **config),
            train_dataset=Dataset.from_dict({"prompt": ["1 + 2 ="] * 4}),
            processing_class=build_tokenizer(),
            **options,
        )
        curves = train(f"V = {args.vocab:,}: {name}", trainer)
        costs[name] = Cost(trainer.seconds, trainer.extra_bytes, curves["loss"])
    return costs


# --------------------------------------------------------------------------------------------------------------- curves


def digits_right(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Half a point for each digit of the sum that stands in its place."""
    rewards = []
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        a, _plus, b, _equals = prompt.split()
        answer = [SYMBOLS[i] for i in ids]
        rewards.append(sum(0.5 * (x == y) for x, y in zip(answer, f"{int(a) + int(b):02}", strict=False)))
    return rewards


def compare(args: argparse.Namespace) -> dict[str, Curves]:
    estimator: Any = (args.advantage, {"k": 2}) if args.advantage in ("maxpo", "pkpo", "passk") else args.advantage
    runs: dict[str, tuple[type[GRPOTrainer], dict[str, Any]]] = {
        "TRL": (GRPOTrainer, {}),
        "fusedpo": (FusedGRPOTrainer, {}),
        f"fusedpo {args.objective} + {args.advantage}": (
            FusedGRPOTrainer,
            {"objective": args.objective, "advantage_estimator": estimator},
        ),
    }
    config = {"per_device_train_batch_size": 64, "num_generations": 8, "num_iterations": 2, "max_steps": args.steps}
    # With the default 1e-8, Adam magnifies gradients of rounding noise to steps of full size.
    config |= {"learning_rate": args.lr, "optim": "adamw_torch", "adam_epsilon": 1e-5, "max_completion_length": 2}
    prompts = [f"{a} + {b} =" for a in range(args.digits) for b in range(args.digits)]
    curves = {}
    for name, (trainer_class, options) in runs.items():
        trainer = trainer_class(
            build_model(len(SYMBOLS), 32, args.seed),
            digits_right,
            build_config(args.out, args.seed, **config),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=build_tokenizer(),
            **options,
        )
        curves[name] = train(f"sums: {name}", trainer)
        generating = [log["reward"] for log in trainer.state.log_history if "reward" in log]
        curves[name]["reward"] = generating  # a value per generation, of which each serves two steps
    return curves


# --------------------------------------------------------------------------------------------------------------- report


def final(curve: list[float]) -> float:
    return sum(curve[-LAST:]) / len(curve[-LAST:])


def tables(costs: dict[str, Cost], runs: dict[str, Curves], args: argparse.Namespace) -> Iterator[Table]:
    title = f"A training step without generation: V = {args.vocab:,}, {args.tokens} tokens, threads: {args.threads}"
    table = Table("", "time", "faster", "extra memory", "loss of the last step", title=title)
    for name, cost in costs.items():
        faster = f"{costs['TRL'].milliseconds / cost.milliseconds:.1f}x"
        memory = "-" if not cost.extra_bytes else f"{cost.megabytes:.0f} MiB"
        table.add_row(name, f"{cost.milliseconds:.0f} ms", faster, memory, f"{cost.losses[-1]:.6f}")
    yield table
    table = Table("", "reward", "loss of the last step", title="Adding numbers: first samples -> last samples")
    for name, curves in runs.items():
        reward = f"{curves['reward'][0]:.3f} -> {final(curves['reward']):.3f}"
        table.add_row(name, reward, f"{curves['loss'][-1]:.6f}")
    yield table


def plot(costs: dict[str, Cost], runs: dict[str, Curves], args: argparse.Namespace, path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    names = [name.replace(" ", "\n", 1) for name in costs]
    bars = {"milliseconds": "time of a step (ms)", "megabytes": "peak extra memory of a step (MiB)"}
    for axis, (field, title) in zip(axes[0], bars.items(), strict=True):
        heights = [round(getattr(cost, field), 1) for cost in costs.values()]
        axis.bar_label(axis.bar(names, heights, color=[f"C{i}" for i in range(len(names))]), fmt="%.0f")
        axis.margins(y=0.1)
        axis.set_title(f"{title}, V = {args.vocab:,}")
    for axis, name in zip(axes[1], ("reward", "loss"), strict=True):
        for index, (run, curves) in enumerate(runs.items()):
            axis.plot(curves[name], "--" if run == "TRL" else "-", color=f"C{index}", label=run, zorder=3 - index)
        axis.set_title(f"sums: {name}")
        axis.set_xlabel("samples" if name == "reward" else "step")
    axes[1][0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def verdicts(costs: dict[str, Cost], runs: dict[str, Curves], min_rise: float) -> Iterator[tuple[bool, str]]:
    """What must hold, and whether it does.

    At the large vocabulary the losses of all steps are within 1e-4 of TRL's, in the small task those of the first four
    at least, and the rewards of the last samples within 0.1. Every reward rises by `min_rise`.
    """
    for name in list(costs)[1:]:
        gap = max(abs(a - b) for a, b in zip(costs[name].losses, costs["TRL"].losses, strict=True))
        yield gap < 1e-4, f"{name}: losses within {gap:.1e} of TRL's"
    gaps = [abs(a - b) for a, b in zip(runs["fusedpo"]["loss"], runs["TRL"]["loss"], strict=True)]
    same = next((step for step, gap in enumerate(gaps) if gap > 1e-4), len(gaps))
    yield same >= 4, f"sums: losses of the first {same} steps within 1e-4 of TRL's"
    gap = abs(final(runs["fusedpo"]["reward"]) - final(runs["TRL"]["reward"]))
    yield gap < 0.1, f"sums: the rewards of the last samples within {gap:.3f} of TRL's"
    for name, curves in runs.items():
        rise = final(curves["reward"]) - curves["reward"][0]
        yield rise >= min_rise, f"{name}: the reward rises by {rise:.3f}, at least {min_rise} is asked for"


def arguments() -> argparse.Namespace:
    objectives = ("ppo", "gspo", "dppo_tv", "dppo_kl", "ctpo", "opo", "nfpo")
    estimators = ("rloo", "opo", "maxpo", "pkpo", "passk")
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("out"), help="directory for the plot and the figures")
    add("--vocab", type=int, default=151_936)
    add("--width", type=int, default=64, help="of the model at the large vocabulary")
    add("--tokens", type=int, default=256, help="of the completions of a step, in four sequences")
    add("--chunk-tokens", type=int, default=32, help="whose logits exist at a time, with from_hidden")
    add("--loss-steps", type=int, default=5, help="that are measured")
    add("--objective", choices=objectives, default="nfpo")
    add("--advantage", choices=estimators, default="maxpo")
    add("--digits", type=int, default=4, help="operands are below")
    add("--steps", type=int, default=80, help="of training on sums")
    add("--lr", type=float, default=1e-2, help="on sums")
    add("--min-rise", type=float, default=0.2, help="of the rewards, without which the exit status is 1")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=torch.get_num_threads(), help="at the large vocabulary; sums take one")
    add("--quick", action="store_true", help=" ".join(f"--{k.replace('_', '-')} {v}" for k, v in QUICK.items()))
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    costs = measure(args)
    torch.set_num_threads(1)  # so small a model is fastest on one
    runs = compare(args)

    settings = vars(args) | {"out": str(args.out), "torch": torch.__version__, "trl": trl.__version__}
    settings["fusedpo"] = fusedpo.__version__
    record = {"settings": settings, "costs": {name: cost._asdict() for name, cost in costs.items()}, "curves": runs}
    (args.out / "trl.json").write_text(json.dumps(record, indent=2) + "\n")
    plot(costs, runs, args, args.out / "trl.png")
    console = Console()
    for table in tables(costs, runs, args):
        console.print(table)
    results = list(verdicts(costs, runs, args.min_rise))
    for holds, claim in results:
        console.print(f"[{'green]yes' if holds else 'red]no '}[/]  {claim}", highlight=False, soft_wrap=True)
    console.print(f"{args.out / 'trl.png'}, {args.out / 'trl.json'}", highlight=False, soft_wrap=True)
    sys.exit(not all(holds for holds, _ in results))


if __name__ == "__main__":
    main()
