"""Layer 1: how likely was each sampled token, and how uncertain was the policy there?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from . import _checks, backends, ops, reference
from ._batch import as_bool
from .ops import hidden as ops_hidden
from .ops import opaque_hidden as ops_opaque
from .ops import token_logprobs as ops_token_logprobs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["linear_token_logprobs", "token_logprobs"]


@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
    tp_group: ProcessGroup | None = ...,
    vocab_start: int | None = ...,
    vocab_size: int | None = ...,
) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[True],
    inplace_backward: bool = ...,
    tp_group: ProcessGroup | None = ...,
    vocab_start: int | None = ...,
    vocab_size: int | None = ...,
) -> tuple[Tensor, Tensor]: ...
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    tp_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each token under ``softmax(logits / temperature)``, and the entropy of that distribution.

    Args:
        logits: ``[..., V]``, float16, bfloat16 or float32 (float64 runs on the reference); rows may be strided.
        token_ids: ``[...]``, or ``[..., K]`` for K tokens per row; int32 or int64, in ``[0, V)`` at kept rows. Ids at
            masked rows are neither read nor checked (-100 is fine there).
        temperature: positive, finite float, or a tensor ``[...]`` of one value per row.
        mask: ``[...]``, nonzero keeps a row. The logits of the other rows are not read; their results and gradients
            are 0.
        return_entropy: return the entropy as well.
        inplace_backward: let the backward overwrite ``logits`` with their gradient, which saves a tensor of their
            size. A use of the logits that was saved before raises then; reading them afterwards gives the gradient,
            undetected. Ignored by the reference, under ``torch.compile`` and where rows share memory.
        tp_group: the ranks between which the vocabulary is split, in the order of their columns (:mod:`.distributed`).
            ``logits`` are then those of this rank, ``[..., V_r]``, V_r may differ between ranks and be 0; all other
            arguments, ids of the whole vocabulary, and both results are the same on all ranks. A ``DTensor`` whose
            placements split the vocabulary says all that by itself.
        vocab_start: the first column of this rank; None: ``rank * V_r``, which is right where all hold equally many.
        vocab_size: how many columns count, over all ranks; those after them are padding, of probability 0.

    Returns:
        ``logprobs`` in nats, shaped like ``token_ids``, float32; with ``return_entropy`` a tuple with the entropy
        ``[...]`` in nats, float32. A column at -inf has probability 0 and adds 0 to the entropy; NaN, +inf and a row
        that is all -inf give NaN.

    Both results are differentiable with respect to ``logits``, once. Nothing else is.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, ids out of range and a temperature that is not positive (on the
            CPU; on other devices under ``FUSEDPO_DEBUG=1``), columns of ranks that do not follow each other (elsewhere
            NaN).
    """
    if tp_group is not None or vocab_start is not None or vocab_size is not None or _checks.is_dtensor(logits):
        from .distributed import tensor

        given: dict[str, Any] = {"temperature": temperature, "mask": mask, "return_entropy": return_entropy}
        given.update(tp_group=tp_group, vocab_start=vocab_start, vocab_size=vocab_size)
        return tensor.token_logprobs(logits, token_ids, inplace_backward=inplace_backward, **given)
    token_ids, temperature, mask = _checks.taken(token_ids, temperature, mask)
    check_token_logprobs(logits, token_ids, temperature, mask)
    logprobs, entropy = checked_token_logprobs(logits, token_ids, temperature, mask, return_entropy, inplace_backward)
    return logprobs if entropy is None else (logprobs, entropy)


