"""A real ``GRPOTrainer`` beside a real ``FusedGRPOTrainer``: tiny random models, a tokenizer built in memory."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import fusedpo

pytest.importorskip("trl", reason="trl is not installed (extra [peers])")
pytest.importorskip("datasets", reason="datasets is not installed (it comes with trl)")

import accelerate
from support.trl_training import (  # noqa: F401
    FLOAT32,
    HIDDEN,
    REUSE,
    SIZES,
    VOCABULARY,
    Build,
    Run,
    assert_same,
    builder,
    make_tokenizer,
    model,
    one_thread,
    train,
)
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import GRPOTrainer, RLOOConfig, RLOOTrainer

from fusedpo import objectives
from fusedpo.integrations.trl import FusedGRPOTrainer, FusedRLOOTrainer
from fusedpo.integrations.trl.heads import LogitsHead, add_fused_forward, logit_scale
from fusedpo.integrations.trl.objective import from_config


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def build(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Build:
    return builder(tokenizer, tmp_path)


# ------------------------------------------------------------------------------------------ the losses that TRL has too

LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"delta": 1.5, "epsilon": 0.02},
    "bnpo": {"entropy_coef": 0.01, "epsilon": 0.02},
    "dr_grpo": {"epsilon": 0.02},
    "dapo": {"epsilon": 0.02, "epsilon_high": 0.04, "mask_truncated_completions": True},
    "cispo": {"epsilon_high": 1.02},
    "sapo": {"sapo_temperature_neg": 1.3},
    "vespo": {"vespo_k_neg": 2.5},
    "luspo": {"importance_sampling_level": "sequence", "epsilon": 0.01},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01},
}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_same_training_as_trl(build: Build, loss_type: str) -> None:
    # each batch of samples serves two steps: four have all that twenty have, which one loss takes
    steps = 20 if loss_type == "dapo" else 4
    config = {"loss_type": loss_type, "max_steps": steps} | REUSE | LOSSES[loss_type]
    expected = train(build(GRPOTrainer, **config))
    assert len(expected.logs) == steps + 1
    assert_same(train(build(**config)), expected)
    assert_same(train(build(fused=HIDDEN, **config)), expected)
    ratios = ("clip_ratio/low_mean", "clip_ratio/high_mean", "cispo_clip_ratio")
    clipped = [log[name] for name in ratios for log in expected.logs if name in log]
    assert not clipped or max(clipped) > 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fused", [{}, HIDDEN], ids=["logits", "hidden"])
def test_kl_to_the_reference_model(build: Build, tmp_path: Path, fused: dict[str, Any], weighted: bool) -> None:
    model().save_pretrained(tmp_path / "model")  # TRL loads the reference model by the path of the policy

    def policy() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "model")

    config = {"beta": 0.3, "use_bias_correction_kl": weighted, "max_steps": 4} | REUSE
    expected = train(build(GRPOTrainer, policy(), **config))
    assert expected.logs[-2]["kl"] > 1e-3
    assert_same(train(build(FusedGRPOTrainer, policy(), fused=fused, **config)), expected)


EVERYTHING_ELSE: dict[str, dict[str, Any]] = {
    "entropy bonus": {"entropy_coef": 0.02},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_coef": 0.02, "entropy_target": 9.0},
    "entropy quantile": {"top_entropy_quantile": 0.5, "loss_type": "grpo"},
    "off-policy mask": {"off_policy_mask_threshold": 1e-3},
    "small delta": {"delta": 1.1},
}


@pytest.mark.parametrize("option", EVERYTHING_ELSE)
def test_logprobs_alone_support_every_option(build: Build, option: str) -> None:
    config = EVERYTHING_ELSE[option] | REUSE | {"max_steps": 4}
    expected = train(build(GRPOTrainer, **config))
    assert_same(train(build(fused={"fuse": "logprobs"}, **config)), expected)
    assert_same(train(build(fused={"fuse": "logprobs"} | HIDDEN, **config)), expected)


# ------------------------------------------------------------------------------------------------ one micro-batch alone

BATCH, PROMPT, COMPLETION = 4, 5, 6


def micro_batch(**more: Any) -> dict[str, Any]:
    """What TRL hands to its loss: sequences of different lengths, one without a completion that counts."""
    lengths = torch.tensor([6, 3, 0, 5])
    prompt_lengths = torch.tensor([5, 2, 4, 1])
    return {
        "prompt_ids": torch.randint(2, len(VOCABULARY), (BATCH, PROMPT)),
        "prompt_mask": (torch.arange(PROMPT) >= PROMPT - prompt_lengths[:, None]).long(),
        "completion_ids": torch.randint(2, len(VOCABULARY), (BATCH, COMPLETION)),
        "completion_mask": (torch.arange(COMPLETION) < lengths[:, None]).long(),
        "advantages": torch.tensor([1.0, -0.7, 0.4, -1.3]),
        "num_items_in_batch": torch.tensor(23),
        "old_per_token_logps": -3.5 + 0.3 * torch.randn(BATCH, COMPLETION),
    } | more


def loss_and_gradients(
    trainer: GRPOTrainer, inputs: dict[str, Any]
) -> tuple[torch.Tensor, Any, dict[str, list[float]]]:
    trainer.current_gradient_accumulation_steps = 3
    loss = trainer._compute_loss(trainer.model, inputs)
    gradients = {}
    if trainer.model.training:
        loss.backward()
        gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, dict(trainer._metrics["train" if trainer.model.training else "eval"])


def assert_same_loss(
    build: Build,
    inputs: dict[str, Any],
    fused: dict[str, Any],
    policy: Callable[[], PreTrainedModel] = model,
    setup: Callable[[GRPOTrainer], Any] = lambda trainer: trainer.model.train(),
    tolerance: float = 2e-5,
    **config: Any,
) -> None:
    results = []
    for trainer in (build(FusedGRPOTrainer, policy(), fused=fused, **config), build(GRPOTrainer, policy(), **config)):
        trainer.args.steps_per_generation = 2
        setup(trainer)
        results.append(loss_and_gradients(trainer, inputs))
    (loss, gradients, metrics), (expected, expected_gradients, expected_metrics) = results
    assert loss == pytest.approx(expected.item(), rel=tolerance, abs=tolerance / 10)
    assert list(metrics) == list(expected_metrics)
    for name, values in metrics.items():
        assert values == pytest.approx(expected_metrics[name], rel=tolerance, abs=tolerance / 10), name
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=tolerance, atol=tolerance * scale)


BOTH_HEADS = pytest.mark.parametrize("fused", [{}, HIDDEN], ids=["logits", "hidden"])


@BOTH_HEADS
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"])
def test_masks_and_normalisation(
    build: Build, fused: dict[str, Any], loss_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tool tokens, an empty completion, two processes, three micro-batches per step, two steps per generation."""
    monkeypatch.setattr(accelerate.Accelerator, "num_processes", property(lambda self: 2))
    tool_mask = (torch.rand(BATCH, COMPLETION) < 0.7).long()
    tool_mask[0, 2] = 0
    assert_same_loss(build, micro_batch(tool_mask=tool_mask), fused, loss_type=loss_type, epsilon_high=1.1)


