"""The Triton kernels from logits to gradients: against the reference in float64; on a GPU, or under the interpreter."""

from __future__ import annotations

import itertools

import ptx
import pytest
import torch
from support import policy_loss as contract
from support.parts import REGIONS
from support.policy_loss import AGGREGATIONS, INF, KLS, NAN, name_of
from support.triton_device import DEVICE, _backend, pytestmark, small, use_segments  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

import fusedpo
from fusedpo import _checks, _chosen, backends, reference
from fusedpo import objectives as O
from fusedpo.ops import one_pass as ops_one_pass
from fusedpo.ops import policy_loss as ops_policy_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# ------------------------------------------------------------------------------------------------ against the reference


def make_batch(shape=(3, 3), vocab_size=7, *, dtype=torch.float32, lengths=None, kept=0.8, spread=0.25, seed=0):
    """Arguments of the operator, on the CPU; with ``lengths`` packed."""
    g = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=g, device="cpu")

    logits = (2 * randn(*shape, vocab_size)).to(dtype)
    token_ids = torch.randint(vocab_size, shape, generator=g, device="cpu")
    logp = logits.float().log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
    return {
        "logits": logits,
        "rows": None,
        "token_ids": token_ids,
        "temperature": torch.tensor(0.9, device="cpu"),
        "old_logprobs": (logp + spread * randn(*shape)).clamp(max=-0.01),
        "advantages": randn(*shape),
        "mask": None if kept == 1 else torch.rand(shape, generator=g, device="cpu") < kept,
        "cu_seqlens": None if lengths is None else torch.tensor([0, *itertools.accumulate(lengths)], device="cpu"),
        "ref_logprobs": logp + spread * randn(*shape),
        "is_weights": randn(*shape).exp(),
        "scale": 0.1 + torch.rand(shape, generator=g, device="cpu"),
    }


def run(batch, objective, *, inplace=False, logprobs=None, entropy=None):
    """Log-probs, entropy (with ``rows`` NaN where none was written) and the gradient of the logits, on the CPU."""
    batch = {name: x if x is None else x.to(DEVICE) for name, x in batch.items()}
    shape = batch["token_ids"].shape
    out = [x if x is not None else torch.full(shape, NAN) for x in (logprobs, entropy)]
    logits, rest = batch["logits"], [x for name, x in batch.items() if name != "logits"]
    args = (*out, *rest, *ops_policy_loss.encode(objective))
    if inplace:
        whole = logits
        if any(stride == 0 for stride in logits.stride()):
            whole = logits.contiguous()
        gradient = whole if DEVICE == "cuda" else whole.clone(memory_format=torch.preserve_format)
        torch.ops.fusedpo.one_pass.triton(gradient, gradient, *args)
    else:
        gradient = logits.new_empty(logits.shape)
        torch.ops.fusedpo.one_pass.triton(logits, gradient, *args)
    return [x.cpu() for x in (*out, gradient)]


def expected(batch, objective):
    """The same in float64, by autograd through the reference; 0 at masked tokens."""
    b = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in batch.items()}
    logits = b["logits"].clone().requires_grad_()
    with fusedpo.backend("reference"), torch.device("cpu"):
        logprobs, entropy = reference.token_logprobs(
            logits, b["token_ids"], temperature=b["temperature"], mask=b["mask"], return_entropy=True
        )
        names = ("mask", "cu_seqlens", "ref_logprobs", "is_weights")
        loss = reference.policy_loss(
            logprobs,
            b["old_logprobs"],
            b["advantages"],
            entropy=entropy,
            objective=objective,
            reduction="none",
            **{name: b[name] for name in names if b[name] is not None},
        ).loss
    loss.backward(b["scale"])
    return [logprobs.detach(), entropy.detach(), logits.grad]


def check(batch, objective, **options):
    """float32 loses some ten roundoffs; the gradient is rounded to its dtype once."""
    results, values = run(batch, objective, **options), expected(batch, objective)
    for result, value in zip(results[:2], values[:2], strict=True):
        torch.testing.assert_close(result.double(), value, rtol=1e-5, atol=2e-6, equal_nan=True)
    gradient, value = results[2], values[2]
    half_ulp = 0.0 if gradient.dtype == torch.float32 else torch.finfo(gradient.dtype).eps / 2
    tiny = 0.0 if gradient.dtype != torch.float16 else 2.0**-25  # half of the distance between subnormal numbers
    error = (gradient.double() - value).abs()
    allowed = (half_ulp + 1e-5) * value.abs() + 2e-6 * value.abs().amax() + tiny
    assert (error <= allowed).all(), (error - allowed).max()
    if batch["mask"] is not None:
        assert not gradient[~batch["mask"]].any()


