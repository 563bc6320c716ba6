"""The KL divergence over the vocabulary, both ways round, from logits and from hidden states."""

from __future__ import annotations

import pytest
import torch

import fusedpo
from fusedpo import backends
from fusedpo import objectives as O
from fusedpo.ops import divergence as ops_divergence

native = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))

B, T, V, H = 3, 5, 37, 6
INF = float("inf")


def kl_of(logits, ref_logits, direction):
    """From the probabilities, row by row."""
    p, q = logits.softmax(-1), ref_logits.softmax(-1)
    if direction == "forward":
        p, q = q, p
    return (p * (p / q).log()).sum(-1)


@pytest.fixture(
    params=[pytest.param("native", marks=native), "blocks", pytest.param("triton", marks=pytest.mark.triton)]
)
def by(request, monkeypatch):
    """The kernels, and what runs where there is none: blocks of two rows."""
    if request.param == "blocks":
        monkeypatch.setitem(backends.IMPLEMENTATIONS, "exact_kl", {})
        monkeypatch.setitem(ops_divergence.BLOCK_ELEMENTS, "cpu", 2 * V)
        yield request.param
    else:
        with fusedpo.backend(request.param):
            yield request.param


@pytest.fixture
def batch():
    mask = torch.rand(B, T) > 0.3
    mask[1] = False
    return {
        "logits": torch.randn(B, T, V) * 2,
        "ref": torch.randn(B, T, V) * 2,
        "mask": mask,
        "temperature": torch.rand(B, T) + 0.5,
    }


def expected(batch, direction, aggregation="token-mean"):
    leaf = batch["logits"].double().clone().requires_grad_()
    t = batch["temperature"].double().unsqueeze(-1)
    kl = kl_of(leaf / t, batch["ref"].double() / t, direction) * batch["mask"]
    counts = batch["mask"].sum(1)
    if aggregation == "token-mean":
        loss = kl.sum() / counts.sum()
    else:
        loss = (kl.sum(1) / counts.clamp(min=1)).sum() / (counts > 0).sum()
    loss.backward(torch.tensor(1.7, dtype=torch.float64))
    return loss.detach(), kl.detach(), leaf.grad


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_logits(batch, direction, dtype, aggregation, by):
    check_logits(batch, direction, dtype, aggregation)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_reference(batch, direction):
    check_logits(batch, direction, torch.float64, "token-mean")
    with fusedpo.backend("reference"):
        check_logits(batch, direction, torch.float32, "token-mean")


