"""docs/migrating.md: what it calls ours exists, and the names that messages explain are on it."""

import re
from pathlib import Path

import pytest
import torch

import fusedpo
from fusedpo import _names, advantages, corrections, objectives

PAGE = (Path(__file__).parents[1] / "docs/migrating.md").read_text()
OURS = re.findall(r"`((?:objectives|advantages|corrections|fusedpo)\.\w+\([^`]*\))`", PAGE)


@pytest.mark.parametrize("expression", [*OURS, *re.findall(r"is_weights=(fusedpo\.[^`]+)`", PAGE)])
def test_what_is_ours_runs(expression):
    mask = torch.ones(8, 3)
    names = {
        **{"fusedpo": fusedpo, "objectives": objectives, "advantages": advantages, "corrections": corrections},
        **{"rewards": torch.rand(8), "lengths": torch.arange(8), "objective": objectives.grpo(), "mask": mask},
        **dict.fromkeys(("entropy", "values", "token_rewards", "old_logprobs", "ref_logprobs"), -torch.rand(8, 3)),
        "rollout_logprobs": -torch.rand(8, 3),
        "out": fusedpo.policy_loss(-torch.rand(8, 3), None, mask, objective="ppo"),
    }
    eval(expression, names)


def test_the_page_has_what_the_messages_explain():
    assert len(OURS) > 30
    for name in ("beta", "epsilon", "delta", "max_completion_length", "clip_ratio_c", "loss_agg_mode", "temperature"):
        assert name in _names.OTHERS
        assert f"`{name}" in PAGE, name