def combinations():
    """Every trust region that goes with one pass; ratios, KL and entropy take turns."""
    ratios = [O.ForwardTrace(3), O.TokenRatio(), O.Trace(0, 5), O.OnPolicy()]
    for i, region in enumerate(contract.REGIONS + REGIONS):
        for ratio in ratios[i % 4 :] + ratios[: i % 4]:
            try:
                objective = O.Objective(ratio, region, KLS[i % len(KLS)], 0.1 * (i % 2), AGGREGATIONS[i % 5])
            except ValueError:
                continue
            if ops_one_pass.is_possible(objective):
                yield objective
                break


COMBINATIONS = list(combinations())


def test_all_parts_take_part():
    regions = {type(o.trust_region) for o in COMBINATIONS}
    assert regions == set(O.TrustRegion.__args__) - {O.LogClip, O.CPPO, O.GMPO}
    assert {type(o.ratio) for o in COMBINATIONS} >= {O.TokenRatio, O.ForwardTrace, O.Trace}
    assert {None if o.kl is None else o.kl.kind for o in COMBINATIONS} == {None, "k1", "k2", "k3", "k3+"}


@pytest.mark.parametrize("objective", COMBINATIONS, ids=name_of)
def test_every_trust_region(objective):
    """Padded or packed, in place or not, values per token or per sequence, in turns; masked tokens hold garbage."""
    i = COMBINATIONS.index(objective)
    batch = make_batch((9,), lengths=[4, 0, 1, 4], seed=i) if i % 2 else make_batch((2, 5), seed=i)
    if i % 4 < 2:
        g = torch.Generator().manual_seed(i)
        sequences = 4 if i % 2 else 2
        batch["advantages"] = torch.randn(sequences, 1, generator=g, device="cpu")
        batch["is_weights"] = torch.rand(sequences, 1, generator=g, device="cpu") + 0.5
    spoilt = dict(batch)
    garbage = torch.tensor([NAN, INF, -INF, 1e4], device="cpu")
    for j, (name, x) in enumerate(batch.items()):
        if name == "logits":
            spoilt[name] = torch.where(batch["mask"][..., None], x, NAN)
        elif x is not None and x.is_floating_point() and x.shape == batch["mask"].shape:
            spoilt[name] = torch.where(batch["mask"], x, garbage[j % 4])
    spoilt["token_ids"] = batch["token_ids"].masked_fill(~batch["mask"], -100)
    results = run(spoilt, objective, inplace=i % 3 == 0)
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(results, run(batch, objective), strict=True))
    check(batch, objective)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [2, 3, 127, 128, 129, 640, 1000, 3001])
def test_sizes(dtype, vocab_size):
    """Less than a step, a complete one, several, and an incomplete one behind; aligned rows or not."""
    batch = make_batch((3,), vocab_size, dtype=dtype, kept=1)
    check(batch, O.nfpo(2, entropy_coef=0.1 * (vocab_size % 2)), inplace=vocab_size < 200)


@pytest.mark.parametrize(
    ("dtype", "more"), [(torch.float32, 1024), (torch.bfloat16, 1024), (torch.float16, 3)], ids=str
)
def test_steps_of_the_real_size(dtype, more, monkeypatch):
    """With words of one element and of two, and by element."""
    monkeypatch.undo()
    step = 8 * _chosen.WALK[0]  # 4 words of 2 elements, where they are of 16 bits
    check(make_batch((2,), step + more, dtype=dtype, kept=1), O.nfpo(2, entropy_coef=0.1))


@pytest.mark.parametrize("missing", ["mask", "old_logprobs", "is_weights"])
def test_absent_arguments(missing):
    batch = make_batch() | {missing: None}
    for objective in (O.nfpo(3), O.reinforce(entropy_coef=0.1), O.nfpo(2, kl=O.KL("k3", 0.1))):
        check(batch, objective)
    if missing == "mask":
        assert run(batch, O.nfpo(2, kl=None))[2].any()


def test_a_single_sequence_has_no_batch_dimension():
    check(make_batch((7,)), O.nfpo(3))
    check(make_batch((1, 7), lengths=[3, 4]), O.nfpo(3))


def test_temperature_per_token():
    batch = make_batch(vocab_size=200)
    batch["temperature"] = torch.linspace(0.1, 5, 9, device="cpu").reshape(3, 3)
    check(batch, O.nfpo(2, entropy_coef=0.1))
    masked = batch["temperature"].where(batch["mask"], torch.tensor(0.0, device="cpu"))
    results = run(batch | {"temperature": masked}, O.nfpo(2)), run(batch, O.nfpo(2))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_minus_inf_columns():
    """In front, behind, and all but one."""
    batch = make_batch((4,), 300, kept=1)
    logits, ids = batch["logits"], torch.tensor([299, 0, 150, 7], device="cpu")
    logits[0, :260] = logits[1, 100:] = logits[2, ::3] = logits[3] = -INF
    logits[2, 150] = logits[3, 7] = 1.0
    logp = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    batch |= {"token_ids": ids, "old_logprobs": logp - 0.1, "ref_logprobs": logp}
    check(batch, O.nfpo(2, entropy_coef=0.1))
    check(batch, O.nfpo(2))


