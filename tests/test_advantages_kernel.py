"""The kernels of the advantages against the reference in float64; and what operators promise."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support.advantages import (
    CLOSE,
    GROUPS,
    LAYOUTS,
    NAN,
    NATIVE,
    REWARDS,
    TOKENS,
    TRITON,
    estimate,
    prepare,
    random,
    sequences,
    token_batches,
    without,
)
from support.kernels import Kernels
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from fusedpo import backends
from fusedpo.ops.advantages import ESTIMATORS
from fusedpo.reference import advantages as reference

pytestmark = [
    pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING)),
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning"),  # the interpreter's
]
# Tensors are on the CPU, where Triton needs its interpreter, which is off if there is a GPU.
interpreted = [pytest.mark.triton, pytest.mark.skipif(torch.cuda.is_available(), reason="not under the interpreter")]
both = pytest.mark.parametrize("kernels", [NATIVE, pytest.param(TRITON, marks=interpreted)], ids=["native", "triton"])


CENTRED = ("grpo", "dr_grpo", "rloo", "opo", "gpg", "maxpo", "order_statistic", "pkpo, sloo-1", "grpo_passk")


def check(kernels: Kernels, name: str, rewards: Tensor, dtype: torch.dtype = torch.float64, **groups: Any) -> None:
    if "mask" in groups and name != "passk":
        rewards = rewards.where(groups["mask"] != 0, NAN)
    rewards = rewards.to(dtype)
    result, expected = estimate(kernels, name, rewards, **groups), estimate(reference, name, rewards, **groups)
    # In float32 the rounding of the result.
    close = CLOSE if dtype == torch.float64 else {"rtol": 1.2e-7, "atol": 1e-12}
    torch.testing.assert_close(result, expected, **close)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups(name, layout):
    for rewards in REWARDS.values():
        for dtype in (torch.float64, torch.float32):
            check(NATIVE, name, rewards, dtype, **LAYOUTS[layout])


@both
@pytest.mark.parametrize("name", ["grpo", "maxpo", "order_statistic"])
def test_groups_larger_than_a_block(kernels, name):
    check(kernels, name, random(300), group_size=300)
    check(kernels, name, random(80).mul(9).round(), group_ids=(torch.arange(80) % 16 > 0).long())
    if kernels is NATIVE:
        check(kernels, name, random(1200), group_size=600)


@pytest.mark.parametrize("n", [*range(2, 10), 16])
def test_every_k(n):
    rewards = torch.cat([rewards[:n] for rewards in REWARDS.values()])
    for k in range(1, n + 1):
        for name in ("maxpo", "max_at_k", "pkpo, s", "pkpo, sloo", "pkpo, sloo-1"):
            if k <= n - (name in ("maxpo", "pkpo, sloo")) and k >= 1 + (name == "pkpo, sloo-1"):
                function, arguments = GROUPS[name]
                arguments = arguments | {"k": k, "group_size": n}
                result = getattr(NATIVE, function)(rewards, **arguments)
                torch.testing.assert_close(result, getattr(reference, function)(rewards, **arguments), **CLOSE)


@pytest.mark.parametrize("n", [257, 1024])
def test_every_k_of_a_large_group(n):
    rewards = random(n)
    for k in range(1, n):
        result = NATIVE.maxpo(rewards, k=k, group_size=n)
        assert result.isfinite().all()
        assert abs(result.sum()) <= 1e-12 * result.abs().sum()
    for k in (1, 2, 17, n // 2, n - 2, n - 1):
        for function in ("maxpo", "pkpo", "max_at_k"):
            if k > 1:
                arguments = {"k": k, "group_size": n}
                result, expected = (getattr(source, function)(rewards, **arguments) for source in (NATIVE, reference))
                torch.testing.assert_close(result, expected, **CLOSE)


@pytest.mark.parametrize("k", [1, 2, 64, 2048, 4000])
def test_groups_of_4096(k):
    """c of the rewards are 1, w are 0: sums of 4,096 terms and products of as many, against integers."""
    for c in (1, 40, 2000):
        w = 4096 - c
        rewards = (torch.arange(4096) * 1223 % 4096 < c).double()
        best = math.comb(w, k) / math.comb(4095, k)
        expected = torch.tensor([-c / w * best, best], dtype=torch.float64)[rewards.long()]
        result = NATIVE.maxpo(rewards, k=k, group_size=4096)
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-300)
        torch.testing.assert_close(NATIVE.maxpo(rewards.float(), k=k, group_size=4096), result.float(), rtol=0, atol=0)
    rewards = random(4096)
    result, expected = (source.maxpo(rewards, k=k, group_size=4096) for source in (NATIVE, reference))
    torch.testing.assert_close(result, expected, **CLOSE)


@both
def test_every_dtype(kernels):
    """Of rewards, lengths and mask, which take turns: each is read by itself."""
    rewards, lengths, mask = torch.tensor([0, 3, 1, 1, 2, 0, 0, 0, 5, 1, 1, 0]), torch.arange(12), torch.arange(12) % 4
    dtypes = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16)
    masks = (torch.bool, torch.int8, torch.float16, torch.float64, torch.bool, torch.uint8, torch.int16)
    expected = reference.opo(rewards, lengths=lengths, mask=mask, group_size=4)
    for i, (dtype, mask_dtype) in enumerate(zip(dtypes, masks, strict=True)):
        given = {"lengths": lengths.to(dtypes[i - 1]), "mask": mask.to(mask_dtype), "group_size": 4}
        torch.testing.assert_close(kernels.opo(rewards.to(dtype), **given), expected)
    best = rewards > 0
    torch.testing.assert_close(kernels.rloo(best, group_size=4), reference.rloo(best, group_size=4))


# ------------------------------------------------------------------------------------------------------- invariances


@both
@pytest.mark.parametrize("name", CENTRED)
def test_equal_rewards_give_exactly_zero(kernels, name):
    for value in (0.0, 0.1, -1e30, 1e-40):
        rewards = torch.full((21,), value, dtype=torch.float32)
        assert (estimate(kernels, name, rewards, group_size=7) == 0).all()
    if kernels is NATIVE:
        assert (estimate(kernels, name, torch.full((2000,), 1 / 3), group_size=1000) == 0).all()


@pytest.mark.parametrize(
    "name", [name for name in GROUPS if name not in ("opo", "remax", "reinforce_plus_plus_baseline")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_order_of_samples_changes_no_bit(name, dtype):
    for count in (24, 1200):
        rewards = torch.cat([random(count // 2, seed=1), random(count // 2).mul(2).round()]).to(dtype)
        ids = torch.arange(count) // (count // 4)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        expected = estimate(NATIVE, name, rewards, group_ids=ids)
        assert torch.equal(estimate(NATIVE, name, rewards[order], group_ids=ids[order]), expected[order])
        assert torch.equal(estimate(NATIVE, name, rewards, group_size=count // 4), expected)


@both
@pytest.mark.parametrize("name", ["maxpo", "max_at_k", "pkpo, sloo-1"])
def test_equal_rewards_get_bit_identical_advantages(kernels, name):
    rewards = random(5)[torch.arange(300) * 7 % 5]
    result = estimate(kernels, name, rewards, group_size=300)
    for value in rewards.unique():
        assert result[rewards == value].unique().numel() == 1


def test_the_number_of_threads_changes_no_bit():
    rewards, values, mask = random(64, 300), random(64, 300, seed=1), random(64, 300, seed=2) > 0

    def everything() -> list[Tensor]:
        ids = torch.arange(rewards.numel()) % 700
        flat = {name: estimate(NATIVE, name, rewards.flatten(), group_ids=ids) for name in GROUPS}
        gae = NATIVE.gae(rewards, values, mask=mask, gamma=0.99, lam=0.95)
        return [*flat.values(), *gae, NATIVE.whiten(rewards, mask=mask)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = everything()
        torch.set_num_threads(3)
        results = everything()
    finally:
        torch.set_num_threads(threads)
    for result, one_thread in zip(results, expected, strict=True):
        assert torch.equal(result, one_thread)


@both
@pytest.mark.parametrize(
    "name", [name for name in GROUPS if name not in ("gpg", "reinforce_plus_plus_baseline", "passk")]
)
def test_nan_and_inf_stay_in_their_group(kernels, name):
    rewards = random(24)
    clean = estimate(kernels, name, rewards, group_size=8)
    for poison in (NAN, math.inf):
        poisoned = rewards.clone()
        poisoned[10] = poison
        result = estimate(kernels, name, poisoned, group_size=8)
        assert torch.equal(result[:8], clean[:8])
        assert torch.equal(result[16:], clean[16:])
        assert not result[8:16].isfinite().all()
    left_out = torch.arange(24) != 10
    result = estimate(kernels, name, rewards.where(left_out, NAN), group_size=8, mask=left_out)
    assert result.isfinite().all()
    assert result[10] == 0


@both
@pytest.mark.parametrize("name", [name for name in GROUPS if name != "passk"])
def test_a_nan_among_equal_rewards_is_not_lost(kernels, name):
    rewards = torch.tensor([1.0, NAN, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    result, expected = (estimate(source, name, rewards, group_size=4) for source in (kernels, reference))
    assert result[1].isnan()
    torch.testing.assert_close(result, expected, **CLOSE, equal_nan=True)


# ------------------------------------------------------------------------------------------------------------ tokens


def check_tokens(
    kernels: Kernels, name: str, batch: dict[str, Any], bootstrap: Tensor | None, dtype: torch.dtype
) -> None:
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()}
    results, expected = (TOKENS[name](source, inputs, bootstrap) for source in (kernels, reference))
    # Below float64 the rounding of the result, whose terms are of order 1.
    close = CLOSE if dtype == torch.float64 else {"rtol": 1.2e-7, "atol": 1e-12}
    if isinstance(results, Tensor):
        results, expected = (results,), (expected,)
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth, **close)


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tokens(name, dtype):
    for batch in token_batches(1, 37, 130):
        check_tokens(NATIVE, name, batch, None, dtype)
        unmasked = {key: x.nan_to_num() for key, x in without(batch, "mask").items()}
        check_tokens(NATIVE, name, unmasked, random(sequences(batch), seed=9), dtype)


@both
def test_sequences_longer_than_a_block(kernels):
    rewards, values = random(2, 2500), random(2, 2500, seed=1)
    arguments = {"mask": random(2, 2500, seed=2) > 0, "gamma": 0.999, "lam": 0.99}
    results, expected = (source.gae(rewards, values, **arguments) for source in (kernels, reference))
    torch.testing.assert_close(results.advantages, expected.advantages, **CLOSE)


@both
def test_nan_of_a_token_stays_in_its_sequence_and_before_it(kernels):
    rewards = random(3, 50)
    rewards[1, 20] = NAN
    result = kernels.gae(rewards, random(3, 50, seed=1), gamma=0.9, lam=0.9).advantages
    assert result[1, :21].isnan().all()
    assert result[1, 21:].isfinite().all()
    assert result[[0, 2]].isfinite().all()
    cut = kernels.gae(rewards, random(3, 50, seed=1), gamma=0.9, lam=0.0).advantages
    assert cut.isnan().sum() == 1  # nothing follows where the factor is 0


@both
def test_to_tokens(kernels):
    advantages, mask = random(4), random(4, 30) > 0
    offsets = torch.tensor([0, 40, 40, 90, 120])
    for arguments in ((advantages.float(), mask), (advantages, mask.flatten().int())):
        packed = {} if arguments[1].dim() == 2 else {"cu_seqlens": offsets}
        assert torch.equal(kernels.to_tokens(*arguments, **packed), reference.to_tokens(*arguments, **packed))


@both
@pytest.mark.parametrize("whiten", [False, True])
def test_steps(kernels, whiten):
    values, step_rewards = random(6, 8), random(6, 7, seed=1)
    step_ids = torch.randint(-1, 7, (6, 60), generator=torch.Generator().manual_seed(0))
    for missing in (0.0, 0.5, 1.0):
        v = values.where(torch.rand(6, 8, generator=torch.Generator().manual_seed(2)) >= missing, NAN)
        for dtype in (torch.float64, torch.float16):
            arguments = {"step_rewards": step_rewards.to(dtype), "step_ids": step_ids, "whiten": whiten}
            result, expected = (source.vineppo(v.to(dtype), **arguments) for source in (kernels, reference))
            torch.testing.assert_close(result, expected, **(CLOSE if dtype == torch.float64 else {}))


def test_steps_without_values_take_linear_time(tmp_path):
    """Counted in basic blocks: twice the steps and tokens take twice as many."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    tests, program = Path(__file__).parent, str(tmp_path / "steps")
    flags = ["-std=c++17", "-O1", "-fsanitize-coverage=trace-pc", "-I", str(tests.parent / "csrc")]
    subprocess.run([compiler, *flags, str(tests / "cpp" / "steps.cpp"), "-o", program], check=True)
    run = subprocess.run([program, "1000", "2000"], check=True, capture_output=True, text=True)
    few, of_few, many, of_many = map(float, run.stdout.split())
    assert (of_few, of_many) == (1000, 2000)
    assert 0 < many < 2.1 * few


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="not under the interpreter")
def test_steps_without_values_take_linear_time_with_triton(monkeypatch):
    """Counted in elements loaded."""
    from triton.runtime.interpreter import InterpreterBuilder

    loaded, load = [], InterpreterBuilder.create_masked_load

    def counted(self, pointers, *args):
        loaded.append(pointers.data.size)
        return load(self, pointers, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)

    def elements(n):
        loaded.clear()
        values, step_ids = torch.full((1, n + 1), NAN), torch.arange(n)[None] % 2
        values[0, 0] = 0
        result = TRITON.vineppo(values, step_rewards=torch.ones(1, n), step_ids=step_ids)
        assert result.tolist() == [[n, 0] * (n // 2)]
        return sum(loaded)

    assert elements(2048) <= 2.1 * elements(1024)


@both
def test_whiten(kernels):
    x = random(3, 3000).mul(2).add(5)
    mask = random(3, 3000, seed=1) > 0
    for arguments in ({}, {"mask": mask}, {"mask": torch.zeros_like(mask)}):
        torch.testing.assert_close(kernels.whiten(x, **arguments), reference.whiten(x, **arguments), **CLOSE)
    assert (kernels.whiten(x.where(mask, NAN), mask=mask)[~mask] == 0).all()
    assert kernels.whiten(torch.tensor([3.0, 7.0]), mask=torch.tensor([1, 0])).tolist() == [0, 0]


@both
def test_nothing_to_do(kernels):
    empty, ids = torch.empty(0), torch.empty(0, dtype=torch.int64)
    assert kernels.maxpo(empty, k=2, group_size=4).shape == (0,)
    assert kernels.rloo(empty, group_ids=ids).shape == (0,)
    for shape in ((0,), (0, 4), (3, 0)):
        assert kernels.gae(torch.empty(shape), torch.empty(shape), gamma=1.0, lam=1.0).returns.shape == shape
        assert kernels.whiten(torch.empty(shape)).shape == shape
    assert kernels.vineppo(torch.empty(2, 1), step_rewards=torch.empty(2, 0), step_ids=ids.view(2, 0)).shape == (2, 0)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda r: NATIVE.maxpo(r, k=4, group_size=4), "k must be at most .* - 1, got k=4, but group 0 has size 4"),
        (
            lambda r: NATIVE.maxpo(r, k=3, group_ids=torch.tensor([7, 7, 7, 7, 9, 9, 9, 7])),
            "k=3, but group 9 has size 3",
        ),
        (
            lambda r: NATIVE.pkpo(r, k=4, group_size=4, mask=torch.arange(8) != 5),
            "of the group, got k=4, but group 1 has size 3",
        ),
        (lambda r: NATIVE.pkpo(r, k=4, variant="sloo", group_size=4), "k must be at most .* - 1, got k=4"),
        (
            lambda r: NATIVE.order_statistic(r, k=4, weights=[1.0] * 4, group_size=4),
            "k must be at most .* - 1, got k=4",
        ),
        (lambda r: NATIVE.grpo_passk(r, group_size=1), "at least 2 samples, but group 0 has size 1"),
        (lambda r: NATIVE.passk(r, k=2, group_size=4), "rewards must be 0 or 1 for passk, got 2"),
        (lambda r: NATIVE.opo(r, lengths=r - 3, group_size=4), "lengths must be >= 0, got -3"),
        (
            lambda r: NATIVE.remax(r, baselines=r[:2], group_ids=r.long() // 3),
            "group_ids must be 0 to 1, as baselines, got 2",
        ),
        (
            lambda r: NATIVE.vineppo(r[None], step_rewards=r[None, 1:], step_ids=torch.tensor([[3, 7]])),
            "step_ids must be less than the number of steps 7, got 7",
        ),
    ],
)
def test_values_that_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(torch.arange(8.0))


