"""Layer 2: how much should each token's log-prob move? Ratio, forward trace, trust region, KL, entropy, aggregation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import _checks, backends, ops, ops_policy_loss, reference
from .logprobs import linear_token_logprobs, token_logprobs
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
        _check_per_token("entropy", entropy, "logprobs", logprobs, logprobs.shape)
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
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    is_weights: Tensor | None,
    denominator: float | Tensor | None,
    loss_scale: float | Tensor,
    reduction: str,
) -> PolicyLossOutput:
    def per_token_or_sequence(x: Tensor) -> Tensor:
        per_token = x.shape[-1:] == logprobs.shape[-1:] and x.numel() == logprobs.numel()
        return x.float().reshape(logprobs.shape if per_token else (-1, 1))

    def number(x: float | Tensor) -> Tensor:
        return x.float() if isinstance(x, Tensor) else ops.scalar(x, logprobs.device)

    used_entropy = entropy if entropy is None or objective.entropy_coef != 0 else entropy.detach()
    loss, metrics = ops_policy_loss.policy_loss(
        logprobs.float(),
        None if old_logprobs is None else old_logprobs.float(),
        per_token_or_sequence(advantages),
        None if mask is None else mask != 0 if mask.dtype != torch.bool else mask,
        None if cu_seqlens is None else cu_seqlens.to(torch.int64),
        None if ref_logprobs is None else ref_logprobs.float(),
        None if used_entropy is None else used_entropy.float(),
        None if is_weights is None else per_token_or_sequence(is_weights),
        None if denominator is None else number(denominator),
        number(loss_scale),
        objective=objective,
        per_token=reduction == "none",
        backend=backend,
    )
    return PolicyLossOutput(
        loss,
        dict(zip(reference.METRICS, metrics.unbind(), strict=True)),
        logprobs.detach(),
        None if entropy is None else entropy.detach(),
    )


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
    if len(shape) not in (1, 2):
        raise ValueError(f"{name} must hold tokens [B, T] or [T], got the shape {list(source.shape)}")
    if cu_seqlens is None:
        num_sequences = shape[0] if len(shape) == 2 else 1
    else:
        if len(shape) == 2 and shape[0] != 1:
            raise ValueError(
                f"cu_seqlens needs {name} that hold packed tokens [T] or [1, T], got the shape {list(source.shape)}"
            )
        _checks.cu_seqlens(cu_seqlens, shape.numel(), name, source)
        num_sequences = cu_seqlens.numel() - 1
    _checks.mask(mask, shape, f"one value per token of {name}", name, source)
    for argument, tensor in (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs)):
        if tensor is not None:
            _check_per_token(argument, tensor, name, source, shape)
    if objective.kl is not None and ref_logprobs is None:
        raise ValueError(f"ref_logprobs is needed by objective.kl={objective.kl}, got None")
    _check_weights("advantages", advantages, name, source, shape, num_sequences)
    if is_weights is not None:
        _check_weights("is_weights", is_weights, name, source, shape, num_sequences)
    _check_number("loss_scale", loss_scale, name, source)
    if denominator is not None:
        if objective.aggregation == "token-sum":
            raise ValueError("denominator must be None with aggregation='token-sum', which divides by nothing")
        _check_number("denominator", denominator, name, source)
        free = not isinstance(denominator, Tensor) or _checks.values_are_free(denominator)
        if free and not denominator >= 0:
            raise ValueError(f"denominator must be a count >= 0, got {float(denominator)}")


def _check_per_token(argument: str, tensor: Tensor, name: str, source: Tensor, shape: torch.Size) -> None:
    _checks.floating(argument, tensor)
    _checks.shape(argument, tensor, shape, f"one value per token of {name}")
    _checks.same_device(argument, tensor, name, source)


def _check_weights(
    argument: str, tensor: Tensor, name: str, source: Tensor, shape: torch.Size, num_sequences: int
) -> None:
    """One value per token, or one per sequence."""
    _checks.floating(argument, tensor)
    expected = [tuple(shape), (num_sequences,), (num_sequences, 1)]
    if len(shape) == 1 or shape[0] == 1:
        expected += [(shape[-1],), (1, shape[-1])]
    if tuple(tensor.shape) not in expected:
        shapes = [list(s) for s in dict.fromkeys(expected)]
        raise ValueError(
            f"{argument} must have one of the shapes {shapes} (a value per token or per sequence of {name}), "
            f"got {list(tensor.shape)}"
        )
    _checks.same_device(argument, tensor, name, source)


def _check_number(argument: str, value: float | Tensor, name: str, source: Tensor) -> None:
    if isinstance(value, Tensor):
        _checks.shape(argument, value, (), "a number or a 0-d tensor")
        _checks.same_device(argument, value, name, source)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument} must be a number or a 0-d tensor, got {type(value).__name__}")


def _check_token_ids(token_ids: Tensor, name: str, source: Tensor) -> None:
    _checks.integer("token_ids", token_ids)
    _checks.shape("token_ids", token_ids, source.shape[:-1], f"one id per token of {name}")
