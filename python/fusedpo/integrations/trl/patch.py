"""TRL's log-prob and entropy functions replaced in place, wherever ``trl`` modules hold them."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor
from trl.trainer import utils

from ... import token_logprobs
from .._common import entropy, put_back, put_in_place
from .._versions import check_version
from .lm_head import TRLS, ChunkedLogProbFunction, add_fused_lm_head
from .versions import TESTED

__all__ = ["patch_trl", "unpatch_trl"]


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probs ``[...]`` or ``[..., K]`` of ``index`` under ``softmax(logits / temperature)``, as TRL's; float32."""
    if row_mask is None or row_mask.shape == logits.shape[:-1]:
        return token_logprobs(logits, index, temperature=temperature, mask=row_mask)
    return token_logprobs(logits, index, temperature=temperature).masked_fill(row_mask == 0, 0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy ``[...]`` in nats of ``softmax(logits)``, as TRL's; float32. Nothing is chunked."""
    return entropy(logits)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both in one pass over ``logits``, as TRL's; float32."""
    logprobs, entropies = token_logprobs(logits, index, temperature=temperature, mask=row_mask, return_entropy=True)
    return logprobs, entropies if entropy_requires_grad else entropies.detach()


_REPLACEMENTS = (selective_log_softmax, entropy_from_logits, selective_log_softmax_and_entropy, add_fused_lm_head)
_originals: dict[Any, Any] = {}  # by what replaces them, while patched


class patch_trl:
    """Replaces TRL's log-prob and entropy functions by :func:`fusedpo.token_logprobs`, at once.

    ``selective_log_softmax``, ``entropy_from_logits`` and, where TRL has it, ``selective_log_softmax_and_entropy`` are
    replaced in every imported ``trl`` module that holds them, under whatever name; a module that is imported later
    imports the replacements. The results are float32 where TRL computes in the dtype of the logits.

    So is ``add_fused_lm_head``, the head that DPO, KTO, RLOO, SFT and GRPO share: it serves all of their losses. A
    trainer gives it to its models when it is built, and they keep it. What a head that TRL has given before computes
    with is replaced, too, until TRL has its own back.

    :func:`unpatch_trl` undoes it. So does the end of a ``with patch_trl():`` block, unless TRL was patched before it.
    A second call changes nothing.
    """

    def __init__(self) -> None:
        check_version("trl", *TESTED)
        self._undo = not _originals
        if TRLS is not None:
            _originals.setdefault(ChunkedLogProbFunction, TRLS)
        put_in_place("trl", utils, _REPLACEMENTS, _originals)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._undo:
            unpatch_trl()


def unpatch_trl() -> None:
    """Gives every ``trl`` module TRL's own functions back, those too that were imported since; undoes nothing twice."""
    put_back("trl", _originals)
