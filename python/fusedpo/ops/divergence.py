"""The operator ``torch.ops.fusedpo.exact_kl``: KL divergences over the vocabulary, with their gradient.

::

    exact_kl_out(logits, ref_logits, temperature, ref_temperature, mask?, scale, forward, out?) -> kl

* ``logits`` and ``ref_logits`` ``[*tokens, V]``, both float16, bfloat16 or float32, unit stride along V.
* ``temperature`` and ``ref_temperature``, ``[]`` or ``[*tokens]``, and ``scale`` ``[*tokens]`` float32; ``mask`` bool.
* ``kl`` ``[*tokens]`` float32, 0 where masked: ``KL(p || q)``, or ``KL(q || p)`` if ``forward``.
* ``out``: the gradient of the sum of ``kl``, each row times its scale, which may overwrite the logits, not the
  ``ref_logits``. ``exact_kl`` returns it as a second result, ``[0]`` unless its last argument asks for it.

With ``a = log p`` and ``b = log q``, of ``x / T``: the gradient of ``KL(p || q)`` with respect to ``x`` is
``p (a - b - KL) / T``, that of ``KL(q || p)`` is ``(p - q) / T``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import backends
from . import apply, define, implement, once_differentiable, refuse_overwritten
from .active_columns import columns_above
from .hidden import Options, _Gradients, _Head, _once_differentiable, _per_row, _plain, _select, _uncapped_temperature
from .one_pass import GradientsWithLoss, keep

# Two float32 blocks: in a core's cache on the CPU, few launches elsewhere.
BLOCK_ELEMENTS = {"cpu": 1 << 18}
OTHER_BLOCK_ELEMENTS = 1 << 26


_ARGUMENTS = "Tensor ref_logits, Tensor temperature, Tensor ref_temperature, Tensor? mask, Tensor scale, bool forward"
define(
    "exact_kl",
    f"(Tensor logits, {_ARGUMENTS}, bool gradient) -> (Tensor kl, Tensor grad_logits)",
    lambda logits, *args: (
        logits.new_empty(logits.shape[:-1], dtype=torch.float32),
        logits.new_empty(logits.shape if args[-1] else (0,)),
    ),
)
define(
    "exact_kl_out",
    f"(Tensor logits, {_ARGUMENTS}, Tensor(a!)? out) -> Tensor kl",
    lambda logits, *_: logits.new_empty(logits.shape[:-1], dtype=torch.float32),
)


def _exact_kl(backend: str, logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, gradient = args
    out = logits.new_empty(logits.shape) if gradient else None
    kl = getattr(torch.ops.fusedpo.exact_kl_out, backend)(logits, *rest, out)
    return kl, logits.new_empty(0) if out is None else out


implement("exact_kl", _exact_kl)


class Rows(NamedTuple):
    """What belongs to each row of logits ``[*tokens, V]``; all ``[*tokens]``, temperatures ``[]`` or ``[*tokens]``."""

    temperature: Tensor
    ref_temperature: Tensor
    mask: Tensor | None  # bool
    scale: Tensor  # float32: what the gradient is multiplied by

    def part(self, index: int) -> Rows:
        t, ref_t = (x if x.dim() == 0 else x[index] for x in (self.temperature, self.ref_temperature))
        return Rows(t, ref_t, None if self.mask is None else self.mask[index], self.scale[index])


def kl_rows(
    logits: Tensor, ref_logits: Tensor, rows: Rows, direction: str, gradient: Literal["none", "new", "in place"]
) -> tuple[Tensor, Tensor | None]:
    """The divergences, and the gradient that is asked for: by a kernel, or a block of rows at a time by PyTorch."""
    out = None if gradient == "none" else logits if gradient == "in place" else logits.new_empty(logits.shape)
    backend = backends.kernel_for("exact_kl", logits.device.type, logits.dtype)
    if backend is None or logits.dtype != ref_logits.dtype:
        return _by_blocks(logits, ref_logits, rows, direction, out), out
    logits, ref_logits = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (logits, ref_logits))
    args = (logits, ref_logits, *rows, direction == "forward")
    if torch.compiler.is_compiling():  # where writing into `out` could cost a copy of it
        kl, grad_logits = getattr(torch.ops.fusedpo.exact_kl, backend)(*args, out is not None)
        return kl, None if out is None else grad_logits
    return getattr(torch.ops.fusedpo.exact_kl_out, backend)(*args, out), out


def _by_blocks(logits: Tensor, ref_logits: Tensor, rows: Rows, direction: str, gradient: Tensor | None) -> Tensor:
    """``gradient``, which may be ``logits``, is written."""
    result = torch.zeros(logits.shape[:-1], dtype=torch.float32, device=logits.device)
    for index in _matrices(logits.shape):
        part, into = rows, result
        x, y, g = logits, ref_logits, gradient
        for i in index:
            part, into, x, y, g = part.part(i), into[i], x[i], y[i], None if g is None else g[i]
        _matrix(x, y, part, direction, g, into)
    return result


def _matrices(shape: torch.Size) -> Iterator[tuple[int, ...]]:
    """The indices of the leading dimensions that leave ``[rows, V]``: strides need not allow to flatten them."""
    leading = shape[:-2]
    for flat in range(leading.numel()):
        index, rest = [], flat
        for size in reversed(leading):
            index.append(rest % size)
            rest //= size
        yield tuple(reversed(index))


def _matrix(x: Tensor, y: Tensor, rows: Rows, direction: str, gradient: Tensor | None, result: Tensor) -> None:
    step = max(1, BLOCK_ELEMENTS.get(x.device.type, OTHER_BLOCK_ELEMENTS) // x.shape[1])
    for first in range(0, x.shape[0], step):
        block = slice(first, first + step)
        mask = None if rows.mask is None else rows.mask[block]
        if mask is not None and mask.device.type == "cpu" and not bool(mask.any()):
            if gradient is not None:
                gradient[block] = 0
            continue
        t, ref_t = (v if v.dim() == 0 else v[block, None] for v in (rows.temperature, rows.ref_temperature))
        a = (x[block].float() / t).log_softmax(-1)
        b = (y[block].float() / ref_t).log_softmax(-1)
        one, other = (a, b) if direction == "reverse" else (b, a)
        p = one.exp()
        difference = (one - other).masked_fill_(one == -torch.inf, 0)
        kl = torch.linalg.vecdot(p, difference)
        result[block] = kl if mask is None else kl.masked_fill(~mask, 0)
        if gradient is not None:
            slope = p.mul_(difference.sub_(kl[:, None])) if direction == "reverse" else a.exp_().sub_(p)
            slope = slope.mul_(rows.scale[block, None] / t)
            gradient[block] = slope if mask is None else slope.masked_fill_(~mask[:, None], 0)


class _FromLogits(GradientsWithLoss):
    """The sum of the divergences times the scale of every row, and the divergences."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ref_logits: Tensor, rows: Rows, direction: str, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        how: Any = "none" if not ctx.needs_input_grad[0] else "in place" if inplace else "new"
        kl, gradient = kl_rows(logits.detach(), ref_logits.detach(), rows, direction, how)
        if how == "in place":
            torch.autograd.graph.increment_version(logits)
        keep(ctx, "exact_kl", None, [gradient], logits)
        ctx.mark_non_differentiable(kl)
        return (kl * rows.scale).sum(), kl


