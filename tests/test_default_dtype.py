"""Results depend on neither PyTorch's default dtype nor its default device, eager or compiled."""

from contextlib import contextmanager

import pytest
import torch

import fusedpo
from fusedpo import advantages, corrections, covariance, objectives

B, T, V, H = 2, 6, 13, 4


@contextmanager
def defaults(dtype=torch.float32, device=None):
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


DEFAULTS = [{"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"device": "meta"}]


def batch():
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float32, device="cpu")

    return {
        "logits": 4 * rand(B, T, V),
        "token_ids": torch.arange(B * T, device="cpu").view(B, T) % V,
        "hidden": rand(B, T, H),
        "weight": rand(V, H),
        "logprobs": -rand(B, T),
        "old": -rand(B, T),
        "values": rand(B, T),
        "rewards": rand(B * 2),
        "advantages": rand(B) - 0.5,
        "mask": rand(B, T) > 0.2,
        "group_ids": torch.arange(B * 2, device="cpu") % B,
        "lengths": torch.arange(B * 2, device="cpu") + 3,
    }


def results():
    """Of all kinds of functions: what becomes of numbers, of integers and of lists."""
    x = batch()
    old, mask = x["old"], x["mask"]
    ids, groups = x["token_ids"], {"group_ids": x["group_ids"]}
    tokens = {"mask": mask, "denominator": 7.5, "loss_scale": 0.3}
    objective = objectives.nfpo(2, entropy_coef=0.1, kl=objectives.KL("k3", 0.1))
    policy = {"objective": objective, "ref_logprobs": x["values"].neg(), **tokens}
    logits, hidden, logprobs = (x[name].clone().requires_grad_() for name in ("logits", "hidden", "logprobs"))

    outputs = [
        fusedpo.policy_loss(logprobs, old, x["advantages"], entropy=x["values"], **policy),
        fusedpo.policy_loss_from_logits(logits, ids, old, x["advantages"], temperature=0.7, **policy),
        fusedpo.policy_loss_from_hidden(hidden, x["weight"], ids, old, x["advantages"], temperature=0.7, **policy),
    ]
    drawing = torch.Generator().manual_seed(0)
    differentiable = [
        *(out.loss for out in outputs),
        *fusedpo.token_logprobs(logits, ids, temperature=0.7, return_entropy=True),
        *fusedpo.linear_token_logprobs(hidden, x["weight"], ids, temperature=0.7, softcap=5.0, return_entropy=True),
        *fusedpo.value_loss(logprobs, old, x["values"], clip=0.2, **tokens)[:1],
        fusedpo.aggregate(logprobs, "seq-mean-token-mean", mask=mask, denominator=7.5),
        covariance.kl_cov_penalty(logprobs, old, x["advantages"], mask=mask, fraction=0.3),
    ]
    yield from differentiable
    for out in outputs:
        yield from out.metrics.values()
    yield from torch.autograd.grad([y.sum() for y in differentiable], (logits, hidden, logprobs))
    yield fusedpo.global_denominator(mask, objective)
    yield from fusedpo.next_tokens(ids, mask)
    yield from corrections.importance_weights(old, x["logprobs"], mask=mask, level="sequence", normalise=True)
    yield corrections.rejection_mask(old, x["logprobs"], {"seq_mean_k3": 0.2}, mask=mask)
    yield covariance.clip_cov_weights(
        x["logprobs"], old, x["advantages"], fraction=0.3, low=-1.0, high=1.0, generator=drawing
    )
    yield advantages.grpo(x["rewards"], **groups)
    yield advantages.opo(x["rewards"], lengths=x["lengths"], **groups)
    yield advantages.order_statistic(x["rewards"], k=2, weights=(0.0, 1.0), group_size=4)
    yield advantages.maxpo(x["rewards"], k=2, group_size=4)
    yield advantages.reward_to_go(old.masked_fill(~mask, 0), mask=mask, gamma=0.9)
    yield from advantages.gae(old.masked_fill(~mask, 0), x["values"], mask=mask, gamma=0.9, lam=0.9)
    yield advantages.whiten(x["values"], mask=mask)
    yield advantages.vineppo(x["values"][:, :3], step_rewards=x["old"][:, :2], step_ids=(ids % 3 - 1), whiten=True)


def assert_same(got, expected):
    got = list(got)
    assert [y.dtype for y in got] == [y.dtype for y in expected]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_defaults_do_not_matter(backend):
    with fusedpo.backend(backend):
        expected = list(results())
        for other in DEFAULTS:
            with defaults(**other):
                assert_same(results(), expected)


def compiled_losses(denominator, temperature):
    x = batch()
    policy = {"objective": objectives.ppo(), "denominator": denominator}

    def losses(logprobs, logits, hidden):
        return (
            fusedpo.policy_loss(logprobs, x["old"], x["advantages"], **policy).loss,
            fusedpo.policy_loss_from_logits(
                logits, x["token_ids"], x["old"], x["advantages"], temperature=temperature, **policy
            ).loss,
            fusedpo.policy_loss_from_hidden(
                hidden, x["weight"], x["token_ids"], x["old"], x["advantages"], temperature=temperature, **policy
            ).loss,
        )

    torch._dynamo.reset()
    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    return compiled(x["logprobs"], x["logits"], x["hidden"])


def test_defaults_do_not_matter_when_compiled():
    expected = compiled_losses(1027.0, 0.7)
    with defaults(dtype=torch.bfloat16, device="meta"):
        assert_same(compiled_losses(1027.0, 0.7), expected)
