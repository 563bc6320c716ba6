"""Layer 3: advantages of groups and of tokens."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fusedpo
from fusedpo import advantages

from .harness import CLONE, Case, Provider, clone, microseconds, relative_error


def cases(device: str, quick: bool, dtypes: list[torch.dtype]) -> Iterator[Case]:
    """In float32, whatever ``dtypes``."""
    for count, size in [(64, 8)] if quick else [(1024, 16), (64, 8), (64, 1024)]:
        yield from _groups(count, size, device)
    yield _tokens(8, 512, device) if quick else _tokens(64, 4096, device)


def overhead() -> dict[str, float]:
    """Processor time of one small call in microseconds, on one thread of the CPU."""
    rewards, ids = torch.randn(16), torch.arange(16) // 4
    return {
        "maxpo, group_size": microseconds(lambda: advantages.maxpo(rewards, k=2, group_size=4)),
        "maxpo, group_ids": microseconds(lambda: advantages.maxpo(rewards, k=2, group_ids=ids)),
        "maxpo, reference": microseconds(by_reference(lambda: advantages.maxpo(rewards, k=2, group_size=4)), 100),
    }


def import_verl() -> tuple[Any, str]:
    """verl's estimators, and why they are missing."""
    try:
        return importlib.import_module("verl.trainer.ppo.core_algos"), ""
    except ImportError as error:
        return None, f"not importable: {error}"


VERL, VERL_MISSING = import_verl()
Runs = dict[str, Callable[[], Any] | None]


class Config(dict):
    """verl reads its configuration by attribute and by ``get``."""

    __getattr__ = dict.__getitem__


def by_reference(run: Callable[[], Any]) -> Callable[[], Any]:
    def wrapped() -> Any:
        with fusedpo.backend("reference"):
            return run()

    return wrapped


def _case(group: str, sizes: dict[str, int], truth: Tensor, source: Tensor, bytes_moved: float, runs: Runs) -> Case:
    """Checked in float32 against ``truth``; None is a verl that is missing."""

    def error(result: Tensor) -> float:
        return relative_error(result, truth)

    providers = [
        Provider(name, lambda run=run: run, error, 1e-5, missing="" if run else VERL_MISSING)
        for name, run in runs.items()
    ]
    return Case(group, sizes, [clone(source), *providers], CLONE, bytes_moved, count_launches=True)


def _groups(count: int, size: int, device: str) -> Iterator[Case]:
    """verl's calls take rewards and mask per token and the group's name as a string: one token per response here."""
    rewards = torch.randn(count * size, device=device)
    ids = torch.arange(count, device=device).repeat_interleave(size)
    names = [f"prompt-{i}" for i in ids.tolist()]
    batch = {"token_level_rewards": rewards[:, None], "response_mask": torch.ones_like(rewards)[:, None]}

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
        yield _case(name, {"groups": count, "samples": size}, truth, rewards, 8 * len(rewards), runs)


def _tokens(rows: int, width: int, device: str) -> Case:
    rewards, values = torch.randn(2, rows, width, device=device)
    mask = torch.arange(width, device=device) < torch.randint(width // 2, width, (rows, 1), device=device)
    rewards, numbers = rewards * mask, {"gamma": 0.99, "lam": 0.95}

    def gae() -> Tensor:
        return advantages.whiten(advantages.gae(rewards, values, mask=mask, **numbers).advantages, mask=mask)

    def verl() -> Tensor:
        whitened, _ = VERL.compute_gae_advantage_return(rewards, values, mask.float(), **numbers)
        return whitened.where(mask, 0)

    with fusedpo.backend("reference"):
        exact = advantages.gae(rewards.double(), values.double(), mask=mask, **numbers).advantages
        truth = advantages.whiten(exact, mask=mask)
    runs = {"fusedpo": gae, "reference": by_reference(gae), "verl": verl if VERL else None}
    return _case("gae and whiten", {"sequences": rows, "T": width}, truth, rewards, 13 * rewards.numel(), runs)
