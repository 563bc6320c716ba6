"""The kernel of the policy loss: against the reference in float64; bits, windows, autograd, tracing."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import nfpo
from support import policy_loss as contract
from support.combinations import COMBINATIONS, operator_arguments
from support.cpu_builds import BUILDS, output_of
from support.parts import REGIONS
from support.policy_loss import AGGREGATIONS, INF, KLS, NAN, pack, random_batch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedpo
from fusedpo import objectives as O

pytestmark = pytest.mark.usefixtures("native")

TESTS = Path(__file__).parent
U = 2.0**-24  # the unit roundoff of float32


# ------------------------------------------------------------------------------------------------ against the reference


every_combination = pytest.mark.parametrize("objective", COMBINATIONS, ids=contract.name_of)


def run(batch, objective, upstream=None, dtype=torch.float32, **options):
    """Loss, gradients of log-probs and entropy, metrics."""
    backend = "native" if dtype == torch.float32 else "reference"
    batch = {name: x.to(dtype) if x.is_floating_point() and name != "mask" else x for name, x in batch.items()}
    leaves = {name: batch[name].clone().requires_grad_() for name in ("logprobs", "entropy") if name in batch}
    reduction = "mean" if upstream is None else "none"
    with fusedpo.backend(backend):
        out = fusedpo.policy_loss(**batch | leaves, objective=objective, reduction=reduction, **options)
    out.loss.backward(upstream if upstream is None else upstream.to(dtype))
    gradients = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    return [out.loss.detach(), *gradients, torch.stack(list(out.metrics.values()))]


def check(batch, objective, rtol=1e-5, **options):
    """float32 loses some 10 roundoffs per token; metrics and losses are sums of terms of both signs and of size 1."""
    upstream = torch.randn(batch["logprobs"].shape)
    for up in (None, upstream):
        results, expected = (run(batch, objective, up, dtype, **options) for dtype in (torch.float32, torch.float64))
        for result, value in zip(results, expected, strict=True):
            scale = value.abs().amax() if value.numel() else 0
            torch.testing.assert_close(result.double(), value, rtol=rtol, atol=float(2e-6 * scale + 1e-6))


def test_all_parts_take_part():
    assert {type(o.ratio) for o in COMBINATIONS} == set(O.RATIOS) == set(O.Ratio.__args__)
    assert {type(o.trust_region) for o in COMBINATIONS} == set(O.TRUST_REGIONS)
    assert set(O.TRUST_REGIONS) == set(O.TrustRegion.__args__)


@every_combination
def test_every_combination(objective):
    """Padded and packed by turns: that both have the same bits is another test."""
    i = COMBINATIONS.index(objective)
    packed = i // 12 % 2 == 1  # 12: what else takes turns
    batch = random_batch(4, 37, seed=i)
    batch["mask"] = batch["mask"].to([torch.bool, torch.int64, torch.float32, torch.uint8][i % 4])
    per_sequence = torch.randn(4)
    if packed:
        batch = pack(batch, [37, 0, 1, 20])
        batch["advantages"] = [batch["advantages"], per_sequence][i % 2]
        batch["is_weights"] = [batch["is_weights"], per_sequence.exp(), per_sequence.exp()[:, None]][i % 3]
    else:
        batch["advantages"] = [batch["advantages"], per_sequence, per_sequence[:, None]][i % 3]
        batch["is_weights"] = [per_sequence.exp(), batch["is_weights"]][i % 2]
    check(batch, objective)


@settings(max_examples=60)
@given(
    objective=st.sampled_from(COMBINATIONS),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    packed=st.booleans(),
    mask_dtype=st.sampled_from([torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32]),
    weights_of=st.tuples(*[st.sampled_from(["token", "sequence", "column"])] * 2),
    seed=st.integers(0, 99),
)
def test_any_layout(objective, lengths, packed, mask_dtype, weights_of, seed):
    count, width = len(lengths), max(1, *lengths)
    batch = random_batch(count, width, seed)
    inside = torch.arange(width) < torch.tensor(lengths)[:, None]
    batch["mask"] = (batch["mask"] & inside).to(mask_dtype)
    if packed:
        batch = pack(batch, lengths)
    for name, of in zip(("advantages", "is_weights"), weights_of, strict=True):
        if of != "token":
            batch[name] = torch.randn(count, 1)[:, 0 if of == "sequence" else slice(None)].exp()
    check(batch, objective)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_kl_entropy_and_aggregation(kl, aggregation, entropy_coef):
    objective = O.Objective(kl=kl, entropy_coef=entropy_coef, aggregation=aggregation)
    for batch in (random_batch(seed=1), pack(random_batch(seed=1), [5, 0, 3])):
        check(batch, objective, loss_scale=0.7)


@pytest.mark.parametrize("missing", ["mask", "entropy", "is_weights", "old_logprobs", "ref_logprobs"])
def test_absent_arguments(missing):
    batch = random_batch()
    old = {"old_logprobs": None} if missing == "old_logprobs" else {}
    del batch[missing]
    check(batch, O.nfpo(3), **old)


LONG = [
    O.nfpo(4, kl=O.KL("k3", 0.1)),
    O.nfpo(17),
    O.nfpo(18),
    O.nfpo(400, trust_region=O.SAPO()),
    O.nfpo(4, differentiate=True),
    O.Objective(O.Trace(7, 9), O.PPOClip(cap=3.0)),
    O.ctpo(),
    O.cppo(),
    O.gspo(),
    O.gmpo(),
]


@pytest.mark.parametrize("objective", LONG, ids=contract.name_of)
def test_sequences_of_several_tiles(objective):
    """A tile has 512 tokens: windows, means and prefixes go on across its borders."""
    batch = random_batch(3, 1100, spread=0.05)
    check(batch, objective)
    check(pack(batch, [1100, 511, 513]), objective)


def test_no_further_from_float64_than_the_reference_in_float32():
    for objective in (O.nfpo(4, kl=O.KL("k3", 0.1)), O.nfpo(64), O.gspo(), O.ppo(kl=O.KL("k3", 1.0)), O.dppo_kl()):
        batch = {k: x.float() if x.is_floating_point() else x for k, x in random_batch(4, 2000, spread=0.02).items()}
        exact = run(batch, objective, dtype=torch.float64)
        kernel = run(batch, objective)
        with fusedpo.backend("reference"):
            leaf = batch["logprobs"].clone().requires_grad_()
            out = fusedpo.policy_loss(**batch | {"logprobs": leaf}, objective=objective)
            out.loss.backward()
        reference = [out.loss.detach(), leaf.grad, torch.stack(list(out.metrics.values()))]
        for result, other, truth in zip(kernel, reference, exact, strict=True):
            error, allowed = ((x.double() - truth).abs().max() for x in (result, other))
            assert error <= allowed + 2 * U * truth.abs().max()


def test_approx_kl_does_not_cancel():
    """k3 of log-ratios of 1e-4 is 5e-9, below the roundoff of the ratio."""
    lp = -torch.rand(1000) - 0.1
    old = lp - 1e-4 * torch.randn(1000)
    metric = fusedpo.policy_loss(lp, old, torch.ones(1), objective=O.ppo()).metrics["approx_kl_k3"]
    x = (lp - old).double()
    torch.testing.assert_close(metric.double(), (torch.expm1(x) - x).mean(), rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------ extremes, masks and nothing


DELTAS = [0.0, 19.9, -19.9, 20.1, -20.1, 89.0, -89.0, 1e4, -1e4, INF, -INF, NAN]


@pytest.mark.parametrize(
    ("objective", "kept"),
    # masked garbage of every combination is another test
    [*((o, True) for o in COMBINATIONS), *((o, False) for o in contract.each_part_once(COMBINATIONS))],
    ids=lambda x: str(x) if isinstance(x, bool) else contract.name_of(x),
)
def test_extreme_log_ratios(objective, kept):
    """One extreme per sequence, kept or masked, beside ordinary tokens; its own gradient too, but where it is NaN."""
    batch = random_batch(len(DELTAS), 6, holes=False)
    batch["mask"][:, 1] = False
    batch["mask"][:, 3] = kept
    batch["old_logprobs"][:, 3] = batch["logprobs"][:, 3] - torch.tensor(DELTAS)
    objective = O.Objective(objective.ratio, objective.trust_region)
    upstream = torch.randn(batch["logprobs"].shape)
    result, expected = (run(batch, objective, upstream, dtype) for dtype in (torch.float32, torch.float64))
    for x, value in zip(result, expected, strict=True):
        assert not (
            x.isnan() & ~value.isnan()
        ).any()  # autograd gives some clipped tokens in the windows of a NaN 0 * NaN
        assert torch.equal(x.isinf(), value.isinf())
        finite = value.masked_fill(~value.isfinite(), 0)
        allowed = 2e-5 * finite.abs() + 2e-6 * finite.abs().amax(-1, keepdim=True) + 1e-6
        assert ((x - finite).abs() <= allowed)[value.isfinite()].all()
    assert torch.equal(result[0].isnan(), expected[0].isnan())


def test_sequence_ratios_beyond_their_clamp():
    """The log-ratio of a sequence is clamped at 10, which stops its gradient; GMPO's mean is not."""
    batch = random_batch(3, 6, holes=False)
    batch["old_logprobs"][0] = batch["logprobs"][0] - 15
    for region in contract.REGIONS + REGIONS:
        try:
            objective = O.Objective(O.SequenceRatio(), region)
        except ValueError:
            continue
        check(batch, objective)


