"""verl's estimators as oracles, and the cases in which they differ from ours.

Install verl without its dependencies (``pip install --no-deps verl``), then codetiming, omegaconf, orjson, ray and
tensordict. Of its registry, ``tir_optimal_token_baseline`` has no counterpart here.
"""

import pytest
import torch

from fusedpo import advantages

verl = pytest.importorskip(
    "verl.trainer.ppo.core_algos", reason="verl, or something it imports, is not installed", exc_type=ImportError
)
np = pytest.importorskip("numpy")
verl_F = pytest.importorskip("verl.utils.torch_functional")

CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # float64; verl takes means over the number of tokens + 1e-8
SINGLE = {"rtol": 1e-6, "atol": 1e-6}  # where verl goes through float32

UIDS = np.array([f"prompt-{i}" for i in (3, 0, 1, 1, 0, 3, 3, 0, 1, 3, 0, 1)], dtype=object)
IDS = torch.tensor([3, 0, 1, 1, 0, 3, 3, 0, 1, 3, 0, 1])
LENGTHS = torch.tensor([7, 3, 5, 5, 1, 2, 7, 4, 6, 3, 2, 1])
MASK = torch.arange(7) < LENGTHS[:, None]
OUTCOMES = torch.tensor([1.0, 0.0, 0.5, -1.0, 1.0, 0.25, 1.0, 0.0, 2.0, -0.5, 0.0, 0.75], dtype=torch.float64)
OUTCOME_REWARDS = torch.zeros(12, 7, dtype=torch.float64).scatter(1, LENGTHS[:, None] - 1, OUTCOMES[:, None])
INSIDE = MASK.clone()
INSIDE[[0, 2, 6, 8], [2, 1, 4, 3]] = False  # observations of a tool, say

ALONE = np.array(["only"], dtype=object)
ONE = {"token_level_rewards": torch.tensor([[0.0, 0.8]]), "response_mask": torch.ones(1, 2), "index": ALONE}


# What this file compares, by the names of verl's registry.
COMPARED = {
    *(
        "gae",
        "gdpo",
        "gpg",
        "grpo",
        "grpo_passk",
        "grpo_vectorized",
        "opo",
        "optimal_token_baseline",
        "reinforce_plus_plus",
    ),
    *("reinforce_plus_plus_baseline", "remax", "rloo", "rloo_vectorized"),
}


def test_what_is_not_compared():
    names = {getattr(name, "value", name) for name in verl.ADV_ESTIMATOR_REGISTRY}
    names = {name for name in names if not name.startswith("fusedpo_")}  # the plugin's
    assert names - COMPARED == {"tir_optimal_token_baseline"}


class Config(dict):
    """verl reads its configuration by attribute and by ``get``."""

    __getattr__ = dict.__getitem__


def outcome(function, mask=MASK, **kwargs):
    """verl's advantages per token, for rewards at the last token of a response."""
    return function(token_level_rewards=OUTCOME_REWARDS.clone(), response_mask=mask.double(), index=UIDS, **kwargs)[0]


def check(result, expected, mask=MASK, tolerance=CLOSE):
    torch.testing.assert_close(result, expected.double() * mask, **tolerance)


# ------------------------------------------------------------------------------------------------------------ groups


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("compute_grpo_outcome_advantage", CLOSE), ("compute_grpo_vectorized_outcome_advantage", SINGLE)],
)
def test_grpo(name, tolerance, std):
    expected = outcome(getattr(verl, name), norm_adv_by_std_in_grpo=std)
    result = advantages.grpo(OUTCOMES, group_ids=IDS, std=std)
    check(advantages.to_tokens(result, MASK), expected, tolerance=tolerance)


@pytest.mark.parametrize("name", ["compute_rloo_outcome_advantage", "compute_rloo_vectorized_outcome_advantage"])
def test_rloo(name):
    check(advantages.to_tokens(advantages.rloo(OUTCOMES, group_ids=IDS), MASK), outcome(getattr(verl, name)))


def test_opo():
    result = advantages.opo(OUTCOMES, lengths=LENGTHS, group_ids=IDS)
    check(advantages.to_tokens(result, MASK), outcome(verl.compute_opo_outcome_advantage))


