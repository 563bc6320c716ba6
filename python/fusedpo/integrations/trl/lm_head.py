"""What TRL's fused head computes with: ``add_fused_lm_head`` calls it, and DPO, KTO, RLOO, SFT and GRPO call that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import kernels
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ... import statistics
from ...ops import apply, scalar
from ...ops import hidden as ops_hidden

TRLS = getattr(kernels, "ChunkedLogProbFunction", None)
OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class ChunkedLogProbFunction:
    """In place of the autograd function of that name, with the arguments of its ``apply``.

    The chunk is this library's: all columns of some rows. What its kernels do not serve (float64, ``torch.compile``) is
    left to TRL's own.
    """

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL,
    ) -> tuple[Tensor | None, ...]:
        dtype = ops_hidden.compute_dtype(hidden)
        backend = ops_hidden.choose(hidden, dtype)
        if backend == "reference":
            assert TRLS is not None
            arguments = (hidden, weight, bias, targets, temperature, chunk_size)
            return TRLS.apply(*arguments, final_logit_softcapping, logit_scale, outputs)
        options = ops_hidden.Options(dtype, final_logit_softcapping, logit_scale, None)
        args = (hidden, weight, bias, targets.to(torch.int64), temperature, options, outputs, backend)
        logprobs, entropy, *others = apply("linear_token_logprobs", _WithStatistics, *args)
        return logprobs, entropy if "entropy" in outputs else None, *others


class _WithStatistics(ops_hidden._LinearTokenLogprobs):
    """Log-probs and entropy with their gradient, and the statistics of each chunk while its logits are there."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature_: float,
        options: ops_hidden.Options,
        outputs: tuple[str, ...],
        backend: str,
    ) -> tuple[Tensor | None, ...]:
        operator = getattr(torch.ops.fusedpo.token_logprobs, backend)
        return_entropy, names = "entropy" in outputs, [name for name in statistics.NAMES if name in outputs]
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        # of logits that the head leaves without their softcap
        temperature = ops_hidden._uncapped_temperature(scalar(temperature_, hidden.device), options)
        logprobs, entropy = torch.zeros((2, hidden.shape[0]), dtype=torch.float32, device=hidden.device).unbind()
        stats = logprobs.new_empty((hidden.shape[0], 3))
        others = {name: torch.zeros_like(logprobs, dtype=torch.bool if name == "is_top1" else None) for name in names}
        with ops_hidden._plain(hidden):
            head = ops_hidden._Head(hidden, weight, bias, rows, options, gradients=False)
            for chunk in head.chunks:
                logits = head.logits(head.rows_of(rows[chunk]))
                results = operator(logits, ids[chunk], temperature, None, return_entropy)
                logprobs[chunk], stats[chunk] = results[0], results[2]
                if return_entropy:
                    entropy[chunk] = results[1]
                of_chunk = statistics.of_rows(logits, ids[chunk], temperature, results[2], names, backend)
                for name, values in of_chunk.items():
                    others[name][chunk] = values
        ctx.options, ctx.return_entropy, ctx.backend = options, return_entropy, backend
        ctx.save_for_backward(hidden, weight, bias, ids, temperature, rows, stats)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*others.values(), *(() if return_entropy else (entropy,)))
        return logprobs, entropy, *(others.get(name) for name in statistics.NAMES)

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: None) -> Any:
        _, weight, bias, *_ = ctx.saved_tensors
        with maybe_gather_lm_head_ctx(weight, bias):  # which ZeRO-3 has split again since
            return ops_hidden._LinearTokenLogprobs.backward(ctx, grad_logprobs, grad_entropy)[:8]