@every_combination
def test_masked_garbage_reaches_nothing(objective):
    contract.check_masked_garbage_reaches_nothing(objective)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k3+"])
def test_extreme_distances_to_the_reference(kind):
    contract.check_extreme_distances_to_the_reference(kind)


@every_combination
def test_nan_at_a_kept_token_is_not_hidden(objective):
    contract.check_nan_at_a_kept_token_is_not_hidden(O.Objective(objective.ratio, objective.trust_region))


@pytest.mark.parametrize(
    ("shape", "cu_seqlens"),
    [((2, 3), None), ((0, 3), None), ((2, 0), None), ((0,), None), ((0,), [0]), ((1, 0), [0, 0]), ((4,), [0, 0, 3, 4])],
)
def test_nothing_to_learn_from_is_a_connected_zero(shape, cu_seqlens):
    for objective in COMBINATIONS:
        contract.check_nothing_to_learn_from_is_a_connected_zero(objective, shape, cu_seqlens)


def test_a_single_token():
    for objective in COMBINATIONS:
        lp = torch.tensor([-1.0], requires_grad=True)
        bare = O.Objective(objective.ratio, objective.trust_region)
        fusedpo.policy_loss(lp, None, torch.ones(1), objective=bare).loss.backward()
        assert lp.grad.item() == -1.0


