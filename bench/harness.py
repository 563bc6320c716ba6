"""What every benchmark shares: timing that compares providers fairly, ceilings, memory, launches and errors.

Providers of one case take turns, those of each spread over the whole case, so that whatever else the machine does falls
on all of them; a ratio within one run means something, an absolute time on another machine does not. The ceilings of a
case, such as a clone of its logits, are among those who take turns. A row whose output is wrong has no time.

All have the same memory: torch's allocator asks for huge pages (:mod:`.cli` sees to that), as the kernels of this
library do on their own, and page faults are counted, which shows who did not get them.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .record import ENOUGH, Row, summarise

Run = Callable[[], Any]

READ, CLONE, COPY = "one read", "clone (new memory)", "copy (memory that is there)"

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler writes two lines per use otherwise


@dataclass
class Provider:
    """``prepare()`` gives the call that is timed; ``check(result)`` gives its error, and ``allowed`` bounds that.

    ``reset()`` runs before each call, untimed: it restores what the call overwrites. ``missing``: why it cannot run.
    ``ceiling``: the provider whose time is its floor, where that is not the one of the case. ``details(result)``: what
    else there is to say of it.
    """

    name: str
    prepare: Callable[[], Run]
    check: Callable[[Any], float] | None = None
    allowed: float = float("inf")
    compiles: bool = False
    missing: str = ""
    reset: Callable[[], object] | None = None
    ceiling: str = ""
    details: Callable[[Any], dict[str, float]] | None = None


@dataclass
class Case:
    """Providers that compute the same. The cases of one ``group`` differ in ``sizes`` only."""

    group: str
    sizes: dict[str, int]
    providers: Sequence[Provider]
    ceiling: str  # the provider whose time is the floor
    bytes_moved: float  # the fewest that the result needs: each input read once, each output written once
    flops: float = 0.0
    count_launches: bool = False

    @property
    def name(self) -> str:
        return ", ".join([self.group, *(f"{name} = {size:,}" for name, size in self.sizes.items())])


@dataclass(frozen=True)
class Effort:
    """Each provider has turns until its ``seconds`` are used up: ``least`` at least, ``most`` at most.

    One that is so slow that it would take longer than ``patience`` has fewer, but two.
    """

    least: int
    most: int = 15
    seconds: float = 0.3
    patience: float = 5.0


def effort(quick: bool, processes: int, patience: float = 15.0) -> Effort:
    """Of one of ``processes``: together they take :data:`ENOUGH` samples, where these fit into ``patience``."""
    return Effort(-(-ENOUGH // processes), patience=2.0 if quick else patience / processes)


LARGE = 16e6
"""Bytes from which on a case is measured one call a sample, with nothing of it in a cache; below, in calls that follow
each other."""


@dataclass
class _Call:
    """What is timed: ``repeats`` calls at a time."""

    run: Run
    reset: Callable[[], object]
    repeats: int = 1
    times: list[float] = field(default_factory=list)
    faults: list[float] = field(default_factory=list)  # page faults per call
    seconds: float = 0.0  # used up, with all that is not timed
    due: float = 0.0  # when its next turn comes, in shares of the case

    def turn(self, device: str) -> None:
        started = time.perf_counter()
        self.reset()
        gc.collect()
        clock = _cuda_milliseconds if device == "cuda" else _cpu_milliseconds
        before = page_faults()
        self.times.append(float(f"{clock(self.run, self.repeats):.4g}"))
        self.faults.append((page_faults() - before) / self.repeats)
        self.seconds += time.perf_counter() - started

    def done(self, effort: Effort) -> float:
        """The share of its turns that it has had; all of them from 1 on."""
        turns = len(self.times)
        enough = min(turns / effort.least, self.seconds / effort.seconds)
        return max(turns / effort.most, enough, min(turns / 2, self.seconds / effort.patience))


def measure(
    case: Case, device: str, effort: Effort, progress: Callable[[float], object] = lambda share: None
) -> list[Row]:
    """One row per provider, in their order; tells ``progress`` the share of all turns that are over."""
    torch._dynamo.reset()  # once: it takes from every provider what that has compiled
    rows = {p.name: _row(case, p) for p in case.providers}
    calls: dict[str, _Call] = {}
    for provider in case.providers:
        if provider.missing:
            continue
        try:
            call = _first_calls(provider, rows[provider.name], case, device)
            if call is not None and case.count_launches:
                rows[provider.name].launches = launches(call.run, device) or None
        except Exception as error:  # somebody else's code: their failure is a result, not the end of the run
            reason = (str(error).strip() or "no message").splitlines()[0][:120]
            rows[provider.name].note = f"failed: {type(error).__name__}: {reason}"
        else:
            if call is not None:
                calls[provider.name] = call

    gc.collect()
    gc.freeze()  # what is there already need not be searched before each call
    chance = random.Random(0)  # who follows a large release of memory pays for its pages: not always the same one
    waiting = list(calls.values())
    watch = Watch()
    while waiting:
        call = min(waiting, key=lambda call: call.due)
        before = call.done(effort)
        call.turn(device)
        done = call.done(effort)
        call.due = done + chance.random() * (done - before)
        waiting = [call for call in waiting if call.done(effort) < 1]
        progress(statistics.fmean(min(call.done(effort), 1.0) for call in calls.values()))
    others = watch.others()
    gc.unfreeze()

    for name, call in calls.items():
        rows[name].times, rows[name].others = [call.times], others
        rows[name].page_faults = statistics.median(call.faults)
    return summarise(rows.values())


def _row(case: Case, provider: Provider) -> Row:
    return Row(
        case.name,
        case.group,
        case.sizes,
        provider.name,
        provider.ceiling or case.ceiling,
        case.bytes_moved,
        case.flops,
        note=provider.missing,
    )


def _first_calls(provider: Provider, row: Row, case: Case, device: str) -> _Call | None:
    """Compiles, measures memory, and checks; None if the result is wrong."""
    large = case.bytes_moved > LARGE and device == "cpu"

    def reset() -> None:
        if provider.reset is not None:
            provider.reset()
        if large:
            cold_caches()

    started = time.perf_counter()
    run = provider.prepare()
    if provider.compiles or device == "cuda":  # Triton compiles then, too
        reset()
        run()
        _synchronize(device)
        row.compile_seconds = time.perf_counter() - started
    reset()
    results: list[Any] = []
    peak, total = allocated(lambda: results.append(run()), device)
    row.peak_extra_megabytes, row.allocated_megabytes = peak / 1e6, total / 1e6
    if provider.check is not None:
        row.error = provider.check(results[0])
        if not row.error <= provider.allowed:
            row.note = f"wrong: error {row.error:.1e}, allowed {provider.allowed:.1e}"
            return None
    if provider.details is not None:
        row.details = provider.details(results[0])
    results.clear()
    if large or provider.reset is not None:
        return _Call(run, reset)
    started = time.perf_counter()
    run()
    _synchronize(device)
    return _Call(run, reset, min(10, int(1 + 0.01 / (time.perf_counter() - started))))


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _cpu_milliseconds(run: Run, repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - started) / repeats * 1e3


def _cuda_milliseconds(run: Run, repeats: int) -> float:
    """As ``triton.testing.do_bench``, which has no place for a reset: a cold cache, and events around a call."""
    cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    total = 0.0
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        total += start.elapsed_time(end)
    return total / repeats


# ------------------------------------------------------------------------------------------------------ the same memory


def page_faults() -> int:
    """Of this process, until now, those that no disk was needed for."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def transparent_hugepage() -> str:
    """What the kernel allows: always, madvise or never; empty where it does not say."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.read_text().partition("[")[2].partition("]")[0] if path.exists() else ""


def has_huge_pages() -> bool:
    """Whether torch's allocator gets them here: a fault per 2 MiB of what it gives out, not one per 4 KiB."""
    size, before = 64 << 20, page_faults()
    torch.empty(size, dtype=torch.uint8).fill_(1)
    return page_faults() - before < size // 4096 / 4


