"""The gradient of a chunk of logits where it is not small.

A program walks a row block by block: to mark the columns in which an element of its gradient may be larger than the
threshold, which reads V logits and writes what it marks; or to compute its gradient at the columns that are active in
any row, which reads those and writes them to the front of the row. ``stats`` are those of logprobs.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedpo import _checks

from .checks import BOOL, FLOAT, Arguments, expect
from .common import kernel, launch
from .logprobs import (
    LN2,
    LOG2E,
    LOWEST,
    _check,
    _reached,
    _row_pointers,
    _sums_at_ids,
    check_values,
    gradient_of,
    log1p,
    row_layout,
)

NOTHING = tl.constexpr(2.0**-64)  # of the largest element of a row that its gradient could have
_BLOCK = 2048


@triton.jit
def _upstream(grad_logprobs, grad_entropy, row, num_ids, IDS: tl.constexpr):
    """[1]: the sum of the gradients of the log-probs of a row, the gradient of its entropy, whether any is not 0."""
    k = tl.arange(0, IDS)[None, :]
    g = tl.zeros([1, IDS], tl.float32)
    if grad_logprobs is not None:
        g = tl.load(grad_logprobs + row[:, None] * num_ids + k, mask=k < num_ids, other=0.0)
    g_entropy = tl.zeros([1], tl.float32)
    if grad_entropy is not None:
        g_entropy = tl.load(grad_entropy + row)
    return tl.sum(g, 1), g_entropy, (tl.max((g != 0).to(tl.int32), 1) != 0) | (g_entropy != 0)


@kernel
def _active_columns_kernel(
    grad_logprobs,
    grad_entropy,
    logits,
    active,
    token_ids,
    temperature,
    stats,
    threshold,
    vocab_size,
    num_ids,
    inner_rows,
    outer_stride,
    inner_stride,
    temperature_stride,
    BLOCK: tl.constexpr,
    IDS: tl.constexpr,
):
    """Reads V logits of a row that a gradient reaches. Every writer of ``active`` writes 1, in whatever order."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    total, g_entropy, reached = _upstream(grad_logprobs, grad_entropy, row, num_ids, IDS)
    if tl.max(reached.to(tl.int32), 0) != 0:
        T = tl.load(temperature + row * temperature_stride)
        reference = tl.load(stats + 3 * row)
        rest = tl.load(stats + 3 * row + 1)
        log_sum = log1p(rest)
        log_p = tl.log(tl.zeros([1], tl.float32) + threshold)
        if grad_entropy is not None:
            # p |log p + H| <= threshold, too, for every p up to the one that is found
            entropy = log_sum - tl.div_rn(tl.load(stats + 3 * row + 2), 1 + rest)
            once = log_p - log1p(tl.abs(log_p + entropy))
            log_p = tl.where(g_entropy != 0, log_p - log1p(tl.abs(once + entropy)), log_p)
        least = reference + T * (log_p + log_sum)
        least -= tl.abs(least) * 2.0**-23  # on the safe side of the roundings
        finite = (rest > -1) & (tl.abs(least) < float("inf")) & (tl.abs(total) + tl.abs(g_entropy) < float("inf"))

        pointer = _row_pointers(logits, inner_rows, outer_stride, inner_stride, 1, 1)
        columns = tl.arange(0, BLOCK)[None, :]
        for start in range(0, vocab_size, BLOCK):
            inside = start + columns < vocab_size
            x = tl.load(pointer + (start + columns), mask=inside, other=float("-inf")).to(tl.float32)
            marked = inside & ((x > least[:, None]) | (finite == 0)[:, None])
            tl.store(active + (start + columns), tl.full([1, BLOCK], 1, tl.int8), mask=marked)
        k = tl.arange(0, IDS)[None, :]
        ids = tl.load(token_ids + row[:, None] * num_ids + k, mask=k < num_ids, other=-1)
        tl.store(active + ids, tl.full([1, IDS], 1, tl.int8), mask=(ids >= 0) & (ids < vocab_size))


