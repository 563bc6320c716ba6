"""From hidden states: the logits of one chunk of rows at a time, in a workspace that all chunks use.

Matrix products are PyTorch's; between them the row kernels turn a chunk of logits into log-probs and, in place, into
its own gradient. ``hidden`` is ``[*tokens, H]``, ``weight`` ``[V, H]``, ``bias`` ``[V]``; ``rows`` (int64, ascending
positions among the flattened tokens) are those that are evaluated, all others cost nothing. A temperature is float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, objectives
from .._batch import Batch
from ..objectives import Objective
from ..reference.layout import layout
from . import apply, are_batched, edge_to, must_be_functional, once_differentiable
from . import policy_loss as ops_policy_loss
from .one_pass import scaled_once

# Every chunk streams the weight and its gradient once: against that its products must be large.
WORKSPACE_BYTES = {"cpu": 1 << 28}
OTHER_WORKSPACE_BYTES = 1 << 30
BLOCK_BYTES = 1 << 20  # stays in a core's L2


class Options(NamedTuple):
    """``logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)``, ``chunk_tokens`` at a time."""

    dtype: torch.dtype  # of the products and of the logits
    softcap: float | None
    logit_scale: float
    chunk_tokens: int | None


class Inputs(NamedTuple):
    """``token_ids`` int64, ``temperature`` ``[]`` or ``[*tokens]``; the others as above."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    token_ids: Tensor
    temperature: Tensor
    rows: Tensor


