"""The Triton kernels of layer 1: on a GPU where there is one, otherwise under the interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.logprobs import (
    DTYPES,
    KINDS,
    PARTS,
    SIZES,
    STRIDED,
    assert_accurate,
    check_strided_arguments,
    everything,
    make_logits,
)
from support.triton_device import DEVICE, _backend, pytestmark  # noqa: F401

import fusedpo
from fusedpo import _checks, backends, reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "size"),
    # 9001 is more than a block in every dtype, and half of 50257 too; 1024 has no incomplete block, 1000 nothing else
    [(kind, size) for kind in KINDS for size in (127, 1000, 9001, 50257)]
    + [(kind, size) for kind in ("random", "confident") for size in (1, 2, 31, 1024, 4099, 32000, 128256, 151936)],
)
def test_values_and_gradients(dtype, kind, size):
    logits = make_logits(kind, 3, size, dtype)
    ids = torch.zeros(3, dtype=torch.int64) if kind == "confident" else torch.randint(0, size, (3,))
    assert_accurate(logits, ids)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_of_all_sizes(dtype, kind):
    for size in [*SIZES, 152064, 262144]:
        test_values_and_gradients(dtype, kind, size)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [5, 1100])
def test_more_rows_than_a_grid_dimension(size):
    """Several rows to a program, and one."""
    assert_accurate(torch.randn(70_001, size), torch.randint(0, size, (70_001,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes_of_the_dtype(dtype):
    big = torch.finfo(dtype).max
    x = [[big, -big, 0.0, big], [-big, -big, -big, -big / 2], [1.0, big / 2, big / 2, -1.0]]
    assert_accurate(torch.tensor(x, dtype=dtype), torch.tensor([0, 3, 2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [torch.inf, torch.nan])
def test_nan_and_inf_propagate(dtype, special):
    x = torch.randn(4, 9001 if dtype == torch.float16 else 9000).to(dtype)  # by element, or in vectors
    x[1, 8999] = special
    x[2, 0] = special
    x.requires_grad_()
    ids = torch.full((4,), 7)
    logp, entropy = fusedpo.token_logprobs(x, ids, return_entropy=True)
    torch.testing.assert_close(logp, torch.log_softmax(x.float(), -1)[:, 7], equal_nan=True)
    assert entropy.isnan().tolist() == [False, True, True, False]
    # whether another upstream gradient is there has nothing to do with the dtype
    for outputs in ([logp, entropy], [logp], [entropy]) if dtype == torch.float32 else ([logp, entropy],):
        (grad,) = torch.autograd.grad([output.sum() for output in outputs], x, retain_graph=True)
        assert grad.isnan().all(-1).tolist() == grad.isnan().any(-1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("output", [0, 1], ids=["logprobs", "entropy"])
def test_minus_inf_in_a_row_that_is_nan(output):
    """A column of probability 0 has the gradient NaN too, where its row is -inf throughout or holds a NaN."""
    x = torch.full((2, 9000), -torch.inf)
    x[1, 8500] = torch.nan
    x.requires_grad_()
    outputs = fusedpo.token_logprobs(x, torch.tensor([5, 5]), return_entropy=True)
    assert outputs[output].isnan().all()
    outputs[output].sum().backward()
    assert x.grad.isnan().all()


@pytest.mark.parametrize("size", [5, 9000])
def test_minus_inf_columns(size):
    x = make_logits("random", 6, size)
    x[:, ::2] = -torch.inf
    assert_accurate(x, torch.tensor([1, 1, 3, 0, 0, 2]))


@pytest.mark.parametrize("position", [3, 8500])
def test_accuracy_at_a_confident_token(position):
    """The gradient at a token with p = 1 - 1e-5 is 1 - p to the last digit of its dtype."""
    x = torch.full((1, 9000), -20.0, dtype=torch.bfloat16)
    x[0, position] = 0.75
    p = torch.softmax(x.double(), -1)[0, position]
    x.requires_grad_()
    logp, entropy = fusedpo.token_logprobs(x, torch.tensor([position]), return_entropy=True)
    logp.sum().backward()
    torch.testing.assert_close(x.grad[0, position].double(), 1 - p, rtol=2**-8, atol=0)
    torch.testing.assert_close(logp[0].double(), p.log(), rtol=1e-6, atol=0)
    everything = torch.distributions.Categorical(logits=x[0].detach().double()).entropy()
    torch.testing.assert_close(entropy[0].double(), everything, rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("num_ids", "dtype"), [(1, torch.float16), (3, torch.float32), (3, torch.bfloat16), (40, torch.float16)], ids=str
)
def test_several_ids_per_row(num_ids, dtype):
    """With repeats, whose gradients add up before they are rounded."""
    assert_accurate(make_logits("random", 5, 30, dtype), torch.randint(0, 30, (5, num_ids)))


def test_no_ids():
    x = torch.randn(3, 20, requires_grad=True)
    logp, entropy = fusedpo.token_logprobs(x, torch.zeros(3, 0, dtype=torch.int64), return_entropy=True)
    assert logp.shape == (3, 0)
    entropy.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("size", [100, 9000])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_masked_rows_are_not_read(ids_dtype, size):
    x, ids = torch.randn(2, 5, size), torch.randint(0, size, (2, 5), dtype=ids_dtype)
    mask = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)
    temperature = torch.rand(2, 5) + 0.5
    x[~mask] = torch.nan
    ids[~mask] = -100
    temperature[~mask] = 0
    leaf = x.clone().requires_grad_()
    got = fusedpo.token_logprobs(leaf, ids, mask=mask, temperature=temperature, return_entropy=True)
    upstream = [torch.randn(2, 5), torch.randn(2, 5)]
    upstream[0][~mask] = torch.nan
    torch.autograd.backward(got, upstream)
    want = fusedpo.token_logprobs(x[mask], ids[mask], temperature=temperature[mask], return_entropy=True)
    for result, kept in zip(got, want, strict=True):
        assert torch.equal(result[mask], kept)
        assert (result[~mask] == 0).all()
    assert (leaf.grad[~mask] == 0).all()
    assert leaf.grad[mask].isfinite().all()
    assert (leaf.grad[mask] != 0).any(-1).all()


def test_temperature_per_row_equals_one_at_a_time():
    x, ids = torch.randn(3, 300), torch.randint(0, 300, (3,))
    temperature = torch.tensor([0.1, 1.0, 10.0])
    got = fusedpo.token_logprobs(x, ids, temperature=temperature, return_entropy=True)
    for row, t in enumerate(temperature.tolist()):
        want = fusedpo.token_logprobs(x[row], ids[row], temperature=t, return_entropy=True)
        assert torch.equal(torch.stack(want), torch.stack([g[row] for g in got]))


@pytest.mark.parametrize("temperature", [0.01, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature(dtype, temperature):
    assert_accurate(make_logits("random", 3, 5003, dtype), torch.randint(0, 5003, (3,)), temperature=temperature)


@pytest.mark.parametrize("size", [40, 9000])
def test_strided_arguments(size):
    """Ids, mask, temperature and what comes from above may have any strides: the same to the bit."""
    x, ids = torch.randn(2, 3, size), torch.randint(0, size, (3, 4, 2))
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    check_strided_arguments(x, ids, mask, torch.rand(3, 2) + 0.5, torch.randn(3, 2, 2))


@pytest.mark.parametrize("part", PARTS)
def test_slices_are_not_copied(part, monkeypatch):
    """Neither forward nor backward makes them contiguous."""
    x = PARTS[part](torch.randn(2, 3, 300)).requires_grad_()

    def contiguous(tensor):
        assert tensor.is_contiguous()
        return tensor

    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    outputs = fusedpo.token_logprobs(x, torch.zeros(x.shape[:-1], dtype=torch.int64), return_entropy=True)
    torch.autograd.grad(outputs, x, [torch.ones_like(output) for output in outputs])


VIEWS = STRIDED | {
    "three strides": lambda x: x.unflatten(0, (2, 2)).transpose(1, 3)[:, ::2, ::3, :, ::2],
    "slice of aligned rows": lambda x: x.flatten()[:960].view(4, 6, 40)[:, 1:],
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strided_logits(dtype, view, inplace):
    base = torch.randn((4, 3, 5, 6, 20) if view == "three strides" else (4, 6, 42)).to(dtype)
    if inplace and view == "expanded":
        pytest.skip("rows that share memory cannot hold their gradients")
    *rows, size = VIEWS[view](base).shape
    ids, upstream = torch.randint(0, size, rows), torch.randn(rows)
    want, x = base.clone().requires_grad_(), base.clone().requires_grad_()
    reference_logp = reference.token_logprobs(VIEWS[view](want), ids)
    reference_logp.backward(upstream)
    logp = fusedpo.token_logprobs(VIEWS[view](x * 1), ids, inplace_backward=inplace)
    logp.backward(upstream)
    torch.testing.assert_close(logp, reference_logp, rtol=1e-5, atol=1e-5)
    # the last bit of the dtype: both are rounded once, from values that differ in the last bits of float32
    torch.testing.assert_close(x.grad, want.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@settings(max_examples=25)
@given(st.data())
def test_shapes_strides_and_masks(data):
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
    size, step = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 2))
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


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_ids_out_of_range(monkeypatch, bad):
    """An error where a check is free or asked for; elsewhere NaN, and neither read nor written out of bounds."""
    monkeypatch.setattr(_checks, "DEBUG", True)
    x, ids = torch.randn(4, 50, requires_grad=True), torch.tensor([3, bad, 0, 49])
    with pytest.raises(ValueError, match=rf"token_ids must be in \[0, 50\) at kept rows, got {bad} at flat position 1"):
        fusedpo.token_logprobs(x, ids)
    monkeypatch.setattr(_checks, "values_are_free", lambda *_: False)
    logp = fusedpo.token_logprobs(x, ids)
    assert logp.isnan().tolist() == [False, True, False, False]
    logp.sum().backward()
    good = torch.tensor([0, 2, 3])
    want = x[good].detach().requires_grad_()
    fusedpo.token_logprobs(want, ids[good]).sum().backward()
    assert torch.equal(x.grad[good], want.grad)


@pytest.mark.parametrize("temperature", [torch.tensor(-1.0), torch.tensor([1.0, 0.0, 1.0]), torch.tensor(torch.nan)])
def test_temperature_must_be_positive(monkeypatch, temperature):
    monkeypatch.setattr(_checks, "DEBUG", True)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got"):
        fusedpo.token_logprobs(torch.randn(3, 5), torch.tensor([0, 1, 2]), temperature=temperature.to(DEVICE))


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("use", ["logprobs", "entropy"])
def test_each_upstream_gradient_may_be_absent(use):
    x, ids = torch.randn(3, 5000), torch.randint(0, 5000, (3,))
    grads = []
    for function in (fusedpo.token_logprobs, reference.token_logprobs):
        leaf = x.clone().requires_grad_()
        logprobs, entropy = function(leaf, ids, return_entropy=True)
        {"logprobs": logprobs, "entropy": entropy}[use].backward(torch.tensor([1.5]).expand(3))
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_rows_without_upstream_gradient_get_exactly_zero():
    x, ids = torch.randn(3, 9000), torch.zeros(3, dtype=torch.int64)
    x[0] = torch.nan
    x.requires_grad_()
    fusedpo.token_logprobs(x, ids).backward(torch.tensor([0.0, 0.0, 1.0]))
    assert (x.grad[:2] == 0).all()
    assert (x.grad[2] != 0).all()


@pytest.mark.parametrize("size", [40, 9000])
def test_inplace_gradient_is_bitwise_the_other_one(size):
    base, ids = torch.randn(2, 3, size), torch.randint(0, size, (2, 2, 3))
    mask = torch.tensor([[True, False], [True, True]])
    grads = []
    for inplace in (False, True):
        leaf = base.clone().requires_grad_()
        outputs = fusedpo.token_logprobs(
            (leaf * 1)[:, :-1], ids, mask=mask, inplace_backward=inplace, return_entropy=True
        )
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("size", [300, 9000])
def test_rows_do_not_depend_on_each_other(size):
    """Bitwise: alone or in a batch, in any order, with or without gradients."""
    x, ids = torch.randn(5, size), torch.randint(0, size, (5,))
    upstream = torch.randn(5), torch.randn(5)
    full = everything(x, ids, upstream, slice(None))
    for rows in (torch.tensor([4, 2, 0, 1, 3]), torch.tensor([3])):
        for got, want in zip(everything(x, ids, upstream, rows), full, strict=True):
            assert torch.equal(got, want[rows])
    with torch.no_grad():
        for got, want in zip(fusedpo.token_logprobs(x, ids, return_entropy=True), full, strict=False):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_are_bitwise(dtype):
    x, ids = make_logits("random", 3, 9001, dtype), torch.randint(0, 9001, (3,))
    upstream = torch.randn(3), torch.randn(3)
    first, second = (everything(x, ids, upstream, slice(None)) for _ in range(2))
    assert all(map(torch.equal, first, second))


# ------------------------------------------------------------------------------------------------------------ operators


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, False, True], [True, True, False]])], ids=["all", "mask"])
@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck(mask, entropy):
    logits, ids = torch.randn(2, 3, 40), torch.randint(0, 40, (2, 3))
    mask = None if mask is None else mask.to(DEVICE)
    temperature = torch.rand(2, 3) + 0.5
    args = (logits, ids, temperature, mask, entropy)
    torch.library.opcheck(torch.ops.fusedpo.token_logprobs.triton, args)
    _, _, stats = torch.ops.fusedpo.token_logprobs.triton(*args)
    upstream = (torch.randn(2, 3), torch.randn(2, 3) if entropy else None)
    args = (*upstream, logits.clone(), ids, temperature, mask, stats)
    torch.library.opcheck(torch.ops.fusedpo.token_logprobs_backward.triton, args)
    torch.library.opcheck(torch.ops.fusedpo.token_logprobs_backward_out.triton, (*args, torch.empty_like(logits)))


@pytest.mark.parametrize("entropy", [False, True])
def test_compile(entropy):
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def loss(x, ids):
        outputs = fusedpo.token_logprobs(x, ids, return_entropy=entropy)
        return sum(o.sum() for o in outputs) if entropy else outputs.sum()

    x, ids = torch.randn(3, 50), torch.randint(0, 50, (3,))
    grads = []
    for name in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        with fusedpo.backend(name):
            loss(leaf, ids).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def python(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_triton_is_imported_by_the_first_call_only():
    python("import sys, torch; n = 'triton' in sys.modules; import fusedpo; assert n == ('triton' in sys.modules)")


def test_triton_is_optional():
    python(
        "import importlib.util, sys; find = importlib.util.find_spec;"
        "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a);"
        "import fusedpo; from fusedpo import backends; assert 'triton' not in sys.modules;"
        "assert backends.why_not('triton', 'token_logprobs', 'cuda') == 'triton is not installed'"
    )


def test_forced_on_the_cpu_it_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(fusedpo.BackendUnavailable, match="'triton' was forced.*not on cpu"):
        backends.choose("token_logprobs", "cpu")


# ------------------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
def test_more_than_2_31_elements():
    """16,384 x 151,936: the last rows are what they are alone, forward and in-place backward."""
    rows, size = 16_384, 151_936
    x = torch.empty(rows, size, dtype=torch.bfloat16).normal_()
    ids, last = torch.randint(0, size, (rows,)), x[-2:].clone()
    x.requires_grad_()
    logp = fusedpo.token_logprobs(x * 1, ids, inplace_backward=True)
    logp.sum().backward()
    last.requires_grad_()
    alone = fusedpo.token_logprobs(last, ids[-2:])
    alone.sum().backward()
    assert torch.equal(logp[-2:], alone)
    assert torch.equal(x.grad[-2:], last.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("part", PARTS)
def test_memory(part):
    """A few numbers per row forward, and backward the gradient, which in place costs nothing; slices are not copied."""

    def peak_extra_bytes(function) -> int:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result.append(function())
        return torch.cuda.max_memory_allocated() - before

    result = []
    x = PARTS[part](torch.randn(2, 33, 20_000)).requires_grad_()
    rows, ids, ones = x.shape[:-1].numel(), torch.randint(0, x.shape[-1], x.shape[:-1]), torch.ones(x.shape[:-1])
    few, gradient = 64 * rows + 8192, x.numel() * x.element_size()
    for inplace, ceiling in ((False, gradient + 2**20), (True, 0)):  # blocks may be 1 MB larger than asked for
        forward = peak_extra_bytes(
            lambda inplace=inplace: fusedpo.token_logprobs(x, ids, return_entropy=True, inplace_backward=inplace)
        )
        assert 0 < forward <= few
        outputs = result[-1]
        assert peak_extra_bytes(lambda outputs=outputs: torch.autograd.grad(outputs, x, [ones, ones])) <= ceiling + few


@pytest.mark.gpu
def test_no_synchronisation():
    x, ids = torch.randn(64, 5000, requires_grad=True), torch.randint(0, 5000, (64,))
    temperature, mask = torch.rand(64) + 0.5, torch.rand(64) > 0.5

    def step():
        outputs = fusedpo.token_logprobs(x, ids, temperature=temperature, mask=mask, return_entropy=True)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_other_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x, ids = torch.randn(4, 500, device="cuda:1"), torch.randint(0, 500, (4,), device="cuda:1")
    want = torch.log_softmax(x, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(fusedpo.token_logprobs(x, ids), want)
    assert torch.cuda.current_device() == 0