def touch_memory(size: int = 4 << 30) -> None:
    """Takes and returns memory: a virtual machine may get a page from its host at the first touch, which takes as long
    as a whole call, and whoever comes first would pay for it.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.empty(min(size, free // 2), dtype=torch.uint8).fill_(1)


@functools.cache
def _other_memory() -> Tensor:
    return torch.zeros(64 << 20, dtype=torch.int32)


def cold_caches() -> None:
    """Reads 256 MB: what a call before has left in a cache is nobody's advantage."""
    _other_memory().max()


class Watch:
    """What other programs did since: on a shared machine that is part of every time."""

    def __init__(self) -> None:
        self.started, self.busy, self.own = self._now()

    @staticmethod
    def _now() -> tuple[float, float | None, float]:
        """Wall time, and processor time of everybody (with what a hypervisor took away) and of this process."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return time.perf_counter(), None, time.process_time()
        user, nice, system, _idle, _waiting, *interrupts = map(int, stat.read_text().splitlines()[0].split()[1:9])
        busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, time.process_time()

    def others(self) -> float | None:
        """The processors in use by others on average; None where the system does not say."""
        now, busy, own = self._now()
        if busy is None or self.busy is None:
            return None
        return round(max(0.0, busy - self.busy - (own - self.own)) / max(now - self.started, 0.1), 2)


# --------------------------------------------------------------------------------------- memory, launches, small calls


def peak_extra_bytes(run: Run, device: str) -> int:
    """The largest sum of what the allocator gave out and did not get back while ``run`` ran."""
    return allocated(run, device)[0]


def allocated(run: Run, device: str) -> tuple[int, int]:
    """The peak, and on the CPU all that was given out."""
    if device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = peak = total = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak, total = max(peak, now), total + max(event.nbytes(), 0)
    return peak, total


_VIEWS_AND_MEMORY = {
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


def launches(run: Run, device: str) -> int:
    """Kernels, copies and fills on a GPU. On the CPU operators: what they call in turn, views and allocations apart."""
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        run()
        _synchronize(device)
    if device == "cuda":
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())

    count, until = 0, 0  # in nanoseconds: the end of the operator before, which calls what begins earlier
    events = profile.profiler.kineto_results.events()  # without the tree of them, which takes seconds for a long loop
    for event in sorted(events, key=lambda event: (event.start_ns(), -event.duration_ns())):
        library, _, name = event.name().partition("::")
        if library in ("aten", "fusedpo") and event.start_ns() >= until:
            until = event.start_ns() + event.duration_ns()
            count += name not in _VIEWS_AND_MEMORY
    return count


def microseconds(run: Run, calls: int = 2000) -> float:
    """Processor time of a small call on one thread, the best of five rounds: what else runs does not count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(calls // 5):
        run()
    best = float("inf")
    for _ in range(5):
        started = time.process_time()
        for _ in range(calls // 5):
            run()
        best = min(best, (time.process_time() - started) / (calls // 5) * 1e6)
    torch.set_num_threads(threads)
    return best


# ------------------------------------------------------------------------------------------------- errors and ceilings


def relative_error(result: Tensor, truth: Tensor) -> float:
    """The largest difference from ``truth`` over its largest value; NaN never passes."""
    difference = (result.detach().double() - truth).abs().max() / truth.abs().max()
    return float(difference) if difference.isfinite() else float("inf")


def one_read(x: Tensor) -> Provider:
    """The largest of its 32-bit words: nothing reads memory faster."""
    words = x.view(torch.int32)
    return Provider(READ, lambda: lambda: words.max())


def clone(x: Tensor) -> Provider:
    """The floor of a result in memory of its own, which has to be had first."""
    return Provider(CLONE, lambda: lambda: x.clone())


def copy(x: Tensor) -> Provider:
    """The floor of a result in memory that is there already, such as that of the logits themselves."""
    target = torch.zeros_like(x)
    return Provider(COPY, lambda: lambda: target.copy_(x))


# ------------------------------------------------------------------------------------------------------ other providers


def not_installed(package: str) -> str:
    """Why a provider is missing; empty if it is there."""
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """By torch.compile, for these shapes alone; from scratch, for :func:`measure` forgets what other cases compiled."""
    return torch.compile(function, dynamic=False, **options)
