"""Every Triton kernel at the sizes that it is launched with, as compiled for several architectures, by the machine of
tests/ptx: right values, and nothing that the machine finds; also with approximate instructions that are off and warps
that take turns at random. And each barrier is needed, or there is a reason why its absence is not seen."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import ptx
import pytest
import test_advantages_kernel as advantages
import test_distributed_row_stats as row_stats
import torch
from fusedpo.bench import sweep
from test_policy_loss import name_of, random_batch
from test_token_statistics import truth

import fusedpo
from fusedpo import _chosen
from fusedpo import objectives as O
from fusedpo.ops.policy_loss import AGGREGATION_NUMBERS
from fusedpo.reference import advantages as reference_advantages

triton = pytest.importorskip("triton")
import test_triton_one_pass as one_pass  # noqa: E402
import test_triton_policy_loss as policy_loss  # noqa: E402
from test_token_logprobs import assert_accurate  # noqa: E402

pytestmark = [pytest.mark.triton, pytest.mark.skipif("not ptx.runs_triton()", reason="Triton is not run as compiled")]


@pytest.fixture(autouse=True)
def _backend():
    with fusedpo.backend("triton"):
        yield


# ------------------------------------------------------------------------------------------------------------ workloads


def losses(objective: O.Objective, masked: bool = True, per_token: bool = False) -> None:
    """Tiles of 512 that are full, that are not, and that begin behind the end of their sequence."""
    batch = random_batch(3, 1000, spread=0.02, holes=masked)
    if not masked:
        del batch["mask"]
    upstream = torch.randn(3, 1000) if per_token else None
    results, expected = (policy_loss.run(batch, objective, upstream, x) for x in (torch.float32, torch.float64))
    policy_loss.assert_near(results, expected)


def logprobs(size: int, dtype: torch.dtype, rows: int = 2) -> None:
    assert_accurate(torch.randn(rows, size).to(dtype), torch.randint(size, (rows,)))


def logprobs_in_place(size: int, dtype: torch.dtype, rows: int = 2) -> None:
    logits, ids = torch.randn(rows, size).to(dtype).requires_grad_(), torch.randint(size, (rows,))
    gradients = []
    for inplace in (False, True):
        logp, entropy = fusedpo.token_logprobs(logits * 1, ids, return_entropy=True, inplace_backward=inplace)
        gradients += torch.autograd.grad(logp.exp().sum() + entropy.sum(), logits)
    assert torch.equal(*gradients)


def fused(size: int, dtype: torch.dtype, objective: O.Objective, shape: tuple[int, ...] = (1, 3), **options) -> None:
    one_pass.check(one_pass.make_batch(shape, size, dtype=dtype, spread=0.05), objective, **options)


def scaled(size: int, dtype: torch.dtype) -> None:
    gradient = torch.randn(3, size).to(dtype)
    expected = (gradient.float() * 0.3).to(dtype)
    torch.ops.fusedpo.scale_.triton(gradient, torch.tensor(0.3))
    assert torch.equal(gradient, expected)


def token_scales(aggregation: str, length_norm: float = 50.0) -> None:
    """Over several tiles per sequence."""
    mask = torch.rand(3, 1300) < 0.7
    number = AGGREGATION_NUMBERS[aggregation]
    results = (
        getattr(torch.ops.fusedpo.token_scale, kind)(
            mask.float(), mask, None, None, torch.tensor(1.5), number, length_norm
        )
        for kind in ("native", "triton")
    )
    torch.testing.assert_close(*results)


def divergences(size: int, dtype: torch.dtype, direction: Literal["reverse", "forward"]) -> None:
    """Of 2 rows that are kept and one that is not, with the gradient."""
    logits, ref = torch.randn(3, size).to(dtype), torch.randn(3, size).to(dtype)
    mask = torch.tensor([True, False, True])
    results = []
    for x, backend in ((logits, "triton"), (logits.double(), "reference")):
        x = x.detach().requires_grad_()
        with fusedpo.backend(backend):
            out = fusedpo.exact_kl(x[None], ref[None].to(x.dtype), mask=mask[None], direction=direction)
        out.loss.backward()
        results.append((out.kl.detach().double(), x.grad.double()))
    (kl, gradient), (expected_kl, expected) = results
    torch.testing.assert_close(kl, expected_kl, rtol=1e-5, atol=1e-6)
    info = torch.finfo(dtype)
    # differences of probabilities, in float32; then one rounding, of what is subnormal to a multiple of the smallest
    atol = 1e-6 * expected.abs().max().item() + info.smallest_normal * info.eps
    torch.testing.assert_close(gradient, expected, rtol=info.eps, atol=atol)


def statistics(size: int, dtype: torch.dtype) -> None:
    logits, ids = (4 * torch.randn(2, size)).to(dtype), torch.randint(size, (2,))
    results = fusedpo.token_statistics(logits, ids), truth(logits, ids, torch.ones(2))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result.double(), expected.double(), rtol=1e-5, atol=3e-6)


def shards(widths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Log-probs of two tokens and entropy, from columns that several ranks have; the gradient, also in place."""
    logits, ids = torch.randn(3, sum(widths)).to(dtype), torch.randint(sum(widths), (3, 2))
    upstream, one = (torch.randn(3, 2), torch.randn(3)), torch.ones(())
    row_stats.check("triton", logits, ids, widths, upstream)
    stats = torch.ops.fusedpo.token_logprobs.native(logits, ids, one, None, True)[2]
    for start, shard in zip((0, *itertools.accumulate(widths)), logits.split(widths, 1), strict=False):
        given = (*upstream, shard, ids, one, None, stats)
        expected = torch.ops.fusedpo.token_logprobs_backward.triton(*given, vocab_start=start)
        torch.ops.fusedpo.token_logprobs_backward_out.triton(*given, shard, vocab_start=start)
        assert torch.equal(shard, expected)


