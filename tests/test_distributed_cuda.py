"""The CUDA kernels of rows whose columns are split: run on the CPU against the reference, and compiled by nvcc."""

import cuda_on_cpu
import pytest
import torch
from cuda_on_cpu import NVCC
from torch.testing import assert_close

from fusedpo import reference
from fusedpo.reference import row_stats as in_python

R, V = 5, 300
WIDTHS = [40, 0, 229, 31]
on_the_cpu = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return cuda_on_cpu.build_as_compiled("row_stats", tmp_path_factory.mktemp("row_stats") / "row_stats")


def batch(k, dtype):
    g = torch.Generator().manual_seed(k)
    logits = 3 * torch.randn(R, V, generator=g)
    logits[0] = -torch.inf
    logits[1, 40:] = -torch.inf
    logits[2, [3, 100]] = 60
    ids = torch.randint(0, V, (R, k), generator=g)
    ids[3] = ids[3, 0]
    mask = torch.tensor([1, 1, 1, 1, 0], dtype=torch.bool)
    temperature = torch.linspace(0.5, 2, R)
    return logits.to(dtype), ids, mask, temperature, torch.randn(R, k, generator=g), torch.randn(R, generator=g)


def check(program, dtype, k):
    logits, ids, mask, temperature, g, g_entropy = batch(k, dtype)
    starts = [sum(WIDTHS[:r]) for r in range(len(WIDTHS))]

    def shard(start, width):
        return (logits, start, V, R, width, ids, k, start, temperature, mask)

    calls = [(0, *shard(s, w), w, 0, 1) for s, w in zip(starts, WIDTHS, strict=True)]
    shapes = [(torch.Size((1 + R, 3 + k)), torch.float32)] * len(WIDTHS)
    parts = torch.stack(cuda_on_cpu.run(program, calls, shapes))
    expected = torch.stack(
        [
            in_python.row_stats(logits[:, s : s + w].float(), ids, temperature, mask, s, w, 0, True)
            for s, w in zip(starts, WIDTHS, strict=True)
        ]
    )
    assert_close(parts, expected, rtol=1e-5, atol=1e-5)

    call = (1, parts, len(WIDTHS), R, 3 + k, 1, temperature, mask)
    shapes = [(torch.Size(s), torch.float32) for s in ((R, k), (R,), (R, 3))]
    logprobs, entropy, stats = cuda_on_cpu.run(program, [call], shapes)
    x = logits.double().requires_grad_()
    truth = reference.token_logprobs(x, ids, temperature=temperature.double(), mask=mask, return_entropy=True)
    torch.autograd.backward(truth, (g.double(), g_entropy.double()))
    for found, want in zip((logprobs, entropy), truth, strict=True):
        assert_close(found.double(), want.detach(), rtol=1e-5, atol=1e-5, equal_nan=True)

    calls = [(2, g, g_entropy, *shard(s, w), stats) for s, w in zip(starts, WIDTHS, strict=True)]
    gradients = cuda_on_cpu.run(program, calls, [(logits.shape, dtype)] * len(WIDTHS))
    rounding = {"rtol": max(1e-5, torch.finfo(dtype).eps), "atol": 1e-5 if dtype == torch.float32 else 1e-4}
    for start, width, gradient in zip(starts, WIDTHS, gradients, strict=True):
        own = slice(start, start + width)
        assert_close(gradient[:, own].double(), x.grad[:, own], equal_nan=True, **rounding)
        assert torch.equal(gradient[:, :start], logits[:, :start])  # columns of other ranks are not written to
        assert torch.equal(gradient[:, start + width :], logits[:, start + width :])


CASES = [(torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 2)]


@on_the_cpu
@pytest.mark.parametrize(("dtype", "k"), CASES)
def test_against_the_reference(program, dtype, k):
    check(program, dtype, k)


def check_a_few(program):
    for dtype, k in CASES:
        check(program, dtype, k)


@on_the_cpu
def test_contradicting_headers_give_nan(program):
    logits, ids, *_ = batch(1, torch.float32)
    x = logits[1:4].contiguous()
    parts = [
        in_python.row_stats(x[:, s : s + w], ids[1:4], torch.ones(()), None, start, w, 0, True)
        for s, w, start in ((0, 150, 0), (150, 150, 149))
    ]
    call = (1, torch.stack(parts), 2, 3, 4, 1, torch.ones(()), None)
    results = cuda_on_cpu.run(program, [call], [(torch.Size(s), torch.float32) for s in ((3, 1), (3,), (3, 3))])
    assert all(r.isnan().all() for r in results)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_compiles(architecture):
    text = cuda_on_cpu.compile_to_ptx("row_stats", architecture)
    assert text.count(".visible .entry") == 7