def test_gradient_of_a_confident_token():
    """1 - p of a token with p = 1 - 1e-5 keeps its digits."""
    logits = torch.full((1, 300), -17.3, device="cpu")
    logits[0, 270] = 0.0
    batch = make_batch((1,), 300, kept=1) | {
        "logits": logits,
        "token_ids": torch.tensor([270], device="cpu"),
        "temperature": torch.tensor(1.0, device="cpu"),
        "old_logprobs": None,
        "advantages": torch.ones(1, device="cpu"),
        "is_weights": None,
        "scale": torch.ones(1, device="cpu"),
    }
    p = torch.softmax(logits.double(), -1)[0, 270]
    *_, gradient = run(batch, O.ppo())
    torch.testing.assert_close(gradient[0, 270].double(), p - 1, rtol=1e-5, atol=0)


def test_row_of_minus_inf_is_nan():
    batch = make_batch((3,), 300, kept=1)
    batch["logits"][1] = -INF
    logprobs, entropy, _ = run(batch, O.ppo())
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]


# ------------------------------------------------------------------------------------------------- windows and segments


@pytest.mark.parametrize("n", [1, 2, 3, 6, 9, 257])
@pytest.mark.parametrize("packed", [False, True])
def test_segments(n, packed, monkeypatch):
    """They change no bit, in place or not, wherever they end; windows stop at the ends of sequences."""
    batch = make_batch((10,), 5, lengths=[4, 1, 0, 5]) if packed else make_batch((2, 5), 5, kept=0.9)
    objective = O.nfpo(n)
    results = []
    for count in (1, 3, 10):
        use_segments(monkeypatch, count)
        results.append(run(batch, objective, inplace=count != 3))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0, equal_nan=True)
    check(batch, objective)


