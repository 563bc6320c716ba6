"""The Triton kernels of the advantages against the reference: on a GPU where there is one, else by the interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.advantages import (
    CLOSE,
    GROUPS,
    IDS,
    LAYOUTS,
    NAN,
    REWARDS,
    TOKENS,
    TRITON,
    estimate,
    random,
    sequences,
    token_batches,
    without,
)
from torch import Tensor

from fusedpo.ops.advantages import ESTIMATORS, TOKEN_ESTIMATORS
from fusedpo.reference import advantages as reference

kernels = pytest.importorskip("fusedpo.triton_kernels.advantages")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SINGLE = {"rtol": 1.2e-7, "atol": 1e-12}  # the rounding of the result to float32

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning"),  # the interpreter's
]


class OnDevice:
    """The functions of the Triton kernels, for tensors that go to the device and back."""

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            results = getattr(TRITON, name)(*map(move, args), **{key: move(x) for key, x in kwargs.items()})
            return results.cpu() if isinstance(results, Tensor) else tuple(x.cpu() for x in results)

        return call


def move(x: Any) -> Any:
    return x.to(DEVICE) if isinstance(x, Tensor) else x


KERNELS = OnDevice()


# ------------------------------------------------------------------------------------------------------------ groups

MIXED = REWARDS["distinct"].where(torch.arange(24) % 3 == 0, REWARDS["ties"])


def check(name: str, rewards: Tensor, close: dict[str, float] = CLOSE, **groups: Any) -> None:
    if "mask" in groups and name != "passk":
        rewards = rewards.where(groups["mask"] != 0, NAN)
    result, expected = (estimate(source, name, rewards, **groups) for source in (KERNELS, reference))
    torch.testing.assert_close(result, expected, **close)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups(name, layout):
    check(name, MIXED, **LAYOUTS[layout])


@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_float32_rewards(name):
    """In one layout: rewards are read in one place, whatever the layout."""
    check(name, REWARDS["one best"].float(), SINGLE, **LAYOUTS["equal"])


@pytest.mark.parametrize("name", GROUPS)
def test_groups_larger_than_a_block(name):
    """75 samples, of which every fifth has the reward of another: ties from block to block."""
    rewards = random(80).where(torch.arange(80) % 5 > 0, 1.5)
    check(name, rewards, group_ids=(torch.arange(80) % 16 > 0).long() if name != "remax" else torch.arange(80) // 75)


@pytest.mark.parametrize("best", [(2.0, 3.0), (3.0, 2.0), (3.0, 3.0)])
def test_the_best_two_in_different_blocks(best):
    rewards = -random(75).abs()
    rewards[[3, 70]] = torch.tensor(best, dtype=torch.float64)
    check("grpo_passk, no std", rewards, group_ids=torch.zeros(75, dtype=torch.int64))


def test_equal_rewards_get_bit_identical_advantages():
    """A scan on a GPU may round the same sum differently at each rank; the interpreter's does not."""
    rewards = random(100)[torch.arange(300) % 100]
    result = KERNELS.maxpo(rewards, k=3, group_size=300).view(3, 100)
    assert torch.equal(result, result[:1].expand(3, 100))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_groups_with_too_few_samples(estimator):
    """Groups of 0 to 5 kept samples for k = 3. Where the CPU raises, Triton has nan: in this group, and there alone."""
    ids = torch.repeat_interleave(torch.arange(6, dtype=torch.int32), 5)
    kept = torch.arange(30) % 5 < ids
    rewards = (random(30) > 0).double() if estimator == "passk" else random(30)
    other = {"opo": torch.arange(30) % 4, "remax": random(6), "order_statistic": random(3)}.get(estimator)
    # Of the last group, the lengths add up to 0.
    other = other.where(ids < 5, 0) if estimator == "opo" else other
    smallest = 2 if "lead" in estimator else 0
    if ESTIMATORS.index(estimator) >= ESTIMATORS.index("maxpo"):
        smallest = 3 + (estimator in ("maxpo", "pkpo sloo", "order_statistic"))
    numbers = (ESTIMATORS.index(estimator), 3, True, 0.5, True)

    def run(operator: Any, chosen: Tensor) -> Tensor:
        sorted_ids, order = ids[chosen].sort(stable=True)
        lengths = other[chosen] if estimator == "opo" else other
        return operator(rewards[chosen], sorted_ids, order, 1, lengths, kept[chosen].float(), *numbers)

    result = run(lambda *args: torch.ops.fusedpo.group_advantages.triton(*map(move, args)).cpu(), ids >= 0)
    undefined = kept & (ids < smallest)
    assert torch.equal(result.isnan(), undefined)
    assert (result[~kept] == 0).all()
    defined = ids >= smallest
    expected = run(torch.ops.fusedpo.group_advantages.native, defined)
    if estimator == "gpg":
        assert defined.all()  # the factor is that of the batch
    torch.testing.assert_close(result[defined], expected, **CLOSE)


