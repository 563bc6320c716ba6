"""The reference of layer 1 against plain Python in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from fusedpo import reference

INF, NAN = math.inf, math.nan


def row_logprobs(row, temperature=1.0):
    """log_softmax of one row, and its entropy, in plain Python."""
    x = [v / temperature for v in row]
    top = max(x)
    log_sum = top + math.log(math.fsum(math.exp(v - top) for v in x))
    logp = [v - log_sum for v in x]
    return logp, -math.fsum(math.exp(v) * v for v in logp if v > -INF)


def random_logits(*shape, seed=0, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def random_ids(*shape, vocab, seed=1, dtype=torch.int64):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -------------------------------------------------------------------------------------------------- from logits: values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.6, torch.tensor(1.7), "per row"])
def test_values(dtype, temperature):
    logits = random_logits(3, 4, 7, dtype=dtype)
    ids = random_ids(3, 4, vocab=7, dtype=torch.int32)
    if isinstance(temperature, str):
        temperature = torch.linspace(0.5, 2.0, 12).reshape(3, 4)
    logp, entropy = reference.token_logprobs(logits, ids, temperature=temperature, return_entropy=True)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    assert logp.dtype == entropy.dtype == result
    assert logp.shape == entropy.shape == (3, 4)
    # a handful of roundings of numbers below 20
    tolerance = 100 * torch.finfo(result).eps
    temperatures = torch.as_tensor(temperature, dtype=result).expand(3, 4)
    for b in range(3):
        for t in range(4):
            expected, expected_entropy = row_logprobs(logits[b, t].tolist(), temperatures[b, t].item())
            assert logp[b, t].item() == pytest.approx(expected[ids[b, t]], abs=tolerance)
            assert entropy[b, t].item() == pytest.approx(expected_entropy, abs=tolerance)
    alone = reference.token_logprobs(logits, ids, temperature=temperature)
    assert torch.equal(alone, logp)


@pytest.mark.parametrize("rows", [(), (5,), (2, 3)])
def test_several_ids_per_row(rows):
    logits, ids = random_logits(*rows, 6), random_ids(*rows, 4, vocab=6)
    logp = reference.token_logprobs(logits, ids)
    assert logp.shape == ids.shape
    for k in range(4):
        assert torch.equal(logp[..., k], reference.token_logprobs(logits, ids[..., k]))


@pytest.mark.parametrize("rows", [(0,), (0, 3), (2, 0)])
def test_no_rows(rows):
    logits = torch.zeros(*rows, 5, requires_grad=True)
    logp, entropy = reference.token_logprobs(logits, torch.zeros(rows, dtype=torch.int64), return_entropy=True)
    assert logp.shape == entropy.shape == rows
    (logp.sum() + entropy.sum()).backward()
    assert logits.grad.shape == logits.shape


def test_logits_are_left_alone():
    logits = random_logits(4, 5)
    before, version = logits.clone(), logits._version
    reference.token_logprobs(logits, random_ids(4, vocab=5), temperature=0.5, mask=torch.tensor([1, 0, 1, 1]))
    assert torch.equal(logits, before)
    assert logits._version == version


# ------------------------------------------------------------------------------------------ from logits: special values


def test_columns_at_minus_infinity_do_not_exist():
    logits = random_logits(6, 8)
    columns = [0, 3, 7]
    logits[:, columns] = -INF
    others = [c for c in range(8) if c not in columns]
    logits.requires_grad_()
    smaller = logits.detach()[:, others].requires_grad_()
    ids = random_ids(6, vocab=len(others))
    upstream = random_logits(2, 6, seed=3)

    results = reference.token_logprobs(logits, torch.tensor(others)[ids], return_entropy=True)
    expected = reference.token_logprobs(smaller, ids, return_entropy=True)
    torch.autograd.backward(results, tuple(upstream))
    torch.autograd.backward(expected, tuple(upstream))
    torch.testing.assert_close(results, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(logits.grad[:, others], smaller.grad, rtol=1e-13, atol=1e-14)
    assert torch.equal(logits.grad[:, columns], torch.zeros(6, 3, dtype=torch.float64))


def test_chosen_token_at_minus_infinity():
    logits = random_logits(2, 4)
    logits[0, 1] = -INF
    logits.requires_grad_()
    logp = reference.token_logprobs(logits, torch.tensor([1, 1]))
    assert logp[0].item() == -INF
    assert logp[1].isfinite()
    logp.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 1].item() == 1.0


@pytest.mark.parametrize("row", [[NAN, 0.0, 1.0], [INF, 0.0, 1.0], [-INF, -INF, -INF]])
def test_rows_without_a_distribution_give_nan(row):
    logits = random_logits(3, 3)
    clean = reference.token_logprobs(logits, torch.tensor([0, 1, 2]), return_entropy=True)
    logits[1] = torch.tensor(row)
    results = reference.token_logprobs(logits, torch.tensor([0, 1, 2]), return_entropy=True)
    for result, expected in zip(results, clean, strict=True):
        assert result[1].isnan()
        assert torch.equal(result[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("several", [False, True])
def test_masked_rows_are_not_read(mask_dtype, several):
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]]).to(mask_dtype)
    masked = mask == 0
    logits, ids = random_logits(2, 3, 5), random_ids(*((2, 3, 2) if several else (2, 3)), vocab=5)
    temperature = torch.full((2, 3), 0.7)
    clean = logits.clone().requires_grad_()
    expected = reference.token_logprobs(clean, ids, temperature=temperature, return_entropy=True)
    upstream = [
        random_logits(*e.shape, seed=4).masked_fill(masked.reshape(2, 3, *[1] * (e.dim() - 2)), 0) for e in expected
    ]
    torch.autograd.backward(expected, upstream)

    logits[0, 1], logits[1, 0] = NAN, torch.tensor([INF, -INF, NAN, 0.0, 1.0])
    logits.requires_grad_()
    results = reference.token_logprobs(
        logits,
        ids.masked_fill(masked.reshape(2, 3, *[1] * (ids.dim() - 2)), -100),
        temperature=temperature.masked_fill(masked, NAN),
        mask=mask,
        return_entropy=True,
    )
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result[~masked], value[~masked])
        assert not result[masked].any()
    torch.autograd.backward(results, [torch.ones_like(u).where(u == 0, u) for u in upstream])
    assert torch.equal(logits.grad, clean.grad)


# ----------------------------------------------------------------------------------------------- from logits: gradients


@pytest.mark.parametrize("several", [False, True])
def test_gradcheck(several):
    logits = random_logits(2, 3, 5).requires_grad_()
    ids = random_ids(*((2, 3, 2) if several else (2, 3)), vocab=5)
    temperature = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).reshape(2, 3)
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])

    def logprobs(x):
        return reference.token_logprobs(x, ids, temperature=temperature, mask=mask, return_entropy=True)

    assert gradcheck(logprobs, (logits,))


@pytest.mark.parametrize("p", [0.5, 0.9, 0.999, 1 - 1e-6])
def test_gradient_at_confident_tokens(p):
    logits = torch.tensor([[math.log(p), math.log1p(-p)]], dtype=torch.float32, requires_grad=True)
    reference.token_logprobs(logits, torch.tensor([0])).sum().backward()
    exact = torch.softmax(logits.detach().double(), -1)[0, 1].item()
    # 1 - p from a float32 p: one rounding at 1
    assert logits.grad[0, 0].item() == pytest.approx(exact, abs=1.2e-7)
    assert logits.grad[0, 1].item() == pytest.approx(-exact, rel=1e-5)


# --------------------------------------------------------------------------------------------------- from hidden states


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.25])
@pytest.mark.parametrize("temperature", [1.0, "per row"])
def test_linear_values(bias, softcap, logit_scale, temperature):
    hidden, weight, ids = random_logits(2, 3, 4), random_logits(6, 4, seed=2), random_ids(2, 3, vocab=6)
    bias = random_logits(6, seed=5) if bias else None
    per_row = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).reshape(2, 3)
    temperature = per_row if temperature == "per row" else temperature
    logp, entropy = reference.linear_token_logprobs(
        hidden,
        weight,
        ids,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        return_entropy=True,
    )
    for b in range(2):
        for t in range(3):
            row = []
            for v in range(6):
                x = math.fsum(hidden[b, t, h].item() * weight[v, h].item() for h in range(4))
                x = logit_scale * (x + (0.0 if bias is None else bias[v].item()))
                row.append(x if softcap is None else softcap * math.tanh(x / softcap))
            expected, expected_entropy = row_logprobs(row, torch.as_tensor(temperature).expand(2, 3)[b, t].item())
            assert logp[b, t].item() == pytest.approx(expected[ids[b, t]], abs=1e-12)
            assert entropy[b, t].item() == pytest.approx(expected_entropy, abs=1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 4, 6, 100])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("return_entropy", [False, True])
def test_chunks_do_not_change_the_result(chunk_tokens, several, return_entropy):
    inputs = [random_logits(2, 3, 4), random_logits(6, 4, seed=2), random_logits(6, seed=5)]
    ids = random_ids(*((2, 3, 2) if several else (2, 3)), vocab=6)
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])

    def run(chunk_tokens):
        hidden, weight, bias = leaves = [x.clone().requires_grad_() for x in inputs]
        results = reference.linear_token_logprobs(
            hidden,
            weight,
            ids,
            bias=bias,
            softcap=5.0,
            temperature=torch.linspace(0.5, 2.0, 6).reshape(2, 3),
            mask=mask,
            return_entropy=return_entropy,
            chunk_tokens=chunk_tokens,
        )
        results = results if return_entropy else (results,)
        torch.autograd.backward(results, [random_logits(*r.shape, seed=7) for r in results])
        return results, [x.grad for x in leaves]

    # the shape of a matrix product may change the order of its sums
    torch.testing.assert_close(run(chunk_tokens), run(None), rtol=1e-12, atol=1e-12)


def test_chunks_keep_no_logits():
    hidden, weight = torch.randn(12, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    ids = random_ids(12, vocab=50)

    def largest_saved(chunk_tokens):
        sizes = [0]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            reference.linear_token_logprobs(hidden, weight, ids, chunk_tokens=chunk_tokens, return_entropy=True)
        return max(sizes)

    assert largest_saved(None) == 12 * 50
    assert largest_saved(3) <= max(hidden.numel(), weight.numel())


def test_product_is_in_the_dtype_of_the_weight():
    hidden, weight = random_logits(3, 64, dtype=torch.bfloat16), random_logits(7, 64, dtype=torch.bfloat16, scale=0.2)
    ids = random_ids(3, vocab=7)
    logp, entropy = reference.linear_token_logprobs(hidden, weight, ids, return_entropy=True)
    assert logp.dtype == entropy.dtype == torch.float32
    assert torch.equal(logp, reference.token_logprobs(hidden @ weight.T, ids))


def test_masked_hidden_states_reach_no_gradient():
    hidden, weight, ids = random_logits(4, 3), random_logits(5, 3, seed=2), random_ids(4, vocab=5)
    mask = torch.tensor([True, False, True, False])

    both = {"return_entropy": True}

    def gradients(hidden):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        logp, entropy = reference.linear_token_logprobs(*leaves, ids.masked_fill(~mask, -100), mask=mask, **both)
        assert not logp[~mask].any()
        assert not entropy[~mask].any()
        (logp.sum() + entropy.sum()).backward()
        return [x.grad for x in leaves]

    clean = gradients(hidden)
    hidden[1], hidden[3] = NAN, INF
    for gradient, expected in zip(gradients(hidden), clean, strict=True):
        assert torch.equal(gradient, expected)


def test_linear_gradcheck():
    inputs = [x.requires_grad_() for x in (random_logits(3, 2), random_logits(4, 2, seed=2), random_logits(4, seed=5))]
    ids = random_ids(3, vocab=4)

    def logprobs(hidden, weight, bias):
        return reference.linear_token_logprobs(
            hidden,
            weight,
            ids,
            bias=bias,
            softcap=4.0,
            logit_scale=0.5,
            temperature=0.7,
            chunk_tokens=2,
            return_entropy=True,
        )

    assert gradcheck(logprobs, inputs)


@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_linear_without_rows(chunk_tokens):
    hidden, weight = torch.zeros(0, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    logp, entropy = reference.linear_token_logprobs(
        hidden,
        weight,
        torch.zeros(0, dtype=torch.int64),
        chunk_tokens=chunk_tokens,
        return_entropy=True,
    )
    (logp.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, 3)
    assert torch.equal(weight.grad, torch.zeros(5, 3))


# ---------------------------------------------------------------------------------------------------------- next tokens


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=5), masked=st.booleans(), row=st.booleans())
def test_next_tokens_packed(lengths, masked, row):
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    ids = torch.arange(100, 100 + total)
    mask = (ids % 3 != 0).to(torch.float32) if masked else None
    targets, target_mask = reference.next_tokens(
        ids[None] if row else ids, mask[None] if row and masked else mask, cu_seqlens
    )
    assert targets.shape == target_mask.shape == ((1, total) if row else (total,))
    expected, expected_mask = [], []
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        for t in range(start, start + length):
            last = t == start + length - 1
            expected.append(0 if last else 100 + t + 1)
            expected_mask.append(not last and (not masked or bool(mask[t + 1])))
    assert targets.reshape(-1).tolist() == expected
    assert target_mask.reshape(-1).tolist() == expected_mask
    assert target_mask.dtype == torch.bool


def test_next_tokens_padded_is_the_rolled_batch():
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]], dtype=torch.int32)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    targets, target_mask = reference.next_tokens(ids, mask)
    assert targets.tolist() == [[6, 7, 0], [9, 10, 0]]
    assert target_mask.tolist() == [[True, False, False], [True, True, False]]
    assert targets.dtype == torch.int32
    targets, target_mask = reference.next_tokens(ids.T)
    assert targets.tolist() == [[8, 0], [9, 0], [10, 0]]
    assert target_mask.tolist() == [[True, False]] * 3


def test_next_tokens_of_one_sequence():
    targets, target_mask = reference.next_tokens(torch.tensor([3, 4, 5]))
    assert targets.tolist() == [4, 5, 0]
    assert target_mask.tolist() == [True, True, False]


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_next_tokens_of_nothing(shape):
    targets, target_mask = reference.next_tokens(torch.zeros(shape, dtype=torch.int64))
    assert targets.shape == target_mask.shape == shape


def test_next_tokens_never_reads_another_sequence():
    ids, cu_seqlens = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 2, 2, 5])
    targets, mask = reference.next_tokens(ids, cu_seqlens=cu_seqlens)
    changed, changed_mask = reference.next_tokens(torch.tensor([1, 2, -7, 8, 9]), cu_seqlens=cu_seqlens)
    assert torch.equal(targets[:2], changed[:2])
    assert torch.equal(mask, changed_mask)


# -------------------------------------------------------------------------------------------------------------- tracing


def test_compiles_without_a_break():
    def logprobs(hidden, weight, ids, mask, cu_seqlens):
        ids, mask = reference.next_tokens(ids, mask, cu_seqlens)
        from_hidden = reference.linear_token_logprobs(
            hidden, weight, ids, mask=mask, temperature=0.5, return_entropy=True
        )
        from_logits = reference.token_logprobs(hidden @ weight.T, ids, mask=mask, temperature=0.5, return_entropy=True)
        return *from_hidden, *from_logits

    torch._dynamo.reset()
    compiled = torch.compile(logprobs, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        inputs = (
            random_logits(tokens, 3).requires_grad_(),
            random_logits(6, 3, seed=2).requires_grad_(),
            random_ids(tokens, vocab=6),
            random_ids(tokens, vocab=2),
            torch.tensor([0, 2, tokens]),
        )
        results, expected = compiled(*inputs), logprobs(*inputs)
        torch.testing.assert_close(results, expected)
        gradients = [torch.autograd.grad(sum(r.sum() for r in rs), inputs[:2]) for rs in (results, expected)]
        torch.testing.assert_close(*gradients)
