"""From hidden states with a column-parallel head: each rank holds ``weight`` ``[V_r, H]`` and ``bias`` ``[V_r]``.

Logits are computed chunk by chunk, each rank's in chunks of its own; what is sent of all rows goes in one gather. The
backward computes the logits again. A rank's product with its columns is a part of the gradient of the hidden states,
whose sum over the ranks begins while the gradient of the weight is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import _checks, backends, logprobs, ops
from ..ops import hidden as ops_hidden
from . import shards
from .collectives import Pending, PendingSum, gather
from .shards import Shard
from .tensor import operators, prepared

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# "replicated": the same on all ranks. "sequence": each rank has a part of the tokens. "summed": whoever gave them adds
# up their gradient, as DTensor does.
How = Literal["replicated", "sequence", "summed"]


_LOCAL = "hidden.to_local(), whose backward takes the gradient for one that is placed alike"


class Split(NamedTuple):
    shard: Shard
    how: How


class _Gradients(ops_hidden._Gradients):
    """Starts the sum of the gradient of the hidden states as soon as that of the last chunk is there."""

    def __init__(self, head: ops_hidden._Head, needed: Sequence[bool], *inputs: Any, split: Split) -> None:
        super().__init__(head, needed, *inputs)
        self.split, self.left, self.vocab_start = split, len(head.chunks), split.shard.start
        self.pending: PendingSum | None = None
        if not head.chunks:
            self.start()

    def hidden_is_there(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.start()

    def start(self) -> None:
        shard, how = self.split
        if self.hidden is None or shard.group is None or how == "summed":
            return
        hidden = self.hidden.reshape(self.inputs[0].shape)
        if how == "sequence":
            self.pending = PendingSum(_parts(hidden, shard.group.size()).contiguous(), shard.group, scattered=True)
        else:
            self.pending = PendingSum(hidden, shard.group)

    def rounded(self) -> list[Tensor | None]:
        hidden, *others = super().rounded()
        if self.pending is not None:
            hidden = self.pending.wait()
            if self.split.how == "sequence":
                hidden = hidden.squeeze(0)
        return [hidden, *others]


def _parts(whole: Tensor, ranks: int) -> Tensor:
    """``[*, T, H]`` to ``[P, *, T / P, H]``."""
    return torch.stack(whole.chunk(ranks, -2))


class _ShardedLinear(torch.autograd.Function):
    """Keeps three numbers of each row. Old-style, as all that work in place."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        inputs, (split, options, return_entropy, backend) = ops_hidden.Inputs.first_of(args)
        hidden, weight, bias, token_ids, temperature, rows = inputs
        shard, of = split.shard, operators(backend)
        if split.how == "sequence":
            assert shard.group is not None
            gathered = gather(hidden.detach(), shard.group)
            hidden = torch.cat(gathered.unbind(), -2)
        leading = hidden.shape[:-1]
        ids, t = (ops_hidden._per_row(x, leading) for x in (token_ids, temperature))
        ids_of, t_of = ids[rows], ops_hidden._select(t, rows)
        valid = weight.detach()[: shard.valid], None if bias is None else bias.detach()[: shard.valid]
        header = (shard.start, shard.width, shard.vocab_size, return_entropy)
        with ops_hidden._plain(hidden):
            head = ops_hidden._Head(hidden, *valid, rows, options, gradients=False)
            pieces = [
                of.row_stats(logits, ids[at], ops_hidden._select(t, at), None, *header) for at, _, logits in head.walk()
            ]
            if not pieces:
                nothing = head.hidden.new_empty((0, shard.valid), dtype=options.dtype)
                pieces.append(of.row_stats(nothing, ids_of, t_of, None, *header))
        parts = torch.cat([pieces[0], *(piece[1:] for piece in pieces[1:])])
        of_ranks = parts[None] if shard.group is None else Pending(parts, shard.group).wait()
        size = shards.check_headers(of_ranks)
        if size is not None:
            logprobs._check_values(ids_of, size, 1.0, None)
        found, entropies, stats_of = of.merge_row_stats(of_ranks, t_of, None, return_entropy)
        result = found.new_zeros(ids.shape)
        result[rows] = found.reshape(ids_of.shape)
        stats = stats_of.new_empty((ids.shape[0], 3))
        stats[rows] = stats_of
        entropy = found.new_zeros(ids.shape[0] if return_entropy else 0)
        if return_entropy:
            entropy[rows] = entropies
        ctx.split, ctx.options, ctx.return_entropy, ctx.backend = split, options, return_entropy, backend
        ctx.save_for_backward(hidden, weight, bias, token_ids, temperature, rows, stats)
        ctx.set_materialize_grads(False)
        if not return_entropy:
            ctx.mark_non_differentiable(entropy)
        return result.reshape(token_ids.shape), entropy.reshape(leading if return_entropy else 0)

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        none = (None,) * 7
        if not ctx.return_entropy:
            grad_entropy = None
        hidden, weight, bias, *of_rows, stats = ctx.saved_tensors
        if grad_logprobs is None and grad_entropy is None:  # nothing depends on it, here and on the other ranks
            return None, None, None, *none
        shard, upstream = ctx.split.shard, (grad_logprobs, grad_entropy)
        valid = weight.detach()[: shard.valid], None if bias is None else bias.detach()[: shard.valid]
        results, _ = ops_hidden.gradients_of_logprobs(
            upstream,
            ops_hidden.Inputs(hidden, *valid, *of_rows),
            stats,
            ctx.options,
            ctx.needs_input_grad[:3],
            ctx.backend,
            functools.partial(_Gradients, split=ctx.split),
        )
        padding = weight.shape[0] - shard.valid
        if padding:
            results[1:] = [
                None if g is None else torch.cat((g, g.new_zeros(padding, *g.shape[1:]))) for g in results[1:]
            ]
        sources = (hidden, weight, bias, *upstream)
        return *ops_hidden._once_differentiable("linear_token_logprobs", results, *sources), *none


