"""The operators ``torch.ops.fusedpo.*``: schemas, fake kernels, and the autograd Functions over the raw kernels.

An operator has one overload per implementation, ``native`` (C++ and CUDA, registered by the files of ``csrc/cpu`` and
``csrc/cuda``) and ``triton`` (registered by ``fusedpo.triton_kernels``); all overloads share schema and fake kernel.
Which one runs is decided by :mod:`fusedpo.backends` and is visible in a traced graph. What an operator calls ``out``
has shape and dtype of the logits and memory of its own, or is the logits themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("fusedpo", "DEF")


BACKENDS = ("native", "triton")
DEVICES = ("CUDA", "XPU", "CPU")  # for Triton, the CPU is that of TRITON_INTERPRET=1


def define(name: str, schema: str, fake: Callable[..., Any]) -> None:
    for backend in BACKENDS:
        LIBRARY.define(f"{name}.{backend}{schema}")
        torch.library.register_fake(f"fusedpo::{name}.{backend}", fake, lib=LIBRARY)


def implement(name: str, function: Callable[..., Any]) -> None:
    """``function(backend, *args)`` is the operator on every device: it is made of other operators of the backend."""
    for backend in BACKENDS:
        for key in DEVICES:
            LIBRARY.impl(f"{name}.{backend}", partial(function, backend), key)


def scalar(value: float, device: torch.device) -> Tensor:
    """A number as a float32 0-d tensor; while tracing, in the one form that does not recompile for every value."""
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float32, device=device) * value
    if must_be_functional() or _is_recorded(device):
        return torch.full((), value, dtype=torch.float32, device=device)
    stream = 0 if device.type in ("cpu", "meta") else torch.accelerator.current_stream(device).stream_id
    return _kept_scalar(value, device, stream)


@lru_cache(maxsize=64)
def _kept_scalar(value: float, device: torch.device, stream: int) -> Tensor:
    """Filled once, by the stream that reads it: a launch less in every step. Nothing writes to it."""
    with torch.inference_mode(False):
        return torch.full((), value, dtype=torch.float32, device=device)


def _is_recorded(device: torch.device) -> bool:
    """Whether memory that is allocated now belongs to a CUDA graph, or to no device at all."""
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def as_scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """:func:`scalar`, or the 0-d tensor that ``value`` is, in float32."""
    return value.float() if isinstance(value, Tensor) else scalar(value, device)


def must_be_functional(*tensors: Tensor) -> bool:
    """Whether operators must have no side effects, and sizes depend on no values.

    So it is while ``torch.compile`` traces or functorch transforms, and where tensors have no data.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return bool(tensors) and any(isinstance(x, torch._subclasses.FakeTensor) for x in tensors)


def is_transformed() -> bool:
    """Whether functorch transforms what is called."""
    return torch._C._are_functorch_transforms_active()


def are_batched(*gradients: Tensor | None) -> bool:
    """Whether ``torch.autograd.grad(is_grads_batched=True)`` asks for many gradients at a time."""
    return any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in gradients)


_NO_FORWARD_MODE = (
    "{}: the kernels have no forward-mode derivatives (jvp, jacfwd, linearize, dual numbers); use "
    "fusedpo.backend('reference') for them"
)


def apply(name: str, function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply`` without the 20 us that binding ``setup_context``'s signature costs in eager mode.

    ``name`` is what the errors about transforms call it. No ``jvp`` of the Function says that: it would break the graph
    under ``torch.compile``.
    """
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:  # tangents would be lost
            raise NotImplementedError(_NO_FORWARD_MODE.format(name))
        return function.apply(*args)
    try:
        if torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
    except NotImplementedError as error:
        if forward_ad._current_level < 0:
            raise
        raise NotImplementedError(_NO_FORWARD_MODE.format(name)) from error


def require_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward could ask for the gradient of one of them."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether a call has to go through :func:`apply`, without which derivatives would be lost: they could be asked for.

    Tangents of forward mode need neither ``requires_grad`` nor grad mode.
    """
    if require_grad(*tensors):
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _NoDoubleBackward(torch.autograd.Function):
    """Identity in ``gradient``, differentiable in the ``sources`` it came from: going through it once more raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, name: str, *sources: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{ctx.name}: double backward is not supported; use fusedpo.backend('reference') for it")


def once_differentiable(name: str, gradient: Tensor, *sources: Tensor | None) -> Tensor:
    """``gradient``, through which a second backward raises where one could be asked for."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return apply(name, _NoDoubleBackward, gradient, name, *sources)
    return gradient


def refuse_overwritten(ctx: Any, name: str, option: str) -> None:
    """Raises in a second backward, where the first one has put the gradient in the place of the logits."""
    if ctx.overwritten:
        raise RuntimeError(
            f"{name}({option}=True): the first backward has overwritten the logits with their gradient, a second one "
            f"needs {option}=False"
        )


def edge_to(x: Tensor | None) -> Tensor | None:
    """An empty tensor that was computed from ``x``: a source for :func:`once_differentiable` that keeps no data."""
    if x is None or not x.requires_grad:
        return None
    with torch.enable_grad():
        return x.narrow(0, 0, 0).clone()


def may_overlap(x: Tensor) -> bool:
    """Whether elements may share memory: some stride is shorter than what lies below it, or 0 as in expanded views."""
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent += stride * (size - 1)
    return False
