"""The path from hidden states with a gradient threshold, as a ratio to three bare matrix products, with its errors.

    python -m fusedpo.bench.threshold [--dtype bfloat16] [--entropy 1.0] [--thresholds 2^-16 ...] [--turns 3]

A row of the policy is a softmax of Gaussian logits that are so wide that it condenses on few tokens with a power law
behind them. Its scale is chosen so that the mean entropy is what is asked for. ``flat`` is the width of a model that
has not been trained. Everybody takes turns; what is printed are medians, and the extremes behind them. Errors are those
of the gradients, as Frobenius norms over those of the exact ones, beside the errors of the exact path in that dtype:
both against float64, from the same hidden states and weight, for some rows and columns.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fusedpo
from fusedpo import objectives


def entropies(hidden: Tensor, weight: Tensor, scale: float) -> Tensor:
    logp = torch.log_softmax(hidden.float() @ weight.float().T * scale, -1)
    return -(logp.exp() * logp).sum(-1)


def policy(tokens: int, width: int, vocab: int, entropy: float | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states, and a weight with which the rows have this mean entropy; None for flat ones."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(tokens, width, generator=g), torch.randn(vocab, width, generator=g) / width**0.5
    low, high = 1.0, 64.0
    some = hidden[:: max(1, tokens // 32)]
    while entropy is not None and high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if entropies(some, weight, middle).mean() > entropy else (low, middle)
    return hidden.to(dtype), (weight * low).to(dtype)


class Case:
    def __init__(self, args: argparse.Namespace, dtype: torch.dtype, entropy: float | None) -> None:
        hidden, weight = policy(args.tokens, args.width, args.vocab, entropy, dtype)
        self.hidden, self.weight = hidden.view(4, -1, args.width), weight
        with torch.no_grad():
            logp = [torch.log_softmax((h @ weight.T).float(), -1) for h in hidden.split(128)]
            self.entropy = torch.cat([-(x.exp() * x).sum(-1) for x in logp]).mean().item()
            self.ids = torch.cat([x.exp().multinomial(1)[:, 0] for x in logp]).view(4, -1)
            self.active = torch.cat([x.exp() for x in logp]).amax(0) if args.active else None
        self.advantages = torch.randn(4, 1)
        self.mask = None
        if args.masked:
            self.mask = torch.zeros(self.ids.shape, dtype=torch.bool)
            self.mask[:, : int(self.ids.shape[1] * (1 - args.masked))] = True

    def products(self) -> Callable[[], None]:
        rows = self.hidden.flatten(0, 1) if self.mask is None else self.hidden[self.mask]
        logits = rows @ self.weight.T

        def run() -> None:
            torch.mm(rows, self.weight.T, out=logits)
            _ = logits @ self.weight
            _ = logits.T @ rows

        return run

    def fused(self, threshold: float | None) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor, Tensor]:
            h, w = self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()
            out = fusedpo.policy_loss_from_hidden(
                h,
                w,
                self.ids,
                None,
                self.advantages,
                objective=objectives.ppo(),
                mask=self.mask,
                gradient_threshold=threshold,
            )
            out.loss.backward()
            return h.grad, w.grad, out.metrics["dropped"]

        return run


def turns(runs: dict[str, Callable[[], object]], count: int, seconds: float) -> Iterator[tuple[str, list[float]]]:
    """Times of each; ratios to the first are taken within a round."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for _ in range(count):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        if time.perf_counter() - began > seconds:
            break
    return iter(times.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--entropy", default="1.0", help="in nats, or flat")
    parser.add_argument("--thresholds", nargs="*", type=int, default=[-12, -14, -16, -18], help="powers of 2")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--masked", type=float, default=0)
    parser.add_argument("--active", action="store_true", help="count active columns")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151_936)
    args = parser.parse_args()
    case = Case(args, getattr(torch, args.dtype), None if args.entropy == "flat" else float(args.entropy))
    print(f"{args.dtype}, entropy {case.entropy:.2f}, {torch.get_num_threads()} threads")
    runs = {"three products": case.products(), "exact": case.fused(None)}
    runs |= {f"2^{power}": case.fused(2.0**power) for power in args.thresholds}
    times = dict(turns(runs, args.turns, args.seconds))
    floor = times["three products"]
    exact = case.fused(None)() if args.active else None
    for name, of in times.items():
        ratios = sorted(t / f for t, f in zip(of, floor, strict=True))
        line = f"{name:>15}: {statistics.median(of):.3f} s, {statistics.median(ratios):.3f} of three products"
        line += f" ({ratios[0]:.3f} to {ratios[-1]:.3f}, n = {len(of)})"
        if exact is not None and name.startswith("2^"):
            power = float(name[2:])
            *got, dropped = case.fused(2.0**power)()
            errors = [
                ((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(got, exact, strict=False)
            ]
            share = (case.active > 2.0**power).float().mean().item()
            line += f"; active {share:.2%}, dropped {dropped:.1e}, errors {errors[0]:.1e}, {errors[1]:.1e}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
