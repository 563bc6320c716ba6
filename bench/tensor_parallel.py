"""Log-probs, and a loss, with the vocabulary split over processes, against what else gives the same.

    python -m fusedpo.bench.tensor_parallel --out DIR [--dtype float32 bfloat16] [--tokens 256] [--vocab 151936]

One process holds all columns (TP = 1), or each of two half of them (TP = 2), with one thread each, on gloo. Columns are
what a head has computed; what is timed ends with their gradient. A time is that of the rank that took longest, from a
barrier on. Everybody takes turns, in an order that differs from round to round; the samples are those of several
launches. Errors are those of the gradient, the worst of the ranks, against float64 for some rows. What this measures is
the work on logits and gloo on one machine: the links of an accelerator are not there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torch import distributed as dist

import fusedpo
from fusedpo.distributed import collectives

from . import launch, report
from .batch import OBJECTIVES, SEQUENCES, exact_coefficients, make_batch, some_rows
from .cli import MEMORY
from .harness import (
    CLONE,
    LARGE,
    Case,
    Provider,
    Run,
    allocated,
    clone,
    cold_caches,
    has_huge_pages,
    not_installed,
    page_faults,
    relative_error,
)
from .one_pass import ALLOWED
from .record import ENOUGH, PROCESSES, Row, faults, merge, summarise

NAME = "tensor_parallel"
RANKS = (1, 2)
TIMEOUT = timedelta(minutes=5)
OBJECTIVE = "NFPO N=4"


class Problem:
    """The columns of this rank, and what the gradient is of some rows of them."""

    def __init__(self, dtype: torch.dtype, tokens: int, vocab: int, ranks: int) -> None:
        # None: not split
        self.group = dist.group.WORLD if ranks > 1 else None
        width = vocab // ranks
        self.columns = slice(dist.get_rank() * width, (dist.get_rank() + 1) * width)
        g = torch.Generator().manual_seed(0)
        logits = torch.randn(tokens, vocab, generator=g).mul_(3).to(dtype)
        self.ids = torch.randint(vocab, (tokens,), generator=g)
        self.shard = logits[:, self.columns].clone()
        self.overwritten = self.shard.clone()
        self.rows = some_rows(tokens)
        self.allowed = ALLOWED[dtype]

        exact = torch.cat([torch.log_softmax(x.double(), -1) for x in logits[self.rows].split(4)])
        self.of_logprobs = -exact.exp()
        self.of_logprobs[torch.arange(len(self.rows)), self.ids[self.rows]] += 1
        chunks = [torch.log_softmax(x.double(), -1) for x in logits.split(16)]
        at_ids = [x.gather(-1, i[:, None])[:, 0] for x, i in zip(chunks, self.ids.split(16), strict=True)]
        logprobs, ids = (x.view(SEQUENCES, -1) for x in (torch.cat(at_ids), self.ids))
        torch.manual_seed(0)  # the same batch on all ranks
        self.batch = make_batch(logprobs.float(), ids)
        self.objective = OBJECTIVES[OBJECTIVE][0]
        self.coefficients = exact_coefficients(logprobs, self.batch, self.objective).flatten()[self.rows, None]

    def restore(self) -> None:
        self.overwritten.copy_(self.shard)

    def gathered(self) -> Tensor:
        """The columns of all ranks."""
        if self.group is None:
            return self.shard
        parts = collectives.gather(self.shard, self.group)
        return parts.transpose(0, 1).reshape(self.shard.shape[0], -1)

    def gradient(self, loss: Callable[[Tensor], Tensor], source: Tensor) -> Tensor:
        leaf = source.detach().requires_grad_()
        loss(leaf).backward()
        assert leaf.grad is not None
        return leaf.grad

    def provider(self, name: str, run: Run, truth: Tensor, *, missing: str = "", overwrites: bool = False) -> Provider:
        """``overwrites``: columns that are put in place again before each call, untimed."""

        def error(found: Tensor) -> float:
            rows = found.reshape(self.shard.shape)[self.rows]
            return relative_error(rows, truth[:, self.columns])

        reset = self.restore if overwrites else None
        return Provider(name, lambda: run, error, self.allowed, missing=missing, reset=reset)


def cases(dtypes: Sequence[torch.dtype], tokens: int, vocab: int, ranks: int) -> Iterator[Case]:
    for dtype in dtypes:
        p = Problem(dtype, tokens, vocab, ranks)
        name, sizes = str(dtype).removeprefix("torch."), {"TP": ranks, "T": tokens, "V": vocab}
        moved = 2.0 * p.shard.numel() * p.shard.element_size()
        for group, providers in (
            ("log-probs and gradient", of_logprobs(p)),
            (f"{OBJECTIVE}, loss and gradient", of_loss(p)),
        ):
            yield Case(f"{group}, {name}", sizes, [clone(p.shard), *providers], CLONE, moved)


def of_logprobs(p: Problem) -> Iterator[Provider]:
    """Of the sum of the log-probs, which is what all of these can differentiate."""
    one = "" if p.group is not None else "one rank has all columns"

    def fused(source: Tensor, inplace: bool = False) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            return fusedpo.token_logprobs(x, p.ids, tp_group=p.group, inplace_backward=inplace).sum()

        return p.gradient(loss, source)

    def of_gathered() -> Tensor:
        found = p.gradient(lambda x: fusedpo.token_logprobs(x, p.ids, inplace_backward=True).sum(), p.gathered())
        return found[:, p.columns]

    def eager_of_gathered() -> Tensor:
        def loss(x: Tensor) -> Tensor:
            return torch.log_softmax(x.float(), -1).gather(-1, p.ids[:, None]).sum()

        return p.gradient(loss, p.gathered())[:, p.columns]

    yield p.provider("fusedpo", lambda: fused(p.shard), p.of_logprobs)
    yield p.provider("fusedpo, in place", lambda: fused(p.overwritten, True), p.of_logprobs, overwrites=True)
    yield p.provider("fusedpo, logits gathered", of_gathered, p.of_logprobs, missing=one)
    yield p.provider("eager" + ("" if one else ", logits gathered"), eager_of_gathered, p.of_logprobs)
    yield p.provider(
        "megatron-core, overwrites float32 logits",
        lambda: megatron(p),
        p.of_logprobs,
        missing=not_installed("megatron"),
        overwrites=True,
    )
    yield p.provider("torch, loss_parallel", lambda: loss_parallel(p), p.of_logprobs, missing=one)


def of_loss(p: Problem) -> Iterator[Provider]:
    truth = p.of_logprobs * p.coefficients

    def fused(source: Tensor, group: dist.ProcessGroup | None, inplace: bool = False) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            options = {"objective": p.objective, "mask": p.batch.mask, "tp_group": group, "inplace": inplace}
            return fusedpo.policy_loss_from_logits(x, *p.batch[:3], **options).loss

        return p.gradient(loss, source.view(SEQUENCES, -1, source.shape[-1]))

    def of_gathered() -> Tensor:
        return fused(p.gathered(), None, True)[..., p.columns]

    one = "" if p.group is not None else "one rank has all columns"
    yield p.provider("fusedpo", lambda: fused(p.shard, p.group), truth)
    yield p.provider("fusedpo, in place", lambda: fused(p.overwritten, p.group, True), truth, overwrites=True)
    yield p.provider("fusedpo, logits gathered", of_gathered, truth, missing=one)


def megatron(p: Problem) -> Tensor:
    """Its cross entropy asks for the group by these names; it computes in float32, in place where that is the dtype."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import cross_entropy

    group = dist.group.WORLD
    assert group is not None
    for module in (parallel_state, cross_entropy):
        module.get_tensor_model_parallel_group = lambda *_, **__: group
        module.get_tensor_model_parallel_rank = group.rank
        module.get_tensor_model_parallel_world_size = group.size

    def loss(x: Tensor) -> Tensor:
        return -cross_entropy.vocab_parallel_cross_entropy(x[:, None], p.ids[:, None]).sum()

    return p.gradient(loss, p.overwritten)


