"""The raw operators under any argument: what they refuse and how they say so, and what they do not depend on."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import ptx
import pytest
import torch
from fuzz import broken

import fusedpo
from fusedpo import backends
from fusedpo import objectives as O
from fusedpo.ops import policy_loss as ops_policy_loss

TESTS = Path(__file__).parent
NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
)
TRITON = pytest.param("triton", marks=pytest.mark.triton)
both = pytest.mark.parametrize("backend", [NATIVE, TRITON])
native = pytest.mark.parametrize("backend", [NATIVE])

PARTS, VALUES = ops_policy_loss.encode(O.ppo())


def arguments(operator: str) -> dict:
    shape = (2, 3)
    x, y, floats = torch.randn(2, 3, 8), torch.randint(8, shape), {}
    for name in ("logprobs", "entropy", "old_logprobs", "ref_logprobs", "is_weights", "advantages", "scale"):
        floats[name] = torch.randn(shape)
    names = {
        "token_logprobs_backward": {
            "grad_logprobs": torch.randn(shape),
            "grad_entropy": torch.randn(shape),
            "logits": x,
            "token_ids": y,
            "temperature": torch.tensor(1.0),
            "mask": torch.ones(shape, dtype=torch.bool),
            "stats": torch.ones(*shape, 3),
        },
        "exact_kl_out": {
            **dict.fromkeys(("logits", "ref_logits"), x),
            **dict.fromkeys(("temperature", "ref_temperature"), torch.tensor(1.0)),
            "mask": torch.ones(shape, dtype=torch.bool),
            "scale": floats["scale"],
            "forward": False,
            "out": torch.empty_like(x),
        },
        "policy_loss": {
            **{name: floats[name] for name in ("logprobs", "entropy", "old_logprobs", "advantages")},
            "mask": torch.ones(shape, dtype=torch.bool),
            "cu_seqlens": None,
            **{name: floats[name] for name in ("ref_logprobs", "is_weights")},
            "denominator": torch.tensor(3.0),
            "loss_scale": torch.tensor(1.0),
            "parts": PARTS,
            "values": VALUES,
            "per_token": False,
        },
        "one_pass": {
            "logits": x,
            "out": torch.empty_like(x),
            **{name: floats[name] for name in ("logprobs", "entropy")},
            "rows": None,
            "token_ids": y,
            "temperature": torch.tensor(1.0),
            **{name: floats[name] for name in ("old_logprobs", "advantages")},
            "mask": torch.ones(shape, dtype=torch.bool),
            "cu_seqlens": None,
            **{name: floats[name] for name in ("ref_logprobs", "is_weights", "scale")},
            "parts": PARTS,
            "values": VALUES,
            "denominator": None,
        },
        "scale_": {"gradient": x, "factor": torch.tensor(2.0)},
        "group_advantages": {
            "rewards": torch.randn(6),
            "ids": torch.arange(6) // 3,
            "order": torch.arange(6),
            "group_size": 3,
            "other": None,
            "mask": None,
            "estimator": 4,
            "k": 0,
            "unbiased": False,
            "number": 0.1,
            "wide": False,
        },
        "token_advantages": {
            "rewards": torch.randn(6),
            **dict.fromkeys(("values", "logprobs", "old_logprobs", "mask")),
            "cu_seqlens": torch.tensor([0, 2, 6]),
            "per_sequence": torch.zeros(2),
            "estimator": 1,
            **dict.fromkeys(("gamma", "lam", "rho_bar", "c_bar"), 1.0),
            "wide": False,
        },
        "step_advantages": {
            "values": torch.rand(2, 4),
            "step_rewards": torch.rand(2, 3),
            "step_ids": torch.zeros(2, 5, dtype=torch.int64),
            "wide": False,
        },
        "whiten": {"x": torch.randn(6), "lengths": torch.ones(6), "mask": None, "wide": False},
    }
    return names[operator]


def parts(place: int, value: int) -> list[int]:
    return [value if i == place else part for i, part in enumerate(PARTS)]


@both
@pytest.mark.parametrize(
    ("operator", "argument", "value", "message"),
    [
        (
            "token_logprobs_backward",
            "stats",
            torch.ones(2, 3, 2),
            r"stats must have shape \[2, 3, 3\], got \[2, 3, 2\]",
        ),
        ("token_logprobs_backward", "grad_logprobs", torch.ones(6), "grad_logprobs must have shape"),
        ("token_logprobs_backward", "token_ids", torch.ones(2, 3).int(), "token_ids must have dtype"),
        (
            "token_logprobs_backward",
            "logits",
            torch.zeros(()),
            "logits must have at least one dimension|rows must have",
        ),
        ("exact_kl_out", "ref_logits", torch.zeros(2, 3, 8).half(), "ref_logits must have (the )?dtype"),
        ("exact_kl_out", "scale", torch.ones(6), "scale must have shape"),
        ("exact_kl_out", "out", torch.zeros(2, 3, 8).half(), "out must have dtype"),
        ("exact_kl_out", "out", torch.zeros(6, 8), "out must have shape"),
        ("policy_loss", "loss_scale", torch.tensor(1.0).double(), "loss_scale must have dtype"),
        ("policy_loss", "denominator", torch.zeros(0), r"denominator must have shape \[\], got \[0\]"),
        ("policy_loss", "mask", torch.ones(2, 3), "mask must have dtype"),
        (
            "policy_loss",
            "advantages",
            torch.ones(3, 1),
            r"advantages must have shape \[2, 3\] or \[2, 1\], got \[3, 1\]",
        ),
        ("policy_loss", "logprobs", torch.zeros(()), "logprobs must have 1 to 2 dimensions"),
        ("policy_loss", "cu_seqlens", torch.tensor([0, 6]), "cu_seqlens needs packed tokens"),
        ("policy_loss", "parts", PARTS[:-1], "parts must hold 9 numbers, got 8"),
        ("policy_loss", "parts", parts(0, 4), r"parts\[0\], the ratio, must be 0 to 3, got 4"),
        ("policy_loss", "parts", parts(1, -1), r"parts\[1\], the positions back, must be 0 to"),
        ("policy_loss", "parts", parts(4, 11), r"parts\[4\], the trust region, must be 0 to 10, got 11"),
        ("policy_loss", "parts", parts(5, 9), r"parts\[5\], the KL, must be 0 to 8, got 9"),
        ("one_pass", "values", VALUES * 9, "the length of values must be 4 to 9, got"),
        ("one_pass", "parts", parts(1, 40), "parts must encode an objective that one pass can compute"),
        ("one_pass", "rows", torch.arange(5), "logits must have shape"),
        ("one_pass", "entropy", torch.zeros(3, 2).t(), "entropy must be contiguous"),
        ("one_pass", "temperature", torch.ones(5), "temperature must have shape"),
        ("scale_", "factor", torch.tensor(2.0).double(), "factor must have dtype"),
        ("scale_", "gradient", torch.zeros(4).double(), "gradient must (be|have dtype)"),
        ("group_advantages", "group_size", 0, "group_size must be 1 to"),
        ("group_advantages", "estimator", 17, "estimator must be 0 to 16, got 17"),
        ("group_advantages", "estimator", 10, "k must be 1 to"),
        ("group_advantages", "estimator", 1, "other must be given"),
        ("group_advantages", "order", torch.tensor([0, 1, 2, 3, 4, 6]), "order must hold each of the 6 samples once"),
        ("token_advantages", "estimator", 2, "values must be given for this estimator"),
        ("token_advantages", "per_sequence", torch.zeros(1), r"per_sequence must have shape \[2\], got \[1\]"),
        ("step_advantages", "values", torch.rand(2, 3), r"values must have shape \[2, 4\], got \[2, 3\]"),
        ("whiten", "lengths", torch.ones(5), r"lengths must have shape \[6\], got \[5\]"),
        ("whiten", "x", torch.ones(6, dtype=torch.complex64), "x must (be|have dtype)"),
    ],
)
def test_a_broken_argument_is_named(backend, operator, argument, value, message):
    good = arguments(operator)
    call = getattr(getattr(torch.ops.fusedpo, operator), backend)
    call(*good.values())
    with pytest.raises(ValueError, match=message):
        call(*(good | {argument: value}).values())


@both
@pytest.mark.parametrize("seed", range(3))
def test_the_calls_that_the_fuzzer_breaks_are_valid(backend, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for name, call in broken.calls(rng):
        message = broken.run((name, [x.clone() if isinstance(x, torch.Tensor) else x for x in call]), backend)
        assert message is None or "size of the group" in message, (name, message)


@both
@pytest.mark.parametrize("num_ids", [None, 3])
def test_ids_that_changed_since_the_forward(backend, num_ids):
    """A loader that reuses its buffer: the version counter of the tensor knows nothing of it."""
    ids = torch.randint(20, (4,) if num_ids is None else (4, num_ids))
    x = torch.randn(4, 20, requires_grad=True)
    with fusedpo.backend(backend):
        logprobs = fusedpo.token_logprobs(x, ids, inplace_backward=False)
    ids.numpy().flat[5 if num_ids else 2] = 1 << 40
    with pytest.raises(ValueError, match=r"token_ids must be in \[0, 20\).*got 1099511627776"):
        logprobs.sum().backward()


@both
def test_every_byte_but_0_is_true(backend):
    """The bytes of a bool tensor that is a view of other memory."""
    bits = torch.rand(2, 9) < 0.6
    bytes_ = (bits.to(torch.uint8) * torch.randint(2, 256, bits.shape, dtype=torch.uint8)).view(torch.bool)
    now, old, advantages = torch.randn(3, 2, 9).unbind()
    x, ids = torch.randn(2, 9, 7), torch.randint(7, (2, 9))
    with fusedpo.backend(backend):
        for objective in (O.gspo(), O.cppo()):
            got, want = (fusedpo.policy_loss(now, old, advantages, objective=objective, mask=m) for m in (bytes_, bits))
            assert torch.equal(got.loss, want.loss)
            assert got.metrics.keys() == want.metrics.keys()
            assert all(torch.equal(got.metrics[name], want.metrics[name]) for name in got.metrics)
        assert torch.equal(fusedpo.token_logprobs(x, ids, mask=bytes_), fusedpo.token_logprobs(x, ids, mask=bits))
        gradients = []
        for mask in (bytes_, bits):
            leaf = x.clone().requires_grad_()
            fusedpo.policy_loss_from_logits(leaf, ids, old, advantages, objective=O.ppo(), mask=mask).loss.backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)


@native
def test_subnormal_numbers_whatever_the_mode_of_the_thread(backend):
    x = torch.randn(64, 1000) * 40
    ids, up = torch.randint(1000, (64,)), torch.full((64,), 1e-36)
    results = []
    for flush in (False, True):
        leaf = x.clone().requires_grad_()
        torch.set_flush_denormal(flush)
        try:
            with fusedpo.backend(backend):
                fusedpo.token_logprobs(leaf, ids).backward(up)
            assert (torch.tensor([1e-39]) * 1 == 0).item() == flush, "the mode of the thread is as it was"
        finally:
            torch.set_flush_denormal(False)
        results.append(leaf.grad)
    assert ((results[0] != 0) & (results[0].abs() < torch.finfo(torch.float32).tiny)).any()
    assert torch.equal(*results)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_repeated_ids_cost_no_square(tmp_path):
    program = tmp_path / "repeats"
    command = ["g++", "-std=c++17", "-O1", "-I", TESTS.parent / "csrc", TESTS / "cpp/repeats.cpp", "-o", program]
    subprocess.run(command, check=True)
    for count, comparisons in (map(int, line.split()) for line in subprocess.check_output([program]).splitlines()):
        assert comparisons <= 6 * count * max(1, count.bit_length())


@pytest.mark.triton
@pytest.mark.skipif("not ptx.runs_triton()", reason="Triton is not run as compiled")
def test_repeated_ids_cost_no_square_in_triton():
    """Instructions of the backward, for twice as many ids."""

    def count(num_ids: int) -> int:
        logprobs = fusedpo.token_logprobs(torch.randn(2, 50, requires_grad=True), torch.randint(50, (2, num_ids)))
        with ptx.recorded() as launches:
            logprobs.sum().backward()
        return sum(counters["thread_instructions"] for _, counters in launches)

    with fusedpo.backend("triton"):
        assert 0 < count(512) <= 2.1 * count(256)


@both
def test_many_ids_per_row(backend):
    """With repeats among them; were each compared with each, that would take 10 seconds."""
    count = 32_000 if backend == "native" else 3_000  # the interpreter scans one by one
    ids = torch.randint(500, (1, count))
    x, up = torch.randn(1, 500, requires_grad=True), torch.randn(1, count)
    with fusedpo.backend(backend):
        fusedpo.token_logprobs(x, ids).backward(up)
    want = x.detach().double().requires_grad_()
    torch.log_softmax(want, -1).gather(-1, ids).backward(up.double())
    torch.testing.assert_close(x.grad.double(), want.grad, rtol=1e-5, atol=1e-4)