def check_logits(batch, direction, dtype, aggregation):
    batch = {**batch, "logits": batch["logits"].to(dtype), "ref": batch["ref"].to(dtype)}
    loss, kl, gradient = expected(batch, direction, aggregation)
    dirty = [batch[name].masked_fill(~batch["mask"][..., None], float("nan")) for name in ("logits", "ref")]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for inplace in (False, True):
        leaf = dirty[0].clone().requires_grad_()
        out = fusedpo.exact_kl(
            leaf * 1,
            dirty[1],
            direction=direction,
            temperature=batch["temperature"],
            mask=batch["mask"],
            aggregation=aggregation,
            inplace=inplace,
        )
        out.loss.backward(torch.tensor(1.7, dtype=out.loss.dtype))
        torch.testing.assert_close(
            out.loss.double(), loss, rtol=max(tolerance / 100, 1e-12), atol=1e-6 if tolerance > 1e-10 else 0
        )
        torch.testing.assert_close(out.kl.double(), kl, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(leaf.grad.double(), gradient, rtol=tolerance, atol=tolerance / 100)
        assert (leaf.grad[~batch["mask"]] == 0).all()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_strided_packed_and_in_place(batch, direction, by):
    """A slice of the logits cannot be flattened; its gradient takes its memory all the same."""
    cu_seqlens = torch.tensor([0, 4, 4, B * T])
    options = {"direction": direction, "aggregation": "seq-mean-token-sum", "loss_scale": torch.tensor(2.0)}
    whole = torch.randn(B, T + 1, V)
    leaf = whole.clone().requires_grad_()
    copy = leaf * 1
    out = fusedpo.exact_kl(copy[:, 1:], batch["ref"], inplace=True, **options)
    out.loss.backward()
    assert torch.equal(copy.detach()[:, 1:], leaf.grad[:, 1:])
    plain = whole[:, 1:].contiguous().requires_grad_()
    fusedpo.exact_kl(plain, batch["ref"], **options).loss.backward()
    assert torch.equal(plain.grad, leaf.grad[:, 1:])
    packed = plain.detach().reshape(B * T, V).requires_grad_()
    out = fusedpo.exact_kl(packed, batch["ref"].reshape(B * T, V), cu_seqlens=cu_seqlens, **options)
    per_sequence = [out.kl[a:b].sum() for a, b in ((0, 4), (4, B * T))]
    torch.testing.assert_close(out.loss.detach(), 2 * sum(per_sequence) / 2)


def test_small_divergences_are_as_exact_as_logprobs(by):
    """A policy close to its reference: 1e-6 nats beside entropies of 7, half a unit of which is 5e-7."""
    logits = torch.randn(4, 2048)
    ref = logits + 1e-3 * torch.randn(4, 2048)
    exact = kl_of(logits.double(), ref.double(), "reverse")
    kl = fusedpo.exact_kl(logits, ref).kl
    assert exact.max() < 1e-6
    torch.testing.assert_close(kl.double(), exact, rtol=0, atol=5e-7)


def test_columns_without_probability(by):
    check_columns()


def test_columns_without_probability_in_the_reference():
    with fusedpo.backend("reference"):
        check_columns()


def check_columns():
    logits = torch.tensor([[0.0, 1.0, -INF, 2.0]], requires_grad=True)
    ref = torch.tensor([[1.0, 0.0, -INF, 0.0]])
    for direction in ("reverse", "forward"):
        out = fusedpo.exact_kl(logits, ref, direction=direction)
        (gradient,) = torch.autograd.grad(out.loss, logits)
        wanted = kl_of(logits[:, [0, 1, 3]], ref[:, [0, 1, 3]], direction).detach()
        torch.testing.assert_close(out.kl, wanted, rtol=1e-5, atol=1e-6)
        assert gradient.isfinite().all()
        assert gradient[0, 2] == 0
    assert fusedpo.exact_kl(ref.new_zeros(1, 4), ref).kl.item() == INF
    for broken in (torch.full((1, 4), -INF), torch.tensor([[0.0, float("nan"), 0.0, 0.0]])):
        assert fusedpo.exact_kl(broken, ref.new_zeros(1, 4)).kl.isnan().all()
        assert fusedpo.exact_kl(ref.new_zeros(1, 4), broken).kl.isnan().all()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_from_hidden(direction, dtype):
    hidden, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((B, T, H), (V, H), (V,)))
    teacher, head = torch.randn(B, T, 2 * H, dtype=dtype), torch.randn(V, 2 * H, dtype=dtype)
    mask = torch.rand(B, T) > 0.3
    exact = [x.double().clone().requires_grad_() for x in (hidden, weight, bias)]
    logits = 3 * torch.tanh((exact[0] @ exact[1].t() + exact[2]) * 0.7 / 3)
    kl = kl_of(logits / 1.3, teacher.double() @ head.double().t() / 1.3, direction)
    loss = kl[mask].mean()
    loss.backward()
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    for chunk in (None, 4):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        out = fusedpo.exact_kl_from_hidden(
            leaves[0],
            leaves[1],
            teacher,
            head,
            bias=leaves[2],
            softcap=3.0,
            logit_scale=0.7,
            chunk_tokens=chunk,
            direction=direction,
            temperature=1.3,
            mask=mask,
        )
        out.loss.backward()
        torch.testing.assert_close(out.loss.double(), loss.detach(), rtol=tolerance, atol=0)
        for leaf, want in zip(leaves, exact, strict=True):
            torch.testing.assert_close(leaf.grad.double(), want.grad, rtol=tolerance, atol=tolerance / 100)


