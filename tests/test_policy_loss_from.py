"""The policy loss from logits and from hidden states is that of their log-probs."""

import pytest
import torch
from support.policy_loss import NAN, name_of, random_batch

import fusedpo
from fusedpo import objectives as O

pytestmark = pytest.mark.usefixtures("on_the_reference")


# ---------------------------------------------------------------------------------------- from logits and hidden states


def random_rows(rows=2, width=4, vocab=6, size=3):
    g = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    batch = random_batch(rows, width, seed=6)
    for name in ("logprobs", "entropy"):
        del batch[name]
    batch["token_ids"] = torch.randint(vocab, (rows, width), generator=g)
    return randn(rows, width, size), randn(vocab, size), batch


COMPOSED = [O.ppo(), O.nfpo(3, entropy_coef=0.1, kl=O.KL("k3", 0.1)), O.gspo(), O.reinforce(entropy_coef=0.1)]


@pytest.mark.parametrize("objective", COMPOSED, ids=name_of)
@pytest.mark.parametrize("packed", [False, True])
def test_from_logits_is_the_loss_of_the_logprobs(objective, packed):
    hidden, weight, batch = random_rows()
    logits = hidden @ weight.T
    options = {"objective": objective, "denominator": 7.0, "loss_scale": 0.5}
    if packed:
        logits, batch = logits.flatten(0, 1), {name: x.flatten() for name, x in batch.items()}
        options["cu_seqlens"] = torch.tensor([0, 3, 8])
    ids = batch.pop("token_ids")

    leaf = logits.clone().requires_grad_()
    out = fusedpo.policy_loss_from_logits(
        leaf, ids.masked_fill(~batch["mask"], -100), **batch, temperature=0.7, inplace=True, **options
    )
    out.loss.backward()
    assert torch.equal(leaf, logits)  # the reference overwrites nothing

    other = logits.clone().requires_grad_()
    logp = (other / 0.7).log_softmax(-1)
    chosen, entropy = logp.gather(-1, ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1)
    expected = fusedpo.policy_loss(chosen, **batch, entropy=entropy, **options)
    expected.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(leaf.grad, other.grad)
    torch.testing.assert_close(out.metrics, expected.metrics)
    for result, value in ((out.logprobs, chosen), (out.entropy, entropy)):
        assert not result.requires_grad
        torch.testing.assert_close(result, value.detach().masked_fill(~batch["mask"], 0))


@pytest.mark.parametrize("objective", COMPOSED, ids=name_of)
@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_from_hidden_is_from_logits(objective, chunk_tokens):
    hidden, weight, batch = random_rows()
    bias = torch.linspace(-1, 1, 6, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    out = fusedpo.policy_loss_from_hidden(
        *leaves[:2],
        **batch,
        bias=leaves[2],
        softcap=4.0,
        logit_scale=0.5,
        temperature=0.7,
        chunk_tokens=chunk_tokens,
        num_live=int(batch["mask"].sum()),
        objective=objective,
    )
    others = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    logits = 4.0 * torch.tanh(0.5 * (others[0] @ others[1].T + others[2]) / 4.0)
    expected = fusedpo.policy_loss_from_logits(logits, **batch, temperature=0.7, objective=objective)
    assert out.metrics.pop("rows") == batch["mask"].sum()
    assert out.metrics.pop("dropped") == 0
    torch.testing.assert_close(out, expected)
    gradients = [torch.autograd.grad(*pair) for pair in ((out.loss, leaves), (expected.loss, others))]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("objective", COMPOSED, ids=name_of)
def test_masked_rows_are_not_read(objective):
    hidden, weight, batch = random_rows()
    masked = ~batch["mask"]

    def gradients(hidden, ids):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = fusedpo.policy_loss_from_hidden(*leaves, ids, **batch, objective=objective).loss
        return loss, *torch.autograd.grad(loss, leaves)

    ids = batch.pop("token_ids")
    expected = gradients(hidden, ids)
    hidden[masked] = NAN
    for result, value in zip(gradients(hidden, ids.masked_fill(masked, -100)), expected, strict=True):
        assert torch.equal(result, value)


def test_the_entropy_is_differentiated_only_with_a_coefficient():
    hidden, weight, batch = random_rows()
    batch["advantages"] = torch.zeros(2, dtype=torch.float64)
    for coef in (0.0, 0.1):
        logits = (hidden @ weight.T).requires_grad_()
        fusedpo.policy_loss_from_logits(logits, **batch, objective=O.ppo(entropy_coef=coef)).loss.backward()
        assert logits.grad.any().item() == (coef != 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    # by AOTAutograd, which takes longer, the kernels' path from hidden states in test_gradient_threshold.py
    ("source", "backend"),
    [("logits", "aot_eager"), ("hidden", "eager")],
)
def test_from_logits_and_hidden_compile_without_a_break(source, backend):
    hidden, weight, batch = random_rows()
    objective = O.ppo(entropy_coef=0.1)

    def loss(hidden, weight, batch):
        if source == "hidden":
            return fusedpo.policy_loss_from_hidden(hidden, weight, **batch, objective=objective, chunk_tokens=4).loss
        return fusedpo.policy_loss_from_logits(hidden @ weight.T, **batch, objective=objective, temperature=0.7).loss

    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    result, expected = compiled(*leaves, batch), loss(*leaves, batch)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaves) for x in (result, expected)))
