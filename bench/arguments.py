"""The arguments of ``fusedpo bench``, without torch: help and refusals do not wait for its import."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from . import OPERATORS

DTYPES = ("float32", "bfloat16", "float16")

# The providers and the package that each needs. More of the name follows a comma: "fusedpo, in place".
PROVIDERS = {
    "fusedpo": None,
    "eager": None,
    "reference": None,
    "torch.compile": None,
    "next_tokens": None,
    "logits[:, :-1]": None,
    "trl": "trl",
    "verl": "verl",
    "liger": "liger_kernel",
    "cut-cross-entropy": "cut_cross_entropy",
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="fusedpo bench",
        description="Every operator against every provider that is installed, measured by processes of their own: what "
        "differs between two launches is part of the spread.",
        epilog="Or: fusedpo bench compare BEFORE.json AFTER.json [--threshold 0.1] [--of-ceiling]",
    )
    p.add_argument(
        "--op", nargs="+", choices=OPERATORS, default=list(OPERATORS), metavar="OP", help=" ".join(OPERATORS)
    )
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, help="of the logits; default: float32 and bfloat16")
    p.add_argument("--quick", action="store_true", help="bfloat16 and one size: under two minutes on two cores")
    p.add_argument("--providers", nargs="+", metavar="NAME", help="only those whose name starts so, and the ceilings")
    p.add_argument("--threads", type=int, help="default: those of torch")
    p.add_argument("--processes", type=int, default=1, help="launches per operator; 3 in a recording")
    p.add_argument(
        "--out",
        type=Path,
        default=Path("out/bench"),
        help="for JSON, Markdown and plots; default: %(default)s. "
        "Under bench/results it is a recording: of a whole run, of a clean tree",
    )
    return p


def compare_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="fusedpo bench compare",
        description="Two result files of the same cases: what is slower or faster by more than the spread.",
    )
    p.add_argument("before", type=Path)
    p.add_argument("after", type=Path)
    p.add_argument("--threshold", type=float, default=0.1, help="the slowdown that is allowed; default: %(default)s")
    p.add_argument("--of-ceiling", action="store_true", help="compare times in units of the ceiling of their own run")
    return p


def why_not(name: str) -> str | None:
    """Why nothing that is called ``name`` can be measured here; None if something can."""
    packages = [
        package for known, package in PROVIDERS.items() if known.startswith(name) or f"{name},".startswith(f"{known},")
    ]
    if not packages:
        return f"no provider is called {name!r}; there are {'; '.join(PROVIDERS)}"
    missing = [package for package in packages if package and importlib.util.find_spec(package) is None]
    return f"{', '.join(missing)} is not installed" if len(missing) == len(packages) else None


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Exits with status 2 where an argument names what is not there."""
    if argv[:1] == ["compare"]:
        p = compare_parser()
        arguments = p.parse_args(argv[1:], argparse.Namespace(compare=True))
        for path in (arguments.before, arguments.after):
            if not path.is_file():
                p.error(f"there is no file {path}")
        return arguments
    p = parser()
    arguments = p.parse_args(argv, argparse.Namespace(compare=False))
    for reason in filter(None, map(why_not, arguments.providers or [])):
        p.error(f"--providers: {reason}")
    return arguments