def test_a_term_of_another_loss(batch):
    """OREO's policy loss with its penalty; one backward through both."""
    logits = batch["logits"].requires_grad_()
    ids = torch.randint(0, V, (B, T))
    lp, ref_lp = (fusedpo.token_logprobs(x, ids) for x in (logits, batch["ref"]))
    oreo = fusedpo.oreo_loss(lp, ref_lp, torch.zeros(B, T), torch.ones(B), beta=0.03)
    kl = fusedpo.exact_kl(logits, batch["ref"])
    (oreo.policy_loss + 0.01 * kl.loss).backward()
    parts = [
        torch.autograd.grad(x, logits)[0]
        for x in (
            fusedpo.oreo_loss(fusedpo.token_logprobs(logits, ids), ref_lp, torch.zeros(B, T), torch.ones(B), beta=0.03)[
                0
            ],
            fusedpo.exact_kl(logits, batch["ref"]).loss,
        )
    ]
    torch.testing.assert_close(logits.grad, parts[0] + 0.01 * parts[1])


def test_the_estimators_estimate_it(batch):
    """k1 weighted by the probability of every token is the divergence."""
    rows = torch.arange(V).expand(1, V)
    logits, ref = (batch[name][0, :1].expand(V, -1)[None] for name in ("logits", "ref"))
    lp, ref_lp = (fusedpo.token_logprobs(x, rows) for x in (logits, ref))
    k1 = fusedpo.policy_loss(
        lp, lp, torch.zeros_like(lp), objective=O.reinforce(kl=O.KL("k1", 1.0)), ref_logprobs=ref_lp, reduction="none"
    ).loss
    torch.testing.assert_close((lp.exp() * k1).sum(), fusedpo.exact_kl(logits, ref).kl[0, 0])


@native
@pytest.mark.parametrize("forward", [False, True])
def test_opcheck(batch, forward):
    rows = (torch.tensor(0.7), batch["temperature"], batch["mask"], torch.rand(B, T), forward)
    for gradient in (False, True):
        torch.library.opcheck(torch.ops.fusedpo.exact_kl.native, (batch["logits"], batch["ref"], *rows, gradient))
    for out in (None, torch.empty(B, T, V)):
        torch.library.opcheck(torch.ops.fusedpo.exact_kl_out.native, (batch["logits"], batch["ref"], *rows, out))


@pytest.mark.parametrize(
    "backend", [pytest.param("native", marks=native), pytest.param("triton", marks=pytest.mark.triton)]
)
def test_the_gradient_may_overwrite_the_logits_alone(batch, backend):
    operator = getattr(torch.ops.fusedpo.exact_kl_out, backend)
    logits, ref = batch["logits"], batch["ref"]
    rows = (torch.tensor(1.0), torch.tensor(1.0), None, torch.rand(B, T), False)
    before, elsewhere, of_itself = ref.clone(), torch.empty(T, B, V).transpose(0, 1), logits.clone()
    with pytest.raises(ValueError, match="out must not be ref_logits"):
        operator(logits, ref, *rows, ref)
    assert torch.equal(ref, before)
    assert (operator(of_itself, of_itself, *rows, of_itself) == 0).all()
    kl, other = operator(logits, ref, *rows, elsewhere), operator(logits, ref, *rows, logits)
    assert torch.equal(kl, other)
    assert torch.equal(elsewhere, logits)


@native
def test_a_row_gives_the_same_bits_in_any_batch():
    logits, ref = torch.randn(7, 3001), torch.randn(7, 3001)
    whole = fusedpo.exact_kl(logits, ref).kl
    assert torch.equal(fusedpo.exact_kl(logits[3:4], ref[3:4]).kl, whole[3:4])
    exact = kl_of(logits.double(), ref.double(), "reverse")
    torch.testing.assert_close(whole.double(), exact, rtol=1e-6, atol=1e-6)


def test_once_and_compiled(batch):
    logits = batch["logits"].requires_grad_()
    out = fusedpo.exact_kl(logits, batch["ref"])
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        out.loss.backward()

    def loss(logits):
        return fusedpo.exact_kl(logits, batch["ref"], mask=batch["mask"]).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(logits), logits)[0] for f in (loss, compiled)))


