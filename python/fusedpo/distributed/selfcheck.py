"""``python -m fusedpo verify`` on two processes: what is split is what is whole.

``python -m fusedpo.distributed.selfcheck RENDEZVOUS RANK RANKS`` is one of the processes. Under ``torchrun``, without
arguments, it takes what torchrun says, and NCCL where every process has a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

import fusedpo

SECONDS = 120


def findings(device: str) -> Iterator[tuple[str, float, float]]:
    """Errors and their bounds, on each rank of the default group."""
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    assert group is not None
    generator = torch.Generator().manual_seed(0)
    tokens, size = 32 * ranks, 4099  # so many that windows take one pass
    logits = (3 * torch.randn(2, tokens, size, generator=generator)).to(device)
    ids = torch.randint(size, (2, tokens), generator=generator).to(device)
    old = -torch.rand(2, tokens, generator=generator).to(device) - 4
    advantages = torch.randn(2, tokens, generator=generator).to(device)
    objective = fusedpo.objectives.nfpo(4, entropy_coef=0.01)
    arrays = (ids, old, advantages)

    def loss(x: torch.Tensor, *of: torch.Tensor, **split: object) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.clone().requires_grad_()
        out = fusedpo.policy_loss_from_logits(leaf, *of, objective=objective, **split)  # type: ignore[arg-type]
        out.loss.backward()
        assert leaf.grad is not None
        return out.loss.detach(), leaf.grad

    whole, gradient = loss(logits, *arrays)
    columns = logits.tensor_split(ranks, -1)
    start = sum(x.shape[-1] for x in columns[:rank])
    own = slice(start, start + columns[rank].shape[-1])
    split, found = loss(logits[..., own], *arrays, tp_group=group, vocab_start=start)
    yield "loss, vocabulary split", _error(split, whole), 1e-5
    yield "gradient, vocabulary split", _error(found, gradient[..., own]), 1e-5
    seen = [torch.empty_like(split) for _ in range(ranks)]
    dist.all_gather(seen, split)
    yield "the bits of the loss on all ranks", float(any(not torch.equal(seen[0], x) for x in seen)), 0.0

    for layout in ("contiguous", "zigzag"):
        cp = fusedpo.ContextParallel(group, layout)
        mine = cp.tokens("ids", ids[:, : tokens // ranks], None).order[rank]
        share, found = loss(logits[:, mine], *(x[:, mine] for x in arrays), cp=cp)
        dist.all_reduce(share)
        yield "loss, sequences split", _error(share, whole), 1e-5
        yield "gradient, sequences split", _error(found, gradient[:, mine]), 1e-5


def _error(found: torch.Tensor, truth: torch.Tensor) -> float:
    scale = truth.double().abs().max().clamp(min=1e-6)
    return float((found.double() - truth.double()).abs().max() / scale)


def on_two_processes() -> list[tuple[str, float, float]]:
    """Of both ranks together."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    results: list[tuple[str, float, float]] = []
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "fusedpo.distributed.selfcheck", f"file://{Path(directory) / 'rendezvous'}"]
        workers = [
            subprocess.Popen(
                [*command, str(rank), "2"], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            for rank in range(2)
        ]
        try:
            for worker in workers:
                out, errors = worker.communicate(timeout=SECONDS)
                if worker.returncode != 0:
                    raise RuntimeError((errors.strip().splitlines() or ["no message"])[-1])
                results += [tuple(line) for line in json.loads(out.strip().splitlines()[-1])]
        finally:
            for worker in workers:
                worker.kill()
    return results


def main() -> None:
    torch.set_num_threads(1)
    device, timeout = "cpu", timedelta(seconds=SECONDS)
    if len(sys.argv) > 3:
        rank, ranks = map(int, sys.argv[2:4])
        dist.init_process_group("gloo", init_method=sys.argv[1], rank=rank, world_size=ranks, timeout=timeout)
    else:
        gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            device = "cuda"
        dist.init_process_group("nccl" if gpus else "gloo", timeout=timeout)
    found = list(findings(device))
    dist.barrier()
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()
    sys.exit(int(len(sys.argv) < 4 and any(not error <= bound for _, error, bound in found)))


if __name__ == "__main__":
    main()
