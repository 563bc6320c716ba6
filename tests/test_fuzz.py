"""The fuzzer finds what is wrong: each of its oracles rejects a function that is a little off."""

from __future__ import annotations

import random

import pytest
import torch
from fuzz import broken, oracles
from torch import Tensor

import fusedpo
from fusedpo import advantages, backends

native = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))


@pytest.fixture(autouse=True)
def _native():
    with fusedpo.backend("native"):
        yield


def off(results):
    """0.01% and a little more; float64 is what the oracles themselves compute in."""
    if isinstance(results, Tensor):
        return results * 1.0001 + 1e-4
    if isinstance(results, fusedpo.PolicyLossOutput):
        return results if results.loss.dtype == torch.float64 else results._replace(loss=results.loss * 1.01)
    return type(results)(*map(off, results)) if hasattr(results, "_fields") else tuple(map(off, results))


def tries(oracle, count=12):
    for seed in range(count):
        torch.manual_seed(seed)
        oracle(random.Random(seed))


@native
@pytest.mark.parametrize("oracle", dict.fromkeys(oracles.ORACLES))
def test_right_functions_pass(oracle):
    tries(oracle)


@native
@pytest.mark.parametrize(
    ("oracle", "owner", "name"),
    [
        (oracles.token_logprobs, fusedpo, "token_logprobs"),
        (oracles.policy_loss, fusedpo, "policy_loss"),
        (oracles.presets, fusedpo, "policy_loss"),
        (oracles.presets, fusedpo, "policy_loss_from_logits"),
        (oracles.presets, fusedpo, "policy_loss_from_hidden"),
        (oracles.group_advantages, advantages, "rloo"),
        (oracles.group_advantages, advantages, "grpo"),
        (oracles.subsets, advantages, "maxpo"),
        (oracles.subsets, advantages, "order_statistic"),
        *((oracles.token_advantages, advantages, name) for name in ("gae", "vtrace", "reward_to_go", "whiten")),
        *((oracles.token_advantages, advantages, name) for name in ("to_tokens", "rewards_on_kept")),
        (oracles.step_advantages, advantages, "vineppo"),
        (oracles.step_advantages, advantages, "segment_steps"),
    ],
)
def test_wrong_functions_do_not(monkeypatch, oracle, owner, name):
    right = getattr(owner, name)

    def wrong(*args, **kwargs):
        results = right(*args, **kwargs)
        return results._replace(step_ids=results.step_ids + 1) if name == "segment_steps" else off(results)

    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        tries(oracle, 60)


@native
def test_most_broken_calls_are_refused():
    """Of calls with one argument broken most are refused; what the others touch is for the sanitizers to see."""

    def refused(run) -> int:
        rng = random.Random(0)
        return sum(run(broken.broken(rng)) is not None for _ in range(100))

    assert refused(lambda call: broken.run(call, "native")) > 40