@pytest.mark.parametrize("ahead", [1, 2, 5, 60])
def test_halo(ahead, monkeypatch):
    """It consists of the live rows in windows of another segment, and no others."""
    from fusedpo.triton_kernels import one_pass

    batch = make_batch((13,), 5, lengths=[5, 1, 7])
    live = batch["mask"].nonzero().flatten().tolist()
    sequence_end = [5] * 5 + [6] + [13] * 7
    run_launch = one_pass.launch
    for count in (2, 3, 5):
        segment = {t: next(s for s in range(count) if i < len(live) * (s + 1) // count) for i, t in enumerate(live)}
        halo = {
            s
            for t, s in itertools.product(live, live)
            if t < s <= t + ahead and s < sequence_end[t] and segment[s] != segment[t]
        }

        def launch(kernel, programs, device, *args, **constants):
            if kernel is not one_pass._one_pass_kernel or args[15] != 0:  # `halo`: all but the walk
                run_launch(kernel, programs, device, *args, **constants)

        use_segments(monkeypatch, count)
        monkeypatch.setattr(one_pass, "launch", launch)
        logprobs, *_ = run(batch, O.nfpo(ahead + 1))
        assert set((~logprobs.isnan()).nonzero().flatten().tolist()) == halo


def test_blocks_and_segments(monkeypatch):
    batch = make_batch((1, 6), 300, dtype=torch.bfloat16, lengths=[1, 5])
    results = []
    for count, inplace in ((1, False), (2, True), (4, True), (4, False)):
        use_segments(monkeypatch, count)
        results.append(run(batch, O.nfpo(4, entropy_coef=0.1), inplace=inplace))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0, equal_nan=True)


def test_a_sequence_does_not_depend_on_the_others():
    batch = make_batch((4, 4), 5)
    per_token = {n: x for n, x in batch.items() if x is not None and x.dim() > 1}
    whole = run(batch, O.nfpo(3))
    alone = run(batch | {n: x[2:3] for n, x in per_token.items()}, O.nfpo(3))
    torch.testing.assert_close([x[2:3] for x in whole], alone, rtol=0, atol=0, equal_nan=True)


def test_nan_stays_in_its_windows():
    batch = make_batch((12,), 5, lengths=[2, 7, 3], kept=1)
    objective = O.Objective(O.ForwardTrace(3), O.NoTrustRegion())
    _, _, before = run(batch, objective)
    batch["logits"][6] = NAN
    logprobs, entropy, gradient = run(batch, objective)
    assert logprobs.isnan().nonzero().item() == entropy.isnan().nonzero().item() == 6
    assert gradient[[4, 5]].isnan().all()
    others = [t for t in range(12) if t not in (4, 5, 6)]
    assert torch.equal(gradient[others], before[others])


@pytest.mark.parametrize("size", [1, 4096, 9000, 128 * 4096 + 5])
def test_live_rows_come_first(size):
    """A program lists one block or, of many rows, several; masks begin anywhere."""
    from fusedpo.triton_kernels import one_pass

    for mask in (
        (torch.rand(size + 1) < 0.3)[1:],
        torch.zeros(size, dtype=torch.bool),
        torch.ones(size, dtype=torch.bool),
    ):
        order = one_pass._evaluated_first(mask)
        rows = mask.nonzero(), (~mask).nonzero()
        assert order.tolist() == [*(x for part in rows for x in part.flatten().tolist()), int(mask.sum())]


def test_number_of_segments(monkeypatch):
    """Their rows fill two thirds of the cache, and no program goes without a row."""
    monkeypatch.undo()
    from fusedpo.triton_kernels.one_pass import _num_segments

    device = torch.device("cpu")
    assert _num_segments(device, 8192, 151_936 * 2) == (32 << 20) // (151_936 * 2)
    assert _num_segments(device, 8192, 1000) == 128
    assert _num_segments(device, 5, 1000) == 5
    assert _num_segments(device, 5, 1 << 30) == 1


@pytest.mark.parametrize(
    ("shape", "dtype", "two"),
    [
        ((2, 60, 151_936), torch.bfloat16, False),  # 110 rows fit, of 128 processors
        ((2, 60, 151_936), torch.float32, True),  # 55 rows fit
        ((2, 60, 1000), torch.float32, False),
        ((3, 30, 1000), torch.float32, True),  # 90 rows are there
        ((2, 60, 262_144), torch.bfloat16, True),
    ],
)
def test_two_passes_where_processors_would_have_no_row(shape, dtype, two):
    """Four fifths of them have to; but what is forced is done."""
    logits = torch.empty(shape, dtype=dtype, device="meta")
    with fusedpo.backend("auto"):
        assert backends.takes_two_passes(logits, "triton") == two
        assert not backends.takes_two_passes(logits, "native")
    assert not backends.takes_two_passes(logits, "triton")


def test_a_row_is_written_while_the_one_before_it_is_read(monkeypatch):
    """Memory is never idle: between loads of row k - 1 there are stores of row k, from the third row to the first."""
    if DEVICE != "cpu" or ptx.runs_triton():
        pytest.skip("only the interpreter shows the order of loads")
    from triton.runtime.interpreter import interpreter_builder

    use_segments(monkeypatch, 1)
    batch = make_batch((3,), 384, kept=1)
    logits, order = batch["logits"], []
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def row_of(pointers, mask, begin):
        rows = (pointers.data[mask.data] - begin) // (4 * 384)
        return set(rows.tolist()) if pointers.data.size == 32 or pointers.data.size == 128 else set()

    def loaded(pointers, mask, *args):
        order.extend(f"read {row}" for row in row_of(pointers, mask, logits.data_ptr()) if pointers.data.size == 32)
        return load(pointers, mask, *args)

    def stored(pointers, value, mask, *args):
        order.extend(f"write {row}" for row in row_of(pointers, mask, gradient.data_ptr()))
        return store(pointers, value, mask, *args)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", loaded)
    monkeypatch.setattr(interpreter_builder, "create_masked_store", stored)
    gradient = torch.empty_like(logits)
    args = [x for name, x in batch.items() if name != "logits"]
    torch.ops.fusedpo.one_pass.triton(
        logits, gradient, *torch.empty(2, 3), *args, *ops_policy_loss.encode(O.reinforce())
    )
    read, step = ["read {}"] * 4, ["read {}"] * 4 + ["write {}"]
    assert order == [
        *(x.format(2) for x in 3 * read),
        *(x.format(1 if "read" in x else 2) for x in [*read, *step, *step, "write {}"]),
        *(x.format(0 if "read" in x else 1) for x in [*read, *step, *step, "write {}"]),
        *(["write 0"] * 3),
    ]


# ----------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_of_rows(packed, inplace):
    """From the last to the first, they give bit for bit what all rows at a time give."""
    batch = make_batch((13,), 150, lengths=[5, 1, 7]) if packed else make_batch((2, 7), 150)
    whole = run(batch, O.nfpo(4), inplace=inplace)
    live = batch["mask"].flatten().nonzero().flatten()
    out = [torch.full(batch["token_ids"].shape, NAN) for _ in range(2)]
    flat = batch["logits"].flatten(0, -2)
    for rows in reversed(live.split(3)):
        chunk = batch | {"logits": flat[rows], "rows": rows}
        *out, gradient = run(chunk, O.nfpo(4), inplace=inplace, logprobs=out[0].to(DEVICE), entropy=out[1].to(DEVICE))
        assert torch.equal(gradient, whole[2].flatten(0, -2)[rows])
    torch.testing.assert_close([x.cpu().nan_to_num(0) for x in out], whole[:2], rtol=0, atol=0)


def test_rows_that_are_left_out_are_not_evaluated():
    batch = make_batch((6,), 5, kept=1)
    rows = torch.tensor([0, 3, 4], device="cpu")
    logprobs, _, gradient = run(batch | {"logits": batch["logits"][rows], "rows": rows}, O.ppo())
    assert logprobs.isnan().tolist() == [False, True, True, False, False, True]
    assert torch.equal(gradient, run(batch, O.ppo())[2][rows])


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_with_gaps_and_masked_ones(inplace):
    """Windows go over tokens whose log-probs are there already; masked rows hold anything and get zeros."""
    batch = make_batch((2, 7), 150, kept=0.6)
    objective = O.nfpo(4, entropy_coef=0.1)
    whole = run(batch, objective)
    mask = batch["mask"].flatten()
    rows = torch.tensor([0, 1, 2, 3, 8, 9, 10], device="cpu")
    assert 0 < mask[rows].sum() < len(rows)
    logits = batch["logits"].masked_fill(~batch["mask"][..., None], NAN).flatten(0, -2)[rows]
    ids = batch["token_ids"].masked_fill(~batch["mask"], -100)
    known = whole[0].flatten().index_fill(0, rows, 0).view(2, 7)
    part = batch | {"logits": logits, "token_ids": ids, "rows": rows}
    out = {"logprobs": known.to(DEVICE), "entropy": torch.zeros(2, 7).to(DEVICE)}
    assert torch.equal(run(part, objective, inplace=inplace, **out)[2], whole[2].flatten(0, -2)[rows])


# -------------------------------------------------------------------------------------------------- zeros and the edges


def test_rows_without_a_coefficient_are_exactly_zero():
    """Clipped or without an advantage: no bit is set, not even where a logit is -inf or the scale is tiny."""
    batch = make_batch((6,), 300, kept=1)
    batch["advantages"][1] = batch["scale"][3] = 0.0
    batch["advantages"][4], batch["old_logprobs"][4] = 1.0, -30.0
    batch["logits"][1, 5] = -INF
    _, _, gradient = run(batch, O.ppo())
    assert gradient.any(-1).tolist() == [True, False, True, False, False, True]
    _, _, gradient = run(batch, O.ppo(entropy_coef=0.1))
    assert gradient.any(-1).tolist() == [True, True, True, False, True, True]


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_of_zeros_are_filled_not_computed(inplace):
    """A logit makes the softmax of the row nan."""
    batch = make_batch((4,), 300, kept=1) | {"old_logprobs": None}
    batch["advantages"][1] = 0.0
    batch["logits"][1] = INF
    _, _, gradient = run(batch, O.reinforce(), inplace=inplace)
    assert gradient.any(-1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("inplace", [False, True])
def test_all_masked(inplace):
    batch = make_batch((2, 4), 200)
    batch["mask"][:] = False
    logprobs, entropy, gradient = run(batch, O.nfpo(3), inplace=inplace)
    assert not gradient.any()
    assert not logprobs.any()
    assert not entropy.any()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
@pytest.mark.parametrize("inplace", [False, True])
def test_no_tokens(shape, inplace):
    _, _, gradient = run(make_batch(shape), O.nfpo(3), inplace=inplace)
    assert gradient.shape == (*shape, 7)


def test_dead_rows_are_shared_out(monkeypatch):
    """Wherever they cluster: with as many programs as there are rows, each has one."""
    use_segments(monkeypatch, 8)
    batch = make_batch((8,), 200)
    batch["mask"] = torch.arange(8, device="cpu") < 2
    check(batch, O.nfpo(3), inplace=True)


VIEWS = {
    "slice of tokens": ((2, 5, 40), lambda x: x[:, 1:4]),
    "slice of a wider vocabulary": ((2, 3, 43), lambda x: x[..., 1:41]),
    "transposed": ((3, 2, 40), lambda x: x.transpose(0, 1)),
    "expanded": ((1, 3, 40), lambda x: x.expand(2, 3, 40)),
    "strided vocabulary": ((2, 3, 80), lambda x: x[..., ::2]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strided_logits(view, dtype):
    """Where rows begin at other alignments, sums are taken in another order: a few roundings of the result."""
    size, take = VIEWS[view]
    realigned = view == "slice of a wider vocabulary"
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6} if realigned else {"rtol": 0, "atol": 0}
    batch = make_batch((2, 3), 40, dtype=dtype)
    base = torch.randn(size, device=DEVICE).to(dtype)
    want = run(batch | {"logits": take(base).contiguous()}, O.nfpo(2))
    torch.testing.assert_close(run(batch | {"logits": take(base)}, O.nfpo(2)), want, **close, equal_nan=True)
    if view != "expanded":  # such rows cannot hold their gradients
        before, args = base.clone(), {n: x if x is None else x.to(DEVICE) for n, x in batch.items() if n != "logits"}
        outputs = torch.empty(2, 2, 3, device=DEVICE)
        parts = ops_policy_loss.encode(O.nfpo(2))
        torch.ops.fusedpo.one_pass.triton(take(base), take(base), *outputs, *args.values(), *parts)
        torch.testing.assert_close(take(base).cpu(), want[2], **close)
        take(base).copy_(take(before))
        assert torch.equal(base, before)  # nothing beside the rows was written


def test_strided_arrays():
    batch = make_batch((3, 4), 5)
    strided = {n: x.mT.contiguous().mT if x is not None and x.dim() == 2 else x for n, x in batch.items()}
    results = run(strided, O.nfpo(3)), run(batch, O.nfpo(3))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [None, torch.tensor([2])])
def test_bad_values(monkeypatch, rows):
    """An error where a check is free or asked for, before anything is overwritten; elsewhere NaN, and no gradient."""
    monkeypatch.setattr(_checks, "DEBUG", True)
    batch = make_batch((4,), 50, kept=1) | {"rows": rows}
    if rows is not None:
        batch["logits"] = batch["logits"][2:3]
    ids = batch["token_ids"].clone()
    ids[2] = 50
    with pytest.raises(ValueError, match=r"token_ids must be in \[0, 50\) at kept rows, got 50 at flat position 2"):
        run(batch | {"token_ids": ids}, O.ppo())
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0.0"):
        run(batch | {"temperature": torch.tensor(0.0)}, O.ppo())
    monkeypatch.setattr(_checks, "values_are_free", lambda *_: False)
    logprobs, _, gradient = run(batch | {"token_ids": ids}, O.ppo())
    assert logprobs[2].isnan()
    bad = 2 if rows is None else 0
    assert not gradient[bad].any()
    assert gradient.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", ["contiguous", *(view for view in VIEWS if view != "expanded")])
@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0, NAN])
def test_scale(dtype, view, factor):
    size, take = VIEWS.get(view, ((2, 300), lambda x: x))
    base = torch.randn(size).to(dtype)
    before = base.clone()
    torch.ops.fusedpo.scale_.triton(take(base), torch.tensor(factor))
    want = before.clone()
    take(want).copy_(take(before).float() * torch.tensor(factor))  # rounded once
    torch.testing.assert_close(base, want, rtol=0, atol=0, equal_nan=True)


