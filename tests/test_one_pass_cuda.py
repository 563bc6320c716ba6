"""The CUDA kernels of one pass: run on the CPU against the reference, compiled by nvcc, and on a GPU."""

from __future__ import annotations

import functools
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import cuda_on_cpu
import pytest
import torch
from support import one_pass
from support import policy_loss as contract
from support.combinations import COMBINATIONS
from support.policy_loss import INF, NAN
from torch import Tensor

import fusedpo
from fusedpo import backends, reference
from fusedpo import objectives as O
from fusedpo.ops import one_pass as ops_one_pass
from fusedpo.ops import policy_loss as ops_policy_loss

ROOT = Path(__file__).parent.parent
DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POSSIBLE = [objective for objective in COMBINATIONS if ops_one_pass.is_possible(objective)]
NFPO = O.nfpo(4, kl=O.KL("k3", 0.1), entropy_coef=0.1)

on_the_cpu = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no C++ compiler")


# ----------------------------------------------------------------------------------------------- the kernels on the CPU


class Device(NamedTuple):
    """Warps of a block, bytes of its shared memory, and how many clusters run at a time."""

    warps: int = 2
    shared: int = 232_448
    clusters: int = 2


# Blocks that have room for one slice per warp, and for two: rows of up to 8 KiB and of up to 16 KiB take two blocks.
ONE_SLICE, TWO_SLICES = 4_700, 9_000


class Problem(NamedTuple):
    """Arguments of the operator. Sequences are padded ``[B, T]``, or packed ``[T]`` with ``cu_seqlens``."""

    logits: Tensor
    objective: O.Objective
    token_ids: Tensor
    temperature: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    ref_logprobs: Tensor | None
    is_weights: Tensor | None
    scale: Tensor

    def tokens(self) -> dict[str, Tensor | None]:
        names = ("old_logprobs", "advantages", "mask", "cu_seqlens", "ref_logprobs", "is_weights")
        return {name: getattr(self, name) for name in names}


def problem(
    objective: O.Objective,
    shape: tuple[int, ...] = (2, 7),
    size: int = 300,
    dtype: torch.dtype = torch.float32,
    *,
    lengths: list[int] | None = None,
    spread: float = 0.3,
    **replaced: Any,
) -> Problem:
    """Random logits and tokens; a fifth of them masked, with nan and wrong ids there."""
    logits = (2 * torch.randn(*shape, size)).to(dtype)
    ids = torch.randint(size, shape)
    mask = torch.rand(shape) < 0.8
    lp = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    p = Problem(
        logits=torch.where(mask[..., None], logits, NAN),
        objective=objective,
        token_ids=ids.where(mask, -7),
        temperature=torch.rand(shape) + 0.6,
        old_logprobs=(lp + spread * torch.randn(shape)).where(mask, NAN),
        advantages=torch.randn(shape).where(mask, NAN),
        mask=mask,
        cu_seqlens=None if lengths is None else torch.tensor([0, *lengths]).cumsum(0),
        ref_logprobs=(lp + spread * torch.randn(shape)).where(mask, INF),
        is_weights=torch.randn(shape).exp(),
        scale=torch.randn(shape).where(mask, NAN),
    )
    return p._replace(**replaced)


class Expected(NamedTuple):
    gradient: Tensor
    logprobs: Tensor
    entropy: Tensor


def expect(p: Problem) -> Expected:
    """By the reference, in float64."""

    def double(x: Tensor | None) -> Tensor | None:
        return x.double() if x is not None and x.is_floating_point() else x

    logits = p.logits.double().requires_grad_()
    lp, entropy = reference.token_logprobs(
        logits, p.token_ids, temperature=p.temperature.double(), mask=p.mask, return_entropy=True
    )
    with fusedpo.backend("reference"):
        loss = fusedpo.policy_loss(
            lp,
            objective=p.objective,
            entropy=entropy,
            reduction="none",
            **{name: double(x) for name, x in p.tokens().items()},
        ).loss
    loss.backward(p.scale.double().where(torch.ones_like(lp, dtype=torch.bool) if p.mask is None else p.mask, 0))
    return Expected(logits.grad, lp.detach(), entropy.detach())


