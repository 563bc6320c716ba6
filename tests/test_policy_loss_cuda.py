"""The CUDA kernels of the policy loss: run on the CPU against the reference, compiled by nvcc, and on a GPU."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import cuda_on_cpu
import pytest
import torch
from support import policy_loss as contract
from support.combinations import COMBINATIONS
from support.policy_loss import INF, NAN, pack, random_batch
from support.policy_loss_cuda import Call, Sizes, call, cast, on_the_cpu, operator_arguments, run
from torch import Tensor

import fusedpo
from fusedpo import backends
from fusedpo import objectives as O
from fusedpo.ops import policy_loss as ops_policy_loss

ROOT = Path(__file__).parent.parent
DEVICE = "cuda"


# ----------------------------------------------------------------------------------------------- the kernels on the CPU


def compare(call: Call, results: list[Tensor]) -> None:
    """float32 loses some 10 roundoffs per token; metrics and losses are sums of terms of both signs and of size 1."""
    for name, result, expected in zip(
        ("loss", "metrics", "gradient", "entropy", "scale"), results, call.expected, strict=True
    ):
        size = expected.abs().amax().item() if expected.numel() else 0.0
        torch.testing.assert_close(
            result.double(),
            expected,
            rtol=1e-5,
            atol=2e-6 * size + 1e-6,
            msg=lambda text, name=name: f"{name} of {call.name}: {text}",
        )


def check(program: Path, calls: list[Call]) -> None:
    for made, results in zip(calls, run(program, calls), strict=True):
        compare(made, results)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return cuda_on_cpu.build_as_compiled("policy_loss", tmp_path_factory.mktemp("cuda") / "policy_loss")


@on_the_cpu
def test_every_combination(program):
    """Every ratio with every trust region, in turns padded and packed, aggregated and not."""
    calls = []
    for i, objective in enumerate(COMBINATIONS):
        batch, per_sequence = random_batch(3, 21, seed=i), torch.randn(3)
        if i // 2 % 2:
            batch = pack(batch, [21, 0, 12])
            batch["is_weights"] = [batch["is_weights"], per_sequence.exp()][i // 5 % 2]
        else:
            batch["advantages"] = [batch["advantages"], per_sequence][i // 5 % 2]
        calls.append(call(batch, objective, i // 3 % 2 == 1))
    check(program, calls)


@on_the_cpu
def test_aggregation_and_its_options(program):
    calls = []
    for i, aggregation in enumerate(contract.AGGREGATIONS):
        objective = O.Objective(kl=contract.KLS[i + 1], entropy_coef=0.1, aggregation=aggregation)
        free = call(random_batch(), objective, False, loss_scale=0.7)
        calls += [free, call(pack(random_batch(), [5, 0, 3]), objective, False)]
        if aggregation != "token-sum":
            calls.append(call(random_batch(), objective, False, denominator=torch.tensor(7.0)))
            calls.append(call(random_batch(), objective, False, denominator=0.0))
    calls.append(call(random_batch(), O.dr_grpo(length_norm=40.0), False))
    check(program, calls)


LONG = [
    O.nfpo(4, kl=O.KL("k3", 0.1)),
    O.nfpo(65),  # the longest window that is summed token by token
    O.nfpo(66),
    O.nfpo(4, differentiate=True),
    O.nfpo(100, differentiate=True),
    O.Objective(O.Trace(20, 9), O.PPOClip(cap=3.0)),
    O.Objective(O.Trace(40, 50), O.SAPO()),
    O.Objective(O.Trace(70, 3), O.NoTrustRegion()),
    O.vespo(),
    O.ctpo(),
    O.cppo(),
    O.gspo(),
    O.gmpo(),
    O.Objective(O.Trace(20, 9, differentiate=True), O.PPOClip()),
    O.Objective(O.Trace(30, 0, differentiate=True), O.PPOClip()),
]


@on_the_cpu
@pytest.mark.parametrize("sizes", [Sizes(32, 64, 2), Sizes(64, 48, 1000)], ids=str)
def test_sequences_of_several_tiles(program, sizes):
    """Windows, means and prefixes go on across the borders of tiles and of blocks."""
    batch = random_batch(3, 150, spread=0.05)
    packed = pack(batch, [150, 0, 101])
    check(program, [call((batch, packed)[i % 2], o, i % 3 == 0, sizes) for i, o in enumerate(LONG)])


@on_the_cpu
def test_sizes_of_the_launcher(program):
    """256 threads and tiles of 1,024 tokens."""
    check(program, [call(random_batch(2, 1100, spread=0.05), O.nfpo(65), False, Sizes(256, 1024, 1024))])


@on_the_cpu
@pytest.mark.parametrize("count", [1, 32, 33, 1100])
def test_every_tile_finds_its_sequence(program, count):
    """The search among offsets goes by 32; some sequences are empty, some have several tiles."""
    lengths = torch.randint(0, 4, (count,))
    lengths[count // 2] = 9
    cu_seqlens = torch.cat((torch.zeros(1), lengths.cumsum(0))).long()
    lp = -torch.rand(int(cu_seqlens[-1])) - 0.1
    batch = {"logprobs": lp, "old_logprobs": lp + 0.2 * torch.randn(lp.shape), "advantages": torch.randn(count)}
    check(program, [call(batch | {"cu_seqlens": cu_seqlens}, O.nfpo(3), True, Sizes(32, 4, 1))])


@on_the_cpu
def test_absent_arguments(program):
    names = ("mask", "entropy", "is_weights", "old_logprobs", "ref_logprobs")
    check(program, [call(random_batch() | {name: None}, O.nfpo(3), False) for name in names])


@on_the_cpu
@pytest.mark.parametrize("kept", [True, False])
def test_extreme_log_ratios(program, kept):
    """One extreme per sequence, kept or masked, beside ordinary tokens."""
    deltas = torch.tensor([0.0, 19.9, -19.9, 20.1, -20.1, 89.0, -89.0, 1e4, -1e4, INF, -INF, NAN])
    calls = []
    for i, objective in enumerate(COMBINATIONS[kept::4]):
        batch = random_batch(len(deltas), 6, seed=i, holes=False)
        batch["mask"][:, 1] = False
        batch["mask"][:, 3] = kept
        batch["old_logprobs"][:, 3] = batch["logprobs"][:, 3] - deltas
        calls.append(call(batch, O.Objective(objective.ratio, objective.trust_region), True, Sizes(32, 64, 1)))
    for results, (name, _, expected) in zip(run(program, calls), calls, strict=True):
        for result, value in zip(results[:2], expected[:2], strict=True):
            assert torch.equal(result.isnan(), value.isnan()), name
        for result, value in zip(results, expected, strict=True):
            finite, size = value.isfinite(), value.abs()
            # what reaches a token through traces of 1e8 cancels
            largest = size.where(finite, 0).amax(-1, keepdim=True) if value.dim() == 2 else 0
            assert ((result - value).abs() <= 2e-5 * size + 1e-6 * (1 + largest))[finite].all(), name


@on_the_cpu
def test_probabilities_of_zero_and_one(program):
    """Before and now, where the divergence has infinities and 0 times them."""
    logprobs = torch.tensor([0.0, 1e-30, 0.04, 0.06, 0.5, 0.999, 1.0], dtype=torch.float64).log()
    now, old, advantages = torch.cartesian_prod(logprobs, logprobs, torch.tensor([1.0, -1.0, 0.0]).double()).T
    batch = {"logprobs": now, "old_logprobs": old, "advantages": advantages, "mask": torch.ones_like(now) > 0}
    regions = (O.BinaryTV(), O.BinaryKL(), O.CPPO())
    calls = [call(batch, O.Objective(O.TokenRatio(), region), True) for region in regions]
    for results, (_, _, expected) in zip(run(program, calls), calls, strict=True):
        for i in (0, 2):  # loss and gradient
            torch.testing.assert_close(results[i].double(), expected[i], rtol=1e-5, atol=1e-6, equal_nan=True)


@on_the_cpu
def test_masked_garbage_reaches_nothing(program):
    calls = []
    for i, objective in enumerate(COMBINATIONS[::5]):
        batch = cast(random_batch(3, 9, seed=i), torch.float32)
        garbage = torch.tensor([NAN, INF, -INF, 1e38])[torch.randint(4, (3, 9))]
        dirty = {name: x if name == "mask" else x.where(batch["mask"], garbage) for name, x in batch.items()}
        calls += [call(x, objective, i % 2 == 1) for x in (batch, dirty)]
    results = run(program, calls)
    for clean, dirty, name in zip(results[::2], results[1::2], calls[::2], strict=True):
        for one, other in zip(clean[:2], dirty[:2], strict=True):
            assert torch.equal(one, other), name.name
        assert all(x.isfinite().all() for x in clean + dirty), name.name


@on_the_cpu
def test_masked_garbage_from_upstream_reaches_no_trace(program):
    batch = random_batch(3, 9)
    clean = call(batch, O.nfpo(3, differentiate=True), True)
    upstream = clean.arguments[-1].where(batch["mask"], NAN)
    check(program, [clean._replace(arguments=(*clean.arguments[:-1], upstream))])


@on_the_cpu
@pytest.mark.parametrize(
    ("shape", "cu_seqlens"),
    [((2, 3), None), ((0, 3), None), ((2, 0), None), ((0,), None), ((0,), [0]), ((1, 0), [0, 0]), ((4,), [0, 0, 3, 4])],
)
def test_nothing_to_learn_from(program, shape, cu_seqlens):
    lp = torch.full(shape, NAN)
    batch = {"logprobs": lp, "old_logprobs": lp, "advantages": lp, "mask": torch.zeros(shape, dtype=torch.bool)}
    if cu_seqlens is not None:
        batch["cu_seqlens"] = torch.tensor(cu_seqlens)
    objectives = (O.grpo(), O.nfpo(3, differentiate=True), O.gspo(), O.ctpo(), O.cppo(), O.gmpo())
    for results in run(program, [call(batch, o, per_token) for o in objectives for per_token in (False, True)]):
        assert all((x == 0).all() for x in results)


@on_the_cpu
def test_bits_do_not_depend_on_layout_or_run(program):
    """Per token, a packed batch has the bits of the padded one; all else has the same bits in every run."""
    lengths = [37, 0, 1, 16]
    inside = torch.arange(40) < torch.tensor(lengths)[:, None]
    padded = random_batch(4, 40, holes=False)
    padded["mask"] &= inside
    padded["mask"][:, 2] = False
    packed = pack(padded, lengths)
    for objective in (O.nfpo(4), *LONG[2:]):
        objective = O.Objective(objective.ratio, objective.trust_region, aggregation="seq-mean-token-mean")
        torch.manual_seed(0)
        calls = [call(batch, objective, False, Sizes(64, 8, 3)) for batch in (padded, packed, padded)]
        one, other, again = run(program, calls)
        assert torch.equal(one[2][inside], other[2])
        assert all(map(torch.equal, one, again))


# -------------------------------------------------------------------------------------------------------- as compiled


@functools.cache
def a_few() -> list[Call]:
    torch.manual_seed(0)
    batch = random_batch(2, 90, spread=0.05)
    packed = pack(batch, [90, 41])
    calls = [call((batch, packed)[i % 2], o, i % 3 == 0, Sizes(64, 32, 3)) for i, o in enumerate(LONG)]
    several = random_batch(5, 90, spread=0.05) | {"mask": None}  # sequences of a block, with nothing to be counted
    calls += [call(several, o, False, Sizes(64, 32, 2)) for o in (O.nfpo(66), O.ctpo(), O.cppo(), O.gspo(), O.gmpo())]
    return [*calls, call(pack(random_batch(70, 1), [1] * 70), O.ppo(), False, Sizes(64, 32, 3))]


def check_a_few(program: Path) -> None:
    check(program, a_few())


@pytest.mark.slow
@cuda_on_cpu.needs_nvcc
def test_other_architectures(program, tmp_path):
    for other in cuda_on_cpu.for_others(program, (80, 100, 120), tmp_path):
        check_a_few(other)


@cuda_on_cpu.needs_nvcc
@pytest.mark.usefixtures("what_devices_may_do")
def test_what_devices_may_do(program):
    check_a_few(program)


# -------------------------------------------------------------------------------------------------------- sanitizers


@on_the_cpu
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_kernels_under_sanitizers(tmp_path, sanitizer):
    check_a_few(cuda_on_cpu.build_with_sanitizer("policy_loss", tmp_path / "policy_loss", sanitizer))


@on_the_cpu
def test_a_race_is_found(tmp_path):
    """What a clean run under the thread sanitizer is worth."""
    program = cuda_on_cpu.build_with_sanitizer("race", tmp_path / "race", "thread")
    assert subprocess.run([program], capture_output=True).returncode == 0
    racing = subprocess.run([program, "without barrier"], capture_output=True, text=True)
    assert racing.returncode != 0
    assert "data race" in racing.stderr


# ------------------------------------------------------------------------------------------------------------- compiled


@cuda_on_cpu.needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_no_register_is_spilled(architecture, record_property):
    """Three blocks of tile_kernel fit on a multiprocessor."""
    kernels = cuda_on_cpu.kernels_of("policy_loss", architecture)
    assert [(kernel.stack, kernel.spilled) for kernel in kernels] == [(0, 0)] * 4
    used = {found[1]: k.registers for k in kernels if (found := re.search("(tile|sequence|gradient)_kernel", k.name))}
    assert len(used) == 3
    for name, registers in used.items():
        record_property(f"registers of {name}_kernel", registers)
        assert registers <= {"tile": 80}.get(name, 128)


# ------------------------------------------------------------------------------------------------------------ on a GPU


def on_a_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not backends.HAS_CUDA_KERNELS, reason="built without CUDA kernels")(test))


def to_device(batch: dict) -> dict:
    return {name: x if x is None else x.to(DEVICE) for name, x in cast(batch, torch.float32).items()}


def run_on_device(batch: dict, objective: O.Objective, upstream: Tensor | None) -> list[Tensor]:
    batch = to_device(batch)
    leaves = {name: batch[name].requires_grad_() for name in ("logprobs", "entropy")}
    with fusedpo.backend("native"):
        out = fusedpo.policy_loss(
            **batch | leaves, objective=objective, reduction="mean" if upstream is None else "none"
        )
    out.loss.backward(upstream if upstream is None else upstream.to(DEVICE))
    gradients = [leaves["logprobs"].grad, leaves["entropy"].grad if objective.entropy_coef != 0 else torch.empty(0)]
    return [x.detach().cpu() for x in (out.loss, torch.stack(list(out.metrics.values())), *gradients)]


@on_a_gpu
@pytest.mark.parametrize("objective", COMBINATIONS, ids=contract.name_of)
def test_every_combination_on_a_gpu(objective):
    batch = random_batch(4, 1100, spread=0.05)
    for x in (batch, pack(batch, [1100, 0, 1, 1025])):
        for per_token in (False, True):
            expected = call(x, objective, per_token)
            compare(expected, run_on_device(x, objective, expected.arguments[-1]))


@on_a_gpu
@pytest.mark.parametrize(
    ("objective", "launches"),
    [
        *(
            (o, 2)
            for o in (O.ppo(), O.nfpo(4), O.nfpo(100), O.opo(), O.gspo(), O.gmpo(), O.cppo(), O.ctpo(), O.vespo())
        ),
        (O.nfpo(4, differentiate=True), 3),
    ],
)
def test_launches_without_sync(objective, launches, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    tensors = operator_arguments(to_device(random_batch(8, 500)), {"objective": objective})
    arguments = (*tensors, *ops_policy_loss.encode(objective), False)
    torch.ops.fusedpo.policy_loss.native(*arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            torch.ops.fusedpo.policy_loss.native(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(on_device) == launches, on_device


@on_a_gpu
@pytest.mark.parametrize("objective", LONG, ids=contract.name_of)
def test_bits_and_graphs(objective):
    """The same bits in every run, and when a captured graph is replayed."""
    tensors = operator_arguments(to_device(random_batch(64, 3000, spread=0.02)), {"objective": objective})
    arguments = (*tensors, *ops_policy_loss.encode(objective), False)
    first = torch.ops.fusedpo.policy_loss.native(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.fusedpo.policy_loss.native(*arguments)
    for _ in range(3):
        graph.replay()
        for results in (captured, torch.ops.fusedpo.policy_loss.native(*arguments)):
            assert all(map(torch.equal, results, first))


@on_a_gpu
@pytest.mark.slow
def test_more_tokens_than_an_int_counts():
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB")
    lp = torch.full((2**31 + 3000,), -1.0, device=DEVICE)
    lp[-2000:] = -torch.rand(2000, device=DEVICE)
    cu_seqlens = torch.tensor([0, lp.numel() - 2000, lp.numel()], device=DEVICE)
    objective = O.Objective(O.OnPolicy(), O.NoTrustRegion(), aggregation="token-sum")
    with fusedpo.backend("native"):
        loss = fusedpo.policy_loss(
            lp.requires_grad_(), None, -lp.detach(), objective=objective, cu_seqlens=cu_seqlens
        ).loss
    loss.backward()
    assert torch.equal(lp.grad, lp.detach())