def active_columns(size: int, dtype: torch.dtype) -> None:
    """The columns whose gradient is not small, and that gradient in front of rows: over chosen columns."""
    logits, ids = (4 * torch.randn(3, size)).to(dtype), torch.randint(16, (3, 2))
    upstream, one, results = (torch.randn(3, 2), torch.randn(3)), torch.ones(()), []
    for kind in ("native", "triton"):
        x = logits.clone()
        given = (*upstream, x, ids, one, torch.ops.fusedpo.token_logprobs.native(x, ids, one, None, False)[2])
        active = getattr(torch.ops.fusedpo.active_columns, kind)(*given, 2.0**-10)
        columns, dropped = getattr(torch.ops.fusedpo.gradient_at_, kind)(*given, active, size // 2)
        results.append((columns, x[:, : int(active.sum())].float(), dropped))
    (columns, gradient, dropped), (expected_columns, expected, expected_dropped) = results
    assert torch.equal(columns, expected_columns)
    assert 2 < gradient.shape[1] < size / 2
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient, expected, rtol=max(rounding, 1e-5), atol=1e-6)
    torch.testing.assert_close(dropped, expected_dropped, rtol=1e-5, atol=1e-6)


def groups(name: str, **layout: int) -> None:
    count = next(iter(layout.values())) * 2 if "group_size" in layout else 300
    rewards = advantages.random(count).mul(3).round()
    if "group_size" not in layout:
        layout = {"group_ids": torch.arange(count) % 7}
    results = (
        advantages.estimate(source, name, rewards, **layout) for source in (advantages.TRITON, reference_advantages)
    )
    torch.testing.assert_close(*results, **advantages.CLOSE)


def tokens(name: str, length: int, layout: int) -> None:
    batch = advantages.token_batches(length)[layout]
    end = advantages.random(advantages.sequences(batch), seed=9)
    results = [advantages.TOKENS[name](source, batch, end) for source in (advantages.TRITON, reference_advantages)]
    for result, expected in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in results), strict=True):
        torch.testing.assert_close(result, expected, **advantages.CLOSE)


def steps() -> None:
    values, rewards = advantages.random(40, 9, seed=1), advantages.random(40, 8, seed=2)
    ids = torch.randint(-1, 8, (40, 700))
    results = (
        torch.ops.fusedpo.step_advantages.__getattr__(kind)(values, rewards, ids, True) for kind in ("native", "triton")
    )
    torch.testing.assert_close(*results, **advantages.CLOSE)


def whitened() -> None:
    x = advantages.random(9000)
    results = (
        getattr(torch.ops.fusedpo.whiten, kind)(x, torch.arange(9000) % 4, x > -1, True)
        for kind in ("native", "triton")
    )
    torch.testing.assert_close(*results, **advantages.CLOSE)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NFPO = O.nfpo(4, kl=O.KL("k3", 0.1), entropy_coef=0.1)
