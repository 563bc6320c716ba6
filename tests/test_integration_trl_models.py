"""``FusedGRPOTrainer`` beside ``GRPOTrainer`` with what users train with: adapters, bf16, checkpoints, tied weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (extra [peers])")
pytest.importorskip("datasets", reason="datasets is not installed (it comes with trl)")

from support.trl_training import (  # noqa: F401
    HIDDEN,
    REUSE,
    Build,
    Run,
    assert_same,
    builder,
    make_tokenizer,
    model,
    one_thread,
    train,
)
from trl import GRPOTrainer

from fusedpo.integrations.trl import FusedGRPOTrainer, patch_trl

BOTH_HEADS = pytest.mark.parametrize("fused", [{}, HIDDEN], ids=["logits", "hidden"])
STEPS = {"max_steps": 4, "epsilon": 0.02} | REUSE


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return builder(make_tokenizer(), tmp_path)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "activation checkpoints"])
@BOTH_HEADS
def test_tied_embeddings(build: Build, fused: dict[str, Any], checkpointing: bool) -> None:
    config = {**STEPS, "gradient_checkpointing": checkpointing}
    expected = train(build(GRPOTrainer, model(tie_word_embeddings=True), **config))
    policy = model(tie_word_embeddings=True)
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    assert_same(train(build(FusedGRPOTrainer, policy, fused=fused, **config)), expected)
    assert policy.model.is_gradient_checkpointing == checkpointing


@BOTH_HEADS
def test_adapters(build: Build, fused: dict[str, Any]) -> None:
    """LoRA on all linear layers; the reference of the KL is the model without its adapter."""
    peft = pytest.importorskip("peft", reason="peft is not installed (extra [peers])")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    runs = []
    for trainer, options in ((GRPOTrainer, {}), (FusedGRPOTrainer, fused)):
        torch.manual_seed(3)
        given = {"peft_config": copy.deepcopy(adapter), **options}
        runs.append(train(build(trainer, model(), fused=given, beta=0.1, **STEPS)))
    assert_same(runs[1], runs[0])
    assert any("lora_B" in name and weight.abs().max() > 0 for name, weight in runs[1].weights.items())


@BOTH_HEADS
def test_bf16(build: Build, fused: dict[str, Any]) -> None:
    """Autocast: the first losses agree to the rounding of bfloat16 logits, and training goes on."""
    expected = train(build(GRPOTrainer, bf16=True, **STEPS))
    found = train(build(bf16=True, fused=fused, **STEPS))
    first, expected_first = found.logs[0], expected.logs[0]
    assert first["loss"] == pytest.approx(expected_first["loss"], abs=2e-2)
    assert first["entropy"] == pytest.approx(expected_first["entropy"], rel=1e-2)
    assert first["grad_norm"] == pytest.approx(expected_first["grad_norm"], rel=3e-2)
    assert all(weight.isfinite().all() for weight in found.weights.values())


def test_resuming(build: Build, tmp_path: Path) -> None:
    """Three steps, a checkpoint, three more steps: the weights of six steps, patched model and all."""
    config = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 6}

    def run(resume: str | None) -> Run:
        trainer = build(fused=HIDDEN, **config)
        torch.manual_seed(1)
        trainer.train(resume_from_checkpoint=resume)
        return Run(trainer.state.log_history, trainer.model.state_dict())

    whole, resumed = run(None), run(str(tmp_path / "checkpoint-3"))
    assert len(resumed.logs) == len(whole.logs)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name], weight)


def test_copies_of_a_patched_and_of_a_fused_model(build: Build) -> None:
    """deepcopy and accelerate's unwrap_model, of which the second may take wrappers of the forward away."""
    ids = torch.arange(12).view(2, 6)
    with patch_trl():
        patched = build(GRPOTrainer, max_steps=1)
    for trainer in (patched, build(max_steps=1), build(fused=HIDDEN, max_steps=1)):
        policy = trainer.model
        snapshot = copy.deepcopy(policy)
        before = policy(input_ids=ids).logits
        expected = policy(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.3)
        assert torch.equal(snapshot(input_ids=ids).logits, before)
        assert torch.equal(snapshot(input_ids=ids, labels=ids, fused_lm_head=True).log_probs, expected)
        for keep in (True, False):
            prepared = trainer.accelerator.prepare_model(snapshot, evaluation_mode=True)
            unwrapped = trainer.accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep)
            assert torch.equal(unwrapped(input_ids=ids, labels=ids, fused_lm_head=True).log_probs, expected)
