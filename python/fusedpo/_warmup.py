"""Compilation of the Triton kernels before they are needed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import torch

from . import advantages, backends, objectives
from .logprobs import token_logprobs
from .losses import policy_loss, policy_loss_from_hidden, policy_loss_from_logits

GROUP_SIZES = (64, 65)  # a small group and a large one
HIDDEN = 16  # whatever the size, the kernels are the same


def warmup(
    vocab_size: int,
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    *,
    device: torch.device | str = "cuda",
    num_ids: int = 1,
) -> None:
    """Compiles the Triton kernels of a training step with logits ``[..., vocab_size]``, so that none waits for it.

    Otherwise the first step that needs a kernel compiles it, which takes seconds; Triton keeps it on disk. What is
    compiled depends on the dtype, the vocabulary and ``num_ids``, the ids per row, and on whether there are a mask,
    ``cu_seqlens``, the gradient of an entropy, and whether logits or hidden states are given: all of that is gone
    through here. It depends on no length, temperature or objective. Logits whose rows lie aligned otherwise than those
    of a contiguous tensor are not covered.

    Of the advantages those of groups are covered, for float32 rewards, with a bool mask or none: by ``group_ids``, or
    by any ``group_size``. Where nothing runs on Triton, or no such device is there, nothing happens.
    """
    device = torch.device(device)
    operators = ("token_logprobs", "policy_loss", "group_advantages")
    if "triton" not in (backends.kernel_for(name, device.type) for name in operators):
        return
    if not torch.get_device_module(device).is_available():
        return
    for has_mask in (False, True):
        _group_advantages(device, has_mask)
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
    hidden, weight = (
        logits.new_zeros(*shape, HIDDEN).requires_grad_() for shape in (logits.shape[:-1], logits.shape[-1:])
    )
    for objective in (objectives.nfpo(2), objectives.nfpo(2, entropy_coef=0.1), objectives.gspo()):
        options: dict[str, Any] = {"objective": objective, **layout}
        policy_loss_from_logits(logits, zeros.long(), zeros, zeros, **options).loss.backward()
        policy_loss_from_hidden(hidden, weight, zeros.long(), zeros, zeros, **options).loss.backward()
    logprobs = zeros.clone().requires_grad_()
    objective = objectives.nfpo(2, differentiate=True)
    policy_loss(logprobs, zeros, zeros, objective=objective, **layout).loss.backward()
    policy_loss(logprobs, zeros, zeros, objective=objective, reduction="none", **layout).loss.sum().backward()


def _group_advantages(device: torch.device, has_mask: bool) -> None:
    for size in GROUP_SIZES:
        rewards = torch.zeros(size, device=device)
        mask = torch.ones(size, dtype=torch.bool, device=device) if has_mask else None
        groups: tuple[dict[str, Any], ...] = ({"group_size": size},)
        if size == GROUP_SIZES[0]:
            groups += ({"group_ids": torch.zeros(size, dtype=torch.int64, device=device)},)
        for group in groups:
            advantages.grpo(rewards, mask=mask, **group)
            advantages.maxpo(rewards, k=2, mask=mask, **group)
