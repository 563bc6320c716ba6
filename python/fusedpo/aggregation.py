"""From a value per token to one number, and by what a batch that is spread over ranks is divided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch import distributed as dist

from . import _checks, _tokens
from .advantages.samples import Array, samples
from .objectives import Aggregation, Objective, as_objective
from .reference import aggregation as reference
from .reference.advantages.segments import Groups, group_labels, result_dtype, widened
from .reference.layout import Layout, layout

if TYPE_CHECKING:
    from .distributed import ContextParallel

__all__ = ["aggregate", "global_denominator", "prompt_weights", "to_floats"]


def aggregate(
    tokens: Tensor,
    aggregation: Aggregation | Literal["prompt-mean"] = "token-mean",
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    length_norm: float | None = None,
    denominator: float | Tensor | None = None,
    group_size: int | None = None,
    group_ids: Array | None = None,
    cp: ContextParallel | None = None,
) -> Tensor:
    """What :func:`fusedpo.policy_loss` does with the losses of tokens, for a loss of your own.

    Besides, ``"prompt-mean"``: the mean over the tokens of all samples of a prompt, then over prompts, so that neither
    long samples nor prompts with many tokens count more than others (:func:`prompt_weights`).

    Args:
        tokens: floating-point, padded ``[B, T]``, or packed ``[T]`` or ``[1, T]`` with ``cu_seqlens``.
        mask, cu_seqlens, denominator, cp: as in :func:`fusedpo.policy_loss`; with ``cp`` the result is a share, too.
        aggregation, length_norm: as in :class:`fusedpo.Objective`.
        group_size, group_ids: which sequences answer the same prompt, as in :mod:`fusedpo.advantages`;
            ``"prompt-mean"`` needs one of them.

    Returns:
        0-d, float64 for float64 ``tokens``, else float32; differentiable with respect to ``tokens``. 0, with a gradient
        of 0, where no token is kept.

    Raises:
        TypeError: types and dtypes. ValueError: shapes, devices, ``cu_seqlens`` that are no offsets, ``denominator``
            where nothing is divided, ``length_norm`` without the aggregation that it belongs to.
    """
    mask, cu_seqlens, length_norm, denominator = _checks.taken(mask, cu_seqlens, length_norm, denominator)
    if aggregation != "prompt-mean" and (group_size is not None or group_ids is not None):
        raise ValueError(f"group_size and group_ids have no meaning with aggregation={_checks.brief(aggregation)}")
    Objective(aggregation="token-mean" if aggregation == "prompt-mean" else aggregation, length_norm=length_norm)
    _checks.floating("tokens", tokens)
    if cp is not None:
        if aggregation == "prompt-mean":
            raise ValueError("aggregation must be one of fusedpo.Objective with cp, got 'prompt-mean'")
        from .distributed.context_loss import aggregate as share

        return share(tokens, aggregation, mask, cu_seqlens, length_norm, denominator, cp)
    where, kept = _tokens.layout_of("tokens", tokens, mask, cu_seqlens)
    flat = tokens.reshape(-1).to(result_dtype(tokens)).masked_fill(~kept, 0)
    if aggregation == "prompt-mean":
        weights = _prompt_weights(where, kept, denominator, group_size, group_ids)
        return (flat * weights.to(flat.dtype)[where.sequence]).sum()
    _tokens.check_denominator(denominator, aggregation, "tokens", tokens)
    return reference.aggregate(flat, kept, where, aggregation, length_norm=length_norm, denominator=denominator)


def prompt_weights(
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    group_size: int | None = None,
    group_ids: Array | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """One weight per sequence with which a sum over tokens is the mean within each prompt, then over prompts.

    As ``is_weights`` of a loss whose ``aggregation`` is ``"token-sum"``, from log-probs, logits or hidden states, for
    an objective without KL and entropy part, which no weight multiplies. With those parts:
    ``aggregate(policy_loss(..., reduction="none").loss, "prompt-mean", ...)``.

    Args:
        mask: ``[B, T]``, or packed ``[T]`` or ``[1, T]`` with ``cu_seqlens``; nonzero keeps a token.
        group_size, group_ids: which sequences answer the same prompt, as in :mod:`fusedpo.advantages`.
        denominator: the number of prompts with a kept token in the whole accumulated or distributed batch, if that is
            not this one. All samples of a prompt have to be in this batch.

    Returns:
        ``[B]``, packed ``[num_sequences]``, float32: one over the kept tokens of the prompt and over the number of
        prompts; 0 for a prompt without kept token.

    Raises:
        TypeError: types. ValueError: shapes, ``cu_seqlens`` that are no offsets, groups.
    """
    _checks.is_tensor("mask", mask)
    where, kept = _tokens.layout_of("mask", mask, mask, cu_seqlens)
    return _prompt_weights(where, kept, denominator, group_size, group_ids).to(torch.float32)


def _prompt_weights(
    where: Layout, kept: Tensor, denominator: float | Tensor | None, group_size: int | None, group_ids: Array | None
) -> Tensor:
    (denominator,) = _checks.taken(denominator)
    _tokens.check_denominator(denominator, "token-mean", "mask", kept)
    sizes = where.sum_per_sequence(kept.long())
    _, group_size, group_ids, _ = samples(sizes, group_size, group_ids).groups
    groups = Groups.of(sizes, group_labels(sizes, group_size, group_ids), torch.ones_like(sizes, dtype=torch.bool))
    totals = torch.zeros_like(sizes).index_add(0, groups.start, sizes[groups.order])  # at the first sample of each
    prompts = (totals > 0).sum() if denominator is None else denominator
    tokens = widened(torch.empty_like(sizes).index_copy(0, groups.order, totals[groups.start]))
    shares = (1 / tokens).where(tokens > 0, 0)
    return shares / (prompts.masked_fill(prompts == 0, 1) if isinstance(prompts, Tensor) else prompts or 1)


def global_denominator(
    mask: Tensor,
    objective: Objective | str,
    group: dist.ProcessGroup | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    cp: ContextParallel | None = None,
    gradients: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The ``denominator`` with which training on several ranks takes the mean over the batch of all of them.

    Each rank passes the mask of its part of the batch: the micro-batches that one optimiser step accumulates, together
    (or one by one, and adds up the results). Counted is what ``objective.aggregation`` averages over, kept tokens for
    ``token-mean`` and sequences with a kept token for ``seq-mean-*``, over all ranks. ``DistributedDataParallel`` and
    FSDP average the gradients of ranks, so the sum of their losses is divided by that count over the number of ranks;
    with ``gradients="sum"``, for engines that add gradients up, by the count itself. ``seq-mean-token-sum-norm`` needs
    a ``length_norm`` besides, or ranks divide by different widths. ``token-sum`` divides by nothing: there, the number
    of ranks belongs into ``loss_scale``.

    Args:
        mask: ``[B, T]``, or packed ``[T]`` or ``[1, T]`` with ``cu_seqlens``; nonzero keeps a token.
        group: the ranks between which the batch is split, and over which gradients are averaged or added, those of
            ``cp`` among them; None: all. Without ``torch.distributed``, one rank.
        cp: how sequences are split, where they are: without it, a sequence would count once on each rank that holds a
            piece of it. ``mask`` holds the tokens of this rank then, ``cu_seqlens`` the offsets of the whole.
        gradients: what the engine makes of the gradients of ranks: their mean, or their sum.

    Returns:
        0-d float32, on the device of ``mask``. It stays there: nothing waits for the device.

    Raises:
        TypeError: types. ValueError: shapes, ``cu_seqlens`` that are no offsets, an objective that divides by nothing.
    """
    objective = as_objective(objective)
    if objective.aggregation == "token-sum":
        raise ValueError("objective must average over something, got aggregation='token-sum'")
    if gradients not in ("mean", "sum"):
        raise ValueError(f"gradients must be 'mean' or 'sum', got {_checks.brief(gradients)}")
    _checks.is_tensor("mask", mask)
    copies = 1  # of each sequence that is counted
    if cp is None:
        _tokens.check_layout("mask", mask, mask, cu_seqlens)
    else:
        where = cp.tokens("mask", mask, cu_seqlens)
        if objective.aggregation != "token-mean":
            gathered = where.gathered(mask != 0)[0]
            assert gathered is not None
            mask, copies = gathered, cp.size
    kept = mask.reshape(-1) != 0
    if objective.aggregation == "token-mean":
        count = kept.sum()
    else:
        count = (layout(mask, cu_seqlens).sum_per_sequence(kept.long()) > 0).sum()
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count, group=group)
        ranks = dist.get_world_size(group)
    return count.to(torch.float32) / (copies if gradients == "sum" else copies * ranks)


def to_floats(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """The metrics of a loss as Python numbers, for a logger: one wait for the device, not one for each.

    Args:
        metrics: 0-d tensors on one device, or numbers, by name: ``out.metrics``, or those of several losses in one.

    Raises:
        ValueError: a tensor that holds more than a number.
    """
    tensors = {name: x for name, x in metrics.items() if isinstance(x, Tensor)}
    for name, x in tensors.items():
        _checks.shape(f"metrics[{name!r}]", x, (), "a number")
    if not tensors:
        return {name: float(x) for name, x in metrics.items()}
    dtype = result_dtype(*tensors.values())
    numbers = iter(torch.stack([x.detach().to(dtype) for x in tensors.values()]).tolist())
    return {name: next(numbers) if name in tensors else float(x) for name, x in metrics.items()}