class Inputs(NamedTuple):
    """Local tensors, and how they are split."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    split: Split
    rows: shards.Placed | None  # where the rows lie, if hidden states are a DTensor


def local_inputs(
    hidden: Any, weight: Any, bias: Any, tp_group: ProcessGroup | None, vocab_start: int | None, vocab_size: int | None
) -> Inputs:
    """From DTensors to what this rank holds; their gradients are placed as they are."""
    how: How = "replicated"
    rows = None
    if _checks.is_dtensor(weight):
        hidden, weight, bias, shard, rows, how = _placed(hidden, weight, bias, tp_group, vocab_start, vocab_size)
    else:
        for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if x is not None:
                _checks.floating(name, x)
        if weight.dim() != 2:
            raise ValueError(f"weight must have shape [V, H], got {list(weight.shape)}")
        shard = shards.of_arguments("weight", weight.shape[0], tp_group, vocab_start, vocab_size)
    return Inputs(hidden, weight, bias, Split(shard, how), rows)


def _placed(
    hidden: Any, weight: Any, bias: Any, tp_group: Any, vocab_start: int | None, vocab_size: int | None
) -> tuple[Any, Any, Any, Shard, shards.Placed | None, How]:
    from torch.distributed.tensor import Partial
    from torch.distributed.tensor import Shard as Along

    if tp_group is None and not _checks.is_dtensor(hidden):
        raise TypeError(
            "weight must be a whole plain tensor, got a DTensor, which FSDP2 makes as well as tensor parallelism: with "
            f"the latter, give tp_group or hidden states that are a DTensor; otherwise {_checks.WAYS_TO_GATHER}"
        )
    where = shards.placed("weight", weight, 0, rows=False)
    shard = shards.of_placement("weight", weight, where, 0, tp_group, vocab_start, vocab_size)
    if bias is not None and _checks.is_dtensor(bias):
        if bias.device_mesh != where.mesh or tuple(bias.placements) != tuple(weight.placements):
            raise TypeError(f"bias must be placed like weight, {list(weight.placements)}, got {list(bias.placements)}")
    elif bias is not None:
        _checks.floating("bias", bias)
    if not _checks.is_dtensor(hidden):
        if where.mesh.ndim > 1:
            raise TypeError(
                "hidden must be a DTensor where weight is one on a mesh of several dimensions, or weight one on the "
                "dimension of the vocabulary alone: nothing else says which dimensions split the rows"
            )
        local = (weight.to_local(), bias.to_local() if _checks.is_dtensor(bias) else bias)
        return hidden, *local, shard, None, "replicated"
    rows = rows_of(hidden, weight)
    around = rows.rows
    partial = [Partial() if dim == where.dim else p for dim, p in enumerate(around)]
    states = hidden.redistribute(placements=around).to_local(grad_placements=partial)
    # ranks that hold other rows have another part of the sum
    of_weight = [Partial() if isinstance(a, Along) else p for a, p in zip(around, weight.placements, strict=True)]
    local_bias = bias.to_local(grad_placements=of_weight) if _checks.is_dtensor(bias) else bias
    return states, weight.to_local(grad_placements=of_weight), local_bias, shard, rows, "summed"


def rows_of(hidden: Any, weight: Any) -> shards.Placed:
    """Where the rows of two DTensors lie once each rank of the vocabulary's dimension has all of them."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Along

    if not _checks.is_dtensor(weight):
        raise TypeError(f"hidden must be a plain tensor where weight is one, got a DTensor: {_LOCAL}")
    where = shards.placed("weight", weight, 0, rows=False)
    if hidden.device_mesh != where.mesh:
        raise TypeError(f"hidden and weight must be on one mesh, got {hidden.device_mesh} and {where.mesh}")
    for placement in hidden.placements:
        along = isinstance(placement, Along) and placement.dim % hidden.dim() < hidden.dim() - 1
        if type(placement) not in (Along, Replicate) or not (along or isinstance(placement, Replicate)):
            raise TypeError(f"hidden must be split along its rows alone, got {list(hidden.placements)}")
    around = [Replicate() if dim == where.dim else p for dim, p in enumerate(hidden.placements)]
    return shards.Placed(where.mesh, where.dim, tuple(around))


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
    tp_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    num_live: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`fusedpo.linear_token_logprobs` with a head that is split, padded, or both."""
    inputs = local_inputs(hidden, weight, bias, tp_group, vocab_start, vocab_size)
    if inputs.rows is not None:
        named = (("token_ids", token_ids), ("temperature", temperature), ("mask", mask))
        token_ids, temperature, mask = (inputs.rows.local(name, x) for name, x in named)
    token_ids, temperature, mask, softcap, logit_scale, chunk_tokens = _checks.taken(
        token_ids, temperature, mask, softcap, logit_scale, chunk_tokens
    )
    hidden, weight, bias, (shard, how), _ = inputs
    if shard.group is not None and how == "replicated" and is_part(hidden, token_ids, shard.group.size()):
        how = "sequence"
    logprobs._check_linear(hidden, weight, bias, split=True)
    logprobs._check_rows(_rows(hidden, shard, how), hidden, "hidden", token_ids, temperature, mask)
    logprobs._check_values(torch.zeros_like(token_ids), 1, temperature, mask)  # ids once the vocabulary is known
    options = logprobs.head_options(hidden, softcap, logit_scale, chunk_tokens)
    hidden, weight, bias = logprobs.taken_if_differentiated(hidden, weight, bias)
    backend = backends.choose("row_stats", hidden.device.type, options.dtype)
    ids, t, kept = prepared(hidden, token_ids, temperature, mask)
    shards.check_same_rows(shard, ids, kept, t)
    count = kept.numel() if kept is not None else t.numel() if t.dim() else _rows(hidden, shard, how).numel()
    rows = ops_hidden.rows_where(kept, count, hidden.device, num_live)
    t = ops_hidden._uncapped_temperature(t, options)
    args = (hidden, weight, bias, ids, t, rows, Split(shard, how), options, return_entropy, backend)
    found, entropy = ops.apply("linear_token_logprobs", _ShardedLinear, *args)
    return (found, entropy) if return_entropy else found


def _rows(hidden: Tensor, shard: Shard, how: How) -> torch.Size:
    """Those of all ranks."""
    rows = hidden.shape[:-1]
    if how != "sequence":
        return rows
    assert shard.group is not None
    return torch.Size((*rows[:-1], rows[-1] * shard.group.size()))


def is_part(hidden: Tensor, token_ids: Tensor, ranks: int) -> bool:
    """Whether ``hidden`` holds the part of the tokens of one rank, along its last dimension but one."""
    leading = hidden.shape[:-1]
    whole = (*leading[:-1], leading[-1] * ranks) if leading else ()
    return len(leading) > 0 and leading != token_ids.shape[: len(leading)] and token_ids.shape[: len(leading)] == whole
