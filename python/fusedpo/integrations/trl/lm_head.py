"""TRL's fused head, ``add_fused_lm_head``, which DPO, KTO, RLOO, SFT and GRPO share, computed by fusedpo."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel
from trl import kernels
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from ... import statistics
from ...logprobs import head_options
from ...ops.token_statistics import LinearTokenStatistics
from .heads import add_forward, logit_scale, whole

TRLS = getattr(kernels, "ChunkedLogProbFunction", None)
OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def add_fused_lm_head(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """In the place of TRL's function: the same arguments, and a forward that takes and returns the same.

    Positions without a label cost nothing on any device; a copy of the model has a head of its own; and a second head
    takes the place of the first one.
    """
    run = functools.partial(
        _forward, temperature=temperature, cast_lm_head_to_fp32=cast_lm_head_to_fp32, names=tuple(outputs)
    )
    add_forward(model, "fused_lm_head", run)


def _forward(
    model: Any,
    _: Callable[..., Any],
    fused_lm_head: bool,
    *args: Any,
    temperature: float,
    cast_lm_head_to_fp32: bool,
    names: tuple[str, ...],
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    **inputs: Any,
) -> FusedCausalLMOutput:
    config = model.config.get_text_config()
    inputs["use_cache"] = False
    if getattr(config, "output_router_logits", False):
        inputs.setdefault("output_router_logits", True)
    # before transformers 5, base_model_prefix of vision-language models was not that of the language model
    images = config is not model.config and Version(transformers.__version__) < Version("5.0.0")
    backbone = (model.model if images else model.base_model)(*args, **inputs)
    hidden = backbone.last_hidden_state
    if shift_labels is None:
        assert labels is not None, "fused_lm_head=True needs labels or shift_labels"
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    else:
        labels = shift_labels

    head = model.get_output_embeddings()  # FSDP and PEFT replace it after the model was given this forward
    weight, bias = whole(head.weight), whole(head.bias)
    hidden, labels = hidden.to(weight.device), labels.to(weight.device)  # maybe not that of the last layer
    mask = labels != -100
    autocast: Any = nullcontext()
    if cast_lm_head_to_fp32:
        hidden, autocast = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
    with autocast, maybe_gather_lm_head_ctx(weight, bias):
        softcap = getattr(config, "final_logit_softcapping", None)
        found = _statistics(hidden, weight, bias, labels, mask, temperature, softcap, logit_scale(config))
    per_token = {name: getattr(found, name) for name in OPTIONAL if name in names}
    loss = -found.logprobs.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    aux_loss = None
    if inputs.get("output_router_logits"):
        aux_loss = _balance(model, config, backbone.router_logits, inputs.get("attention_mask"))
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
    return FusedCausalLMOutput(loss=loss, log_probs=found.logprobs, label_mask=mask, aux_loss=aux_loss, **per_token)


def _balance(model: Any, config: Any, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """The loss that balances the load of experts: Mixtral's, which all mixtures of experts of transformers use."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    # the models had the numbers before transformers 5, GPT-OSS until 5.6
    experts, per_token = (
        getattr(config, name, None) or getattr(model, name) for name in ("num_experts", "num_experts_per_tok")
    )
    loss: Any = load_balancing_loss_func(router_logits, experts, per_token, attention_mask)
    return loss


class ChunkedLogProbFunction:
    """In place of the autograd function of that name, for models that had their head from TRL before it was replaced.

    The chunk is this library's: all columns of some rows.
    """

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL,
    ) -> tuple[Tensor | None, ...]:
        found = _statistics(hidden, weight, bias, targets, None, temperature, final_logit_softcapping, logit_scale)
        return found.logprobs, *(getattr(found, name) if name in outputs else None for name in OPTIONAL)


class _Gathered(LinearTokenStatistics):
    """The backward needs the whole head, which ZeRO-3 has split again since the forward."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        with maybe_gather_lm_head_ctx(*ctx.saved_tensors[1:3]):
            return LinearTokenStatistics.backward(ctx, *gradients)


def _statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float,
) -> statistics.TokenStatistics:
    if not torch.is_autocast_enabled(hidden.device.type):
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    options = head_options(hidden, softcap, scale)
    return statistics.TokenStatistics(
        *statistics._linear(hidden, weight, bias, labels, temperature, mask, options, function=_Gathered)
    )
