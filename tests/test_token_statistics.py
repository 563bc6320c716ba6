"""Statistics of rows in the pass of log-prob and entropy: against float64, on every path."""

from __future__ import annotations

import pytest
import torch

import fusedpo
from fusedpo import backends

native = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
INF = float("inf")


@pytest.fixture(
    params=["reference", pytest.param("native", marks=native), pytest.param("triton", marks=pytest.mark.triton)]
)
def by(request):
    with fusedpo.backend(request.param):
        yield request.param


def truth(logits, ids, temperature):
    """In float64; differentiable where the logits are."""
    z = logits.double() / temperature.double()[..., None]
    logp = z.log_softmax(-1)
    first = (z == z.amax(-1, keepdim=True)).int().argmax(-1)
    return (
        logp.gather(-1, ids[..., None]).squeeze(-1),
        -(logp.exp() * logp).sum(-1),
        (2 * logp).logsumexp(-1),
        z.mean(-1),
        first == ids,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 53, 9001])
def test_against_float64(by, dtype, vocab):
    logits = (4 * torch.randn(3, 5, vocab)).to(dtype)
    ids = torch.randint(0, vocab, (3, 5))
    ids[0] = logits[0].argmax(-1)
    mask, temperature = torch.rand(3, 5) > 0.3, torch.rand(3, 5) + 0.5
    mask[0, 0] = True
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    dirty = leaf.masked_fill(~mask[..., None], float("nan"))
    found = fusedpo.token_statistics(dirty, ids.masked_fill(~mask, -100), temperature=temperature, mask=mask)
    wanted = truth(exact, ids, temperature)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), want.double() * mask, rtol=1e-5, atol=3e-6)
    assert found.is_top1.dtype == torch.bool
    assert found.is_top1[0, 0]
    assert [x.requires_grad for x in found] == [True, True, False, False, False]
    upstream = [torch.randn(3, 5) for _ in range(2)]
    torch.autograd.backward(found[:2], upstream)
    torch.autograd.backward(wanted[:2], [g.double() * mask for g in upstream])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=tolerance, atol=tolerance / 10)


def test_ties_extremes_and_rows_without_a_distribution(by):
    """Of several largest logits the first; a sum of squares beside a dominant logit; NaN wherever the log-prob is."""
    V = 9000  # more than a block, so that ties and jumps lie across blocks
    rows = torch.zeros(8, V)
    ids = torch.tensor([10, 8000, 10, 4, 7, 7, 7, 7])
    rows[0, [10, 8000]] = rows[1, [10, 8000]] = 3.0
    rows[2] = torch.linspace(-60, 60, V)  # the reference moves again and again
    rows[3, 4] = 20.0  # what is beside the 1 must keep its digits
    rows[4, 5:9] = -INF
    rows[5] = -INF
    rows[6, 3] = float("nan")
    rows[7, 3] = INF
    found = fusedpo.token_statistics(rows, ids)
    assert found.is_top1.tolist() == [True, False, False, True, False, False, False, False]
    wanted = truth(rows[:4], ids[:4], torch.ones(4))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got[:4].double(), want.double(), rtol=1e-5, atol=3e-6)
    if by != "reference":  # whose log-softmax is rounded to the digits of the largest logit
        torch.testing.assert_close(found.log_sum_sq_probs[3].double(), wanted[2][3], rtol=1e-5, atol=0)
    assert found.mean_logits[4] == -INF
    assert found.log_sum_sq_probs[4].isfinite()
    assert found.log_sum_sq_probs[5:].isnan().all()
    assert found.logprobs[5:].isnan().all()


def test_the_same_bits_as_token_logprobs_in_any_batch(by):
    logits, ids = torch.randn(6, 5003).mul_(5).bfloat16(), torch.randint(0, 5003, (6,))
    found = fusedpo.token_statistics(logits, ids)
    if by == "native":
        for ours, same in zip(found, fusedpo.token_logprobs(logits, ids, return_entropy=True), strict=False):
            assert torch.equal(ours, same)
    alone = fusedpo.token_statistics(logits[3:4], ids[3:4])
    assert all(torch.equal(x[3:4], y) for x, y in zip(found, alone, strict=True))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_from_hidden(dtype, softcap):
    hidden, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((3, 5, 8), (53, 8), (53,)))
    ids, mask, temperature = torch.randint(0, 53, (3, 5)), torch.rand(3, 5) > 0.3, torch.rand(3, 5) + 0.5
    exact = [x.double().clone().requires_grad_() for x in (hidden, weight, bias)]
    logits = 0.7 * (exact[0] @ exact[1].t() + exact[2])
    wanted = truth(logits if softcap is None else softcap * torch.tanh(logits / softcap), ids, temperature)
    upstream = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.autograd.backward(wanted[:2], list((upstream * mask).unbind()))
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for chunk in (None, 4):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        options = {"softcap": softcap, "logit_scale": 0.7, "chunk_tokens": chunk, "bias": leaves[2]}
        found = fusedpo.linear_token_statistics(
            *leaves[:2], ids.masked_fill(~mask, -100), temperature=temperature, mask=mask, **options
        )
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got.double(), want.double() * mask, rtol=tolerance, atol=tolerance)
        torch.autograd.backward(found[:2], [g.to(dtype) for g in upstream])
        for leaf, want in zip(leaves, exact, strict=True):
            torch.testing.assert_close(leaf.grad.double(), want.grad, rtol=tolerance, atol=10 * tolerance)
    assert [x.shape for x in fusedpo.linear_token_statistics(hidden[:0], weight, ids[:0])] == [(0, 5)] * 5