@pytest.mark.parametrize("f_norm", [1.0, 4.0])
def test_gpg(f_norm):
    result = advantages.gpg(OUTCOMES, f_norm=f_norm, group_ids=IDS)
    expected = outcome(verl.compute_gpg_outcome_advantage, f_norm=f_norm)
    check(advantages.to_tokens(result, MASK), expected, tolerance=SINGLE)


@pytest.mark.parametrize("std", [True, False])
def test_grpo_passk(std):
    config = Config(norm_adv_by_std_in_grpo=std)
    result = advantages.grpo_passk(OUTCOMES, std=std, group_ids=IDS)
    check(advantages.to_tokens(result, MASK), outcome(verl.compute_grpo_passk_outcome_advantage, config=config))


@pytest.mark.parametrize("mask", [MASK, INSIDE])
def test_reinforce_plus_plus_baseline(mask):
    result = advantages.reinforce_plus_plus_baseline(OUTCOMES, lengths=mask.sum(1), group_ids=IDS)
    expected = outcome(verl.compute_reinforce_plus_plus_baseline_outcome_advantage, mask)
    check(advantages.to_tokens(result, mask), expected, mask)


def test_gdpo_is_grpo_of_each_reward_whitened():
    """Here with verl's one reward; with several, the weighted sum of :func:`grpo` of each."""
    expected = outcome(verl.compute_gdpo_outcome_advantage)
    result = advantages.whiten(advantages.to_tokens(advantages.grpo(OUTCOMES, group_ids=IDS), MASK), mask=MASK)
    check(result, expected)


def test_a_group_of_one():
    """verl takes 0 for the mean of a group of one, in most estimators; ours takes its reward, so its advantage is 0."""

    def last_token(name, **kwargs):
        return verl.get_adv_estimator_fn(name)(**ONE, **kwargs)[0][0, -1].item()

    alone = torch.tensor([0.8])
    for name in ("grpo", "grpo_vectorized"):
        assert last_token(name) == pytest.approx(0.8 / (1 + 1e-6))
    assert advantages.grpo(alone, group_size=1) == 0
    assert last_token("rloo") == pytest.approx(0.8)
    assert last_token("rloo_vectorized") == 0
    assert advantages.rloo(alone, group_size=1) == 0
    assert last_token("opo") == pytest.approx(0.8)
    assert advantages.opo(alone, lengths=torch.tensor([2]), group_size=1) == 0
    assert last_token("gpg") == pytest.approx(0.8)
    assert advantages.gpg(alone, group_size=1) == 0
    with pytest.raises(ValueError, match="at least 2"):
        last_token("grpo_passk", config=Config())
    with pytest.raises(ValueError, match="at least 2"):
        advantages.grpo_passk(alone, group_size=1)


def test_a_group_of_one_where_all_tokens_are_whitened():
    """Baselines of two prompts: of the first, with one response, verl's is 0 and ours is its reward."""
    rewards, ids, mask = torch.tensor([0.8, 1.0, 3.0]), torch.tensor([0, 1, 1]), torch.ones(3, 2, dtype=torch.bool)
    batch = {"token_level_rewards": rewards[:, None] * torch.tensor([0, 1]), "response_mask": mask.float()}
    expected = verl.compute_reinforce_plus_plus_baseline_outcome_advantage(**batch, index=ids.numpy())[0]
    centred = advantages.to_tokens(torch.tensor([0.8, -1.0, 1.0]), mask)
    torch.testing.assert_close(advantages.whiten(centred, mask=mask), expected, **SINGLE)
    result = advantages.reinforce_plus_plus_baseline(rewards, lengths=mask.sum(1), group_ids=ids)
    assert result[0] == 0
    grpo = verl.compute_gdpo_outcome_advantage(**batch, index=ids.numpy())[0]
    centred = advantages.to_tokens(torch.tensor([0.8, -(0.5**0.5), 0.5**0.5]), mask)
    torch.testing.assert_close(advantages.whiten(centred, mask=mask), grpo, rtol=1e-5, atol=1e-5)  # verl's eps of 1e-6


# ------------------------------------------------------------------------------------------------------------ tokens