def is_autocast_enabled(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products: as in ``F.linear``, autocast has the first word."""
    device, dtype = hidden.device.type, hidden.dtype
    if is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    # on the CPU, float16 products take up to a hundred times as long as float32 ones
    return torch.float32 if device == "cpu" and dtype == torch.float16 else dtype


def choose(hidden: Tensor, dtype: torch.dtype) -> str:
    """The backend that computes from hidden states: where that must be functional the reference, kernels are not."""
    backend = backends.choose("linear_token_logprobs", hidden.device.type, dtype)
    if backend == "reference" or not must_be_functional(hidden):
        return backend
    if backends.forced() is not None:
        raise backends.BackendUnavailable(
            f"backend {backend!r} was forced for linear_token_logprobs, but its kernels work in place, which neither "
            "torch.compile nor a functorch transform nor fake tensors allow: call it outside of them, or force "
            "'reference' or nothing"
        )
    if torch.compiler.is_compiling():
        _warn_of_reference(backend)
    return "reference"


_warned_of_reference = False


def _warn_of_reference(backend: str) -> None:
    """Once per process, and while a graph is traced, which it does not become a part of."""
    global _warned_of_reference
    if not _warned_of_reference:
        _warned_of_reference = True
        warnings.warn(
            "policy_loss_from_hidden and linear_token_logprobs under torch.compile are the reference, which takes more "
            f"time and memory than the {backend} kernels: these work in place. Call them outside of what is compiled",
            stacklevel=2,
        )


# What torch.compiler.assume_constant_result does, which would import the compiler, and Triton, for everybody.
_warn_of_reference._dynamo_marked_constant = True  # type: ignore[attr-defined]


def chunk_rows(rows: int, row_bytes: int, device: str) -> int:
    """How many of the ``rows`` make a chunk: as few chunks as the workspace allows, of equal size."""
    most = max(1, WORKSPACE_BYTES.get(device, OTHER_WORKSPACE_BYTES) // max(1, row_bytes))
    chunks = -(-rows // most)
    return -(-rows // chunks) if chunks > 1 else rows


def evaluated_tokens(token_ids: Tensor, batch: Batch, objective: Objective) -> Tensor | None:
    """The mask of the tokens on which the loss or its gradient depends: ``mask`` itself where these are all it keeps.

    Where the policy term of a token with the advantage 0 vanishes and the loss has no other, its log-prob matters only
    to those whose term looks at it.
    """
    ratio, region = objective.ratio, objective.trust_region
    if objective.kl is not None or objective.entropy_coef != 0 or not region.vanishes:
        return batch.mask
    where = layout(token_ids, batch.cu_seqlens)
    kept = where.kept(batch.mask)
    moving = kept & (where.per_token(batch.advantages) != 0)
    back, ahead = ("all", "all") if "all" in objectives.reach(region) else objectives.reach(ratio)
    count = moving.long()
    looked_at = where.sum_before(count, ahead) + where.sum_after(count, back)
    return (moving | (kept & (looked_at > 0))).reshape(token_ids.shape)


def rows_where(mask: Tensor | None, count: int, device: torch.device, num_live: int | None = None) -> Tensor:
    """``rows`` of the ``count`` tokens that ``mask`` (bool) keeps. How many costs a host sync unless it is given."""
    if mask is None:
        return torch.arange(count, device=device)
    if num_live is None:
        return mask.flatten().nonzero().squeeze(1)
    return torch.nonzero_static(mask.flatten(), size=num_live).squeeze(1)


@contextmanager
def _plain(tensor: Tensor) -> Iterator[None]:
    """Neither autograd nor autocast: products into given memory know neither."""
    with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        yield


class _Head:
    """The last layer of the model, a chunk at a time.

    What the tanh of a softcap gives is not multiplied by it, which would be a sweep over the logits: the temperature is
    divided by it (:func:`_uncapped_temperature`).
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        options: Options,
        *,
        gradients: bool,
    ) -> None:
        size, dtype = weight.shape[0], options.dtype
        self.hidden = hidden.detach().reshape(-1, hidden.shape[-1])
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.capped = options.softcap is not None
        self.factor = options.logit_scale / (options.softcap or 1)

        chunk = options.chunk_tokens
        if chunk is None:
            buffers = 2 if self.capped and gradients else 1
            chunk = chunk_rows(rows.numel(), buffers * size * dtype.itemsize, hidden.device.type)
        chunk = max(1, min(chunk, rows.numel()))
        self.chunks = [slice(first, first + chunk) for first in range(0, rows.numel(), chunk)]
        self._workspace = weight.new_empty((chunk, size), dtype=dtype)
        self._uncapped = torch.empty_like(self._workspace) if self.capped and gradients else None

    def rows_of(self, rows: Tensor) -> Tensor:
        return self.hidden.index_select(0, rows).to(self.weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """In the workspace, where they stay until the next call."""
        out = self._workspace[: hidden.shape[0]]
        product = out if self._uncapped is None else self._uncapped[: hidden.shape[0]]
        shift, beta = (product, 0.0) if self.bias is None else (self.bias, self.factor)
        torch.addmm(shift, hidden, self.weight.t(), beta=beta, alpha=self.factor, out=product)
        return torch.tanh(product, out=out) if self.capped else out

    def through_cap(self, gradient: Tensor) -> Tensor:
        """From the gradient of the logits to that of what was capped, in place."""
        if self._uncapped is None:
            return gradient
        # 1 - tanh(x)**2 has no digits left where tanh(x) is rounded to 1
        cosh = self._uncapped[: gradient.shape[0]].cosh_()
        return gradient.div_(cosh).div_(cosh)


class _Gradients:
    """Of hidden states, weight and bias, as far as ``needed``: summed in float32 over the chunks, then rounded."""

    def __init__(self, head: _Head, needed: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None):
        self.head, self.inputs = head, (hidden, weight, bias)
        self.first = True  # no chunk is added yet, and the sums hold whatever the memory held
        allocate = torch.empty if head.chunks else torch.zeros
        one_product = len(head.chunks) == 1 and weight.dtype == head.weight.dtype
        sum_dtype = weight.dtype if one_product else torch.promote_types(weight.dtype, torch.float32)
        device, vocab = hidden.device, weight.shape[0]
        self.hidden = head.hidden.new_zeros(head.hidden.shape) if needed[0] else None
        self.weight = allocate(weight.shape, dtype=sum_dtype, device=device) if needed[1] else None
        bias_dtype = torch.promote_types(weight.dtype, torch.float32)
        self.bias = allocate((vocab, 1), dtype=bias_dtype, device=device) if needed[2] else None

    def add(self, rows: Tensor, hidden: Tensor, grad_logits: Tensor) -> None:
        """``hidden`` and ``grad_logits`` (overwritten) of a chunk."""
        head, grad_logits = self.head, self.head.through_cap(grad_logits)
        if self.hidden is not None:
            product = torch.addmm(hidden, grad_logits, head.weight, beta=0, alpha=head.factor)
            self.hidden.index_copy_(0, rows, product.to(self.hidden.dtype))
        self.hidden_is_there()
        if self.weight is not None:
            _add_product(self.weight, grad_logits.t(), hidden, head.factor, self.first)
        if self.bias is not None:
            ones = hidden.new_ones((hidden.shape[0], 1))
            _add_product(self.bias, grad_logits.t(), ones, head.factor, self.first)
        self.first = False

    def hidden_is_there(self) -> None:
        """Called once a chunk; what is split over ranks adds them up."""

    def rounded(self) -> list[Tensor | None]:
        return [
            None if gradient is None or of is None else gradient.to(of.dtype).reshape(of.shape)
            for gradient, of in zip((self.hidden, self.weight, self.bias), self.inputs, strict=True)
        ]


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float, first: bool) -> None:
    """``total += factor * left @ right``; if ``first``, whatever ``total`` held is nothing."""
    beta = 0 if first else 1
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=beta, alpha=factor, out=total)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, alpha=factor, out=total)
    else:
        # No product of bfloat16 matrices gives float32 on the CPU. One of float32 copies takes 4.6x as long as the bare
        # one (512 rows, AVX-512 BF16). Adding rounded products in float32, while they are in L2, takes 1.4x, and loses
        # no more than the rounding of the logits' gradient did before.
        step = max(1, BLOCK_BYTES // (right.shape[1] * right.element_size()))
        for block, rows in zip(total.split(step), left.split(step), strict=True):
            if first:
                block.zero_()
            block.add_(torch.mm(rows, right), alpha=factor)


class _LinearTokenLogprobs(torch.autograd.Function):
    """Keeps three numbers of each row; the backward computes the logits again.

    Old-style, as :class:`_OnePass` is: what must be functional does not come here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        temperature: Tensor,
        rows: Tensor,
        options: Options,
        return_entropy: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        operator = getattr(torch.ops.fusedpo.token_logprobs, backend)
        leading = hidden.shape[:-1]
        ids, temperature = _per_row(token_ids, leading), _per_row(temperature, leading)
        logprobs = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        entropy = logprobs.new_zeros(ids.shape[0] if return_entropy else 0)
        stats = logprobs.new_empty((rows.numel(), 3))
        with _plain(hidden):
            head = _Head(hidden, weight, bias, rows, options, gradients=False)
            for chunk in head.chunks:
                at = rows[chunk]
                logits = head.logits(head.rows_of(at))
                results = operator(logits, ids[at], _select(temperature, at), None, return_entropy)
                logprobs[at], stats[chunk] = results[0], results[2]
                if return_entropy:
                    entropy[at] = results[1]
        ctx.options, ctx.return_entropy, ctx.backend = options, return_entropy, backend
        ctx.save_for_backward(hidden, weight, bias, ids, temperature, rows, stats)
        ctx.set_materialize_grads(False)
        logprobs, entropy = logprobs.reshape(token_ids.shape), entropy.reshape(leading if return_entropy else 0)
        if not return_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: None) -> Any:
        none = (None,) * 6
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, *none
        if are_batched(grad_logprobs, grad_entropy):
            raise NotImplementedError(
                "linear_token_logprobs: is_grads_batched is not supported, the kernels work in place; use "
                "fusedpo.backend('reference') for it, or torch.func.jacrev"
            )
        operator = getattr(torch.ops.fusedpo.token_logprobs_backward_out, ctx.backend)
        hidden, weight, bias, ids, temperature, rows, stats = ctx.saved_tensors
        upstream = [
            None if g is None else _per_row(g.detach(), hidden.shape[:-1]) for g in (grad_logprobs, grad_entropy)
        ]
        with _plain(hidden):
            head = _Head(hidden, weight, bias, rows, ctx.options, gradients=True)
            gradients = _Gradients(head, ctx.needs_input_grad[:3], hidden, weight, bias)
            for chunk in head.chunks:
                at = rows[chunk]
                states = head.rows_of(at)
                logits = head.logits(states)
                grads = (None if g is None else g[at] for g in upstream)
                operator(*grads, logits, ids[at], _select(temperature, at), None, stats[chunk], logits)
                gradients.add(at, states, logits)
            results = gradients.rounded()
        sources = (hidden, weight, bias, grad_logprobs, grad_entropy)
        return *_once_differentiable("linear_token_logprobs", results, *sources), *none


class _OnePass(torch.autograd.Function):
    """The gradients are computed with the loss, and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        temperature: Tensor,
        rows: Tensor,
        batch: Batch,
        objective: Objective,
        options: Options,
        backend: str,
    ) -> tuple[Tensor, ...]:
        operator = getattr(torch.ops.fusedpo.one_pass, backend)
        logprobs, entropy = torch.zeros((2, *token_ids.shape), dtype=torch.float32, device=hidden.device).unbind()
        scale = ops_policy_loss.token_scale(logprobs, batch, objective=objective, backend=backend)
        tokens = (*batch.tokens, scale)
        encoded = ops_policy_loss.encode(objective)
        with _plain(hidden):
            head = _Head(hidden, weight, bias, rows, options, gradients=True)
            gradients = _Gradients(head, ctx.needs_input_grad[:3], hidden, weight, bias)
            for chunk in reversed(head.chunks):  # windows look ahead
                at = rows[chunk]
                states = head.rows_of(at)
                logits = head.logits(states)
                operator(logits, logits, logprobs, entropy, at, token_ids, temperature, *tokens, *encoded)
                gradients.add(at, states, logits)
            results = gradients.rounded()
        loss, metrics = ops_policy_loss.policy_loss(
            logprobs, entropy, batch, objective=objective, per_token=False, backend=backend
        )
        ctx.backend, ctx.taken, ctx.sources = backend, False, [edge_to(x) for x in (hidden, weight, bias)]
        ctx.save_for_backward(*results)
        ctx.mark_non_differentiable(metrics, logprobs, entropy)
        ctx.set_materialize_grads(False)
        return loss, metrics, logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> Any:
        none = (None,) * 7
        if grad_loss is None:
            return None, None, None, *none
        return *scaled_once(ctx, "policy_loss_from_hidden", grad_loss), *none


