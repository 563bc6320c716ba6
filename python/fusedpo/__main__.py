"""``python -m fusedpo env | verify | bench``: what is here and why, whether it is right, and how fast it is."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from . import backends, verify


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    return ["cpu"] + [name for name in ("cuda", "xpu", "mps") if getattr(torch, name).is_available()]


def _environment() -> Iterable[tuple[str, str]]:
    yield "fusedpo", _version("fusedpo")
    yield "python", platform.python_version()
    yield "torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}, ROCm {torch.version.hip or 'none'})"
    yield "triton", backends.TRITON_MISSING or _version("triton")
    yield "cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        yield f"gpu {index}", f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"
    if backends.NATIVE_MISSING is None:
        from ._C import build_info

        for key, value in build_info().items():
            yield f"native: {key}", (" ".join(value) if isinstance(value, list) else value) or "none"
    else:
        yield "native", f"missing: {backends.NATIVE_MISSING}"
    for name in sorted(os.environ):
        if name.startswith("FUSEDPO_") or name == "TRITON_INTERPRET":
            yield name, os.environ[name]


def _choices() -> Iterable[tuple[str, str, str, str]]:
    for device in _devices():
        for operator in backends.IMPLEMENTATIONS:
            try:
                runs = backends.choose(operator, device)
            except backends.BackendUnavailable as error:
                yield operator, device, "none", str(error)
                continue
            if backends.forced() is not None:
                yield operator, device, runs, f"{runs} was forced by FUSEDPO_BACKEND or fusedpo.backend"
                continue
            others = (name for name in ("native", "triton") if name != runs)
            reasons = (backends.why_not(name, operator, device) for name in others)
            yield operator, device, runs, "; ".join(reason for reason in reasons if reason)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header) - 1)]
    lines.insert(1, ["-" * len(title) for title in header])
    return "\n".join("  ".join([*map(str.ljust, line, widths), line[-1]]).rstrip() for line in lines)


def env() -> None:
    print(_table(("what", "here"), _environment()))
    print()
    print(_table(("operator", "device", "runs", "why not another"), _choices()))


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
    parser = argparse.ArgumentParser(prog="python -m fusedpo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="versions, capabilities, and the implementation of each operator")
    verification = commands.add_parser(
        "verify", help="checks the kernels that run here against the reference in float64"
    )
    verification.add_argument("--device", nargs="+", choices=_devices(), default=_devices())
    verification.add_argument("--out", type=Path, help="a JSON file for the results")
    commands.add_parser("bench", add_help=False, help="benchmarks: python -m fusedpo bench --help")
    known, rest = parser.parse_known_args(arguments)
    if known.command == "bench":
        return bench(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if known.command == "verify":
        return verify.main(known.device, known.out)
    env()
    return 0


if __name__ == "__main__":
    sys.exit(main())
