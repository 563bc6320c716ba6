"""The operator ``torch.ops.fusedpo.token_logprobs``: log-probs of tokens and the entropy of rows of logits.

::

    token_logprobs(logits, token_ids, temperature, mask?, return_entropy) -> logprobs, entropy, stats
    token_logprobs_backward_out(
        grad_logprobs?, grad_entropy?, logits, token_ids, temperature, mask?, stats, out, vocab_start=None
    )

* ``logits`` ``[..., V]``, float16, bfloat16 or float32, unit stride along V; ``token_ids`` ``[...]`` or ``[..., K]``,
  int64; ``temperature`` ``[]`` or ``[...]``, float32; ``mask`` ``[...]``, bool.
* ``logprobs`` as ``token_ids``, ``entropy`` ``[...]`` (``[0]`` if it is not asked for), float32; ``stats``
  ``[..., 3]``, float32, what the backward needs of each row.
* ``out``: the gradient of the logits, which may overwrite them. ``token_logprobs_backward`` returns it.
* ``vocab_start``: the logits are columns of a larger vocabulary, from this one on (:mod:`.row_stats`); V may be 0.
  None: they are all of it, and ids are checked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import (
    apply,
    are_batched,
    define,
    implement,
    is_differentiated,
    may_overlap,
    must_be_functional,
    once_differentiable,
    refuse_overwritten,
)
from . import row_stats as row_stats  # the same operator in two halves: whoever has one has the other

_INPUTS = "Tensor logits, Tensor token_ids, Tensor temperature, Tensor? mask"
_BACKWARD = f"Tensor? grad_logprobs, Tensor? grad_entropy, {_INPUTS}, Tensor stats"


def _token_logprobs_fake(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[:-1]
    return (
        logits.new_empty(token_ids.shape, dtype=torch.float32),
        logits.new_empty(rows if return_entropy else (0,), dtype=torch.float32),
        logits.new_empty((*rows, 3), dtype=torch.float32),
    )


define(
    "token_logprobs",
    f"({_INPUTS}, bool return_entropy) -> (Tensor logprobs, Tensor entropy, Tensor stats)",
    _token_logprobs_fake,
)
_BACKWARD_OUT = f"({_BACKWARD}, Tensor(a!) out, int? vocab_start=None) -> ()"
define("token_logprobs_backward_out", _BACKWARD_OUT, lambda *_, **__: None)
# Without side effects: for functorch, and for torch.compile, where writing into `out` could cost a copy of it.
define(
    "token_logprobs_backward",
    f"({_BACKWARD}, int? vocab_start=None) -> Tensor",
    lambda _grad_logprobs, _grad_entropy, logits, *_, **__: logits.new_empty(logits.shape),
)


def _token_logprobs_backward(
    backend: str,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    *rest: Any,
    **vocab_start: int | None,
) -> Tensor:
    if logits is None:  # PyTorch lets None through for any tensor
        raise ValueError("logits must be a tensor, got None")
    out = logits.new_empty(logits.shape)
    token_ids, temperature, mask, stats, *start = rest
    args = (grad_logprobs, grad_entropy, logits, token_ids, temperature, mask, stats, out, *start)
    getattr(torch.ops.fusedpo.token_logprobs_backward_out, backend)(*args, **vocab_start)
    return out


implement("token_logprobs_backward", _token_logprobs_backward)


class _TokenLogprobs(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(backend: str, inplace_backward: bool, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return getattr(torch.ops.fusedpo.token_logprobs, backend)(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.backend, ctx.inplace_backward, *tensors, ctx.return_entropy = inputs
        _, entropy, stats = output
        ctx.mark_non_differentiable(stats, *(() if ctx.return_entropy else (entropy,)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, stats)
        ctx.overwritten = False

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: None) -> Any:
        nothing = (None,) * 4
        if not ctx.return_entropy:
            grad_entropy = None  # torch.compile passes an empty tensor
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, *nothing
        refuse_overwritten(ctx, "token_logprobs", "inplace_backward")
        logits, *rest = ctx.saved_tensors
        args = (grad_logprobs, grad_entropy, logits, *rest)
        if must_be_functional() or are_batched(grad_logprobs, grad_entropy):
            gradient = getattr(torch.ops.fusedpo.token_logprobs_backward, ctx.backend)(*args)
        else:
            gradient = logits.detach() if ctx.inplace_backward else logits.new_empty(logits.shape)
            getattr(torch.ops.fusedpo.token_logprobs_backward_out, ctx.backend)(*args, gradient)
            if ctx.inplace_backward:
                ctx.overwritten = True
                torch.autograd.graph.increment_version(logits)
        gradient = once_differentiable("token_logprobs", gradient, logits, grad_logprobs, grad_entropy)
        return None, None, gradient, *nothing


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    return_entropy: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy by the kernels of ``backend``; arguments as the operator's schema has them."""
    inputs = (logits, token_ids, temperature, mask, return_entropy)
    if is_differentiated(logits):
        inplace_backward = inplace_backward and not must_be_functional() and not may_overlap(logits)
        logprobs, entropy, _ = apply("token_logprobs", _TokenLogprobs, backend, inplace_backward, *inputs)
    else:
        logprobs, entropy, _ = getattr(torch.ops.fusedpo.token_logprobs, backend)(*inputs)
    return logprobs, entropy
