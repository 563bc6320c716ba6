"""The CUDA kernels of the advantages without a GPU: run on the CPU against the native kernels, and compiled by nvcc."""

from __future__ import annotations

import functools
from pathlib import Path

import cuda_on_cpu
import pytest
import torch
from torch import Tensor

from fusedpo import backends
from fusedpo.ops.advantages import ESTIMATORS, TOKEN_ESTIMATORS

pytestmark = [
    pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING)),
    pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no C++ compiler"),
]
OPERATORS = ("group_advantages", "token_advantages", "step_advantages", "whiten")
NAN = float("nan")


class Batch:
    """Operator calls, and what the native CPU operators make of them."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.expected: list[Tensor] = []
        self.names: list[str] = []

    def add(self, operator: str, sizes: tuple, arguments: tuple, threads: int, name: str) -> None:
        results = getattr(torch.ops.fusedpo, operator).native(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        self.calls.append((OPERATORS.index(operator), threads, *sizes, *arguments))
        self.expected += results
        self.names += [name] * len(results)

    def groups(self, estimator: str, rewards: Tensor, ids, order, group_size, other, mask, k, threads) -> None:
        numbers = (ESTIMATORS.index(estimator), k, False, 0.5, rewards.dtype == torch.float64)
        arguments = (rewards, ids, order, group_size, other, mask, *numbers)
        results = torch.ops.fusedpo.group_advantages.native(*arguments)
        size = 0 if other is None else other.numel()
        packed = (rewards.numel(), rewards, ids, order, group_size, size, other, mask, *numbers)
        self.calls.append((0, threads, *packed))
        self.expected.append(results)
        self.names.append(f"{estimator}, {rewards.numel()} rewards, group_size={group_size}, k={k}, {threads} threads")

    def check(self, program: Path) -> None:
        results = cuda_on_cpu.run(program, self.calls, [(x.shape, x.dtype) for x in self.expected])
        for name, result, expected in zip(self.names, results, self.expected, strict=True):
            # Sums of up to a thousand float64 terms, added in another order; below, the rounding to float32.
            close = {"rtol": 1e-11, "atol": 1e-12} if result.dtype == torch.float64 else {"rtol": 1.2e-7, "atol": 1e-9}
            torch.testing.assert_close(
                result, expected, **close, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
            )


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def add_groups(batch: Batch, estimator: str, rewards: Tensor, sizes: tuple[int, ...], threads: int) -> None:
    """Two equal groups with a mask, and ragged ones in any order."""
    count = rewards.numel()
    if estimator == "passk":
        rewards = (rewards > 0).to(rewards.dtype)
    other = {"opo": torch.arange(count) % 7, "remax": random(9, count), "order_statistic": random(9, 3)}.get(estimator)
    mask = torch.arange(count) % 5 != 2
    masked = rewards.double().where(mask, NAN).to(rewards.dtype) if rewards.is_floating_point() else rewards
    batch.groups(estimator, masked, None, None, count // 2, other, mask, 3, threads)
    labels = torch.repeat_interleave(torch.arange(len(sizes)) * 5 % 7, torch.tensor(sizes))
    shuffled = labels[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    ids, order = (shuffled, None) if estimator == "remax" else shuffled.sort(stable=True)
    batch.groups(estimator, rewards, ids, order, 1, other, None, 3, threads)


def all_kernels(threads: int, small: bool) -> Batch:
    batch = Batch()
    for i, estimator in enumerate(ESTIMATORS):
        dtype = cuda_on_cpu.DTYPES[i % len(cuda_on_cpu.DTYPES)]
        rewards = random(i, 20) if dtype == torch.float64 else random(i, 20).mul(3).round().abs()
        add_groups(batch, estimator, rewards.to(dtype), (9, 11), threads)
    for estimator in ("grpo", "opo", "gpg", "maxpo"):  # larger than a block, and than what is sorted by counting
        add_groups(batch, estimator, random(3, 300), (290, 10), threads)
    if not small:
        for estimator in ("grpo", "maxpo", "order_statistic"):
            add_groups(batch, estimator, random(3, 700), (50, 650), threads)
            add_groups(batch, estimator, random(3, 600).round(), (300, 300), threads)

    rows, width = (3, 37) if small else (3, 90)
    shape = (rows, width)
    mask = random(4, *shape) > -0.5
    tokens = [random(seed, *shape).where(mask, NAN) for seed in (5, 6, 7, 8)]
    for offsets in (None, torch.tensor([0, 5, 5, rows * width], dtype=torch.int32)):
        rewards, values, new, old, kept = (x if offsets is None else x.flatten() for x in (*tokens, mask))
        for estimator in TOKEN_ESTIMATORS:
            others = {"vtrace": (values, new, old), "gae": (values, None, None)}.get(estimator, (None, None, None))
            numbers = (TOKEN_ESTIMATORS.index(estimator), 0.9, 0.8, 1.2, 0.7, True)
            for per_sequence in (None, random(9, 3)):
                arguments = (rewards, *others, kept, offsets, per_sequence, *numbers)
                batch.add("token_advantages", (rows * width, 3, width), arguments, threads, f"{estimator} {offsets}")

    for num_steps in (5, 3 * threads):
        values = random(10, 3, num_steps + 1).where(random(11, 3, num_steps + 1) > 0, NAN)
        step_ids = torch.randint(-1, num_steps, (3, 50), generator=torch.Generator().manual_seed(0))
        arguments = (values, random(12, 3, num_steps), step_ids, True)
        batch.add("step_advantages", (150, num_steps, 50), arguments, threads, f"{num_steps} steps")

    x = random(13, 10 if small else 9000)
    kept = x > -1
    arguments = (x.where(kept, NAN), torch.arange(len(x)) % 4, kept, True)
    batch.add("whiten", (len(x),), arguments, threads, "whiten")
    batch.add("whiten", (len(x),), (x, None, None, False), threads, "whiten all")
    return batch


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return cuda_on_cpu.build_as_compiled("advantages", tmp_path_factory.mktemp("cuda") / "advantages")


@pytest.mark.parametrize(("threads", "small"), [(32, True), (64, False)])
def test_kernels_compute_what_the_cpu_computes(program, threads, small):
    all_kernels(threads, small).check(program)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_kernels_under_sanitizers(tmp_path, sanitizer):
    check_a_few(cuda_on_cpu.build_with_sanitizer("advantages", tmp_path / "advantages", sanitizer))


def test_equal_rewards_get_bit_identical_advantages(program):
    rewards = random(0, 100)[torch.arange(300) % 100]
    batch = Batch()
    batch.groups("maxpo", rewards, None, None, 300, None, None, 3, 96)
    (result,) = cuda_on_cpu.run(program, batch.calls, [(rewards.shape, rewards.dtype)])
    for value in rewards.unique():
        assert result[rewards == value].unique().numel() == 1


def test_where_the_cpu_raises_the_result_is_nan(program):
    """Data that is not read: too few samples for k, a label without baseline, a step that is not there."""
    k4 = (ESTIMATORS.index("maxpo"), 4, False, 0.0, False)
    ids = torch.tensor([0, 0, 0, 3, 3, 3, 3, 3])
    step_ids = torch.tensor([[0, 1, 2, -1]])
    values, step_rewards = torch.ones(1, 3), torch.ones(1, 2)
    remax = (ESTIMATORS.index("remax"), 0, False, 0.0, False)
    calls = [
        (0, 32, 8, torch.arange(8.0), ids, torch.arange(8), 1, 0, None, None, *k4),
        (0, 32, 8, torch.arange(8.0), ids, None, 1, 2, torch.zeros(2), None, *remax),
        (2, 32, 4, 2, 4, values, step_rewards, step_ids, False),
    ]
    ranks, baselines, steps = cuda_on_cpu.run(
        program, calls, [(torch.Size([8]), torch.float32)] * 2 + [(torch.Size([4]), torch.float32)]
    )
    assert ranks.isnan().tolist() == [True] * 3 + [False] * 5
    assert baselines.isnan().tolist() == [False] * 3 + [True] * 5
    assert steps.isnan().tolist() == [False, False, True, False]


# -------------------------------------------------------------------------------------------------------- as compiled


@functools.cache
def a_few() -> Batch:
    return all_kernels(64, small=True)


def check_a_few(program: Path) -> None:
    a_few().check(program)


@pytest.mark.slow
@cuda_on_cpu.needs_nvcc
def test_other_architectures(program, tmp_path):
    for other in cuda_on_cpu.for_others(program, (80, 100, 120), tmp_path):
        check_a_few(other)


@cuda_on_cpu.needs_nvcc
@pytest.mark.usefixtures("what_devices_may_do")
def test_what_devices_may_do(program):
    check_a_few(program)


# ----------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.slow
@cuda_on_cpu.needs_nvcc
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_no_register_is_spilled(architecture):
    assert [kernel.spilled for kernel in cuda_on_cpu.kernels_of("advantages", architecture)] == [0] * 6
