"""The recipes of docs/segments.md run as they stand there, and what they claim holds."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import torch

import fusedpo
from fusedpo import advantages as A

PAGE = Path(__file__).parents[1] / "docs/segments.md"


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 8
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["pairs"].tolist() == [[1, 0]]
    of_steps = torch.tensor([[0.1, 0.1, 0.3, 0.3, 0.2, 0.2], [-0.2] * 6])
    assert torch.allclose(names["prover"], of_steps)
    # the last rewards of both rows are what their last tokens have to go
    assert torch.allclose(names["process"][0, 4:], names["normalised"][2].expand(2))
    assert torch.allclose(names["shaped"], names["rewards"][:, None] - names["potential"])
    assert torch.equal(names["best"], torch.tensor([False, True, False, True, True, True]))


def tree(depth: int):
    """A binary tree of decisions with a random policy: probabilities of the first action by prefix, and rewards."""
    prefixes = [p for n in range(depth) for p in itertools.product((0, 1), repeat=n)]
    x = {p: torch.randn((), dtype=torch.float64, requires_grad=True) for p in prefixes}
    rewards = {y: torch.rand((), dtype=torch.float64).item() for y in itertools.product((0, 1), repeat=depth)}
    return x, rewards


def log_prob(x, prefix, action):
    return torch.nn.functional.logsigmoid(x[prefix] if action == 0 else -x[prefix])


def expected_gradient(x, rewards, coefficient):
    """Of ``E[sum_t coefficient(y, t) grad log pi(y_t | y_<t)]`` over all sequences."""
    total = 0.0
    for y in rewards:
        lps = [log_prob(x, y[:t], y[t]) for t in range(len(y))]
        probability = sum(lps).exp().detach()
        total = total + probability * sum(coefficient(y, t) * lp for t, lp in enumerate(lps))
    return torch.stack(torch.autograd.grad(total, list(x.values())))


def values_of(x, rewards):
    """The expected reward after every prefix."""
    depth = len(next(iter(rewards)))

    def value(prefix):
        if len(prefix) == depth:
            return rewards[prefix]
        p = log_prob(x, prefix, 0).exp().item()
        return p * value((*prefix, 0)) + (1 - p) * value((*prefix, 1))

    return value


def test_a_provers_advantage_is_the_own_steps_term():
    """As reward-to-go it telescopes to a baseline: the gradient is ``(1 + alpha) grad J`` whatever the prover."""
    torch.manual_seed(0)
    x, rewards = tree(3)
    prover = values_of(tree(3)[0], rewards)
    alpha = 0.7
    gradient = expected_gradient(x, rewards, lambda y, t: rewards[y])

    def own(y, t):
        return rewards[y] + alpha * (prover(y[: t + 1]) - prover(y[:t]))

    def to_go(y, t):
        return rewards[y] + alpha * sum(prover(y[: s + 1]) - prover(y[:s]) for s in range(t, len(y)))

    torch.testing.assert_close(expected_gradient(x, rewards, to_go), (1 + alpha) * gradient)
    assert (expected_gradient(x, rewards, own) - (1 + alpha) * gradient).abs().max() > 1e-3
    by_itself = values_of(x, rewards)

    def own_prover(y, t):
        return rewards[y] + alpha * (by_itself(y[: t + 1]) - by_itself(y[:t]))

    torch.testing.assert_close(expected_gradient(x, rewards, own_prover), (1 + alpha) * gradient)


def test_pav_of_the_page_is_that_term():
    """The estimate of the page, over all sequences of a tree, with a step per token."""
    torch.manual_seed(0)
    _, rewards = tree(3)
    prover = values_of(tree(3)[0], rewards)
    sequences = list(rewards)
    values = torch.tensor([[prover(y[:t]) for t in range(4)] for y in sequences], dtype=torch.float64)
    steps = torch.arange(3).expand(len(sequences), 3)
    outcome = A.to_tokens(torch.tensor(list(rewards.values()), dtype=torch.float64), torch.ones(len(sequences), 3))
    pav = outcome + 0.7 * A.vineppo(values, step_rewards=torch.zeros(len(sequences), 3), step_ids=steps)
    for y, row in zip(sequences, pav, strict=True):
        for t in range(3):
            assert abs(row[t].item() - (rewards[y] + 0.7 * (prover(y[: t + 1]) - prover(y[:t])))) < 1e-12


def test_rounds_of_dpo_learn_to_prefer():
    """Iterative DPO on a bandit: rounds of pairs from rewards, the reference being the start of the round."""
    torch.manual_seed(0)
    rewards = torch.tensor([0.0, 0.2, 0.9, 0.5])
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=5.0)
    for _ in range(3):
        reference = logits.detach().log_softmax(0)
        samples = torch.multinomial(reference.exp(), 32, replacement=True)
        pairs = fusedpo.pairs_from_rewards(rewards[samples], group_size=8)
        for _ in range(10):
            logprobs = logits.log_softmax(0)[samples][:, None]
            loss = fusedpo.preference_loss(
                logprobs, reference[samples][:, None], objective=fusedpo.objectives.dpo(), pairs=pairs
            ).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert logits.argmax() == 2
    assert logits.softmax(0)[2] > 0.6
