"""Four processes on gloo, started once, that run functions of tests as one process group of 2, 3 or 4 ranks."""

from __future__ import annotations

import atexit
import os
import queue
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

RANKS = 4
TIMEOUT = 60  # seconds: what hangs fails

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)


def forkserver() -> Any:
    """Imports once for all processes."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fusedpo", "torch.distributed.tensor", "matplotlib.pyplot", "rich.progress"])
    return context


def _work(rank: int, rendezvous: str, tasks: Any, results: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS, timeout=timeout)
    groups = {n: dist.new_group(list(range(n)), timeout=timeout) for n in range(1, RANKS + 1)}
    results.put((rank, None, None))
    while True:
        task = tasks.get()
        if task is None:
            break
        function, world, arguments = task
        torch.manual_seed(0)
        try:
            results.put((rank, function(groups[world], *arguments), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
    os._exit(0)  # not destroyed: ranks that wait for others would wait on


class Pool:
    def __init__(self) -> None:
        context = forkserver()
        self._directory = tempfile.TemporaryDirectory()
        rendezvous = f"file://{Path(self._directory.name) / 'rendezvous'}"
        self._tasks = [context.Queue() for _ in range(RANKS)]
        self._results = context.Queue()
        threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        os.environ.update(dict.fromkeys(threads, "1"))
        try:
            self._processes = [
                context.Process(target=_work, args=(r, rendezvous, self._tasks[r], self._results), daemon=True)
                for r in range(RANKS)
            ]
            for process in self._processes:
                process.start()
        finally:
            for name, value in threads.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        self._collect(RANKS)

    def _collect(self, world: int) -> list[Any]:
        found, failures = {}, []
        for _ in range(world):
            try:
                rank, result, failure = self._results.get(timeout=2 * TIMEOUT)
            except queue.Empty:
                failures.append("a rank has not answered in time")
                break
            found[rank] = result
            if failure is not None:
                failures.append(f"rank {rank}: {failure}")
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return [found[rank] for rank in range(world)] if world <= len(found) else []

    def run(self, function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
        """What ``function(group, *arguments)`` returns on each rank; all raise if one does."""
        for tasks in self._tasks[:world]:
            tasks.put((function, world, arguments))
        return self._collect(world)

    def stop(self) -> None:
        global _pool
        _pool = None
        for process in self._processes:
            process.kill()
            process.join()
        self._directory.cleanup()


_pool: Pool | None = None


def run(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """:meth:`Pool.run` of the processes that all tests share."""
    global _pool
    if _pool is None:
        _pool = Pool()
        atexit.register(_pool.stop)
    return _pool.run(function, world, *arguments)


def be_started_by_torchrun(rank: int, world: int, port: int) -> None:
    """Sets the variables that a process of one machine finds then."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in {**address, **here}.items()})


def start(function: Callable[..., None], world: int, *arguments: Any) -> None:
    """``function(rank, port, *arguments)`` in processes of its own, for what makes a process group itself."""
    forkserver()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    torch.multiprocessing.start_processes(function, (port, *arguments), world, start_method="forkserver")
