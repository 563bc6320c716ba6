"""``gradient_threshold``: what is left out is small, is reported, and is all that changes."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.active_columns import (
    ROWS,
    THRESHOLD,
    VOCAB,
    assert_marked,
    assert_operators_check,
    assert_written_up_to_most,
    peaked,
)
from support.hidden import Products
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import fusedpo
from fusedpo import objectives as O
from fusedpo.ops import active_columns
from fusedpo.ops import hidden as ops_hidden


def run(hidden: Tensor, weight: Tensor, ids: Tensor, advantages: Tensor, *, needed=(True, True), **options):
    leaves = [x.detach().clone().requires_grad_(n) for x, n in zip((hidden, weight), needed, strict=True)]
    options.setdefault("objective", O.ppo())
    out = fusedpo.policy_loss_from_hidden(*leaves, ids, None, advantages, **options)
    out.loss.backward()
    return out, [x.grad for x in leaves]


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


# ------------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("num_ids", [0, 3])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_each_dropped_element_is_within_the_bound(chunk_tokens, entropy, num_ids):
    hidden, weight, ids = peaked()
    g = torch.Generator().manual_seed(1)
    if num_ids:
        ids = torch.randint(VOCAB, (ROWS, num_ids), generator=g)
        ids[:, 1] = ids[:, 0]
    temperature = 0.5 + torch.rand(ROWS, generator=g)
    upstream = [torch.randn(ids.shape, generator=g), torch.randn(ROWS, generator=g) * entropy]

    def gradient(dtype: torch.dtype, threshold: float | None) -> Tensor:
        w = weight.to(dtype, copy=True).requires_grad_()
        outputs = fusedpo.linear_token_logprobs(
            hidden.to(dtype),
            w,
            ids,
            temperature=temperature.to(dtype),
            return_entropy=True,
            gradient_threshold=threshold,
            chunk_tokens=chunk_tokens,
        )
        sum((x * g).sum() for x, g in list(zip(outputs, upstream, strict=True))[: 1 + entropy]).backward()
        return w.grad.T

    exact, got, plain = (gradient(*x) for x in ((torch.float64, None), (torch.float32, THRESHOLD), (torch.float32, 0)))
    size = (upstream[0].reshape(ROWS, -1).sum(1).abs() + upstream[1].abs()) / temperature
    dropped = (got == 0) & (exact != 0)
    assert dropped.float().mean() > 0.5
    assert (exact.abs() <= THRESHOLD * size[:, None] * (1 + 1e-4))[dropped].all()
    # what was not dropped is what it was
    scale = exact.abs().amax(1, keepdim=True)
    assert ((got - plain).abs() <= 1e-6 * scale)[~dropped].all()
    # and something is dropped that is not far below the bound: the threshold is not just very small
    assert (exact.abs() / size[:, None])[dropped].max() > THRESHOLD / (40 if entropy else 2)


@pytest.mark.parametrize("objective", [O.ppo(), O.nfpo(3, entropy_coef=0.01), O.gspo()], ids=["ppo", "nfpo", "gspo"])
@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_the_metric_is_the_largest_dropped_probability(objective, chunk_tokens):
    hidden, weight, ids = peaked()
    options = {"objective": objective, "chunk_tokens": chunk_tokens, "gradient_threshold": THRESHOLD}
    out, (_, grad) = run(hidden, weight, ids, torch.ones(ROWS), **options)
    p = torch.softmax(weight.T.double(), -1)
    chunk = chunk_tokens or ROWS
    columns = torch.cat([(grad.T[i : i + chunk] != 0).any(0).expand_as(x) for i, x in _chunks(p, chunk)])
    want = p.where(~columns, 0).sum(1).max()
    assert want > 1e-3
    torch.testing.assert_close(out.metrics["dropped"].double(), want, rtol=1e-4, atol=1e-6)
    assert run(hidden, weight, ids, torch.ones(ROWS), objective=objective)[0].metrics["dropped"] == 0


def _chunks(x: Tensor, size: int):
    return [(i, x[i : i + size]) for i in range(0, len(x), size)]


def test_none_and_zero_are_exact():
    hidden, weight, ids = peaked()
    results = [run(hidden, weight, ids, torch.ones(ROWS), gradient_threshold=t)[1] for t in (None, 0, 0.0)]
    for gradients in results[1:]:
        assert all(torch.equal(g, w) for g, w in zip(gradients, results[0], strict=True))


@pytest.mark.parametrize("threshold", [-1.0, 1.0, 2.0**-65, float("nan")])
def test_errors(threshold):
    hidden, weight, ids = peaked()
    with pytest.raises(ValueError, match="^gradient_threshold must be 0, or at least"):
        fusedpo.linear_token_logprobs(hidden, weight, ids, gradient_threshold=threshold)
    with pytest.raises(TypeError, match="^gradient_threshold must be a float"):
        fusedpo.linear_token_logprobs(hidden, weight, ids, gradient_threshold="exact")


# ------------------------------------------------------------------------------------------------ what it falls back to


def test_flat_policies_take_the_plain_products():
    hidden, weight, ids = peaked(spread=0.1)
    want, wanted = run(hidden, weight, ids, torch.ones(ROWS), gradient_threshold=None)
    out, gradients = run(hidden, weight, ids, torch.ones(ROWS), gradient_threshold=0.1 / VOCAB)
    assert out.metrics["dropped"] == 0
    assert all(torch.equal(g, w) for g, w in zip(gradients, wanted, strict=True))
    assert torch.equal(out.loss, want.loss)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_without_threshold(bad):
    hidden, weight, ids = peaked()
    hidden[3, 5] = bad
    results = []
    for threshold in (None, THRESHOLD):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        fusedpo.linear_token_logprobs(*leaves, ids, gradient_threshold=threshold).sum().backward()
        results.append([x.grad for x in leaves])
    for got, want in zip(*reversed(results), strict=True):
        assert want.isnan().any()
        assert torch.equal(got.isnan(), want.isnan())


def test_columns_of_minus_infinity_are_dropped():
    hidden, weight, ids = peaked()
    bias = torch.zeros(VOCAB)
    bias[::2] = -torch.inf
    out, gradients = run(hidden, weight, ids // 2 * 2 + 1, torch.ones(ROWS), bias=bias, gradient_threshold=THRESHOLD)
    assert out.metrics["dropped"] > 0
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("what", ["all masked", "no advantage"])
def test_nothing_to_learn(what):
    hidden, weight, ids = peaked()
    mask = torch.full((ROWS,), what != "all masked")
    advantages = torch.full((ROWS,), float(what != "no advantage"))
    out, gradients = run(hidden, weight, ids, advantages, mask=mask, gradient_threshold=THRESHOLD)
    assert all((x == 0).all() for x in (*gradients, out.metrics["dropped"]))


# ------------------------------------------------------------------------------------------------------- the products


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("objective", [O.ppo(), O.gspo()], ids=["ppo", "gspo"])
def test_products_are_of_active_columns_and_of_what_is_wanted(objective, needed):
    hidden, weight, ids = peaked()
    options = {"objective": objective, "needed": needed, "gradient_threshold": THRESHOLD}
    with Products() as products:
        _, (of_hidden, of_weight) = run(hidden, weight, ids, torch.ones(ROWS), **options)
    _, wanted = run(hidden, weight, ids, torch.ones(ROWS), objective=objective, gradient_threshold=None)
    for got, want, wants in zip((of_hidden, of_weight), wanted, needed, strict=True):
        assert (got is not None) == wants
        assert got is None or error(got, want) < 0.05
    logits = (ROWS, ROWS, VOCAB)
    assert products.shapes.count(logits) == (1 if objective == O.ppo() else 2)
    gradients = [shape for shape in products.shapes if shape != logits]
    assert len(gradients) == sum(needed)
    assert all(VOCAB not in shape for shape in gradients)


def test_tied_embeddings():
    torch.manual_seed(0)
    table, ids, inputs = 2 * torch.randn(VOCAB, 16), torch.randint(VOCAB, (ROWS,)), torch.randint(VOCAB, (ROWS,))
    gradients = []
    for threshold in (None, THRESHOLD):
        weight = table.clone().requires_grad_()
        hidden = torch.nn.functional.embedding(inputs, weight)
        fusedpo.policy_loss_from_hidden(
            hidden, weight, ids, None, torch.ones(ROWS), objective=O.ppo(), gradient_threshold=threshold
        ).loss.backward()
        gradients.append(weight.grad)
    assert 0 < error(gradients[1], gradients[0]) < 0.05


@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_bfloat16_weight_with_float32_sums(chunk_tokens):
    """As far from float64 as the exact gradient in that dtype, and no further than what the threshold leaves out."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, 64).bfloat16(), (3 * torch.randn(VOCAB, 64) / 8).bfloat16()
    ids, advantages = torch.randint(VOCAB, (ROWS,)), torch.randn(ROWS)
    exact = run(hidden.double(), weight.double(), ids, advantages)[1]
    for threshold in (None, 2.0**-14):
        gradients = run(hidden, weight, ids, advantages, chunk_tokens=chunk_tokens, gradient_threshold=threshold)[1]
        assert all(g.dtype == torch.bfloat16 for g in gradients)
        errors = [error(g, e) for g, e in zip(gradients, exact, strict=True)]
        if threshold is None:
            allowed = errors
        assert all(e <= 1.02 * a for e, a in zip(errors, allowed, strict=True))


