"""The Python of every page runs as it stands; what cannot run here is named, with what runs it or why nothing does."""

import functools
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import fusedpo
from fusedpo.integrations import areal, openrlhf

ROOT = Path(__file__).parents[1]
B, T, V = 16, 6, 11

# Pages that a test of their own runs.
ELSEWHERE = {
    "docs/segments.md": "test_segments_recipes.py",
    "docs/extending.md": "test_extending.py",
}
# Blocks, by page and place on it.
NOT_RUN = {
    ("docs/integrations/trl.md", 0): "trains; test_integration_trl.py does",
    ("docs/integrations/trl.md", 1): "its first arguments are an ellipsis; test_integration_trl.py gives some",
    ("docs/integrations/trl.md", 2): "changes trl for all tests; test_integration_trl_patch.py patches and undoes it",
    ("docs/integrations/verl.md", 0): "changes verl for all tests; test_integration_verl.py calls register",
    ("docs/integrations/verl.md", 1): "changes verl for all tests; test_integration_verl.py calls patch_verl",
    ("docs/integrations/skyrl.md", 0): "needs SkyRL; test_integration_adapters.py registers with a stand-in",
    ("docs/integrations/skyrl.md", 1): "needs SkyRL; test_integration_adapters.py patches a stand-in",
    ("docs/integrations/torchtitan.md", 0): "needs a trainer; test_trainers.py builds the loss beside torchtitan's",
    ("docs/integrations/torchrl.md", 0): "needs TorchRL; test_trainers.py builds the loss beside TorchRL's",
    (
        "docs/distributed.md",
        0,
    ): "needs several ranks; test_distributed_tensor.py and test_distributed_hidden.py start them",
    ("docs/integrations/nemo_rl.md", 0): "needs NeMo-RL; test_integration_adapters.py patches a stand-in",
    ("docs/integrations/nemo_rl.md", 1): "needs NeMo-RL; test_integration_adapters.py patches a stand-in",
}


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
WITH_CODE = [page for page in PAGES if blocks(page)]


def run(page: str, **given: object) -> dict[str, object]:
    """The blocks of a page one after the other, as in one session; what they leave."""
    names = before() | given
    for place, code in enumerate(blocks(page)):
        if (page, place) not in NOT_RUN:
            exec(compile(code, f"{page}, block {place}", "exec"), names)
    return names


