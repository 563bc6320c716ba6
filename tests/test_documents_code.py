"""The Python of README and Getting started, and of the pages beside them that need no trainer, runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

import fusedpo

ROOT = Path(__file__).parents[1]
B, T, V = 16, 6, 11


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def names() -> dict[str, object]:
    """What a reader has before the first line."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(B, T, generator=generator) > 0.3
    return {
        **{"torch": torch, "fusedpo": fusedpo, "advantages": fusedpo.advantages},
        **{"input_ids": torch.randint(0, V, (B, T), generator=generator), "loss_mask": mask, "mask": mask},
        "logits": torch.randn(B, T, V, generator=generator).requires_grad_(),
        "rewards": torch.rand(B, generator=generator),
        "outcomes": torch.rand(B, generator=generator),
        "lengths": torch.randint(1, T, (B,), generator=generator),
        "uids": [f"prompt {i // 8}" for i in range(B)],
        "rollouts": list(range(B)),
        "not_removed": torch.ones(B),
        **{name: -torch.rand(B, T, generator=generator) for name in ("old_logprobs", "ref_logprobs", "values")},
        "engine_logprobs": -torch.rand(B, T, generator=generator),
        "log": print,
    }


def test_readme():
    trl, code = blocks("README.md")
    exec(code, given := names())
    assert given["out"].loss.isfinite()
    assert given["logits"].grad.any()
    pytest.importorskip("trl")
    exec(trl, {})


def test_getting_started():
    given = names()
    for code in blocks("docs/getting-started.md"):
        exec(code, given)
    assert given["logits"].grad.any()
    assert not (given["old_logprobs"] == given["engine_logprobs"]).all()


@pytest.mark.parametrize("heading", ["Samples that do not count", "Rewards of tokens from outcomes"])
def test_advantages(heading):
    page = (ROOT / "docs/advantages.md").read_text()
    (code,) = re.findall(rf"## {heading}[^#]*?```python\n(.*?)```", page, re.DOTALL)
    given = names()
    exec(code, given)
    assert given["adv"].isfinite().all()