# -------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("n", [2, 5, 17, 18, 64, 4096, 131_072])
def test_error_of_the_windows(n):
    """log F = log(rho F) - x, against sums in float64; the bounds are those of csrc/core/window.h."""
    length = 131_072
    x = 0.02 * torch.randn(length)
    objective = O.Objective(O.ForwardTrace(n), O.NoTrustRegion(), aggregation="token-sum")
    weight = fusedpo.policy_loss(x, torch.zeros(length), -torch.ones(1), objective=objective, reduction="none").loss

    def windows(x):
        total = torch.cat((x.double().cumsum(0).flip(0)[:1] - x.double().cumsum(0), torch.zeros(n)))  # of what follows
        return total[:length] - total[n - 1 : n - 1 + length]

    roundoffs = max(n - 2, 0) if n <= 17 else 2
    bound = roundoffs * U * windows(x.abs()) + 8 * U  # and the exponentials and their product
    assert ((weight.double().log() - x.double() - windows(x)).abs() <= bound).all()


@pytest.mark.parametrize("back", [0, 2, 30, "all"])
@pytest.mark.parametrize("ahead", [0, 3, 40, "all"])
@pytest.mark.parametrize("differentiate", [False, True])
def test_nan_stays_in_its_windows(back, ahead, differentiate):
    lengths, changed = [100, 700, 50], 500
    *arrays, _, cu_seqlens = nfpo.random_tokens(lengths, dtype=torch.float32)
    objective = O.Objective(O.Trace(back, ahead, differentiate), O.NoTrustRegion())
    reach = [1000 if n == "all" else n for n in (back, ahead)]
    results = []
    for value in (arrays[0][changed].item(), NAN):
        lp = arrays[0].clone()
        lp[changed] = value
        lp.requires_grad_()
        tokens = fusedpo.policy_loss(lp, *arrays[1:], objective=objective, cu_seqlens=cu_seqlens, reduction="none").loss
        results.append((tokens.detach(), *torch.autograd.grad(tokens.sum(), lp)))
    windows = {t for t in range(100, 800) if t - reach[0] <= changed <= t + reach[1]}
    assert set(results[1][0].isnan().nonzero().flatten().tolist()) == windows
    gradients = windows | {
        s for t in windows for s in range(max(100, t - reach[0]), min(800, t + reach[1] + 1)) if differentiate
    }
    same = torch.ones(850, dtype=torch.bool)
    same[list(gradients)] = False
    assert torch.equal(results[0][1][same], results[1][1][same])


