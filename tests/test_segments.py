"""Sums of log-probs over sequences and steps: values, gradients, layouts, precision, and what PyTorch asks of them."""

from __future__ import annotations

import pytest
import segments_oracle as oracle
import torch

import fusedpo
from fusedpo import segments as product

B, T, S = 4, 9, 3


@pytest.fixture
def batch():
    lp = -torch.rand(B, T, dtype=torch.float64) * 3
    mask = torch.rand(B, T) > 0.3
    mask[2] = False  # a sequence without tokens
    steps = torch.randint(-1, S, (B, T))
    steps[1][steps[1] == 1] = 0  # a step without tokens
    return {
        "lp": lp.requires_grad_(),
        "ref": -torch.rand(B, T, dtype=torch.float64) * 3,
        "weights": torch.rand(B, T, dtype=torch.float64) + 0.5,
        "mask": mask,
        "steps": steps,
    }


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_sums_and_their_gradient(batch, by_step, normalize, packed):
    lp, ref, weights, mask = (batch[name] for name in ("lp", "ref", "weights", "mask"))
    steps, number, cu_seqlens = (batch["steps"], S, None) if by_step else (None, None, None)
    if packed:
        cu_seqlens = torch.tensor([0, 5, 5, 20, B * T])
        lp, ref, weights, mask = (x.detach().reshape(-1) for x in (lp, ref, weights, mask))
        lp.requires_grad_()
        steps = None if steps is None else steps.reshape(-1)
    where = oracle.segments(lp.shape, mask, cu_seqlens, steps, number)
    expected = oracle.sums(lp, ref, where, weights)
    if normalize:
        expected = [z / max(len(tokens), 1) for z, tokens in zip(expected, where, strict=True)]
    expected = torch.stack(expected)

    dirty_ref, dirty_weights = (x.detach().masked_fill(~mask, float("nan")) for x in (ref, weights))
    dirty = lp.detach().masked_fill(~mask, float("nan")).requires_grad_()
    z = fusedpo.sequence_logprobs(
        dirty,
        ref_logprobs=dirty_ref,
        mask=mask,
        cu_seqlens=cu_seqlens,
        step_ids=steps,
        num_steps=number,
        token_weights=dirty_weights,
        normalize=normalize,
    )
    assert z.shape == ((4, S) if by_step else (4,))
    torch.testing.assert_close(z.flatten(), expected, rtol=1e-14, atol=1e-14)
    upstream = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, lp, upstream)
    (got,) = torch.autograd.grad(z, dirty, upstream.reshape(z.shape))
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-15)
    assert (got[~mask] == 0).all()


def test_the_number_of_steps_is_read_where_it_is_not_given(batch):
    z = fusedpo.sequence_logprobs(batch["lp"], mask=batch["mask"], step_ids=batch["steps"].int())
    given = fusedpo.sequence_logprobs(batch["lp"], mask=batch["mask"], step_ids=batch["steps"], num_steps=S + 2)
    assert z.shape == (B, S)
    assert torch.equal(given[:, :S], z)
    assert (given[:, S:] == 0).all()


def test_one_tree_per_segment_gives_the_sums_too(batch):
    """What accelerators compute."""
    ids, x = torch.randint(0, 7, (B * T,)), batch["lp"].detach().flatten()
    expected = x.new_zeros(8).index_add(0, ids, x)
    torch.testing.assert_close(product._sums_by_offsets(x, ids, 8, ascending=False), expected)
    ids, order = ids.sort()
    torch.testing.assert_close(product._sums_by_offsets(x[order], ids, 8, ascending=True), expected)


def test_differences_are_summed():
    """Where a policy stays close to its reference, the difference of two sums has lost most of its digits."""
    lp = -torch.rand(1, 1 << 16) * 5
    ref = lp + 1e-3 * torch.randn_like(lp)
    exact = (lp.double() - ref.double()).sum()
    z = fusedpo.sequence_logprobs(lp, ref_logprobs=ref)
    assert z.dtype == torch.float32
    assert abs(z.double() - exact) < 1e-7 * abs(exact)
    assert abs(lp.sum().double() - ref.sum().double() - exact) > 1e-5 * abs(exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_gradient_has_the_dtype_of_the_logprobs(dtype):
    lp = torch.randn(2, 5, dtype=dtype, requires_grad=True)
    z = fusedpo.sequence_logprobs(lp)
    assert z.dtype == torch.float32
    z.sum().backward()
    assert lp.grad.dtype == dtype


def test_a_batch_without_sequences():
    z = fusedpo.sequence_logprobs(torch.zeros(0, requires_grad=True), cu_seqlens=torch.tensor([0]))
    z.sum().backward()
    assert z.shape == (0,)


def test_opcheck_and_compile(batch):
    lp, ref, weights, mask, steps = (batch[name] for name in ("lp", "ref", "weights", "mask", "steps"))
    where = product.segments_of("lp", lp, lp, mask, None, steps, S)
    arguments = (lp.flatten().detach().requires_grad_(), ref.flatten(), weights.flatten(), where.ids, where.kept)
    torch.library.opcheck(torch.ops.fusedpo.segment_sums, (*arguments, where.number, where.ascending))

    def function(lp):
        options = {"ref_logprobs": ref, "mask": mask, "step_ids": steps, "num_steps": S, "normalize": True}
        return fusedpo.sequence_logprobs(lp, **options).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for f in (function, compiled):
        (gradient,) = torch.autograd.grad(f(lp), lp)
        f.result = gradient
    assert torch.equal(function.result, compiled.result)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logprobs": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "logprobs"),
        ({"ref_logprobs": torch.zeros(2, 4)}, ValueError, "ref_logprobs"),
        ({"token_weights": torch.zeros(3)}, ValueError, "token_weights"),
        ({"mask": torch.ones(2)}, ValueError, "mask"),
        ({"step_ids": torch.zeros(2, 3)}, TypeError, "step_ids"),
        ({"step_ids": torch.zeros(2, dtype=torch.int64)}, ValueError, "step_ids"),
        ({"num_steps": 2}, ValueError, "num_steps"),
        ({"step_ids": torch.full((2, 3), 2), "num_steps": 2}, ValueError, "step_ids"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"logprobs": torch.zeros(2, 3), **change}
    with pytest.raises(error, match=message):
        fusedpo.sequence_logprobs(arguments.pop("logprobs"), **arguments)