def _per_row(x: Tensor, leading: torch.Size) -> Tensor:
    """``[*leading, ...]`` to ``[rows, ...]``; one value for all rows as it is."""
    return x if x.dim() == 0 and leading else x.reshape(leading.numel(), *x.shape[len(leading) :])


def _select(x: Tensor, rows: Tensor) -> Tensor:
    return x if x.numel() == 1 else x[rows]


def _once_differentiable(name: str, gradients: list[Tensor | None], *sources: Tensor | None) -> list[Tensor | None]:
    return [None if gradient is None else once_differentiable(name, gradient, *sources) for gradient in gradients]


def _uncapped_temperature(temperature: Tensor, options: Options) -> Tensor:
    """Of logits that were not multiplied by ``softcap``."""
    return temperature if options.softcap is None else temperature / options.softcap


def _uncapped(inputs: Inputs, options: Options) -> Inputs:
    return inputs._replace(temperature=_uncapped_temperature(inputs.temperature, options))


def linear_token_logprobs(
    inputs: Inputs, *, options: Options, return_entropy: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy of the rows, 0 elsewhere, by the kernels of ``backend``; ids may be ``[*tokens, K]``."""
    args = (*_uncapped(inputs, options), options, return_entropy, backend)
    return apply("linear_token_logprobs", _LinearTokenLogprobs, *args)


def policy_loss_from_hidden(
    inputs: Inputs, batch: Batch, *, objective: Objective, options: Options, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics, log-probs and entropy, 0 at tokens that are not in the rows; ``batch`` as kernels take it."""
    args = (*_uncapped(inputs, options), batch, objective, options, backend)
    return apply("policy_loss_from_hidden", _OnePass, *args)
