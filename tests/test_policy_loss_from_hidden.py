"""The loss from hidden states by its kernels: that of the whole batch, its gradients, and only what they cost."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.hidden import GRID, OBJECTIVES, B, H, Products, T, V, assert_equal_to_reference, in_float64, make, run
from support.logprobs import peak_extra_bytes, product_bytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusedpo
from fusedpo import _checks
from fusedpo import objectives as O
from fusedpo.ops import hidden as ops_hidden

pytestmark = pytest.mark.usefixtures("native")


@pytest.mark.parametrize(("packed", "chunk_tokens"), [(False, 3), (True, 1), (True, 7), (True, None)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_to_the_composition_in_float64(name, packed, chunk_tokens):
    """Chunks end within sequences and within windows; packed sequences have 0, 1 and up to 13 tokens."""
    sources, batch = make(packed=packed)
    assert_equal_to_reference(sources, batch, objective=OBJECTIVES[name], chunk_tokens=chunk_tokens, upstream=-1.7)


def roundings(vocab: int) -> float:
    """Ten or so of a row, and those of the product that sums over the vocabulary, which grow as a random walk does."""
    return 1e-5 + torch.finfo(torch.float32).eps * vocab**0.5


@pytest.mark.parametrize("vocab", [2, 3, 1000, 151_936])
@pytest.mark.parametrize("name", ["nfpo(3)", "gspo"])
def test_vocabularies(name, vocab):
    assert_equal_to_reference(*make(vocab=vocab), rtol=roundings(vocab), objective=OBJECTIVES[name], chunk_tokens=7)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", ["nfpo(3)", "gspo"])
def test_threads(name, threads):
    """Chunks of as many rows as threads, more and fewer. Matrix products do not give the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for chunk_tokens in (2, 9):
            assert_equal_to_reference(*make(packed=True), objective=OBJECTIVES[name], chunk_tokens=chunk_tokens)
    finally:
        torch.set_num_threads(before)


OPTIONS = {
    "softcap": {"softcap": 2.0},
    "scale": {"logit_scale": -0.5},
    "all": {"softcap": 3.0, "logit_scale": 1.5, "temperature": torch.linspace(0.5, 1.5, B * T).reshape(B, T)},
    "temperature": {"temperature": 0.7},
    "denominator and scale": {"denominator": 11.0, "loss_scale": torch.tensor(8.0)},
    "no old log-probs": {"old_logprobs": None},
    "no mask": {"mask": None},
    "advantages per sequence": {"advantages": torch.tensor([[1.0], [-2.0], [0.5], [0.3]])},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["nfpo(3)", "cispo", "gspo"])
def test_options(name, options):
    sources, batch = make(seed=1)
    batch |= {argument: x for argument, x in OPTIONS[options].items() if argument in batch}
    others = {argument: x for argument, x in OPTIONS[options].items() if argument not in batch}
    assert_equal_to_reference(sources, batch, objective=OBJECTIVES[name], chunk_tokens=5, **others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["nfpo(3)", "gspo", "cispo", "sapo", "dppo_kl", "nfpo, product", "ctpo", "cppo"])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}], ids=str)
def test_16_bit(dtype, name, options):
    """Logits are rounded, whose error enters the ratios: as large as eps times the logits, which are of order 5."""
    sources, batch = make(dtype)
    options = {"objective": OBJECTIVES[name], "chunk_tokens": 5, "loss_scale": 256.0, **options}
    assert_equal_to_reference(sources, batch, rtol=8 * torch.finfo(dtype).eps, **options)


# ------------------------------------------------------------------------------------------------ which way it goes


def products_of(function) -> list[tuple[int, int, int]]:
    with Products() as products:
        function()
    return products.shapes


@pytest.mark.parametrize("needed", GRID, ids=str)
@pytest.mark.parametrize("name", ["nfpo(3)", "gspo"])
def test_only_what_needs_a_gradient_is_computed(name, needed):
    sources, batch = make()
    options = {"objective": OBJECTIVES[name], "num_live": int(batch["mask"].sum())}
    gradients, wanted = [], run(sources, batch, **options)[1]
    shapes = products_of(lambda: gradients.extend(run(sources, batch, needed=needed, **options)[1]))
    again = name == "gspo" and any(needed)
    assert len(shapes) == 1 + again + sum(needed)
    for gradient, want, n in zip(gradients, wanted, needed, strict=True):
        assert (gradient is not None) == n
        if n:
            assert torch.equal(gradient, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0, torch.tensor(1024.0)], ids=["unscaled", "number", "tensor"])