def loss_parallel(p: Problem) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard, parallel

    assert p.group is not None
    mesh = dist.DeviceMesh.from_group(p.group, "cpu")
    leaf = p.shard.detach().requires_grad_()
    with parallel.loss_parallel():
        loss = torch.nn.functional.cross_entropy(DTensor.from_local(leaf, mesh, [Shard(1)]), p.ids, reduction="sum")
        (-loss).backward()
    assert leaf.grad is not None
    return leaf.grad


# ---------------------------------------------------------------------------------------------------------- one launch


def worst(value: float) -> float:
    """Of all ranks."""
    x = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x.item()


def measure(case: Case, turns: int) -> list[Row]:
    """Called by all ranks, which run the same calls in the same order."""
    rows, runs = {}, {}
    for p in case.providers:
        row = rows[p.name] = Row(
            case.name, case.group, case.sizes, p.name, case.ceiling, case.bytes_moved, note=p.missing
        )
        if p.missing:
            continue
        reset, run, results = p.reset or (lambda: None), p.prepare(), []
        reset()
        try:
            peak, total = allocated(lambda run=run, results=results: results.append(run()), "cpu")
        except Exception as error:  # somebody else's code; it fails on all ranks, or they wait in vain and all end
            row.note = f"failed: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:120]}"
            continue
        row.peak_extra_megabytes, row.allocated_megabytes = peak / 1e6, total / 1e6
        if p.check is not None:
            row.error = worst(p.check(results.pop()))
            if not row.error <= p.allowed:
                row.note = f"wrong: error {row.error:.1e}, allowed {p.allowed:.1e}"
                continue
        runs[p.name] = reset, run
    times: dict[str, list[float]] = {name: [] for name in runs}
    of_calls: dict[str, list[float]] = {name: [] for name in runs}
    chance, large = random.Random(0), case.bytes_moved > LARGE
    for _ in range(turns):
        for name in chance.sample(list(runs), len(runs)):
            reset, run = runs[name]
            reset()
            if large:
                cold_caches()
            gc.collect()
            dist.barrier()
            before, started = page_faults(), time.perf_counter()
            run()
            elapsed = time.perf_counter() - started
            of_calls[name].append(page_faults() - before)
            times[name].append(float(f"{worst(elapsed) * 1e3:.4g}"))
    for name, taken in times.items():
        rows[name].times, rows[name].page_faults = [taken], statistics.median(of_calls[name])
    return summarise(rows.values())