@BOTH_HEADS
def test_evaluation_is_not_accumulated(build: Build, fused: dict[str, Any]) -> None:
    for loss_type in ("grpo", "dapo"):
        assert_same_loss(build, micro_batch(), fused, setup=lambda t: t.model.eval(), loss_type=loss_type)


@pytest.mark.parametrize(
    ("mode", "config"),
    [
        ("token_truncate", {"loss_type": "dapo"}),
        ("token_mask", {"loss_type": "cispo", "epsilon_high": 1.1}),
        ("token_truncate", {"loss_type": "vespo"}),
        ("sequence_mask", {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    ],
)
def test_weights_of_the_inference_engine(build: Build, mode: str, config: dict[str, Any]) -> None:
    inputs = micro_batch()
    shape = (BATCH, COMPLETION if mode.startswith("token") else 1)
    weights = torch.rand(shape).add(0.5)
    weights[1, 0] = 0 if mode.endswith("mask") else 1
    weights[(inputs["completion_mask"] == 0)[:, : shape[1]]] = 1  # as TRL computes them

    def setup(trainer: GRPOTrainer) -> None:  # as with vLLM, which is not needed for the loss
        trainer.use_vllm = True
        trainer.model.train()

    config |= {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 2.0}
    assert_same_loss(build, inputs | {"importance_sampling_ratio": weights}, {}, setup=setup, **config)


def test_advantages_per_token_and_no_old_logprobs(build: Build) -> None:
    inputs = micro_batch(advantages=torch.randn(BATCH, COMPLETION))
    assert_same_loss(build, inputs, {})
    del inputs["old_per_token_logps"]
    assert_same_loss(build, inputs, {})


@BOTH_HEADS
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("gpt2", {"tie_word_embeddings": True, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
        ("phi", {}),  # the head has a bias
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 3.0}),
        ("mixtral", {"num_local_experts": 2, "router_aux_loss_coef": 0.1}),
    ],
)
def test_heads_of_models(build: Build, fused: dict[str, Any], kind: str, config: dict[str, Any]) -> None:
    trl_config = {"epsilon": 0.5}
    if kind == "mixtral" and fused:
        trl_config["router_aux_loss_coef"] = 0.0
    assert_same_loss(build, micro_batch(), fused, lambda: model(kind, **config), **trl_config)


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    ("copied", "hooked"),
    [(copy.deepcopy, False), (copy.deepcopy, True), (AveragedModel, False), (AveragedModel, True), (by_pickle, False)],
)
def test_copies_of_a_model_have_their_own_weights(copied: Callable[..., Any], hooked: bool) -> None:
    """Also where somebody else had replaced the forward of the model, as accelerate's hooks do."""
    policy = model("llama").eval()
    if hooked:
        accelerate.hooks.add_hook_to_module(policy, accelerate.hooks.ModelHook())
    ids = torch.randint(0, len(VOCABULARY), (2, 7))
    with torch.no_grad():
        before = policy(input_ids=ids).logits
        for _ in range(2):  # two trainers
            add_fused_forward(policy)
        snapshot = copied(policy)
        for parameter in policy.parameters():
            parameter.mul_(1.5)
        assert torch.equal(snapshot(input_ids=ids).logits, before)
        assert not torch.allclose(policy(input_ids=ids).logits, before)
        for each in (policy, snapshot)[: 1 if copied is by_pickle else 2]:  # it leaves out what is no class's
            who, logits = each(input_ids=ids, fused=lambda m, forward, **inputs: (m, forward(**inputs).logits))
            assert who is getattr(each, "module", each)
            assert torch.equal(logits, each(input_ids=ids).logits)