@pytest.mark.parametrize("offsets", [[], [0], [1, 12], [0, 11], [0, 13], [-1, 12], [0, 7, 5, 12], [0, 1 << 30, 12]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_operator_refuses_what_are_no_offsets(offsets, dtype):
    cu_seqlens, rewards = torch.tensor(offsets, dtype=dtype), torch.ones(12)
    with pytest.raises(ValueError, match="cu_seqlens must start with 0, never decrease and end with .* tokens 12"):
        torch.ops.fusedpo.token_advantages.native(
            rewards, None, None, None, None, cu_seqlens, None, 1, 0.9, 1.0, 1.0, 1.0, False
        )


# --------------------------------------------------------------------------------------------------------- operators


def operator_arguments() -> dict[str, list[tuple]]:
    r, ids, order = random(12).float(), torch.arange(12) // 4, torch.arange(12)
    maxpo = (ESTIMATORS.index("maxpo"), 2, False, 0.0, False)
    opo = (ESTIMATORS.index("opo"), 0, False, 0.0, True)
    x, values = random(2, 6).float(), random(2, 4).float()
    return {
        "group_advantages": [(r, None, None, 4, None, None, *maxpo), (r, ids, order, 1, r.abs(), r > 0, *opo)],
        "token_advantages": [
            (x, None, None, None, x > 0, None, r[:2], 1, 0.9, 1.0, 1.0, 1.0, False),
            (r, r, r, r, None, torch.tensor([0, 5, 12]), None, 3, 0.9, 1.0, 1.0, 1.0, True),
        ],
        "step_advantages": [(values, values[:, 1:], torch.zeros(2, 5, dtype=torch.int64), False)],
        "whiten": [(x, None, x > 0, True), (x, x.abs(), None, False)],
    }


@pytest.mark.parametrize("operator", operator_arguments())
def test_opcheck(operator):
    for arguments in operator_arguments()[operator]:
        torch.library.opcheck(getattr(torch.ops.fusedpo, operator).native, arguments)


def test_one_graph_for_all_sizes():
    """20 sizes, numbers of groups and k: one graph for the first, one for all others."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(rewards: Tensor, ids: Tensor, tokens: Tensor, group_size: int, k: int) -> tuple[Tensor, ...]:
        equal = NATIVE.maxpo(rewards, k=k, group_size=group_size)
        ragged = NATIVE.grpo(rewards, group_ids=ids)
        return equal, ragged, NATIVE.gae(tokens, tokens, gamma=0.99, lam=0.95).advantages, NATIVE.whiten(tokens)

    for i in range(20):
        group_size, k = 4 + i, 2 + i // 2
        rewards, tokens = random(group_size * (3 + i % 4)), random(2, 5 + i)
        ids = torch.arange(len(rewards)) % 5
        results = step(rewards, ids, tokens, group_size, k)
        torch.testing.assert_close(results[0], reference.maxpo(rewards, k=k, group_size=group_size), **CLOSE)
        torch.testing.assert_close(results[1], reference.grpo(rewards, group_ids=ids), **CLOSE)
        torch.testing.assert_close(results[3], reference.whiten(tokens), **CLOSE)
    assert counter.frame_count <= 2


class CountCalls(TorchDispatchMode):
    """The names of the operators that reach a backend."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", GROUPS)
def test_one_operator_per_call(name):
    """Nothing beside it: no conversion, no copy, no sync. Groups by ids take a sort, whitening an operator more."""
    operators = ["fusedpo::group_advantages.native"]
    if name == "reinforce_plus_plus_baseline":
        operators.append("fusedpo::whiten.native")
    for groups, sort in (({"group_size": 6}, []), ({"group_ids": torch.arange(24) % 3}, ["aten::sort.stable"])):
        mask = torch.arange(24) % 6
        function, rewards, arguments = prepare(name, torch.arange(24) % 7, mask=mask, **groups)
        with CountCalls() as calls:
            getattr(NATIVE, function)(rewards, **arguments)
        weights = ["aten::lift_fresh"] if name == "order_statistic" else []  # a list becomes a tensor
        assert calls.names == weights + (sort if name not in ("remax", "raft") else []) + operators


@pytest.mark.gpu
def test_no_host_sync():
    rewards, ids = random(24).float().cuda(), (torch.arange(24) % 3).cuda()
    for kernels, why_not in ((NATIVE, None), (TRITON, None)):
        if kernels is NATIVE and backends.why_not("native", "group_advantages", "cuda") is not why_not:
            continue
        estimate(kernels, "maxpo", rewards, group_ids=ids)  # loading a kernel may sync
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = [estimate(kernels, name, rewards, group_ids=ids) for name in ("grpo", "maxpo", "gpg")]
            results += [kernels.gae(rewards, rewards, gamma=0.9, lam=0.9).advantages, kernels.whiten(rewards)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(result.isfinite().all() for result in results)