def test_softcap_bias_and_autocast():
    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, 16), 2 * torch.randn(VOCAB, 16)
    bias = torch.randn(VOCAB)
    ids, advantages = torch.randint(VOCAB, (ROWS,)), torch.randn(ROWS)
    options = {"softcap": 15.0, "logit_scale": 0.8, "bias": bias, "chunk_tokens": 5}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (_, want), (out, got) = (
            run(hidden, weight, ids, advantages, gradient_threshold=t, **options) for t in (None, THRESHOLD)
        )
    assert out.metrics["dropped"] > 0
    assert all(0 < error(g, w) < 0.05 for g, w in zip(got, want, strict=True))


def test_preferences():
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 6, 16), 2 * torch.randn(VOCAB, 16)
    ids = torch.randint(VOCAB, (4, 6))
    for chunk_tokens in (None, 5):  # in one pass, and in two
        results = []
        for threshold in (None, THRESHOLD):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
            out = fusedpo.preference_loss_from_hidden(
                *leaves,
                ids,
                torch.zeros(4, 6),
                objective=O.dpo(beta=0.1),
                chunk_tokens=chunk_tokens,
                gradient_threshold=threshold,
            )
            out.loss.backward()
            results.append([x.grad for x in leaves])
            assert (out.metrics["dropped"] > 0) == (threshold is not None)
        assert all(0 < error(g, w) < 0.05 for g, w in zip(*reversed(results), strict=True))


