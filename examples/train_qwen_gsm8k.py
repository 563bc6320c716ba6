"""GRPO on GSM8K with Qwen2.5-0.5B-Instruct, on one GPU: a recipe. It has been linted, and not been run by us yet.

    pip install 'trl[vllm]>=1.16,<1.17' datasets
    python examples/train_qwen_gsm8k.py                          # bf16; a GPU of 24 GB should do
    python examples/train_qwen_gsm8k.py --objective dapo --advantage rloo
    python examples/train_qwen_gsm8k.py --from-hidden            # less memory: logits of 512 tokens at a time
    python examples/train_qwen_gsm8k.py --loss trl               # TRL's own trainer, to compare with

It downloads the model and the data from the Hugging Face Hub. Before the first step, `fusedpo.warmup` compiles the
kernels; TRL logs rewards, KL and the time of a step, which is what to compare.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

import fusedpo
from fusedpo.integrations.trl import FusedGRPOTrainer

MODEL, VOCABULARY = "Qwen/Qwen2.5-0.5B-Instruct", 151_936
INSTRUCTION = "Think step by step, then give the final number after ####."


def as_prompt(example: dict[str, str]) -> dict[str, Any]:
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": example["question"]}]
    return {"prompt": messages, "answer": example["answer"].split("####")[1].strip().replace(",", "")}


def correct(completions: list[list[dict[str, str]]], answer: list[str], **unused: Any) -> list[float]:
    """1 for the right number after the last ####, else 0."""
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        found = re.findall(r"####\s*(-?[\d,.]+)", completion[0]["content"])
        given = found[-1].replace(",", "").rstrip(".") if found else None
        rewards.append(float(given == right))
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=("fusedpo", "trl"), default="fusedpo")
    parser.add_argument("--objective", help="a preset of fusedpo.objectives; default: TRL's loss_type")
    parser.add_argument("--advantage", help="an estimator of fusedpo.advantages; default: TRL's")
    parser.add_argument("--from-hidden", action="store_true")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", default="out/qwen_gsm8k")
    args = parser.parse_args()

    config = GRPOConfig(
        output_dir=args.out,
        max_steps=args.steps,
        learning_rate=1e-6,
        warmup_steps=10,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=4,
        num_generations=8,
        max_completion_length=512,
        beta=0.0,
        bf16=True,
        gradient_checkpointing=True,
        use_vllm=True,
        vllm_mode="colocate",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    dataset = load_dataset("openai/gsm8k", "main", split="train").map(as_prompt)
    if args.loss == "trl":
        trainer = GRPOTrainer(MODEL, correct, config, train_dataset=dataset)
    else:
        fusedpo.warmup(VOCABULARY, [torch.bfloat16])
        options = {"objective": args.objective, "advantage_estimator": args.advantage, "from_hidden": args.from_hidden}
        trainer = FusedGRPOTrainer(MODEL, correct, config, train_dataset=dataset, **options)
    trainer.train()


if __name__ == "__main__":
    main()
