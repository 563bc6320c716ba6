"""A tiny model, its tokenizer and trainers of TRL."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (extra [peers])")
pytest.importorskip("datasets", reason="datasets is not installed (it comes with trl)")

import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from fusedpo.integrations.trl import FusedGRPOTrainer

VOCABULARY = ["<pad>", "<eos>", *"0123456789+=", *(f"w{i}" for i in range(33))]  # 47 tokens, a prime
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
# Two runs of 20 steps, whose matrix products are not in the same order: rounding of float32, a hundred operations deep.
FLOAT32 = {"rel": 5e-5, "abs": 2e-6}
Build = Callable[..., GRPOTrainer]


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def model(kind: str = "qwen2", seed: int = 0, **config: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **SIZES | {"tie_word_embeddings": False} | config)
    policy = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in policy.parameters():  # distributions far from uniform, biases that are not 0
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return policy


def even_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def builder(tokenizer: PreTrainedTokenizerFast, path: Path) -> Build:
    """Builds trainers that differ from each other in what is given only."""

    def build(
        trainer: type[GRPOTrainer] = FusedGRPOTrainer,
        policy: PreTrainedModel | None = None,
        reward: Any = even_tokens,
        prompts: list[str] | None = None,
        fused: dict[str, Any] | None = None,
        config_class: Any = GRPOConfig,
        **config: Any,
    ) -> GRPOTrainer:
        # prompts of different lengths: padding on the left
        prompts = prompts or [f"w{i} w{i + 1}" + " w3 w7" * (i % 3) for i in range(16)]
        defaults: dict[str, Any] = {
            "max_steps": 20,
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 0.5,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "temperature": 0.9,
            "logging_steps": 1,
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }
        args = config_class(str(path), **defaults | config)
        return trainer(
            policy or model(),
            reward,
            args,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            **fused or {},
        )

    return build


class Run(NamedTuple):
    logs: list[dict[str, float]]
    weights: dict[str, torch.Tensor]


TIMINGS = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def train(trainer: GRPOTrainer) -> Run:
    trainer.remove_callback(transformers.PrinterCallback)
    torch.manual_seed(1)
    trainer.train()
    logs = [
        {name: torch.nan if value is None else value for name, value in log.items() if name not in TIMINGS}
        for log in trainer.state.log_history
    ]
    return Run(logs, trainer.model.state_dict())


def assert_same(run: Run, expected: Run) -> None:
    """Metrics, among them losses and gradient norms, and the weights that come out."""
    for log, expected_log in zip(run.logs, expected.logs, strict=True):
        assert list(log) == list(expected_log)
        assert log == pytest.approx(expected_log, nan_ok=True, **FLOAT32)
    for name, weight in run.weights.items():
        torch.testing.assert_close(weight, expected.weights[name], rtol=FLOAT32["rel"], atol=FLOAT32["abs"])


# Two passes over a batch of two accumulated micro-batches: ratios move away from 1, and the clip acts.
REUSE = {"num_iterations": 2, "gradient_accumulation_steps": 2}
HIDDEN = {"from_hidden": True, "chunk_tokens": 5}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The fastest for so small a model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