OBJECTIVES = [NFPO, O.nfpo(600), O.gspo(), O.gmpo(), O.ctpo(), O.cppo(length_norm=50.0), O.grpo(), O.dr_grpo()]
WORKLOADS: dict[str, Callable[[], None]] = {
    **{f"loss, {name_of(o)}": functools.partial(losses, o) for o in OBJECTIVES},
    **{f"loss, all kept, {name_of(o)}": functools.partial(losses, o, masked=False) for o in (O.ctpo(), O.cppo())},
    "losses per token": functools.partial(losses, O.nfpo(100, differentiate=True), per_token=True),
    "log-probs, bfloat16": functools.partial(logprobs, 151_936, BF16),
    "log-probs, float16, unaligned": functools.partial(logprobs, 50_257, FP16),
    "log-probs, float32": functools.partial(logprobs, 128_256, FP32),
    "log-probs, short rows": functools.partial(logprobs, 1000, BF16, 7),
    "log-probs, in place": functools.partial(logprobs_in_place, 50_257, BF16),
    "one pass, bfloat16": functools.partial(fused, 151_936, BF16, NFPO),
    "one pass, float16, unaligned": functools.partial(fused, 50_257, FP16, NFPO),
    "one pass, float32, in place": functools.partial(fused, 40_000, FP32, O.grpo(), inplace=True),
    "one pass, long windows": functools.partial(fused, 130, FP32, O.nfpo(150), (2, 200)),
    "one pass, many rows": functools.partial(fused, 100, BF16, O.grpo(), (5, 700)),
    "token scale, token-mean": functools.partial(token_scales, "token-mean"),
    "token scale, means of sequences": functools.partial(token_scales, "seq-mean-token-mean"),
    "divergence, bfloat16": functools.partial(divergences, 151_936, BF16, "reverse"),
    "divergence, float16, unaligned": functools.partial(divergences, 50_257, FP16, "forward"),
    "divergence, float32": functools.partial(divergences, 1000, FP32, "forward"),
    "scale": functools.partial(scaled, 50_257, BF16),
    "statistics, bfloat16": functools.partial(statistics, 151_936, BF16),
    "statistics, float16, unaligned": functools.partial(statistics, 50_257, FP16),
    "shards": functools.partial(shards, (9_000, 8_001, 0), BF16),
    "active columns": functools.partial(active_columns, 9_001, BF16),
    "groups of 8": functools.partial(groups, "grpo", group_size=8),
    "groups of 1,100": functools.partial(groups, "rloo", group_size=1100),
    "groups by label": functools.partial(groups, "opo"),
    "ranks, groups of 8": functools.partial(groups, "maxpo", group_size=8),
    "ranks, groups of 90": functools.partial(groups, "order_statistic", group_size=90),
    "ranks by label": functools.partial(groups, "maxpo, unbiased"),
    "tokens, short": functools.partial(tokens, "gae", 21, 0),
    "tokens, long": functools.partial(tokens, "vtrace", 2100, 0),
    "tokens, packed": functools.partial(tokens, "reward_to_go", 700, 1),
    "steps": steps,
    "whitening": whitened,
}
FEW = [
    "loss, " + name_of(NFPO),
    "losses per token",
    "log-probs, bfloat16",
    "one pass, bfloat16",
    "ranks, groups of 90",
    "tokens, short",
]


@pytest.mark.parametrize("name", WORKLOADS)
def test_production_sizes(name):
    """Right results; and no product is fused with the first addition of a reduction over lanes."""
    texts = Variants([WORKLOADS[name]]).texts
    assert {kernel: fused for kernel, text in texts.items() if (fused := fused_sums(text))} == {}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 100, 120])
@pytest.mark.parametrize("name", FEW)
def test_other_architectures(name, architecture):
    from ptx import triton_device

    with triton_device.target(architecture):
        WORKLOADS[name]()


def test_every_kernel_is_among_the_workloads():
    names = ("active_columns", "advantages", "exact_kl", "logprobs", "one_pass", "policy_loss", "row_stats")
    modules = [importlib.import_module(f"fusedpo.triton_kernels.{name}") for name in (*names, "token_statistics")]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    with ptx.recorded() as launches:
        for workload in WORKLOADS.values():
            workload()
    assert {name for name, _ in launches} == kernels


