"""How much memory the losses of segments and the KL divergence take, beside their inputs."""

from __future__ import annotations

import pytest
import torch
from support.logprobs import peak_extra_bytes, product_bytes

import fusedpo
from fusedpo import backends
from fusedpo import objectives as O
from fusedpo.ops import divergence as ops_divergence
from fusedpo.ops import hidden as ops_hidden

pytestmark = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))

PAIRS, LENGTH, VOCAB, H = 16, 6, 20_000, 8
TOKENS = 2 * PAIRS * LENGTH
FEW = 1 << 16


def test_preferences_from_logits_in_place():
    """Numbers per token and per pair; the gradient has the memory of the logits."""
    logits = torch.randn(2 * PAIRS, LENGTH, VOCAB).requires_grad_()
    ids, ref = torch.randint(VOCAB, logits.shape[:2]), torch.zeros(2 * PAIRS, LENGTH)

    def step():
        out = fusedpo.preference_loss_from_logits(logits, ids, ref, objective=O.dpo(), inplace=True)
        torch.autograd.grad(out.loss, logits)

    assert peak_extra_bytes(step) <= FEW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_preferences_from_hidden(dtype):
    """The logits of one pair, and the gradients with the float32 sum of that of the weight."""
    chunk = 2 * LENGTH
    hidden, weight = torch.randn(2 * PAIRS, LENGTH, H, dtype=dtype), torch.randn(VOCAB, H, dtype=dtype)
    ids, ref = torch.randint(VOCAB, hidden.shape[:2]), torch.zeros(2 * PAIRS, LENGTH)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    outs = []
    forward = peak_extra_bytes(
        lambda: outs.append(
            fusedpo.preference_loss_from_hidden(*leaves, ids, ref, objective=O.dpo(), chunk_tokens=chunk)
        )
    )
    assert outs[0].metrics["products"] == 3
    workspace = chunk * VOCAB * dtype.itemsize
    rounded = 0 if dtype == torch.float32 else weight.numel() * dtype.itemsize
    gradients = weight.numel() * 4 + rounded + hidden.numel() * dtype.itemsize
    block = 0 if dtype == torch.float32 else ops_hidden.BLOCK_BYTES
    most = workspace + gradients + block + max(product_bytes(hidden.flatten(0, 1)[:chunk], weight)) + FEW
    assert workspace <= forward <= most < TOKENS * VOCAB * dtype.itemsize
    assert peak_extra_bytes(outs[0].loss.backward) <= 1 << 12


@pytest.mark.parametrize("inplace", [False, True])
def test_exact_kl(inplace, monkeypatch):
    """The gradient, which in place costs nothing, and a few float32 blocks of rows."""
    monkeypatch.setitem(ops_divergence.BLOCK_ELEMENTS, "cpu", 2 * VOCAB)
    logits = torch.randn(2 * PAIRS, LENGTH, VOCAB).requires_grad_()
    ref = torch.randn(2 * PAIRS, LENGTH, VOCAB)
    blocks, gradient = 8 * 2 * VOCAB * 4, 0 if inplace else logits.numel() * 4

    def step():
        torch.autograd.grad(fusedpo.exact_kl(logits, ref, inplace=inplace).loss, logits)

    assert gradient <= peak_extra_bytes(step) <= gradient + blocks + FEW
    assert blocks < logits.numel() * 4 / 4


def test_exact_kl_from_hidden():
    """Two chunks of logits, blocks of rows, and the gradients."""
    chunk = 6
    hidden, weight = torch.randn(TOKENS, H).requires_grad_(), torch.randn(VOCAB, H).requires_grad_()
    teacher, head = torch.randn(TOKENS, H), torch.randn(VOCAB, H)
    blocks = 8 * ops_divergence.BLOCK_ELEMENTS["cpu"] * 4
    gradients = (weight.numel() + hidden.numel()) * 4

    def step():
        out = fusedpo.exact_kl_from_hidden(hidden, weight, teacher, head, chunk_tokens=chunk)
        torch.autograd.grad(out.loss, (hidden, weight))

    peak = peak_extra_bytes(step)
    assert 2 * chunk * VOCAB * 4 <= peak <= 2 * chunk * VOCAB * 4 + gradients + min(blocks, 8 * chunk * VOCAB * 4) + FEW