def checked_token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    return_entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor | None]:
    """:func:`token_logprobs` of arguments that were checked; without ``return_entropy``, None is the entropy."""
    backend = backends.choose("token_logprobs", logits.device.type, logits.dtype)
    if backend == "reference":
        _check_values(token_ids, logits.shape[-1], temperature, mask)
        results = reference.token_logprobs(
            logits, token_ids, temperature=temperature, mask=mask, return_entropy=return_entropy
        )
        return results if isinstance(results, tuple) else (results, None)
    logprobs, entropy = ops_token_logprobs.token_logprobs(
        *as_kernels_take_them(logits, token_ids, temperature), as_bool(mask), return_entropy, inplace_backward, backend
    )
    return logprobs, entropy if return_entropy else None


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[False] = ...,
    chunk_tokens: int | None = ...,
    gradient_threshold: float | None = ...,
    tp_group: ProcessGroup | None = ...,
    vocab_start: int | None = ...,
    vocab_size: int | None = ...,
) -> Tensor: ...
@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[True],
    chunk_tokens: int | None = ...,
    gradient_threshold: float | None = ...,
    tp_group: ProcessGroup | None = ...,
    vocab_start: int | None = ...,
    vocab_size: int | None = ...,
) -> tuple[Tensor, Tensor]: ...
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    chunk_tokens: int | None = None,
    gradient_threshold: float | None = None,
    tp_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`token_logprobs` of the logits ``hidden @ weight.T``, of which one chunk is in memory at a time.

    The backward computes each chunk's logits again. Rows that ``mask`` leaves out cost nothing.

    Args:
        hidden: ``[..., H]``, the last hidden state, float16, bfloat16 or float32 (float64 runs on the reference).
            ``weight``: ``[V, H]``, same dtype. ``bias``: ``[V]``. Under autocast any dtypes, as for ``F.linear``.
        softcap: ``softcap * tanh(logits / softcap)`` (Gemma). ``logit_scale``: multiplies the logits (Cohere). The
            order is matrix product, bias, ``logit_scale``, ``softcap``, ``temperature``.
        chunk_tokens: rows per chunk. None: as many as fit into a workspace of 256 MB (on accelerators 1 GB). The
            reference holds a chunk's logits up to six times, in float32. functorch transforms, which do not recompute,
            take all rows at a time.
        gradient_threshold: leave small elements out of the gradient of the logits, and the matrix products with them.
            None and 0 are exact. Otherwise at least 2^-64 and less than 1: the columns (tokens of the vocabulary) whose
            probability is at most this in every row of a chunk, and which are no row's token, are left out of it. Each
            element is at most ``gradient_threshold * |c|``, where ``c`` is the gradient of the row's log-prob over its
            temperature (and ``|c|`` the sum of both sizes if its entropy has a gradient, too). What that costs depends
            on how much probability the columns have together. Where more than half of the columns are active, and in
            the reference, nothing is left out. On an accelerator the host waits for the number of active columns of
            each chunk, while the device computes their gradient.
        token_ids, temperature, mask, return_entropy: as in :func:`token_logprobs`.
        tp_group, vocab_start, vocab_size: as there, of a head that is split: ``weight`` ``[V_r, H]`` and ``bias``
            ``[V_r]`` are those of this rank. ``hidden`` is the same on all ranks, and so is its gradient, which is
            summed over them; or it holds the tokens of this rank, one of P equal parts of ``token_ids``, which are
            whole, and so does its gradient. ``hidden`` and ``weight`` may be a ``DTensor`` each.

    Returns as :func:`token_logprobs`; differentiable with respect to ``hidden``, ``weight`` and ``bias``, once. The
    gradient of ``weight`` is summed in float32 and rounded to its dtype at the end (on the CPU in bfloat16, the product
    of each chunk is rounded before it is added); one that does not require gradients is not computed.

    Raises:
        TypeError: dtypes; ``weight`` or ``bias`` is sharded by FSDP or ZeRO-3: the message names the ways that work.
        ValueError: as :func:`token_logprobs`.
    """
    split = tp_group is not None or vocab_start is not None or vocab_size is not None
    if split or (_checks.is_dtensor(weight) and _checks.is_dtensor(hidden)):
        from .distributed import hidden as of_ranks

        if gradient_threshold:
            raise ValueError("gradient_threshold must be None or 0 where the vocabulary is split or padded")
        given: dict[str, Any] = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale}
        given.update(temperature=temperature, mask=mask, return_entropy=return_entropy, chunk_tokens=chunk_tokens)
        given.update(tp_group=tp_group, vocab_start=vocab_start, vocab_size=vocab_size)
        return of_ranks.linear_token_logprobs(hidden, weight, token_ids, **given)
    token_ids, temperature, mask, softcap, logit_scale, chunk_tokens, gradient_threshold = _checks.taken(
        token_ids, temperature, mask, softcap, logit_scale, chunk_tokens, gradient_threshold
    )
    options = head_options(hidden, softcap, logit_scale, chunk_tokens, gradient_threshold)
    check_linear_token_logprobs(hidden, weight, bias, token_ids, temperature=temperature, mask=mask)
    logprobs, entropy, _ = logprobs_from_hidden(
        hidden, weight, bias, token_ids, temperature, mask, options, return_entropy=return_entropy
    )
    return (logprobs, entropy) if return_entropy else logprobs


def logprobs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    options: ops_hidden.Options,
    *,
    return_entropy: bool = True,
    num_live: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`linear_token_logprobs` of arguments that were checked; the entropy is ``[0]`` if it is not asked for.

    ``num_live``: how many tokens ``mask`` keeps. The third result (0-d), which the backward writes, is the largest
    probability that the gradient of a row was left without; nan where it could be and the compiler forbids to write it.
    """
    hidden, weight, bias = taken_if_differentiated(hidden, weight, bias)
    backend = ops_hidden.choose(hidden, options.dtype, opaque=True)
    dropped = torch.zeros((), device=hidden.device)
    if backend == "reference":
        results = reference.linear_token_logprobs(
            hidden,
            weight,
            token_ids,
            bias=bias,
            softcap=options.softcap,
            logit_scale=options.logit_scale,
            temperature=temperature,
            mask=mask,
            return_entropy=return_entropy,
            chunk_tokens=chunk_of_reference(hidden, weight, options),
        )
        return (results, dropped.new_empty(0), dropped) if isinstance(results, Tensor) else (*results, dropped)
    ids, temperature = ids_and_temperature(token_ids, temperature)
    if ops_hidden.is_opaque(hidden):
        inputs = ops_hidden.Inputs(hidden, weight, bias, ids, temperature, ids)
        logprobs, entropy = ops_opaque.linear_token_logprobs(
            inputs, as_bool(mask), options=options, return_entropy=return_entropy, backend=backend
        )
        dropped = dropped if options.gradient_threshold is None else dropped + torch.nan
        return logprobs, entropy, dropped
    rows = ops_hidden.rows_where(as_bool(mask), hidden.shape[:-1].numel(), hidden.device, num_live)
    logprobs, entropy = ops_hidden.linear_token_logprobs(
        ops_hidden.Inputs(hidden, weight, bias, ids, temperature, rows),
        options=options,
        return_entropy=return_entropy,
        backend=backend,
        dropped=dropped,
    )
    return logprobs, entropy, dropped