# ----------------------------------------------------------------------------------------------- a policy that is real


def test_a_trained_model_of_the_examples(monkeypatch):
    """Of few tokens, so that products of active columns have to be asked for; in float32, against float64.

    The errors of both gradients stay below the rounding of bfloat16 with a small threshold, and below what leaving out
    all that a larger one allows could cost.
    """
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    monkeypatch.setattr(active_columns, "MOST_ACTIVE", 1.0)
    path = Path(__file__).parents[1] / "examples" / "train_arithmetic.py"
    example = ModuleType("train_arithmetic")
    exec(compile(path.read_text(), path, "exec"), example.__dict__)
    torch.manual_seed(0)
    policy = example.warm_up(Namespace(digits=3, warmup_steps=30, seed=0))
    prompts, answers = example.problems(16, 3, torch.Generator().manual_seed(1))
    ids, kept = example.join(prompts, answers)
    token_ids, mask = fusedpo.next_tokens(ids, kept)
    states = []
    policy.head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].detach()))
    with torch.no_grad():
        policy(ids)
    sources = [states[0], policy.head.weight.detach()]
    advantages = torch.randn(ids.shape, generator=torch.Generator().manual_seed(2))
    options = {"mask": mask, "bias": policy.head.bias.detach()}
    exact = run(*(x.double() for x in sources), token_ids, advantages, **(options | {"bias": options["bias"].double()}))
    for threshold, allowed in ((2.0**-16, 2.0**-9), (2.0**-6, 2.0**-3)):
        out, gradients = run(*sources, token_ids, advantages, gradient_threshold=threshold, chunk_tokens=4, **options)
        assert all(error(g, e) < allowed for g, e in zip(gradients, exact[1], strict=True))
    assert out.metrics["dropped"] > 0


# --------------------------------------------------------------------------------------------- what the host waits for


class Order(TorchDispatchMode):
    """Products, the operators of this file, and what waits for a device, in the order in which they are asked for."""

    names = ("addmm", "active_columns", "gradient_at_", "nonzero", "_local_scalar_dense")

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.order: list[str] = []
        to_host = active_columns.to_host

        def logged(number: Tensor):
            self.order.append("number sent")
            value = to_host(number)
            return lambda: self.order.append("number needed") or value()

        monkeypatch.setattr(active_columns, "to_host", logged)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.names:
            self.order.append(name)
        return function(*args, **kwargs or {})


NUMBER = ["number needed", "_local_scalar_dense"]  # the latter on the CPU, whose numbers are sent nowhere


