"""Groups, layouts and token batches for the kernels of the advantages, and the estimators that run on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from support.kernels import Kernels

NATIVE, TRITON = Kernels("native"), Kernels("triton")
NAN = math.nan
# Sums of at most a thousand float64 terms in another order, relative to the largest.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}

# Of eight samples.
OF_EIGHT = {
    "distinct": [0.3, -1.2, 2.5, 0.9, -0.4, 1.7, 0.1, -2.2],
    "ties": [1.0, 0.0, 1.0, 2.0, 0.0, 2.0, 2.0, 0.5],
    "constant": [0.1] * 8,
    "binary": [0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Name, arguments; rewards and groups come with the layout, `lengths` and `baselines` too.
GROUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"eps": 1e-3}),
    "dr_grpo": ("dr_grpo", {}),
    "rloo": ("rloo", {}),
    "opo": ("opo", {"lengths": ...}),
    "gpg": ("gpg", {"f_norm": 1.7}),
    "raft": ("raft", {}),
    "reinforce_rej": ("reinforce_rej", {}),
    "remax": ("remax", {"baselines": ...}),
    "reinforce_plus_plus_baseline": ("reinforce_plus_plus_baseline", {"lengths": ...}),
    "maxpo": ("maxpo", {"k": 3}),
    "maxpo, unbiased": ("maxpo", {"k": 2, "scale": "unbiased"}),
    "order_statistic": ("order_statistic", {"k": 3, "weights": [0.5, -1.0, 2.0], "scale": "unbiased"}),
    "pkpo, s": ("pkpo", {"k": 3, "variant": "s"}),
    "pkpo, sloo": ("pkpo", {"k": 3, "variant": "sloo"}),
    "pkpo, sloo-1": ("pkpo", {"k": 3, "variant": "sloo-1"}),
    "passk": ("passk", {"k": 3}),
    "max_at_k": ("max_at_k", {"k": 3}),
    "grpo_passk": ("grpo_passk", {"eps": 1e-3}),
    "grpo_passk, no std": ("grpo_passk", {"std": False}),
}


def prepare(name: str, rewards: Tensor, **groups: Any) -> tuple[str, Tensor, dict[str, Any]]:
    """Function, rewards and arguments of an estimator of ``GROUPS``."""
    function, arguments = GROUPS[name]
    arguments = dict(arguments)
    if "lengths" in arguments:
        arguments["lengths"] = torch.arange(len(rewards)) % 5
    if "baselines" in arguments:
        arguments["baselines"] = random(len(rewards) // groups.get("group_size", 1), seed=7)
    if "baselines" in arguments and "group_ids" in groups:
        groups["group_ids"] = groups["group_ids"] % 3
    if name == "passk":
        rewards = (rewards > 0).to(rewards.dtype)
    if name == "raft":
        groups = {key: value for key, value in groups.items() if key == "mask"}
    return function, rewards, arguments | groups


def estimate(source: Any, name: str, rewards: Tensor, **groups: Any) -> Tensor:
    """An estimator of ``GROUPS`` by the functions of ``source``."""
    function, rewards, arguments = prepare(name, rewards, **groups)
    return getattr(source, function)(rewards, **arguments)


MASK = torch.arange(24) % 6 != 1
IDS = torch.repeat_interleave(torch.tensor([40, -7, 5]), torch.tensor([6, 11, 7]))
IDS = IDS[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
LAYOUTS: dict[str, dict[str, Any]] = {
    "equal": {"group_size": 6},
    "equal, masked": {"group_size": 6, "mask": MASK},
    "ragged": {"group_ids": IDS},
    "ragged, masked, int32": {"group_ids": IDS.int(), "mask": MASK.float()},
}
REWARDS = {
    "distinct": random(24),
    "ties": random(24).mul(2).round(),
    "one best": (torch.arange(24) == 8).double(),
}


def token_batches(*lengths: int) -> list[dict[str, Any]]:
    """Padded, packed, one sequence, and packed ``[1, T]``; the first row has no token, an empty sequence is packed."""
    batches = []
    for length in lengths:
        mask = random(4, length, seed=3) > -0.5
        mask[0] = False
        rewards, values, new, old = (random(4, length, seed=seed).where(mask, NAN) for seed in range(4, 8))
        padded = {"rewards": rewards, "values": values, "logprobs": new, "old_logprobs": old, "mask": mask}
        packed = {name: x.flatten() for name, x in padded.items()}
        offsets = torch.tensor([0, length, length, 2 * length + 1, 4 * length], dtype=torch.int32)
        batches += [padded, packed | {"cu_seqlens": offsets}, packed]
        batches.append({name: x.unsqueeze(0) for name, x in packed.items()} | {"cu_seqlens": offsets.long()})
    return batches


def sequences(batch: dict[str, Any]) -> int:
    if "cu_seqlens" in batch:
        return len(batch["cu_seqlens"]) - 1
    return len(batch["rewards"]) if batch["rewards"].dim() == 2 else 1


def without(batch: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: x for name, x in batch.items() if name not in names}


TOKENS: dict[str, Callable[[Any, dict[str, Any], Tensor | None], Any]] = {
    "reward_to_go": lambda f, b, end: f.reward_to_go(
        **without(b, "values", "logprobs", "old_logprobs"), gamma=0.9, bootstrap=end
    ),
    "gae": lambda f, b, end: f.gae(**without(b, "logprobs", "old_logprobs"), gamma=0.99, lam=0.95, bootstrap=end),
    "gae, lam=0": lambda f, b, end: f.gae(**without(b, "logprobs", "old_logprobs"), gamma=1.0, lam=0.0, bootstrap=end),
    "vtrace": lambda f, b, end: f.vtrace(**b, gamma=0.9, lam=0.8, rho_bar=1.3, c_bar=0.7, bootstrap=end),
    "vtrace, not truncated": lambda f, b, end: f.vtrace(**b, gamma=0.9, rho_bar=math.inf, bootstrap=end),
    "reinforce_plus_plus": lambda f, b, end: f.reinforce_plus_plus(
        **without(b, "values", "logprobs", "old_logprobs"), gamma=0.9
    ),
}
