"""What holds for every implementation of the policy loss: layouts, reductions, scales, dtypes and outputs."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.policy_loss import (
    AGGREGATIONS,
    COMBINATIONS,
    EMPTY,
    assert_same,
    every_combination,
    pack,
    random_batch,
    tolerance,
)

import fusedpo
from fusedpo import backends
from fusedpo import objectives as O
from fusedpo.reference import METRICS

native = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))


@pytest.fixture(autouse=True, scope="module", params=["reference", pytest.param("native", marks=native)])
def backend(request):
    with fusedpo.backend(request.param):
        yield request.param


# -------------------------------------------------------------------------------------------------------------- layouts


@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4), index=st.integers(0, len(COMBINATIONS) - 1))
@example(lengths=[0, 0, 2, 0], index=19)
def test_packed_is_padded(lengths, index):
    objective = COMBINATIONS[index]
    if objective.aggregation == "seq-mean-token-sum-norm":  # the padded width is not known to a packed batch
        objective = O.Objective(
            objective.ratio, objective.trust_region, aggregation=objective.aggregation, length_norm=9
        )
    padded = {
        k: x.float() if x.is_floating_point() else x for k, x in random_batch(len(lengths), 8, holes=False).items()
    }
    padded["mask"] &= torch.arange(8) < torch.tensor(lengths)[:, None]
    padded["mask"][:, 2] = False
    packed = pack(padded, lengths)
    row = {name: x if name == "cu_seqlens" else x[None] for name, x in packed.items()}

    def run(batch, reduction):
        lp = batch["logprobs"].clone().requires_grad_()
        loss = fusedpo.policy_loss(**batch | {"logprobs": lp}, objective=objective, reduction=reduction).loss
        return loss.detach(), *torch.autograd.grad(loss.sum(), lp)

    for reduction in ("mean", "none"):
        loss, gradient = run(padded, reduction)
        packed_loss, packed_gradient = run(packed, reduction)
        row_loss, row_gradient = run(row, reduction)
        inside = torch.arange(8) < torch.tensor(lengths)[:, None]
        assert_same(packed_gradient, gradient[inside])
        assert_same(packed_loss, loss if reduction == "mean" else loss[inside])
        assert torch.equal(packed_gradient, row_gradient[0])
        assert torch.equal(packed_loss.reshape(row_loss.shape), row_loss)


def test_one_dimension_is_one_sequence():
    batch = {name: x[0] for name, x in random_batch(2, 6).items()}
    for objective in (O.gspo(), O.nfpo(3), O.grpo(), O.dr_grpo()):
        alone = fusedpo.policy_loss(**batch, objective=objective).loss
        as_row = fusedpo.policy_loss(**{name: x[None] for name, x in batch.items()}, objective=objective).loss
        assert torch.equal(alone, as_row)


@pytest.mark.parametrize("name", ["advantages", "is_weights"])
def test_values_per_sequence_are_broadcast(name):
    batch = random_batch(3, 4)
    per_sequence = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    per_token = per_sequence[:, None].expand(3, 4)

    def tokens(batch, value):
        return fusedpo.policy_loss(**batch | {name: value}, objective=O.ppo(), reduction="none").loss

    expected = tokens(batch, per_token)
    assert torch.equal(tokens(batch, per_sequence), expected)
    assert torch.equal(tokens(batch, per_sequence[:, None]), expected)

    lengths = [4, 0, 3]
    packed = pack(batch, lengths)
    flat = torch.cat([per_token[b, :n] for b, n in enumerate(lengths)])
    for value in (per_sequence, flat[None]):
        assert torch.equal(tokens(packed, value), tokens(packed, flat))
    row = {k: x if k == "cu_seqlens" else x[None] for k, x in packed.items()}
    for value in (per_sequence, flat):
        assert torch.equal(tokens(row, value), tokens(row, flat[None]))


def test_as_many_packed_tokens_as_sequences_are_per_token():
    lp, cu_seqlens = torch.zeros(3), torch.tensor([0, 2, 3, 3])
    advantages = torch.tensor([1.0, 2.0, 3.0])
    loss = fusedpo.policy_loss(lp, None, advantages, objective=O.ppo(), cu_seqlens=cu_seqlens, reduction="none").loss
    assert loss.tolist() == [-1.0, -2.0, -3.0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_mask_dtypes(dtype):
    batch = random_batch()
    expected = fusedpo.policy_loss(**batch, objective=O.ppo()).loss
    mask = batch["mask"].to(dtype) * 3
    assert torch.equal(fusedpo.policy_loss(**batch | {"mask": mask}, objective=O.ppo()).loss, expected)


def test_strided_and_expanded_arrays():
    batch = random_batch(3, 5)
    expected = fusedpo.policy_loss(**batch, objective=O.nfpo(3, kl=O.KL("k3", 0.1))).loss
    strided = {name: x.T.contiguous().T for name, x in batch.items()}
    assert torch.equal(fusedpo.policy_loss(**strided, objective=O.nfpo(3, kl=O.KL("k3", 0.1))).loss, expected)


# ----------------------------------------------------------------------------------- reduction, denominator, loss_scale


@every_combination
def test_random_upstream_gradients_per_token(objective):
    batch = random_batch()
    upstream = torch.randn(3, 5, dtype=torch.float64)
    lp = batch["logprobs"].clone().requires_grad_()
    tokens = fusedpo.policy_loss(**batch | {"logprobs": lp}, objective=objective, reduction="none").loss
    assert tokens.shape == lp.shape
    assert not tokens[~batch["mask"]].any()
    (gradient,) = torch.autograd.grad(tokens, lp, upstream, retain_graph=True)
    expected = sum(
        upstream[b, t] * torch.autograd.grad(tokens[b, t], lp, retain_graph=True)[0] for b, t in batch["mask"].nonzero()
    )
    torch.testing.assert_close(gradient, expected, **tolerance(gradient))


@pytest.mark.parametrize("aggregation", [a for a in AGGREGATIONS if a != "token-sum"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_with_a_common_denominator_are_the_batch(aggregation, as_tensor):
    objective = O.Objective(O.ForwardTrace(3), kl=O.KL("k3", 0.1), aggregation=aggregation)
    batch = random_batch(5, 4)
    kept = batch["mask"]
    count = kept.sum() if aggregation == "token-mean" else kept.any(1).sum()
    denominator = count if as_tensor else count.item()
    lp = batch["logprobs"].clone().requires_grad_()
    whole = fusedpo.policy_loss(**batch | {"logprobs": lp}, objective=objective).loss
    (expected,) = torch.autograd.grad(whole, lp)

    total = 0.0
    for rows in (slice(0, 1), slice(1, 3), slice(3, 5)):
        micro = {name: x[rows] for name, x in (batch | {"logprobs": lp}).items()}
        loss = fusedpo.policy_loss(**micro, objective=objective, denominator=denominator).loss
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole, **tolerance(whole))
    torch.testing.assert_close(lp.grad, expected, **tolerance(expected))


def test_fractional_denominator():
    batch = random_batch()
    half = fusedpo.policy_loss(**batch, objective=O.grpo(), denominator=0.5).loss
    one = fusedpo.policy_loss(**batch, objective=O.grpo(), denominator=1.0).loss
    assert torch.equal(half, 2 * one)


@pytest.mark.parametrize("loss_scale", [0.25, 4, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_scale(loss_scale, reduction):
    batch = {name: x.float() if x.is_floating_point() else x for name, x in random_batch().items()}
    lp = batch["logprobs"].clone().requires_grad_()

    def run(**options):
        loss = fusedpo.policy_loss(**batch | {"logprobs": lp}, objective=O.nfpo(2), reduction=reduction, **options).loss
        return loss, *torch.autograd.grad(loss.sum(), lp)

    factor = float(loss_scale)
    loss, gradient = run()
    scaled, scaled_gradient = run(loss_scale=loss_scale)
    assert scaled.dtype == torch.float32
    assert torch.equal(scaled, factor * loss)
    assert torch.equal(scaled_gradient, factor * gradient)


# ---------------------------------------------------------------------------------------------------------------- empty

MASKED = [
    ((2, 3), None),
    ((3,), [0, 0, 2, 3]),
    ((2, 1), None),
    ((1, 2), [0, 1, 2]),
]


def from_logits(x, weight, ids, **options):
    return fusedpo.policy_loss_from_logits(x @ weight.T, ids, **options)


def from_logits_in_place(x, weight, ids, **options):
    return fusedpo.policy_loss_from_logits(x @ weight.T, ids, inplace=True, **options)


@pytest.mark.parametrize("function", [from_logits, from_logits_in_place, fusedpo.policy_loss_from_hidden])
@pytest.mark.parametrize("objective", [O.nfpo(3, kl=O.KL("k3", 0.1), entropy_coef=0.1), O.dapo(), O.gspo()], ids=str)
@pytest.mark.parametrize(
    ("shape", "cu_seqlens", "masked"), [*((*row, False) for row in EMPTY), *((*row, True) for row in EMPTY + MASKED)]
)
def test_nothing_to_learn_from_is_a_connected_zero(function, objective, shape, cu_seqlens, masked):
    x, weight = torch.randn(*shape, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    per_token = torch.full(shape, torch.nan)
    out = function(
        x,
        weight,
        torch.full(shape, -100),
        old_logprobs=per_token,
        advantages=per_token,
        objective=objective,
        ref_logprobs=per_token,
        mask=torch.zeros(shape, dtype=torch.bool) if masked else None,
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens),
    )
    assert out.loss.item() == 0
    assert all(metric.item() == 0 for metric in out.metrics.values())
    for result in (out.logprobs, out.entropy):
        assert torch.equal(result, torch.zeros(shape))
    out.loss.backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("function", [from_logits, fusedpo.policy_loss_from_hidden])
@pytest.mark.parametrize(
    ("shape", "cu_seqlens"), [((2, 1), None), ((1,), None), ((3,), [0, 1, 2, 3]), ((1, 1), [0, 1])]
)
def test_a_single_token_predicts_nothing(function, shape, cu_seqlens):
    packed = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    ids, mask = fusedpo.next_tokens(torch.full(shape, 7), torch.ones(shape), packed)
    assert not mask.any()
    x, weight = torch.randn(*shape, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    advantages = torch.ones(shape)
    options = {"objective": O.nfpo(3), "mask": mask, "cu_seqlens": packed}
    out = function(x, weight, ids, old_logprobs=None, advantages=advantages, **options)
    assert out.loss.item() == 0
    out.loss.backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


# --------------------------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, backend):
    if backend == "native" and dtype == torch.float64:
        pytest.skip("kernels compute in float32")
    objective = O.nfpo(3, kl=O.KL("k3", 0.1), entropy_coef=0.1)
    batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in random_batch().items()}
    lp = batch["logprobs"].requires_grad_()
    out = fusedpo.policy_loss(**batch, objective=objective)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.loss.dtype == result
    assert {metric.dtype for metric in out.metrics.values()} == {result}
    out.loss.backward()
    assert lp.grad.dtype == dtype
    exact = {name: x.detach().double() if x.is_floating_point() else x for name, x in batch.items()}
    with fusedpo.backend("reference"):
        expected = fusedpo.policy_loss(**exact, objective=objective).loss
    # float32 arithmetic on the same, rounded, input
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_only_logprobs_and_a_used_entropy_get_a_gradient():
    batch = random_batch()
    leaves = {name: x.requires_grad_() for name, x in batch.items() if x.is_floating_point()}
    leaves["denominator"], leaves["loss_scale"] = (torch.tensor(2.0, requires_grad=True) for _ in range(2))
    objective = O.nfpo(3, differentiate=True, kl=O.KL("k3+", 0.1), entropy_coef=0.1)
    fusedpo.policy_loss(**batch | leaves, objective=objective).loss.backward()
    assert {name for name, x in leaves.items() if x.grad is not None} == {"logprobs", "entropy"}
    leaves["entropy"].grad = None
    out = fusedpo.policy_loss(**batch | leaves, objective=O.ppo())
    out.loss.backward()
    assert leaves["entropy"].grad is None


def test_output_is_detached_but_for_the_loss():
    batch = random_batch()
    lp, entropy = batch["logprobs"].requires_grad_(), batch["entropy"].requires_grad_()
    out = fusedpo.policy_loss(**batch, objective=O.nfpo(2, kl=O.KL("k1", 0.1), entropy_coef=0.1))
    assert isinstance(out, fusedpo.PolicyLossOutput)
    assert out.loss.requires_grad
    assert tuple(out.metrics) == METRICS
    assert all(metric.dim() == 0 and not metric.requires_grad for metric in out.metrics.values())
    assert torch.equal(out.logprobs, lp)
    assert torch.equal(out.entropy, entropy)
    assert not out.logprobs.requires_grad
    assert not out.entropy.requires_grad
    del batch["entropy"]
    assert fusedpo.policy_loss(**batch, objective=O.ppo()).entropy is None


def test_no_old_logprobs_is_on_policy():
    batch = random_batch()
    lp = batch["logprobs"].requires_grad_()
    for objective in (O.ppo(), O.nfpo(3), O.gspo(), O.cispo()):
        loss = fusedpo.policy_loss(**batch | {"old_logprobs": None}, objective=objective).loss
        expected = fusedpo.policy_loss(**batch | {"old_logprobs": lp.detach()}, objective=objective).loss
        assert torch.equal(loss, expected)
        assert torch.equal(*(torch.autograd.grad(x, lp)[0] for x in (loss, expected)))


def test_arguments_are_left_alone():
    batch = random_batch()
    before = {name: (x.clone(), x._version) for name, x in batch.items()}
    for objective in COMBINATIONS:
        fusedpo.policy_loss(**batch, objective=objective)
    for name, (value, version) in before.items():
        assert torch.equal(batch[name], value)
        assert batch[name]._version == version