NEED_TWO = {
    "maxpo",
    "maxpo, unbiased",
    "order_statistic",
    "pkpo, sloo",
    "pkpo, sloo-1",
    "grpo_passk",
    "grpo_passk, no std",
}


@pytest.mark.parametrize("name", [name for name in GROUPS if name not in NEED_TWO])
def test_groups_of_one(name):
    function, arguments = GROUPS[name]
    arguments = arguments | ({"k": 1} if "k" in arguments else {})
    arguments |= {"lengths": torch.arange(7)} if "lengths" in arguments else {}
    arguments |= {"baselines": random(7)} if "baselines" in arguments else {}
    arguments |= {"group_size": 1} if name != "raft" else {}
    rewards = torch.arange(7.0) if name != "passk" else torch.arange(7.0) % 2
    result, expected = (getattr(source, function)(rewards, **arguments) for source in (KERNELS, reference))
    torch.testing.assert_close(result, expected, **SINGLE)


def test_values_outside_their_domain():
    """Where the CPU raises: a label without baseline, a step that is not there."""
    rewards = torch.arange(8, dtype=torch.float64)
    result = KERNELS.remax(rewards, baselines=torch.zeros_like(rewards[:2]), group_ids=torch.arange(8) // 3)
    assert result.isnan().tolist() == [False] * 6 + [True] * 2
    steps = KERNELS.vineppo(torch.ones(1, 3), step_rewards=torch.ones(1, 2), step_ids=torch.tensor([[0, 1, 2, -1]]))
    assert steps.isnan().tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("name", ["grpo", "maxpo", "pkpo, s"])
def test_without_float64(name, monkeypatch):
    """As on an Intel GPU that has none: float32 sums of 24 terms, and products of as many."""
    monkeypatch.setattr(kernels, "_real", lambda device: kernels.tl.float32)
    check(name, random(24).float(), {"rtol": 2e-6, "atol": 2e-6}, group_ids=IDS)


# ------------------------------------------------------------------------------------------------------------ tokens


def check_tokens(name: str, batch: dict[str, Any], bootstrap: Tensor | None, close: dict[str, float] = CLOSE) -> None:
    results, expected = (TOKENS[name](source, batch, bootstrap) for source in (KERNELS, reference))
    if isinstance(results, Tensor):
        results, expected = (results,), (expected,)
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth, **close)


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("layout", range(4), ids=["padded", "packed", "one sequence", "packed, [1, T]"])
def test_tokens(name, layout):
    batch = token_batches(21)[layout]
    check_tokens(name, batch, random(sequences(batch), seed=9))


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_without_mask_and_in_float32(name):
    """In one layout: it decides where a sequence lies, not how its arrays are read."""
    batch = token_batches(21)[0]
    check_tokens(name, {key: x.nan_to_num() for key, x in without(batch, "mask").items()}, None)
    check_tokens(name, {key: x.float() if x.is_floating_point() else x for key, x in batch.items()}, None, SINGLE)


def test_a_sequence_does_not_depend_on_the_lengths_of_others():
    """To the bit: padded or packed, in its place among none, short and long ones."""
    batch = token_batches(700)[0]
    packed = {key: x.flatten()[:1402] for key, x in batch.items()}
    padded, *others = (
        TOKENS["gae"](KERNELS, batch | {"cu_seqlens": torch.tensor(offsets)} if offsets else batch, None)
        for batch, offsets in (
            ({key: x[:2] for key, x in batch.items()}, None),
            (packed, [0, 700, 1400, 1402]),
            (packed, [0, 1, 700, 1400, 1401, 1402]),
        )
    )
    for other in others:
        for result, expected in zip(other, padded, strict=True):
            assert torch.equal(result[700:1400], expected[1])


@pytest.mark.parametrize("name", TOKENS)
def test_more_tokens_than_a_block(name):
    """Masked tokens at the borders of the blocks of 512, and a whole block of them."""
    batch = {key: x[1:3] for key, x in token_batches(1100)[0].items()}
    batch["mask"][0, [511, 512, 1023, 1024]] = False
    batch["mask"][1, 500:1070] = False
    check_tokens(name, batch, random(2, seed=9))