def test_small_gradients_of_float16_are_not_lost(dtype, loss_scale):
    """Without loss_scale the factor comes with the backward: the gradients are computed there, not rounded before."""
    sources, batch = make(dtype)
    sources[0] = sources[0] / 4096
    sources[1] = sources[1] / 64
    unscaled = not isinstance(loss_scale, Tensor) and loss_scale == 1
    options = {"objective": O.ppo(), "loss_scale": loss_scale, "upstream": 1024.0 if unscaled else 1.0}
    shapes = []
    with Products() as products:
        _, gradients = run(sources, batch, **options)
        shapes = products.shapes
    assert len(shapes) == 4 + (unscaled and dtype == torch.float16)
    _, wanted = run(*in_float64(sources, batch), backend="reference", **options)
    for got, want in zip(gradients, wanted, strict=True):
        assert (got.double() - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()


class Syncs(TorchDispatchMode):
    """What a GPU would have to finish first: operators whose result, or its shape, depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            syncs = any(x is not None and x.dtype == torch.bool for x in args[1])
        else:
            syncs = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(function.tags)
        if syncs:
            self.names[function.overloadpacket.__name__] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", ["nfpo(3)", "ppo", "gspo", "cppo"])
def test_rows_are_counted_once_and_not_at_all_where_their_number_is_known(name, known, packed, monkeypatch):
    monkeypatch.setattr(_checks, "values_are_free", lambda *_: False)  # as on a GPU
    sources, batch = make(packed=packed)
    num_live = int(batch["mask"].sum()) if known else None
    with Syncs() as syncs:
        run(sources, batch, objective=OBJECTIVES[name], chunk_tokens=5, num_live=num_live)
    assert syncs.names == ({} if known else {"nonzero": 1})


def test_without_gradients_only_the_logits_are_computed():
    sources, batch = make()
    for needed in ((False,) * 3, (True,) * 3):
        with torch.no_grad():
            leaves = [x.requires_grad_(n) for x, n in zip(sources, needed, strict=True)]
            shapes = products_of(
                lambda leaves=leaves: fusedpo.policy_loss_from_hidden(*leaves[:2], **batch, objective=O.dapo())
            )
        assert [shape[1:] for shape in shapes] == [(H, V)]


def test_forced_reference_evaluates_every_kept_token():
    sources, batch = make()
    batch["advantages"].zero_()
    out, _ = run(sources, batch, backend="reference", objective=O.ppo())
    assert out.metrics["rows"] == out.metrics["tokens"] == batch["mask"].sum()
    assert (out.logprobs[batch["mask"]] != 0).all()


# ------------------------------------------------------------------------------------------------ dead rows


def dead_batch(name: str) -> tuple[list[Tensor], dict, Tensor]:
    """One sequence of 24 tokens, or three of 1, 16 and 7; advantages at tokens 5, 11 and 20. Who is evaluated?"""
    sources, batch = make()
    sources[0] = sources[0].flatten(0, 1)
    batch = {key: x.flatten() for key, x in batch.items()}
    batch["cu_seqlens"] = torch.tensor([0, 1, 17, 24])
    batch["mask"] = torch.arange(B * T) % 4 != 3  # neither 7 nor 11 is kept
    batch["advantages"] = torch.zeros(B * T)
    batch["advantages"][[5, 11, 20]] = torch.tensor([1.0, 1.0, -1.0])
    reached = {
        "ppo": [5, 20],
        "nfpo(4)": [5, 6, 8, 20, 21, 22],
        "back and ahead": [4, 5, 6, 18, 20, 21],
        "nfpo(100)": [5, 6, 8, 9, 10, 12, 13, 14, 16, 20, 21, 22],
        "prefix": [1, 2, 4, 5, 17, 18, 20],
        "gspo": [1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18, 20, 21, 22],
    }
    reached["gmpo"] = reached["cppo"] = reached["gspo"]
    evaluated = torch.zeros(B * T, dtype=torch.bool)
    evaluated[reached[name]] = True
    return sources, batch, evaluated


DEAD = {
    "ppo": O.ppo(aggregation="seq-mean-token-mean"),
    "nfpo(4)": O.nfpo(4),
    "back and ahead": O.Objective(O.Trace(2, 1), O.PPOClip()),
    "nfpo(100)": O.nfpo(100),
    "prefix": O.Objective(O.Trace("all", 0), O.PPOClip()),
    "gspo": O.gspo(),
    "gmpo": O.gmpo(),
    "cppo": O.cppo(),
}


@pytest.mark.parametrize("chunk_tokens", [1, None])
@pytest.mark.parametrize("name", DEAD)
def test_dead_rows_cost_nothing_and_change_nothing(name, chunk_tokens):
    sources, batch, evaluated = dead_batch(name)
    options = {"objective": DEAD[name], "chunk_tokens": chunk_tokens, "skip_zero_advantages": True}
    results = []
    shapes = products_of(lambda: results.append(run(sources, batch, **options)))
    assert sum(rows for rows, inner, columns in shapes if (inner, columns) == (V, H)) == evaluated.sum()
    want, wanted = run(*in_float64(sources, batch), backend="reference", objective=DEAD[name])
    (out, gradients) = results[0]
    torch.testing.assert_close(out.loss.double(), want.loss, rtol=1e-5, atol=1e-7)
    for got, expected in zip(gradients, wanted, strict=True):
        assert (got.double() - expected).abs().max() <= 1e-5 * expected.abs().max()
    for got, expected in ((out.logprobs, want.logprobs), (out.entropy, want.entropy)):
        torch.testing.assert_close(got, expected.where(evaluated, 0).float(), rtol=1e-5, atol=1e-5)
    assert out.metrics["rows"] == evaluated.sum()
    assert out.metrics["tokens"] == batch["mask"].sum()
    of_evaluated, _ = run(*in_float64(sources, {**batch, "mask": evaluated}), backend="reference", objective=DEAD[name])
    for metric in set(want.metrics) - {"rows", "tokens"}:
        torch.testing.assert_close(
            out.metrics[metric].double(), of_evaluated.metrics[metric], rtol=1e-4, atol=1e-6, msg=metric
        )


@pytest.mark.parametrize(
    "objective", [O.ppo(kl=O.KL("k3", 0.1)), O.nfpo(3, entropy_coef=0.1), O.dro(beta=0.5)], ids=["kl", "entropy", "dro"]
)
def test_terms_that_are_no_multiple_of_the_advantage_keep_every_row_alive(objective):
    sources, batch, _ = dead_batch("ppo")
    batch["advantages"].zero_()
    options = {"objective": objective, "skip_zero_advantages": True}
    assert_equal_to_reference(sources, batch, chunk_tokens=5, **options)
    out, gradients = run(sources, batch, **options)
    assert out.metrics["rows"] == batch["mask"].sum()
    assert gradients[0].any()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_metrics_are_those_of_every_entry_point(name, known):
    """Of all kept tokens, whatever their advantages: kernels, reference, compiled, from logits."""
    sources, batch, _ = dead_batch(name)
    batch["old_logprobs"] = batch["old_logprobs"] + 0.5 * torch.randn(B * T)
    hidden, weight, bias = sources
    others = {"objective": DEAD[name], **({"num_live": int(batch["mask"].sum())} if known else {})}
    metrics = run(sources, batch, **others)[0].metrics
    assert metrics["rows"] == metrics["tokens"] == batch["mask"].sum()
    assert metrics["approx_kl_k3"] > 0.01
    from_logits = fusedpo.policy_loss_from_logits(
        (hidden @ weight.T + bias).requires_grad_(), **batch, objective=DEAD[name]
    )
    with fusedpo.backend("auto"):
        compiled = torch.compile(fusedpo.policy_loss_from_hidden, fullgraph=True, backend="eager")
        results = [
            run(sources, batch, backend="reference", **others)[0].metrics,
            {**from_logits.metrics, "rows": metrics["rows"], "dropped": metrics["dropped"]},
            compiled(hidden.requires_grad_(), weight, **batch, bias=bias, objective=DEAD[name]).metrics,
        ]
    for result in results:
        assert list(result) == list(metrics)
        torch.testing.assert_close(list(result.values()), list(metrics.values()), rtol=1e-4, atol=1e-6)


def test_the_reference_skips_the_same_tokens():
    sources, batch, evaluated = dead_batch("nfpo(4)")
    options = {"objective": DEAD["nfpo(4)"], "skip_zero_advantages": True}
    assert_equal_to_reference(sources, batch, rtol=1e-4, num_live=18, **options)
    out = run(sources, batch, backend="reference", **options)[0]
    assert torch.equal(out.logprobs != 0, evaluated)


@pytest.mark.parametrize("advantages", ["zero", "one sequence"])
@pytest.mark.parametrize("name", ["nfpo(4)", "gspo"])
def test_sequences_whose_rewards_are_all_alike(name, advantages):
    """GRPO's advantages of a group without variance are 0."""
    sources, batch = make()
    batch["mask"][:] = True
    batch["advantages"] = torch.zeros(B)
    batch["advantages"][1] = advantages != "zero"
    out, gradients = run(sources, batch, objective=DEAD[name], skip_zero_advantages=True)
    assert out.metrics["rows"] == (0 if advantages == "zero" else T)
    want, wanted = run(*in_float64(sources, batch), backend="reference", objective=DEAD[name])
    torch.testing.assert_close(out.loss.double(), want.loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close([g.double() for g in gradients], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["nfpo(3)", "ppo", "gspo"])
@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_all_masked(name, chunk_tokens):
    sources, batch = make()
    batch["mask"][:] = False
    sources[0][:], batch["token_ids"][:], batch["advantages"][:] = torch.nan, -100, torch.nan
    out, gradients = run(sources, batch, objective=OBJECTIVES[name], chunk_tokens=chunk_tokens)
    for x in (out.loss, out.logprobs, out.entropy, *out.metrics.values(), *gradients):
        assert (x == 0).all()


@pytest.mark.parametrize("name", ["nfpo(3)", "ppo", "gspo"])
def test_masked_rows_are_not_read(name):
    sources, batch = make()
    want = run(sources, batch, objective=OBJECTIVES[name])
    masked = ~batch["mask"]
    sources[0][masked], batch["token_ids"][masked] = torch.nan, -100
    for argument in ("old_logprobs", "ref_logprobs", "advantages", "is_weights"):
        batch[argument][masked] = torch.nan
    got = run(sources, batch, objective=OBJECTIVES[name])
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["nfpo(3)", "ppo", "gspo"])
@pytest.mark.parametrize("masked", [True, False])
def test_num_live_evaluates_what_the_mask_keeps(name, masked):
    sources, batch = make()
    batch["advantages"][0] = 0
    if not masked:
        del batch["mask"]
    kept = int(batch["mask"].sum()) if masked else B * T
    assert_equal_to_reference(sources, batch, objective=OBJECTIVES[name], num_live=kept, chunk_tokens=5)
    with pytest.raises(ValueError, match=f"num_live must be the number of tokens that mask keeps, {kept}, got 3"):
        fusedpo.policy_loss_from_hidden(*sources[:2], **batch, objective=OBJECTIVES[name], num_live=3)


# ------------------------------------------------------------------------------------------------ autograd


@pytest.fixture
def leaves() -> list[Tensor]:
    return [x.requires_grad_() for x in make()[0][:2]]


def loss_of(hidden: Tensor, weight: Tensor, name: str = "nfpo(3)", **options) -> Tensor:
    return fusedpo.policy_loss_from_hidden(
        hidden, weight, **make()[1], objective=OBJECTIVES[name], chunk_tokens=5, **options
    ).loss


def expected_gradients(leaves: list[Tensor], name: str = "nfpo(3)") -> list[Tensor]:
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    with fusedpo.backend("reference"):
        return [g.float() for g in torch.autograd.grad(loss_of(*doubles, name), doubles)]


def assert_gradients(leaves: list[Tensor], wanted: list[Tensor], rtol: float = 1e-5) -> None:
    for x, want in zip(leaves, wanted, strict=True):
        assert (x.grad - want).abs().max() <= rtol * want.abs().max()


@pytest.mark.parametrize("factor", [1.0, 0.0, -3.0])
def test_upstream_gradient(leaves, factor):
    (factor * loss_of(*leaves)).backward()
    assert_gradients(leaves, [factor * g for g in expected_gradients(leaves)])


def test_a_second_backward_raises(leaves):
    loss = loss_of(*leaves)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="policy_loss_from_hidden: .*a second one needs a second call"):
        loss.backward()


