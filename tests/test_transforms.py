"""Forward mode, second derivatives, vmap, and tensors without data: right, or an error that says what is not there."""

import re
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.utils.flop_counter import FlopCounterMode

import fusedpo
from fusedpo import _checks, backends, objectives

B, T, V, H = 2, 4, 9, 5
X, HIDDEN, WEIGHT = torch.randn(B, T, V), torch.randn(B, T, H), torch.randn(V, H)
IDS, OLD, ADVANTAGES = torch.randint(0, V, (B, T)), -2 * torch.rand(B, T), torch.randn(B)
MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]) != 0
OBJECTIVE = objectives.nfpo(2)
TOKENS = {"objective": OBJECTIVE, "mask": MASK}

# From the tensor to a scalar that is not linear in what the kernels compute.
FUNCTIONS = {
    "policy_loss": (lambda x: fusedpo.policy_loss(x, OLD, ADVANTAGES, **TOKENS).loss.square(), OLD + 0.1),
    "policy_loss_traces": (
        lambda x: (
            fusedpo.policy_loss(
                x, OLD, ADVANTAGES, mask=MASK, objective=objectives.nfpo(2, differentiate=True), reduction="none"
            )
            .loss.square()
            .sum()
        ),
        OLD + 0.1,
    ),
    "token_logprobs": (lambda x: fusedpo.token_logprobs(x, IDS, mask=MASK).square().sum(), X),
    "entropy": (lambda x: fusedpo.token_logprobs(x, IDS, return_entropy=True)[1].square().sum(), X),
    "from_logits": (lambda x: fusedpo.policy_loss_from_logits(x, IDS, OLD, ADVANTAGES, **TOKENS).loss.square(), X),
    "linear_hidden": (lambda x: fusedpo.linear_token_logprobs(x, WEIGHT, IDS, mask=MASK).square().sum(), HIDDEN),
    "linear_weight": (lambda x: fusedpo.linear_token_logprobs(HIDDEN, x, IDS, mask=MASK).square().sum(), WEIGHT),
    "from_hidden": (
        lambda x: fusedpo.policy_loss_from_hidden(x, WEIGHT, IDS, OLD, ADVANTAGES, **TOKENS).loss.square(),
        HIDDEN,
    ),
    "from_weight": (
        lambda x: fusedpo.policy_loss_from_hidden(HIDDEN, x, IDS, OLD, ADVANTAGES, **TOKENS).loss.square(),
        WEIGHT,
    ),
}
native = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason="the reference has all derivatives")
every = pytest.mark.parametrize(("function", "x"), FUNCTIONS.values(), ids=FUNCTIONS)


@contextmanager
def or_raises(kind, message):
    try:
        yield
    except kind as error:
        if not re.search(message, str(error)):
            raise


def gradient(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def dual(function, x, tangent, requires_grad=False):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x.clone().requires_grad_(requires_grad), tangent)))[
            1
        ]


FORWARD_MODE = {
    "jvp": lambda f, x, t: jvp(f, (x,), (t,))[1],
    "jacfwd": lambda f, x, t: (jacfwd(f)(x) * t).sum(),
    "linearize": lambda f, x, t: linearize(f, x)[1](t),
    "dual": dual,
    "dual and reverse": lambda f, x, t: dual(f, x, t, requires_grad=True),
    "no_grad": lambda f, x, t: torch.no_grad()(dual)(f, x, t),
}


@every
def test_forward_mode(function, x):
    tangent = torch.randn_like(x)
    expected = (gradient(function, x) * tangent).sum()
    tight = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}  # some tangents of PyTorch's own are float64
    for forward in FORWARD_MODE.values():
        with fusedpo.backend("reference"):
            torch.testing.assert_close(forward(function, x, tangent), expected, **tight)
        with or_raises(NotImplementedError, r"forward-mode.*fusedpo.backend\('reference'\)"):
            torch.testing.assert_close(forward(function, x, tangent), expected, **tight)


