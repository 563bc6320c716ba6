"""Log-probs from hidden states, a chunk of rows at a time: value and gradient against float64, memory, autograd."""

from __future__ import annotations

import inspect
import typing

import pytest
import torch
from support.hidden import GRID, Products
from support.logprobs import peak_extra_bytes, product_bytes, total
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fusedpo
from fusedpo import reference
from fusedpo.ops import hidden as ops_hidden

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T, H, V = 14, 24, 150


pytestmark = pytest.mark.usefixtures("native")


def inputs(tokens: int = T, size: int = H, vocab: int = V, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Hidden states, weight and bias, such that logits are of order 1 to 5."""
    hidden, weight = torch.randn(tokens, size), 2 * torch.randn(vocab, size) / size**0.5
    return [x.to(dtype) for x in (hidden, weight, torch.randn(vocab))]


def run(function, sources, ids, upstream, dtype=None, *, bias=True, **options) -> list[Tensor]:
    """Log-probs, entropy and the gradients, in float64; ``dtype``: of the sources."""
    leaves = [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in sources]
    outputs = function(leaves[0], leaves[1], ids, bias=leaves[2] if bias else None, **options)
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)])
    return [x.detach().double() for x in (*outputs, *(leaf.grad for leaf in leaves[: 3 if bias else 2]))]


def as_models_do(hidden, weight, ids, *, bias=None, softcap=None, logit_scale=1.0, **options) -> tuple[Tensor, Tensor]:
    """Logits in the dtype of the model, its head's operations one by one; what follows in float32."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return reference.token_logprobs(logits, ids, **options)


def assert_accurate(sources: list[Tensor], ids: Tensor, *, chunk_tokens: int | None = None, **options) -> None:
    """No further from the float64 truth than PyTorch in the same dtype, beyond a few roundings.

    Both round logits and their gradients, not at the same places: the errors are of one size, not equal.
    """
    upstream = torch.randn(ids.shape), torch.randn(sources[0].shape[:-1])
    options["return_entropy"] = True
    truth = run(reference.linear_token_logprobs, sources, ids, upstream, torch.float64, **options)
    torchs = run(as_models_do, sources, ids, upstream, **options)
    results = run(fusedpo.linear_token_logprobs, sources, ids, upstream, chunk_tokens=chunk_tokens, **options)
    eps = torch.finfo(sources[0].dtype).eps
    names = ("logprobs", "entropy", "hidden", "weight", "bias")
    for name, got, other, want in zip(names, results, torchs, truth, strict=False):
        assert got.shape == want.shape, name
        error = (got - want).norm()
        allowed = 1.25 * (other - want).norm() + (eps if name not in names[:2] else 1e-6) * want.norm()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


OPTIONS = {
    "plain": {"bias": False},
    "bias": {},
    "scale": {"logit_scale": -0.5},
    "cap": {"softcap": 3.0, "logit_scale": 0.7, "bias": False},
    "cap and bias": {"softcap": 3.0},
    "temperature": {"temperature": 0.6},
    "temperature per row": {"temperature": torch.linspace(0.5, 1.5, T), "softcap": 5.0},
    "mask": {"mask": torch.arange(T) % 3 != 0, "temperature": torch.linspace(1.5, 0.5, T)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk_tokens", [3, None])
@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_gradients(dtype, chunk_tokens, options):
    assert_accurate(
        inputs(dtype=dtype), torch.randint(0, V, (T,)), chunk_tokens=chunk_tokens, **{"bias": True} | OPTIONS[options]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturated_softcap(dtype):
    """Logits up to 8 times the cap, whose tanh is 1 but for a rounding, still have their small gradient."""
    hidden, weight, bias = inputs(dtype=dtype)
    assert_accurate([hidden, weight * 3, bias], torch.randint(0, V, (T,)), softcap=2.0, chunk_tokens=4)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 8, 100])
@pytest.mark.parametrize("num_ids", [1, 5])
def test_several_ids_per_row(num_ids, chunk_tokens):
    hidden, weight, bias = inputs()
    hidden = hidden.reshape(2, 7, H)
    mask = torch.rand(2, 7) > 0.3
    assert_accurate([hidden, weight, bias], torch.randint(0, V, (2, 7, num_ids)), chunk_tokens=chunk_tokens, mask=mask)


@pytest.mark.parametrize("leading", [(), (1,), (2, 7), (2, 1, 3), (0,), (2, 0)])
def test_leading_dimensions(leading):
    hidden, weight, bias = torch.randn(*leading, H), *inputs()[1:]
    assert_accurate([hidden, weight, bias], torch.randint(0, V, leading), chunk_tokens=3)


def test_strided_inputs():
    hidden, weight, bias = inputs()
    hidden, weight = hidden.t().contiguous().t()[::2], weight.t().contiguous().t()
    assert_accurate([hidden, weight, bias.expand(2, V)[0]], torch.randint(0, V, (7,), dtype=torch.int32))


def test_sum_over_many_chunks_is_in_float32():
    """100 chunks of one row in bfloat16: a sum in bfloat16 would stop growing."""
    hidden, weight, bias = inputs(100, dtype=torch.bfloat16)
    hidden = hidden.abs()
    assert_accurate([hidden, weight, bias], torch.zeros(100, dtype=torch.int64), chunk_tokens=1)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_masked_rows_are_not_read(mask_dtype):
    (hidden, weight, bias), ids = inputs(), torch.randint(0, V, (T,))
    mask, temperature = torch.rand(T) > 0.4, torch.rand(T) + 0.5
    upstream = torch.randn(T), torch.randn(T)
    want = run(reference.linear_token_logprobs, (hidden, weight, bias), ids, upstream, mask=mask, return_entropy=True)
    hidden[~mask], ids[~mask] = torch.nan, -100
    options = {"mask": mask.to(mask_dtype), "chunk_tokens": 2, "return_entropy": True}
    got = run(fusedpo.linear_token_logprobs, (hidden, weight, bias), ids, upstream, **options)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    for g in got[:3]:
        assert (g[~mask] == 0).all()
    temperature[~mask] = torch.nan
    assert (
        fusedpo.linear_token_logprobs(hidden, weight, ids, mask=mask, temperature=temperature, return_entropy=True)[0]
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_all_masked(chunk_tokens):
    options = {"mask": torch.zeros(T), "chunk_tokens": chunk_tokens, "return_entropy": True}
    results = run(
        fusedpo.linear_token_logprobs, inputs(), torch.full((T,), -100), (torch.randn(T), torch.randn(T)), **options
    )
    assert all((x == 0).all() for x in results)


# ----------------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("needed", GRID, ids=str)
@pytest.mark.parametrize("use", ["logprobs", "entropy", "both"])
def test_only_what_needs_a_gradient_is_computed(needed, use):
    (hidden, weight, bias), ids = inputs(), torch.randint(0, V, (T,))
    gradients = []
    for function in (fusedpo.linear_token_logprobs, reference.linear_token_logprobs):
        leaves = [x.clone().requires_grad_(n) for x, n in zip((hidden, weight, bias), needed, strict=True)]
        outputs = function(*leaves[:2], ids, bias=leaves[2], return_entropy=True, chunk_tokens=7)
        outputs = outputs if use == "both" else outputs[use == "entropy"]
        with Products() as products:
            if any(needed):
                total(outputs).backward()
            else:
                assert not total(outputs).requires_grad
        if function is fusedpo.linear_token_logprobs:
            assert len(products.shapes) == 2 * ((1 + sum(needed)) if any(needed) else 0)
        gradients.append([x.grad for x in leaves])
    assert [g is not None for g in gradients[0]] == list(needed)
    torch.testing.assert_close(*([g for g in grads if g is not None] for grads in gradients), rtol=1e-4, atol=1e-5)


def test_cost_follows_the_rows_that_are_kept():
    (hidden, weight, _), ids = inputs(), torch.randint(0, V, (T,))
    hidden.requires_grad_()
    with Products() as products:
        logprobs, _ = fusedpo.linear_token_logprobs(
            hidden, weight, ids, mask=torch.arange(T) < 5, chunk_tokens=3, return_entropy=True
        )
        logprobs.sum().backward()
    assert products.shapes == [(3, H, V), (2, H, V), (3, H, V), (3, V, H), (2, H, V), (2, V, H)]


def test_workspace_budget(monkeypatch):
    """As few chunks as the workspace allows, of equal size."""
    monkeypatch.setitem(ops_hidden.WORKSPACE_BYTES, "cpu", 6 * V * 4)
    (hidden, weight, _), ids = inputs(), torch.randint(0, V, (T,))
    with Products() as products:
        fusedpo.linear_token_logprobs(hidden, weight, ids, return_entropy=True)
    assert [rows for rows, *_ in products.shapes] == [5, 5, 4]
    with Products() as products:
        fusedpo.linear_token_logprobs(hidden[:6], weight, ids[:6], return_entropy=True)
    assert [rows for rows, *_ in products.shapes] == [6]
    with Products() as products:  # two buffers in the backward
        logprobs, _ = fusedpo.linear_token_logprobs(
            hidden[:6].requires_grad_(), weight, ids[:6], softcap=3.0, return_entropy=True
        )
        logprobs.sum().backward()
    assert products.shapes == [(6, H, V), (3, H, V), (3, V, H), (3, H, V), (3, V, H)]
    monkeypatch.setitem(ops_hidden.WORKSPACE_BYTES, "cpu", 1)
    with Products() as products:
        fusedpo.linear_token_logprobs(hidden[:2], weight, ids[:2], return_entropy=True)
    assert [rows for rows, *_ in products.shapes] == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory(dtype):
    """One chunk of logits and the gradients; nothing is kept between forward and backward but a few numbers per row."""
    tokens, size, vocab, chunk = 192, 8, 20_000, 6
    (hidden, weight, _), ids = inputs(tokens, size, vocab, dtype), torch.randint(0, vocab, (tokens,))
    workspace = chunk * vocab * dtype.itemsize
    weight.requires_grad_()
    hidden.requires_grad_()
    outputs = []
    forward = peak_extra_bytes(
        lambda: outputs.extend(
            fusedpo.linear_token_logprobs(hidden, weight, ids, chunk_tokens=chunk, return_entropy=True)
        )
    )
    product, *others = product_bytes(hidden[:chunk], weight)
    few = 1 << 16
    assert workspace <= forward <= workspace + product + few
    backward = peak_extra_bytes(lambda: total(tuple(outputs)).backward())
    float32_sum, block = weight.numel() * 4, ops_hidden.BLOCK_BYTES
    rounded = 0 if dtype == torch.float32 else weight.numel() * dtype.itemsize
    gradients = float32_sum + rounded + hidden.numel() * dtype.itemsize
    most = workspace + gradients + block + max(product, *others) + few
    assert workspace <= backward <= most < tokens * vocab * dtype.itemsize  # so that all logits would be noticed


# ----------------------------------------------------------------------------------------------------- autograd, dtypes


def expected_gradients(hidden: Tensor, weight: Tensor, ids: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    total(reference.linear_token_logprobs(*leaves, ids, return_entropy=True)).backward()
    return [x.grad for x in leaves]


@pytest.fixture
def leaves() -> list[Tensor]:
    return [x.requires_grad_() for x in inputs()[:2]]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, V, (T,))


def call(hidden: Tensor, weight: Tensor, ids: Tensor, chunk_tokens: int | None = 5) -> Tensor:
    return total(fusedpo.linear_token_logprobs(hidden, weight, ids, chunk_tokens=chunk_tokens, return_entropy=True))


def assert_gradients(leaves: list[Tensor], wanted: list[Tensor]) -> None:
    torch.testing.assert_close([x.grad for x in leaves], wanted, rtol=1e-4, atol=1e-5)


def test_accumulation_retained_graph_and_untouched_inputs(leaves, ids):
    before, versions = [x.detach().clone() for x in leaves], [x._version for x in leaves]
    call(*leaves, ids).backward()
    loss = call(*leaves, ids)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_gradients(leaves, [3 * g for g in expected_gradients(*leaves, ids)])
    assert versions == [x._version for x in leaves]
    assert all(torch.equal(x, b) for x, b in zip(leaves, before, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(leaves, ids, reentrant):
    checkpoint(call, *leaves, ids, use_reentrant=reentrant).backward()
    assert_gradients(leaves, expected_gradients(*leaves, ids))


def test_weight_that_is_no_leaf(ids):
    """LoRA: only the low-rank factors are trained."""
    hidden, weight, _ = inputs()
    left, right = torch.randn(V, 2, requires_grad=True), torch.randn(2, H, requires_grad=True)
    call(hidden, weight + left @ right, ids).backward()
    grad = expected_gradients(hidden, (weight + left @ right).detach(), ids)[1]
    assert_gradients([left, right], [grad @ right.detach().t(), left.detach().t() @ grad])


def test_double_backward_raises(leaves, ids):
    grads = torch.autograd.grad(call(*leaves, ids), leaves, create_graph=True)
    torch.testing.assert_close(list(grads), expected_gradients(*leaves, ids), rtol=1e-4, atol=1e-5)
    for grad in grads:
        with pytest.raises(RuntimeError, match="linear_token_logprobs: double backward"):
            grad.square().sum().backward(retain_graph=True)


def test_no_graph_where_none_is_wanted(leaves, ids):
    with torch.no_grad():
        assert not call(*leaves, ids).requires_grad
    only_logprobs = fusedpo.linear_token_logprobs(*leaves, ids, return_entropy=False)
    torch.testing.assert_close(only_logprobs, reference.linear_token_logprobs(*leaves, ids, return_entropy=True)[0])
    only_logprobs.sum().backward()
    assert all(x.grad is not None for x in leaves)


def test_changed_weight_is_noticed(leaves, ids):
    loss = call(*leaves, ids)
    with torch.no_grad():
        leaves[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_functional_gradient(leaves, ids):
    with fusedpo.backend("auto"):  # which leaves it to the reference
        got = torch.func.grad(call, argnums=(0, 1))(*(x.detach() for x in leaves), ids)
    torch.testing.assert_close(list(got), expected_gradients(*leaves, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compile_without_graph_break(monkeypatch):
    """Chunks are of the budget, and how many there are is part of the graph: those of two chunks share one."""
    monkeypatch.setitem(ops_hidden.WORKSPACE_BYTES, "cpu", 8 * V * 4)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (13, 11, 15, 9):
        leaves, ids = [x.requires_grad_() for x in inputs(tokens)[:2]], torch.randint(V, (tokens,))
        with fusedpo.backend("auto"):  # which leaves it to the reference
            compiled(*leaves, ids, None).backward()
        assert_gradients(leaves, expected_gradients(*leaves, ids))
    assert counter.frame_count <= 2


def test_autocast_is_that_of_linear(leaves, ids):
    """The products are of bfloat16 matrices; the gradient of a float32 weight is not rounded to bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = fusedpo.linear_token_logprobs(*leaves, ids, chunk_tokens=5, return_entropy=True)
        mixed = fusedpo.linear_token_logprobs(leaves[0].bfloat16(), leaves[1], ids, chunk_tokens=5, return_entropy=True)
    rounded = [x.detach().bfloat16().requires_grad_() for x in leaves]
    plain = fusedpo.linear_token_logprobs(*rounded, ids, chunk_tokens=5, return_entropy=True)
    for got, other, want in zip(outputs, mixed, plain, strict=True):
        assert torch.equal(got, want)
        assert torch.equal(other, want)
    total(outputs).backward()
    total(plain).backward()
    assert torch.equal(leaves[1].grad.bfloat16(), rounded[1].grad)
    assert not torch.equal(leaves[1].grad, rounded[1].grad.float())
    assert torch.equal(leaves[0].grad, rounded[0].grad.float())


def test_float16_products_on_the_cpu_are_of_float32_copies(leaves, ids):
    """Where float16 ones take a hundred times as long; the results are still those of the float16 inputs."""
    assert ops_hidden.compute_dtype(leaves[0].half()) == torch.float32
    rounded = [x.detach().half() for x in leaves]
    got = fusedpo.linear_token_logprobs(*rounded, ids, return_entropy=True)
    want = fusedpo.linear_token_logprobs(*map(Tensor.float, rounded), ids, return_entropy=True)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_backward_under_autocast(leaves, ids):
    loss = call(*leaves, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    assert_gradients(leaves, expected_gradients(*leaves, ids))


def test_float64_runs_on_the_reference(leaves, ids):
    doubles = [x.double() for x in leaves]
    with fusedpo.backend("auto"):
        logprobs, _ = fusedpo.linear_token_logprobs(*doubles, ids, return_entropy=True)
    assert logprobs.dtype == torch.float64
    with pytest.raises(fusedpo.BackendUnavailable, match="float64"):
        fusedpo.linear_token_logprobs(*doubles, ids, return_entropy=True)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def sharded() -> Tensor:
    """A parameter that FSDP2 has split over two ranks."""
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield distribute_tensor(torch.randn(V, H), DeviceMesh("cpu", [0, 1]), [Shard(0)])
    torch.distributed.destroy_process_group()


def test_shards_raise(sharded, ids):
    hidden = inputs()[0]
    arguments = {"old_logprobs": None, "advantages": torch.ones(T), "objective": fusedpo.objectives.ppo()}
    zero3 = torch.nn.Parameter(torch.empty(0))  # what ZeRO-3 leaves of a parameter outside its module's forward
    for shard, message in (
        (sharded, r"DTensor.*{}\.to_local.*LossHead.*register_fsdp_forward_method.*Partial"),
        (zero3, r"empty.*GatheredParameters"),
    ):
        for name, (weight, bias) in (("weight", (shard, None)), ("bias", (inputs()[1], shard))):
            with pytest.raises(TypeError, match=f"^{name} must be a whole.*{message.format(name)}"):
                fusedpo.linear_token_logprobs(hidden, weight, ids, bias=bias, return_entropy=True)
            with pytest.raises(TypeError, match=f"^{name} must be a whole.*{message.format(name)}"):
                fusedpo.policy_loss_from_hidden(hidden, weight, ids, bias=bias, **arguments)


@pytest.mark.parametrize(
    ("error", "argument", "given"),
    [
        (TypeError, "weight must have the dtype", {"weight": torch.zeros(V, H, dtype=torch.bfloat16)}),
        (ValueError, "hidden must be", {"weight": torch.zeros(V, H + 1)}),
        (ValueError, "bias", {"bias": torch.zeros(H)}),
        (ValueError, "token_ids", {"token_ids": torch.zeros(T + 1, dtype=torch.int64)}),
        (ValueError, "token_ids", {"token_ids": torch.full((T,), V)}),
        (ValueError, "temperature", {"temperature": torch.zeros(T)}),
        (ValueError, "mask", {"mask": torch.zeros(T + 1)}),
        (ValueError, "softcap", {"softcap": 0.0}),
        (ValueError, "logit_scale", {"logit_scale": 0}),
        (ValueError, "chunk_tokens", {"chunk_tokens": 0}),
    ],
)
def test_errors(error, argument, given):
    hidden, weight, _ = inputs()
    right = {"hidden": hidden, "weight": weight, "token_ids": torch.zeros(T, dtype=torch.int64)}
    with pytest.raises(error, match=rf"^{argument}"):
        fusedpo.linear_token_logprobs(**right | given, return_entropy=True)


@pytest.mark.parametrize("function", [fusedpo.token_logprobs, fusedpo.linear_token_logprobs])
def test_type_checkers_know_every_argument(function):
    """A call that an overload does not have is an error to them, whatever the function takes."""
    overloads = typing.get_overloads(function)
    assert len(overloads) == 2
    for one in overloads:
        assert list(inspect.signature(one).parameters) == list(inspect.signature(function).parameters)