def token_batch(mask=1):
    rewards, values = torch.randn(2, 12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return rewards * mask, values


@pytest.mark.parametrize("mask", [MASK, INSIDE])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
def test_gae(mask, gamma, lam):
    rewards, values = token_batch(mask)
    expected, expected_returns = verl.compute_gae_advantage_return(rewards, values, mask.double(), gamma, lam)
    result = advantages.gae(rewards, values, mask=mask, gamma=gamma, lam=lam)
    check(advantages.whiten(result.advantages, mask=mask), expected, mask)
    check(result.returns, expected_returns, mask)


@pytest.mark.parametrize("mask", [MASK, INSIDE])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus(mask, gamma):
    rewards, _ = token_batch(mask)
    expected, returns = verl.compute_reinforce_plus_plus_outcome_advantage(
        rewards, mask.double(), config=Config(gamma=gamma)
    )
    check(advantages.reinforce_plus_plus(rewards, mask=mask, gamma=gamma), expected, mask)
    check(advantages.reward_to_go(rewards, mask=mask, gamma=gamma), returns, mask)


def test_remax():
    rewards, _ = token_batch(MASK)
    greedy = torch.randn(12, dtype=torch.float64)
    expected = verl.compute_remax_outcome_advantage(rewards, greedy, MASK.double())[0]
    result = advantages.reward_to_go(rewards, mask=MASK) - advantages.to_tokens(greedy, MASK)
    check(result, expected)
    expected = verl.compute_remax_outcome_advantage(OUTCOME_REWARDS, greedy, MASK.double())[0]
    check(advantages.to_tokens(advantages.remax(OUTCOMES, baselines=greedy), MASK), expected)


@pytest.mark.parametrize("with_is_weights", [False, True])
def test_optimal_token_baseline(with_is_weights):
    rewards, _ = token_batch(MASK)
    old, squares, weights = torch.rand(3, 12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = {"old_logprobs": old.log(), "sum_pi_squared": squares, "is_weights": weights if with_is_weights else None}
    expected = verl.compute_optimal_token_baseline_advantage(
        rewards,
        MASK.double(),
        UIDS,
        old_log_probs=given["old_logprobs"],
        sum_pi_squared=squares,
        rollout_is_weights=given["is_weights"],
    )[0]
    check(advantages.optimal_token_baseline(rewards, **given, mask=MASK, group_ids=IDS), expected)
    # A group of one has no baseline in either.
    alone = advantages.optimal_token_baseline(
        rewards[:1], **{k: v[:1] for k, v in given.items() if v is not None}, group_size=1
    )
    torch.testing.assert_close(alone, advantages.reward_to_go(rewards[:1]))


def test_optimal_token_baseline_of_a_token_alone():
    """Its baseline is 0 here, where verl compares it with itself; verl finds the tail of the longest by counts."""
    rewards, _ = token_batch()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [1, 0, 1, 1, 0]], dtype=torch.bool)
    rewards, old, squares = rewards[:3, :5] * mask, *torch.rand(2, 3, 5, dtype=torch.float64)
    expected = verl.compute_optimal_token_baseline_advantage(
        rewards, mask.double(), np.zeros(3), old_log_probs=old.log(), sum_pi_squared=squares
    )[0]
    result = advantages.optimal_token_baseline(
        rewards, old_logprobs=old.log(), sum_pi_squared=squares, mask=mask, group_size=3
    )
    returns = advantages.reward_to_go(rewards, mask=mask)
    alone, counted = torch.zeros(2, 3, 5, dtype=torch.bool)
    alone[0, [1, 4]] = counted[0, 3:] = True
    torch.testing.assert_close(result[alone], returns[alone])
    torch.testing.assert_close(expected[counted], returns[counted])
    assert abs(expected[0, 1]) < 1e-6
    both = ~alone & ~counted
    torch.testing.assert_close(result[both], expected[both], **CLOSE)


def test_whiten():
    rewards, _ = token_batch()
    check(advantages.whiten(rewards, mask=MASK), verl_F.masked_whiten(rewards, MASK.double()))
    with pytest.raises(ValueError, match="one"):
        verl_F.masked_whiten(rewards[:1, :1], torch.ones(1, 1))
    assert advantages.whiten(rewards[:1, :1]) == 0
