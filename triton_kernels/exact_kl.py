"""KL divergences over the vocabulary: a program walks one row of both tensors of logits, three times.

The first walk reduces both rows to the logarithms of their sums (see sums.py), the second sums the divergence, the
third writes the gradient: reads that find the row in the L2 cache, as a row of 152k logits in bfloat16 is 0.3 MB. The
order of every sum follows from V, the block and whether rows are aligned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import kernel, launch, sum_where
from .logprobs import RowLayout, _row_pointers, _rows, row_width, with_layout
from .sums import LN2, LOG2E, LOWEST, MINUS_INF, log1p, reduce_rows, words_of


@triton.jit
def _log2_of(x, reference, scale, log_sum):
    return (x.to(tl.float32) - reference) * scale - log_sum


@triton.jit
def _terms(x, y, reference_x, scale_x, log_sum_x, reference_y, scale_y, log_sum_y):
    """p of a block, and log2 p - log2 q where p is not 0."""
    a = tl.maximum(_log2_of(x, reference_x, scale_x, log_sum_x), LOWEST, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(a)
    return p, tl.where(p == 0, 0.0, a - _log2_of(y, reference_y, scale_y, log_sum_y))


@triton.jit
def _sums(words, size, scale, LANES: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """The reference and the logarithm to the base of 2 of the sum of a row; nan for one of -inf."""
    PER_WORD: tl.constexpr = 2 if WIDTH == 8 else 1
    size = size // PER_WORD
    lanes = tl.arange(0, LANES)[None, :]
    reference, rest, _ = reduce_rows(
        words[:, None], size, size, scale[:, None], lanes, WIDTH, DTYPE, False, "evict_last"
    )
    log_sum = tl.where(rest > -1, log1p(rest), float("nan")) * LOG2E
    return reference[:, None], log_sum[:, None]


@kernel
def _exact_kl_kernel(
    logits,
    ref_logits,
    temperature,
    ref_temperature,
    mask,
    scale,
    kl,
    grad_logits,
    num_rows,
    vocab_size,
    inner_x,
    outer_stride_x,
    inner_stride_x,
    inner_y,
    outer_stride_y,
    inner_stride_y,
    inner_g,
    outer_stride_g,
    inner_stride_g,
    temperature_stride,
    ref_temperature_stride,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    FORWARD: tl.constexpr,
):
    """Reads 2 V logits of each kept row; writes a divergence, and V elements of the gradient, of every row."""
    rows, _, kept = _rows(mask, num_rows, 1)
    size = tl.where(tl.max(kept.to(tl.int32), 0) != 0, vocab_size, 0)
    x_row = _row_pointers(logits, inner_x, outer_stride_x, inner_stride_x, 1, WIDTH)
    y_row = _row_pointers(ref_logits, inner_y, outer_stride_y, inner_stride_y, 1, WIDTH)
    x_words, y_words = words_of(x_row, WIDTH), words_of(y_row, WIDTH)
    x_row, y_row = x_row[:, None], y_row[:, None]
    T = tl.load(temperature + rows * temperature_stride, mask=kept, other=1.0)
    ref_T = tl.load(ref_temperature + rows * ref_temperature_stride, mask=kept, other=1.0)
    scale_x, scale_y = tl.div_rn(LOG2E, T), tl.div_rn(LOG2E, ref_T)
    reference_x, log_sum_x = _sums(x_words, size, scale_x, LANES, WIDTH, logits.dtype.element_ty)
    reference_y, log_sum_y = _sums(y_words, size, scale_y, LANES, WIDTH, logits.dtype.element_ty)
    scale_x, scale_y = scale_x[:, None], scale_y[:, None]

    columns = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([1], tl.float32)
    for start in range(0, size, BLOCK):
        inside = tl.max_constancy(start + columns < size, [1, WIDTH])
        x = tl.load(x_row + (start + columns), mask=inside, other=MINUS_INF)
        y = tl.load(y_row + (start + columns), mask=inside, other=MINUS_INF)
        if FORWARD:
            p, d = _terms(y, x, reference_y, scale_y, log_sum_y, reference_x, scale_x, log_sum_x)
        else:
            p, d = _terms(x, y, reference_x, scale_x, log_sum_x, reference_y, scale_y, log_sum_y)
        total += sum_where(inside, p * d, 1)
    tl.store(kl + rows, tl.where(kept, total * LN2, 0.0))

    if grad_logits is not None:
        g_row = _row_pointers(grad_logits, inner_g, outer_stride_g, inner_stride_g, 1, WIDTH)[:, None]
        factor = tl.div_rn(tl.load(scale + rows), T)[:, None]
        for start in range(0, vocab_size, BLOCK):
            inside = tl.max_constancy(start + columns < vocab_size, [1, WIDTH])
            read = tl.max_constancy(inside & kept[:, None], [1, WIDTH])
            x = tl.load(x_row + (start + columns), mask=read, other=0.0)
            y = tl.load(y_row + (start + columns), mask=read, other=0.0)
            p, d = _terms(x, y, reference_x, scale_x, log_sum_x, reference_y, scale_y, log_sum_y)
            if FORWARD:
                gradient = factor * (p - tl.exp2(_log2_of(y, reference_y, scale_y, log_sum_y)))
            else:
                gradient = factor * LN2 * p * (d - total[:, None])
            tl.store(g_row + (start + columns), tl.where(kept[:, None], gradient, 0.0), mask=inside)


def _run(
    logits: Tensor,
    layout: RowLayout,
    ref_logits: Tensor,
    temperature: Tensor,
    ref_temperature: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    forward: bool,
    grad_logits: Tensor | None,
    grad_layout: RowLayout,
) -> Tensor:
    kl = scale.new_empty(logits.shape[:-1], dtype=torch.float32)
    if logits.dtype != ref_logits.dtype or logits.shape != ref_logits.shape:
        raise ValueError("logits and ref_logits must have one dtype and one shape")
    if kl.numel() == 0:
        return kl
    ref_logits, ref_layout = with_layout(ref_logits)
    vocab_size, itemsize = logits.shape[-1], logits.element_size()
    widths = [row_width(logits, layout), row_width(ref_logits, ref_layout)]
    if grad_logits is not None:
        widths.append(row_width(grad_logits, grad_layout))
    block = max(512, min(triton.next_power_of_2(vocab_size), 16384 // itemsize))
    num_warps = min(16, max(1, block // 512))
    launch(
        _exact_kl_kernel,
        kl.numel(),
        logits.device,
        logits,
        ref_logits,
        temperature.contiguous(),
        ref_temperature.contiguous(),
        None if mask is None else mask.contiguous(),
        scale.contiguous(),
        kl,
        grad_logits,
        kl.numel(),
        vocab_size,
        *layout,
        *ref_layout,
        *grad_layout,
        int(temperature.dim() > 0),
        int(ref_temperature.dim() > 0),
        BLOCK=block,
        LANES=128 * num_warps,
        WIDTH=min(widths),
        FORWARD=forward,
        num_warps=num_warps,
    )
    return kl


def exact_kl(
    logits: Tensor,
    ref_logits: Tensor,
    temperature: Tensor,
    ref_temperature: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    forward: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The operator ``fusedpo::exact_kl``."""
    grad_logits = logits.new_empty(logits.shape if gradient else 0)
    logits, layout = with_layout(logits)
    size = logits.shape[-1]
    to = RowLayout(layout.inner_rows, layout.inner_rows * size, size)
    rows = (temperature, ref_temperature, mask, scale, forward)
    return _run(logits, layout, ref_logits, *rows, grad_logits if gradient else None, to), grad_logits


def exact_kl_(
    logits: Tensor,
    ref_logits: Tensor,
    temperature: Tensor,
    ref_temperature: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    forward: bool,
) -> Tensor:
    """The operator ``fusedpo::exact_kl_``: the gradient overwrites the logits."""
    rows = (temperature, ref_temperature, mask, scale, forward)
    given, (logits, layout) = logits, with_layout(logits)
    kl = _run(logits, layout, ref_logits, *rows, logits, layout)
    if logits is not given:
        given.copy_(logits)
    return kl