@pytest.mark.parametrize("objective", [O.ppo(), O.gspo()], ids=["one pass", "two passes"])
def test_the_gradient_is_computed_while_the_number_of_columns_is_on_its_way(objective, monkeypatch):
    """The only thing that the host waits for, after all that does not depend on it."""
    hidden, weight, ids = peaked()
    with Order(monkeypatch) as calls:
        run(hidden, weight, ids, torch.ones(ROWS), objective=objective, chunk_tokens=6, gradient_threshold=THRESHOLD)
    chunk = ["addmm", "active_columns", "number sent", "gradient_at_", *NUMBER, "addmm", "addmm"]
    assert calls.order == (["addmm"] * 2 if objective == O.gspo() else []) + 2 * chunk


def test_logits_of_the_reference_are_computed_while_the_number_of_columns_is_on_its_way(monkeypatch):
    """Those of the next chunk: its two products of logits lie before and after that of the gradients."""
    hidden, weight, _ = peaked()
    other, leaf = peaked(seed=1)[1], weight.clone().requires_grad_()
    with Order(monkeypatch) as calls:
        fusedpo.exact_kl_from_hidden(
            hidden, leaf, hidden, other, direction="reverse", gradient_threshold=THRESHOLD, chunk_tokens=6
        )
    first = ["addmm", "addmm", "number sent", "addmm", *NUMBER, "addmm"]
    assert calls.order == [*first, "addmm", "number sent", *NUMBER, "addmm"]


# -------------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize(
    ("objective", "backend"),
    [
        (O.ppo(entropy_coef=0.01), "aot_eager"),
        (O.gspo(), "aot_eager"),
        pytest.param(O.ppo(entropy_coef=0.01), "inductor", marks=pytest.mark.slow),
    ],
    ids=["one pass", "two passes", "one pass, inductor"],
)
def test_compiled_is_what_eager_is(objective, backend, monkeypatch):
    """The same bits, and the same products: in one pass where eager has one."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 8, 16), 2 * torch.randn(VOCAB, 16)
    ids, mask = torch.randint(VOCAB, (2, 8)), torch.rand(2, 8) < 0.7

    def loss(hidden: Tensor, weight: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = fusedpo.policy_loss_from_hidden(
            *(hidden, weight, ids, None, torch.ones(2)),
            objective=objective,
            mask=mask,
            chunk_tokens=5,
            softcap=20.0,
            gradient_threshold=THRESHOLD,
        )
        return 3 * out.loss, out.metrics

    products, evaluate = [], ops_hidden._Head.logits
    monkeypatch.setattr(ops_hidden._Head, "logits", lambda *args: products.append(1) or evaluate(*args))
    results = []
    with fusedpo.backend("native"):
        for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
            products.clear()
            value, metrics = function(*leaves, mask)
            value.backward()
            results.append((value.detach(), *(x.grad for x in leaves), metrics, len(products)))
    (*eager, metrics, count), (*compiled, compiled_metrics, compiled_count) = results
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    assert list(metrics) == list(compiled_metrics)
    assert compiled_count == count
    if objective == O.gspo():  # whose backward, compiled, cannot write it
        assert compiled_metrics["dropped"].isnan()
    else:
        torch.testing.assert_close(compiled_metrics["dropped"], metrics["dropped"])


def test_compiled_once_for_all_masks():
    """How many rows are evaluated is not part of the graph."""
    torch._dynamo.reset()
    hidden, weight, ids = peaked()

    def loss(hidden: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        arguments = (hidden, weight, ids, None, torch.ones(ROWS))
        return fusedpo.policy_loss_from_hidden(*arguments, objective=O.ppo(), mask=mask).loss

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for kept in (ROWS, 5, 0):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        compiled(*leaves, torch.arange(ROWS) < kept).backward()
        assert (leaves[0].grad != 0).any(1).sum() == kept
    assert counter.frame_count == 1


# ------------------------------------------------------------------------------------------------------------ operators


def test_operators():
    assert_marked("native")
    assert_written_up_to_most("native")
    assert_operators_check("native")


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_exact_kl(direction):
    """Its gradient is another one, with the same bound."""
    hidden, weight, _ = peaked()
    other = weight + torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    gradients = []
    for threshold in (None, THRESHOLD):
        w = weight.clone().requires_grad_()
        fusedpo.exact_kl_from_hidden(
            hidden, w, hidden, other, direction=direction, aggregation="token-sum", gradient_threshold=threshold
        ).loss.backward()
        gradients.append(w.grad)
    exact, got = gradients
    dropped = (got == 0) & (exact != 0)
    assert dropped.float().mean() > 0.5
    assert exact[dropped].abs().max() <= THRESHOLD
    torch.testing.assert_close(got[~dropped], exact[~dropped])