def test_the_optimal_token_baseline_of_logits():
    logits, ids = torch.randn(4, 5, 53), torch.randint(0, 53, (4, 5))
    mask = torch.rand(4, 5) > 0.3
    rewards = torch.rand(4, 5) * mask
    logp = (logits.double() / 0.7).log_softmax(-1)
    given = {
        "old_logprobs": logp.gather(-1, ids[..., None]).squeeze(-1),
        "sum_pi_squared": logp.exp().square().sum(-1),
    }
    options = {"mask": mask, "group_size": 4}
    baseline = fusedpo.advantages.optimal_token_baseline
    found = baseline(rewards, logits=logits.requires_grad_(), token_ids=ids, temperature=0.7, **options)
    torch.testing.assert_close(found, baseline(rewards, **given, **options).float())
    assert not found.requires_grad
    for wrong in ({}, {"logits": logits}, {"token_ids": ids, **given}, {"logits": logits, "token_ids": ids, **given}):
        with pytest.raises(ValueError, match="logits"):
            baseline(rewards, **wrong, **options)
    with pytest.raises(ValueError, match="token_ids must have shape"):
        baseline(rewards, logits=logits, token_ids=ids[:1], **options)


@native
def test_one_read_of_the_logits():
    """One operator, once: no sweep of its own for any of the statistics."""
    logits, ids = torch.randn(4, 300, requires_grad=True), torch.randint(0, 300, (4,))
    with torch.profiler.profile() as profile:
        fusedpo.token_statistics(logits, ids)
    names = [event.name for event in profile.events()]
    assert [name for name in names if name.startswith("fusedpo::")] == ["fusedpo::token_statistics"]
    assert not {"aten::argmax", "aten::mean", "aten::sum", "aten::max"} & set(names)


@native
def test_opcheck_compile_and_in_place():
    logits, ids = torch.randn(3, 5, 53), torch.randint(0, 53, (3, 5))
    mask = torch.rand(3, 5) > 0.3
    torch.library.opcheck(torch.ops.fusedpo.token_statistics.native, (logits, ids, torch.tensor(0.7), mask))
    torch.library.opcheck(torch.ops.fusedpo.token_statistics.native, (logits, ids, torch.rand(3, 5) + 0.5, None))

    def loss(x, **options):
        found = fusedpo.token_statistics(x, ids, mask=mask, **options)
        return (found.logprobs + found.entropy * found.is_top1 + found.log_sum_sq_probs * found.logprobs).sum()

    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], expected)
    copy = leaf * 1
    (gradient,) = torch.autograd.grad(loss(copy, inplace_backward=True), copy)
    assert gradient.data_ptr() == copy.data_ptr()
    assert torch.equal(gradient, expected)
    hidden, weight = torch.randn(3, 5, 8, requires_grad=True), torch.randn(53, 8)

    def of_hidden(x):
        return fusedpo.linear_token_statistics(x, weight, ids, mask=mask).logprobs.sum()

    compiled = torch.compile(of_hidden, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(hidden), hidden)[0] for f in (of_hidden, compiled)))


@pytest.mark.parametrize(
    ("ids", "temperature", "message"),
    [
        (torch.zeros(2, 3, 2, dtype=torch.long), 1.0, r"token_ids must have shape \[2, 3\]"),
        (torch.full((2, 3), 9), 1.0, r"token_ids must be in \[0, 9\)"),
        (torch.full((2, 3), -1), 1.0, r"token_ids must be in \[0, 9\)"),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3), "temperature must be positive"),
    ],
)
def test_errors(by, ids, temperature, message):
    with pytest.raises(ValueError, match=message):
        fusedpo.token_statistics(torch.zeros(2, 3, 9), ids, temperature=temperature)
    with pytest.raises(ValueError, match=message):
        fusedpo.linear_token_statistics(torch.zeros(2, 3, 4), torch.zeros(9, 4), ids, temperature=temperature)
