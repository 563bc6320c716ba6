"""The examples, run as a user runs them."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fusedpo

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
from support import ranks

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Runs a script in this process, which has imported most of what it needs; gives the exit status."""
    threads = torch.get_num_threads()

    def run(script: str, out: Path, *options: str) -> int:
        monkeypatch.setattr(sys, "argv", [script, "--out", str(out), *options])
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as exit:
            return int(exit.code or 0)
        return 0

    yield run
    torch.set_num_threads(threads)


def read(out: Path, name: str) -> Any:
    """The record that a script wrote beside its plot."""
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def arithmetic() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_arithmetic", EXAMPLES / "train_arithmetic.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def args(arithmetic: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    monkeypatch.setattr(sys, "argv", ["train_arithmetic.py", "--quick", "--prompts", "4"])
    return arithmetic.arguments()


@pytest.mark.slow
def test_training_raises_the_reward_and_both_losses_agree(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("train_arithmetic.py", tmp_path / "new", "--quick") == 0
    record = read(tmp_path / "new", "arithmetic")
    fused, eager = record["curves"]["fused"], record["curves"]["eager"]
    for curves in (fused, eager):
        assert all(len(curve) == record["settings"]["steps"] for curve in curves.values())
        assert sum(curves["reward"][-5:]) / 5 > curves["reward"][0] + 0.2
        assert min(curves["clip_frac"]) >= 0
        assert max(curves["clip_frac"]) > 0  # several updates per batch of samples: the ratios leave 1
    for name in fused:  # the first step sees the same samples; its metrics are float32
        assert fused[name][0] == pytest.approx(eager[name][0], rel=1e-4, abs=1e-6)


def test_losses_must_agree_while_they_see_the_same_samples(arithmetic: ModuleType) -> None:
    same = {"reward": [0.1, 0.4, 0.5, 0.5, 0.6], "loss": [0.0, 0.2, -0.1, 0.1, 0.3]}
    parted = {"reward": [0.1, 0.4, 0.5, 0.55, 0.6], "loss": [0.0, 0.2, -0.1, 0.4, 0.2]}
    too_early = {"reward": [0.1, 0.4, 0.6, 0.5, 0.5], "loss": same["loss"]}
    other_loss = {"reward": same["reward"], "loss": [0.0, 0.2, -0.1002, 0.1, 0.3]}
    for eager, holds in ((same, True), (parted, True), (too_early, False), (other_loss, False)):
        agree, claim = list(arithmetic.verdicts({"fused": same, "eager": eager}, 0.2))[2]
        assert agree == holds, claim


def test_training_that_does_not_raise_the_reward_fails(
    arithmetic: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--quick", "--loss", "fused", "--warmup-steps", "1", "--steps", "1", "--prompts", "2")
    threads = str(torch.get_num_threads())
    monkeypatch.setattr(sys, "argv", ["train_arithmetic.py", "--out", str(tmp_path), "--threads", threads, *options])
    with pytest.raises(SystemExit) as exit:
        arithmetic.main()
    assert exit.value.code == 1
    assert "no   fused: the reward rises by" in capsys.readouterr().out
    assert list(read(tmp_path, "arithmetic")["curves"]) == ["fused"]


def test_problems_hold_their_answers(arithmetic: ModuleType) -> None:
    prompts, answers = arithmetic.problems(500, digits=2, generator=torch.Generator().manual_seed(0))
    symbols = "0123456789+=."
    for prompt, answer in zip(prompts.tolist(), answers.tolist(), strict=True):
        a, b = "".join(symbols[i] for i in prompt).removesuffix("=").split("+")
        digits, end, rest = "".join(symbols[i] for i in answer).partition(".")
        assert digits[::-1] == str(int(a) + int(b))
        assert end == "."
        assert set(rest) <= {"."}
    kept = arithmetic.up_to_end(answers).sum(dim=1)
    assert kept.tolist() == [len(str(int(row))) + 1 for row in value_of(answers)]


def value_of(answers: torch.Tensor) -> torch.Tensor:
    """The numbers whose digits, the last one first, `answers` holds."""
    return (answers.masked_fill(answers > 9, 0) * 10 ** torch.arange(answers.shape[1])).sum(dim=1)


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo", "opo", "maxpo", "pkpo", "passk"])
def test_every_advantage_favours_right_answers(arithmetic: ModuleType, args: Namespace, advantage: str) -> None:
    args.advantage = advantage
    rollouts = arithmetic.collect(arithmetic.Transformer(length=7), args, torch.Generator().manual_seed(0))
    right = torch.arange(rollouts.rewards.numel()) % args.group_size < 2
    advantages = arithmetic.estimate_advantages(rollouts._replace(rewards=right.float()), args)
    assert advantages.shape == right.shape
    assert advantages[right].min() > advantages[~right].max()


@pytest.mark.parametrize(
    "objective", ["ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "dppo_tv", "dppo_kl", "nfpo"]
)
def test_every_objective_makes_rewarded_samples_likelier(
    arithmetic: ModuleType, args: Namespace, objective: str
) -> None:
    args.objective, args.epochs = objective, 1
    policy = arithmetic.Transformer(length=7)
    generator = torch.Generator().manual_seed(0)
    rollouts = arithmetic.collect(policy, args, generator)
    advantages = torch.where(torch.arange(rollouts.rewards.numel()) % 2 == 0, 1.0, -1.0)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-2)
    arithmetic.update(policy, optimizer, rollouts, advantages, arithmetic.build_objective(args), args, generator)
    with torch.no_grad():
        logprobs = fusedpo.token_logprobs(policy(rollouts.input_ids), rollouts.token_ids, mask=rollouts.mask)
    rise = (logprobs - rollouts.old_logprobs).sum(dim=1)
    assert rise[advantages > 0].mean() > rise[advantages < 0].mean()


@pytest.mark.slow
def test_comparison_of_losses(tmp_path: Path) -> None:
    """In a process of its own, whose memory has not grown yet."""
    script = [sys.executable, str(EXAMPLES / "compare_losses.py"), "--out", str(tmp_path)]
    result = subprocess.run([*script, "--tokens", "64", "--repeats", "2"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    record = read(tmp_path, "losses")
    results = {(r["dtype"], r["loss"]): r for r in record["results"]}
    assert len(results) == 6
    arithmetic_error = 4 * 2**-21  # a float32 log-prob of about -10 is rounded by 2^-21; the ratio inherits that
    for dtype, gradient_tolerance in (("float32", arithmetic_error), ("bfloat16", 2**-8)):  # rounded to 8 bits
        eager, fused, inplace = (results[dtype, loss] for loss in ("eager", "fused", "fused in place"))
        for r in (fused, inplace):
            assert len(r["seconds"]) == record["settings"]["repeats"]
            assert r["loss_error"] < arithmetic_error
            assert r["gradient_error"] < gradient_tolerance
        if eager["extra_bytes"] is not None:
            eager_memory, fused_memory, inplace_memory = (
                r["extra_bytes"] / r["logits_bytes"] for r in (eager, fused, inplace)
            )
            assert eager_memory > 2
            assert fused_memory < 1.2  # the gradient
            assert inplace_memory < 0.2


@pytest.mark.slow
def test_comparison_with_trl(run: Callable[..., int], tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    assert run("train_with_trl.py", tmp_path, "--quick", "--steps", "20", "--vocab", "5000") == 0
    assert read(tmp_path, "trl")
    assert (tmp_path / "trl.png").stat().st_size > 0


def test_the_notebook_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((EXAMPLES / "swap_the_loss.ipynb").read_text())
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    monkeypatch.syspath_prepend(str(EXAMPLES))
    quick = '["--quick", "--warmup-steps", "1", "--steps", "1", "--prompts", "2"]'
    given: dict[str, Any] = {}
    for cell in code:
        exec(cell.replace('["--quick"]', quick).replace("%matplotlib inline", ""), given)
    assert [len(curve) for curve in given["curves"].values()] == [1, 1, 1]
    assert fusedpo.to_floats(given["out"].metrics)["clip_frac"] == 0


def test_the_recipe_for_a_real_model_scores_answers() -> None:
    pytest.importorskip("trl")
    spec = importlib.util.spec_from_file_location("recipe", EXAMPLES / "train_qwen_gsm8k.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    example = module.as_prompt({"question": "How many?", "answer": "2 + 2 = 4\n#### 1,234"})
    assert example["answer"] == "1234"
    said = ["so it is #### 1,234.", "#### 12", "1234", "#### 1 and then #### 1234"]
    completions = [[{"role": "assistant", "content": text}] for text in said]
    assert module.correct(completions, ["1234"] * 4, prompts=None) == [1.0, 0.0, 0.0, 1.0]


def run_rank(rank: int, port: int, options: list[str]) -> None:
    """What torchrun starts on each rank."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    ranks.be_started_by_torchrun(rank, 2, port)
    sys.argv = ["train_distributed.py", *options]
    sys.path.insert(0, str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / "train_distributed.py"), run_name="__main__")


@pytest.mark.slow
@ranks.needs_gloo
@pytest.mark.parametrize("how", ["tensor", "context"])
def test_training_on_two_processes_is_that_on_one(how: str, tmp_path: Path) -> None:
    small = ("--warmup-steps", "40", "--steps", "3", "--prompts", "8", "--group-size", "4", "--minibatch", "16")
    options = [f"--{how}", "2", "--min-rise", "-1", "--out", str(tmp_path), *small]
    ranks.start(run_rank, 2, options)  # raises if one fails; the losses are among what they check
    curves = read(tmp_path, "distributed")["curves"]
    assert curves["split"]["reward"][0] == curves["one process"]["reward"][0]
    assert any(curves["one process"]["loss"])  # not all samples of all groups were equally right