@pytest.mark.parametrize(
    "change",
    [
        {"direction": "backward"},
        {"temperature": 0.0},
        {"temperature": torch.tensor(-1.0)},
        {"mask": torch.ones(2)},
        {"ref_logits": torch.zeros(1, 2, 3)},
        {"denominator": -1.0},
        {"length_norm": 3.0},
        {"logits": torch.zeros(3)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_errors(change):
    given = {"logits": torch.zeros(1, 2, 4), "ref_logits": torch.zeros(1, 2, 4), **change}
    if "logits" in change:
        given["ref_logits"] = change["logits"]
    with pytest.raises(ValueError, match="|".join(change)):
        fusedpo.exact_kl(given.pop("logits"), given.pop("ref_logits"), **given)


@pytest.mark.parametrize("way", ["grad", "backward"])
def test_second_derivatives_raise(way):
    """Of the losses whose gradients are computed with them: a second backward would lose terms."""
    ids, ref = torch.randint(9, (4, 5)), -torch.rand(4, 5)
    dpo = fusedpo.objectives.dpo()
    losses = {
        "exact_kl": lambda x: fusedpo.exact_kl(x, torch.randn(4, 5, 9)).loss,
        "preference": lambda x: fusedpo.preference_loss_from_hidden(x, torch.randn(9, 9), ids, ref, objective=dpo).loss,
    }
    with fusedpo.backend("native" if fusedpo.backends.NATIVE_MISSING is None else "auto"):
        for loss in losses.values():
            leaf = torch.randn(4, 5, 9, requires_grad=True)
            (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
            penalty = (gradient**2).sum() + (leaf**2).sum()
            if fusedpo.backends.NATIVE_MISSING is None:
                with pytest.raises(RuntimeError, match="double backward"):
                    torch.autograd.grad(penalty, leaf) if way == "grad" else penalty.backward()


@pytest.fixture
def reference_raises(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(fusedpo.reference, "exact_kl", refuse)


@native
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_float16_gradients_are_scaled_before_they_are_rounded(batch, direction, reference_raises):
    """A GradScaler's factor comes with the backward; without it most of the gradient is below what float16 holds."""
    factor, divisor = 2.0**20, 2.0**20
    logits, ref = batch["logits"].half(), batch["ref"].half()
    options = {"direction": direction, "mask": batch["mask"], "aggregation": "token-sum"}
    exact = logits.double().requires_grad_()
    kl = kl_of(exact, ref.double(), direction) * batch["mask"]
    kl.sum().backward()
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        out = fusedpo.exact_kl(leaf * 1, ref, inplace=inplace, loss_scale=1 / divisor, **options)
        (out.loss * factor).backward()
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(out.kl.double(), kl.detach(), rtol=1e-5, atol=1e-6)
    out = fusedpo.exact_kl(leaf * 1, ref, inplace=True)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        out.loss.backward()


@pytest.mark.triton
def test_float16_from_hidden_on_kernels_that_multiply_in_float16(batch, reference_raises, monkeypatch):
    """As on a GPU: products and logits in float16, the gradient computed in the backward, once scaled."""
    monkeypatch.setattr("fusedpo.ops.hidden.compute_dtype", lambda hidden: hidden.dtype)
    hidden, weight, head = torch.randn(B, T, H).half(), torch.randn(V, H).half(), torch.randn(V, H).half()
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    kl = kl_of(exact[0] @ exact[1].t(), hidden.double() @ head.double().t(), "reverse")
    kl[batch["mask"]].sum().backward()
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    with fusedpo.backend("triton"):
        out = fusedpo.exact_kl_from_hidden(
            *leaves, hidden, head, mask=batch["mask"], aggregation="token-sum", loss_scale=2.0**-20, chunk_tokens=4
        )
        (out.loss * 2.0**20).backward()
    for leaf, want in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.double(), want.grad, rtol=2e-2, atol=2e-2)


@native
def test_compiled_graphs_hold_the_kernel(batch, reference_raises):
    logits, mask = batch["logits"].requires_grad_(), batch["mask"]
    hidden, weight, head = torch.randn(B, T, H, requires_grad=True), torch.randn(V, H), torch.randn(V, H)

    def loss(logits, hidden):
        options = {"mask": mask, "aggregation": "seq-mean-token-mean", "temperature": 0.8}
        one = fusedpo.exact_kl(logits, batch["ref"], direction="forward", **options)
        return one.loss + 2 * fusedpo.exact_kl_from_hidden(hidden, weight, hidden.detach(), head, **options).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = (torch.autograd.grad(f(logits, hidden), (logits, hidden)) for f in (loss, compiled))
    torch.testing.assert_close(found, expected)