def chunk_of_reference(hidden: Tensor, weight: Tensor, options: ops_hidden.Options) -> int:
    """How many rows the reference takes at a time."""
    if options.chunk_tokens is not None:
        return options.chunk_tokens
    row_bytes = weight.shape[0] * torch.promote_types(hidden.dtype, torch.float32).itemsize
    return ops_hidden.chunk_rows(hidden.shape[:-1].numel(), row_bytes, hidden.device.type)


def ids_and_temperature(token_ids: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """As kernels take them."""
    ids = token_ids if token_ids.dtype == torch.int64 else token_ids.to(torch.int64)
    return ids, ops.as_scalar(temperature, token_ids.device)


def as_kernels_take_them(
    logits: Tensor, token_ids: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    return logits, *ids_and_temperature(token_ids, temperature)


def taken_if_differentiated(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`_checks.taken`, whose copies may be large, where a backward needs them."""
    if hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad):
        hidden, weight, bias = _checks.taken(hidden, weight, bias)
    return hidden, weight, bias


def head_options(
    hidden: Tensor,
    softcap: float | None,
    logit_scale: float,
    chunk_tokens: int | None = None,
    gradient_threshold: float | None = None,
) -> ops_hidden.Options:
    """Checked, and as the kernels take them."""
    _checks.floating("hidden", hidden)
    if softcap is not None:
        _check_positive("softcap", softcap, "a float or None")
    _checks.finite("logit_scale", logit_scale)
    _checks.in_float32("logit_scale", logit_scale)
    if logit_scale == 0:
        raise ValueError("logit_scale must not be 0")
    if chunk_tokens is not None:
        _checks.whole_number("chunk_tokens", chunk_tokens, at_least=1, expected="an int or None")
    if gradient_threshold is not None:
        _checks.number("gradient_threshold", gradient_threshold, "a float or None")
        if gradient_threshold != 0 and not 2.0**-64 <= gradient_threshold < 1:
            given = _checks.brief(gradient_threshold)
            raise ValueError(f"gradient_threshold must be 0, or at least 2^-64 and less than 1, got {given}")
    threshold = float(gradient_threshold) if gradient_threshold else None
    return ops_hidden.Options(ops_hidden.compute_dtype(hidden), softcap, logit_scale, chunk_tokens, threshold)


# --------------------------------------------------------------------------------------------------------------- checks


def check_token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float | Tensor, mask: Tensor | None) -> None:
    _checks.floating("logits", logits)
    check_vocabulary(logits)
    _check_rows(logits.shape[:-1], logits, "logits", token_ids, temperature, mask)


def check_vocabulary(logits: Tensor) -> None:
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., V] with V >= 1, got {list(logits.shape)}")


def _check_rows(
    rows: torch.Size, source: Tensor, name: str, token_ids: Tensor, temperature: float | Tensor, mask: Tensor | None
) -> None:
    _checks.integer("token_ids", token_ids)
    shape = token_ids.shape
    if shape != rows and (shape[: len(rows)] != rows or len(shape) > len(rows) + 1):
        raise ValueError(
            f"token_ids must have shape {list(rows)} or {[*rows, 'K']} (the rows of {name}), got {list(shape)}"
        )
    _checks.same_device("token_ids", token_ids, name, source)
    _checks.mask(mask, rows, f"the rows of {name}", name, source)
    check_temperature(temperature, rows, name, source)


def check_temperature(temperature: float | Tensor, rows: torch.Size, name: str, source: Tensor) -> None:
    """One number, or one per row of ``source``, the argument ``name``."""
    if isinstance(temperature, Tensor):
        _checks.floating("temperature", temperature)
        if temperature.dim() > 0:
            _checks.shape("temperature", temperature, rows, f"one value per row of {name}")
        _checks.same_device("temperature", temperature, name, source)
    else:
        _check_positive("temperature", temperature, "a float or a torch.Tensor")


def _check_positive(name: str, value: float, expected: str) -> None:
    _checks.number(name, value, expected)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {_checks.brief(value)}")
    _checks.in_float32(name, value)


def _check_values(token_ids: Tensor, size: int, temperature: float | Tensor, mask: Tensor | None) -> None:
    """What the row kernels check by themselves, for the reference and before matrix products."""
    if _checks.values_are_free(token_ids):
        kept = torch.ones_like(token_ids, dtype=torch.bool)
        if mask is not None:
            kept = (mask != 0).reshape(*mask.shape, *[1] * (token_ids.dim() - mask.dim())).expand_as(token_ids)
        bad = token_ids[kept & ((token_ids < 0) | (token_ids >= size))]
        if bad.numel() > 0:
            raise ValueError(f"token_ids must be in [0, {size}) at kept rows, got {int(bad[0])}")
    if isinstance(temperature, Tensor) and _checks.values_are_free(temperature):
        t = temperature.float()
        bad = temperature[~((t > 0) & (t < math.inf)) & (True if mask is None or temperature.dim() == 0 else mask != 0)]
        if bad.numel() > 0:
            raise ValueError(f"temperature must be positive and finite, got {float(bad[0])}")


def check_linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    *,
    temperature: float | Tensor,
    mask: Tensor | None,
) -> None:
    _check_linear(hidden, weight, bias)
    _check_rows(hidden.shape[:-1], hidden, "hidden", token_ids, temperature, mask)
    _check_values(token_ids, weight.shape[0], temperature, mask)


def _check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, split: bool = False) -> None:
    """``split``: the head is that of a rank, which may have none of its rows."""
    _checks.floating("hidden", hidden)
    _checks.floating("weight", weight)
    if not split:
        _check_whole("weight", weight)
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [..., H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}"
        )
    _checks.same_device("weight", weight, "hidden", hidden)
    if weight.dtype != hidden.dtype and not ops_hidden.is_autocast_enabled(hidden.device.type):
        raise TypeError(f"weight must have the dtype of hidden, {hidden.dtype}, outside autocast, got {weight.dtype}")
    if bias is not None:
        _checks.floating("bias", bias)
        if not split:
            _check_whole("bias", bias)
        _checks.shape("bias", bias, (weight.shape[0],), "one value per row of weight")
        _checks.same_device("bias", bias, "hidden", hidden)


def _check_whole(name: str, parameter: Tensor) -> None:
    if parameter.numel() == 0:
        raise TypeError(
            f"{name} must be a whole plain tensor, got an empty one, as ZeRO-3 and FSDP leave behind: gather it, "
            f"{_checks.WAYS_TO_GATHER}"
        )
