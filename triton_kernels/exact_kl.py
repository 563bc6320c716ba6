"""KL divergences over the vocabulary: a program walks one row of both tensors of logits, three times.

The first walk reduces both rows to the logarithms of their sums (see sums.py), the second sums the divergence, the
third writes the gradient: reads that find the row in the L2 cache, as a row of 152k logits in bfloat16 is 0.3 MB. The
order of every sum follows from V, the block and whether rows are aligned.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .checks import BOOL, FLOAT, LOGITS, Arguments, expect
from .common import kernel, launch, sum_where
from .logprobs import RowLayout, _row_pointers, _rows, row_width, with_layout, with_output
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


def exact_kl_out(
    logits: Tensor,
    ref_logits: Tensor,
    temperature: Tensor,
    ref_temperature: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    forward: bool,
    out: Tensor | None,
) -> Tensor:
    """The operator ``fusedpo::exact_kl_out``."""
    expect(logits.dim() > 0, "rows must have at least one dimension")
    arguments = Arguments("logits", logits)
    rows, vocab_size = logits.shape[:-1], logits.shape[-1]
    arguments.check("logits", logits, LOGITS, logits.shape)
    arguments.check("ref_logits", ref_logits, (logits.dtype,), logits.shape)
    temperature = arguments.read("temperature", temperature, FLOAT, rows, ())
    ref_temperature = arguments.read("ref_temperature", ref_temperature, FLOAT, rows, ())
    mask = arguments.read("mask", mask, BOOL, rows)
    scale = arguments.read("scale", scale, FLOAT, rows)
    if out is not None:
        arguments.check("out", out, (logits.dtype,), logits.shape)
        own = out.data_ptr() == logits.data_ptr() or out.data_ptr() != ref_logits.data_ptr()
        expect(own or out.numel() == 0, "out must not be ref_logits")
    kl = scale.new_empty(rows)
    if kl.numel() == 0:
        return kl
    ref_logits, ref_layout = with_layout(ref_logits)

    def run(logits: Tensor, layout: RowLayout, out: Tensor | None, out_layout: RowLayout) -> None:
        written = [] if out is None else [(out, out_layout)]
        width = min(row_width(*of) for of in ((logits, layout), (ref_logits, ref_layout), *written))
        block = max(512, min(triton.next_power_of_2(vocab_size), 16384 // logits.element_size()))
        num_warps = min(16, max(1, block // 512))
        launch(
            _exact_kl_kernel,
            kl.numel(),
            logits.device,
            logits,
            ref_logits,
            temperature,
            ref_temperature,
            mask,
            scale,
            kl,
            out,
            kl.numel(),
            vocab_size,
            *layout,
            *ref_layout,
            *out_layout,
            int(temperature.dim() > 0),
            int(ref_temperature.dim() > 0),
            BLOCK=block,
            LANES=128 * num_warps,
            WIDTH=width,
            FORWARD=forward,
            num_warps=num_warps,
        )

    if out is None:
        logits, layout = with_layout(logits)
        run(logits, layout, None, layout)
    else:
        with_output(logits, out, run)
    return kl