def test_a_factor_of_one_writes_nothing():
    if not ptx.runs_triton():
        pytest.skip("only the machine for PTX counts stores")
    for factor, elements in ((1.0, 0), (2.0, 600)):
        with ptx.recorded() as launches:
            torch.ops.fusedpo.scale_.triton(torch.randn(3, 200), torch.tensor(factor))
        assert sum(counters["store_bytes"] for _, counters in launches) == 4 * elements


# ------------------------------------------------------------------------------------------------ operator and autograd


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    batch = make_batch((5,), lengths=[2, 3]) if packed else make_batch((2, 3))
    batch = {n: x if x is None else x.to(DEVICE) for n, x in batch.items()}
    args = (*torch.zeros(2, *batch["token_ids"].shape), *list(batch.values())[1:], *ops_policy_loss.encode(O.nfpo(3)))
    out = torch.empty_like(batch["logits"])
    torch.library.opcheck(torch.ops.fusedpo.one_pass.triton, (batch["logits"].clone(), out, *args))
    torch.library.opcheck(torch.ops.fusedpo.scale_.triton, (batch["logits"].clone(), torch.tensor(2.0)))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", [O.nfpo(3, entropy_coef=0.1), O.grpo(kl=O.KL("k3", 0.1))], ids=name_of)
