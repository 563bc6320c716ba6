"""Layer 1 by its kernels: value and gradient against float64, on the inputs that break other people's kernels."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.logprobs import (
    DTYPES,
    EPS,
    KINDS,
    SIZES,
    STRIDED,
    assert_accurate,
    check_strided_arguments,
    everything,
    make_logits,
)

import fusedpo
from fusedpo import reference

"""Of float32, in a result: 2 for the exponential, 1 for each product, some for a sum, and those of the exponents of the
probabilities that a sum is made of, which count as often as the exponents are large."""
"""Relative: where a gradient is rounded to 16 bits, its exponential has seven bits more than float16 keeps."""


pytestmark = pytest.mark.usefixtures("native")


# A kind of logits meets a few vectors, a block and its rest, and many blocks; the size of sums, any kind would show.
FEW = (127, 4099, 50257)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *itertools.product(KINDS, FEW),
        *itertools.product(("random", "confident"), (size for size in SIZES if size not in FEW)),
    ],
)
def test_values_and_gradients(dtype, kind, size):
    rows = 7 if size < 1000 else 3
    logits = make_logits(kind, rows, size, dtype)
    ids = torch.randint(0, size, (rows,))
    if kind == "confident":
        ids[:] = 0
    assert_accurate(logits, ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes_of_the_dtype(dtype):
    big = torch.finfo(dtype).max
    x = torch.tensor([[big, -big, 0.0, big], [-big, -big, -big, -big / 2], [1.0, big / 2, big / 2, -1.0]], dtype=dtype)
    assert_accurate(x, torch.tensor([0, 3, 2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_logits(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    x = (torch.arange(70, dtype=torch.float64) - 35).mul(tiny / 16).to(dtype).expand(2, 70)
    assert_accurate(x.contiguous(), torch.tensor([3, 50]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [torch.inf, torch.nan])
def test_nan_and_inf_propagate(dtype, special):
    """Through their rows, forward and backward, and no further."""
    x = torch.randn(4, 5000).to(dtype)
    x[1, 4321] = special
    x[2, 0] = special
    x.requires_grad_()
    logp, entropy = fusedpo.token_logprobs(x, torch.full((4,), 7), return_entropy=True)
    torch.testing.assert_close(logp, torch.log_softmax(x.float(), -1)[:, 7], equal_nan=True)
    assert entropy.isnan().tolist() == [False, True, True, False]
    for output in (logp, entropy):
        (grad,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
        assert grad.isnan().all(-1).tolist() == grad.isnan().any(-1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output", [0, 1], ids=["logprobs", "entropy"])
def test_minus_inf_in_a_row_that_is_nan(dtype, output):
    """A column of probability 0 has the gradient NaN too, where its row is -inf throughout or holds a NaN."""
    x = torch.full((2, 3000), -torch.inf, dtype=dtype)
    x[1, 2500] = torch.nan
    x.requires_grad_()
    outputs = fusedpo.token_logprobs(x, torch.tensor([5, 5]), return_entropy=True)
    assert outputs[output].isnan().all()
    outputs[output].sum().backward()
    assert x.grad.isnan().all()


@pytest.mark.parametrize("size", [5, 5000])
def test_minus_inf_columns(size):
    """Entropy counts them as nothing; a chosen one has log-prob -inf and leaves the other gradients finite."""
    x = make_logits("random", 6, size)
    x[:, ::2] = -torch.inf
    assert_accurate(x, torch.tensor([1, 1, 3, 0, 0, 2]))


@pytest.mark.parametrize("position", [3, 8500])
def test_accuracy_at_a_confident_token(position):
    """Everything about a token with p = 1 - 1e-5 to its last digits, which a sum that holds the 1 does not have."""
    x = torch.full((1, 9000), -20.0, dtype=torch.bfloat16)
    x[0, position] = 0.75
    p = torch.softmax(x.double(), -1)[0, position]
    x.requires_grad_()
    logp, entropy = fusedpo.token_logprobs(x, torch.tensor([position]), return_entropy=True)
    logp.sum().backward()
    torch.testing.assert_close(x.grad[0, position].double(), 1 - p, rtol=2**-8, atol=0)
    rounded = 20.75 * EPS  # the exponent of all others
    torch.testing.assert_close(logp[0].double(), p.log(), rtol=rounded, atol=0)
    everything = torch.distributions.Categorical(logits=x[0].detach().double()).entropy()
    torch.testing.assert_close(entropy[0].double(), everything, rtol=rounded, atol=0)


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_ids", [1, 3, 40])
def test_several_ids_per_row(dtype, num_ids):
    """With repeats, whose gradients add up before they are rounded."""
    logits = make_logits("random", 5, 30, dtype)
    assert_accurate(logits, torch.randint(0, 30, (5, num_ids)))


LOCKED_ROWS = """
import ctypes, mmap
import torch, fusedpo
rows, size = 6, mmap.PAGESIZE // 4  # a row is a page
memory = mmap.mmap(-1, rows * mmap.PAGESIZE)
x = torch.frombuffer(memory, dtype=torch.float32).view(rows, size).normal_().requires_grad_()
mask = torch.tensor([True, False, True, False, False, True])
lock = ctypes.CDLL(None, use_errno=True).mprotect
for row in (~mask).nonzero().flatten().tolist():
    assert lock(ctypes.c_void_p(x.data_ptr() + row * mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
with fusedpo.backend("native"):
    outputs = fusedpo.token_logprobs(x, torch.zeros(rows, dtype=torch.int64), mask=mask, return_entropy=True)
    torch.autograd.backward(outputs, [torch.ones(rows), torch.ones(rows)])
assert x.grad[mask].all() and not x.grad[~mask].any()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect by its Linux constants")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upstream", [0.7, -1.3, 2.0**-70, -(2.0**60), 2.0**70])
def test_long_rows_in_memory_of_their_own_and_in_place(dtype, upstream):
    """Long rows go past the cache, from where their memory is aligned on; scaled by any size, also in the exponents."""
    size = 20_001  # every row starts at another place within a vector
    logits = (2 * torch.randn(3 * size + 1)).to(dtype)[1:].view(3, size)
    ids = torch.tensor([0, 777, size - 1])

    def gradient(x, *, inplace):
        x = x.detach().requires_grad_()
        lp = fusedpo.token_logprobs(x, ids, inplace_backward=inplace)
        lp.backward(torch.full_like(lp, upstream))
        return x.grad

    result = gradient(logits, inplace=False)
    assert torch.equal(result, gradient(logits.clone(), inplace=True))
    exact = upstream * (torch.nn.functional.one_hot(ids, size) - logits.double().softmax(-1))
    normal, limits = 2.0 * torch.finfo(dtype).smallest_normal, torch.finfo(dtype)
    allowed = (exact.abs() * (limits.eps / 2 + 2.0**-17)).clamp(min=normal)  # half a unit, and the exponential's share
    fits = exact.abs() < limits.max
    assert ((result.double() - exact).abs() <= allowed)[fits].all()
    assert result[~fits].isinf().all()


def test_masked_rows_are_not_touched():
    """Their pages may not be read or written: the process would die."""
    result = subprocess.run([sys.executable, "-c", LOCKED_ROWS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_what_masked_rows_hold_does_not_matter(ids_dtype, mask_dtype):
    x = torch.randn(4, 6, 100)
    ids = torch.randint(0, 100, (4, 6), dtype=ids_dtype)
    mask = torch.rand(4, 6) > 0.4
    x[~mask] = torch.nan
    ids[~mask] = -100
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    got = fusedpo.token_logprobs(a, ids, mask=mask.to(mask_dtype), return_entropy=True)
    want = reference.token_logprobs(b, ids, mask=mask, return_entropy=True)
    upstream = [torch.randn(4, 6), torch.randn(4, 6)]
    torch.autograd.backward(got, upstream)
    torch.autograd.backward(want, upstream)
    for g, w in zip((*got, a.grad), (*want, b.grad), strict=True):
        torch.testing.assert_close(g, w)
        assert (g[~mask] == 0).all()


def test_temperature_per_row_equals_one_at_a_time():
    x, ids = torch.randn(6, 300), torch.randint(0, 300, (6,))
    temperature = torch.tensor([0.1, 0.5, 1.0, 1.3, 2.0, 10.0])
    version, before = x._version, x.clone()
    got = fusedpo.token_logprobs(x, ids, temperature=temperature, return_entropy=True)
    for row, t in enumerate(temperature.tolist()):
        want = fusedpo.token_logprobs(x[row], ids[row], temperature=t, return_entropy=True)
        assert torch.equal(torch.stack(want), torch.stack([g[row] for g in got]))
    assert x._version == version
    assert torch.equal(x, before)


@pytest.mark.parametrize("temperature", [0.01, 0.6, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature(dtype, temperature):
    logits = make_logits("random", 5, 5003, dtype)
    assert_accurate(logits, torch.randint(0, 5003, (5,)), temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", STRIDED)
def test_strided_logits(dtype, view):
    base = torch.randn(4, 6, 42).to(dtype)
    rows = STRIDED[view](base).shape[:-1]
    size = STRIDED[view](base).shape[-1]
    ids = torch.randint(0, size, rows)
    upstream = torch.randn(rows)
    grads = []
    for function in (fusedpo.token_logprobs, reference.token_logprobs):
        x = base.clone().requires_grad_()
        logp = function(STRIDED[view](x), ids)
        logp.backward(upstream)
        grads.append((logp, x.grad))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-5, atol=1e-5)
    # the last bit of the dtype: both are rounded once, from values that differ in the last bits of float32
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_strided_arguments():
    """Ids, mask, temperature and what comes from above are read where they are, or copied: the same to the bit."""
    x, ids = torch.randn(3, 5, 40), torch.randint(0, 40, (5, 2, 3))
    check_strided_arguments(x, ids, torch.rand(5, 3) > 0.3, torch.rand(5, 3) + 0.5, torch.randn(5, 3, 2))


def test_more_rows_than_a_grid_dimension():
    assert_accurate(torch.randn(70_001, 5), torch.randint(0, 5, (70_001,)))


@settings(max_examples=60)
@given(st.data())
def test_shapes_strides_and_masks(data):
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
    size = data.draw(st.integers(1, 70))
    step = data.draw(st.integers(1, 2))
    per_row = data.draw(st.sampled_from([None, 1, 3]))
    x = torch.randn(*shape, size * step + 1)[..., 1::step].to(data.draw(st.sampled_from(DTYPES)))
    ids = torch.randint(0, size, (*shape, per_row) if per_row else tuple(shape))
    mask = data.draw(st.sampled_from([None, torch.rand(shape) > 0.5]))
    temperature = data.draw(st.sampled_from([0.7, torch.rand(shape) + 0.5]))
    assert_accurate(x, ids, mask=mask, temperature=temperature)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_no_rows(shape):
    x = torch.randn(*shape, 9, requires_grad=True)
    logp, entropy = fusedpo.token_logprobs(x, torch.zeros(shape, dtype=torch.int64), return_entropy=True)
    assert logp.shape == entropy.shape == shape
    (logp.sum() + entropy.sum()).backward()
    assert x.grad.shape == x.shape


# ----------------------------------------------------------------------------------------------------- bit for bit


def test_rows_do_not_depend_on_each_other():
    """Bitwise: alone or in a batch, in any order, with or without gradients."""
    x, ids = torch.randn(24, 4099), torch.randint(0, 4099, (24,))
    upstream = torch.randn(24), torch.randn(24)
    full = everything(x, ids, upstream, slice(None))
    for rows in (torch.randperm(24), torch.tensor([5])):
        for got, want in zip(everything(x, ids, upstream, rows), full, strict=True):
            assert torch.equal(got, want[rows])
    with torch.no_grad():
        for got, want in zip(fusedpo.token_logprobs(x, ids, return_entropy=True), full, strict=False):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_are_bitwise(dtype):
    """Whatever the number of threads."""
    x, ids = make_logits("random", 25, 4099, dtype), torch.randint(0, 4099, (25,))
    upstream = torch.randn(25), torch.randn(25)
    threads = torch.get_num_threads()
    full = everything(x, ids, upstream, slice(None))
    try:
        for number in (1, 2, 3, 7, 7):
            torch.set_num_threads(number)
            assert all(map(torch.equal, everything(x, ids, upstream, slice(None)), full)), number
    finally:
        torch.set_num_threads(threads)


def test_entropy_does_not_change_the_logprobs():
    x, ids = torch.randn(3, 5000), torch.randint(0, 5000, (3,))
    assert torch.equal(fusedpo.token_logprobs(x, ids), fusedpo.token_logprobs(x, ids, return_entropy=True)[0])


@pytest.mark.parametrize("shift", [-300.0, 64.0, 4096.0])
def test_shift_invariance(shift):
    """Shifted by what float32 holds exactly, the results are the same."""
    x = torch.randn(4, 500).mul(64).round().div(64)
    ids = torch.randint(0, 500, (4,))
    torch.testing.assert_close(
        fusedpo.token_logprobs(x + shift, ids), fusedpo.token_logprobs(x, ids), rtol=2 * EPS, atol=4 * EPS
    )


def test_bounds():
    x = torch.randn(50, 333) * 5
    logp, entropy = fusedpo.token_logprobs(x, torch.randint(0, 333, (50,)), return_entropy=True)
    assert (logp <= 0).all()
    assert ((entropy >= -4 * EPS) & (entropy <= math.log(333) + 4 * EPS)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entropy", [False, True])
def test_no_gradient_makes_products_subnormal(dtype, entropy):
    """What is below 2^-90 of the row's size is 0: in a matrix product it would cost a hundred times as much."""
    x = -torch.arange(0, 130, 0.5).repeat(4, 1)
    x[2, 7] = torch.nan
    x = x.to(dtype).requires_grad_()
    logprobs, entropies = fusedpo.token_logprobs(x, torch.tensor([0, 1, 2, 3]), return_entropy=True)
    (entropies.sum() if entropy else logprobs.sum()).backward()
    p = torch.softmax(x.detach().double(), -1)
    exact = p * (p.log() - (p * p.log()).nansum(-1, keepdim=True)) if entropy else p
    size = x.grad.double().abs()
    assert x.grad[2].isnan().all()
    rows = [0, 1, 3]
    assert (size[rows][exact[rows].abs() < 2**-91] == 0).all()
    assert (size[rows][exact[rows].abs() > 2**-89] > 0).all()
    assert 0.1 < (size[rows] == 0).double().mean() < 0.6
