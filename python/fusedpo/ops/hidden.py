"""From hidden states: the logits of one chunk of rows at a time, in a workspace that all chunks use.

Matrix products are PyTorch's; between them the row kernels turn a chunk of logits into log-probs and, in place, into
its own gradient. ``hidden`` is ``[*tokens, H]``, ``weight`` ``[V, H]``, ``bias`` ``[V]``; ``rows`` (int64, ascending
positions among the flattened tokens) are those that are evaluated, all others cost nothing. A temperature is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, objectives
from .._batch import Batch
from ..objectives import Objective
from ..reference import row_stats
from ..reference.layout import layout
from . import apply, are_batched, is_transformed, must_be_functional, once_differentiable
from . import policy_loss as ops_policy_loss
from .active_columns import gradient_of_active
from .one_pass import GradientsWithLoss, keep

# Every chunk streams the weight and its gradient once: against that its products must be large.
WORKSPACE_BYTES = {"cpu": 1 << 28}
OTHER_WORKSPACE_BYTES = 1 << 30
BLOCK_BYTES = 1 << 21  # stays in a core's L2
GATHERED_BYTES = 1 << 23  # of a matrix whose rows are gathered for a product, which is a sum over parts of them
UNROUNDED_BYTES = 1 << 26  # where each part of the sum would be rounded


class Options(NamedTuple):
    """``logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)``, ``chunk_tokens`` at a time."""

    dtype: torch.dtype  # of the products and of the logits
    softcap: float | None
    logit_scale: float
    chunk_tokens: int | None
    gradient_threshold: float | None = None  # leaves out what is smaller in the gradient of the logits


class Inputs(NamedTuple):
    """``token_ids`` int64, ``temperature`` ``[]`` or ``[*tokens]``; the others as above."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    token_ids: Tensor
    temperature: Tensor
    rows: Tensor

    @classmethod
    def first_of(cls, args: Sequence[Any]) -> tuple[Inputs, Sequence[Any]]:
        """And the other arguments of an autograd Function, which sees the tensors that are its own arguments alone."""
        return cls(*args[: len(cls._fields)]), args[len(cls._fields) :]


