"""The loss of TRL's GRPOTrainer as an oracle, and the cases in which it differs from ours.

Called is the trainer's own ``_compute_loss``, for a stand-in that has the settings of a trainer and, instead of a
model, the log-probs and entropies. In float64 the reference runs, in float32 the kernels.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.policy_loss import random_batch
from torch import Tensor

import fusedpo
from fusedpo import objectives as O

grpo_trainer = pytest.importorskip(
    "trl.trainer.grpo_trainer",
    reason="trl, or something it imports, is not installed (extra [peers])",
    exc_type=ImportError,
)

ROWS, LENGTH = 12, 40
LOW, HIGH = 0.1, 0.15
STEPS = 3  # of gradient accumulation
CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def random(dtype: torch.dtype) -> dict:
    """A batch whose last sequence is masked as a whole; advantages and weights per sequence."""
    batch = random_batch(ROWS, LENGTH)
    batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
    batch["advantages"] = batch["advantages"][:, :1]
    for name in ("logprobs", "entropy"):
        batch[name].requires_grad_()
    return batch


def trl_loss(batch: dict, loss_type: str, level: str = "token", **settings: Any) -> tuple[Tensor, dict]:
    """The loss and the metrics of one of STEPS micro-batches; 1000 tokens in the batch of the two processes."""
    arguments = {
        "delta": None,
        "use_bias_correction_kl": False,
        "sapo_temperature_pos": 1.5,
        "sapo_temperature_neg": 2.0,
        "vespo_k_pos": 1.5,
        "vespo_lambda_pos": 2.5,
        "vespo_k_neg": 3.5,
        "vespo_lambda_neg": 2.0,
        "steps_per_generation": 2 * STEPS,
    }
    trainer = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "epsilon_low": LOW,
        "epsilon_high": HIGH,
        "beta": 0.0,
        "max_completion_length": 64,
        "use_vllm": "is_weights" in batch,
        "vllm_importance_sampling_correction": True,
        "entropy_coef": 0.0,
    }
    arguments |= {name: settings.pop(name) for name in list(settings) if name in arguments}
    trainer |= settings
    metrics = defaultdict(list)
    accelerator = SimpleNamespace(
        num_processes=2, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    stand_in = SimpleNamespace(
        **trainer,
        args=SimpleNamespace(**arguments),
        model=torch.nn.Identity(),
        accelerator=accelerator,
        current_gradient_accumulation_steps=STEPS,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=trainer["entropy_coef"] != 0,
        _metrics={"train": metrics},
        get_gamma_weights=grpo_trainer.GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch["logprobs"], batch["entropy"], None),
    )
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": torch.ones_like(ids),
        "tool_mask": batch["mask"].long(),
        "advantages": batch["advantages"].squeeze(1),
        "old_per_token_logps": batch["old_logprobs"],
        "ref_per_token_logps": batch["ref_logprobs"],
        "num_items_in_batch": torch.tensor(1000),
    }
    if "is_weights" in batch:
        inputs["importance_sampling_ratio"] = batch["is_weights"]
    loss = grpo_trainer.GRPOTrainer._compute_loss(stand_in, None, inputs)
    return loss, {name: values[0] for name, values in metrics.items()}


# What each loss type divides by. "grpo", "luspo", "dr_grpo" average over all sequences, ours over those with a token
# that is kept, unless it is told their number. The token losses of the last three are divided by the tokens of the
# whole generation batch, of which an optimiser step takes one half here, and a process one half of that.
ALL_SEQUENCES = {"denominator": float(ROWS), "loss_scale": 1 / STEPS}
ALL_TOKENS = {"denominator": 1000 / 2 / 2}
AGGREGATIONS: dict[str, tuple[O.Aggregation, dict]] = {
    "grpo": ("seq-mean-token-mean", ALL_SEQUENCES),
    "sapo": ("seq-mean-token-mean", ALL_SEQUENCES),
    "luspo": ("seq-mean-token-sum", ALL_SEQUENCES),
    "dr_grpo": ("seq-mean-token-sum-norm", ALL_SEQUENCES),
    "bnpo": ("token-mean", {"loss_scale": 1 / STEPS}),
    "dapo": ("token-mean", ALL_TOKENS),
    "cispo": ("token-mean", ALL_TOKENS),
    "vespo": ("token-mean", ALL_TOKENS),
}
CLIPPED = ("grpo", "luspo", "dr_grpo", "bnpo", "dapo")


def ours(batch: dict, loss_type: str, ratio: O.Ratio, region: O.TrustRegion, **parts: Any) -> fusedpo.PolicyLossOutput:
    aggregation, options = AGGREGATIONS[loss_type]
    length_norm = 64 if loss_type == "dr_grpo" else None
    objective = O.Objective(ratio, region, aggregation=aggregation, length_norm=length_norm, **parts)
    return fusedpo.policy_loss(**batch, objective=objective, **options)


def assert_same(loss: Tensor, expected: Tensor, batch: dict, leaf: str = "logprobs") -> None:
    close = CLOSE[batch[leaf].dtype]
    torch.testing.assert_close(loss, expected, **close)
    gradient, expected_gradient = (torch.autograd.grad(x, batch[leaf], retain_graph=True)[0] for x in (loss, expected))
    assert gradient.any()
    torch.testing.assert_close(gradient, expected_gradient, **close)


def without_weights(batch: dict) -> dict:
    return {name: x for name, x in batch.items() if name != "is_weights"}


# --------------------------------------------------------------------------------------------------------------- losses


@both_dtypes
@pytest.mark.parametrize("weights", [None, "token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", CLIPPED)
def test_clipped_token_ratios(loss_type, beta, weights, dtype):
    batch = random(dtype)
    if weights is None:
        del batch["is_weights"]
    elif weights == "sequence":
        batch["is_weights"] = batch["is_weights"][:, :1]
    expected, metrics = trl_loss(batch, loss_type, beta=beta)
    kl = O.KL("k3", beta) if beta else None
    out = ours(batch, loss_type, O.TokenRatio(), O.PPOClip(LOW, HIGH), kl=kl)
    assert_same(out.loss, expected, batch)
    names = {"clip_frac": "region_mean", "clip_frac_low": "low_mean", "clip_frac_high": "high_mean"}
    compared = {name: f"clip_ratio/{theirs}" for name, theirs in names.items()} | {"entropy": "entropy"}
    if beta:
        compared["kl"] = "kl"
    for name, theirs in compared.items():
        assert 0 < float(out.metrics[name]) == pytest.approx(metrics[theirs], rel=1e-5)


@both_dtypes
@pytest.mark.parametrize("loss_type", CLIPPED)
def test_clipped_sequence_ratios(loss_type, dtype):
    """GSPO, and LUSPO as it is meant."""
    batch = random(dtype)
    batch["is_weights"] = batch["is_weights"][:, :1]
    expected, _ = trl_loss(batch, loss_type, "sequence", epsilon_low=0.01, epsilon_high=0.02, beta=0.3)
    out = ours(batch, loss_type, O.SequenceRatio(), O.PPOClip(0.01, 0.02), kl=O.KL("k3", 0.3))
    assert_same(out.loss, expected, batch)
    assert out.metrics["clip_frac_low"] > 0
    assert out.metrics["clip_frac_high"] > 0


@both_dtypes
@pytest.mark.parametrize("delta", [0.2, 0.95, 1.1, 1.16, 4.0])
@pytest.mark.parametrize("loss_type", CLIPPED)
def test_two_sided_clip(loss_type, delta, dtype):
    """Below both bounds of the clip, between them and 1, and above."""
    batch = random(dtype)
    expected, _ = trl_loss(batch, loss_type, delta=delta)
    region = O.two_sided_grpo(LOW, HIGH, delta=delta).trust_region
    assert_same(ours(batch, loss_type, O.TokenRatio(), region).loss, expected, batch)


@both_dtypes
@pytest.mark.parametrize("epsilon_high", [0.2, 1.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_cispo(weighted, epsilon_high, dtype):
    """TRL's ``epsilon_high`` bounds the ratio itself; there is no lower bound."""
    batch = random(dtype)
    if not weighted:
        del batch["is_weights"]
    expected, _ = trl_loss(batch, "cispo", epsilon_high=epsilon_high)
    out = ours(batch, "cispo", O.TokenRatio(), O.cispo(clip_high=epsilon_high - 1).trust_region)
    assert_same(out.loss, expected, batch)
    assert out.metrics["clip_frac"] > 0