@native
@pytest.mark.parametrize("name", ["policy_loss", "token_logprobs"])
def test_forward_mode_when_compiled(name):
    function, x = FUNCTIONS[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager")
    compiled(x)
    for forward in (FORWARD_MODE["dual"], FORWARD_MODE["jvp"]):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            forward(compiled, x, x)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.compile(lambda x: jvp(function, (x,), (x,))[1], backend="aot_eager")(x)


@native
def test_tangents_of_other_arguments_are_not_dropped():
    def loss(old):
        return fusedpo.policy_loss(OLD, old, ADVANTAGES, **TOKENS).loss

    with pytest.raises(NotImplementedError, match="policy_loss: the kernels have no forward-mode"):
        dual(loss, OLD, torch.ones_like(OLD))


@every
def test_vmap(function, x):
    xs = x + 0.1 * torch.randn(3, *x.shape)
    tight = {"rtol": 1e-4, "atol": 1e-6}
    values, gradients = torch.stack([function(x) for x in xs]), torch.stack([gradient(function, x) for x in xs])
    torch.testing.assert_close(vmap(function)(xs), values, **tight)
    torch.testing.assert_close(vmap(grad(function))(xs), gradients, **tight)
    jacobian = jacrev(lambda x: function(x) * torch.tensor([1.0, 2.0]))(xs[0])
    torch.testing.assert_close(jacobian, torch.stack([gradients[0], 2 * gradients[0]]), **tight)


@every
def test_batched_gradients(function, x):
    x = x.clone().requires_grad_()
    with or_raises(NotImplementedError, "is_grads_batched is not supported"):
        batched = torch.autograd.grad(function(x) * torch.ones(2), x, torch.eye(2), is_grads_batched=True)[0]
        torch.testing.assert_close(batched, gradient(function, x.detach()).expand_as(batched), rtol=1e-4, atol=1e-6)


@native
def test_batched_gradients_where_one_would_be_written_over_the_logits():
    x = X.clone().requires_grad_()
    logprobs = fusedpo.token_logprobs(x * 1, IDS, inplace_backward=True).sum() * torch.ones(2)
    batched = torch.autograd.grad(logprobs, x, torch.eye(2), is_grads_batched=True)[0]
    expected = gradient(lambda x: fusedpo.token_logprobs(x, IDS).sum(), X)
    torch.testing.assert_close(batched, expected.expand_as(batched))


# --------------------------------------------------------------------------------------------------- second derivatives


@native
@every
def test_second_derivatives_raise(function, x):
    for name in ("backward", "grad"):
        leaf = x.clone().requires_grad_()
        first = torch.autograd.grad(function(leaf), leaf, create_graph=True)[0]
        # beside another term, which would otherwise be all there is
        total = (first * torch.randn_like(first)).sum() + leaf.square().sum()
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            total.backward() if name == "backward" else torch.autograd.grad(total, leaf, allow_unused=True)


@native
@every
def test_derivatives_of_gradients_by_what_they_were_multiplied_with_raise(function, x):
    leaf, upstream = x.clone().requires_grad_(), torch.tensor(2.0, requires_grad=True)
    first = torch.autograd.grad(function(leaf), leaf, upstream, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(first.sum(), upstream)


@native
def test_second_derivatives_by_another_source_raise():
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    for function in (
        lambda: fusedpo.policy_loss_from_hidden(hidden, weight, IDS, OLD, ADVANTAGES, **TOKENS).loss,
        lambda: fusedpo.linear_token_logprobs(hidden, weight, IDS).sum(),
    ):
        first = torch.autograd.grad(function(), hidden, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            torch.autograd.grad(first.sum() + weight.sum(), weight)


@native
@every
def test_second_derivatives_by_functorch_raise(function, x):
    with fusedpo.backend("reference"):
        expected = jacrev(grad(function))(x)
        torch.testing.assert_close(hessian(function)(x), expected, rtol=1e-4, atol=1e-5)
    with or_raises(RuntimeError, "double backward is not supported"):
        torch.testing.assert_close(jacrev(grad(function))(x), expected)


@native
def test_the_loss_from_logits_keeps_no_logits():
    x = X.clone().requires_grad_()
    logits = x * 1
    loss = fusedpo.policy_loss_from_logits(logits, IDS, OLD, ADVANTAGES, **TOKENS).loss
    kept = torch.autograd.graph.get_gradient_edge(loss).node
    assert kept.sources[0].untyped_storage().nbytes() == 0
    assert kept.sources[0].data_ptr() != logits.data_ptr()


# ------------------------------------------------------------------------------------------------- tensors without data


TEMPERATURE, DENOMINATOR, CU_SEQLENS = 1 - OLD, torch.tensor(3.0), torch.tensor([0, 3, 8])


def calls(make):
    logits, hidden = make(X).clone().requires_grad_(), make(HIDDEN).clone().requires_grad_()
    weight, ids, old, adv, mask = (make(x) for x in (WEIGHT, IDS, OLD, ADVANTAGES, MASK))
    temperature, denominator, cu_seqlens = make(TEMPERATURE), make(DENOMINATOR), make(CU_SEQLENS)
    tokens = {"objective": OBJECTIVE, "mask": mask, "denominator": denominator}
    rows = {"mask": mask, "temperature": temperature}
    yield fusedpo.token_logprobs(logits, ids, **rows).sum()
    yield fusedpo.linear_token_logprobs(hidden, weight, ids, **rows).sum()
    yield fusedpo.policy_loss_from_logits(logits, ids, old, adv, temperature=temperature, **tokens).loss
    yield fusedpo.policy_loss_from_hidden(hidden, weight, ids, old, adv, temperature=temperature, **tokens).loss
    yield fusedpo.policy_loss_from_hidden(hidden, weight, ids, old, adv, num_live=6, **tokens).loss
    packed = {"mask": mask.view(-1), "cu_seqlens": cu_seqlens}
    yield fusedpo.policy_loss(logits.sum(-1).view(-1), old.view(-1), adv, objective=OBJECTIVE, **packed).loss


@pytest.mark.parametrize("debug", [False, True])
def test_tensors_without_data(debug, monkeypatch):
    monkeypatch.setattr(_checks, "DEBUG", debug)
    for loss in calls(lambda x: x.to("meta")):
        loss.backward()
        assert loss.is_meta
    with FakeTensorMode() as mode:
        for loss in calls(mode.from_tensor):
            loss.backward()
            assert loss.device.type == "cpu"


def test_values_are_read_only_where_there_are_any():
    seen = []

    def look(x):
        seen.append(_checks.values_are_free(x))
        return x.sum()

    plain = torch.ones(2)
    grad(look)(plain)
    vmap(look)(plain[None])
    look(plain.to("meta"))
    look(plain.as_subclass(type("Subclass", (torch.Tensor,), {})))
    with FakeTensorMode() as mode:
        look(mode.from_tensor(plain))
    with FlopCounterMode(display=False):
        look(plain)
    assert seen == [False] * 6
    assert _checks.values_are_free(plain, torch.nn.Parameter(plain), torch.nn.Buffer(plain))