def test_mixed_precision_is_as_accurate_as_trl(build: Build) -> None:
    inputs = micro_batch()

    def gradient(trainer: GRPOTrainer) -> torch.Tensor:
        return torch.cat([x.flatten() for x in loss_and_gradients(trainer, inputs)[1].values()])

    truth = gradient(build(GRPOTrainer, epsilon=0.5))
    config = {"bf16": True, "epsilon": 0.5}
    error = (gradient(build(GRPOTrainer, **config)) - truth).norm()
    assert error > 1e-3 * truth.norm()  # rounded to 8 bits
    for fused in ({}, HIDDEN):
        assert (gradient(build(fused=fused, **config)) - truth).norm() < 1.5 * error


def test_head_in_float32(build: Build) -> None:
    config = {"bf16": True, "epsilon": 0.5, "cast_lm_head_to_fp32": True}
    inputs = micro_batch()
    loss, expected = (
        loss_and_gradients(trainer, inputs)[0]
        for trainer in (build(fused=HIDDEN, **config), build(GRPOTrainer, **config))
    )
    assert loss == pytest.approx(expected.item(), rel=1e-5)  # a head in bfloat16 is 1e-3 away


class LogitsRows(TorchDispatchMode):
    """The largest number of rows of any tensor of the vocabulary's width that an operator returns."""

    rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.shape[-1:] == (len(VOCABULARY),) and x.dtype.is_floating_point:
                self.rows = max(self.rows, x.numel() // len(VOCABULARY))
        return result


@pytest.mark.parametrize("fuse", ["loss", "logprobs"])
def test_which_logits_exist(build: Build, fuse: str) -> None:
    for fused, rows in (({}, BATCH * (COMPLETION + 1)), (HIDDEN, max(HIDDEN["chunk_tokens"], SIZES["hidden_size"]))):
        trainer = build(fused=fused | {"fuse": fuse})  # the transposed weight has the width of the vocabulary too
        inputs = micro_batch()
        with LogitsRows() as seen:
            loss_and_gradients(trainer, inputs | {"completion_mask": torch.ones_like(inputs["completion_mask"])})
        assert 0 < seen.rows <= rows


# -------------------------------------------------------------------------------------------- objectives and advantages


@pytest.mark.parametrize(
    ("loss_type", "objective"),
    [
        ("grpo", ("grpo", {"clip_low": 0.02, "clip_high": 0.02})),
        ("dapo", objectives.ppo(0.02, 0.02)),
        ("dr_grpo", ("dr_grpo", {"clip_low": 0.02, "clip_high": 0.02})),
    ],
)
def test_objective_is_normalised_as_by_trl(build: Build, loss_type: str, objective: Any) -> None:
    config = REUSE | {"max_steps": 4}
    run = train(build(fused={"objective": objective}, **config))
    expected = train(build(GRPOTrainer, loss_type=loss_type, epsilon=0.02, **config))
    for log, expected_log in zip(run.logs[:-1], expected.logs[:-1], strict=True):
        clips = {name: log.pop(name) for name in list(log) if name.startswith("fusedpo/")}
        expected_clips = {name: expected_log.pop(name) for name in list(expected_log) if name.startswith("clip_ratio/")}
        assert log == pytest.approx(expected_log, **FLOAT32)
        assert clips["fusedpo/clip_frac"] == pytest.approx(expected_clips["clip_ratio/region_mean"], rel=1e-5)
        assert clips["fusedpo/ratio_max"] >= clips["fusedpo/ratio_mean"] >= clips["fusedpo/ratio_min"]
    assert run.weights.keys() == expected.weights.keys()
    assert_same(Run([], run.weights), Run([], expected.weights))


def test_metrics_of_an_objective_over_processes(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(fused={"objective": "nfpo"})
    here = {"tokens": 3.0, "clip_frac": 0.5, "ratio_min": 0.8, "ratio_max": 1.1, "kl": 0.0, "entropy": 1.0}
    there = torch.tensor([[1.0, 0.1, 0.7, 1.3, 0.0, 2.0], [0.0] * 6])  # the last has no kept token
    monkeypatch.setattr(trainer.accelerator, "gather", lambda values: torch.cat((values, there)))
    metrics = {name: torch.tensor(value) for name, value in here.items()}
    trainer._log_objective(fusedpo.PolicyLossOutput(torch.tensor(0.0), metrics, torch.tensor(0.0), None))
    logged = {name: values for name, (values,) in trainer._metrics["train"].items()}
    assert logged == pytest.approx({"fusedpo/clip_frac": 0.4, "fusedpo/ratio_min": 0.7, "fusedpo/ratio_max": 1.3})


def test_token_sum_is_the_sum_over_micro_batches(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.Accelerator, "num_processes", property(lambda self: 2))  # which average gradients
    inputs = micro_batch()
    mean = objectives.ppo()
    summed = dataclasses.replace(mean, aggregation="token-sum")
    losses = [loss_and_gradients(build(fused={"objective": o}), inputs)[0] for o in (mean, summed)]
    tokens = inputs["num_items_in_batch"] / 2 * 3 / build().args.steps_per_generation
    assert losses[1] == pytest.approx((2 * losses[0] * tokens).item())


def test_kl_of_an_objective_is_that_of_beta(build: Build, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "model")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    config = {"beta": 0.1}
    for weighted in (False, True):
        config["use_bias_correction_kl"] = weighted
        trainer = build(FusedGRPOTrainer, policy, fused={"objective": "nfpo"}, **config)
        assert trainer.objective == objectives.nfpo(kl=objectives.KL("k3", 0.1, weighted=weighted))
    own = objectives.ppo(kl=objectives.KL("k2", 0.1))
    assert build(FusedGRPOTrainer, policy, fused={"objective": own}, **config).objective is own
    with pytest.raises(ValueError, match=r"beta must be objective.kl.coef = 0.1"):
        build(fused={"objective": own})


@pytest.mark.parametrize(
    ("fused", "config", "message"),
    [
        ({"objective": "nfpo"}, {"epsilon": 0.1}, "epsilon"),
        ({"objective": "nfpo"}, {"loss_type": "cispo"}, "loss_type"),
        ({"objective": "unknown"}, {}, "objective must be"),
        ({"objective": "nfpo", "fuse": "logprobs"}, {}, "objective needs fuse='loss'"),
        ({"fuse": "all"}, {}, "fuse must be"),
        ({"advantage_estimator": ("maxpo", {"q": 2})}, {}, "maxpo has no option 'q'"),
    ],
)
def test_options_that_disagree(build: Build, fused: dict[str, Any], config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(fused=fused, **config)


def rewards_of(scores: list[float | None]) -> Callable[..., list[float | None]]:
    return lambda completion_ids, **_: scores[: len(completion_ids)]


SCORES = [0.1, 0.9, 0.3, None, 1.0, 0.0, 0.0, 0.5]
LAST = torch.arange(4, 8)
maxpo_of_3 = functools.partial(fusedpo.advantages.maxpo, k=3, group_size=4)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (("maxpo", {"k": 2}), lambda r, **o: fusedpo.advantages.maxpo(r, k=2, group_size=4, mask=o["mask"])),
        ("rloo", lambda r, **o: fusedpo.advantages.rloo(r, group_size=4, mask=o["mask"])),
        ("opo", lambda r, **o: fusedpo.advantages.opo(r, group_size=4, **o)),
        (("opo", {"scope": "batch"}), lambda r, **o: fusedpo.advantages.opo(r, scope="batch", **o)),
        (("maxpo", {"k": 3}), lambda r, **o: r.new_zeros(8).index_copy(0, LAST, maxpo_of_3(r[4:]))),
        (lambda rewards, group_size: rewards * group_size + 1, lambda r, **o: r * 4 + 1),
    ],
)
def test_advantages_take_the_place_of_trls(build: Build, estimator: Any, expected: Callable[..., torch.Tensor]) -> None:
    config = {"gradient_accumulation_steps": 2, "reward_weights": [1.0, 10.0]}
    rewards = [rewards_of(SCORES), rewards_of([0.0, 0.0, 0.1, None, 0.0, 0.0, 0.2, 0.0])]
    trainer = build(fused={"advantage_estimator": estimator}, reward=rewards, **config)
    output = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in ["w1 w2"] * 4 + ["w3"] * 4])
    lengths, mask = output["completion_mask"].sum(1), torch.tensor([score is not None for score in SCORES])
    weighted = torch.tensor([0.1, 0.9, 1.3, 0.0, 1.0, 0.0, 2.0, 0.5])
    want = expected(weighted, lengths=lengths, mask=mask).masked_fill(~mask, 0)
    torch.testing.assert_close(output["advantages"], want)
    assert list(trainer._logs["advantages"]) == output["advantages"].tolist()