@both_dtypes
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sapo(level, dtype):
    batch = random(dtype)
    batch["is_weights"] = batch["is_weights"][:, :1]
    ratio = {"token": O.TokenRatio(), "sequence": O.SequenceRatio()}[level]
    assert_same(ours(batch, "sapo", ratio, O.SAPO(1.5, 2.0)).loss, trl_loss(batch, "sapo", level)[0], batch)


@both_dtypes
@pytest.mark.parametrize("corrected", [False, True])
def test_vespo(corrected, dtype):
    """The ratio of trainer and inference engine is a factor of the sequence's ratio: log-probs of the engine."""
    batch = without_weights(random(dtype))
    batch["old_logprobs"] = batch["logprobs"].detach() + 0.2 * (batch["old_logprobs"] - batch["logprobs"].detach())
    given = batch
    if corrected:
        rollout = batch["old_logprobs"] + 0.05 * torch.randn_like(batch["old_logprobs"])
        # 1 at masked tokens, over which TRL sums too
        log_ratio = (batch["old_logprobs"] - rollout).where(batch["mask"], 0)
        batch, given = batch | {"old_logprobs": rollout}, batch | {"is_weights": log_ratio.exp()}
    expected, _ = trl_loss(given, "vespo")
    out = ours(batch, "vespo", O.Trace("all", "all"), O.VESPO(1.5, 2.5, 3.5, 2.0))
    assert_same(out.loss, expected, batch)


