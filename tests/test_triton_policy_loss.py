"""The Triton kernels of the policy loss: on a GPU where there is one, otherwise under the interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import policy_loss as contract
from support.combinations import operator_arguments
from support.parts import REGIONS
from support.policy_loss import AGGREGATIONS, INF, NAN, name_of, pack, random_batch
from support.triton_device import DEVICE, _backend, pytestmark  # noqa: F401

import fusedpo
from fusedpo import objectives as O

U = 2.0**-24  # the unit roundoff of float32


@pytest.fixture
def small_tiles(monkeypatch):
    """Sequences of some forty tokens have several tiles. As at the real size, no two threads hold the same token."""
    from fusedpo.triton_kernels import policy_loss

    monkeypatch.setattr(policy_loss, "_TILE", 32)
    monkeypatch.setattr(policy_loss, "_CONSTANTS", {"CHUNK": 32, "num_warps": 1})


# ----------------------------------------------------------------------------------------------- against the reference


def run(batch, objective, upstream=None, dtype=torch.float32, **options):
    """Loss, gradients of log-probs and entropy, metrics: by the kernel, or in float64 by the reference."""
    kernel = dtype == torch.float32
    device = DEVICE if kernel else "cpu"
    batch = {
        name: x.to(device, dtype if x.is_floating_point() and name != "mask" else x.dtype) for name, x in batch.items()
    }
    leaves = {name: batch[name].clone().requires_grad_() for name in ("logprobs", "entropy") if name in batch}
    reduction = "mean" if upstream is None else "none"
    with fusedpo.backend("triton" if kernel else "reference"), torch.device(device):
        out = fusedpo.policy_loss(**batch | leaves, objective=objective, reduction=reduction, **options)
    out.loss.backward(upstream if upstream is None else upstream.to(device, dtype))
    gradients = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    return [x.detach().cpu() for x in (out.loss, *gradients, torch.stack(list(out.metrics.values())))]


def assert_near(results, expected, rtol=1e-5):
    """float32 loses some 10 roundoffs per token; metrics and losses are sums of terms of both signs and of size 1."""
    for result, value in zip(results, expected, strict=True):
        scale = value.abs().amax() if value.numel() else 0
        torch.testing.assert_close(result.double(), value, rtol=rtol, atol=float(2e-6 * scale + 1e-6))


def check(batch, objective, **options):
    """Against the reference, aggregated and per token."""
    for upstream in (None, torch.randn(batch["logprobs"].shape, device="cpu")):
        results, expected = (
            run(batch, objective, upstream, dtype, **options) for dtype in (torch.float32, torch.float64)
        )
        assert_near(results, expected)


# Every kind of ratio with every trust region that it goes with.
RATIOS = [O.TokenRatio(), O.SequenceRatio(), O.Trace(2, 1), O.ForwardTrace(3, differentiate=True), O.OnPolicy()]
COMBINATIONS = list(contract.combinations(itertools.product(RATIOS, contract.REGIONS + REGIONS)))
every_combination = pytest.mark.parametrize("objective", COMBINATIONS, ids=name_of)
GARBAGE = torch.tensor([NAN, INF, -INF, 1e4, -1e30], dtype=torch.float64)


@every_combination
def test_every_combination(objective):
    """Padded or packed, in turns, with values per token and per sequence; masked tokens hold garbage."""
    i = COMBINATIONS.index(objective)
    batch = random_batch(3, 9, seed=i)
    garbage = GARBAGE.repeat(6)[:27].reshape(3, 9)
    spoilt = {
        name: x if name == "mask" else torch.where(batch["mask"], x, garbage.roll(j, 1))
        for j, (name, x) in enumerate(batch.items())
    }
    batches = [batch, spoilt]
    if i % 2:
        batches = [pack(x, [9, 0, 5]) for x in batches]
    per_sequence = torch.randn(3, dtype=torch.float64, device="cpu")
    for x in batches:
        x["mask"] = x["mask"].to([torch.bool, torch.int64, torch.float32][i % 3])
        if i % 4 < 2:
            x["advantages"], x["is_weights"] = per_sequence, per_sequence.exp()[:, None]
    assert_near(run(batches[1], objective), run(batches[0], objective, dtype=torch.float64))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_aggregation(aggregation, packed):
    objective = O.Objective(aggregation=aggregation, entropy_coef=0.1)
    batch = pack(random_batch(), [5, 0, 3]) if packed else random_batch()
    options = [{}] if aggregation == "token-sum" else [{}, {"denominator": 7.5}, {"denominator": 0}]
    for option in options:
        expected = run(batch, objective, dtype=torch.float64, loss_scale=0.7, **option)
        assert_near(run(batch, objective, loss_scale=0.7, **option), expected)


def test_length_norm():
    batch = random_batch()
    assert_near(run(batch, O.dr_grpo(length_norm=40.0)), run(batch, O.dr_grpo(length_norm=40.0), dtype=torch.float64))


@pytest.mark.parametrize("missing", ["mask", "entropy", "is_weights", "old_logprobs", "ref_logprobs"])
def test_absent_arguments(missing):
    batch = random_batch()
    old = {"old_logprobs": None} if missing == "old_logprobs" else {}
    del batch[missing]
    for objective in (O.nfpo(3), O.gspo(), O.ctpo()):
        assert_near(run(batch, objective, **old), run(batch, objective, dtype=torch.float64, **old))


DELTAS = [0.0, 19.9, -19.9, 20.1, -20.1, 89.0, -89.0, 1e4, -1e4, INF, -INF]


@every_combination
def test_extreme_log_ratios(objective):
    """They stand between ordinary tokens, so that windows hold one or two of them. Losses per token."""
    batch = random_batch(1, 2 * len(DELTAS), holes=False)
    batch["mask"][:] = True
    batch["old_logprobs"][0, ::2] = batch["logprobs"][0, ::2] - torch.tensor(DELTAS, dtype=torch.float64, device="cpu")
    objective = O.Objective(objective.ratio, objective.trust_region)
    upstream = torch.randn(1, 2 * len(DELTAS), device="cpu")
    results, expected = (run(batch, objective, upstream, dtype) for dtype in (torch.float32, torch.float64))
    for x, value in zip(results, expected, strict=True):
        finite = value.isfinite()
        assert torch.equal(x.isnan(), value.isnan())
        torch.testing.assert_close(x[finite].double(), value[finite], rtol=2e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of the sum of inf and -inf
@pytest.mark.parametrize("region", [O.BinaryTV(), O.BinaryKL(), O.CPPO()], ids=str)
def test_probabilities_of_zero_and_one(region):
    """Before and now, where the divergence has infinities and 0 times them."""
    logprobs = torch.tensor([0.0, 1e-30, 0.04, 0.06, 0.5, 0.999, 1.0], dtype=torch.float64, device="cpu").log()
    signs = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64, device="cpu")
    now, old, advantages = torch.cartesian_prod(logprobs, logprobs, signs).T
    batch = {"logprobs": now, "old_logprobs": old, "advantages": advantages}
    ones = torch.ones(now.shape, device="cpu")
    results, expected = (run(batch, O.Objective(O.TokenRatio(), region), ones, x) for x in (torch.float32, now.dtype))
    for x, value in zip(results[:2], expected[:2], strict=True):
        torch.testing.assert_close(x.double(), value, rtol=1e-5, atol=1e-6, equal_nan=True)


KINDS = [
    O.ppo(),
    O.nfpo(3, kl=O.KL("k3", 0.1), entropy_coef=0.1),
    O.nfpo(3, differentiate=True),
    O.gspo(),
    O.gmpo(),
    O.cppo(),
    O.ctpo(),
    O.vespo(),
]


@pytest.mark.parametrize("objective", KINDS, ids=name_of)
def test_nan_at_a_kept_token_is_not_hidden(objective):
    batch = random_batch(2, 6, holes=False)
    batch["mask"][:] = True
    batch["logprobs"][0, 3] = NAN
    tokens, gradient, *_, metrics = run(batch, objective, torch.ones(2, 6, device="cpu"))
    _, expected, *_ = run(batch, objective, torch.ones(2, 6, device="cpu"), torch.float64)
    assert tokens[0, 3].isnan()
    assert tokens[1].isfinite().all()
    assert torch.equal(gradient.isnan(), expected.isnan())
    names = dict(zip(fusedpo.reference.METRICS, metrics, strict=True))
    assert names["tokens"] == 12
    assert all(names[name].isnan() for name in ("ratio_mean", "ratio_min", "ratio_max", "approx_kl", "ess"))
    assert run(batch, objective)[0].isnan()


@pytest.mark.parametrize("objective", KINDS[:6], ids=name_of)
@pytest.mark.parametrize(
    ("shape", "cu_seqlens"),
    [((2, 3), None), ((0, 3), None), ((2, 0), None), ((0,), [0]), ((1, 0), [0, 0]), ((4,), [0, 0, 3, 4])],
)
def test_nothing_to_learn_from_is_a_connected_zero(objective, shape, cu_seqlens):
    contract.check_nothing_to_learn_from_is_a_connected_zero(objective, shape, cu_seqlens)


def test_nothing_reaches_masked_tokens_from_above():
    for objective in (O.ppo(), O.nfpo(3, differentiate=True)):
        batch = random_batch(2, 6)
        upstream = torch.randn(2, 6, device="cpu")
        spoilt = upstream.where(batch["mask"], NAN) if objective.ratio != O.TokenRatio() else upstream
        one, other = run(batch, objective, upstream), run(batch, objective, spoilt)
        assert torch.equal(one[1], other[1])
        assert not one[1][~batch["mask"]].any()


# --------------------------------------------------------------------------------------------- tiles, windows and bits


LONG = [
    O.nfpo(32),
    O.nfpo(33, kl=O.KL("k2", 0.1)),
    O.Objective(O.Trace(44, 68), O.PPOClip(cap=3.0)),
    O.Objective(O.Trace(0, 3, differentiate=True), O.NoTrustRegion(), aggregation="seq-mean-token-mean"),
    O.Objective(O.Trace(80, 36, differentiate=True), O.PPOClip()),
    O.Objective(O.Trace("all", 0, differentiate=True), O.NoTrustRegion()),
    O.Objective(O.Trace(0, "all"), O.SAPO(), aggregation="seq-mean-token-sum"),
    O.vespo(),
    O.ctpo(),
    O.cppo(length_norm=50.0),
    O.gspo(),
    O.gmpo(),
]


@pytest.mark.parametrize("objective", LONG, ids=name_of)
def test_sequences_of_several_tiles(objective, small_tiles):
    """Windows, means and prefixes go on across the borders of tiles; padded and packed batches agree bit for bit."""
    lengths = [107, 32]
    padded = random_batch(2, 120, spread=0.05, holes=False)
    inside = torch.arange(120, device="cpu") < torch.tensor(lengths, device="cpu")[:, None]
    padded["mask"] = inside & (torch.rand(2, 120, device="cpu") < 0.8)
    packed = pack(padded, lengths)
    upstream = torch.randn(2, 120, device="cpu")
    differentiated = getattr(objective.ratio, "differentiate", False)
    for up, packed_up in [(None, None), (upstream, upstream[inside])][: 1 + differentiated]:
        results, packed_results = run(padded, objective, up), run(packed, objective, packed_up)
        assert_near(results, run(padded, objective, up, torch.float64))
        for one, other in zip(results, packed_results, strict=True):
            assert torch.equal(one[inside] if one.dim() == 2 else one, other)


@pytest.mark.parametrize("objective", [O.nfpo(4), O.gspo(), LONG[5]], ids=name_of)
def test_tiles_of_the_real_size(objective):
    check(pack(random_batch(2, 1100, spread=0.02), [1100, 300]), objective)


@pytest.mark.parametrize("n", [2, 5, 64, 65, 100, 700])
def test_error_of_the_windows(n, monkeypatch):
    """log F = log(rho F) - x, against sums in float64."""
    from fusedpo.triton_kernels import policy_loss

    tile, chunk, length = 64, 128, 700
    monkeypatch.setattr(policy_loss, "_TILE", tile)
    monkeypatch.setattr(policy_loss, "_CONSTANTS", {"CHUNK": chunk, "num_warps": 2})
    x = 0.02 * torch.randn(length, device="cpu")
    objective = O.Objective(O.ForwardTrace(n), O.NoTrustRegion(), aggregation="token-sum")
    batch = {"logprobs": x, "old_logprobs": torch.zeros_like(x), "advantages": -torch.ones_like(x)}
    weight, *_ = run(batch, objective, torch.ones_like(x))

    def windows(x):
        padded = torch.cat((x.double(), torch.zeros(n, device="cpu")))
        return torch.stack([padded[t + 1 : t + n].sum() for t in range(length)])

    roundoffs = 2 if n <= tile else 2 * 6 + 7 + length // chunk
    bound = roundoffs * U * windows(x.abs()) + 8 * U  # and the exponentials and their product
    assert ((weight.double().log() - x.double() - windows(x)).abs() <= bound).all()


@pytest.mark.parametrize(
    ("back", "ahead", "differentiate"),
    [(0, 31, False), (2, 1, True), (36, 9, True), ("all", 0, True), (0, "all", False)],
)
def test_nan_stays_in_its_windows(back, ahead, differentiate, small_tiles):
    begin, changed, end = 3, 70, 131
    batch = pack(random_batch(3, 128, spread=0.05, holes=False), [begin, end - begin, 4])
    batch["mask"][:] = True
    objective = O.Objective(O.Trace(back, ahead, differentiate), O.NoTrustRegion())
    upstream = torch.ones(end + 4, device="cpu")
    before = run(batch, objective, upstream)
    batch["logprobs"][changed] = NAN
    after = run(batch, objective, upstream)
    reach = [end if n == "all" else n for n in (back, ahead)]
    windows = {t for t in range(begin, end) if t - reach[0] <= changed <= t + reach[1]}
    assert set(after[0].isnan().nonzero().flatten().tolist()) == windows
    same = torch.ones(end + 4, dtype=torch.bool, device="cpu")
    same[list(windows)] = False
    if differentiate:  # and whatever is in those windows
        for t in windows:
            same[max(begin, t - reach[0]) : min(end, t + reach[1] + 1)] = False
    assert torch.equal(before[1][same], after[1][same])


def test_more_sequences_than_are_searched_at_a_time(small_tiles):
    """Empty ones among them; the longest, which divides the loss, comes late."""
    lengths = [i % 3 for i in range(34)]
    lengths[32] = 80
    batch = pack(random_batch(34, 80, holes=False), lengths)
    assert_near(run(batch, O.dr_grpo()), run(batch, O.dr_grpo(), dtype=torch.float64))


def test_a_sequence_does_not_depend_on_the_others(small_tiles):
    batch = random_batch(4, 120, spread=0.05)
    ones = torch.ones(4, 120, device="cpu")
    whole = run(batch, O.nfpo(48), ones)
    alone = run({name: x[2:3] for name, x in batch.items()}, O.nfpo(48), ones[:1])
    assert all(torch.equal(x[2:3], y) for x, y in zip(whole[:2], alone[:2], strict=True))


def test_one_step_is_ppo_bit_for_bit():
    batch = random_batch(2, 9)
    assert all(itertools.starmap(torch.equal, zip(run(batch, O.nfpo(1)), run(batch, O.ppo()), strict=True)))


# ------------------------------------------------------------------------------------------------------------- accuracy


def test_no_further_from_float64_than_the_reference_in_float32():
    for objective in (O.nfpo(4, kl=O.KL("k3", 0.1)), O.nfpo(600), O.gspo(), O.dppo_kl(), O.vespo(), O.sapo()):
        batch = {k: x.float() if x.is_floating_point() else x for k, x in random_batch(2, 700, spread=0.02).items()}
        exact = run(batch, objective, dtype=torch.float64)
        kernel = run(batch, objective)
        with fusedpo.backend("reference"), torch.device("cpu"):
            leaf = batch["logprobs"].clone().requires_grad_()
            out = fusedpo.policy_loss(**batch | {"logprobs": leaf}, objective=objective)
            out.loss.backward()
        reference = [out.loss.detach(), leaf.grad, torch.stack(list(out.metrics.values()))]
        for result, other, truth in zip(kernel, reference, exact, strict=True):
            error, allowed = ((x.double() - truth).abs().max() for x in (result, other))
            assert error <= allowed + 4 * U * truth.abs().max()


def test_approx_kl_does_not_cancel():
    """k3 of log-ratios of 1e-4 is 5e-9, below the roundoff of the ratio."""
    lp = -torch.rand(300, device="cpu") - 0.1
    old = lp - 1e-4 * torch.randn(300, device="cpu")
    *_, metrics = run({"logprobs": lp, "old_logprobs": old, "advantages": torch.ones(1, device="cpu")}, O.ppo())
    x = (lp - old).double()
    k3 = metrics[fusedpo.reference.METRICS.index("approx_kl_k3")].double()
    torch.testing.assert_close(k3, (torch.expm1(x) - x).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("delta", [20.0, -20.0])
def test_effective_sample_size_neither_overflows_nor_vanishes(delta):
    """Weights e^40, ..., e^40, e^20, or their inverses."""
    lp = torch.zeros(600, device="cpu")
    batch = {"logprobs": lp, "old_logprobs": lp - delta, "advantages": lp}
    assert_near(run(batch, O.nfpo(8)), run(batch, O.nfpo(8), dtype=torch.float64))


# ----------------------------------------------------------------------------------------------- operator and autograd


@pytest.mark.parametrize(
    ("objective", "per_token", "packed"),
    [
        (O.ppo(), False, True),
        (O.nfpo(3, differentiate=True), True, True),
        (O.nfpo(3, differentiate=True), False, False),
        (O.nfpo(3, kl=O.KL("k3", 0.1), entropy_coef=0.1), True, False),
    ],
)
def test_opcheck(objective, per_token, packed):
    args = operator_arguments(objective, per_token, packed)
    torch.library.opcheck(torch.ops.fusedpo.policy_loss.triton, args)
    if per_token and getattr(objective.ratio, "differentiate", False):
        lp, _, olp, _, mask, cu_seqlens, *_ = args
        loss, _, grad_logprobs, _, grad_log_trace = torch.ops.fusedpo.policy_loss.triton(*args)
        torch.library.opcheck(
            torch.ops.fusedpo.policy_loss_backward.triton,
            (torch.randn_like(loss), grad_logprobs, grad_log_trace, lp, olp, mask, cu_seqlens, 0, 2),
        )


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU, offsets are checked under FUSEDPO_DEBUG=1 only")
def test_operator_refuses_offsets_that_are_none():
    args = list(operator_arguments(O.ppo(), False, packed=True))
    args[5] = torch.tensor([0, 7, 3, 10])
    with pytest.raises(ValueError, match="cu_seqlens must not decrease"):
        torch.ops.fusedpo.policy_loss.triton(*args)


def test_strided_and_expanded_arrays():
    batch = random_batch(3, 5)
    strided = {name: x.T.contiguous().T for name, x in batch.items()}
    strided["advantages"] = batch["advantages"] = batch["advantages"][:, :1].expand(3, 5)
    upstream = torch.tensor([[2.0], [-1.0], [0.5]], device="cpu").expand(3, 5)
    objective = O.nfpo(3, differentiate=True)
    results = run(batch, objective, upstream.clone()), run(strided, objective, upstream)
    assert all(itertools.starmap(torch.equal, zip(*results, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction):
    def loss(batch):
        return fusedpo.policy_loss(**batch, objective=O.nfpo(3, differentiate=True), reduction=reduction)

    batch = {
        k: x.to(DEVICE, torch.float32) if x.is_floating_point() else x.to(DEVICE) for k, x in random_batch().items()
    }
    batch["logprobs"].requires_grad_()
    torch._dynamo.reset()
    out, expected = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")(batch), loss(batch)
    upstream = torch.randn_like(expected.loss)
    gradients = [torch.autograd.grad(x.loss, batch["logprobs"], upstream)[0] for x in (out, expected)]
    torch.testing.assert_close((out.loss, out.metrics, gradients[0]), (expected.loss, expected.metrics, gradients[1]))


# ------------------------------------------------------------------------------------------------------------ on a GPU


def gpu_arguments(objective, per_token=False, rows=64, width=4096):
    """Arguments of the operator for a padded batch, nothing left out."""
    batch = {
        k: x.to(DEVICE, torch.float32) if x.is_floating_point() else x.to(DEVICE)
        for k, x in random_batch(rows, width).items()
    }
    names = ("ref_logprobs", "is_weights")
    arrays = [batch[name] for name in ("logprobs", "entropy", "old_logprobs", "advantages", "mask")] + [None]
    numbers = [None, torch.ones((), device=DEVICE)]
    encoded = fusedpo.ops.policy_loss.encode(objective)
    return (*arrays, *(batch[name] for name in names), *numbers, *encoded, per_token)


def count_launches(function) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    function()  # compiles
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.key.endswith("_kernel"))


@pytest.mark.gpu
@pytest.mark.parametrize("objective", [*KINDS, *LONG], ids=name_of)
@pytest.mark.parametrize("per_token", [False, True])
def test_two_launches_forward_and_one_backward(objective, per_token):
    args = gpu_arguments(objective, per_token)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        assert count_launches(lambda: torch.ops.fusedpo.policy_loss.triton(*args)) == 2
        lp, olp, _, mask, *_ = args
        _, _, grad_logprobs, _, grad_log_trace = torch.ops.fusedpo.policy_loss.triton(*args)
        if grad_log_trace.numel() > 0:
            backward = torch.ops.fusedpo.policy_loss_backward.triton
            arrays = (lp, grad_logprobs, grad_log_trace, lp, olp, mask, None)
            assert count_launches(lambda: backward(*arrays, 3, 5)) == 1
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.gpu
def test_no_synchronisation():
    for objective in (*KINDS, *LONG):
        batch = {k: x.to(DEVICE) for k, x in random_batch(4, 700).items()}
        lp = batch["logprobs"].float().requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for reduction in ("mean", "none"):
                out = fusedpo.policy_loss(**batch | {"logprobs": lp}, objective=objective, reduction=reduction)
                out.loss.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("objective", [*KINDS, *LONG], ids=name_of)
def test_runs_agree_bit_for_bit(objective):
    batch = random_batch(64, 3000, spread=0.05)
    first = run(batch, objective)
    for _ in range(4):
        assert all(itertools.starmap(torch.equal, zip(first, run(batch, objective), strict=True)))


@pytest.mark.gpu
@pytest.mark.parametrize("objective", LONG, ids=name_of)
def test_long_sequences(objective):
    check(pack(random_batch(3, 20_000, spread=0.01), [20_000, 513, 4096]), objective)