def test_nfpo_of_one_step_is_ppo_bit_for_bit():
    batch = random_batch(3, 40)
    for options in ({}, {"kl": O.KL("k3", 0.1), "entropy_coef": 0.1}):
        for one, other in zip(run(batch, O.nfpo(1, **options)), run(batch, O.ppo(**options)), strict=True):
            assert torch.equal(one, other)


def test_cumulative_sums_would_cancel():
    nfpo.check_cumulative_sums_would_cancel()


# ----------------------------------------------------------------------------------------------------------------- bits


@every_combination
def test_packed_is_padded_bit_for_bit(objective):
    objective = O.Objective(
        objective.ratio, objective.trust_region, objective.kl, objective.entropy_coef, "seq-mean-token-mean"
    )
    lengths = [37, 0, 1, 16]
    padded = random_batch(4, 40, holes=False)
    inside = torch.arange(40) < torch.tensor(lengths)[:, None]
    padded["mask"] &= inside
    padded["mask"][:, 2] = False
    packed = pack(padded, lengths)
    upstream = torch.randn(4, 40)
    for up, packed_up in ((None, None), (upstream, upstream[inside])):
        for one, other in zip(run(padded, objective, up), run(packed, objective, packed_up), strict=True):
            assert torch.equal(one[inside] if one.dim() == 2 else one, other)


@pytest.mark.parametrize("objective", LONG, ids=contract.name_of)
def test_bits_do_not_depend_on_threads_or_runs(objective):
    batch = random_batch(40, 700, spread=0.05)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(batch, objective))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_a_sequence_does_not_depend_on_the_others():
    batch = random_batch(5, 700)
    whole = run(batch, O.nfpo(40), torch.ones(5, 700))
    alone = run({name: x[3:4] for name, x in batch.items()}, O.nfpo(40), torch.ones(1, 700))
    for one, other in zip(whole[:2], alone[:2], strict=True):
        assert torch.equal(one[3:4], other)


# ------------------------------------------------------------------------------------------------ operator and autograd


OBJECTIVES = [
    O.ppo(),
    O.nfpo(4, kl=O.KL("k3", 0.1), entropy_coef=0.1),
    O.nfpo(3, differentiate=True),
    O.gspo(),
    O.cppo(),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=contract.name_of)
@pytest.mark.parametrize("per_token", [False, True])
def test_opcheck(objective, per_token):
    packed = (OBJECTIVES.index(objective) + per_token) % 2 == 1
    args = operator_arguments(objective, per_token, packed)
    torch.library.opcheck(torch.ops.fusedpo.policy_loss.native, args)
    if per_token and getattr(objective.ratio, "differentiate", False):
        lp, _, olp, _, mask, cu_seqlens, *_ = args
        loss, _, grad_logprobs, _, grad_log_trace = torch.ops.fusedpo.policy_loss.native(*args)
        torch.library.opcheck(
            torch.ops.fusedpo.policy_loss_backward.native,
            (torch.randn_like(loss), grad_logprobs, grad_log_trace, lp, olp, mask, cu_seqlens, 0, 2),
        )