@both_dtypes
def test_entropy(dtype):
    """TRL takes the mean over tokens whatever the loss type, ours aggregates it as the loss."""
    batch = random(dtype)
    expected, _ = trl_loss(batch, "bnpo", entropy_coef=0.05)
    out = ours(batch, "bnpo", O.TokenRatio(), O.PPOClip(LOW, HIGH), entropy_coef=0.05)
    assert_same(out.loss, expected, batch)
    assert_same(out.loss, expected, batch, "entropy")


@both_dtypes
def test_kl_weighted_by_the_ratio(dtype):
    """TRL's ``use_bias_correction_kl``."""
    batch = random(dtype)
    expected, _ = trl_loss(batch, "grpo", beta=0.3, use_bias_correction_kl=True)
    out = ours(batch, "grpo", O.TokenRatio(), O.PPOClip(LOW, HIGH), kl=O.KL("k3", 0.3, weighted=True))
    assert_same(out.loss, expected, batch)


# ---------------------------------------------------------------------------------------------------- known differences


@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_trl_does_not_clamp_log_ratios(loss_type):
    """Ours stops at e^20."""
    batch = without_weights(random(torch.float64))
    batch["old_logprobs"] = batch["logprobs"].detach().clone()
    batch["old_logprobs"][0, 0] -= 30
    batch["mask"][0, 0] = True
    batch["advantages"] = torch.zeros(ROWS, 1, dtype=torch.float64)
    batch["advantages"][0] = -1.0
    region = O.PPOClip(LOW, HIGH) if loss_type == "grpo" else O.CISPO(10.0, torch.inf)
    out = ours(batch, loss_type, O.TokenRatio(), region)
    expected, _ = trl_loss(batch, loss_type, epsilon_high=HIGH if loss_type == "grpo" else torch.inf)
    torch.testing.assert_close((expected / out.loss).log(), torch.tensor(10.0).double(), rtol=1e-6, atol=1e-6)


def test_sequence_ratios_of_advantages_per_token():
    """In ours a token's gradient has its own advantage, as in GSPO-token; in TRL, that of all of the sequence."""
    batch = without_weights(random(torch.float64))
    batch["advantages"] = torch.randn(ROWS, LENGTH, dtype=torch.float64)
    expected, _ = trl_loss(batch, "grpo", "sequence", epsilon_low=1.0, epsilon_high=10.0)
    loss = ours(batch, "grpo", O.SequenceRatio(), O.PPOClip(1.0, 10.0)).loss
    torch.testing.assert_close(loss, expected)
    gradient, expected = (torch.autograd.grad(x, batch["logprobs"])[0][0, batch["mask"][0]] for x in (loss, expected))
    torch.testing.assert_close(expected, gradient.mean().expand_as(expected))
    weights = batch["advantages"][0, batch["mask"][0]]
    torch.testing.assert_close(gradient / gradient.mean(), weights / weights.mean())
