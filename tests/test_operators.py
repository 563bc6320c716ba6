"""The operators as PyTorch sees them: opcheck, torch.compile, autograd's corners, in-place promises, memory."""

from __future__ import annotations

import pytest
import torch
from support.logprobs import PARTS, peak_extra_bytes, total
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fusedpo
from fusedpo import backends

pytestmark = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))

ROWS, SIZE = (2, 3), 40


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(*ROWS, SIZE, requires_grad=True)


@pytest.fixture
def token_ids() -> Tensor:
    return torch.randint(0, SIZE, ROWS)


def reference_grad(logits: Tensor, *args, **kwargs) -> Tensor:
    x = logits.detach().clone().requires_grad_()
    with fusedpo.backend("reference"):
        total(fusedpo.token_logprobs(x, *args, **kwargs)).backward()
    return x.grad


# -------------------------------------------------------------------------------------------------------- the operators


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, False, True], [True, True, False]])], ids=["all", "mask"])
@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck(logits, token_ids, mask, entropy):
    temperature = torch.rand(ROWS) + 0.5
    args = (logits.detach(), token_ids, temperature, mask, entropy)
    torch.library.opcheck(torch.ops.fusedpo.token_logprobs.native, args)
    _, _, stats = torch.ops.fusedpo.token_logprobs.native(*args)
    upstream = (torch.randn(ROWS), torch.randn(ROWS) if entropy else None)
    args = (*upstream, logits.detach().clone(), token_ids, temperature, mask, stats)
    torch.library.opcheck(torch.ops.fusedpo.token_logprobs_backward.native, args)
    torch.library.opcheck(torch.ops.fusedpo.token_logprobs_backward_out.native, (*args, torch.empty_like(logits)))


def compiled(function, backend: str = "aot_eager"):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def step(x: Tensor, ids: Tensor, temperature: float, mask: Tensor) -> Tensor:
    return total(fusedpo.token_logprobs(x, ids, temperature=temperature, mask=mask, return_entropy=True))


def check_compiled(function, rows: tuple[int, ...], temperature: float) -> None:
    x = torch.randn(*rows, SIZE, requires_grad=True)
    ids, mask = torch.randint(0, SIZE, rows), torch.rand(rows) > 0.3
    function(x, ids, temperature, mask).backward()
    torch.testing.assert_close(
        x.grad, reference_grad(x, ids, temperature=temperature, mask=mask, return_entropy=True), rtol=1e-5, atol=1e-6
    )


def test_compile_without_graph_break_or_recompilation():
    """20 lengths and temperatures: one graph for the first, one for all others."""
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(step, counter)
    for i in range(20):
        check_compiled(function, (2, 3 + i), 0.5 + 0.1 * i)
    assert counter.frame_count <= 2