def test_operator_refuses_offsets_that_are_none():
    args = list(operator_arguments(O.ppo(), False, packed=True))
    for offsets in ([0, 11], [1, 10], [0, 7, 3, 10]):
        args[5] = torch.tensor(offsets)
        args[3] = torch.ones(len(offsets) - 1, 1)
        with pytest.raises(ValueError, match="cu_seqlens must start with 0"):
            torch.ops.fusedpo.policy_loss.native(*args)


def leaf_batch(rows=2, width=5):
    batch = random_batch(rows, width)
    return batch | {name: batch[name].requires_grad_() for name in ("logprobs", "entropy")}


class CountCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_one_operator_forward_and_one_product_backward():
    batch = leaf_batch()
    with CountCalls() as forward:
        loss = fusedpo.policy_loss(**batch, objective=O.nfpo(4), denominator=7.0).loss
    assert forward.calls["fusedpo.policy_loss.native"] == 1
    views = {"aten.detach.default", "aten.unbind.int", "aten.view.default"}
    others = forward.calls.keys() - views - {"fusedpo.policy_loss.native"}
    assert others <= {"aten.full.default"}  # the two numbers
    with CountCalls() as backward:
        loss.backward()
    assert backward.calls.keys() - views <= {"aten.ones_like.default", "aten.mul.Tensor"}
    assert backward.calls["aten.mul.Tensor"] == 1


def test_only_what_needs_a_gradient_gets_one():
    objective = O.nfpo(3, entropy_coef=0.1)
    batch = random_batch()
    for names in (["logprobs"], ["entropy"]):
        leaves = {name: batch[name].clone().requires_grad_() for name in names}
        fusedpo.policy_loss(**batch | leaves, objective=objective).loss.backward()
        assert leaves[names[0]].grad.any()
    assert not fusedpo.policy_loss(**batch, objective=objective).loss.requires_grad
    entropy = batch["entropy"].clone().requires_grad_()
    assert not fusedpo.policy_loss(**batch | {"entropy": entropy}, objective=O.ppo()).loss.requires_grad
    with torch.no_grad():
        assert not fusedpo.policy_loss(**leaf_batch(), objective=objective).loss.requires_grad


def test_gradient_or_not_the_loss_is_the_same():
    for objective in OBJECTIVES:
        batch = leaf_batch(3, 40)
        with_graph = fusedpo.policy_loss(**batch, objective=objective)
        with torch.no_grad():
            without = fusedpo.policy_loss(**batch, objective=objective)
        assert torch.equal(with_graph.loss, without.loss)
        assert with_graph.metrics == without.metrics


def test_upstream_gradients_retained_and_accumulated():
    for objective in OBJECTIVES:
        batch = leaf_batch()
        loss = fusedpo.policy_loss(**batch, objective=objective).loss
        (once,) = torch.autograd.grad(loss, batch["logprobs"], retain_graph=True)
        (3.0 * loss).backward(retain_graph=True)
        loss.backward()
        torch.testing.assert_close(batch["logprobs"].grad, 4 * once, rtol=4 * U, atol=0)


@pytest.mark.parametrize("differentiate", [False, True])
def test_expanded_upstream_gradient(differentiate):
    """(B, 1) expanded to (B, T) has stride 0."""
    batch = random_batch(2, 5)
    upstream = torch.tensor([[2.0], [-1.0]])
    objective = O.nfpo(3, differentiate=differentiate)
    one, other = (run(batch, objective, up) for up in (upstream.expand(2, 5), upstream.repeat(1, 5)))
    assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_functional_gradient(reduction):
    for objective in OBJECTIVES:
        batch = random_batch()
        lp = batch.pop("logprobs")

        def loss(lp):
            return fusedpo.policy_loss(lp, **batch, objective=objective, reduction=reduction).loss.sum()  # noqa: B023

        leaf = lp.clone().requires_grad_()
        assert torch.equal(torch.func.grad(loss)(lp), torch.autograd.grad(loss(leaf), leaf)[0])