def test_double_backward_raises(leaves):
    for grad in torch.autograd.grad(loss_of(*leaves), leaves, create_graph=True):
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward(retain_graph=True)


@pytest.mark.parametrize("name", ["nfpo(3)", "gspo"])
def test_accumulation(leaves, name):
    before = [x.detach().clone() for x in leaves]
    for _ in range(3):
        (loss_of(*leaves, name) / 3).backward()
    assert_gradients(leaves, expected_gradients(leaves, name))
    assert all(torch.equal(x, b) for x, b in zip(leaves, before, strict=True))


@pytest.mark.parametrize("name", ["nfpo(3)", "gspo"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(leaves, name, reentrant):
    checkpoint(loss_of, *leaves, name, use_reentrant=reentrant).backward()
    assert_gradients(leaves, expected_gradients(leaves, name))


def test_weight_and_hidden_that_are_no_leaves(leaves):
    """LoRA: only the low-rank factors are trained; hidden comes from a layer before."""
    hidden, weight = (x.detach() for x in leaves)
    left, right, layer = torch.randn(V, 2), torch.randn(2, H) / 4, torch.eye(H)
    factors = [x.requires_grad_() for x in (left, right, layer)]
    loss_of(hidden @ layer, weight + left @ right).backward()
    inner = [hidden, (weight + left @ right).detach()]
    grad_hidden, grad_weight = expected_gradients(inner)
    wanted = [
        grad_weight @ right.detach().t(),
        left.detach().t() @ grad_weight,
        hidden.flatten(0, 1).t() @ grad_hidden.flatten(0, 1),
    ]
    assert_gradients(factors, wanted)


def test_nothing_but_the_loss_has_a_graph(leaves):
    out = fusedpo.policy_loss_from_hidden(*leaves, **make()[1], objective=O.ppo())
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in (out.logprobs, out.entropy, *out.metrics.values()))


def test_autocast(leaves):
    """float32 leaves, products of bfloat16 matrices: the gradients are float32 sums that nothing rounds."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(*leaves)
    rounded = [x.detach().bfloat16().requires_grad_() for x in leaves]
    plain = loss_of(*rounded)
    assert torch.equal(loss, plain)
    loss.backward()
    plain.backward()
    assert [x.grad.dtype for x in leaves] == [torch.float32] * 2
    assert torch.equal(leaves[1].grad.bfloat16(), rounded[1].grad)
    assert not torch.equal(leaves[1].grad, rounded[1].grad.float())


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_memory(dtype, softcap):
    """The workspace (two with a softcap), and the gradients with the float32 sum of that of the weight."""
    tokens, size, vocab, chunk = 192, 8, 20_000, 6
    hidden, weight = torch.randn(tokens, size, dtype=dtype), torch.randn(vocab, size, dtype=dtype)
    ids = torch.randint(vocab, (tokens,))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    losses = []
    forward = peak_extra_bytes(
        lambda: losses.append(
            fusedpo.policy_loss_from_hidden(
                *leaves, ids, None, torch.ones(tokens), objective=O.nfpo(3), chunk_tokens=chunk, softcap=softcap
            ).loss
        )
    )
    workspace = (1 if softcap is None else 2) * chunk * vocab * dtype.itemsize
    rounded = 0 if dtype == torch.float32 else weight.numel() * dtype.itemsize
    gradients = weight.numel() * 4 + rounded + hidden.numel() * dtype.itemsize
    block = 0 if dtype == torch.float32 else ops_hidden.BLOCK_BYTES
    most = workspace + gradients + block + max(product_bytes(hidden[:chunk], weight)) + (1 << 16)
    assert workspace <= forward <= most < tokens * vocab * dtype.itemsize  # so that all logits would be noticed
    assert peak_extra_bytes(losses[0].backward) <= 1 << 12


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_memory_of_the_reference(compiled, monkeypatch):
    """Some float32 copies of the logits of one chunk, never all logits: under torch.compile, too."""
    tokens, size, vocab = 96, 8, 20_000
    a_chunk, gradients = 12 * vocab * 4, 2 * vocab * size * 4  # that of the weight, and what is added to it
    monkeypatch.setitem(ops_hidden.WORKSPACE_BYTES, "cpu", a_chunk)
    ids, ones = torch.randint(vocab, (tokens,)), torch.ones(tokens)

    def loss(hidden, weight):
        return fusedpo.policy_loss_from_hidden(hidden, weight, ids, None, ones, objective=O.nfpo(3)).loss

    leaves = [x.requires_grad_() for x in (torch.randn(tokens, size), torch.randn(vocab, size) / 8)]
    function = loss
    with fusedpo.backend("auto" if compiled else "reference"):
        if compiled:
            torch._dynamo.reset()
            function = torch.compile(loss, fullgraph=True, backend="aot_eager")
            torch.autograd.grad(function(*leaves), leaves)
        peak = peak_extra_bytes(lambda: function(*leaves).backward())
    assert a_chunk <= peak <= 6 * a_chunk + gradients + (1 << 16) < tokens * vocab * 4
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    with fusedpo.backend("reference"):
        wanted = torch.autograd.grad(loss(*doubles), doubles)
    assert_gradients(leaves, [g.float() for g in wanted], roundings(vocab))