def autocast(x: Tensor, ids: Tensor, temperature: float, mask: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return step(x, ids, temperature, mask)


def checkpointed(x: Tensor, ids: Tensor, temperature: float, mask: Tensor) -> Tensor:
    return checkpoint(step, x, ids, temperature, mask, use_reentrant=False)


@pytest.mark.parametrize("function", [autocast, checkpointed])
def test_compile_under_autocast_and_around_a_checkpoint(function):
    check_compiled(compiled(function), (2, 5), 0.7)


@pytest.mark.slow
def test_inductor():
    check_compiled(compiled(step, "inductor"), (2, 5), 0.7)


def test_compiled_autograd_does_not_write_in_place(token_ids):
    x = torch.randn(*ROWS, SIZE, requires_grad=True)
    before = x.detach().clone()
    function = compiled(lambda x: fusedpo.token_logprobs(x, token_ids, inplace_backward=True).sum())
    function(x).backward()
    assert torch.equal(x, before)


# ----------------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("use", ["logprobs", "entropy", "both"])
def test_each_upstream_gradient_may_be_absent(logits, token_ids, use):
    logprobs, entropy = fusedpo.token_logprobs(logits, token_ids, return_entropy=True)
    chosen = {"logprobs": (logprobs,), "entropy": (entropy,), "both": (logprobs, entropy)}[use]
    total(chosen).backward()
    x = logits.detach().clone().requires_grad_()
    with fusedpo.backend("reference"):
        logprobs, entropy = fusedpo.token_logprobs(x, token_ids, return_entropy=True)
    total({"logprobs": (logprobs,), "entropy": (entropy,), "both": (logprobs, entropy)}[use]).backward()
    torch.testing.assert_close(logits.grad, x.grad)


def test_expanded_upstream_gradient(logits, token_ids):
    """(B, 1) expanded to (B, L) has stride 0."""
    logprobs = fusedpo.token_logprobs(logits, token_ids)
    logprobs.backward(torch.tensor([[2.0], [-1.0]]).expand(ROWS))
    x = logits.detach().clone().requires_grad_()
    torch.log_softmax(x, -1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1).backward(
        torch.tensor([[2.0], [-1.0]]).expand(ROWS)
    )
    torch.testing.assert_close(logits.grad, x.grad)


def test_rows_without_upstream_gradient_get_exactly_zero(logits, token_ids):
    upstream = torch.zeros(ROWS)
    upstream[0, 1] = 1
    with torch.no_grad():
        logits[1] = torch.nan
    fusedpo.token_logprobs(logits, token_ids).backward(upstream)
    assert (logits.grad[upstream == 0] == 0).all()
    assert (logits.grad[0, 1] != 0).all()


def test_gradient_accumulation(logits, token_ids):
    for _ in range(3):
        total(fusedpo.token_logprobs(logits, token_ids)).backward()
    torch.testing.assert_close(logits.grad, 3 * reference_grad(logits, token_ids))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(logits, token_ids, reentrant):
    outputs = checkpoint(
        lambda x: fusedpo.token_logprobs(x, token_ids, return_entropy=True), logits, use_reentrant=reentrant
    )
    total(outputs).backward()
    torch.testing.assert_close(logits.grad, reference_grad(logits, token_ids, return_entropy=True))


def test_autocast(logits, token_ids):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = fusedpo.token_logprobs(logits, token_ids, return_entropy=True)
    assert all(o.dtype == torch.float32 for o in outputs)
    total(outputs).backward()
    torch.testing.assert_close(logits.grad, reference_grad(logits, token_ids, return_entropy=True))


def test_functional_gradient(logits, token_ids):
    got = torch.func.grad(lambda x: total(fusedpo.token_logprobs(x, token_ids, return_entropy=True)))(logits.detach())
    torch.testing.assert_close(got, reference_grad(logits, token_ids, return_entropy=True))


@pytest.mark.parametrize("output", [0, 1], ids=["logprobs", "entropy"])
def test_double_backward_raises(logits, token_ids, output):
    chosen = fusedpo.token_logprobs(logits, token_ids, return_entropy=True)[output]
    (grad,) = torch.autograd.grad(chosen.sum(), logits, create_graph=True)
    with fusedpo.backend("reference"):
        chosen = fusedpo.token_logprobs(logits, token_ids, return_entropy=True)[output]
    torch.testing.assert_close(grad, *torch.autograd.grad(chosen.sum(), logits))
    with pytest.raises(RuntimeError, match="token_logprobs: double backward is not supported"):
        grad.square().sum().backward()


def test_no_graph_where_none_is_wanted(logits, token_ids):
    with torch.no_grad():
        assert not fusedpo.token_logprobs(logits, token_ids).requires_grad
    assert not fusedpo.token_logprobs(logits.detach(), token_ids).requires_grad


def test_non_leaf_logits_that_two_losses_use(logits, token_ids):
    x = logits * 2
    loss = total(fusedpo.token_logprobs(x, token_ids)) + x.square().sum()
    loss.backward()
    want = 2 * reference_grad(logits * 2, token_ids) + 8 * logits.detach()
    torch.testing.assert_close(logits.grad, want)


def test_retain_graph(logits, token_ids):
    loss = total(fusedpo.token_logprobs(logits, token_ids))
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(logits.grad, 2 * reference_grad(logits, token_ids))


# ----------------------------------------------------------------------------------------------------------- in place


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:, :-1]], ids=["whole", "slice"])
def test_inplace_gradient_is_bitwise_the_other_one(view):
    base = torch.randn(2, 4, SIZE)
    ids = torch.randint(0, SIZE, view(base).shape[:-1])
    mask = torch.rand(ids.shape) > 0.4
    grads = []
    for inplace in (False, True):
        leaf = base.clone().requires_grad_()
        x = view(leaf * 1)
        total(fusedpo.token_logprobs(x, ids, mask=mask, inplace_backward=inplace, return_entropy=True)).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_inplace_leaves_expanded_logits_alone(token_ids):
    """Rows that share memory cannot hold different gradients."""
    leaf = torch.randn(1, 1, SIZE, requires_grad=True)
    total(fusedpo.token_logprobs((leaf * 1).expand(*ROWS, SIZE), token_ids, inplace_backward=True)).backward()
    want = reference_grad(leaf.detach().expand(*ROWS, SIZE), token_ids).sum((0, 1), keepdim=True)
    torch.testing.assert_close(leaf.grad, want)


def test_inplace_overwrites_the_logits_and_says_so(logits, token_ids):
    x = logits * 1
    loss = total(fusedpo.token_logprobs(x, token_ids, inplace_backward=True))
    version = x._version
    loss.backward(retain_graph=True)
    assert x._version > version
    torch.testing.assert_close(x.detach(), reference_grad(logits, token_ids))
    with pytest.raises(RuntimeError, match="overwritten the logits"):
        loss.backward()


def test_inplace_raises_where_someone_else_saved_the_logits(logits, token_ids):
    x = logits * 1
    other = x.square().sum()
    total(fusedpo.token_logprobs(x, token_ids, inplace_backward=True)).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_changed_logits_are_noticed(logits, token_ids):
    x = logits * 1
    loss = total(fusedpo.token_logprobs(x, token_ids))
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("part", PARTS)
def test_memory(part):
    """A few numbers per row forward, and backward the gradient, which in place costs nothing; slices are not copied."""
    base = torch.randn(2, 33, 20_000, requires_grad=True)
    x = PARTS[part](base)
    rows, ids = x.shape[:-1].numel(), torch.randint(0, x.shape[-1], x.shape[:-1])
    few = 64 * rows + 4096
    outputs = []
    forward = peak_extra_bytes(
        lambda: outputs.append(fusedpo.token_logprobs(x, ids, return_entropy=True, inplace_backward=False))
    )
    assert 0 < forward <= few
    gradient = x.numel() * x.element_size()
    assert gradient <= peak_extra_bytes(lambda: torch.autograd.grad(total(outputs[0]), x)) <= gradient + few
    x = PARTS[part](base.detach().clone()).requires_grad_()
    out = fusedpo.token_logprobs(x, ids, inplace_backward=True)
    assert peak_extra_bytes(lambda: torch.autograd.grad(total(out), x)) <= few