def before() -> dict[str, object]:
    """What a reader has before the first line."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(B, T, generator=generator) > 0.3
    return {
        **{"torch": torch, "fusedpo": fusedpo},
        **{"input_ids": torch.randint(0, V, (B, T), generator=generator), "loss_mask": mask, "mask": mask},
        "logits": torch.randn(B, T, V, generator=generator).requires_grad_(),
        "rewards": torch.rand(B, generator=generator),
        **{name: -torch.rand(B, T, generator=generator) for name in ("old_logprobs", "ref_logprobs", "values")},
        "engine_logprobs": -torch.rand(B, T, generator=generator),
        "log": print,
    }


def test_readme():
    code = [block for block in blocks("README.md") if "trl" not in block]
    names = before()
    for block in code:
        exec(block, names)
    assert names["out"].loss.isfinite()
    assert names["logits"].grad.any()
    pytest.importorskip("trl")
    for block in set(blocks("README.md")) - set(code):
        exec(block, {})


def test_getting_started():
    names = run("docs/getting-started.md")
    assert names["logits"].grad.any()
    assert not (names["old_logprobs"] == names["engine_logprobs"]).all()


def test_advantages():
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 4:] = False
    text = "Q: 1+1?\nIt is\ntwo\n#### 2"
    offsets = [(0, 7), (7, 13), (13, 14), (14, 17), (17, 22), (22, 24)]
    names = run(
        "docs/advantages.md",
        **{"advantages": fusedpo.advantages, "mask": mask, "outcomes": torch.rand(B), "rollouts": list(range(B))},
        **{"lengths": torch.randint(1, T, (B,)), "uids": [f"prompt {i // 8}" for i in range(B)]},
        **{"not_removed": torch.ones(B), "token_rewards": torch.rand(B, T) * mask, "greedy_rewards": torch.rand(B)},
        **{"weights": (0.7, 0.3), "rewards_by_kind": torch.rand(2, B)},
        **{name: getattr(fusedpo.advantages, name) for name in ("segment_steps", "pool_rollouts", "vineppo")},
        **{"texts": [text] * B, "offsets": [offsets] * B, "prompt_lengths": [7] * B},
        rewards_of_rollouts_from=lambda state: [float(len(state) % 2), 1.0],
    )
    assert names["adv"].shape == (B, T)
    assert names["adv"].isfinite().all()
    assert names["adv"][1].any()


def test_objectives():
    """Both ways to take the mean over prompts."""
    names = before()
    token_ids = names["input_ids"]
    logprobs = fusedpo.token_logprobs(names["logits"].detach(), token_ids)
    names = run("docs/objectives.md", token_ids=token_ids, logprobs=logprobs, advantages=torch.randn(B))
    torch.testing.assert_close(names["out"].loss, names["loss"])


def test_a_loop_of_ones_own():
    """Micro-batches divided by the count of the step have the gradient of the whole batch."""
    names = before()
    token_ids, mask = fusedpo.next_tokens(names["input_ids"], names["loss_mask"])
    advantages, old_logprobs = torch.randn(B), names["old_logprobs"]
    logits = names["logits"].detach().requires_grad_()
    micro_batches = [
        SimpleNamespace(
            logits=logits[rows],
            token_ids=token_ids[rows],
            old_logprobs=old_logprobs[rows],
            advantages=advantages[rows],
            mask=mask[rows],
        )
        for rows in (slice(0, 5), slice(5, B))
    ]
    given = {"token_ids": token_ids, "mask": mask, "advantages": advantages, "old_logprobs": old_logprobs}
    names = run("docs/integrations/pytorch.md", micro_batches=micro_batches, masks_of_the_step=mask, **given)
    torch.testing.assert_close(logits.grad, names["logits"].grad)


def test_coming_from_another_library():
    (code,) = blocks("docs/migrating.md")
    *_, call, says = code.splitlines()
    with pytest.raises(TypeError) as error:
        exec(call, before())
    for part in says.removeprefix("# TypeError: ").split("..."):
        assert part.strip() in str(error.value)


TRAINERS = {
    "areal": ("areal.trainer.ppo.actor", "ppo_actor_loss_fn", areal.ppo_actor_loss_fn),
    "openrlhf": ("openrlhf.trainer.ray.ppo_actor", "PolicyLoss", openrlhf.PolicyLoss),
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_name_of_the_trainer_is_replaced(trainer, monkeypatch):
    """In a stand-in for the module that looks it up."""
    module, name, ours = TRAINERS[trainer]
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
        if depth > 1:
            setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], sys.modules[path])
    run(f"docs/integrations/{trainer}.md")
    replaced = getattr(sys.modules[module], name)
    assert isinstance(replaced, functools.partial)
    assert replaced.func is ours
    assert replaced.keywords["objective"] == "nfpo"


def test_every_block_of_every_page_is_run_or_named():
    run_here = {"README.md", "docs/getting-started.md", "docs/objectives.md", "docs/advantages.md"}
    run_here |= {
        "docs/migrating.md",
        "docs/integrations/pytorch.md",
        *(f"docs/integrations/{trainer}.md" for trainer in TRAINERS),
    }
    left = [page for page in WITH_CODE if page not in run_here | ELSEWHERE.keys()]
    assert [(page, place) for page in left for place in range(len(blocks(page))) if (page, place) not in NOT_RUN] == []
    for page, place in NOT_RUN:  # none has gone
        assert place < len(blocks(page))
    for reason in (*ELSEWHERE.values(), *NOT_RUN.values()):
        for test in re.findall(r"test_\w+\.py", reason):
            assert (ROOT / "tests" / test).exists()
