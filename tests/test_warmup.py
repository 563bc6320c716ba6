"""``warmup`` compiles what training steps need: none of them compiles anything after it."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
import triton
from support import triton_aot

import fusedpo
from fusedpo import advantages as A
from fusedpo import backends
from fusedpo import objectives as O

BF16 = torch.bfloat16
SIZE = 32_000


def test_it_runs(monkeypatch):
    """One variant of each kernel is compiled and launched; the others are as the operators have them compiled."""
    kernels = set()

    def skip(*, fn, **_) -> bool:
        is_known = fn.name in kernels
        kernels.add(fn.name)
        return is_known

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", skip)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with fusedpo.backend("triton"):
        fusedpo.warmup(50, [BF16], device="cpu", num_ids=3)


def test_nothing_to_compile_where_no_kernel_is_tritons(monkeypatch):
    monkeypatch.setattr(fusedpo._warmup, "token_logprobs", None)
    fusedpo.warmup(50, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_happens_without_a_gpu():
    fusedpo.warmup(50)
    with fusedpo.backend("triton"):
        fusedpo.warmup(50)


def steps(size: int = SIZE) -> None:
    """What trainers do: any length, objective, layout and temperature."""
    for group_size, ids, masked in itertools.product((4, 64, 65, 300), (False, True), (False, True)):
        rewards = torch.rand(4 * group_size)
        group = {"group_ids": torch.arange(4 * group_size) // group_size} if ids else {"group_size": group_size}
        for advantages in (A.grpo(rewards, **group), A.rloo(rewards, **group)):
            assert advantages.shape == rewards.shape
        A.maxpo(rewards, k=2, mask=torch.ones(4 * group_size, dtype=torch.bool) if masked else None, **group)
    for i, (tokens, packed, masked, inplace) in enumerate(itertools.product((1, 2, 16, 33), *[(False, True)] * 3)):
        others = {"denominator": [None, 7.0, torch.tensor(7.0)][i % 3]}
        batch = {
            "mask": torch.ones(1, tokens, dtype=torch.bool) if masked else None,
            "cu_seqlens": torch.tensor([0, tokens]) if packed else None,
        }
        zeros = torch.zeros(1, tokens)
        objective = [
            O.ppo(),
            O.nfpo(4, entropy_coef=0.1),
            O.gspo(),
            O.dppo_tv(),
            O.ctpo(),
            O.nfpo(4, differentiate=True),
        ][i % 6]
        logits = torch.zeros(1, tokens, size, dtype=BF16, requires_grad=True)
        temperature = [1.0, 0.7, torch.full((1, tokens), 0.9)][i % 3]
        out = fusedpo.policy_loss_from_logits(
            logits * 1,
            zeros.int(),
            zeros,
            zeros,
            objective=objective,
            temperature=temperature,
            inplace=inplace,
            **batch,
            **others,
        )
        (3 * out.loss).backward()
        states = [torch.zeros(*shape, 24, dtype=BF16, requires_grad=True) for shape in ((1, tokens), (size,))]
        for softcap in (None, 3.0):
            hidden = fusedpo.policy_loss_from_hidden(
                *states, zeros.int(), zeros, zeros, objective=objective, softcap=softcap, **batch, **others
            )
            (3 * hidden.loss).backward()
        logp, entropy = fusedpo.token_logprobs(logits * 1, zeros.int(), return_entropy=True, inplace_backward=inplace)
        fusedpo.policy_loss(logp, zeros, zeros, objective=objective, entropy=entropy, **batch, **others).loss.backward()


def count_variants() -> list[int]:
    backends.why_not = lambda *_: None  # compiled, not run: any device will do
    backends._forced = "triton"

    def warmup() -> None:
        fusedpo.warmup(SIZE, [BF16], device="cpu")

    def both() -> None:
        warmup()
        steps()

    return [len(triton_aot.variants(launch)) for launch in (steps, warmup, both)]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux")
def test_no_step_compiles_after_it():
    needed, compiled, together = triton_aot.call(__name__, "count_variants")
    assert 10 < needed <= compiled == together
