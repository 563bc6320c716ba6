"""The arguments of ``fusedpo`` and ``python -m fusedpo``.

The package imports this module first, and torch, which takes seconds, afterwards: help, the version and the errors of a
command line are shown at once. In any other process importing it does nothing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

VERSION = version("fusedpo")
DEVICES = ("cpu", "cuda", "xpu", "mps")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusedpo", description="What is here and why, whether it is right, and how fast it is."
    )
    parser.add_argument("--version", action="version", version=f"fusedpo {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True)
    environment = commands.add_parser("env", help="versions, capabilities, and the implementation of each operator")
    environment.add_argument("--json", action="store_true", help="for programs and issues")
    verification = commands.add_parser(
        "verify", help="checks the kernels that run here against the reference in float64"
    )
    verification.add_argument("--device", nargs="+", choices=DEVICES, help="default: all that are here")
    verification.add_argument("--out", type=Path, help="a JSON file for the results")
    commands.add_parser("bench", add_help=False, help="benchmarks: fusedpo bench --help")
    return parser


def refuse(message: str) -> NoReturn:
    _parser().error(message)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Exits after help and the version, and with status 2 if the arguments are none. ``rest`` is that of ``bench``."""
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    if known.command == "bench":
        rest = list(arguments)[list(arguments).index("bench") + 1 :]
        importlib.import_module("fusedpo.bench.arguments").parse(rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    known.rest = rest
    return known


def _is_this_process() -> bool:
    if sys.argv[:1] == ["-m"]:  # Python still looks for the module, which comes before its arguments
        return sys.orig_argv[-len(sys.argv)] in ("fusedpo", "-mfusedpo")
    return bool(sys.argv) and Path(sys.argv[0]).stem == "fusedpo"


if _is_this_process() and parse(sys.argv[1:]).command == "env":
    warnings.filterwarnings("ignore", "fusedpo runs without its native kernels")  # the table says so
