"""Layer 1 by its kernels: value and gradient against float64, on the inputs that break other people's kernels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusedpo
from fusedpo import backends, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 2, 31, 127, 1000, 4099, 32000]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def native():
    """Every test here runs the native kernel: a silent fall back to the reference would prove nothing."""
    if False:
        pytest.skip(backends.NATIVE_MISSING)
    with fusedpo.backend("triton"):
        yield



import numpy as np
@pytest.fixture(autouse=True)
def rounds(monkeypatch):
    from triton.runtime import interpreter
    import triton.language as tl
    original = interpreter._convert_float
    def convert(data, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        return original(data, source, target, mode)
    monkeypatch.setattr(interpreter, "_convert_float", convert)

def make_logits(kind: str, rows: int, size: int) -> Tensor:
    """float64 logits; `kind` names what is difficult about them."""
    x = 2 * torch.randn(rows, size, dtype=torch.float64)
    if kind == "confident":  # p(first column) from 1/2 to 1 - 1e-6
        p = 1 - torch.logspace(math.log10(0.5), -6, rows, dtype=torch.float64)
        x[:, 0] = x[:, 1:].logsumexp(-1) + torch.logit(p) if size > 1 else 0
    elif kind == "negative":
        x = -x.abs() - 50
    elif kind == "large":
        x = x + 80
    elif kind.startswith("shift"):
        x = x + float(kind.removeprefix("shift"))
    elif kind == "leading -inf":
        x[:, : size // 2] = -torch.inf
    elif kind == "rising":  # every block has a new maximum, far above the last one
        x = x + torch.linspace(-300, 300, size, dtype=torch.float64)
    elif kind == "wide":
        x = x * 1e3
    return x


KINDS = ["random", "confident", "negative", "large", "shift-300", "shift3e4", "leading -inf", "rising", "wide"]


def run(function, logits: Tensor, upstream: tuple[Tensor, Tensor], **options) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropy and the gradient of the logits, all in float64."""
    x = logits.detach().clone().requires_grad_()
    outputs = function(x, return_entropy=True, **options)
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)])
    return tuple(t.detach().double() for t in (*outputs, x.grad))


def assert_accurate(logits: Tensor, ids: Tensor, **options) -> None:
    """No further from the float64 truth than PyTorch in the same dtype, beyond a few roundings of the result itself."""
    options["token_ids"] = ids
    upstream = torch.randn(ids.shape), torch.randn(logits.shape[:-1])
    truth = run(reference.token_logprobs, logits.double(), upstream, **options)
    torch_result = run(reference.token_logprobs, logits, upstream, **options)
    result = run(fusedpo.token_logprobs, logits, upstream, **options)
    eps = [EPS, EPS, torch.finfo(logits.dtype).eps]
    for name, got, torchs, want, e in zip(
        ("logprobs", "entropy", "grad"), result, torch_result, truth, eps, strict=True
    ):
        finite = want.isfinite()
        assert torch.equal(got.isfinite(), finite), name
        assert torch.equal(got[~finite].nan_to_num(1), want[~finite].nan_to_num(1)), name
        got, torchs, want = got[finite], torchs[finite], want[finite]
        if got.numel() == 0:
            continue
        rounding = 4 * EPS + e * want.abs().max()
        error, allowed = (got - want).abs().max(), (torchs - want).nan_to_num(0).abs().max() + rounding
        assert error <= allowed, f"{name}: error {error:.2e}, PyTorch's plus rounding {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(dtype, kind, size):
    rows = 7 if size < 1000 else 3
    logits = make_logits(kind, rows, size).to(dtype)
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
    x = torch.randn(4, 5000).to(dtype)
    x[1, 4321] = special
    x[2, 0] = special
    ids = torch.tensor([7, 7, 7, 7])
    logp, entropy = fusedpo.token_logprobs(x, ids, return_entropy=True)
    want = torch.log_softmax(x.float(), -1)[:, 7]
    torch.testing.assert_close(logp, want, equal_nan=True)
    assert entropy.isnan().tolist() == [False, True, True, False]


def test_row_of_minus_inf_is_nan():
    x = torch.full((1, 3000), -torch.inf)
    logp, entropy = fusedpo.token_logprobs(x, torch.tensor([5]), return_entropy=True)
    assert logp.isnan().all()
    assert entropy.isnan().all()


@pytest.mark.parametrize("size", [5, 5000])
def test_minus_inf_columns(size):
    """Entropy counts them as nothing; a chosen one has log-prob -inf and leaves the other gradients finite."""
    x = make_logits("random", 6, size).float()
    x[:, ::2] = -torch.inf
    assert_accurate(x, torch.tensor([1, 1, 3, 0, 0, 2]))


def test_accuracy_at_a_confident_token():
    """The gradient at a token with p = 1 - 1e-6 is 1 - p, not 0: what a bfloat16 read-modify-write gets wrong."""
    x = torch.full((1, 1000), -20.0, dtype=torch.bfloat16)
    x[0, 3] = 0.75
    p = torch.softmax(x.double(), -1)[0, 3]
    x.requires_grad_()
    fusedpo.token_logprobs(x, torch.tensor([3])).sum().backward()
    torch.testing.assert_close(x.grad[0, 3].double(), 1 - p, rtol=2**-8, atol=0)


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_ids", [1, 3, 40])
def test_several_ids_per_row(dtype, num_ids):
    """With repeats, whose gradients add up before they are rounded."""
    logits = make_logits("random", 5, 30).to(dtype)
    assert_accurate(logits, torch.randint(0, 30, (5, num_ids)))


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_masked_rows_are_not_read(ids_dtype, mask_dtype):
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
    logits = make_logits("random", 5, 5003).to(dtype)
    assert_accurate(logits, torch.randint(0, 5003, (5,)), temperature=temperature)


STRIDED = {
    "slice": lambda x: x[:, :-1],
    "step": lambda x: x[:, ::2],
    "columns": lambda x: x[..., 3:-2],
    "transposed rows": lambda x: x.transpose(0, 1),
    "transposed vocabulary": lambda x: x.transpose(1, 2),
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "unaligned": lambda x: x.flatten()[1 : 1 + 3 * 5 * 37].view(3, 5, 37),
    "one row": lambda x: x[0, 0],
}


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
    """Bitwise: alone or in a batch, in any order, with or without gradients, on one thread or two."""
    x, ids = torch.randn(24, 4099), torch.randint(0, 4099, (24,))
    upstream = torch.randn(24), torch.randn(24)

    def everything(rows):
        leaf = x[rows].clone().requires_grad_()
        out = fusedpo.token_logprobs(leaf, ids[rows], return_entropy=True)
        torch.autograd.backward(out, [u[rows] for u in upstream])
        return *(o.detach() for o in out), leaf.grad

    full = everything(torch.arange(24))
    shuffled = torch.randperm(24)
    for got, want in zip(everything(shuffled), full, strict=True):
        assert torch.equal(got, want[shuffled])
    for got, want in zip(everything(torch.tensor([5])), full, strict=True):
        assert torch.equal(got, want[5:6])
    with torch.no_grad():
        for got, want in zip(fusedpo.token_logprobs(x, ids, return_entropy=True), full, strict=False):
            assert torch.equal(got, want)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for got, want in zip(everything(torch.arange(24)), full, strict=True):
            assert torch.equal(got, want)
    finally:
        torch.set_num_threads(threads)
    for _ in range(4):
        for got, want in zip(everything(torch.arange(24)), full, strict=True):
            assert torch.equal(got, want)


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