@pytest.mark.parametrize("number", [0.1, 1e-30, 1e30, 1e300, math.inf])
def test_numbers_of_arguments(number):
    """They reach a kernel as two of float32: 48 bits, and where that is out of range infinity."""
    log_ratio = torch.tensor([2.0, 50.0, -50.0, -2.0], dtype=torch.float64).repeat(2, 2)
    ratios = {"logprobs": log_ratio, "old_logprobs": torch.zeros_like(log_ratio)}

    def run(source: Any) -> list[Tensor]:
        x = random(2, 8)
        corrected = source.vtrace(x, x, **ratios, gamma=0.7, rho_bar=number, c_bar=number)
        return [source.grpo(random(12), group_size=4, eps=number), *corrected]

    for result, expected in zip(run(KERNELS), run(reference), strict=True):
        torch.testing.assert_close(result, expected, **CLOSE)


@pytest.mark.parametrize("estimator", TOKEN_ESTIMATORS)
def test_nan_and_inf_of_a_token(estimator):
    """As the native kernels: in its sequence, and no further than the first factor of 0."""
    rewards = random(3, 30)
    rewards[0, 20], rewards[1, 10] = NAN, math.inf
    values = random(3, 30, seed=1)
    values[2, 5] = -math.inf
    bootstrap = torch.tensor([0.5, NAN, math.inf], dtype=torch.float64)
    others = {"gae": (values, None, None), "vtrace": (values, values * 0, rewards * 0)}.get(estimator, (None,) * 3)
    for gamma, lam in ((0.9, 0.8), (0.9, 0.0), (0.0, 0.5)):
        numbers = (TOKEN_ESTIMATORS.index(estimator), gamma, lam, 1.2, 0.7, True)
        arguments = (rewards, *others, torch.ones(3, 30, dtype=torch.bool), None, bootstrap, *numbers)
        expected = torch.ops.fusedpo.token_advantages.native(*arguments)
        results = torch.ops.fusedpo.token_advantages.triton(*map(move, arguments))
        for result, truth in zip(results, expected, strict=True):
            torch.testing.assert_close(result.cpu(), truth, **CLOSE, equal_nan=True)


# ------------------------------------------------------------------------------------------------- steps, whitening


def test_more_steps_than_a_block():
    """Rows of different numbers of steps, values missing at either end; then steps and tokens of three blocks."""
    values = random(5, 9)
    values[0, :3], values[1, 5:], values[2], values[3, ::2] = NAN, NAN, NAN, NAN
    step_rewards = random(5, 8, seed=1)
    step_ids = torch.randint(-1, 8, (5, 120), generator=torch.Generator().manual_seed(0))
    for whiten, ids in ((False, step_ids), (True, step_ids.int())):
        arguments = {"step_rewards": step_rewards, "step_ids": ids, "whiten": whiten}
        result, expected = (source.vineppo(values, **arguments) for source in (KERNELS, reference))
        torch.testing.assert_close(result, expected, **CLOSE)
    values, step_ids = random(2, 601), torch.randint(-1, 600, (2, 700), generator=torch.Generator().manual_seed(0))
    values[0, 100:550], values[1, 1:] = NAN, NAN
    arguments = {"step_rewards": random(2, 600, seed=1), "step_ids": step_ids}
    result, expected = (source.vineppo(values, **arguments) for source in (KERNELS, reference))
    torch.testing.assert_close(result, expected, **CLOSE)


def test_whitening_blocks_without_weight():
    """Blocks of 2,048 elements: all masked, all of length 0, one element, and no other."""
    x = random(5, 2048).mul(3).add(1e6)
    mask = torch.ones(5, 2048, dtype=torch.bool)
    mask[1], mask[3, 1:] = False, False
    lengths = torch.arange(5 * 2048).view(5, 2048) % 3
    lengths[2] = 0
    poisoned = x.where(mask & (lengths > 0), NAN)
    result = torch.ops.fusedpo.whiten.triton(*map(move, (poisoned, lengths, mask, True))).cpu()
    # Differences to a mean of a million, of which float64 keeps ten digits.
    expected = torch.ops.fusedpo.whiten.native(poisoned, lengths, mask, True)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    assert (result[~(mask & (lengths > 0))] == 0).all()
    # Where the CPU raises, a negative length counts as 0.
    lengths = lengths.where(lengths > 0, -3)
    assert torch.equal(torch.ops.fusedpo.whiten.triton(*map(move, (poisoned, lengths, mask, True))).cpu(), result)