def test_advantages_in_evaluation(build: Build) -> None:
    trainer = build(fused={"advantage_estimator": "rloo"}, reward=rewards_of(SCORES), num_generations_eval=2)
    trainer.model.eval()
    output = trainer._generate_and_score_completions([{"prompt": "w1"}] * 2)  # fewer than in training
    torch.testing.assert_close(output["advantages"], torch.tensor([-0.8, 0.8]))
    assert list(trainer._logs["advantages"]) == output["advantages"].tolist()
    trainer = build(
        fused={"advantage_estimator": ("maxpo", {"k": 2})}, reward=rewards_of(SCORES), num_generations_eval=2
    )
    trainer.model.eval()
    assert trainer._generate_and_score_completions([{"prompt": "w1"}] * 2)["advantages"].tolist() == [0, 0]


@pytest.mark.slow
def test_nfpo_with_maxpo_learns_arithmetic(build: Build) -> None:
    """Sums of digits: half a point for each of the two digits of the sum."""

    def digits(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        scores = []
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            total = f"{sum(int(x) for x in prompt.split()[:3:2]):02}"
            answer = [VOCABULARY[i] for i in ids] + ["", ""]
            scores.append(0.5 * (answer[0] == total[0]) + 0.5 * (answer[1] == total[1]))
        return scores

    fused = {"objective": ("nfpo", {"n": 2}), "advantage_estimator": ("maxpo", {"k": 2})}
    config = {"optim": "adamw_torch", "learning_rate": 2e-2, "max_steps": 60, "max_completion_length": 2}
    config |= {"per_device_train_batch_size": 64, "num_generations": 8, "num_iterations": 2, "logging_steps": 10}
    prompts = [f"{a} + {b} =" for a in range(3) for b in range(3)]
    logs = train(build(FusedGRPOTrainer, None, digits, prompts * 8, fused=fused, **config)).logs
    rewards = [log["reward"] for log in logs if "reward" in log]
    assert rewards[-1] > rewards[0] + 0.3


def test_estimators_are_checked_when_the_trainer_is_built(build: Build) -> None:
    """Not after the first rollouts; groups have four samples."""

    def needs_values(rewards: torch.Tensor, *, values: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        raise AssertionError("never called")

    for estimator, error, message in (
        (("maxpo", {"k": 5}), ValueError, "k must be"),
        (("maxpo", {"power": 2}), ValueError, "maxpo has no option 'power'"),
        ("passk", ValueError, "needs 'k'"),
        (needs_values, ValueError, "needs 'values'"),
        (3, TypeError, "a name or a function"),
    ):
        with pytest.raises(error, match=message):
            build(fused={"advantage_estimator": estimator})
        with pytest.raises(error, match=message):
            rloo(build, FusedRLOOTrainer, advantage_estimator=estimator)


# ---------------------------------------------------------------------------------------------------------------- RLOO


def rloo(build: Build, trainer: Any, advantage_estimator: Any = None, **config: Any) -> Any:
    fused = {} if advantage_estimator is None else {"advantage_estimator": advantage_estimator}
    return build(trainer, config_class=RLOOConfig, fused=fused, **{"beta": 0.0, "epsilon": 0.02} | config)


@pytest.mark.parametrize("config", [{}, {"normalize_advantages": True, "reward_clip_range": (0.2, 0.8)}], ids=str)
def test_rloo_trains_as_trls(build: Build, config: dict[str, Any]) -> None:
    config = config | REUSE | {"max_steps": 4}
    expected = train(rloo(build, RLOOTrainer, **config))
    assert max(log.get("clip_ratio/region_mean", 0) for log in expected.logs) > 0
    assert_same(train(rloo(build, FusedRLOOTrainer, **config)), expected)
    if "normalize_advantages" not in config:  # leave-one-out by its name
        estimated = train(rloo(build, FusedRLOOTrainer, "rloo", **config))
        for log, expected_log in zip(estimated.logs[:4], expected.logs, strict=False):
            assert log["loss"] == pytest.approx(expected_log["loss"], **FLOAT32)


def test_rloo_refuses_by_name(build: Build, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "model")  # TRL loads the reference model by the path of the policy
    for config in ({"beta": 0.1}, {"normalize_advantages": True}):
        policy = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        with pytest.raises(NotImplementedError, match=r"FusedRLOOTrainer does not support (beta=0\.1|normalize_adv)"):
            rloo(build, FusedRLOOTrainer, "maxpo", policy=policy, **config)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fused", "config", "option"),
    [
        ({}, {"use_adaptive_entropy": True}, "use_adaptive_entropy=True"),
        ({}, {"entropy_coef": 0.1}, "entropy_coef=0.1 with loss_type='dapo'"),
        ({}, {"top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2"),
        ({}, {"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold=0.5"),
        ({}, {"delta": 1.1}, "delta=1.1"),
        ({}, {"loss_type": "cispo"}, "epsilon_high=0.2 with loss_type='cispo'"),
        ({}, {"loss_type": "unknown"}, "loss_type='unknown'"),
        ({}, {"torch_compile": True}, "torch_compile=True"),
        ({}, {"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32=True"),
        ({"objective": "nfpo"}, {"entropy_coef": 0.1}, "entropy_coef=0.1 with objective"),
        ({"advantage_estimator": "vineppo"}, {}, "advantage_estimator='vineppo'"),
        ({"advantage_estimator": "rloo"}, {"scale_rewards": "batch"}, "scale_rewards='batch'"),
        (
            {"advantage_estimator": "rloo"},
            {"multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation='normalize_then_sum'",
        ),
    ],
)
def test_unsupported_options_name_themselves(
    build: Build, fused: dict[str, Any], config: dict[str, Any], option: str
) -> None:
    with pytest.raises(NotImplementedError, match=re.escape(f"does not support {option}")):
        build(fused=fused, **config)


def test_split_sequences_are_refused(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build()
    for option in ("cp_size", "sp_size"):
        split = SimpleNamespace(parallelism_config=accelerate.ParallelismConfig(**{option: 2}))
        monkeypatch.setattr(trainer, "accelerator", split)
        with pytest.raises(NotImplementedError, match=f"FusedGRPOTrainer does not support {option}=2"):
            trainer._check_setup(from_hidden=False)
        monkeypatch.setattr(RLOOTrainer, "__init__", lambda self, split=split: setattr(self, "accelerator", split))
        with pytest.raises(NotImplementedError, match=f"FusedRLOOTrainer does not support {option}=2"):
            FusedRLOOTrainer()


def test_unsupported_combinations_name_themselves(build: Build) -> None:
    """What takes a GPU, an inference engine or another model to set up is asked of the checks alone."""
    trainer = build()
    vllm = {"use_vllm": True, "importance_sampling_level": "sequence", "vllm_importance_sampling_mode": "token_mask"}
    for options, name in (
        ({"beta": 0.1, "importance_sampling_level": "sequence"}, "use_bias_correction_kl=True with beta=0.1"),
        (vllm, "vllm_importance_sampling_mode='token_mask' with importance_sampling_level='sequence'"),
    ):
        args = dataclasses.replace(trainer.args, generation_batch_size=None)
        for option, value in options.items():
            setattr(args, option, value)
        with pytest.raises(NotImplementedError, match=re.escape(f"does not support {name}")):
            from_config(args)
    trainer.args.fp16 = True
    with pytest.raises(NotImplementedError, match="fp16=True"):
        trainer._check_setup(from_hidden=False)
    trainer.args.fp16 = False
    trainer._check_setup(from_hidden=True)
    for attribute, name in (
        ("aux_loss_enabled", "router_aux_loss_coef"),
        ("_is_vlm", "images"),
        ("is_fsdp_enabled", "FSDP"),
    ):
        setattr(trainer, attribute, True)
        with pytest.raises(NotImplementedError, match=f"{name}.* with from_hidden=True"):
            trainer._check_setup(from_hidden=True)
        trainer._check_setup(from_hidden=False)
        setattr(trainer, attribute, False)
    with pytest.raises(NotImplementedError, match="logit_scale='inv_sqrt' with from_hidden=True"):
        logit_scale(SimpleNamespace(logit_scale="inv_sqrt", model_type="mpt"))
    with pytest.raises(NotImplementedError, match="support Linear: without the argument logits_to_keep"):
        LogitsHead().check(torch.nn.Linear(1, 1))