def test_policy_loss_from_logits(objective, dtype, inplace):
    """Loss, metrics and gradient, with an upstream gradient other than 1, are those of the composition in float64."""
    batch = make_batch((2, 4), 150, dtype=dtype)
    names = ("token_ids", "old_logprobs", "advantages", "mask", "ref_logprobs", "is_weights", "temperature")
    outputs = []
    for backend, device, kind in (("triton", DEVICE, dtype), ("reference", "cpu", torch.float64)):
        args = {name: batch[name].to(device) for name in names}
        if backend == "reference":
            args = {n: x.double() if x.is_floating_point() else x for n, x in args.items()}
        leaf = batch["logits"].detach().clone().to(device, kind).requires_grad_()
        with fusedpo.backend(backend), torch.device(device):
            out = fusedpo.policy_loss_from_logits(
                leaf * 1, **args, objective=objective, loss_scale=0.5, inplace=inplace
            )
            (3 * out.loss).backward()
        metrics = torch.stack(list(out.metrics.values()))
        outputs.append([x.detach().cpu().double() for x in (out.loss, metrics, out.logprobs, out.entropy, leaf.grad)])
    rtol = 2 * torch.finfo(dtype).eps  # rounded before and after it is multiplied by 3
    for result, value in zip(outputs[0][:4], outputs[1][:4], strict=True):
        torch.testing.assert_close(result, value, rtol=1e-5, atol=2e-6)
    gradient, value = outputs[0][4], outputs[1][4]
    torch.testing.assert_close(gradient, value, rtol=max(rtol, 1e-5), atol=float(2e-6 * value.abs().amax()))