@pytest.mark.parametrize("noise", [1, 2])
@pytest.mark.parametrize("name", FEW)
def test_approximate_instructions_may_be_off(name, noise):
    """By as much as they are documented to be: tolerances have room for it."""
    with ptx.options(noise=noise):
        WORKLOADS[name]()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", FEW)
def test_warps_take_turns_at_random(name, seed):
    with ptx.options(seed=seed):
        WORKLOADS[name]()


@pytest.mark.parametrize("constant", ["FORWARD", "BACKWARD", "WALK"])
def test_shapes_that_a_sweep_may_choose(constant, monkeypatch):
    """All are right, for long rows and short ones, aligned or not."""
    for shape in sweep.CONSTANTS[constant][1]:
        monkeypatch.setattr(_chosen, constant, shape)
        for size, rows in ((20_008, 2), (20_001, 2), (1000, 7)):
            if constant == "WALK":
                fused(size, BF16, NFPO, (1, rows))
            else:
                logprobs(size, BF16, rows)


def test_a_gradient_has_the_same_bits_by_every_shape(monkeypatch):
    """Unlike sums: each of its elements is computed by itself."""
    logits, ids, one = torch.randn(3, 20_001).to(BF16), torch.randint(20_001, (3,)), torch.ones(())
    stats = torch.ops.fusedpo.token_logprobs.triton(logits, ids, one, None, True)[2]
    gradients = []
    for shape in (_chosen.BACKWARD, *sweep.CONSTANTS["BACKWARD"][1]):
        monkeypatch.setattr(_chosen, "BACKWARD", shape)
        for x in (logits, logits[:, :20_000].contiguous()):
            gradient = torch.empty_like(x)
            given = (torch.ones(3), torch.ones(3), x, ids % 20_000, one, None, stats)
            torch.ops.fusedpo.token_logprobs_backward_out.triton(*given, gradient)
            gradients.append(gradient[:, :20_000])
    assert all(torch.equal(x, gradients[0]) for x in gradients)


# ------------------------------------------------------------------------------------------------------------- barriers

UNSEEN = Path(__file__).parent / "ptx" / "unseen_barriers.json"
BARRIER = re.compile(r"^\s*(bar\.sync|bar\.warp\.sync|barrier\.sync)\b[^;]*;", re.M)
MUTATED: dict[str, list[Callable[[], None]]] = {
    "loss": [
        functools.partial(losses, o)
        for o in (
            O.cppo(length_norm=50.0),
            O.Objective(O.Trace(600, 700), O.PPOClip(), O.KL("k3", 0.1)),
            NFPO,
            O.gmpo(),
            O.dr_grpo(),
        )
    ]
    + [
        functools.partial(losses, O.Objective(O.Trace(600, 700, differentiate=True), O.PPOClip()), per_token=x)
        for x in (False, True)
    ],
    "log-probs": [functools.partial(f, 20_001, BF16) for f in (logprobs, logprobs_in_place)],
    "log-probs, short rows": [functools.partial(f, 1000, BF16, 7) for f in (logprobs, logprobs_in_place)],
    "one pass": [
        functools.partial(fused, 17_001, FP16, O.nfpo(70, entropy_coef=0.1), (1, 80), inplace=x) for x in (False, True)
    ],
    "live rows": [functools.partial(fused, 100, BF16, O.grpo(), (3, 700), inplace=x) for x in (False, True)],
    "token scales": [functools.partial(token_scales, *x) for x in (("token-mean",), ("seq-mean-token-sum-norm", 0.0))],
    "divergences": [functools.partial(divergences, 20_001, FP16, name) for name in ("reverse", "forward")],
    "statistics": [functools.partial(statistics, 20_001, FP16)],
    "shards": [functools.partial(shards, (9_000, 8_001), BF16)],
    "active columns": [WORKLOADS["active columns"]],
    "groups": [functools.partial(groups, name, group_size=1100) for name in ("rloo", "opo", "gpg", "grpo", "remax")],
    "ranks": [WORKLOADS["ranks, groups of 90"], functools.partial(groups, "passk", group_size=90)],
    "tokens": [functools.partial(tokens, name, 2100, 0) for name in ("vtrace", "gae", "reward_to_go")],
    "whitening": [whitened],
}


