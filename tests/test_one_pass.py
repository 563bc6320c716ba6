"""Loss and gradient from logits in one pass: against the reference, against the two passes, and what it promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import one_pass
from support.logprobs import peak_extra_bytes
from support.one_pass import OBJECTIVES, TWO_PASSES, Operators
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fusedpo
from fusedpo import backends
from fusedpo import objectives as O
from fusedpo.ops import one_pass as ops_one_pass
from fusedpo.ops import policy_loss as ops_policy_loss

pytestmark = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
EVERY = OBJECTIVES | TWO_PASSES
every_objective = pytest.mark.parametrize("objective", EVERY.values(), ids=EVERY.keys())
both_places = pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(batch, objective, inplace=False, upstream=None, **options):
    """The output, and the gradient of the logits."""
    leaf = batch["logits"].clone().requires_grad_()
    others = {name: x for name, x in batch.items() if name != "logits"}
    out = fusedpo.policy_loss_from_logits(leaf * 1, **others, objective=objective, inplace=inplace, **options)
    out.loss.backward(upstream)
    return out, leaf.grad


def two_passes(monkeypatch, *args, **kwargs):
    with monkeypatch.context() as patch:
        patch.setitem(backends.IMPLEMENTATIONS, "one_pass", {})
        return run(*args, **kwargs)


def equal(a, b) -> bool:
    (out, gradient), (other, other_gradient) = a, b
    same = [torch.equal(x, y) for x, y in zip(out[2:], other[2:], strict=True)]
    return torch.equal(gradient, other_gradient) and torch.equal(out.loss, other.loss) and all(same)


# ----------------------------------------------------------------------------------------------------------- the values


@every_objective
@pytest.mark.parametrize("lengths", [None, [1, 9, 1, 1, 0, 8]], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_reference(objective, lengths, dtype):
    batch = one_pass.batch((4, 5) if lengths is None else (20,), 301, dtype, lengths)
    options = {"loss_scale": torch.tensor(16.0), "objective": objective}
    with Operators() as operators:
        out, gradient = run(batch, **options)
    assert operators.one_pass() == (objective in OBJECTIVES.values())
    expected, expected_gradient = one_pass.by_reference(batch, **options)
    one_pass.check_gradient(gradient, expected_gradient)
    for result, value in zip(out[2:], expected[2:], strict=True):
        torch.testing.assert_close(result.double(), value, rtol=1e-6, atol=1e-6)
    one_pass.check_loss(out, batch, **options)


@every_objective
@both_places
def test_bits_of_the_two_passes(objective, inplace, monkeypatch):
    """Whether it takes one or two, and wherever the gradient goes."""
    batch = one_pass.batch((3, 40), 1000, torch.bfloat16)
    assert equal(run(batch, objective, inplace), two_passes(monkeypatch, batch, objective))


@pytest.mark.parametrize("vocabulary", [2, 3, 31, 127, 1000, 32_003, 151_936])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_vocabulary(vocabulary, dtype):
    batch = one_pass.batch((7,), vocabulary, dtype)
    objective = O.nfpo(3, entropy_coef=0.1, aggregation="token-sum")
    _, gradient = run(batch, objective, inplace=True, loss_scale=torch.tensor(64.0))
    one_pass.check_gradient(gradient, one_pass.by_reference(batch, objective, loss_scale=64.0)[1])


@pytest.mark.parametrize("ahead", [1, 4, 16, 17, 80, 256])
@both_places
def test_nothing_depends_on_the_segments(ahead, inplace, monkeypatch):
    """More threads than rows of a sequence, windows longer than a segment."""
    batch = one_pass.batch((150,), 3500, lengths=[1, 60, 1, 88], kept=0.8)
    objective = O.Objective(O.Trace(0, ahead), O.PPOClip(), entropy_coef=0.01)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            results.append(run(batch, objective, inplace))
    finally:
        torch.set_num_threads(threads)
    assert all(equal(results[0], result) for result in results[1:])
    one_pass.check_gradient(results[0][1], one_pass.by_reference(batch, objective)[1], window=ahead)


def test_a_batch_is_its_sequences():
    """What stands before and behind a sequence changes no bit of it."""
    batch = one_pass.batch((60,), 700, lengths=[25, 1, 34])
    objective = O.nfpo(8, aggregation="token-sum")
    _, whole = run(batch, objective)
    part = {name: x[26:] if isinstance(x, Tensor) else x for name, x in batch.items() if name != "cu_seqlens"}
    assert torch.equal(run(part, objective)[1], whole[26:])


@both_places
def test_logits_of_any_strides(inplace):
    """In place, what lies between the rows stays as it is."""
    batch = one_pass.batch((4, 6), 90)
    wide = torch.full((6, 5, 200), torch.nan)
    view = wide.transpose(0, 1)[1:, :, 30:120]
    view.copy_(batch["logits"])
    expected = run(batch, O.nfpo(3))
    leaf = view.detach().requires_grad_()
    out = fusedpo.policy_loss_from_logits(**batch | {"logits": leaf}, objective=O.nfpo(3), inplace=inplace)
    out.loss.backward()
    assert torch.equal(leaf.grad, expected[1])
    assert torch.equal(view, expected[1] if inplace else batch["logits"])
    view.fill_(torch.nan)
    assert wide.isnan().all()
    columns = batch | {"logits": batch["logits"].movedim(-1, 0).contiguous().movedim(0, -1)}
    assert torch.equal(run(columns, O.nfpo(3), inplace=True)[1], expected[1])


def test_advantages_per_sequence_no_old_logprobs_no_mask():
    batch = one_pass.batch((3, 8), 50)
    batch |= {"advantages": torch.randn(3), "is_weights": torch.rand(3, 1), "old_logprobs": None, "mask": None}
    _, gradient = run(batch, O.nfpo(3))
    one_pass.check_gradient(gradient, one_pass.by_reference(batch, O.nfpo(3))[1])


# -------------------------------------------------------------------------------------------------------- the dead rows


@both_places
def test_masked_rows_are_not_read(inplace):
    batch = one_pass.batch((3, 8), 50)
    expected = run(batch, O.nfpo(3, entropy_coef=0.1), inplace)
    poisoned = {
        name: x.clone().masked_fill_(~batch["mask"].reshape(batch["mask"].shape + (1,) * (x.dim() - 2)), torch.nan)
        if x.is_floating_point()
        else x
        for name, x in batch.items()
    }
    poisoned["token_ids"] = batch["token_ids"].masked_fill(~batch["mask"], -100)
    result = run(poisoned, O.nfpo(3, entropy_coef=0.1), inplace)
    assert equal(result, expected)
    assert not result[1][~batch["mask"]].any()


@both_places
def test_nothing_is_kept(inplace):
    batch = one_pass.batch((3, 8), 50, kept=0)
    out, gradient = run(batch, O.nfpo(3), inplace)
    assert out.loss.item() == 0
    assert not gradient.any()
    for shape, lengths in (((0,), [0, 0]), ((0, 4), None), ((4, 0), None)):
        empty = one_pass.batch(shape, 50, lengths=lengths)
        assert run(empty, O.nfpo(3), inplace)[1].shape == (*shape, 50)


@both_places
def test_a_coefficient_of_zero_gives_zero(inplace):
    """Though the row holds a logit that makes its softmax nan: it is filled, not computed."""
    batch = one_pass.batch((12,), 40, kept=1)
    batch["advantages"][::2] = 0
    batch["logits"][4] = torch.inf
    batch["old_logprobs"] = None
    _, gradient = run(batch, O.reinforce(), inplace)
    assert not gradient[::2].any()
    assert gradient[1::2].any(-1).all()


def test_nan_reaches_the_windows_that_hold_it():
    """Its own ratio is clamped, which stops the gradient; the loss is nan all the same."""
    batch = one_pass.batch((12,), 40, kept=1)
    batch["logits"][6, 0] = torch.nan
    out, gradient = run(batch, O.nfpo(3))
    assert out.loss.isnan()
    assert gradient.isnan().any(-1).tolist() == [t in (4, 5) for t in range(12)]


# ------------------------------------------------------------------------------------------------- who takes one pass


def test_the_longest_window_in_one_pass():
    assert ops_one_pass.is_possible(O.nfpo(ops_one_pass.MAX_AHEAD + 1))
    assert not ops_one_pass.is_possible(O.nfpo(ops_one_pass.MAX_AHEAD + 2))


@pytest.mark.parametrize(
    ("loss_scale", "one"), [(1.0, False), (0.25, False), (65536.0, True), (torch.tensor(65536.0), True)], ids=str
)
def test_half_precision_needs_the_scale_in_the_pass(loss_scale, one):
    """With a GradScaler's factor as upstream gradient, small gradients would be lost before it comes."""
    batch = one_pass.batch((64,), 500, torch.float16, kept=1)
    upstream = torch.tensor(65536.0 / loss_scale) if not one else None
    with Operators() as operators:
        _, gradient = run(batch, O.reinforce(), loss_scale=loss_scale, upstream=upstream)
    assert operators.one_pass() == one
    assert (gradient != 0).float().mean() > 0.999
    one_pass.check_gradient(gradient, one_pass.by_reference(batch, O.reinforce(), loss_scale=65536.0)[1])