def is_autocast_enabled(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products: as in ``F.linear``, autocast has the first word."""
    device, dtype = hidden.device.type, hidden.dtype
    if is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    # on the CPU, float16 products take up to a hundred times as long as float32 ones
    return torch.float32 if device == "cpu" and dtype == torch.float16 else dtype


def choose(hidden: Tensor, dtype: torch.dtype, *, opaque: bool = False) -> str:
    """The backend that computes from hidden states: the reference where kernels, which work in place, are not allowed.

    ``opaque``: the caller takes the operators of :mod:`fusedpo.ops.opaque_hidden` where :func:`is_opaque` says so, and
    needs the reference for functorch alone.
    """
    backend = backends.choose("linear_token_logprobs", hidden.device.type, dtype)
    allowed = not is_transformed() if opaque else not must_be_functional(hidden)
    if backend == "reference" or allowed:
        return backend
    if backends.forced() is not None:
        raise backends.BackendUnavailable(
            f"backend {backend!r} was forced for linear_token_logprobs, but its kernels work in place, which no "
            "functorch transform allows: call it outside of them, or force 'reference' or nothing"
        )
    return "reference"


def is_opaque(hidden: Tensor) -> bool:
    """Whether an operator without side effects has to stand for the kernels: under a tracer, and without data."""
    return must_be_functional(hidden)


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
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, options: Options, *, gradients: bool
    ) -> None:
        size, dtype = weight.shape[0], options.dtype
        self.hidden = hidden.detach().reshape(-1, hidden.shape[-1])
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.capped = options.softcap is not None
        self.factor = options.logit_scale / (options.softcap or 1)
        self.rows = rows
        self.threshold = options.gradient_threshold

        chunk = options.chunk_tokens
        if chunk is None:
            buffers = 2 if self.capped and gradients else 1
            chunk = chunk_rows(rows.numel(), buffers * size * dtype.itemsize, hidden.device.type)
        chunk = max(1, min(chunk, rows.numel()))
        self.chunks = [slice(first, first + chunk) for first in range(0, rows.numel(), chunk)]
        self._workspace = weight.new_empty((chunk, size), dtype=dtype)
        self._uncapped = torch.empty_like(self._workspace) if self.capped and gradients else None

    def walk(self, *, backwards: bool = False) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The rows of each chunk, their hidden states, and their logits in the workspace."""
        for chunk in reversed(self.chunks) if backwards else self.chunks:
            rows = self.rows[chunk]
            hidden = self.rows_of(rows)
            yield rows, hidden, self.logits(hidden)

    def rows_of(self, rows: Tensor) -> Tensor:
        return self.hidden.index_select(0, rows).to(self.weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """In the workspace, where they stay until the next call."""
        out = self._workspace[: hidden.shape[0]]
        product = out if self._uncapped is None else self._uncapped[: hidden.shape[0]]
        shift, beta = (product, 0.0) if self.bias is None else (self.bias, self.factor)
        torch.addmm(shift, hidden, self.weight.t(), beta=beta, alpha=self.factor, out=product)
        return torch.tanh(product, out=out) if self.capped else out

    def through_cap(self, gradient: Tensor, columns: Tensor | None = None) -> Tensor:
        """From the gradient of the logits, or of some ``columns``, to that of what was capped, in place."""
        if self._uncapped is None:
            return gradient
        # 1 - tanh(x)**2 has no digits left where tanh(x) is rounded to 1
        uncapped = self._uncapped[: gradient.shape[0]]
        cosh = (uncapped if columns is None else uncapped.index_select(1, columns)).cosh_()
        return gradient.div_(cosh).div_(cosh)


class _Gradients:
    """Of hidden states, weight and bias, as far as ``needed``: summed in float32 over the chunks, then rounded.

    ``dropped``: the largest probability that the gradient of a row was left without.
    ``vocab_start``: the column of the vocabulary that the first row of the weight is.
    """

    vocab_start = 0

    def __init__(self, head: _Head, needed: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None):
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
        self.dropped = torch.zeros((), device=device)

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

    def add_columns(self, rows: Tensor, hidden: Tensor, grad_logits: Tensor, columns: Tensor) -> None:
        """The same where the gradient of other ``columns`` of the logits than those of ``grad_logits`` is left out."""
        head, grad_logits = self.head, self.head.through_cap(grad_logits, columns)
        if self.hidden is not None:
            product = _product_of_rows(grad_logits, head.weight, columns, head.factor)
            self.hidden.index_copy_(0, rows, product.to(self.hidden.dtype))
        self.hidden_is_there()
        if self.weight is not None:
            _add_rows(self.weight, columns, grad_logits.t(), hidden, head.factor, self.first)
        if self.bias is not None:
            ones = hidden.new_ones((hidden.shape[0], 1))
            _add_rows(self.bias, columns, grad_logits.t(), ones, head.factor, self.first)
        self.first = False

    def add_chunk(
        self,
        rows: Tensor,
        hidden: Tensor,
        logits: Tensor,
        upstream: Sequence[Tensor | None],
        token_ids: Tensor,
        temperature: Tensor,
        stats: Tensor,
        backend: str,
    ) -> None:
        """From the ``logits`` (overwritten) of a chunk, and what arrives at log-probs and entropy of its rows.

        With a threshold, products are of the columns that are active, unless these are too many to gain by that.
        """
        threshold, given = self.head.threshold, (logits, token_ids, temperature, stats)
        found = None
        if threshold is not None:
            found = gradient_of_active(upstream, *given, threshold=threshold, backend=backend)
        if found is None:
            arguments = (*upstream, logits, token_ids, temperature, None, stats)
            if backend == "reference":
                backward: Any = row_stats.token_logprobs_backward
                logits = backward(*arguments, vocab_start=self.vocab_start)
            else:
                backward = getattr(torch.ops.fusedpo.token_logprobs_backward_out, backend)
                backward(*arguments, logits, vocab_start=self.vocab_start)
            self.add(rows, hidden, logits)
        else:
            columns, dropped = found
            self.dropped = torch.maximum(self.dropped, dropped.max())
            self.add_columns(rows, hidden, logits[:, : columns.numel()], columns)

    def hidden_is_there(self) -> None:
        """Called once a chunk; what is split over ranks adds them up."""

    def rounded(self) -> list[Tensor | None]:
        return [
            None if gradient is None or of is None else gradient.to(of.dtype).reshape(of.shape)
            for gradient, of in zip((self.hidden, self.weight, self.bias), self.inputs, strict=True)
        ]


def _parts(size: int, bytes_each: int, most: int = GATHERED_BYTES) -> list[slice]:
    """Of ``size`` rows or columns, as many at a time as fit into ``most`` bytes."""
    step = max(1, most // max(1, bytes_each))
    return [slice(first, first + step) for first in range(0, size, step)]


def _product_of_rows(left: Tensor, matrix: Tensor, rows: Tensor, factor: float) -> Tensor:
    """``factor * left @ matrix[rows]``."""
    product = left.new_zeros((left.shape[0], matrix.shape[1]))
    if left.element_size() >= 4:
        for part in _parts(rows.numel(), matrix.shape[1] * matrix.element_size()):
            _add_product(product, left[:, part], matrix.index_select(0, rows[part]), factor, part.start == 0)
    else:
        for part in _parts(matrix.shape[1], rows.numel() * matrix.element_size(), UNROUNDED_BYTES):
            of_part = matrix[:, part].index_select(0, rows)
            product[:, part] = torch.addmm(product[:, part], left, of_part, beta=0, alpha=factor)
    return product


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float, first: bool) -> None:
    """``total += factor * left @ right``; if ``first``, whatever ``total`` held is nothing."""
    beta = 0 if first else 1
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=beta, alpha=factor, out=total)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, alpha=factor, out=total)
    else:
        # No product of bfloat16 matrices gives float32 on the CPU. One of float32 copies takes 4.6x as long as the bare
        # one (512 rows, AVX-512 BF16). Adding rounded products in float32, while they are in L2, takes 1.2x to 1.4x,
        # and loses no more than the rounding of the logits' gradient did before.
        step = max(1, BLOCK_BYTES // (right.shape[1] * right.element_size()))
        rounded = right.new_empty((min(step, total.shape[0]), right.shape[1]))
        for block, rows in zip(total.split(step), left.split(step), strict=True):
            product = torch.mm(rows, right, out=rounded[: rows.shape[0]])
            if first:
                block.copy_(product)
                if factor != 1:
                    block.mul_(factor)
            else:
                block.add_(product, alpha=factor)


def _add_rows(total: Tensor, rows: Tensor, left: Tensor, right: Tensor, factor: float, first: bool) -> None:
    """``total[rows] += factor * left @ right``; if ``first``, whatever ``total`` held is nothing."""
    if first:
        total.zero_()
    for part in _parts(rows.numel(), right.shape[1] * total.element_size()):
        of_part = rows[part]
        sums = total.new_empty((of_part.numel(), right.shape[1])) if first else total.index_select(0, of_part)
        _add_product(sums, left[part], right, factor, first)
        total.index_copy_(0, of_part, sums)


def logprobs_of(inputs: Inputs, options: Options, return_entropy: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropy (``[0]`` if it is not asked for), and ``stats`` ``[tokens, 3]``, written at ``rows``."""
    hidden, weight, bias, token_ids, temperature, rows = inputs
    operator = getattr(torch.ops.fusedpo.token_logprobs, backend)
    leading = hidden.shape[:-1]
    ids, temperature = _per_row(token_ids, leading), _per_row(temperature, leading)
    logprobs = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    entropy = logprobs.new_zeros(ids.shape[0] if return_entropy else 0)
    stats = logprobs.new_empty((ids.shape[0], 3))
    with _plain(hidden):
        head = _Head(hidden, weight, bias, rows, options, gradients=False)
        for at, _, logits in head.walk():
            results = operator(logits, ids[at], _select(temperature, at), None, return_entropy)
            logprobs[at], stats[at] = results[0], results[2]
            if return_entropy:
                entropy[at] = results[1]
    return logprobs.reshape(token_ids.shape), entropy.reshape(leading if return_entropy else 0), stats


def gradients_of_logprobs(
    upstream: Sequence[Tensor | None],
    inputs: Inputs,
    stats: Tensor,
    options: Options,
    needed: Sequence[bool],
    backend: str,
    sums: Callable[..., _Gradients] = _Gradients,
) -> tuple[list[Tensor | None], Tensor]:
    """Of hidden, weight and bias, and the largest probability that a row was left without.

    ``upstream``: the gradients of the log-probs and of the entropy, each may be None. ``sums`` makes what adds up the
    chunks.
    """
    hidden, weight, bias, token_ids, temperature, rows = inputs
    leading = hidden.shape[:-1]
    ids, temperature = _per_row(token_ids, leading), _per_row(temperature, leading)
    flat = [None if g is None else _per_row(g.detach(), leading) for g in upstream]
    with _plain(hidden):
        head = _Head(hidden, weight, bias, rows, options, gradients=True)
        gradients = sums(head, needed, hidden, weight, bias)
        for at, states, logits in head.walk():
            grads = [None if g is None else g[at] for g in flat]
            gradients.add_chunk(at, states, logits, grads, ids[at], _select(temperature, at), stats[at], backend)
        return gradients.rounded(), gradients.dropped


class _LinearTokenLogprobs(torch.autograd.Function):
    """Keeps three numbers of each row; the backward computes the logits again.

    Old-style, as :class:`GradientsWithLoss`: what must be functional does not come here. ``dropped``, if it is given,
    is overwritten by the backward.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        inputs, (options, return_entropy, dropped, backend) = Inputs.first_of(args)
        logprobs, entropy, stats = logprobs_of(inputs, options, return_entropy, backend)
        ctx.options, ctx.dropped, ctx.backend = options, dropped, backend
        ctx.save_for_backward(*inputs, stats)
        ctx.set_materialize_grads(False)
        if not return_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Tensor | None) -> Any:
        none = (None,) * (len(ctx.needs_input_grad) - 3)
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, *none
        if are_batched(grad_logprobs, grad_entropy):
            raise NotImplementedError(
                "linear_token_logprobs: is_grads_batched is not supported, the kernels work in place; use "
                "fusedpo.backend('reference') for it, or torch.func.jacrev"
            )
        *tensors, stats = ctx.saved_tensors
        inputs, upstream = Inputs(*tensors), (grad_logprobs, grad_entropy)
        results, dropped = gradients_of_logprobs(
            upstream, inputs, stats, ctx.options, ctx.needs_input_grad[:3], ctx.backend
        )
        if ctx.dropped is not None:
            ctx.dropped.copy_(dropped)
        return *_once_differentiable("linear_token_logprobs", results, *inputs[:3], *upstream), *none


def loss_and_gradients(
    inputs: Inputs,
    batch: Batch,
    encoded: tuple[Sequence[int], Sequence[float]],
    options: Options,
    needed: Sequence[bool],
    backend: str,
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """Loss, metrics, log-probs, entropy and the largest probability that a row was left without; and the gradients.

    ``encoded``: the objective (:func:`fusedpo.ops.policy_loss.encode`).
    """
    hidden, weight, bias, token_ids, temperature, rows = inputs
    operators, threshold = torch.ops.fusedpo, options.gradient_threshold
    # two tensors: results of an operator share no memory
    logprobs, entropy = (torch.zeros(token_ids.shape, dtype=torch.float32, device=hidden.device) for _ in range(2))
    ids, temperatures = token_ids.reshape(-1), _per_row(temperature, token_ids.shape)
    arguments = (logprobs, entropy, *batch, *encoded, False)
    if threshold is None:
        scale = ops_policy_loss.token_scale(logprobs, batch, encoded=encoded, backend=backend)
    with _plain(hidden):
        head = _Head(hidden, weight, bias, rows, options, gradients=True)
        gradients = _Gradients(head, needed, hidden, weight, bias)
        for at, states, logits in head.walk(backwards=True):  # windows look ahead
            if threshold is None:
                getattr(operators.one_pass, backend)(
                    *(logits, logits, logprobs, entropy, at, token_ids, temperature, *batch.tokens, scale, *encoded)
                )
                gradients.add(at, states, logits)
                continue
            of_rows = ids[at], _select(temperatures, at)
            results = getattr(operators.token_logprobs, backend)(logits, *of_rows, None, True)
            logprobs.view(-1)[at], entropy.view(-1)[at] = results[:2]
            # of all tokens, which is little against the products; those before the chunk are not used
            coefficients = getattr(operators.policy_loss, backend)(*arguments)[2:4]
            upstream = [c.view(-1)[at] if c.numel() else None for c in coefficients]
            gradients.add_chunk(at, states, logits, upstream, *of_rows, results[2], backend)
        results = gradients.rounded()
    loss, metrics, *_ = getattr(operators.policy_loss, backend)(*arguments)
    return (loss, metrics, logprobs, entropy, gradients.dropped), results


class _OnePass(GradientsWithLoss):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        inputs, (batch, objective, options, backend) = Inputs.first_of(args)
        encoded = ops_policy_loss.encode(objective)
        outputs, results = loss_and_gradients(inputs, batch, encoded, options, ctx.needs_input_grad[:3], backend)
        keep(ctx, "policy_loss_from_hidden", backend, results, *inputs[:3])
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs


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
    inputs: Inputs, *, options: Options, return_entropy: bool, backend: str, dropped: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy of the rows, 0 elsewhere, by the kernels of ``backend``; ids may be ``[*tokens, K]``.

    ``dropped`` (0-d) is overwritten by the backward: the largest probability that the gradient of a row was left
    without.
    """
    args = (*_uncapped(inputs, options), options, return_entropy, dropped, backend)
    return apply("linear_token_logprobs", _LinearTokenLogprobs, *args)


def policy_loss_from_hidden(
    inputs: Inputs, batch: Batch, *, objective: Objective, options: Options, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics, log-probs and entropy, 0 at tokens that are not in the rows; ``batch`` as kernels take it.

    And the largest probability that the gradient of a row was left without.
    """
    args = (*_uncapped(inputs, options), batch, objective, options, backend)
    return apply("policy_loss_from_hidden", _OnePass, *args)
