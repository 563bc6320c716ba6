"""TRL's fused head with this library's function in it: by itself, and in real trainers beside TRL's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (extra [peers])")
pytest.importorskip("datasets", reason="datasets is not installed (it comes with trl)")

import accelerate
from datasets import Dataset
from support.trl_training import SIZES, even_tokens, make_tokenizer, model, one_thread  # noqa: F401
from transformers import AutoModelForCausalLM
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.kernels import ChunkedLogProbFunction as Trls
from trl.trainer.utils import add_fused_lm_head as trls_head

from fusedpo.integrations.trl import lm_head, patch_trl
from fusedpo.integrations.trl.lm_head import OPTIONAL, ChunkedLogProbFunction
from fusedpo.integrations.trl.lm_head import add_fused_lm_head as fused_head

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


def tiny(**config: Any) -> Any:
    return model(**config)


LABELS = torch.tensor([[-100, -100, 5, 7, 1, 0], [-100, 3, 4, -100, 9, 2]])


@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        ("qwen2", {}, {"outputs": ("log_probs", *OPTIONAL), "temperature": 0.7}),
        ("qwen2", {"tie_word_embeddings": True}, {"cast_lm_head_to_fp32": True}),
        ("cohere", {"logit_scale": 0.3}, {"outputs": ("entropy",)}),
        ("gemma2", {"final_logit_softcapping": 3.0}, {"outputs": ("is_top1",)}),
        (
            "qwen2_moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "output_router_logits": True}
            | {"shared_expert_intermediate_size": 8},
            {},
        ),
    ],
    ids=["all outputs", "tied, in float32", "scaled", "capped", "experts"],
)
@pytest.mark.parametrize("labels", [{"labels": LABELS}, {"shift_labels": LABELS, "num_items_in_batch": 5}], ids=list)
def test_the_whole_head(kind, config, options, labels):
    """Every field of the output, and the gradients of all parameters, beside TRL's."""
    results = []
    for add in (fused_head, trls_head):
        policy = tiny(kind=kind, **config).train()
        policy.config._attn_implementation = "eager"
        add(policy, **options)
        out = policy(input_ids=torch.arange(12).view(2, 6), fused_lm_head=True, **labels)
        weights = torch.linspace(-1, 1, out.log_probs.numel()).view(out.log_probs.shape)
        total = (
            out.loss + (out.log_probs * weights).sum() + (0 if out.entropy is None else (out.entropy * weights).sum())
        )
        total.backward()
        results.append((dict(out), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}))
        assert policy(input_ids=torch.arange(12).view(2, 6)).logits.shape[-1] == SIZES["vocab_size"]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_no_label_at_all_and_the_last_head_counts():
    policy = tiny()
    trls_head(policy)
    fused_head(policy, temperature=3.0)
    fused_head(policy, temperature=0.5, outputs=("entropy",))
    ids = torch.arange(12).view(2, 6)
    out = policy(input_ids=ids, labels=ids, fused_lm_head=True)
    logits = policy(input_ids=ids).logits[:, :-1] / 0.5
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-4, atol=1e-5)
    assert out.entropy is not None
    out = policy(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    out.loss.backward()
    assert out.loss == 0
    assert all((p.grad == 0).all() for p in policy.parameters())


def test_a_copy_has_a_head_of_its_own():
    """A snapshot, an average of weights, and what accelerate's unwrap_model returns."""
    policy, ids = tiny(), torch.arange(12).view(2, 6)
    fused_head(policy, temperature=0.7)
    before = policy(input_ids=ids).logits
    snapshot = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    assert torch.equal(snapshot(input_ids=ids).logits, before)
    expected = (before[:, :-1] / 0.7).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    found = snapshot(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    reset = accelerate.state.AcceleratorState._reset_state
    reset(reset_partial_state=True)  # a trainer in another test has one, of another precision
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare_model(snapshot)
    for keep in (True, False):
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep)
        found = unwrapped(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        torch.testing.assert_close(found, expected, **({"rtol": 1e-4, "atol": 1e-5} if not keep else BFLOAT16))
    assert torch.equal(unwrapped.generate(ids, max_new_tokens=2, do_sample=False)[:, :6], ids)
    reset(reset_partial_state=True)


BFLOAT16 = {"rtol": 0.1, "atol": 0.1}


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


def train(
    kind: str, path: Path, patched: bool, steps: int, **options: Any
) -> tuple[list[dict[str, float]], torch.Tensor]:
    """The logged metrics of the steps, and the weights after them."""
    trainers = {
        "dpo": (DPOTrainer, DPOConfig, PREFERENCES),
        "kto": (KTOTrainer, KTOConfig, LABELLED),
        "grpo": (GRPOTrainer, GRPOConfig, {"prompt": PREFERENCES["prompt"]}),
        "rloo": (RLOOTrainer, RLOOConfig, {"prompt": PREFERENCES["prompt"]}),
        "sft": (SFTTrainer, SFTConfig, {name: LABELLED[name] for name in ("prompt", "completion")}),
    }
    trainer_class, config_class, data = trainers[kind]
    arguments = config_class(
        output_dir=str(path),
        max_steps=steps,
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
    given: dict[str, Any] = {"ref_model": model(seed=1)}
    if kind == "sft":
        given = {}
    elif kind in ("grpo", "rloo"):
        given = {"reward_funcs": even_tokens}
        policy.save_pretrained(path / "model")  # they load the reference by the path of the policy
        policy = AutoModelForCausalLM.from_pretrained(path / "model")

    def run() -> tuple[list[dict[str, float]], torch.Tensor]:
        trainer = trainer_class(
            model=policy,
            args=arguments,
            train_dataset=Dataset.from_dict(data),
            processing_class=make_tokenizer(),
            **given,
        )
        torch.manual_seed(1)
        trainer.train()
        logs = [{k: v for k, v in log.items() if "/" in k or k in NAMES} for log in trainer.state.log_history]
        return logs, torch.cat([p.detach().flatten() for p in policy.parameters()])

    if not patched:
        return run()
    with patch_trl():
        return run()


SAMPLING = {"num_generations": 4, "max_completion_length": 6, "num_iterations": 2, "temperature": 0.9}
NAMES = ("loss", "grad_norm", "entropy", "mean_token_accuracy")


@pytest.mark.parametrize(
    # a batch of samples serves two steps, and four have all that twenty have: one of each sort of trainer takes them
    ("kind", "steps", "options"),
    [
        ("dpo", 20, {"beta": 0.5}),
        ("dpo", 4, {"loss_type": ["ipo", "sigmoid"], "loss_weights": [1.0, 0.5], "use_weighting": True}),
        ("kto", 4, {"beta": 0.5}),
        ("sft", 4, {}),
        ("grpo", 20, {"beta": 0.1, "loss_type": "dapo", "epsilon": 0.02} | SAMPLING),
        ("grpo", 4, {"loss_type": "bnpo", "entropy_coef": 0.02, "top_entropy_quantile": 0.5} | SAMPLING),
        ("grpo", 4, {"loss_type": "vespo"} | SAMPLING),
        ("rloo", 4, {"beta": 0.1, "epsilon": 0.02} | SAMPLING),
    ],
    ids=["dpo", "dpo: ipo, sigmoid, WPO", "kto", "sft", "grpo: dapo, KL", "grpo: entropies", "grpo: vespo", "rloo"],
)
def test_a_patched_trainer_trains_as_trls(kind, steps, options, tmp_path, monkeypatch):
    calls = []
    function = lm_head._statistics

    def counted(*args):
        calls.append(1)
        return function(*args)

    monkeypatch.setattr(lm_head, "_statistics", counted)
    own, own_weights = train(kind, tmp_path, False, steps, **options)
    assert not calls
    ours, our_weights = train(kind, tmp_path, True, steps, **options)
    assert len(calls) >= steps
    assert len(own) == len(ours) >= steps
    for a, b in zip(own, ours, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), name
    torch.testing.assert_close(our_weights, own_weights, rtol=1e-3, atol=1e-4)