# ------------------------------------------------------------------------------------------------------------- launches


class Computations(TorchDispatchMode):
    """Operators of PyTorch that launch something: all but those that allocate, or return a view, or nothing."""

    def __init__(self):
        super().__init__()
        self.names, self.before = [], ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name, before = function.overloadpacket.__name__, self.before
        self.before = name
        if name == "set_" or (name, before) == ("fill_", "set_"):  # memory that is watched, and marked as not written
            return result
        allocates = function.is_view or "empty" in str(function)
        if function.namespace == "aten" and not allocates and getattr(result, "numel", lambda: 1)() > 0:
            self.names.append(name)
        return result


@pytest.mark.parametrize(
    ("objective", "options", "names"),
    [
        (O.nfpo(4, entropy_coef=0.1), {}, ["_evaluated_first", "_one_pass", "_one_pass"]),
        (O.nfpo(4), {"denominator": 7.0, "loss_scale": 0.5}, ["_evaluated_first", "_one_pass", "_one_pass"]),
        (O.nfpo(4, aggregation="token-sum"), {"mask": None}, ["_one_pass", "_one_pass"]),
        (O.ppo(), {}, ["_evaluated_first", "_one_pass"]),
        (O.ppo(aggregation="seq-mean-token-mean"), {}, ["_shares", "_scale_shares", "_evaluated_first", "_one_pass"]),
    ],
    ids=["windows", "denominator", "no mask", "tokens", "means of sequences"],
)
def test_launches_of_a_step(objective, options, names, monkeypatch):
    """At most six where means are over tokens, backward included: no numbers and no zeros are filled in."""
    from fusedpo.triton_kernels import one_pass, policy_loss

    launched = []
    for module in (one_pass, policy_loss):

        def launch(kernel, *args, run=module.launch, **constants):
            launched.append(kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__)
            run(kernel, *args, **constants)

        monkeypatch.setattr(module, "launch", launch)
    arrays = ("logits", "token_ids", "old_logprobs", "advantages", "mask")
    batch = {name: x.to(DEVICE) for name, x in make_batch((2, 5), 40).items() if name in arrays} | options
    leaf = batch.pop("logits").requires_grad_()

    def step():
        out = fusedpo.policy_loss_from_logits(leaf, **batch, objective=objective, temperature=0.9)
        return torch.autograd.grad(out.loss, leaf)

    step()  # numbers are on the device now
    launched.clear()
    monkeypatch.setattr(_checks, "values_are_free", lambda *_: False)  # as where checks would wait for the device
    with Computations() as computations:
        step()
    assert launched == [f"{name}_kernel" for name in (*names, "_tokens", "_finish", "_scale")]
    assert computations.names == ["ones_like"]  # autograd's, for the loss


# ------------------------------------------------------------------------------------------------------------- on a GPU

REAL = [O.ppo(), O.nfpo(4), O.nfpo(4, entropy_coef=0.01, kl=O.KL("k3", 0.1)), O.nfpo(100)]


def real_batch(dtype, vocab_size, tokens=2048):
    batch = make_batch((tokens,), 2, lengths=[tokens - 700, 0, 1, 699], kept=0.6, spread=0.1)
    g = torch.Generator(DEVICE).manual_seed(1)
    logits = torch.empty(tokens, vocab_size, dtype=dtype, device=DEVICE).normal_(generator=g)
    batch["token_ids"] = torch.randint(vocab_size, (tokens,), generator=g, device=DEVICE)
    logp = fusedpo.token_logprobs(logits, batch["token_ids"], temperature=0.9)
    noise = 0.1 * torch.randn(2, tokens, generator=g, device=DEVICE)
    return batch | {"logits": logits, "old_logprobs": logp + noise[0], "ref_logprobs": logp + noise[1]}


