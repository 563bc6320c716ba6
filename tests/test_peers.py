"""Other people's code as an independent oracle: what both compute must agree. Absent peers are skipped by name."""

from __future__ import annotations

import pytest
import torch

import fusedpo

ROWS, SIZE = (3, 7), 501


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Everything here is on this device."""
    with torch.device(request.param):
        yield


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def logits(request, device):
    return torch.randn(*ROWS, SIZE).mul(3).to(request.param)


@pytest.fixture
def token_ids(device):
    return torch.randint(0, SIZE, ROWS)


def test_trl_logprobs_and_entropy(logits, token_ids):
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed (extra [peers])")
    upstream = torch.randn(ROWS)
    logp, entropy = fusedpo.token_logprobs(logits, token_ids, return_entropy=True)
    # TRL computes in the dtype of the logits: in bfloat16 its log-probs carry that rounding
    tolerance = {"rtol": torch.finfo(logits.dtype).eps, "atol": 10 * torch.finfo(logits.dtype).eps}
    torch.testing.assert_close(logp, utils.selective_log_softmax(logits, token_ids).float(), **tolerance)
    torch.testing.assert_close(entropy, utils.entropy_from_logits(logits).float(), **tolerance)
    a, b = logits.float().requires_grad_(), logits.float().requires_grad_()
    fusedpo.token_logprobs(a, token_ids).backward(upstream)
    utils.selective_log_softmax(b, token_ids).backward(upstream)
    torch.testing.assert_close(a.grad, b.grad)


def test_trl_several_ids_per_row(logits):
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed (extra [peers])")
    token_ids = torch.randint(0, SIZE, (*ROWS, 4))
    want = utils.selective_log_softmax(logits.float(), token_ids)
    torch.testing.assert_close(fusedpo.token_logprobs(logits, token_ids), want)


def test_cut_cross_entropy():
    cce = pytest.importorskip("cut_cross_entropy", reason="cut-cross-entropy is not installed (extra [peers])")
    hidden, weight = torch.randn(12, 16), torch.randn(SIZE, 16)
    token_ids = torch.randint(0, SIZE, (12,))
    want = -cce.linear_cross_entropy(hidden, weight, token_ids, impl="torch_compile", reduction="none")
    got = fusedpo.linear_token_logprobs(hidden, weight, token_ids, return_entropy=False)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