class Variants:
    """The texts of the kernels that workloads launch, by kernel and number, and which workloads launch them."""

    def __init__(self, workloads: list[Callable[[], None]]) -> None:
        from ptx import triton_device

        self.texts: dict[str, str] = {}
        self._launching: dict[str, list[Callable[[], None]]] = {}
        self._changed = triton_device.changed
        for workload in workloads:
            with self._changed(functools.partial(self._remember, workload)):
                workload()

    def _remember(self, workload: Callable[[], None], name: str, text: str) -> str:
        if text not in self.texts.values():
            count = sum(key.partition(" ")[0] == name for key in self.texts)
            self.texts[name if count == 0 else f"{name} {count + 1}"] = text
        launching = self._launching.setdefault(text, [])
        if workload not in launching:
            launching.append(workload)
        return text

    def fails(self, old: str, new: str) -> bool:
        """Whether something is found where one text takes the place of another."""
        with self._changed(lambda _, text: new if text == old else text):
            for workload in self._launching[old]:
                torch.manual_seed(0)
                try:
                    workload()
                except AssertionError:
                    return True
        return False


def unseen_barriers(workloads: list[Callable[[], None]]) -> dict[str, list[str]]:
    """For each kernel, the numbers of the barriers without which nothing is found. All are executed."""
    variants = Variants(workloads)
    unseen: dict[str, list[str]] = {}
    for kernel, text in variants.texts.items():
        for number, barrier in enumerate(BARRIER.finditer(text)):
            before, after = text[: barrier.start()], text[barrier.end() :]
            if variants.fails(text, before + after):
                continue
            line = re.findall(r"\.loc\s+\d+ (\d+)", before)[-1]
            executed = variants.fails(text, f"{before}\ttrap;{after}")
            assert executed, f"these calls never execute barrier {number} of {kernel}, line {line}"
            unseen.setdefault(kernel, []).append(str(number))
    return unseen


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATED)
def test_barriers_are_missed(name):
    """Each is removed in turn. The list gives a reason for every one that is not missed, and has no other."""
    expected = json.loads(UNSEEN.read_text())
    if triton.__version__ != expected["triton"]:
        pytest.skip(f"the list is of Triton {expected['triton']}")
    torch.manual_seed(0)
    found = unseen_barriers(MUTATED[name])
    assert found == {kernel: list(barriers) for kernel, barriers in expected[name].items()}


# -------------------------------------------------------------------------------------------------------- sums of lanes

SHUFFLE = re.compile(r"^\s*(?:@!?%\w+ )?shfl\.sync\.bfly\.b32\s+(%\w+)")
MOVE = re.compile(r"^\s*mov\.b(?:32|64)\s+(%\w+), (\{.*\}|%\w+);")
MULTIPLY_ADD = re.compile(r"^\s*fma\S*\s+%\w+, %\w+, %\w+, (%\w+);")


def fused_sums(text: str) -> list[str]:
    """Products that are added, unrounded, to what another lane has sent; that one adds them rounded."""
    sent: set[str] = set()
    found = []
    for line in text.splitlines():
        if shuffle := SHUFFLE.match(line):
            sent.add(shuffle[1])
        elif move := MOVE.match(line):
            if sent.issuperset(re.findall(r"%\w+", move[2])):
                sent.add(move[1])
        elif (fused := MULTIPLY_ADD.match(line)) and fused[1] in sent:
            found.append(line.strip())
    return found


def test_a_fused_sum_is_recognised():
    exchange = (
        "shfl.sync.bfly.b32 %r3, %r1, 8, 31, -1;\nshfl.sync.bfly.b32 %r4, %r2, 8, 31, -1;\nmov.b64 %rd5, {%r3, %r4};\n"
    )
    fused, added = "fma.rn.f64 %rd6, %rd1, %rd1, %rd5;", "fma.rn.f64 %rd6, %rd5, %rd1, %rd2;"
    assert fused_sums(f"{exchange}{fused}\n{added}") == [fused]


@pytest.mark.parametrize("group_size", [16, 32, 100])
def test_equal_rewards_get_equal_bits(group_size):
    """In float64, which shows whether the lanes of a group have one and the same deviation."""
    rewards = advantages.random(5)[torch.randint(5, (20 * group_size,))]
    for name in ("grpo", "gpg", "rloo"):
        result = advantages.estimate(advantages.TRITON, name, rewards, group_size=group_size)
        for group, values in zip(rewards.view(20, -1), result.view(20, -1), strict=True):
            assert all(values[group == reward].unique().numel() == 1 for reward in group.unique()), name