@pytest.mark.gpu
@pytest.mark.parametrize("objective", REAL, ids=str)
@pytest.mark.parametrize(
    ("dtype", "vocab_size"),
    [(torch.bfloat16, 151_936), (torch.float32, 151_936), (torch.float16, 50_257), (torch.bfloat16, 262_144)],
)
def test_real_sizes(dtype, vocab_size, objective, monkeypatch):
    """As layers 1 and 2 one after the other; and bit for bit the same in place, and on another run."""
    monkeypatch.undo()
    batch = real_batch(dtype, vocab_size)
    first, again = run(batch, objective), run(batch, objective)
    b = {n: x.to(DEVICE) if x is not None else x for n, x in batch.items()}
    leaf = b["logits"].requires_grad_()
    logprobs, entropy = fusedpo.token_logprobs(
        leaf, b["token_ids"], temperature=0.9, mask=b["mask"], return_entropy=True
    )
    loss = fusedpo.policy_loss(
        logprobs,
        b["old_logprobs"],
        b["advantages"],
        entropy=entropy,
        objective=objective,
        reduction="none",
        **{name: b[name] for name in ("mask", "cu_seqlens", "ref_logprobs", "is_weights")},
    ).loss
    loss.backward(b["scale"])
    kept = batch["mask"]
    torch.testing.assert_close(first[0][kept], logprobs.detach().cpu()[kept], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(first[1][kept], entropy.detach().cpu()[kept], rtol=1e-5, atol=2e-6)
    gradient = leaf.grad.cpu()
    rtol = max(1e-4, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(first[2], gradient, rtol=rtol, atol=float(1e-5 * gradient.abs().amax()))
    inplace = run(batch | {"logits": leaf.detach()}, objective, inplace=True)
    for results in (again, inplace):
        torch.testing.assert_close(results, first, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_segments_on_a_gpu(monkeypatch):
    batch = real_batch(torch.bfloat16, 32_000)
    results = []
    for count in (1, 7, 66, 132, 264, 2048):
        monkeypatch.undo()
        use_segments(monkeypatch, count)
        results.append(run(batch, REAL[2], inplace=False))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_no_synchronisation():
    batch = {n: x if x is None else x.to(DEVICE) for n, x in make_batch((4, 300), 1000).items()}
    leaf = batch["logits"].requires_grad_()
    names = ("old_logprobs", "advantages", "mask", "ref_logprobs", "is_weights", "temperature")

    def step():
        out = fusedpo.policy_loss_from_logits(
            leaf, batch["token_ids"], **{name: batch[name] for name in names}, objective=REAL[2]
        )
        (2 * out.loss).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("objective", [REAL[0], REAL[2], O.ppo(aggregation="seq-mean-token-mean")], ids=str)
def test_cuda_graph(objective):
    """A step that was captured gives what it gives eagerly, also for other values in the same memory."""
    batch = {n: x if x is None else x.to(DEVICE) for n, x in make_batch((4, 300), 1000).items()}
    leaf = batch["logits"].requires_grad_()
    names = ("old_logprobs", "advantages", "mask", "ref_logprobs", "is_weights", "temperature")

    def step():
        out = fusedpo.policy_loss_from_logits(
            leaf, batch["token_ids"], **{name: batch[name] for name in names}, objective=objective, loss_scale=0.5
        )
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        return out.loss.detach(), *out.metrics.values(), out.logprobs, gradient

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            leaf.copy_(torch.randn_like(leaf))
            batch["mask"].copy_(torch.rand(4, 300) < 0.5)
        graph.replay()
        torch.testing.assert_close(captured, step(), rtol=0, atol=0)


@pytest.mark.gpu
def test_more_than_2_31_elements():
    """16,384 x 151,936: the last rows are what they are alone."""
    rows, size = 16_384, 151_936
    logits = torch.empty(rows, size, dtype=torch.bfloat16, device=DEVICE).normal_()
    batch = make_batch((rows,), 2, kept=1) | {"token_ids": torch.randint(size, (rows,)), "logits": logits}
    last = {n: x[-5:].clone() if x is not None and x.dim() > 0 else x for n, x in batch.items()}
    alone = run(last, O.nfpo(3))
    results = [x[-5:] for x in run(batch, O.nfpo(3), inplace=True)]
    torch.testing.assert_close(results, alone, rtol=0, atol=0)
