"""``fusedpo.nn.PolicyLoss`` is the functions, with an objective and defaults that are given once."""

import pickle

import pytest
import torch

import fusedpo
from fusedpo.nn import PolicyLoss
from fusedpo.objectives import nfpo

B, T, V, H = 3, 6, 17, 8
OBJECTIVE = nfpo(n=3)


@pytest.fixture
def tokens():
    mask = torch.arange(T) < torch.tensor([6, 2, 4])[:, None]
    return {
        "token_ids": torch.randint(0, V, (B, T)),
        "old_logprobs": -torch.rand(B, T) * 4,
        "advantages": torch.randn(B),
        "mask": mask,
    }


def assert_same(got, want, *leaves):
    assert type(got) is type(want)
    torch.testing.assert_close(got.loss, want.loss, rtol=0, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(got.loss, leaves, retain_graph=True),
        torch.autograd.grad(want.loss, leaves, retain_graph=True),
        strict=True,
    ):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert got.metrics.keys() == want.metrics.keys()


def test_forward(tokens):
    logprobs = (-torch.rand(B, T) * 4).requires_grad_()
    given = (logprobs, tokens["old_logprobs"], tokens["advantages"])
    got = PolicyLoss(OBJECTIVE, loss_scale=0.25, temperature=0.7)(*given, mask=tokens["mask"])
    want = fusedpo.policy_loss(*given, objective=OBJECTIVE, mask=tokens["mask"], loss_scale=0.25)
    assert_same(got, want, logprobs)
    each = PolicyLoss(OBJECTIVE, reduction="none")(*given, mask=tokens["mask"])
    assert each.loss.shape == (B, T)


def test_from_logits(tokens):
    logits = torch.randn(B, T, V, requires_grad=True)
    module = PolicyLoss(OBJECTIVE, temperature=0.7, softcap=5.0)
    assert_same(
        module.from_logits(logits, **tokens),
        fusedpo.policy_loss_from_logits(logits, **tokens, objective=OBJECTIVE, temperature=0.7),
        logits,
    )
    assert_same(  # a call may say otherwise
        module.from_logits(logits, **tokens, temperature=1.3),
        fusedpo.policy_loss_from_logits(logits, **tokens, objective=OBJECTIVE, temperature=1.3),
        logits,
    )


def test_from_hidden(tokens):
    hidden, weight = torch.randn(B, T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    module = PolicyLoss(OBJECTIVE, temperature=0.7, softcap=5.0, logit_scale=0.5, chunk_tokens=4)
    options = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.5, "chunk_tokens": 4}
    assert_same(
        module.from_hidden(hidden, weight, **tokens),
        fusedpo.policy_loss_from_hidden(hidden, weight, **tokens, objective=OBJECTIVE, **options),
        hidden,
        weight,
    )


def test_it_is_a_module():
    """No parameters, no state, a repr that says what it computes; it survives pickling and a move."""
    module = PolicyLoss(OBJECTIVE, temperature=0.7)
    assert not list(module.parameters())
    assert not module.state_dict()
    assert "ForwardTrace(n=3" in repr(module)
    assert "temperature=0.7" in repr(module)
    copy = pickle.loads(pickle.dumps(module.to(torch.float64)))
    assert copy.objective == OBJECTIVE
    assert copy.defaults == {"temperature": 0.7}


def test_errors(tokens):
    with pytest.raises(TypeError, match="objective must be a fusedpo.Objective or a preset's name, got dict"):
        PolicyLoss({"preset": "nfpo"})
    with pytest.raises(TypeError, match="got 'mask'"):
        PolicyLoss(OBJECTIVE, mask=tokens["mask"])
    with pytest.raises(TypeError, match="temperature"):
        PolicyLoss(OBJECTIVE)(torch.zeros(B, T), None, tokens["advantages"], temperature=1.0)