class Memory(NamedTuple):
    """Where rows lie: elements before the first one, between two, and between two sequences."""

    lead: int = 0
    gap: int = 0
    between: int = 0

    def strides(self, shape: torch.Size) -> tuple[int, ...]:
        stride = shape[-1] + self.gap
        return (shape[-2] * stride + self.between, stride, 1)[3 - len(shape) :]

    def view(self, buffer: Tensor, shape: torch.Size) -> Tensor:
        return buffer.as_strided(shape, self.strides(shape), self.lead)

    def buffer(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        rows = shape[:-1].numel()
        return torch.full((self.lead + rows * (shape[-1] + self.gap) + shape[0] * self.between + 9,), 7.0, dtype=dtype)

    def arguments(self, shape: torch.Size) -> tuple[int, ...]:
        outer, stride = (0, *self.strides(shape)[:-1])[-2:]
        return (self.lead, max(shape[-2], 1), outer, stride)


DENSE = Memory()


class Call(NamedTuple):
    problem: Problem
    device: Device = Device()
    source: Memory = DENSE
    target: Memory | None = DENSE  # None: in place
    rows: Tensor | None = None  # logits of these tokens alone
    known: Tensor | None = None  # log-probs of tokens behind them

    def arguments(self) -> tuple[Any, ...]:
        p = self.problem
        logits = p.logits if self.rows is None else p.logits.flatten(0, -2)[self.rows]
        shape, tokens = logits.shape, p.token_ids.shape
        buffer = self.source.buffer(shape, logits.dtype)
        self.source.view(buffer, shape).copy_(logits)
        target = self.target or self.source
        parts, values = ops_policy_loss.encode(p.objective)
        return (
            0,
            *self.device,
            buffer,
            None if self.target is None else target.buffer(shape, logits.dtype),
            *self.source.arguments(shape),
            *target.arguments(shape),
            shape[:-1].numel(),
            shape[-1],
            torch.zeros(tokens) if self.known is None else self.known,
            self.rows,
            p.token_ids,
            p.temperature,
            *p.tokens().values(),
            p.scale,
            torch.tensor(parts),
            torch.tensor(values, dtype=torch.float64),
            (tokens[0] if len(tokens) == 2 else 1) if p.cu_seqlens is None else p.cu_seqlens.numel() - 1,
            tokens[-1],
            *(x is None or x.shape == tokens for x in (p.advantages, p.is_weights)),
        )

    def results(self) -> list[tuple[torch.Size, torch.dtype]]:
        p = self.problem
        shape = p.logits.shape if self.rows is None else torch.Size((len(self.rows), p.logits.shape[-1]))
        size = (self.target or self.source).buffer(shape, p.logits.dtype).shape
        tokens = (p.token_ids.shape, torch.float32)
        return [(torch.Size([2]), torch.int64), (size, p.logits.dtype), tokens, tokens]


class Result(NamedTuple):
    geometry: list[int]  # blocks of a cluster, slices of a warp
    gradient: Tensor
    logprobs: Tensor
    entropy: Tensor


def run(program: Path, calls: list[Call]) -> list[Result]:
    """All calls in one process. What lies between rows is as it was."""
    shapes = [shape for call in calls for shape in call.results()]
    results = iter(cuda_on_cpu.run(program, [call.arguments() for call in calls], shapes))
    collected = []
    for call in calls:
        geometry, buffer, logprobs, entropy = (next(results) for _ in range(4))
        shape = call.problem.logits.shape
        shape = shape if call.rows is None else torch.Size((len(call.rows), shape[-1]))
        gradient = (call.target or call.source).view(buffer, shape).clone()
        (call.target or call.source).view(buffer, shape).fill_(7)
        assert (buffer == 7).all()
        collected.append(Result(geometry.tolist(), gradient, logprobs, entropy))
    return collected


def compare(call: Call, result: Result, expected: Expected | None = None) -> None:
    """Some 30 roundoffs of the largest gradient in a row, 10 of the terms of its coefficient, which may cancel, and the
    rounding of the result."""
    expected = expected or expect(call.problem)
    name = f"{call.problem.objective}, {list(call.problem.logits.shape)}, {call.device}: "
    for field in ("logprobs", "entropy"):
        torch.testing.assert_close(
            getattr(result, field).double(),
            getattr(expected, field),
            rtol=1e-6,
            atol=3e-6,
            equal_nan=True,
            msg=lambda text, field=field: name + field + text,
        )
    gradient, terms = expected.gradient, call.problem.scale.nan_to_num().abs()[..., None]
    if call.rows is not None:
        gradient, terms = gradient.flatten(0, -2)[call.rows], terms.flatten(0, -2)[call.rows]
    dtype = result.gradient.dtype
    rounding = torch.finfo(dtype).eps / 2 * gradient.abs() + (2**-25 if dtype == torch.float16 else 0)
    largest = gradient.nan_to_num().abs().amax(-1, keepdim=True)
    tolerance = 1.01 * rounding + 1e-5 * gradient.abs() + 2e-6 * largest + 6e-7 * terms
    wrong = (result.gradient - gradient).abs() > tolerance
    assert torch.equal(result.gradient.isnan(), gradient.isnan()), name + "nan"
    assert not wrong.any(), f"{name}{wrong.sum()} wrong, by {(result.gradient - gradient)[wrong].abs().max()}"


def check(program: Path, calls: list[Call]) -> list[Result]:
    results = run(program, calls)
    for call, result in zip(calls, results, strict=True):
        compare(call, result)
    return results


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return cuda_on_cpu.build_as_compiled("one_pass", tmp_path_factory.mktemp("cuda") / "one_pass")


@on_the_cpu
def test_objectives(program):
    """Padded and packed, in place or not, advantages and weights per token or per sequence, in turns."""
    calls = []
    for i, objective in enumerate(POSSIBLE[::3]):
        packed = i % 3 == 0
        p = problem(objective, (14,) if packed else (2, 7), lengths=[5, 0, 1, 8] if packed else None)
        per_sequence = torch.randn(4 if packed else 2, 1)
        p = p._replace(**[{}, {"advantages": per_sequence}, {"is_weights": per_sequence.exp()}][i % 4 % 3])
        calls.append(Call(p, Device(1, clusters=1 + i % 4), target=None if i % 2 else DENSE))
    check(program, calls)


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_and_place_of_rows(program, dtype):
    """Rows of one element to many slices, on one block to four, at addresses that no vector begins at."""
    calls, blocks = [], set()
    memories = (DENSE, Memory(1), Memory(3, 5, 2), Memory(8, 8))
    for i, size in enumerate((2, 3, 7, 8, 9, 511, 513, 1024, 1025, 2047, 4099, 10_001)):
        for source, target in ((memories[i % 4], None), (memories[(i + 1) % 4], memories[(i + i // 4) % 4])):
            shared = ONE_SLICE if size < 4099 else TWO_SLICES
            calls.append(Call(problem(NFPO, (2, 3), size, dtype), Device(2, shared, 2), source, target))
    for result in check(program, calls):
        blocks.add(tuple(result.geometry))
    assert {count for count, _ in blocks} >= {1, 2, 4}
    assert {slices for _, slices in blocks} >= {1, 2}


@on_the_cpu
def test_clusters_of_eight_blocks(program):
    p = problem(NFPO, (2, 3), 8000)
    device = Device(2, ONE_SLICE, 2)
    for result in check(program, [Call(p, device), Call(p, device, Memory(3, 5, 2), None)]):
        assert result.geometry == [8, 1]


@on_the_cpu
@pytest.mark.parametrize("ahead", [1, 5, 200])
def test_windows_reach_over_segments_not_over_ends(program, ahead):
    """Packed sequences, of length 0 and 1 too, and as many clusters as rows; the window from 1 to beyond the rows."""
    objective = O.Objective(O.Trace(0, ahead), O.PPOClip(0.2, 0.3), entropy_coef=0.1)
    p = problem(objective, (61,), 40, lengths=[1, 17, 0, 1, 1, 37, 4], spread=0.05)
    calls = [Call(p, Device(1, clusters=n), target=t) for n, t in ((1, DENSE), (2, None), (7, None), (64, None))]
    results = check(program, calls)
    for one, other in itertools.pairwise(results):
        assert all(map(torch.equal, one[1:], other[1:]))


def without_mask(p: Problem) -> Problem:
    """The same with numbers in place of what is masked, and all tokens kept."""
    floats = {name: x for name, x in p._asdict().items() if isinstance(x, Tensor) and x.is_floating_point()}
    floats = {name: x.nan_to_num(0.5, 0.5) for name, x in floats.items()}
    return p._replace(token_ids=p.token_ids.clamp(0), mask=None, **floats)


@on_the_cpu
def test_absent_arguments(program):
    p = without_mask(problem(O.nfpo(3)))
    names = ("old_logprobs", "ref_logprobs", "is_weights")
    calls = [Call(p), Call(p._replace(temperature=torch.tensor(0.8)))]
    check(program, [*calls, *(Call(p._replace(**{name: None})) for name in names)])


@on_the_cpu
@pytest.mark.parametrize("kept", [[], [0], [13], [3, 4, 9], list(range(14))], ids=len)
def test_few_rows_are_kept(program, kept):
    """More clusters than rows, and rows that are zeroed by every cluster."""
    mask = torch.zeros(14, dtype=torch.bool)
    mask[kept] = True
    p = without_mask(problem(NFPO, (14,), lengths=[6, 8]))._replace(mask=mask)
    check(program, [Call(p, Device(1, clusters=n), Memory(1, 2), t) for n, t in ((1, None), (3, DENSE), (20, None))])


@on_the_cpu
def test_more_rows_than_one_block_orders(program):
    p = problem(O.nfpo(3), (150,), 9, lengths=[50, 1, 0, 99], spread=0.1)
    check(program, [Call(p, Device(1, clusters=5), target=None)])


@on_the_cpu
@pytest.mark.parametrize("ahead", [0, 2, 9])
def test_chunks_of_rows(program, ahead):
    """Logits of the kept tokens alone, chunk by chunk from the last: windows go on behind the chunk."""
    ratio = O.TokenRatio() if ahead == 0 else O.Trace(0, ahead)
    p = problem(O.Objective(ratio, entropy_coef=0.1), (33,), 50, lengths=[12, 0, 21], spread=0.1)
    expected = expect(p)
    live = p.mask.nonzero()[:, 0]
    logprobs = torch.zeros(33)
    for rows in (live[20:], live[7:20], live[:7]):
        call = Call(p, Device(1, clusters=3), target=None, rows=rows, known=logprobs.clone())
        [result] = run(program, [call])
        changed = torch.zeros(33, dtype=torch.bool)
        changed[rows] = True
        assert torch.equal(result.logprobs[~changed], logprobs[~changed])
        logprobs = result.logprobs
        entropy = expected.entropy.where(changed, 0)
        compare(call, result, expected._replace(logprobs=expected.logprobs.where(logprobs != 0, 0), entropy=entropy))
    assert torch.equal(logprobs != 0, p.mask)


@on_the_cpu
@pytest.mark.parametrize("ahead", [2, 9])
def test_rows_with_gaps_and_masked_ones(program, ahead):
    """Windows go over tokens whose log-probs are there already; masked rows get zeros."""
    p = problem(O.Objective(O.Trace(0, ahead), entropy_coef=0.1), (33,), 50, lengths=[12, 0, 21], spread=0.1)
    expected = expect(p)
    rows = torch.cat((torch.arange(2, 9), torch.arange(14, 25)))
    given = torch.zeros(33, dtype=torch.bool).index_fill(0, rows, True)
    assert 0 < p.mask[rows].sum() < len(rows)
    known = expected.logprobs.float().masked_fill(given, 0)
    for target in (None, DENSE):
        call = Call(p, Device(1, clusters=3), target=target, rows=rows, known=known.clone())
        [result] = run(program, [call])
        compare(call, result, expected._replace(entropy=expected.entropy.where(given, 0)))
        assert not result.gradient[~p.mask[rows]].any()


# ------------------------------------------------------------------------------------------------------ awkward values


def awkward_rows(size: int) -> Tensor:
    x = 2 * torch.randn(12, size)
    x[0, 5] = 60  # dominant
    x[1, :] = -INF  # nothing else
    x[2, ::2] = -INF
    x[3, : size // 2] = -INF  # leading slices
    x[4] += 3e4
    x[5] -= 3e4
    x[6, 9] = NAN
    x[7, 9] = INF
    x[8] = 1.5  # all equal
    x[9, size - 1] = 25
    x[10] = torch.linspace(-80, 80, size)  # the reference moves all the time
    x[11, 0] = -INF  # the target
    return x


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awkward_values(program, dtype):
    size = 3001
    logits = awkward_rows(size).to(dtype)
    ids = torch.tensor([5, 0, 1, size - 1, 3, 3, 2, 3, 4, size - 1, size - 1, 0])
    objective = O.reinforce(entropy_coef=0.3)
    plain = {"mask": None, "is_weights": None, "old_logprobs": None, "ref_logprobs": None, "scale": torch.ones(12)}
    p = problem(objective, (12,), size, dtype, logits=logits, token_ids=ids, advantages=torch.ones(12), **plain)
    check(program, [Call(p), Call(p, Device(2, ONE_SLICE, 3), target=None)])


@on_the_cpu
def test_a_confident_token_keeps_its_digits(program):
    """1 - p is 1e-9, and in float32 p is 1; its log-prob is -1e-9, not 0."""
    logits = torch.zeros(1, 1001)
    logits[0, 700] = 27.6
    clean = {"mask": None, "is_weights": None, "old_logprobs": None, "ref_logprobs": None, "scale": torch.ones(1)}
    p = problem(O.reinforce(), (1,), 1001, logits=logits, token_ids=torch.tensor([700]), **clean)
    [result] = run(program, [Call(p, Device(2, ONE_SLICE, 1))])
    expected = expect(p)
    torch.testing.assert_close(result.logprobs.double(), expected.logprobs, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.entropy.double(), expected.entropy, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.gradient.double(), expected.gradient, rtol=1e-5, atol=0)


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_coefficient_of_zero_is_a_row_of_zeros(program, dtype):
    """It is filled, not computed: in a row with a logit that makes the softmax nan, too."""
    even = torch.arange(9) % 2 == 0
    p = problem(O.ppo(), (2, 9), 100, dtype)
    p = p._replace(advantages=p.advantages.where(even, 0))
    infinite = p.logits.where(even[:, None], INF)
    on_policy = p._replace(objective=O.reinforce(), old_logprobs=None, logits=infinite)
    calls = [Call(p), Call(on_policy, target=None)]
    results = run(program, calls)
    compare(calls[0], results[0])
    for result in results:
        assert (result.gradient[:, 1::2] == 0).all()
        assert (result.gradient[:, ::2][p.mask[:, ::2]] != 0).any(-1).any()


@on_the_cpu
def test_an_id_out_of_range_is_nan(program):
    """Nobody can raise, but the loss shows it; no other row is touched."""
    p = without_mask(problem(O.ppo(), (4,), 100))
    good, bad = run(program, [Call(p), Call(p._replace(token_ids=torch.tensor([100, *p.token_ids[1:3], -1])))])
    assert bad.logprobs.isnan().tolist() == [True, False, False, True]
    assert all(torch.equal(x[1:3], y[1:3]) for x, y in zip(good[1:], bad[1:], strict=True))


# ------------------------------------------------------------------------------------------------ scaling, and geometry


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_scaling(program, dtype, factor):
    for memory in (DENSE, Memory(3, 5, 2)):
        shape = torch.Size((3, 2, 1001))
        buffer = memory.buffer(shape, dtype)
        memory.view(buffer, shape).normal_()
        arguments = (1, buffer, *memory.arguments(shape), 6, 1001, torch.tensor(factor))
        [scaled] = cuda_on_cpu.run(program, [arguments], [(buffer.shape, dtype)])
        memory.view(buffer, shape).copy_(memory.view(buffer, shape).float() * factor)
        assert torch.equal(scaled, buffer)


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_factor_of_one_leaves_every_bit(program, dtype):
    """Of a signalling nan too, which a multiplication by 1 would make a quiet one."""
    shape = torch.Size((6, 50))
    gradient = one_pass.signalling_nan(shape, dtype)
    arguments = (1, gradient, *DENSE.arguments(shape), *shape, torch.tensor(1.0))
    [result] = cuda_on_cpu.run(program, [arguments], [(shape, dtype)])
    assert torch.equal(one_pass.bits(result), one_pass.bits(gradient))


H100, RTX = 232_448, 101_376  # bytes of shared memory that a block can have


@on_the_cpu
def test_how_rows_lie_in_shared_memory(program):
    """Clusters are as small as they can be: blocks of a cluster, slices of a warp; 0 blocks where nothing has room."""
    table = {
        (H100, 32_000, 2): (1, 2),
        (H100, 50_257, 2): (1, 4),
        (H100, 128_256, 2): (2, 4),
        (H100, 151_936, 2): (2, 5),
        (H100, 262_144, 2): (4, 5),
        (H100, 151_936, 4): (4, 5),
        (H100, 262_144, 4): (8, 5),
        (H100, 786_000, 2): (8, 6),
        (H100, 800_000, 2): (0, 0),
        (H100, 1 << 40, 2): (0, 0),
        (RTX, 151_936, 2): (4, 3),
    }
    calls = [(2, size * width, shared) for shared, size, width in table]
    results = cuda_on_cpu.run(program, calls, [(torch.Size([3]), torch.int64)] * len(calls))
    for ((shared, *_), expected), (*geometry, used) in zip(table.items(), (x.tolist() for x in results), strict=True):
        assert tuple(geometry) == expected
        assert used <= shared


# --------------------------------------------------------------------------------------------------------- as compiled


@functools.cache
def a_few() -> list[tuple[Call, Expected]]:
    torch.manual_seed(0)
    single = [problem(NFPO, (12,), 6002 // dtype.itemsize, dtype, lengths=[4, 1, 7]) for dtype in DTYPES]
    long = problem(O.nfpo(6), (12,), 1001, lengths=[12])
    one_warp = Device(1, clusters=2)  # which has six slices of a row; of the single ones each warp has one
    sliced = []
    for dtype, objective in itertools.product(DTYPES, (NFPO, O.nfpo(3))):  # some rows of the latter are zeros
        size, zero = 5 * 2048 // dtype.itemsize + 3, torch.arange(8) % 4 == 1
        whole = without_mask(problem(objective, (8,), size, dtype, lengths=[8]))
        sliced.append(Call(whole._replace(advantages=whole.advantages.where(~zero, 0)), one_warp))
    calls = [
        *sliced,
        *(Call(p, Device(2, ONE_SLICE, 2), Memory(3, 2), None) for p in single),
        Call(single[1], Device(2, ONE_SLICE, 3)),
        Call(long, Device(2, TWO_SLICES, 4), target=None),
    ]
    return [(call, expect(call.problem)) for call in calls]


def check_a_few(program: Path) -> None:
    results = run(program, [call for call, _ in a_few()])
    for (call, expected), result in zip(a_few(), results, strict=True):
        compare(call, result, expected)


@pytest.mark.slow
@cuda_on_cpu.needs_nvcc
def test_other_architectures(program, tmp_path):
    for other in cuda_on_cpu.for_others(program, (100, 120), tmp_path):
        check_a_few(other)


@cuda_on_cpu.needs_nvcc
@pytest.mark.usefixtures("what_devices_may_do")
def test_what_devices_may_do(program):
    check_a_few(program)


# ---------------------------------------------------------------------------------------------------------- sanitizers


@on_the_cpu
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_kernels_under_sanitizers(tmp_path, sanitizer):
    """No row is read before it has arrived, and none arrives where one is still being read."""
    check_a_few(cuda_on_cpu.build_with_sanitizer("one_pass", tmp_path / "one_pass", sanitizer))


# ------------------------------------------------------------------------------------------------------------- compiled


@cuda_on_cpu.needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_no_register_is_spilled(architecture, record_property):
    """Generations before 9.0 have an empty kernel."""
    kernels = cuda_on_cpu.kernels_of("one_pass", architecture)
    assert [(kernel.stack, kernel.spilled) for kernel in kernels] == [(0, 0)] * 7  # order; rows and scaling in 3 dtypes
    used = {found[1]: k.registers for k in kernels if (found := re.search(r"row_kernelI(\w+?)EEv", k.name))}
    assert len(used) == 3
    for dtype, registers in used.items():
        record_property(f"registers of row_kernel<{dtype}>", registers)
        assert registers <= (8 if architecture == 80 else 128)  # 512 threads have 65,536


@cuda_on_cpu.needs_nvcc
@pytest.mark.slow
def test_ptx_has_clusters_and_bulk_copies():
    ptx = cuda_on_cpu.compile_to_ptx("one_pass", 90)
    kernels = [code for code in ptx.split(".entry ")[1:] if "row_kernel" in code.partition("(")[0]]
    assert len(kernels) == 3
    for code in kernels:
        name = code.partition("(")[0]
        assert "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes" in code, name
        assert "mapa" in code, name  # the shared memory of other blocks
        assert "barrier.cluster.arrive" in code, name
        assert "ld.shared.v4" in code, name
        assert "st.global.v4" in code or "st.v4" in code, name


# ------------------------------------------------------------------------------------------------------------ on a GPU


def on_a_gpu(test):
    reason = "built without CUDA kernels" if not backends.HAS_CUDA_KERNELS else "needs compute capability 9.0"
    works = backends.HAS_CUDA_KERNELS and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return pytest.mark.gpu(pytest.mark.skipif(not works, reason=reason)(test))


def on_device(p: Problem) -> Problem:
    return p._replace(**{name: x.to(DEVICE) for name, x in p._asdict().items() if isinstance(x, Tensor)})


def run_on_device(p: Problem, *, inplace: bool) -> Result:
    p = on_device(p)
    logprobs, entropy = torch.zeros(2, *p.token_ids.shape, device=DEVICE).unbind()
    tokens = (p.token_ids, p.temperature, *p.tokens().values(), p.scale, *ops_policy_loss.encode(p.objective))
    gradient = p.logits if inplace else torch.empty_like(p.logits)
    torch.ops.fusedpo.one_pass.native(p.logits, gradient, logprobs, entropy, None, *tokens)
    return Result([], gradient.cpu(), logprobs.cpu(), entropy.cpu())


@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [100, 50_257, 151_936, 262_144])
def test_against_the_reference_on_a_gpu(dtype, size):
    p = problem(NFPO, (150,), size, dtype, lengths=[100, 1, 0, 49], spread=0.1)
    results = [run_on_device(p, inplace=inplace) for inplace in (False, True, False)]
    expected = expect(p)
    for result in results:
        compare(Call(p), result, expected)
        assert all(map(torch.equal, result[1:], results[0][1:]))


@on_a_gpu
@pytest.mark.parametrize("objective", POSSIBLE, ids=contract.name_of)
def test_every_objective_on_a_gpu(objective):
    p = problem(objective, (4, 50), 1000, torch.bfloat16)
    compare(Call(p), run_on_device(p, inplace=True))


@on_a_gpu
def test_a_row_that_is_too_large_says_so():
    with pytest.raises(RuntimeError, match="bytes are too many"):
        run_on_device(problem(O.ppo(), (2,), 1_000_000), inplace=True)


@on_a_gpu
def test_no_sync_and_graphs():
    p = on_device(problem(NFPO, (64,), 32_000, torch.bfloat16))
    logprobs, entropy = torch.zeros(2, 64, device=DEVICE).unbind()
    tokens = (p.token_ids, p.temperature, *p.tokens().values(), p.scale, *ops_policy_loss.encode(p.objective))
    first, captured = torch.empty_like(p.logits), torch.empty_like(p.logits)
    arguments = (logprobs, entropy, None, *tokens)
    torch.ops.fusedpo.one_pass.native(p.logits, first, *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails where anything waits for the device
        torch.ops.fusedpo.one_pass.native(p.logits, captured, *arguments)
    graph.replay()
    assert torch.equal(first, captured)


@on_a_gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool):
    """Of clusters of two blocks."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer")

    def run_python(*arguments):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    simplest = run_python("-c", "import torch; torch.ones(1, device='cuda').cpu()")
    if simplest.returncode != 0:
        pytest.skip(f"compute-sanitizer does not work here: {simplest.stdout[-500:]}")
    tests = f"{__file__}::test_against_the_reference_on_a_gpu"
    finished = run_python("-m", "pytest", "-x", "-q", tests, "-k", "151936 and bfloat16")
    assert finished.returncode == 0, finished.stdout[-5000:]
