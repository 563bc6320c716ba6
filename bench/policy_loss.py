"""Layer 2 on this machine: NFPO's loss and gradient from log-probs, against the reference and against plain PyTorch.

python bench/policy_loss.py [--quick] [--threads 2] [--out out/bench]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Provider, Row, measure, microseconds, progress, relative_error, report
from torch import Tensor

import fusedpo
from fusedpo import objectives

VIEWS_AND_MEMORY = {
    "empty",
    "empty_like",
    "empty_strided",
    "as_strided",
    "detach",
    "view",
    "reshape",
    "expand",
    "unbind",
}
Loss = Callable[[Tensor], Tensor]


def operators(run: Callable[[], object]) -> int:
    """How many operators of PyTorch ran: what they call in turn, views and allocations not counted."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()

    def called(events: list) -> int:
        return sum(
            called(event.cpu_children)
            if not event.name.startswith(("aten::", "fusedpo::"))
            else event.name.partition("::")[2] not in VIEWS_AND_MEMORY
            for event in events
        )

    return called([event for event in profile.events() if event.cpu_parent is None])


def case(rows: int, width: int, n: int, repeats: int) -> tuple[list[Row], dict[str, int]]:
    logprobs = -torch.rand(rows, width)
    old = logprobs + 0.1 * torch.randn(rows, width)
    advantages, mask = torch.randn(rows), torch.rand(rows, width) < 0.9
    objective = objectives.nfpo(n)

    def loss(lp: Tensor) -> Tensor:
        return fusedpo.policy_loss(lp, old, advantages, objective=objective, mask=mask).loss

    def reference(lp: Tensor) -> Tensor:
        with fusedpo.backend("reference"):
            return loss(lp)

    def plain(lp: Tensor) -> Tensor:
        """Padded rows only, no metrics."""
        x = torch.where(mask, (lp - old).clamp(-20, 20), 0)
        ahead = torch.nn.functional.pad(x.detach(), (0, n))
        log_trace = sum((ahead[:, k : k + width] for k in range(1, n)), torch.zeros(()))
        ratio, a = x.exp(), advantages[:, None]
        surrogate = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)) * log_trace.clamp(-20, 20).exp()
        return torch.where(mask, surrogate, 0).sum() / mask.sum().clamp(min=1)

    exact = logprobs.double().requires_grad_()
    with fusedpo.backend("reference"):
        options = {"objective": objective, "mask": mask}
        fusedpo.policy_loss(exact, old.double(), advantages.double(), **options).loss.backward()

    def both(function: Loss, compiled: bool) -> Callable[[], Callable[[], Tensor]]:
        def prepare() -> Callable[[], Tensor]:
            torch._dynamo.reset()
            call = torch.compile(function, dynamic=False, fullgraph=True) if compiled else function

            def run() -> Tensor:
                x = logprobs.detach().requires_grad_()
                call(x).backward()
                return x.grad

            return run

        return prepare

    providers = {
        "fusedpo": (loss, False),
        "eager, reference": (reference, False),
        "torch.compile, reference": (reference, True),
        "eager, plain": (plain, False),
        "torch.compile, plain": (plain, True),
    }
    measured = measure(
        f"NFPO N={n}, {rows} x {width}, forward+backward",
        [
            Provider(name, both(*how), lambda gradient: relative_error(gradient, exact.grad), 1e-5, how[1])
            for name, how in providers.items()
        ],
        bytes_moved=13 * logprobs.numel(),  # two log-probs and a mask in, a gradient out
        ceiling="fusedpo",
        repeats=repeats,
    )
    return measured, {name: operators(both(*how)()) for name, how in providers.items() if not how[1]}


def overhead() -> dict[str, float]:
    """Processor time of one small call in microseconds, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    leaf, old, advantages = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), torch.randn(4)
    objective = objectives.nfpo(4)
    result = {
        "policy_loss": microseconds(lambda: fusedpo.policy_loss(leaf, old, advantages, objective=objective)),
        "policy_loss and backward": microseconds(
            lambda: fusedpo.policy_loss(leaf, old, advantages, objective=objective).loss.backward()
        ),
    }
    torch.set_num_threads(threads)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small case, three repeats")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = [(rows, width, n) for rows, width in ((64, 4096), (8, 32_768)) for n in (1, 2, 4, 8, 64)]
    results: list[Row] = []
    counts = {}
    for rows, width, n in progress([(8, 512, 4)] if arguments.quick else cases, "policy_loss"):
        block, counted = case(rows, width, n, 3 if arguments.quick else 9)
        results += block
        counts[block[0].case] = counted
    report("policy_loss", results, arguments.out, operators=counts, overhead_microseconds=overhead())


if __name__ == "__main__":
    main()
