"""Tensor parallelism: log-probs and entropy of rows whose columns lie on several ranks.

Each rank reads its columns once, sends ``3 + K`` floats of each row, and merges what all ranks sent in one order: the
results have the same bits on all of them. The backward reads the columns again, and communicates nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, backends, ops
from .._batch import as_bool
from ..logprobs import _check_rows, _check_values
from ..ops import once_differentiable, refuse_overwritten
from ..reference import row_stats as reference
from . import shards
from .collectives import Pending
from .shards import Shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Rows per rank from which on they are cut in two, on accelerators: the gather of one half runs while the other is read.
HALVES_FROM = 600


class Operators(NamedTuple):
    row_stats: Any
    merge_row_stats: Any
    token_logprobs_backward: Any


def operators(backend: str) -> Operators:
    """Those of a backend."""
    if backend == "reference":
        return Operators(reference.row_stats, reference.merge_row_stats, reference.token_logprobs_backward)
    of = torch.ops.fusedpo
    return Operators(*(getattr(op, backend) for op in (of.row_stats, of.merge_row_stats, of.token_logprobs_backward)))


def pieces(rows: torch.Size, shard: Shard, device: torch.device) -> list[slice]:
    """How the first dimension of ``rows`` that has a length is cut; it depends on what is the same on all ranks."""
    lengths = [size for size in rows if size != 1] or [1]
    cut = shard.group is not None and device.type != "cpu" and math.prod(rows) >= HALVES_FROM * shard.group.size()
    middle = lengths[0] // 2 if cut else 0
    return [slice(0, middle), slice(middle, lengths[0])] if middle > 0 else [slice(0, lengths[0])]


def merged(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    shard: Shard,
    return_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs like ``token_ids``, entropy and stats of the rows of ``logits``, the valid columns of this rank."""
    ops_of = operators(backend)
    rows = logits.shape[:-1]
    at = next((dim for dim, size in enumerate(rows) if size != 1), None)

    def piece(x: Tensor | None, where: slice) -> Tensor | None:
        return x if x is None or x.dim() == 0 or at is None else x.narrow(at, where.start, where.stop - where.start)

    cut, pending = pieces(rows, shard, logits.device), []
    for where in cut:
        parts = ops_of.row_stats(
            *(piece(x, where) for x in (logits, token_ids, temperature, mask)),
            *(shard.start, shard.width, shard.vocab_size, return_entropy),
        )
        pending.append(parts[None] if shard.group is None else Pending(parts, shard.group))
    results = []
    for where, gathered in zip(cut, pending, strict=True):
        of_ranks = gathered if isinstance(gathered, Tensor) else gathered.wait()
        ids, t, kept = (piece(x, where) for x in (token_ids, temperature, mask))
        size = shards.check_headers(of_ranks)
        if size is not None:
            assert ids is not None
            _check_values(ids, size, t if t is not None and t.dim() > 0 else 1.0, kept)
        flat_t = t if t is None or t.dim() == 0 else t.reshape(-1)
        flat_mask = None if kept is None else kept.reshape(-1)
        results.append(ops_of.merge_row_stats(of_ranks, flat_t, flat_mask, return_entropy))
    logprobs, entropy, stats = results[0] if len(results) == 1 else map(torch.cat, zip(*results, strict=True))
    return (
        logprobs.reshape(token_ids.shape),
        entropy.reshape(rows) if return_entropy else entropy,
        stats.reshape(*rows, 3),
    )