class _Divergences(torch.autograd.Function):
    """The divergences of rows; the backward computes their gradient when its factor is known, reading both rows again.

    Nothing is stored in float16 before it is multiplied by a loss scale, and nothing has side effects, but the gradient
    that takes the memory of the logits, if ``inplace``.
    """

    @staticmethod
    def forward(
        logits: Tensor, ref_logits: Tensor, temperature: Tensor, mask: Tensor | None, direction: str, inplace: bool
    ) -> Tensor:
        scale = logits.new_zeros(logits.shape[:-1], dtype=torch.float32)
        return kl_rows(logits, ref_logits, Rows(temperature, temperature, mask, scale), direction, "none")[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.direction, ctx.inplace = inputs
        ctx.save_for_backward(*tensors)
        ctx.overwritten = False

    @staticmethod
    def backward(ctx: Any, grad_kl: Tensor) -> Any:
        refuse_overwritten(ctx, "exact_kl", "inplace")
        logits, ref_logits, temperature, mask = ctx.saved_tensors
        rows = Rows(temperature, temperature, mask, grad_kl.float())
        how: Any = "in place" if ctx.inplace and not torch.compiler.is_compiling() else "new"
        _, gradient = kl_rows(logits.detach(), ref_logits, rows, ctx.direction, how)
        assert gradient is not None
        if how == "in place":
            ctx.overwritten = True
            torch.autograd.graph.increment_version(logits)
        return once_differentiable("exact_kl", gradient, logits, grad_kl), *(None,) * 5


def _walk(
    needed: tuple[bool, ...],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref: tuple[Tensor, Tensor, Tensor | None],
    at: Tensor,
    rows: Rows,
    direction: str,
    options: Options,
    ref_options: Options,
) -> tuple[Tensor, list[Tensor | None]]:
    """The divergences, and the gradients that are ``needed``, of hidden states, weight and bias; chunk by chunk."""
    leading = hidden.shape[:-1]
    kl = torch.zeros(leading.numel(), dtype=torch.float32, device=hidden.device)
    temperature, ref_temperature = (_per_row(t, leading) for t in (rows.temperature, rows.ref_temperature))
    scale = rows.scale.reshape(-1)
    with _plain(hidden):
        head = _Head(hidden, weight, bias, at, options, gradients=any(needed))
        chunk = max(1, head.chunks[0].stop) if head.chunks else 1
        ref_head = _Head(*ref, at, ref_options._replace(chunk_tokens=chunk), gradients=False)
        gradients = _Gradients(head, needed, hidden, weight, bias)
        of_ref = (logits for *_, logits in ref_head.walk())
        ref_logits: Any = next(of_ref, None)
        for of_chunk, states, logits in head.walk():
            t, ref_t = _select(temperature, of_chunk), _select(ref_temperature, of_chunk)
            part = Rows(t, ref_t, None, scale[of_chunk])
            kl[of_chunk], grad_logits = kl_rows(
                logits, ref_logits, part, direction, "in place" if any(needed) else "none"
            )
            active = None
            if grad_logits is not None and options.gradient_threshold is not None:
                active = columns_above(grad_logits, options.gradient_threshold * (part.scale / t).abs())
            ref_logits = next(of_ref, None)  # queued before the host waits for the number of columns
            if grad_logits is None:
                continue
            columns = None if active is None else active()
            if columns is None:
                gradients.add(of_chunk, states, grad_logits)
            else:
                gradients.add_columns(of_chunk, states, grad_logits.index_select(1, columns), columns)
        results: list[Tensor | None] = gradients.rounded() if any(needed) else [None, None, None]
    return kl.reshape(leading), results


class _FromHidden(GradientsWithLoss):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ref: Any, at: Tensor, rows: Rows, *others: Any
    ) -> tuple[Tensor, Tensor]:
        kl, results = _walk(ctx.needs_input_grad[:3], hidden, weight, bias, ref, at, rows, *others)
        keep(ctx, "exact_kl_from_hidden", None, results, hidden, weight, bias)
        ctx.mark_non_differentiable(kl)
        return (kl * rows.scale).sum(), kl


