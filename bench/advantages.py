"""Layer 3 on this machine: advantages of groups and of tokens, against the reference and against verl.

python bench/advantages.py [--quick] [--threads 2] [--out out/bench]
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import Provider, Row, measure, microseconds, progress, relative_error, report
from torch import Tensor

import fusedpo
from fusedpo import advantages


def import_verl() -> tuple[Any, str]:
    """verl's estimators, and why they are missing."""
    try:
        return importlib.import_module("verl.trainer.ppo.core_algos"), ""
    except ImportError as error:
        return None, f"not importable: {error}"


VERL, VERL_MISSING = import_verl()


def seconds(run: Callable[[], Any]) -> float:
    run()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


class Config(dict):
    """verl reads its configuration by attribute and by ``get``."""

    __getattr__ = dict.__getitem__


def by_reference(run: Callable[[], Any]) -> Callable[[], Any]:
    def wrapped() -> Any:
        with fusedpo.backend("reference"):
            return run()

    return wrapped


def compare(
    case: str, truth: Tensor, runs: dict[str, Callable[[], Any] | None], *, bytes_moved: float, repeats: int
) -> list[Row]:
    """A row per call, checked in float32 against ``truth``; None is a verl that is missing.

    Short calls are timed several at a time: what the harness does between two samples leaves the caches cold.
    """
    calls = {name: min(10, int(1 + 0.01 / seconds(run))) for name, run in runs.items() if run is not None}

    def prepare(name: str) -> Callable[[], Any]:
        def repeated() -> Any:
            for _ in range(calls[name]):
                result = runs[name]()
            return result

        return repeated

    def error(result: Tensor) -> float:
        return relative_error(result, truth)

    providers = [
        Provider(name, lambda name=name: prepare(name), error, 1e-5, missing="" if name in calls else VERL_MISSING)
        for name in runs
    ]
    rows = measure(case, providers, bytes_moved=bytes_moved, ceiling="fusedpo", repeats=repeats)
    for row in rows:
        if row.median is not None and row.p20 is not None and row.p80 is not None:
            row.median, row.p20, row.p80 = (time / calls[row.provider] for time in (row.median, row.p20, row.p80))
            row.gigabytes_per_second = bytes_moved / row.median / 1e6
    for row in rows:
        row.of_ceiling = rows[0].median / row.median if rows[0].median and row.median else None
    return rows


def groups(count: int, size: int, repeats: int) -> Iterator[list[Row]]:
    """verl's calls take rewards and mask per token and the group's name as a string: one token per response here."""
    rewards = torch.randn(count * size)
    ids = torch.arange(count).repeat_interleave(size)
    names = [f"prompt-{i}" for i in ids.tolist()]
    batch = {"token_level_rewards": rewards[:, None], "response_mask": torch.ones(len(rewards), 1)}

    def verl(function: str, **kwargs: Any) -> Callable[[], Tensor] | None:
        if VERL is None:
            return None
        import numpy as np

        arguments = batch | {"index": np.array(names, dtype=object)} | kwargs
        return lambda: getattr(VERL, function)(**arguments)[0].flatten()

    peers = {
        "grpo": {
            "verl": verl("compute_grpo_outcome_advantage"),
            "verl, vectorised": verl("compute_grpo_vectorized_outcome_advantage"),
        },
        "rloo": {"verl": verl("compute_rloo_outcome_advantage")},
        "grpo_passk": {
            "verl": verl("compute_grpo_passk_outcome_advantage", config=Config(norm_adv_by_std_in_grpo=True))
        },
        "maxpo": {},
    }
    for name, others in peers.items():
        estimator = getattr(advantages, name)
        arguments = {"k": 4} if name == "maxpo" else {}
        with fusedpo.backend("reference"):
            truth = estimator(rewards.double(), group_size=size, **arguments)

        def equal(estimator: Any = estimator, arguments: dict = arguments) -> Tensor:
            return estimator(rewards, group_size=size, **arguments)

        def ragged(estimator: Any = estimator, arguments: dict = arguments) -> Tensor:
            return estimator(rewards, group_ids=ids, **arguments)

        runs = {"fusedpo": equal, "fusedpo, group_ids": ragged, "reference": by_reference(equal), **others}
        yield compare(f"{name}, {count} groups of {size}", truth, runs, bytes_moved=8 * len(rewards), repeats=repeats)


def tokens(rows: int, width: int, repeats: int) -> Iterator[list[Row]]:
    rewards, values = torch.randn(rows, width), torch.randn(rows, width)
    mask = torch.arange(width) < torch.randint(width // 2, width, (rows, 1))
    numbers = {"gamma": 0.99, "lam": 0.95}

    def gae() -> Tensor:
        return advantages.whiten(advantages.gae(rewards, values, mask=mask, **numbers).advantages, mask=mask)

    def verl() -> Tensor:
        whitened, _ = VERL.compute_gae_advantage_return(rewards, values, mask.float(), **numbers)
        return whitened.where(mask, 0)

    with fusedpo.backend("reference"):
        exact = advantages.gae(rewards.double(), values.double(), mask=mask, **numbers).advantages
        truth = advantages.whiten(exact, mask=mask)
    runs = {"fusedpo": gae, "reference": by_reference(gae), "verl": verl if VERL else None}
    yield compare(f"gae and whiten, {rows} x {width}", truth, runs, bytes_moved=13 * rewards.numel(), repeats=repeats)


def overhead() -> dict[str, float]:
    """Processor time of one small call in microseconds, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rewards, ids = torch.randn(16), torch.arange(16) // 4
    result = {
        "maxpo, group_size": microseconds(lambda: advantages.maxpo(rewards, k=2, group_size=4)),
        "maxpo, group_ids": microseconds(lambda: advantages.maxpo(rewards, k=2, group_ids=ids)),
        "maxpo, reference": microseconds(by_reference(lambda: advantages.maxpo(rewards, k=2, group_size=4)), 100),
    }
    torch.set_num_threads(threads)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small case, three repeats")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    repeats = 3 if arguments.quick else 5
    sizes = [(64, 8)] if arguments.quick else [(64, 8), (1024, 16), (1024, 64), (64, 1024)]
    results: list[Row] = []
    for count, size in progress(sizes, "groups"):
        for block in groups(count, size, repeats):
            results += block
    for block in tokens(8, 512, repeats) if arguments.quick else tokens(64, 4096, repeats):
        results += block
    report("advantages", results, arguments.out, overhead_microseconds=overhead())


if __name__ == "__main__":
    main()