@kernel
def _gradient_at_kernel(
    grad_logprobs,
    grad_entropy,
    logits,
    token_ids,
    order,
    place_of,
    count,
    columns,
    temperature,
    stats,
    dropped,
    vocab_size,
    most,
    num_ids,
    inner_rows,
    outer_stride,
    inner_stride,
    temperature_stride,
    BLOCK: tl.constexpr,
    IDS: tl.constexpr,
):
    """Reads A logits of a row that a gradient reaches; writes A elements of every row, in front. None if A > most.

    As columns ascend, what is written lies at or before what is read, and before all that is read later.
    """
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    total, g_entropy, reached = _upstream(grad_logprobs, grad_entropy, row, num_ids, IDS)
    num_columns = tl.load(count + tl.arange(0, 1)).to(tl.int32)
    num_columns = tl.where(num_columns <= most, num_columns, 0)
    reached = reached & (num_columns > 0)
    T = tl.load(temperature + row * temperature_stride, mask=reached, other=1.0)
    scale = tl.div_rn(LOG2E, T)
    reference = tl.load(stats + 3 * row, mask=reached, other=0.0)
    rest = tl.load(stats + 3 * row + 1, mask=reached, other=0.0)
    inverse = tl.div_rn(1.0, 1 + rest)
    mean = tl.load(stats + 3 * row + 2, mask=reached, other=0.0) * inverse
    pointer = _row_pointers(logits, inner_rows, outer_stride, inner_stride, 1, 1)
    normaliser = tl.div_rn(inverse, T)
    constant = (g_entropy * mean - total) * normaliser
    slope = -LN2 * g_entropy * normaliser
    nothing = tl.div_rn(tl.abs(total) + tl.abs(g_entropy), T)[:, None] * NOTHING

    if grad_logprobs is not None:
        ids, in_range, _, here, others = _sums_at_ids(
            grad_logprobs, token_ids, order, row, reached, num_ids, vocab_size, IDS
        )
        t = (tl.load(pointer + ids, mask=in_range, other=0.0).to(tl.float32) - reference[:, None]) * scale[:, None]
        e = tl.exp2(t)
        chosen = here * (rest[:, None] + (1 - e)) - others * e
        if grad_entropy is not None:
            chosen -= g_entropy[:, None] * e * (LN2 * tl.maximum(t, LOWEST) - mean[:, None])
        chosen = tl.div_rn(chosen * inverse[:, None], T[:, None])
        tl.debug_barrier()  # every thread has read the chosen logits before any overwrites them

    kept = tl.zeros([1], tl.float32)
    k = tl.arange(0, BLOCK)[None, :]
    end = tl.max(num_columns, 0)
    for start in range(0, end, BLOCK):
        inside = start + k < end
        at = tl.load(columns + start + k, mask=inside, other=0).to(tl.int32)
        x = tl.load(pointer + at, mask=inside & reached[:, None], other=float("-inf"))
        grad = gradient_of(x, reference, scale, constant, slope, grad_entropy is not None)
        grad = tl.where(reached[:, None] & (tl.abs(grad) >= nothing), grad, 0.0)
        probability = tl.exp2((x.to(tl.float32) - reference[:, None]) * scale[:, None])
        kept += tl.sum(tl.where(inside & reached[:, None], probability, 0.0), 1)
        tl.debug_barrier()  # all of the block is read before any of it is overwritten
        tl.store(pointer + (start + k), grad, mask=inside)
    lost = tl.maximum(1 - kept * inverse, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(dropped + row, tl.where(reached, lost, 0.0))

    if grad_logprobs is not None:
        tl.debug_barrier()  # the chosen columns are written last
        place = tl.load(place_of + ids, mask=in_range, other=0) - 1
        tl.store(pointer + place, chosen, mask=place >= 0)


def _checked(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    stats: Tensor,
) -> tuple[Arguments, tuple[Tensor | None, ...]]:
    expect(logits.dim() > 0, "rows must have at least one dimension")
    arguments = Arguments("logits", logits)
    rows = logits.shape[:-1]
    token_ids, temperature, _ = _check(arguments, logits, token_ids, temperature, None)
    stats = arguments.read("stats", stats, FLOAT, (*rows, 3))
    grad_logprobs = arguments.read("grad_logprobs", grad_logprobs, FLOAT, token_ids.shape)
    grad_entropy = arguments.read("grad_entropy", grad_entropy, FLOAT, rows)
    if rows.numel() > 0 and _checks.values_are_free(token_ids):
        check_values(logits.shape[-1], token_ids, temperature, _reached(grad_logprobs, grad_entropy, None, rows))
    return arguments, (grad_logprobs, grad_entropy, token_ids, temperature, stats)


def _tile(size: int, num_ids: int) -> dict[str, int]:
    block = max(128, min(triton.next_power_of_2(max(1, size)), _BLOCK))
    return {"BLOCK": block, "IDS": triton.next_power_of_2(max(1, num_ids)), "num_warps": max(1, block // 256)}


def active_columns(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    stats: Tensor,
    threshold: float,
) -> Tensor:
    """The operator ``fusedpo::active_columns``."""
    given = (grad_logprobs, grad_entropy, logits, token_ids, temperature, stats)
    _, (grad_logprobs, grad_entropy, token_ids, temperature, stats) = _checked(*given)
    expect(2.0**-64 <= threshold < 1, f"threshold must be at least 2^-64, and less than 1, got {threshold}")
    layout, num_rows, vocab_size = row_layout(logits), logits.shape[:-1].numel(), logits.shape[-1]
    expect(layout is not None, "logits must have unit stride along V")
    active = torch.zeros(vocab_size, dtype=torch.int8, device=logits.device)
    if num_rows > 0:
        num_ids = token_ids.numel() // num_rows
        launch(
            _active_columns_kernel,
            num_rows,
            logits.device,
            grad_logprobs,
            grad_entropy,
            logits,
            active,
            token_ids,
            temperature,
            stats,
            threshold,
            vocab_size,
            num_ids,
            *layout,
            int(temperature.dim() > 0),
            **_tile(vocab_size, num_ids),
        )
    return active.view(torch.bool)


def gradient_at_(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    stats: Tensor,
    active: Tensor,
    most: int,
) -> tuple[Tensor, Tensor]:
    """The operator ``fusedpo::gradient_at_``."""
    given = (grad_logprobs, grad_entropy, logits, token_ids, temperature, stats)
    arguments, (grad_logprobs, grad_entropy, token_ids, temperature, stats) = _checked(*given)
    *rows, vocab_size = logits.shape
    active = arguments.read("active", active, BOOL, (vocab_size,))
    expect(0 <= most <= vocab_size, f"most must be 0 to {vocab_size}, got {most}")
    layout, num_rows = row_layout(logits), math.prod(rows)
    expect(layout is not None, "logits must have unit stride along V")
    columns, places = torch.nonzero_static(active, size=most).squeeze(1), active.cumsum(0)  # from 1
    dropped = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if num_rows == 0:
        return columns, dropped
    num_ids, order = token_ids.numel() // num_rows, None
    if _checks.values_are_free(active, token_ids):
        reached = _reached(grad_logprobs, grad_entropy, None, logits.shape[:-1])
        ids = token_ids.reshape(num_rows, num_ids)[reached.reshape(-1)].flatten()
        for token_id in ids[~active[ids]][:1].tolist():
            raise ValueError(f"active must hold every token id at which a gradient arrives, not {token_id}")
    if num_ids > 1 and grad_logprobs is not None:
        token_ids, order = token_ids.sort(dim=-1, stable=True)
    launch(
        _gradient_at_kernel,
        num_rows,
        logits.device,
        grad_logprobs,
        grad_entropy,
        logits,
        token_ids,
        order,
        places * active,
        places[-1:],
        columns,
        temperature,
        stats,
        dropped,
        vocab_size,
        most,
        num_ids,
        *layout,
        int(temperature.dim() > 0),
        **_tile(most, num_ids),
    )
    return columns, dropped