@pytest.mark.parametrize("name", ["logprobs", "entropy"])
def test_double_backward_raises(name):
    batch = leaf_batch()
    loss = fusedpo.policy_loss(**batch, objective=O.nfpo(3, entropy_coef=0.1)).loss
    (gradient,) = torch.autograd.grad(loss, batch[name], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


def test_from_logits_by_kernels():
    ids, mask = torch.randint(11, (2, 6)), torch.rand(2, 6) > 0.2
    x, old, advantages = torch.randn(2, 6, 11), -torch.rand(2, 6) - 1, torch.randn(2)
    objective = O.nfpo(3, entropy_coef=0.1)
    results = []
    for backend, dtype in (("native", torch.float32), ("reference", torch.float64)):
        logits = x.detach().to(dtype, copy=True).requires_grad_()
        with fusedpo.backend(backend):
            loss = fusedpo.policy_loss_from_logits(
                logits, ids, old.to(dtype), advantages.to(dtype), mask=mask, objective=objective
            ).loss
        loss.backward()
        results.append((loss.detach().double(), logits.grad.double()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- tracing


# A loss per token has a backward of its own, which looks at no objective but one that is differentiated.
MEANS, PER_TOKEN = [(o, "mean") for o in OBJECTIVES], [(o, "none") for o in OBJECTIVES[1:3]]


@pytest.mark.slow
@pytest.mark.parametrize(
    # what Dynamo reads of an objective, of each; what AOTAutograd makes of an operator, with each backward
    ("backend", "cases"),
    [("eager", MEANS + PER_TOKEN), ("aot_eager", MEANS[1:2] + PER_TOKEN[1:])],
    ids=["eager", "aot_eager"],
)
def test_compiles_once_for_all_lengths_and_scales(backend, cases):
    """All in one graph."""
    from torch._dynamo.testing import CompileCounterWithBackend  # seconds, which the processes of the builds save

    def losses(batches, loss_scale, denominator):
        results = []
        for batch, (objective, reduction) in zip(batches, cases, strict=True):
            options = {"objective": objective, "loss_scale": loss_scale, "reduction": reduction}
            options |= {} if reduction == "none" else {"denominator": denominator}
            results.append(fusedpo.policy_loss(**batch, **options))
        return results

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(losses, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for i in range(3):
        batches = [leaf_batch(2 + i, 5 + 3 * i) for _ in cases]
        leaves = [batch["logprobs"] for batch in batches]
        outs, expected = (f(batches, 0.5 + 0.1 * i, 7.0 + i) for f in (compiled, losses))
        upstream = [torch.randn_like(out.loss) for out in outs]
        gradients = [torch.autograd.grad([out.loss for out in of], leaves, upstream) for of in (outs, expected)]
        for out, exact, *both in zip(outs, expected, *gradients, strict=True):
            torch.testing.assert_close(out.loss, exact.loss, rtol=2 * U, atol=0)
            torch.testing.assert_close(out.metrics, exact.metrics, rtol=0, atol=0)
            torch.testing.assert_close(*both, rtol=4 * U, atol=0)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


@pytest.mark.slow
def test_inductor():
    torch._dynamo.reset()
    batch = pack(leaf_batch(), [5, 3])
    batch["logprobs"] = batch["logprobs"].detach().requires_grad_()

    def loss(batch):
        return fusedpo.policy_loss(**batch, objective=O.nfpo(3, entropy_coef=0.1)).loss

    gradients = [
        torch.autograd.grad(f(batch), batch["logprobs"])[0] for f in (torch.compile(loss, fullgraph=True), loss)
    ]
    torch.testing.assert_close(*gradients, rtol=4 * U, atol=0)


# ------------------------------------------------------------------------------------------------------- the C++ builds


@pytest.mark.parametrize("build", BUILDS)
def test_vectors_and_floats_agree(build, tmp_path):
    """csrc/core, as CUDA uses it, against what the CPU kernels use; the exponential and the logarithm they share."""
    output = output_of("objective", build, tmp_path, "-O2")
    exp_error, log_error, difference, corners = output.split()
    assert float(exp_error) <= 1.1
    assert float(log_error) <= 2.0
    assert float(difference) <= 8 * U
    assert corners == "1"
