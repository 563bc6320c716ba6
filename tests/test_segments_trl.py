"""TRL's fused head with this library's function in it: by itself, and in real trainers beside TRL's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (extra [peers])")
pytest.importorskip("datasets", reason="datasets is not installed (it comes with trl)")

from datasets import Dataset
from support.trl_training import make_tokenizer, model, one_thread  # noqa: F401
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.kernels import ChunkedLogProbFunction as Trls

import fusedpo
from fusedpo.integrations.trl import patch_trl
from fusedpo.integrations.trl.lm_head import OPTIONAL, ChunkedLogProbFunction

N, H, V = 11, 8, 53


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("outputs", [(), ("entropy",), OPTIONAL, ("is_top1", "mean_logits")])
def test_the_function(outputs, softcap):
    hidden, weight, bias = torch.randn(N, H), torch.randn(V, H) / H**0.5, torch.randn(V)
    targets = torch.randint(0, V, (N,))
    targets[:4] = (hidden[:4] @ weight.t() + bias).argmax(-1)
    results = []
    for function in (ChunkedLogProbFunction, Trls):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        found = function.apply(*leaves, targets, 0.7, 16, softcap, 1.3, outputs)
        assert [x is not None for x in found] == [True, *(name in outputs for name in OPTIONAL)]
        upstream = [torch.linspace(-1, 1, N), torch.linspace(1, 2, N)]
        differentiable = [x for x in found[:2] if x is not None]
        gradients = torch.autograd.grad(differentiable, leaves, upstream[: len(differentiable)])
        results.append((*(x for x in found if x is not None), *gradients))
        if "is_top1" in outputs and softcap is None:
            assert found[4][:4].all()
        assert not any(x.requires_grad for x in found[2:] if x is not None)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_no_row_is_scored():
    hidden, weight = torch.zeros(0, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    found = ChunkedLogProbFunction.apply(hidden, weight, None, torch.zeros(0, dtype=torch.long), 1.0, 16)
    found[0].sum().backward()
    assert [x.shape for x in found] == [(0,)] * 5
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_statistics(dtype):
    logits, ids = (4 * torch.randn(3, 5, V)).to(dtype), torch.randint(0, V, (3, 5))
    ids[0] = logits[0].argmax(-1)
    mask, temperature = torch.rand(3, 5) > 0.3, torch.rand(3, 5) + 0.5
    found = fusedpo.token_statistics(logits, ids, temperature=temperature, mask=mask)
    z = logits.double() / temperature.double()[..., None]
    expected = (
        z.softmax(-1).square().sum(-1).log(),
        z.mean(-1),
        (logits.gather(-1, ids[..., None]) >= logits).all(-1),
    )
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want.double() * mask, rtol=1e-5, atol=2e-6)


def test_statistics_feed_the_optimal_token_baseline():
    logits, ids, rewards = torch.randn(4, 5, V), torch.randint(0, V, (4, 5)), torch.rand(4, 5)
    squares = fusedpo.token_statistics(logits, ids).log_sum_sq_probs.exp()
    torch.testing.assert_close(squares, logits.softmax(-1).square().sum(-1))
    options = {"old_logprobs": fusedpo.token_logprobs(logits, ids), "sum_pi_squared": squares, "group_size": 4}
    assert fusedpo.advantages.optimal_token_baseline(rewards, **options).shape == rewards.shape


PREFERENCES = {
    "prompt": [f"w{i} w{i + 1}" + " w3 w7" * (i % 3) for i in range(12)],
    "chosen": [f" w{i} w9 w{i % 5}" + " w2" * (i % 2) for i in range(12)],
    "rejected": [f" w{(3 * i) % 30} w{i % 4}" + " w5 w6" * (i % 2) for i in range(12)],
}
LABELLED = {
    "prompt": PREFERENCES["prompt"],
    "completion": PREFERENCES["chosen"],
    "label": [i % 3 != 0 for i in range(12)],
}


def train(kind: str, path: Path, patched: bool, **options: Any) -> tuple[list[dict[str, float]], torch.Tensor]:
    """The logged metrics of 20 steps, and the weights after them."""
    trainers = {
        "dpo": (DPOTrainer, DPOConfig, PREFERENCES),
        "kto": (KTOTrainer, KTOConfig, LABELLED),
        "sft": (SFTTrainer, SFTConfig, {name: LABELLED[name] for name in ("prompt", "completion")}),
    }
    trainer_class, config_class, data = trainers[kind]
    arguments = config_class(
        output_dir=str(path),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    policy = model(seed=0)
    given: dict[str, Any] = {} if kind == "sft" else {"ref_model": model(seed=1)}

    def run() -> tuple[list[dict[str, float]], torch.Tensor]:
        trainer = trainer_class(
            model=policy,
            args=arguments,
            train_dataset=Dataset.from_dict(data),
            processing_class=make_tokenizer(),
            **given,
        )
        trainer.train()
        logs = [{k: v for k, v in log.items() if "/" in k or k in NAMES} for log in trainer.state.log_history]
        return logs, torch.cat([p.detach().flatten() for p in policy.parameters()])

    if not patched:
        return run()
    with patch_trl():
        return run()


NAMES = ("loss", "grad_norm", "entropy", "mean_token_accuracy")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dpo", {"beta": 0.5}),
        ("dpo", {"loss_type": ["ipo", "sigmoid"], "loss_weights": [1.0, 0.5], "use_weighting": True}),
        ("kto", {"beta": 0.5}),
        ("sft", {}),
    ],
    ids=["dpo", "dpo: ipo, sigmoid, WPO", "kto", "sft"],
)
def test_a_patched_trainer_trains_as_trls(kind, options, tmp_path, monkeypatch):
    calls = []
    function = ChunkedLogProbFunction.apply

    def counted(*args):
        calls.append(1)
        return function(*args)

    monkeypatch.setattr(ChunkedLogProbFunction, "apply", staticmethod(counted))
    own, own_weights = train(kind, tmp_path, False, **options)
    assert not calls
    ours, our_weights = train(kind, tmp_path, True, **options)
    assert len(calls) >= 20
    assert len(own) == len(ours) >= 20
    for a, b in zip(own, ours, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), name
    torch.testing.assert_close(our_weights, own_weights, rtol=1e-3, atol=1e-4)
