"""Runs a fused function inside of the forward of a model, where its logits or its last hidden state are at hand.

Inside, because wrappers convert what leaves the forward (mixed precision copies half-precision logits to float32), and
because DDP and FSDP must see that the parameters of the head were used.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from transformers import PretrainedConfig, PreTrainedModel

from ... import linear_token_logprobs, policy_loss_from_hidden, policy_loss_from_logits, token_logprobs
from .objective import refuse

# Where a model keeps what its forward does for which keyword, and the forward that stood in the place of its class's.
_FORWARDS, _INNER_FORWARD = "_forwards_of_fusedpo", "_forward_without_fusedpo"


def add_forward(model: PreTrainedModel, keyword: str, run: Callable[..., Any]) -> None:
    """``model(**inputs, keyword=x)``, ``x`` not None nor False, returns ``run(model, forward, x, **inputs)``.

    ``forward`` is the model's own. A second ``run`` for a keyword takes the place of the first one. A copy of the
    model, such as an average of its weights or a snapshot, has that of the copy: nothing here holds the model, its
    forward is looked up when it is called.
    """
    setattr(model, _FORWARDS, {**getattr(model, _FORWARDS, {}), keyword: run})
    if getattr(model.forward, "is_of_fusedpo", False):
        return
    if "forward" in vars(model):
        setattr(model, _INNER_FORWARD, model.forward)

    @functools.wraps(type(model).forward)
    def dispatch(self: PreTrainedModel, *args: Any, **inputs: Any) -> Any:
        forward = vars(self).get(_INNER_FORWARD) or types.MethodType(type(self).forward, self)
        for keyword, run in getattr(self, _FORWARDS).items():
            value = inputs.pop(keyword, None)
            if value is not None and value is not False:
                return run(self, forward, value, *args, **inputs)
        return forward(*args, **inputs)

    dispatch.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]  # `generate` reads it
    del dispatch.__wrapped__  # accelerate's unwrap_model would follow it and lose this function
    dispatch.is_of_fusedpo = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(dispatch, model)


def add_fused_forward(model: PreTrainedModel) -> None:
    """``model(**inputs, fused=f)`` returns ``f(model, forward, **inputs)``, ``forward`` being the model's own."""
    add_forward(model, "fused", _call)


def _call(model: PreTrainedModel, forward: Callable[..., Any], fused: Callable[..., Any], **inputs: Any) -> Any:
    return fused(model, forward, **inputs)


def whole(parameter: Any) -> Any:
    """A shard gathered; its gradient is the mean over the ranks, as that of modules that FSDP2 calls itself."""
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    gathered = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if gathered.requires_grad:
        gathered.register_hook(lambda gradient: gradient / mesh.size())
    return gathered


# Both heads return the result of the loss, or log-probs and entropy, of the last `width` positions, and the auxiliary
# loss of a mixture of experts, if any. `options` are the keyword arguments of the fused function.


@dataclass(frozen=True)
class LogitsHead:
    """From logits of the model's own making; their gradient takes their memory."""

    def check(self, model: PreTrainedModel) -> None:
        if "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
            reason = "without the argument logits_to_keep it makes logits of the prompt too; from_hidden=True does not"
            raise refuse(type(model).__name__, reason)

    def __call__(
        self,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        *,
        loss: bool,
        width: int,
        options: dict[str, Any],
        **inputs: Any,
    ) -> tuple[Any, Tensor | None]:
        outputs = forward(**inputs, logits_to_keep=width, use_cache=False)
        if loss:
            result: Any = policy_loss_from_logits(outputs.logits, inplace=True, **options)
        else:
            result = token_logprobs(outputs.logits, return_entropy=True, inplace_backward=True, **options)
        return result, getattr(outputs, "aux_loss", None)


@dataclass(frozen=True)
class HiddenHead:
    """From the last hidden state and the weight of the head; logits of ``chunk_tokens`` tokens exist at a time."""

    chunk_tokens: int
    in_float32: bool

    def check(self, model: PreTrainedModel) -> None:
        logit_scale(model.config.get_text_config())

    def __call__(
        self,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        *,
        loss: bool,
        width: int,
        options: dict[str, Any],
        **inputs: Any,
    ) -> tuple[Any, Tensor | None]:
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, -width:]
        head, config = model.get_output_embeddings(), model.config.get_text_config()
        weight, bias = whole(head.weight), whole(head.bias)
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device) and not self.in_float32
        dtype = torch.get_autocast_dtype(device) if autocast else torch.float32 if self.in_float32 else hidden.dtype
        function: Callable[..., Any] = functools.partial(linear_token_logprobs, return_entropy=True)
        if loss:  # of all kept tokens: metrics need the log-probs of those too whose advantage is 0
            function = functools.partial(policy_loss_from_hidden, num_live=int(options["mask"].count_nonzero()))
        with torch.autocast(device, enabled=autocast):
            result = function(
                hidden.to(dtype),
                weight.to(dtype),
                bias=None if bias is None else bias.to(dtype),
                softcap=getattr(config, "final_logit_softcapping", None),
                logit_scale=logit_scale(config),
                chunk_tokens=self.chunk_tokens,
                **options,
            )
        return result, None


def logit_scale(config: PretrainedConfig) -> float:
    """What a model multiplies its logits by, under the names that model families give it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse Glimmer, Falcon-H1
        scale = getattr(config, name, None)
        if scale is not None:
            break
    else:
        scale = getattr(config, "logits_scaling", None) or 1.0
        if config.model_type != "hyperclovax":  # Granite and MiniCPM3 divide by it
            scale = 1 / scale
    if not isinstance(scale, int | float):
        raise refuse(f"{name}={scale!r} with from_hidden=True", "it is not a number")
    return scale
