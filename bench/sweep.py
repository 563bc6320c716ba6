"""What a GPU has to choose between, timed beside its ceilings and checked: ``python bench/sweep.py --out sweep.json``.

``choose.py`` makes constants of the record. Each variant is compared with float64 on some rows before it is timed; one
that is wrong or does not run has no time, and the reason. What was measured is written after every variant, so that a
run that is stopped leaves all it has. On a CPU it is a rehearsal.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fusedpo
from fusedpo import _chosen, advantages, backends, objectives

ROWS_CHECKED = 64
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # relative to the largest number
# Values to try for the constants of _chosen.py, beside the present ones, and what they are called.
CONSTANTS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "L2_SHARE": ("{:.2f} of L2", (1 / 3, 1 / 2, 2 / 3, 1.0, 2.0)),
    "FORWARD": ("{} words, {} warps", ((128, 1), (256, 2), (512, 2), (1024, 8))),
    "BACKWARD": ("{} bytes, {} warps", ((4096, 2), (8192, 4), (16384, 4), (16384, 16))),
    "WALK": ("{} words, {} warps", ((1024, 8), (2048, 8))),
}
OBJECTIVE = objectives.ppo()

Call = Callable[[], Tensor]


class Variant(NamedTuple):
    """``backend`` runs ``operator``; ``run`` is timed, and gives what ``exact``, in float64, is compared with.

    ``setting``: a constant of _chosen.py, and its value meanwhile.
    """

    operator: str
    backend: str
    name: str
    run: Call
    exact: Call | None = None
    setting: tuple[str, Any] | None = None

    def with_each(self, constant: str) -> Iterator[Variant]:
        """One for each value of a constant, the present one first."""
        name, others = CONSTANTS[constant]
        for value in dict.fromkeys((getattr(_chosen, constant), *others)):
            text = name.format(*value) if isinstance(value, tuple) else name.format(value)
            yield self._replace(name=f"{self.name}, {text}", setting=(constant, value))


def of_rows(logits: Tensor) -> Iterator[Variant]:
    """Ceilings, and what reads or writes rows of logits ``[T, V]``."""
    tokens, device = len(logits), logits.device
    ids = torch.randint(logits.shape[1], (tokens,), device=device)
    signs = torch.randn(tokens, device=device)
    other = torch.empty_like(logits)
    some = slice(0, ROWS_CHECKED)
    old = torch.full((tokens,), -math.log(logits.shape[1]), device=device)

    yield Variant("ceiling", "torch", "read", lambda: logits.view(torch.int16).sum(dtype=torch.int64))
    yield Variant("ceiling", "torch", "copy", lambda: other.copy_(logits))
    yield Variant("ceiling", "torch", "write", lambda: other.zero_())

    def forward(x: Tensor, rows: slice) -> Tensor:
        return torch.stack(fusedpo.token_logprobs(x, ids[rows], return_entropy=True))

    def one_pass(x: Tensor, rows: slice) -> Tensor:
        x = x.detach().requires_grad_()
        given = (ids[rows], old[rows], signs[rows])
        fusedpo.policy_loss_from_logits(x, *given, objective=OBJECTIVE, denominator=1.0).loss.backward()
        assert x.grad is not None
        return x.grad

    def backward(x: Tensor, rows: slice) -> Call:
        """What follows a forward that is done once."""
        x = x.detach().requires_grad_()
        outputs = functools.cache(lambda: fusedpo.token_logprobs(x, ids[rows]))
        return lambda: torch.autograd.grad(outputs(), x, signs[rows], retain_graph=True)[0]

    def two_passes(x: Tensor, rows: slice) -> Tensor:
        x = x.detach().requires_grad_()
        lp = fusedpo.token_logprobs(x, ids[rows])
        fusedpo.policy_loss(lp, old[rows], signs[rows], objective=OBJECTIVE, denominator=1.0).loss.backward()
        assert x.grad is not None
        return x.grad

    def both(function: Callable[[Tensor, slice], Tensor]) -> tuple[Call, Call]:
        return lambda: function(logits, slice(None)), lambda: function(logits[some].double(), some)

    triton = "triton" if device.type == "cuda" else "native"
    yield from Variant("token_logprobs", triton, "forward", *both(forward)).with_each("FORWARD")
    gradients = backward(logits, slice(None)), backward(logits[some].double(), some)
    yield from Variant("token_logprobs", triton, "backward", *gradients).with_each("BACKWARD")
    yield Variant("one_pass", triton, "two passes", *both(two_passes))
    for constant in ("L2_SHARE", "WALK"):
        yield from Variant("one_pass", triton, "one pass", *both(one_pass)).with_each(constant)
    if device.type == "cuda":
        yield Variant("one_pass", "native", "one pass", *both(one_pass))


def of_tokens(device: torch.device, tokens: int) -> Iterator[Variant]:
    """Layers 2 and 3, by each backend that has a native kernel and one of Triton."""
    lp, old, values = (torch.randn(16, tokens // 16, device=device).mul(0.1) for _ in range(3))
    signs, rewards = torch.randn(16, 1, device=device), torch.randn(1024, device=device)
    step_ids = torch.randint(8, lp.shape, device=device)
    steps = {"step_rewards": torch.randn(16, 8, device=device), "step_ids": step_ids}
    step_values = torch.randn(16, 9, device=device)

    def loss() -> Tensor:
        x = lp.detach().requires_grad_()
        fusedpo.policy_loss(x, old, signs, objective=objectives.nfpo(4)).loss.backward()
        assert x.grad is not None
        return x.grad

    calls: dict[str, Call] = {
        "policy_loss": loss,
        "group_advantages": lambda: advantages.maxpo(rewards, k=4, group_size=16),
        "token_advantages": lambda: advantages.gae(lp, values, gamma=0.99, lam=0.95).advantages,
        "step_advantages": lambda: advantages.vineppo(step_values, **steps),
        "whiten": lambda: advantages.whiten(lp),
    }
    for operator, run in calls.items():
        for backend in ("native", "triton") if device.type == "cuda" else ("native",):

            def exact(run: Call = run) -> Tensor:
                with fusedpo.backend("reference"):
                    return run()

            yield Variant(operator, backend, operator, run, exact)


def milliseconds(run: Call, device: torch.device, seconds: float) -> float:
    """The median; of calls that follow each other on a GPU."""

    def once() -> float:
        if device.type != "cuda":
            begin = time.perf_counter()
            run()
            return 1000 * (time.perf_counter() - begin)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    once()
    times, stop = [once()], time.perf_counter() + seconds
    while len(times) < 50 and (time.perf_counter() < stop or len(times) < 3):
        times.append(once())
    return statistics.median(times)


def error(result: Tensor, exact: Tensor) -> float:
    """Of the first rows, relative to the largest number."""
    result = result.reshape(exact.shape) if result.numel() == exact.numel() else _first(result, exact)
    return ((result.double() - exact.double()).abs().max() / exact.double().abs().max()).item()


def _first(result: Tensor, exact: Tensor) -> Tensor:
    return result[tuple(slice(0, n) for n in exact.shape)]


def measure(variant: Variant, dtype: torch.dtype, device: torch.device, seconds: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "operator": variant.operator,
        "backend": variant.backend,
        "name": variant.name,
        "dtype": str(dtype).removeprefix("torch."),
        "setting": variant.setting,
        "milliseconds": None,
        "error": None,
        "reason": "",
    }
    forced = variant.operator != "ceiling"
    present = dict(vars(_chosen))
    try:
        vars(_chosen).update([variant.setting] if variant.setting else [])
        with fusedpo.backend(variant.backend) if forced else contextlib.nullcontext():
            result = variant.run()
            if variant.exact is not None:
                with fusedpo.backend("reference"):
                    row["error"] = error(result, variant.exact())
                if not row["error"] <= ALLOWED[dtype]:
                    row["reason"] = f"wrong by {row['error']:.1e}"
                    return row
            del result
            row["milliseconds"] = milliseconds(variant.run, device, seconds)
    except Exception as problem:  # the others are still to be measured
        row["reason"] = f"{type(problem).__name__}: {problem}"[:300]
    finally:
        vars(_chosen).update(present)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--backend", nargs="+", help="only these, added to a record that is there")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each variant")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "date": datetime.date.today().isoformat(),
        "fusedpo": fusedpo.__version__,
        "torch": torch.__version__,
        "native": backends.NATIVE_MISSING is None,
        "tokens": options.tokens,
        "vocab": options.vocab,
        "chosen": {name: getattr(_chosen, name) for name in CONSTANTS},
        "rows": [],
    }
    if options.backend and options.out.exists():
        rows = json.loads(options.out.read_text())["rows"]
        document["rows"] = [row for row in rows if row["backend"] not in options.backend]

    def add(variants: Iterator[Variant], dtype: torch.dtype) -> None:
        for variant in variants:
            if options.backend and variant.backend not in options.backend:
                continue
            row = measure(variant, dtype, device, options.seconds)
            document["rows"].append(row)
            options.out.write_text(json.dumps(document, indent=1) + "\n")
            time_ = row["reason"] if row["milliseconds"] is None else f"{row['milliseconds']:9.3f} ms"
            print(f"{row['dtype']:9s} {row['backend']:7s} {row['name']:34s} {time_}", flush=True)

    for dtype in ALLOWED:
        logits = torch.randn(options.tokens, options.vocab, device=device).mul_(3).to(dtype)
        add(of_rows(logits), dtype)
        del logits
    add(of_tokens(device, 16 * options.tokens), torch.float32)


if __name__ == "__main__":
    main()
