"""The reference on devices without float64 (Apple's MPS, Intel's Arc), which it is what runs there."""

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fusedpo
from fusedpo import advantages as A

REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.25, 3.0, 1.0, 1.0, -2.0])
RIGHT = (REWARDS > 0.3).float()
LENGTHS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]])
TOKENS = torch.tensor([[0.3, -0.2, 0.0, 1.0, 0.5], [0.0, 2.0, 0.1, -0.7, 0.0]])
IDS = torch.tensor([5, 2, 2, 5, 5, 2, 5, 2])

OUTCOME = {
    **{name: {} for name in ("grpo", "dr_grpo", "rloo", "gpg", "reinforce_rej", "raft", "grpo_passk")},
    **{name: {"lengths": LENGTHS} for name in ("opo", "reinforce_plus_plus_baseline")},
    **{name: {"k": 2} for name in ("maxpo", "pkpo", "passk", "max_at_k")},
    "order_statistic": {"k": 2, "weights": [0.75, 0.25]},
    "remax": {"baselines": torch.arange(8) / 4},
}
TOKEN = {
    "reward_to_go": lambda: A.reward_to_go(TOKENS, mask=MASK, gamma=0.9, bootstrap=torch.ones(2)),
    "gae": lambda: A.gae(TOKENS, TOKENS - 1, mask=MASK, gamma=0.9, lam=0.8, bootstrap=torch.ones(2)),
    "vtrace": lambda: A.vtrace(TOKENS, TOKENS - 1, logprobs=TOKENS, old_logprobs=TOKENS / 2, mask=MASK, gamma=0.9),
    "reinforce_plus_plus": lambda: A.reinforce_plus_plus(TOKENS, mask=MASK, gamma=0.9),
    "optimal_token_baseline": lambda: A.optimal_token_baseline(
        TOKENS, old_logprobs=-TOKENS.abs(), sum_pi_squared=TOKENS.abs() / 3, mask=MASK, group_size=2
    ),
    "vineppo": lambda: A.vineppo(
        TOKENS, step_rewards=TOKENS[:, 1:], step_ids=torch.tensor([[0, 1, -1], [2, 3, 3]]), whiten=True
    ),
    "whiten": lambda: A.whiten(TOKENS, mask=MASK),
    "to_tokens": lambda: A.to_tokens(REWARDS[:2], MASK),
    "rewards_on_kept": lambda: A.rewards_on_kept(TOKENS, MASK.flip(1)),
}


class NoFloat64(TorchDispatchMode):
    """Refuses what makes a float64 tensor, with the exception of MPS."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in pytree.tree_leaves(result)):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return result


def outcome(name):
    rewards = RIGHT if name in ("passk", "max_at_k") else REWARDS
    groups = {} if name in ("raft", "remax") else {"group_ids": IDS}
    return getattr(A, name)(rewards, mask=LENGTHS != 9, **groups, **OUTCOME[name])


@pytest.mark.parametrize("name", [*OUTCOME, *TOKEN])
def test_estimators(name):
    call = TOKEN.get(name, lambda: outcome(name))
    expected = call()
    with fusedpo.backend("reference"), NoFloat64():
        result = call()
    for got, right in zip(pytree.tree_leaves(result), pytree.tree_leaves(expected), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)  # sums of eight numbers up to 4, in float32


def test_every_estimator_is_tested():
    assert {*OUTCOME, *TOKEN} >= {*A.available(), "whiten", "to_tokens", "max_at_k"}
