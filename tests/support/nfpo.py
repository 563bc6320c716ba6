"""Tokens of ragged sequences, and a tree of all sequences, for what NFPO promises."""

from __future__ import annotations

import itertools

import torch

import fusedpo
from fusedpo import objectives as O


def trace_only(n, differentiate=False):
    return O.Objective(O.ForwardTrace(n, differentiate), O.NoTrustRegion(), aggregation="token-sum")


def random_tokens(lengths, seed=0, dtype=torch.float64):
    """Packed log-probs, old log-probs, advantages, mask with holes, and offsets."""
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    lp = -torch.rand(total, generator=g, dtype=torch.float64) - 0.1
    olp = lp + 0.3 * torch.randn(total, generator=g, dtype=torch.float64)
    advantages = torch.randn(total, generator=g, dtype=torch.float64)
    mask = torch.rand(total, generator=g) < 0.7
    return lp.to(dtype), olp.to(dtype), advantages.to(dtype), mask, torch.tensor([0, *itertools.accumulate(lengths)])


ACTIONS, STEPS = 3, 3


class Tree:
    """All sequences of three actions: a policy is a table of logits, one row for each prefix."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.sequences = torch.tensor(list(itertools.product(range(ACTIONS), repeat=STEPS)))
        prefixes = [p for length in range(STEPS) for p in itertools.product(range(ACTIONS), repeat=length)]
        self.rows = torch.tensor(
            [[prefixes.index(tuple(y[:t])) for t in range(STEPS)] for y in self.sequences.tolist()]
        )
        self.pi, self.mu = (torch.randn(len(prefixes), ACTIONS, generator=g, dtype=torch.float64) for _ in range(2))
        self.reward = torch.randn(len(self.sequences), generator=g, dtype=torch.float64)
        self.pi.requires_grad_()

    def logprobs(self, table):
        return table.log_softmax(-1)[self.rows, self.sequences]

    def expected_reward(self, table):
        return (self.logprobs(table).sum(-1).exp() * self.reward).sum()

    def surrogate(self, n, differentiate, advantages=None):
        """E_mu[sum_t -loss_t], by enumeration: mu's probability of a sequence is its weight."""
        old = self.logprobs(self.mu)
        loss = fusedpo.policy_loss(
            self.logprobs(self.pi),
            old,
            self.reward if advantages is None else advantages,
            objective=trace_only(n, differentiate),
            is_weights=old.sum(-1).exp(),
        ).loss
        return -loss

    def gradient(self, value):
        return torch.autograd.grad(value, self.pi)[0]


def check_cumulative_sums_would_cancel():
    # a difference of suffix sums of 15,300 has an error of 1e-3 in float32
    x = torch.cat((torch.full((3,), 0.125), torch.full((1000,), 15.3)))
    tokens = fusedpo.policy_loss(torch.zeros(1003), -x, -torch.ones(1), objective=trace_only(2), reduction="none").loss
    assert tokens[0].item() == torch.tensor(0.125).exp().square().item()
