"""Rows whose columns are split by hand: what shards say of them merges into the row, and each writes its gradient."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.testing import assert_close

import fusedpo
from fusedpo import reference
from fusedpo.reference import row_stats as in_python

BACKENDS = ["reference", pytest.param("native"), pytest.param("triton", marks=pytest.mark.triton)]
R, V = 7, 37
SPLITS = {1: [V], 2: [19, 18], 3: [13, 13, 11], 8: [5, 0, 7, 1, 9, 10, 5, 0]}


class Operators:
    """Of a backend, or the functions of the reference."""

    def __init__(self, backend):
        self.dtype = torch.float64 if backend == "reference" else torch.float32
        self.backend = backend

    def __getattr__(self, name):
        if self.backend == "reference":
            return getattr(in_python, name)
        return getattr(getattr(torch.ops.fusedpo, name), self.backend)


def split(backend, logits, ids, widths, temperature=1.0, mask=None, upstream=None, vocab_size=0, entropy=True):
    """Log-probs, entropy and the gradient of the logits, from shards of these widths."""
    operators = Operators(backend)
    x = logits.to(operators.dtype) if logits.dtype in (torch.float32, torch.float64) else logits
    t = torch.as_tensor(temperature, dtype=torch.float32)
    starts = [sum(widths[:r]) for r in range(len(widths))]
    valid = [min(w, max(0, (vocab_size or s + w) - s)) for s, w in zip(starts, widths, strict=True)]
    shards = [x[..., s : s + v] for s, v in zip(starts, valid, strict=True)]
    parts = torch.stack(
        [
            operators.row_stats(shard, ids, t, mask, start, width, vocab_size, entropy)
            for shard, start, width in zip(shards, starts, widths, strict=True)
        ]
    )
    flat_t, flat_mask = (t if t.dim() == 0 else t.reshape(-1)), None if mask is None else mask.reshape(-1)
    logprobs, h, stats = operators.merge_row_stats(parts, flat_t, flat_mask, entropy)
    logprobs = logprobs.reshape(ids.shape)
    if upstream is None:
        return logprobs, h
    g, g_entropy = (u.to(operators.dtype) for u in upstream)
    grads = [
        operators.token_logprobs_backward(
            g, g_entropy if entropy else None, shard, ids, t, mask, stats.reshape(*x.shape[:-1], 3), vocab_start=start
        )
        for shard, start in zip(shards, starts, strict=True)
    ]
    return logprobs, h.reshape(x.shape[:-1]) if entropy else h, torch.cat(grads, -1)


def whole(logits, ids, temperature=1.0, mask=None, upstream=None):
    """The same of one device, in float64."""
    x = logits.double().clone().requires_grad_()
    results = reference.token_logprobs(x, ids, temperature=temperature, mask=mask, return_entropy=True)
    torch.autograd.backward(results, [u.double() for u in upstream])
    return *(r.detach() for r in results), x.grad


def check(backend, logits, ids, widths, upstream, **options):
    dtype = torch.float64 if backend == "reference" else torch.float32
    got = split(backend, logits, ids, widths, upstream=upstream, **options)
    options.pop("vocab_size", None)
    want = whole(logits[..., : got[2].shape[-1]], ids, upstream=upstream, **options)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}[dtype]
    for g, w in zip(got, want, strict=True):
        rounded = {"rtol": 2**-8} if g.dtype == torch.bfloat16 else {"rtol": tolerance}
        assert_close(g.double(), w, atol=tolerance, equal_nan=True, **rounded)


def batch(k=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(R, V, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, V, (R,) if k is None else (R, k), generator=generator)
    upstream = torch.randn(ids.shape, generator=generator), torch.randn(R, generator=generator)
    return logits.float().double(), ids, upstream


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shards", SPLITS)
def test_shards_merge_into_the_row(backend, shards):
    logits, ids, upstream = batch()
    mask = torch.tensor([1, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    dirty, wrong = logits.clone(), ids.clone()
    dirty[~mask], wrong[~mask] = torch.nan, -100
    temperature = torch.linspace(0.5, 2, R)
    check(backend, dirty, wrong, SPLITS[shards], upstream, mask=mask, temperature=temperature)
    logits, ids, upstream = batch(k=4)
    ids[0] = ids[0, 0]
    check(backend, logits, ids, SPLITS[shards], upstream)
    if backend != "reference":
        check(backend, logits.bfloat16(), ids, SPLITS[shards], upstream)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_difficult(backend):
    logits, ids, upstream = batch()
    logits[0, :19] = -torch.inf  # a shard of -inf must not say where the maximum is
    logits[0, 19:] -= 1e4
    logits[1, [3, 30]] = 50  # equal maxima on two shards
    logits[2, ids[2]] = -torch.inf
    logits[3, 5] = torch.nan
    logits[4, 25] = torch.inf
    logits[5] = -torch.inf
    logits[6] += 40
    logits = logits.float().double()
    for widths in SPLITS.values():
        check(backend, logits, ids, widths, upstream)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_not_part_of_the_vocabulary(backend):
    logits, ids, upstream = batch()
    ids = ids % 20
    padded = logits.clone()
    padded[:, 20:] = 1e3
    for widths in SPLITS.values():
        check(backend, padded, ids, widths, upstream, vocab_size=20)


@pytest.mark.parametrize("backend", ["native", pytest.param("triton", marks=pytest.mark.triton)])
def test_a_confident_token_keeps_its_digits(backend):
    logits = torch.zeros(2, 64)
    logits[0, 3], logits[1, 60] = 20, 25
    ids = torch.tensor([3, 60])
    for widths in ([64], [32, 32], [60, 4]):
        logprobs, _ = split(backend, logits, ids, widths)
        want = reference.token_logprobs(logits.double(), ids)
        assert_close(logprobs.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_alone_has_the_bits_that_it_has_among_others(backend):
    logits, ids, upstream = batch(k=2)
    together = split(backend, logits, ids, SPLITS[3], upstream=upstream)
    alone = split(backend, logits[4:5], ids[4:5], SPLITS[3], upstream=[u[4:5] for u in upstream])
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[4:5], b)
    nothing = split(backend, logits[:0], ids[:0], SPLITS[3], upstream=[u[:0] for u in upstream])
    assert [x.shape[0] for x in nothing] == [0, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_contradicting_headers_give_nan_everywhere(backend):
    logits, ids, _ = batch()
    operators = Operators(backend)
    x, one = logits.to(operators.dtype), torch.ones(())

    def merged(*shards):
        parts = [
            operators.row_stats(x[:, s : s + w], ids, one, None, s + off, w, size, True) for s, w, off, size in shards
        ]
        return operators.merge_row_stats(torch.stack(parts), one, None, True)

    assert not any(r.isnan().any() for r in merged((0, 20, 0, 37), (20, 17, 0, 37)))
    for wrong in (
        [(0, 20, 0, 0), (20, 17, -3, 0)],
        [(0, 20, 1, 0), (20, 17, 0, 0)],
        [(0, 20, 0, 30), (20, 17, 0, 31)],
        [(0, 20, 0, 38), (20, 17, 0, 38)],
    ):
        assert all(r.isnan().all() for r in merged(*wrong))


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=20)
def test_any_bounds(data):
    bounds = sorted(data.draw(st.lists(st.integers(0, V), max_size=5)))
    widths = [b - a for a, b in zip([0, *bounds], [*bounds, V], strict=True)]
    logits, ids, upstream = batch(k=3, seed=data.draw(st.integers(0, 99)))
    check("reference", logits, ids, widths, upstream)
    check("native", logits, ids, widths, upstream)


def test_operators_say_what_is_wrong():
    logits, ids, _ = batch()
    row_stats, merge = torch.ops.fusedpo.row_stats.native, torch.ops.fusedpo.merge_row_stats.native
    x, one = logits.float(), torch.ones(())
    torch.library.opcheck(row_stats, (x, ids, one, None, 0, V, 0, True))
    torch.library.opcheck(merge, (row_stats(x, ids, one, None, 0, V, 0, True)[None], one, None, True))
    with pytest.raises(ValueError, match="temperature must be positive"):
        row_stats(x, ids, -one, None, 0, V, 0, True)
    with pytest.raises(ValueError, match="vocab_start and vocab_size"):
        row_stats(x, ids, one, None, 0, V - 1, 0, True)
    with pytest.raises(ValueError, match="parts must have shape"):
        merge(torch.zeros(1, 3, 3), one, None, True)


def test_ids_of_the_whole_vocabulary_are_still_checked():
    x = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="token_ids must be in"):
        torch.ops.fusedpo.token_logprobs_backward.native(
            torch.ones(2), None, x, torch.tensor([1, 5]), torch.ones(()), None, torch.ones(2, 3)
        )
    assert fusedpo.token_logprobs(x, torch.tensor([1, 4])).shape == (2,)
