"""What every benchmark shares: timing that compares providers fairly, ceilings, memory, launches and errors.

Providers of one case take turns, those of each spread over the whole case, so that whatever else the machine does falls
on all of them; a ratio within one run means something, an absolute time on another machine does not. The ceiling of a
case, such as one copy of its logits, is one of those who take turns. A row whose output is wrong has no time.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler writes two lines per use otherwise


@dataclass
class Provider:
    """``prepare()`` gives the call that is timed; ``check(result)`` gives its error, and ``allowed`` bounds that.

    ``reset()`` runs before each call, untimed: it restores what the call overwrites. ``missing``: why it cannot run.
    """

    name: str
    prepare: Callable[[], Run]
    check: Callable[[Any], float] | None = None
    allowed: float = float("inf")
    compiles: bool = False
    missing: str = ""
    reset: Callable[[], object] | None = None


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


@dataclass
class Row:
    """One provider in one case. Times in milliseconds; ``note`` says why there is none."""

    case: str
    group: str
    sizes: dict[str, int]
    provider: str
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    samples: int = 0
    gigabytes_per_second: float | None = None
    teraflops: float | None = None
    of_ceiling: float | None = None  # the ceiling's time over this time
    peak_extra_megabytes: float | None = None
    launches: int | None = None
    error: float | None = None  # largest difference from float64, over the largest value there
    compile_seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Effort:
    """Each provider is measured until its ``seconds`` are used up: ``least`` times at least, ``most`` times at most.

    What is fast, as ceilings are, gets many turns: its median must not depend on a moment of the machine. Of a call
    that takes longer than ``seconds``, the one that measures its memory counts, too, unless it compiles.
    """

    most: int
    seconds: float
    least: int = 2


EFFORT = {
    ("cpu", False): Effort(50, 1.0),
    ("cpu", True): Effort(20, 0.5),
    ("cuda", False): Effort(50, 1.0),
    ("cuda", True): Effort(20, 0.5),
}


@dataclass
class _Call:
    """What is timed: ``repeats`` calls at a time, for what the harness does between two samples leaves caches cold."""

    run: Run
    reset: Callable[[], object] | None
    repeats: int = 1
    times: list[float] = field(default_factory=list)
    seconds: float = 0.0  # used up, with all that is not timed
    due: float = 0.0  # when its next turn comes, in shares of the case

    def done(self, effort: Effort) -> float:
        """The share of its turns that it has had; all of them from 1 on."""
        turns = len(self.times)
        return max(turns / effort.most, min(turns / effort.least, self.seconds / effort.seconds))


def measure(case: Case, device: str, effort: Effort) -> list[Row]:
    """One row per provider, in their order."""
    torch._dynamo.reset()  # once: it takes from every provider what that has compiled
    rows = {p.name: Row(case.name, case.group, case.sizes, p.name, note=p.missing) for p in case.providers}
    calls: dict[str, _Call] = {}
    for provider in case.providers:
        if provider.missing:
            continue
        try:
            call = _first_calls(provider, rows[provider.name], device, effort)
            if call is not None and case.count_launches:
                rows[provider.name].launches = launches(call.run, device) or None
        except Exception as error:  # somebody else's code: their failure is a result, not the end of the run
            reason = (str(error).strip() or "no message").splitlines()[0][:120]
            rows[provider.name].note = f"failed: {type(error).__name__}: {reason}"
        else:
            if call is not None:
                calls[provider.name] = call

    clock = _cuda_milliseconds if device == "cuda" else _cpu_milliseconds
    gc.collect()
    gc.freeze()  # what is there already need not be searched before each call
    chance = random.Random(0)  # who follows a large release of memory pays for its pages: not always the same one
    waiting = list(calls.values())
    while waiting:
        call = min(waiting, key=lambda call: call.due)
        before, started = call.done(effort), time.perf_counter()
        if call.reset is not None:
            call.reset()
        gc.collect()
        call.times.append(clock(call.run, call.repeats))
        call.seconds += time.perf_counter() - started
        done = call.done(effort)
        call.due = done + chance.random() * (done - before)
        waiting = [call for call in waiting if call.done(effort) < 1]
    gc.unfreeze()

    for name, call in calls.items():
        row = rows[name]
        row.p20, *_, row.p80 = statistics.quantiles(call.times, n=5, method="inclusive")
        row.median, row.samples = statistics.median(call.times), len(call.times)
        row.gigabytes_per_second = case.bytes_moved / row.median / 1e6
        row.teraflops = case.flops / row.median / 1e9 or None
        row.of_ceiling = rows[case.ceiling].median and rows[case.ceiling].median / row.median
    return list(rows.values())


def _first_calls(provider: Provider, row: Row, device: str, effort: Effort) -> _Call | None:
    """Compiles, checks, and measures memory; None if the result is wrong."""
    started = time.perf_counter()
    run = provider.prepare()
    if provider.reset is not None:
        provider.reset()
    result = run()
    _synchronize(device)
    if provider.compiles or device == "cuda":  # Triton compiles then, too
        row.compile_seconds = time.perf_counter() - started
    if provider.check is not None:
        row.error = provider.check(result)
        if not row.error <= provider.allowed:
            row.note = f"wrong: error {row.error:.1e}, allowed {provider.allowed:.1e}"
            return None
    del result
    times: list[float] = []
    row.peak_extra_megabytes = peak_extra_bytes(lambda: times.append(_cpu_milliseconds(run, 1)), device) / 1e6
    if provider.reset is not None:
        return _Call(run, provider.reset)
    if times[0] > effort.seconds * 1e3 and not provider.compiles:  # those are not yet warm
        return _Call(run, None, times=times, seconds=times[0] / 1e3)
    started = time.perf_counter()
    run()
    _synchronize(device)
    return _Call(run, None, min(10, int(1 + 0.01 / (time.perf_counter() - started))))


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


# --------------------------------------------------------------------------------------- memory, launches, small calls


def peak_extra_bytes(run: Run, device: str) -> int:
    """The largest sum of what the allocator gave out and did not get back while ``run`` ran."""
    if device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


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
    return Provider("one read", lambda: lambda: words.max())


def one_copy(x: Tensor) -> Provider:
    target = torch.empty_like(x)
    return Provider("one copy", lambda: lambda: target.copy_(x))


# ------------------------------------------------------------------------------------------------------ other providers


def not_installed(package: str) -> str:
    """Why a provider is missing; empty if it is there."""
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """By torch.compile, for these shapes alone; from scratch, for :func:`measure` forgets what other cases compiled."""
    return torch.compile(function, dynamic=False, **options)
