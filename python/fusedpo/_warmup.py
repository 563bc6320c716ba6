"""Compilation of the Triton kernels before they are needed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import torch

from . import backends, objectives
from .logprobs import token_logprobs
from .losses import policy_loss, policy_loss_from_logits


def warmup(
    vocab_size: int,
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    *,
    device: torch.device | str = "cuda",
    num_ids: int = 1,
) -> None:
    """Compiles the Triton kernels of layers 1 and 2 for logits ``[..., vocab_size]``, so that no training step waits.

    Otherwise the first step that needs a kernel compiles it, which takes seconds; Triton keeps it on disk. What is
    compiled depends on the dtype, the vocabulary and ``num_ids``, the ids per row, and on whether there are a mask,
    ``cu_seqlens``, the gradient of an entropy: all of that is gone through here. It depends on no length, temperature
    or objective. Logits whose rows lie aligned otherwise than those of a contiguous tensor are not covered. Where
    nothing runs on Triton, nothing happens.
    """
    device = torch.device(device)
    if "triton" not in (backends.kernel_for(name, device.type) for name in ("token_logprobs", "policy_loss")):
        return
    for dtype, has_mask in product(dtypes, (False, True)):
        mask = torch.ones(1, 2, dtype=torch.bool, device=device) if has_mask else None
        logits = torch.zeros(1, 2, vocab_size, dtype=dtype, device=device, requires_grad=True)
        _token_logprobs(logits, num_ids, mask)
        for cu_seqlens in (None, torch.tensor([0, 2], device=device)):
            _policy_loss(logits, {"mask": mask, "cu_seqlens": cu_seqlens})


def _token_logprobs(logits: torch.Tensor, num_ids: int, mask: torch.Tensor | None) -> None:
    ids = torch.zeros(1, 2, num_ids, dtype=torch.int64, device=logits.device)
    alone = token_logprobs(logits, ids, mask=mask)
    logprobs, entropy = token_logprobs(logits, ids, mask=mask, return_entropy=True)
    for results in ([alone], [logprobs], [entropy], [logprobs, entropy]):
        torch.autograd.grad(results, logits, [torch.ones_like(x) for x in results], retain_graph=True)


def _policy_loss(logits: torch.Tensor, layout: dict[str, Any]) -> None:
    zeros = torch.zeros(1, 2, dtype=torch.float32, device=logits.device)
    for entropy_coef in (0.0, 0.1):
        objective = objectives.nfpo(2, entropy_coef=entropy_coef)
        policy_loss_from_logits(logits, zeros.long(), zeros, zeros, objective=objective, **layout).loss.backward()
    logprobs = zeros.clone().requires_grad_()
    objective = objectives.nfpo(2, differentiate=True)
    policy_loss(logprobs, zeros, zeros, objective=objective, **layout).loss.backward()
    policy_loss(logprobs, zeros, zeros, objective=objective, reduction="none", **layout).loss.sum().backward()
