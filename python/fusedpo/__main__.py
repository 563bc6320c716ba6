"""``fusedpo env | verify | bench``: what is here and why, whether it is right, and how fast it is."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from . import _cli, backends, verify


class Choice(NamedTuple):
    """What runs an operator on a device, and why the other implementations do not."""

    operator: str
    device: str
    runs: str
    reasons: tuple[str, ...]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    return [name for name in _cli.DEVICES if name == "cpu" or getattr(torch, name).is_available()]


def _environment() -> dict[str, Any]:
    found: dict[str, Any] = {
        "fusedpo": _version("fusedpo"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "triton": backends.TRITON_MISSING or _version("triton"),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": [
            f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
            for i in range(torch.cuda.device_count())
        ],
        "gpu kernels": "executed as compiled, instruction by instruction on a CPU; not yet on a device",
    }
    if backends.NATIVE_MISSING is None:
        from ._C import build_info

        found["native"] = build_info()
    else:
        found["native"] = f"missing: {backends.NATIVE_MISSING}"
    variables = (name for name in sorted(os.environ) if name.startswith("FUSEDPO_") or name == "TRITON_INTERPRET")
    return found | {name: os.environ[name] for name in variables}


def _choices() -> Iterator[Choice]:
    for device in _devices():
        for operator in backends.IMPLEMENTATIONS:
            try:
                runs = backends.choose(operator, device)
            except backends.BackendUnavailable as error:
                yield Choice(operator, device, "none", (str(error),))
                continue
            if backends.forced() is not None:
                reason = f"{runs} was forced by FUSEDPO_BACKEND or fusedpo.backend"
                yield Choice(operator, device, runs, (reason,))
                continue
            others = (name for name in ("native", "triton") if name != runs)
            reasons = (backends.why_not(name, operator, device) for name in others)
            yield Choice(operator, device, runs, tuple(reason for reason in reasons if reason))


def _table(*rows: Sequence[str]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = (rows[0], ["-" * len(title) for title in rows[0]], *rows[1:])
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _lines(environment: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in environment.items():
        if isinstance(value, dict):
            yield from ((f"{key}: {name}", text) for name, text in _lines(value))
        elif isinstance(value, list):
            yield key, " ".join(value) or "none"
        else:
            yield key, str(value or "none")


def env(as_json: bool) -> None:
    environment, choices = _environment(), list(_choices())
    if as_json:
        print(json.dumps({"environment": environment, "operators": [c._asdict() for c in choices]}, indent=1))
        return
    print(_table(("what", "here"), *_lines(environment)), end="\n\n")
    # What is true of many operators is said once, without their names.
    reasons = [
        [text.replace(f" of {c.operator}", "").replace(c.operator, "the operator") for text in c.reasons]
        for c in choices
    ]
    numbers = {text: f"[{i}]" for i, text in enumerate(dict.fromkeys(itertools.chain(*reasons)), 1)}
    rows = [(*c[:3], " ".join(numbers[text] for text in texts)) for c, texts in zip(choices, reasons, strict=True)]
    print(_table(("operator", "device", "runs", "why not another"), *rows), end="\n\n")
    for text, number in numbers.items():
        print(number, text)


def bench(arguments: Sequence[str]) -> int:
    try:
        cli = importlib.import_module("fusedpo.bench.cli")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("matplotlib", "rich"):
            raise
        print(f"the benchmarks need {package}: pip install rich matplotlib", file=sys.stderr)
        return 2
    return int(cli.main(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _cli.parse(sys.argv[1:] if arguments is None else arguments)
    if parsed.command == "bench":
        return bench(parsed.rest)
    if parsed.command == "verify":
        here = _devices()
        for device in parsed.device or ():
            if device not in here:
                _cli.refuse(f"--device {device}: there is none here, only {', '.join(here)}")
        return verify.main(parsed.device or here, parsed.out)
    env(parsed.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