class _ShardedLogprobs(torch.autograd.Function):
    """Old-style: no functorch transform goes through a collective."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        token_ids: Tensor,
        temperature: Tensor,
        mask: Tensor | None,
        shard: Shard,
        return_entropy: bool,
        inplace_backward: bool,
        backend: str,
        wrapper: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        valid = logits.detach()[..., : shard.valid]
        logprobs, entropy, stats = merged(valid, token_ids, temperature, mask, shard, return_entropy, backend)
        # no ProcessGroup: what is kept may outlive it, and is traced
        ctx.start, ctx.valid, ctx.backend, ctx.return_entropy = shard.start, shard.valid, backend, return_entropy
        ctx.inplace_backward, ctx.overwritten, ctx.wrapper = inplace_backward, False, wrapper
        ctx.save_for_backward(logits, token_ids, temperature, mask, stats)
        ctx.set_materialize_grads(False)
        if not return_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        none = (None,) * 8
        if not ctx.return_entropy:
            grad_entropy = None
        if grad_logprobs is None and grad_entropy is None:
            return None, *none
        refuse_overwritten(ctx, "token_logprobs", "inplace_backward")
        logits, token_ids, temperature, mask, stats = ctx.saved_tensors
        upstream = (None if g is None else g.detach() for g in (grad_logprobs, grad_entropy))
        columns = logits.detach()[..., : ctx.valid]
        rest = (token_ids, temperature, mask, stats)
        if ctx.backend == "reference" or ops.must_be_functional():
            gradient = operators(ctx.backend).token_logprobs_backward(*upstream, columns, *rest, vocab_start=ctx.start)
            gradient = F.pad(gradient, (0, logits.shape[-1] - ctx.valid))
        else:
            gradient = logits.detach() if ctx.inplace_backward else logits.new_empty(logits.shape)
            out = gradient[..., : ctx.valid]
            getattr(torch.ops.fusedpo.token_logprobs_backward_out, ctx.backend)(
                *upstream, columns, *rest, out, vocab_start=ctx.start
            )
            if ctx.valid < logits.shape[-1]:
                gradient[..., ctx.valid :].zero_()
            if ctx.inplace_backward:
                ctx.overwritten = True
                torch.autograd.graph.increment_version(logits)
                if ctx.wrapper is not None:  # a DTensor counts apart from its local tensor
                    torch.autograd.graph.increment_version(ctx.wrapper)
        return once_differentiable("token_logprobs", gradient, logits, grad_logprobs, grad_entropy), *none


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
    """:func:`fusedpo.token_logprobs` of logits that are split, padded, or both."""
    wrapper = logits if _checks.is_dtensor(logits) else None
    if wrapper is not None:
        where = shards.placed("logits", logits, -1)
        token_ids, temperature, mask = (
            where.local(name, x) for name, x in (("token_ids", token_ids), ("temperature", temperature), ("mask", mask))
        )
        shard = shards.of_placement("logits", logits, where, -1, tp_group, vocab_start, vocab_size)
        logits = logits.to_local()  # type: ignore[attr-defined]
    else:
        _checks.floating("logits", logits)
        if logits.dim() < 1:
            raise ValueError(f"logits must have shape [..., V], got {list(logits.shape)}")
        shard = shards.of_arguments("logits", logits.shape[-1], tp_group, vocab_start, vocab_size)
    _checks.floating("logits", logits)
    token_ids, temperature, mask = _checks.taken(token_ids, temperature, mask)
    _check_rows(logits.shape[:-1], logits, "logits", token_ids, temperature, mask)
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    ids, t, kept = prepared(logits, token_ids, temperature, mask)
    shards.check_same_rows(shard, ids, kept, t)
    backend = backends.choose("row_stats", logits.device.type, logits.dtype)
    in_place = inplace_backward and not ops.must_be_functional() and not ops.may_overlap(logits)
    args = (logits, ids, t, kept, shard, return_entropy, in_place, backend, wrapper)
    logprobs, entropy = ops.apply("token_logprobs", _ShardedLogprobs, *args)
    return (logprobs, entropy) if return_entropy else logprobs


def prepared(
    source: Tensor, token_ids: Tensor, temperature: float | Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, temperature and mask as the operators take them; float64 for float64, which the reference computes."""
    dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor):
        t = temperature.detach().to(dtype)
    elif dtype == torch.float64:
        t = torch.full((), temperature, dtype=dtype, device=source.device)
    else:
        t = ops.scalar(temperature, source.device)
    return token_ids.to(torch.int64), t, as_bool(mask)
