"""Layer 2: how much should each token's log-prob move? Ratio, forward trace, trust region, KL, entropy, aggregation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import _checks, _tokens, backends, ops, ops_one_pass, ops_policy_loss, reference
from .logprobs import check_token_logprobs, linear_token_logprobs, token_logprobs
from .objectives import Objective
from .reference import PolicyLossOutput

__all__ = ["PolicyLossOutput", "policy_loss", "policy_loss_from_hidden", "policy_loss_from_logits"]


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    objective: Objective,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    is_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
    reduction: Literal["mean", "none"] = "mean",
) -> PolicyLossOutput:
    """The loss of ``objective``; its formulas are in :mod:`fusedpo.objectives`.

    Args:
        logprobs: log-probs in nats under the policy that is trained, floating-point: padded ``[B, T]``, or packed
            ``[T]`` or ``[1, T]`` with ``cu_seqlens``; ``[T]`` without ``cu_seqlens`` is one sequence. "Per token" below
            is this shape.
        old_logprobs: per token, under the policy that sampled. None: ``logprobs.detach()``.
        advantages: per token, or per sequence: ``[B]`` or ``[B, 1]``, packed ``[num_sequences]``. A packed batch with
            as many tokens as sequences takes them per token.
        mask: per token, bool, integer or floating-point; nonzero keeps a token. What the other arrays hold at masked
            tokens (nan, inf) reaches neither the loss nor a gradient nor a metric.
        cu_seqlens: ``[num_sequences + 1]``, int32 or int64: where each packed sequence starts, and the number of
            tokens.
        ref_logprobs: per token, under the reference policy; ``objective.kl`` needs it.
        entropy: per token, in nats; ``objective.entropy_coef`` needs it. It may be given without, for the metrics.
        is_weights: as ``advantages``; multiply the policy term of their token.
        denominator: what the sum is divided by instead of the count in this batch: the tokens for ``token-mean``, the
            sequences for ``seq-mean-*`` of a whole accumulated or distributed batch. A number or a 0-d tensor; 0 counts
            as 1.
        loss_scale: a number or a 0-d tensor that multiplies the loss.
        reduction: ``"mean"`` aggregates as ``objective.aggregation`` says; ``"none"`` gives the loss of each token.

    Returns:
        ``loss``: 0-d, or shaped like ``logprobs`` and 0 at masked tokens; float64 for float64 ``logprobs``, else
        float32. ``metrics``: the names in ``fusedpo.reference.METRICS``, 0-d tensors over the kept tokens, 0 if there
        is none. ``clip_frac_low`` and ``clip_frac_high`` are the fractions of tokens whose gradient (CISPO: weight) the
        lower and the upper bound cut, ``clip_frac`` their sum; ``kl`` (to the reference policy) and ``entropy`` are
        means without coefficient, 0 where the objective has no KL part and where no entropy is given; ``approx_kl`` and
        ``approx_kl_k3`` estimate the divergence from the old policy; ``ess`` is the effective sample size of the
        weights ``rho * F`` as a fraction of the tokens; ``clamp_frac`` counts tokens whose log-ratio or log-trace was
        clamped. ``logprobs`` and ``entropy``: the arguments, detached.

    Differentiable with respect to ``logprobs`` and, if ``objective.entropy_coef`` is not 0, ``entropy``; nothing else
    is. With no kept token the loss is 0 and so are the gradients.

    Raises:
        TypeError: types and dtypes. ValueError: shapes, devices, ``cu_seqlens`` that are no offsets, an argument that a
            part of ``objective`` needs and that is None, ``denominator`` where nothing is divided.
    """
    options: dict[str, Any] = {
        "objective": objective,
        "mask": mask,
        "cu_seqlens": cu_seqlens,
        "ref_logprobs": ref_logprobs,
        "is_weights": is_weights,
        "denominator": denominator,
        "loss_scale": loss_scale,
    }
    _checks.floating("logprobs", logprobs)
    _check("logprobs", logprobs, logprobs.shape, old_logprobs, advantages, **options)
    if entropy is not None:
        _tokens.check_per_token("entropy", entropy, "logprobs", logprobs)
    elif objective.entropy_coef != 0:
        raise ValueError(f"entropy is needed by objective.entropy_coef={objective.entropy_coef}, got None")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    if reduction == "none" and denominator is not None:
        raise ValueError("denominator must be None with reduction='none', which divides by nothing")
    return _policy_loss(logprobs, old_logprobs, advantages, entropy=entropy, reduction=reduction, **options)


def policy_loss_from_logits(
    logits: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    objective: Objective,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ref_logprobs: Tensor | None = None,
    is_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
    inplace: bool = False,
) -> PolicyLossOutput:
    """:func:`policy_loss` of the log-probs of ``token_ids`` under ``softmax(logits / temperature)``.

    Args:
        logits: ``[B, T, V]``, or packed ``[T, V]`` or ``[1, T, V]``; floating-point, rows may be strided.
        token_ids: ``[B, T]``, or ``[T]`` or ``[1, T]``, int32 or int64: the token that each row predicts
            (:func:`fusedpo.next_tokens`). Neither ids nor logits of masked tokens are read.
        temperature: positive number, or a tensor of one value per token.
        inplace: let the gradient overwrite ``logits``, which saves a tensor of their size. A use of the logits that was
            saved before raises then; reading them afterwards gives the gradient, undetected.
        Others as in :func:`policy_loss`.

    Returns:
        As :func:`policy_loss`; ``logprobs`` and ``entropy`` are those of the tokens, detached, 0 where masked. ``loss``
        is differentiable with respect to ``logits``, through the entropy too if ``objective.entropy_coef`` is not 0.

    Raises:
        As :func:`policy_loss` and :func:`fusedpo.token_logprobs`.
    """
    options: dict[str, Any] = {
        "objective": objective,
        "mask": mask,
        "cu_seqlens": cu_seqlens,
        "ref_logprobs": ref_logprobs,
        "is_weights": is_weights,
        "denominator": denominator,
        "loss_scale": loss_scale,
    }
    _checks.floating("logits", logits)
    _check("logits", logits, logits.shape[:-1], old_logprobs, advantages, **options)
    _check_token_ids(token_ids, "logits", logits)
    backend = _one_pass_backend(logits, objective, loss_scale)
    if backend is not None:
        return _by_one_pass(
            backend, logits, token_ids, old_logprobs, advantages, temperature=temperature, inplace=inplace, **options
        )
    logprobs, entropy = token_logprobs(
        logits, token_ids, temperature=temperature, mask=mask, return_entropy=True, inplace_backward=inplace
    )
    return _policy_loss(logprobs, old_logprobs, advantages, entropy=entropy, reduction="mean", **options)


def policy_loss_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    objective: Objective,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    num_live: int | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ref_logprobs: Tensor | None = None,
    is_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
) -> PolicyLossOutput:
    """:func:`policy_loss_from_logits` of the logits ``hidden @ weight.T``, which need not all be in memory at a time.

    Args:
        hidden: ``[B, T, H]``, or packed ``[T, H]`` or ``[1, T, H]``: the last hidden state. ``weight``: ``[V, H]``,
            same dtype.
        bias, softcap, logit_scale, chunk_tokens: as in :func:`fusedpo.linear_token_logprobs`.
        num_live: how many tokens ``mask`` keeps, if the caller knows: it spares the sync that counts them. It does not
            change the result.
        Others as in :func:`policy_loss_from_logits`.

    Returns and raises as :func:`policy_loss_from_logits`; differentiable with respect to ``hidden``, ``weight`` and
    ``bias``.
    """
    options: dict[str, Any] = {
        "objective": objective,
        "mask": mask,
        "cu_seqlens": cu_seqlens,
        "ref_logprobs": ref_logprobs,
        "is_weights": is_weights,
        "denominator": denominator,
        "loss_scale": loss_scale,
    }
    _checks.floating("hidden", hidden)
    _check("hidden", hidden, hidden.shape[:-1], old_logprobs, advantages, **options)
    _check_token_ids(token_ids, "hidden", hidden)
    if num_live is not None:
        if isinstance(num_live, bool) or not isinstance(num_live, int):
            raise TypeError(f"num_live must be an int or None, got {type(num_live).__name__}")
        if not 0 <= num_live <= token_ids.numel():
            raise ValueError(f"num_live must be between 0 and the number of tokens {token_ids.numel()}, got {num_live}")
    logprobs, entropy = linear_token_logprobs(
        hidden,
        weight,
        token_ids,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        mask=mask,
        return_entropy=True,
        chunk_tokens=chunk_tokens,
    )
    return _policy_loss(logprobs, old_logprobs, advantages, entropy=entropy, reduction="mean", **options)


def _policy_loss(logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, **options: Any) -> PolicyLossOutput:
    backend = backends.choose("policy_loss", logprobs.device.type, logprobs.dtype)
    if backend == "reference":
        return reference.policy_loss(logprobs, old_logprobs, advantages, **options)
    return _by_kernel(backend, logprobs, old_logprobs, advantages, **options)


def _by_kernel(
    backend: str,
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    objective: Objective,
    entropy: Tensor | None,
    reduction: str,
    **options: Any,
) -> PolicyLossOutput:
    arguments = _as_kernels_take_them(logprobs, old_logprobs, advantages, **options)
    used_entropy = entropy if entropy is None or objective.entropy_coef != 0 else entropy.detach()
    loss, metrics = ops_policy_loss.policy_loss(
        logprobs.float(),
        None if used_entropy is None else used_entropy.float(),
        arguments,
        objective=objective,
        per_token=reduction == "none",
        backend=backend,
    )
    return _output(loss, metrics, logprobs.detach(), None if entropy is None else entropy.detach())


def _one_pass_backend(logits: Tensor, objective: Objective, loss_scale: float | Tensor) -> str | None:
    """Who computes the gradient together with the loss; None: forward alone, or two passes."""
    if not logits.requires_grad or not torch.is_grad_enabled() or not ops_one_pass.is_possible(objective):
        return None
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None  # they want operators without side effects
    if logits.dtype == torch.float16 and not isinstance(loss_scale, Tensor) and loss_scale == 1:
        return None  # a GradScaler's factor comes with the upstream gradient: before it, gradients may be too small
    return backends.kernel_for("one_pass", logits.device.type, logits.dtype)


def _by_one_pass(
    backend: str,
    logits: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    objective: Objective,
    temperature: float | Tensor,
    inplace: bool,
    **options: Any,
) -> PolicyLossOutput:
    check_token_logprobs(logits, token_ids, temperature, options["mask"])
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if not isinstance(temperature, Tensor):
        temperature = ops.scalar(temperature, logits.device)
    loss, metrics, logprobs, entropy = ops_one_pass.policy_loss_from_logits(
        logits,
        token_ids.to(torch.int64),
        temperature.to(torch.float32),
        _as_kernels_take_them(token_ids, old_logprobs, advantages, **options),
        objective=objective,
        inplace=inplace,
        backend=backend,
    )
    return _output(loss, metrics, logprobs, entropy)


def _as_kernels_take_them(
    tokens: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logprobs: Tensor | None,
    is_weights: Tensor | None,
    denominator: float | Tensor | None,
    loss_scale: float | Tensor,
) -> ops_policy_loss.TokenArguments:
    """The arguments that all losses share, for ``tokens`` of any dtype."""

    def per_token_or_sequence(x: Tensor) -> Tensor:
        per_token = x.shape[-1:] == tokens.shape[-1:] and x.numel() == tokens.numel()
        return x.float().reshape(tokens.shape if per_token else (-1, 1))

    def number(x: float | Tensor) -> Tensor:
        return x.float() if isinstance(x, Tensor) else ops.scalar(x, tokens.device)

    return ops_policy_loss.TokenArguments(
        old_logprobs=None if old_logprobs is None else old_logprobs.float(),
        advantages=per_token_or_sequence(advantages),
        mask=None if mask is None else mask != 0 if mask.dtype != torch.bool else mask,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(torch.int64),
        ref_logprobs=None if ref_logprobs is None else ref_logprobs.float(),
        is_weights=None if is_weights is None else per_token_or_sequence(is_weights),
        denominator=None if denominator is None else number(denominator),
        loss_scale=number(loss_scale),
    )


def _output(loss: Tensor, metrics: Tensor, logprobs: Tensor, entropy: Tensor | None) -> PolicyLossOutput:
    return PolicyLossOutput(loss, dict(zip(reference.METRICS, metrics.unbind(), strict=True)), logprobs, entropy)


# --------------------------------------------------------------------------------------------------------------- checks


def _check(
    name: str,
    source: Tensor,
    shape: torch.Size,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    objective: Objective,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logprobs: Tensor | None,
    is_weights: Tensor | None,
    denominator: float | Tensor | None,
    loss_scale: float | Tensor,
) -> None:
    """Checks what all losses share. ``shape`` is that of the tokens of ``source``, the argument ``name``."""
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be a fusedpo.Objective, got {type(objective).__name__}")
    num_sequences = _tokens.check_layout(name, source, mask, cu_seqlens, shape)
    for argument, tensor in (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs)):
        if tensor is not None:
            _tokens.check_per_token(argument, tensor, name, source, shape)
    if objective.kl is not None and ref_logprobs is None:
        raise ValueError(f"ref_logprobs is needed by objective.kl={objective.kl}, got None")
    _tokens.check_weights("advantages", advantages, name, source, num_sequences, shape)
    if is_weights is not None:
        _tokens.check_weights("is_weights", is_weights, name, source, num_sequences, shape)
    _tokens.check_number("loss_scale", loss_scale, name, source)
    _tokens.check_denominator(denominator, objective.aggregation, name, source)


def _check_token_ids(token_ids: Tensor, name: str, source: Tensor) -> None:
    _checks.integer("token_ids", token_ids)
    _checks.shape("token_ids", token_ids, source.shape[:-1], f"one id per token of {name}")