class _DivergencesFromHidden(torch.autograd.Function):
    """As :class:`_Divergences`; the backward computes the logits of both models again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ref: Any, at: Tensor, rows: Rows, *others: Any
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, *ref, at, *rows)
        ctx.others = others
        return _walk((False,) * 3, hidden, weight, bias, ref, at, rows, *others)[0]

    @staticmethod
    def backward(ctx: Any, grad_kl: Tensor) -> Any:
        hidden, weight, bias, *saved = ctx.saved_tensors
        (*ref, at), rows = saved[:4], Rows(*saved[4:])._replace(scale=grad_kl.float())
        arguments = (hidden, weight, bias, tuple(ref), at, rows, *ctx.others)
        _, results = _walk(ctx.needs_input_grad[:3], *arguments)
        sources = (hidden, weight, bias, grad_kl)
        return *_once_differentiable("exact_kl_from_hidden", results, *sources), *(None,) * 6


def from_logits(
    logits: Tensor, ref_logits: Tensor, rows: Rows, *, direction: str, inplace: bool
) -> tuple[Tensor, Tensor]:
    """The sum of the divergences times their scale, and the divergences."""
    return apply("exact_kl", _FromLogits, logits, ref_logits, rows, direction, inplace)


def divergences(logits: Tensor, ref_logits: Tensor, rows: Rows, *, direction: str, inplace: bool) -> Tensor:
    """The divergences at the temperature of ``rows``, whose gradient is computed in the backward."""
    return apply("exact_kl", _Divergences, logits, ref_logits, rows.temperature, rows.mask, direction, inplace)


def from_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref: tuple[Tensor, Tensor, Tensor | None],
    at: Tensor,
    rows: Rows,
    *,
    direction: str,
    options: Options,
    ref_options: Options,
    deferred: bool,
) -> Any:
    """As :func:`from_logits`, or if ``deferred`` :func:`divergences`, of the rows ``at`` of the flattened tokens."""
    rows = rows._replace(
        temperature=_uncapped_temperature(rows.temperature, options),
        ref_temperature=_uncapped_temperature(rows.ref_temperature, ref_options),
    )
    function = _DivergencesFromHidden if deferred else _FromHidden
    return apply("exact_kl_from_hidden", function, hidden, weight, bias, ref, at, rows, direction, options, ref_options)