def test_no_gradient_no_backward():
    batch = one_pass.batch((2, 6), 30)
    expected, _ = run(batch, O.nfpo(2))
    before = batch["logits"].clone()
    for context, requires_grad in ((torch.no_grad(), True), (torch.enable_grad(), False)):
        logits = batch["logits"].requires_grad_(requires_grad)
        with context, Operators() as operators:
            out = fusedpo.policy_loss_from_logits(**batch | {"logits": logits}, objective=O.nfpo(2), inplace=True)
        assert not operators.one_pass()
        assert torch.equal(out.loss, expected.loss.detach())
        assert torch.equal(logits.detach(), before)


# ------------------------------------------------------------------------------------------------------------- autograd


@both_places
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_upstream_gradient(inplace, dtype):
    """Scales what is stored; 1 leaves every bit, and nobody reads it on the host."""
    batch = one_pass.batch((3, 5), 77, dtype)
    _, gradient = run(batch, O.nfpo(2), inplace)
    with Operators() as operators:
        assert torch.equal(run(batch, O.nfpo(2), inplace, torch.tensor(1.0))[1], gradient)
    assert "aten::_local_scalar_dense" not in operators.names
    _, scaled = run(batch, O.nfpo(2), inplace, torch.tensor(-2.5))
    assert torch.equal(scaled, (gradient.float() * -2.5).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_factor_of_one_leaves_every_bit(dtype):
    """Of a signalling nan too, which a multiplication by 1 would make a quiet one."""
    gradient = one_pass.signalling_nan((3, 50), dtype)
    torch.ops.fusedpo.scale_.native(gradient, torch.tensor(1.0))
    assert torch.equal(one_pass.bits(gradient), one_pass.bits(one_pass.signalling_nan((3, 50), dtype)))


@both_places
def test_a_second_backward_raises(inplace):
    batch = one_pass.batch((2, 6), 30)
    logits = batch.pop("logits").requires_grad_() * 1
    out = fusedpo.policy_loss_from_logits(logits, **batch, objective=O.ppo(), inplace=inplace)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward has taken it"):
        out.loss.backward()


def test_double_backward_raises():
    batch = one_pass.batch((2, 6), 30)
    leaf = batch.pop("logits").requires_grad_()
    out = fusedpo.policy_loss_from_logits(leaf, **batch, objective=O.ppo())
    (gradient,) = torch.autograd.grad(out.loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.square().sum().backward()


def test_inplace_promises():
    batch = one_pass.batch((2, 6), 30)
    _, gradient = run(batch, O.ppo())
    leaf = batch.pop("logits").requires_grad_()
    x = leaf * 1
    version, other = x._version, x.square().sum()
    out = fusedpo.policy_loss_from_logits(x, **batch, objective=O.ppo(), inplace=True)
    assert x._version > version
    assert torch.equal(x.detach(), gradient)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


@pytest.mark.parametrize("objective", TWO_PASSES.values(), ids=TWO_PASSES.keys())
def test_two_passes_overwrite_the_logits_in_the_backward(objective):
    batch = one_pass.batch((2, 6), 30)
    _, gradient = run(batch, objective)
    x = batch["logits"].clone().requires_grad_() * 1
    out = fusedpo.policy_loss_from_logits(**batch | {"logits": x}, objective=objective, inplace=True)
    assert torch.equal(x.detach(), batch["logits"])
    out.loss.backward(retain_graph=True)
    assert torch.equal(x.detach(), gradient)
    with pytest.raises(RuntimeError, match="the first backward has overwritten the logits"):
        out.loss.backward()


@pytest.mark.parametrize("strides", [(0, 0, 1), (0, 30, 1), (120, 20, 1), (20, 40, 1)], ids=str)
@pytest.mark.parametrize("objective", [O.ppo(), O.gspo(0.1, 0.2)], ids=["one pass", "two passes"])
def test_inplace_leaves_rows_that_share_memory_alone(objective, strides):
    batch = one_pass.batch((2, 6), 30) | {"old_logprobs": None}
    leaf = torch.randn(250, requires_grad=True)
    batch["logits"] = (leaf * 1).as_strided((2, 6, 30), strides)
    fusedpo.policy_loss_from_logits(**batch, objective=objective, inplace=True).loss.backward()
    batch["logits"] = leaf.detach().as_strided((2, 6, 30), strides)
    (expected,) = torch.autograd.grad(leaf.as_strided((2, 6, 30), strides), leaf, run(batch, objective)[1])
    assert expected.any()
    torch.testing.assert_close(leaf.grad, expected)


def test_gradients_accumulate_over_micro_batches():
    batch = one_pass.batch((6, 5), 40)
    denominator = batch["mask"].sum()
    _, whole = run(batch, O.nfpo(3))
    leaf = batch["logits"].clone().requires_grad_()
    for rows in (slice(0, 2), slice(2, 6)):
        part = {name: x[rows] for name, x in batch.items()} | {"logits": leaf[rows] * 1}
        fusedpo.policy_loss_from_logits(
            **part, objective=O.nfpo(3), denominator=denominator, inplace=True
        ).loss.backward()
    torch.testing.assert_close(leaf.grad, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
@both_places
def test_checkpointing(reentrant, inplace):
    batch = one_pass.batch((2, 6), 30)
    _, expected = run(batch, O.nfpo(2))
    leaf = batch.pop("logits").requires_grad_()

    def loss(logits):
        return fusedpo.policy_loss_from_logits(logits * 1, **batch, objective=O.nfpo(2), inplace=inplace).loss

    checkpoint(loss, leaf, use_reentrant=reentrant).backward()
    assert torch.equal(leaf.grad, expected)


@pytest.mark.slow
def test_compiled_it_takes_two_passes():
    batch = one_pass.batch((2, 6), 30)
    expected, gradient = run(batch, O.nfpo(2))
    logits = batch.pop("logits")
    leaf = logits.clone().requires_grad_()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def loss(logits):
        return fusedpo.policy_loss_from_logits(logits, **batch, objective=O.nfpo(2), inplace=True).loss

    result = loss(leaf)
    assert torch.equal(leaf.detach(), logits)
    result.backward()
    torch.testing.assert_close(result, expected.loss)
    torch.testing.assert_close(leaf.grad, gradient)


def test_functional_transforms_take_two_passes():
    batch = one_pass.batch((2, 6), 30)
    _, gradient = run(batch, O.nfpo(2))
    logits = batch.pop("logits")
    result = torch.func.grad(lambda x: fusedpo.policy_loss_from_logits(x, **batch, objective=O.nfpo(2)).loss)(logits)
    torch.testing.assert_close(result, gradient)


@pytest.mark.parametrize("objective", [O.nfpo(4), *TWO_PASSES.values()], ids=["nfpo", *TWO_PASSES])
@both_places
def test_memory(objective, inplace):
    """In place nothing of the size of the logits is allocated; otherwise the gradient alone."""
    batch = one_pass.batch((64,), 20_000, torch.bfloat16)
    most = 0 if inplace else batch["logits"].numel() * 2
    batch["logits"].requires_grad_()
    peak = peak_extra_bytes(
        lambda: fusedpo.policy_loss_from_logits(**batch, objective=objective, inplace=inplace).loss.backward()
    )
    assert most <= peak <= most + 64 * 64 + 16_384


# -------------------------------------------------------------------------------------------------------- the operators


def arguments(batch, objective, rows=None):
    """Those of the operators but the logits; ``rows`` picks tokens."""
    shape = batch["token_ids"].shape
    tokens = (batch["old_logprobs"], batch["advantages"], batch["mask"], None, batch["ref_logprobs"], None)
    scale = torch.rand(shape).masked_fill(~batch["mask"], 0)
    start = (torch.zeros(shape), torch.zeros(shape), rows, batch["token_ids"], batch["temperature"])
    return (*start, *tokens, scale, *ops_policy_loss.encode(objective))


def test_opcheck():
    batch = one_pass.batch((2, 6), 30)
    args = (batch["logits"], torch.empty_like(batch["logits"]), *arguments(batch, O.nfpo(3)))
    torch.library.opcheck(torch.ops.fusedpo.one_pass.native, args)
    torch.library.opcheck(torch.ops.fusedpo.scale_.native, (batch["logits"], torch.tensor(2.0)))


def in_one_call(ahead):
    """A batch of 30 tokens, the arguments of an objective whose windows look ahead, and the gradient of all rows."""
    batch = one_pass.batch((30,), 64, kept=0.6)
    args = arguments(batch, O.Objective(O.Trace(0, ahead), O.PPOClip(), entropy_coef=0.1))
    whole = torch.empty_like(batch["logits"])
    torch.ops.fusedpo.one_pass.native(batch["logits"], whole, *args)
    return batch, args, whole


@pytest.mark.parametrize("ahead", [0, 3, 40])
def test_rows_in_chunks_from_the_end(ahead):
    """A chunk finds the log-probs behind it where the chunk before left them."""
    batch, args, whole = in_one_call(ahead)
    rows = batch["mask"].nonzero()[:, 0]
    logprobs, entropy = torch.zeros(2, 30)
    gradient = torch.zeros_like(whole)
    for chunk in reversed(rows.split(4)):
        logits = batch["logits"][chunk]
        torch.ops.fusedpo.one_pass.native(logits, logits, logprobs, entropy, chunk, *args[3:])
        gradient[chunk] = logits
    assert torch.equal(gradient, whole)
    assert torch.equal(logprobs, args[0])
    assert torch.equal(entropy, args[1])


@pytest.mark.parametrize("ahead", [3, 40])
def test_windows_look_over_rows_that_are_not_there(ahead):
    """The log-probs of tokens that are not in `rows` are there already, whether behind the last of them or before."""
    batch, args, whole = in_one_call(ahead)
    rows = batch["mask"].nonzero()[:, 0]
    rows = torch.cat((rows[2:5], rows[-5:-2]))
    logits, logprobs = batch["logits"][rows], args[0].clone()
    logprobs[rows] = 0  # those in `rows` are written before they are looked at
    torch.ops.fusedpo.one_pass.native(logits, logits, logprobs, args[1].clone(), rows, *args[3:])
    assert torch.equal(logits, whole[rows])


@pytest.mark.parametrize("ahead", [0, 3, 40])
def test_rows_of_masked_tokens_have_no_gradient(ahead):
    """They hold anything, and no window counts them."""
    batch, args, whole = in_one_call(ahead)
    rows = torch.arange(4, 30)
    logits = batch["logits"].masked_fill(~batch["mask"][:, None], torch.nan)[rows]
    ids = args[3].masked_fill(~batch["mask"], -100)
    torch.ops.fusedpo.one_pass.native(logits, logits, torch.zeros(30), torch.zeros(30), rows, ids, *args[4:])
    assert torch.equal(logits, whole[rows])
    assert not logits[~batch["mask"][rows]].any()


@pytest.mark.parametrize("rows", [[3, 2], [2, 2], [-1], [30]], ids=str)
def test_rows_that_are_none(rows):
    batch = one_pass.batch((30,), 64, kept=1)
    rows = torch.tensor(rows)
    logits = batch["logits"][: len(rows)]
    with pytest.raises(ValueError, match="rows must be ascending positions of tokens"):
        torch.ops.fusedpo.one_pass.native(logits, logits, *arguments(batch, O.ppo(), rows))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("token_ids", 30, r"token_ids must be in \[0, 30\) at kept rows, got 30 at flat position 3"),
        ("temperature", 0.0, "temperature must be positive and finite, got 0.000000 at row 3"),
    ],
)
def test_errors_come_before_anything_is_overwritten(name, value, message):
    batch = one_pass.batch((2, 6), 30, kept=1)
    batch[name][0, 3] = value
    logits = batch.pop("logits")
    x = logits.clone().requires_grad_() * 1
    with pytest.raises(ValueError, match=message):
        fusedpo.policy_loss_from_logits(x, **batch, objective=O.ppo(), inplace=True)
    assert torch.equal(x.detach(), logits)


def test_every_part_is_tested():
    """By the objectives that one pass serves, or where it serves none with that part, by the others."""
    objectives, others = OBJECTIVES.values(), TWO_PASSES.values()
    regions, ratios = {O.LogClip, O.CPPO, O.GMPO}, {O.SequenceRatio}
    assert {type(o.trust_region) for o in objectives} == set(O.TrustRegion.__args__) - regions
    assert {type(o.ratio) for o in objectives} == set(O.Ratio.__args__) - ratios
    assert regions <= {type(o.trust_region) for o in others}
    assert ratios <= {type(o.ratio) for o in others}
    assert {o.aggregation for o in objectives} == set(O.AGGREGATIONS)
    estimates = [o.kl for o in objectives if o.kl is not None]
    assert {kl.kind for kl in estimates} == set(O.KL_KINDS)
    assert {(kl.clamp is not None, kl.weighted) for kl in estimates} == set(itertools.product([False, True], repeat=2))