def work(rank: int, ranks: int, rendezvous: str, path: str, arguments: argparse.Namespace) -> None:
    """One rank of one launch; rank 0 writes a line of JSON per case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=TIMEOUT)
    with Path(path).open("w") if rank == 0 else contextlib.nullcontext() as file:
        if file is not None:
            file.write(json.dumps({"huge_pages": has_huge_pages()}) + "\n")
        dtypes = [launch.DTYPES[name] for name in arguments.dtype]
        for case in cases(dtypes, arguments.tokens, arguments.vocab, ranks):
            rows = measure(case, arguments.turns)
            if file is not None:
                file.write(json.dumps({"rows": [asdict(row) for row in rows]}) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def launched(ranks: int, argv: Sequence[str]) -> launch.Found:
    environment = os.environ | MEMORY | {"OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        path, rendezvous = Path(folder) / "rows.jsonl", f"file://{Path(folder) / 'rendezvous'}"
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", __spec__.name, *argv, "--worker", str(rank), str(ranks), rendezvous, str(path)],
                env=environment,
            )
            for rank in range(ranks)
        ]
        try:
            if any(worker.wait() for worker in workers):
                raise RuntimeError(f"a process of TP = {ranks} has failed: its message is above")
        finally:
            for worker in workers:
                worker.kill()
        return launch.read(path.read_text())


def main(argv: Sequence[str]) -> int:
    """1 if a row of this library is wrong or fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="for JSON and Markdown")
    parser.add_argument("--dtype", nargs="+", choices=launch.DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=256, help=f"a multiple of {SEQUENCES}")
    parser.add_argument("--vocab", type=int, default=151_936, help=f"a multiple of {max(RANKS)}")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="launches; default: %(default)s")
    parser.add_argument("--turns", type=int, help=f"samples of each; default: {ENOUGH} and more of all launches")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.turns = arguments.turns or -(-ENOUGH // arguments.processes) + 1
    if arguments.tokens % SEQUENCES or arguments.vocab % max(RANKS):
        parser.error(f"--tokens must be a multiple of {SEQUENCES}, --vocab of {max(RANKS)}")
    if arguments.worker:
        rank, ranks, rendezvous, path = arguments.worker
        work(int(rank), int(ranks), rendezvous, path, arguments)
        return 0
    console = Console(width=None if sys.stdout.isatty() else 120)
    header = report.environment("cpu", 1)
    found: list[list[launch.Found]] = []
    for ranks in RANKS:
        found.append([])
        for number in range(arguments.processes):
            started = time.perf_counter()
            found[-1].append(launched(ranks, argv))
            taken = f"{time.perf_counter() - started:.0f} s"
            console.print(f"TP = {ranks}, launch {number + 1} of {arguments.processes}: {taken}", highlight=False)
    rows = [row for launches in found for row in merge([one.rows for one in launches])]
    header |= {
        "huge_pages": all(one.huge_pages for launches in found for one in launches),
        "backend": "gloo, a thread per process",
        "megatron-core": report.version("megatron-core"),
    }
    for case, block in report.by_case(rows).items():
        report.show(case, block, console)
    report.write(NAME, rows, header, arguments.out)
    for reason in faults(json.loads((arguments.out / f"{NAME}.json").read_text())):
        console.print(f"may not be published: {reason}", style="red", soft_wrap=True, highlight=False)
    return int(any(r.provider.startswith("fusedpo") and r.note.startswith(("wrong", "failed")) for r in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
