"""The fusion: loss and gradient of the logits, each row of which need be read and written once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fusedpo
from fusedpo import Objective

from .batch import (
    OBJECTIVES,
    SEQUENCES,
    Batch,
    Loss,
    exact_coefficients,
    make_batch,
    on_gpu,
    plain_loss,
    some_rows,
    verl_by,
)
from .harness import CLONE, COPY, Case, Provider, Run, clone, compiled, copy, not_installed, relative_error

SIZES = {
    ("cpu", False): [(512, 151_936), (128, 151_936), (512, 32_000), (128, 262_144)],
    ("cpu", True): [(64, 151_936)],
    ("cuda", False): [(8192, 151_936), (1024, 151_936), (8192, 32_000), (8192, 262_144)],
    ("cuda", True): [(8192, 151_936)],
}
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Trainers that round log-probs to the dtype of the logits are not wrong: 16 +- 1/32 in bfloat16, and up to four add up.
ROUNDED = {torch.float32: 1e-4, torch.bfloat16: 3e-1, torch.float16: 4e-2}
# What a GradScaler multiplies the loss by. This library takes it for a gradient that is stored while the row is read.
SCALE = {torch.float16: 1024.0}


def cases(device: str, quick: bool, dtypes: list[torch.dtype]) -> Iterator[Case]:
    first = SIZES[device, quick][0]
    for dtype in dtypes:
        for tokens, vocab in SIZES[device, quick]:
            yield _case("NFPO N=4", dtype, tokens, vocab, device)
    if quick:
        return
    for dtype in dtypes:
        for tokens, vocab in SIZES[device, quick][:2]:
            yield _case("PPO", dtype, tokens, vocab, device)
    yield _case("NFPO N=4", dtypes[-1], *first, device, masked=0.5)
    if torch.float16 not in dtypes:
        yield _case("NFPO N=4", torch.float16, *first, device)


def _case(name: str, dtype: torch.dtype, tokens: int, vocab: int, device: str, *, masked: float = 0.0) -> Case:
    objective, n = OBJECTIVES[name]
    logits = torch.randn(SEQUENCES, tokens // SEQUENCES, vocab, device=device).mul_(3).to(dtype)
    ids = torch.randint(vocab, logits.shape[:-1], device=device)
    exact = _exact_logprobs(logits, ids)
    batch = make_batch(exact.float(), ids, masked=masked)
    rows, truth = _exact_gradient(logits, exact, batch, objective)
    overwritten = logits.clone()
    scale = SCALE.get(dtype, 1.0)

    def error(gradient: Tensor) -> float:
        return relative_error(gradient.view(-1, vocab)[rows], truth * scale)

    def gradient(loss: Loss, source: Tensor, factor: float) -> Run:
        """``factor``: the upstream gradient of the loss."""
        upstream = torch.tensor(factor, device=device)

        def run() -> Tensor:
            x = source.detach().requires_grad_()
            loss(x).backward(upstream)
            return x.grad

        return run

    def provider(
        name: str,
        loss: Loss,
        *,
        factor: float = scale,
        allowed: float = ALLOWED[dtype],
        compile: bool = False,
        missing: str = "",
    ) -> Provider:
        def prepare() -> Run:
            return gradient(compiled(loss) if compile else loss, logits, factor)

        return Provider(name, prepare, error, allowed, compile, missing)

    def fused(x: Tensor, **options: Any) -> Tensor:
        options |= {"objective": objective, "mask": batch.mask}
        return fusedpo.policy_loss_from_logits(x, *batch[:3], **options).loss

    def scaled(x: Tensor) -> Tensor:
        return fused(x, loss_scale=scale)

    def in_place(name: str, *, factor: float = scale, **options: Any) -> Provider:
        def prepare() -> Run:
            return gradient(lambda x: fused(x, inplace=True, **options), overwritten, factor)

        return Provider(name, prepare, error, ALLOWED[dtype], reset=lambda: overwritten.copy_(logits), ceiling=COPY)

    def two_passes(x: Tensor) -> Tensor:
        logprobs, entropy = fusedpo.token_logprobs(x, ids, mask=batch.mask, return_entropy=True)
        options = {"objective": objective, "mask": batch.mask, "entropy": entropy.detach()}
        return fusedpo.policy_loss(logprobs, batch.old_logprobs, batch.advantages, **options).loss

    def eager(x: Tensor) -> Tensor:
        logprobs = torch.log_softmax(x.float(), -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        return plain_loss(logprobs, batch, n)

    def trl(x: Tensor) -> Tensor:
        from trl.trainer.utils import selective_log_softmax

        return plain_loss(selective_log_softmax(x, ids).float(), batch, n)

    def verl(x: Tensor) -> Tensor:
        from verl.utils.torch_functional import logprobs_from_logits

        return plain_loss(logprobs_from_logits(x, ids, inplace_backward=False).float(), batch, n)

    def liger() -> Run:
        """Its logits have a last position, which predicts nothing: padded here, outside the clock."""
        padded = torch.nn.functional.pad(logits, (0, 0, 0, 1))
        return gradient(lambda x: _liger(x, batch), padded, scale)

    def error_of_padded(of_padded: Tensor) -> float:
        return error(of_padded[:, :-1].contiguous())

    kernels = "Triton" if device == "cuda" else "PyTorch"
    ours = [provider("fusedpo", fused), in_place("fusedpo, in place")]
    if scale != 1:  # float16: without a loss_scale it takes two passes
        ours.append(provider("fusedpo, loss_scale", scaled, factor=1.0))
        ours.append(in_place("fusedpo, in place, loss_scale", factor=1.0, loss_scale=scale))
    ours.append(in_place("fusedpo, in place, loss * 0.5", factor=0.5, loss_scale=2 * scale))
    ours.append(provider("fusedpo, two passes", two_passes))
    ours.append(provider("fusedpo, torch.compile", fused, compile=True))
    for backend, loss, missing in on_gpu(scaled, "one_pass", device, dtype):
        ours.append(provider(f"fusedpo, {backend}", loss, factor=1.0, missing=missing))
    return Case(
        group=f"{name}, loss and gradient, {str(dtype).removeprefix('torch.')}" + (", half masked" if masked else ""),
        sizes={"T": tokens, "V": vocab},
        providers=[
            clone(logits),
            copy(logits),
            *ours,
            provider("eager", eager),
            provider("torch.compile", eager, compile=True),
            provider(f"trl, {kernels}", trl, allowed=ROUNDED[dtype], missing=not_installed("trl")),
            provider(f"verl, {verl_by(device)}", verl, allowed=ROUNDED[dtype], missing=not_installed("verl")),
            Provider("liger, Triton", liger, error_of_padded, ALLOWED[dtype], missing=_why_no_liger(n, device)),
            Provider("cut-cross-entropy", lambda: lambda: None, missing="starts from hidden states: see hidden"),
        ],
        ceiling=CLONE,
        bytes_moved=2 * logits.numel() * logits.element_size(),
    )


def _liger(padded: Tensor, batch: Batch) -> Tensor:
    """With the token mean."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    ids, old, advantages, mask = batch
    options = {"temperature": 1.0, "beta": 0.0, "eps_low": 0.2, "eps_high": 0.2, "inplace": False, "reduce": True}
    return triton_grpo_loss(padded, old, None, ids, advantages, mask.int(), loss_type="bnpo", **options)[0]


def _why_no_liger(n: int, device: str) -> str:
    if n > 1:
        return "has no forward trace"
    return not_installed("liger_kernel") or ("" if device == "cuda" else "its Triton kernel needs a GPU")


def _exact_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    pairs = zip(logits.flatten(0, -2).split(64), ids.flatten().split(64), strict=True)
    chunks = [torch.log_softmax(x.double(), -1).gather(-1, i.unsqueeze(-1)).squeeze(-1) for x, i in pairs]
    return torch.cat(chunks).view(ids.shape)


def _exact_gradient(logits: Tensor, logprobs: Tensor, batch: Batch, objective: Objective) -> tuple[Tensor, Tensor]:
    """Some rows of the gradient: each is the token's coefficient times ``onehot - softmax``."""
    coefficients = exact_coefficients(logprobs, batch, objective).flatten()
    rows = some_rows(len(coefficients)).to(logits.device)
    gradient = -torch.softmax(logits.flatten(0, -2)[rows].double(), -1)
    gradient[torch.arange(len(rows)), batch.token_ids.flatten()[rows]] += 1
    return rows, gradient * coefficients[rows, None]
