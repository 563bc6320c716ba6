"""Losses of segments: DPO from logits and from hidden states, and the KL divergence over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedpo
from fusedpo import objectives

from .batch import Loss, some_rows
from .harness import CLONE, COPY, Case, Provider, Run, clone, compiled, copy, not_installed, relative_error
from .hidden import PRODUCTS, Exact, three_products
from .one_pass import ROUNDED

SEQUENCES = 4  # two pairs, the chosen ones first
BETA = 0.1
SIZES = {
    ("cpu", False): [(512, 1024, 151_936)],
    ("cpu", True): [(64, 256, 32_000)],
    ("cuda", False): [(8192, 4096, 151_936)],
    ("cuda", True): [(8192, 4096, 151_936)],
}
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
FROM_HIDDEN_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def cases(device: str, quick: bool, dtypes: list[torch.dtype]) -> Iterator[Case]:
    for dtype in dtypes:
        for tokens, width, vocab in SIZES[device, quick]:
            yield _from_logits(dtype, tokens, vocab, device)
            yield _exact_kl(dtype, tokens, vocab, device)
            few = tokens // 4 if device == "cpu" and dtype == torch.float32 else tokens  # three seconds a product
            yield _from_hidden(dtype, few, width, vocab, device)


def plain_dpo(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """As a trainer writes it."""
    chosen, rejected = (logprobs.sum(-1) - ref_logprobs.sum(-1)).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def plain_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def coefficients_of(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The gradient of the loss with respect to float64 log-probs."""
    leaf = logprobs.double().requires_grad_()
    plain_dpo(leaf, ref_logprobs.double()).backward()
    return leaf.grad


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Providers:
    """Loss and gradients of ``sources`` by several providers."""

    def __init__(self, sources: tuple[Tensor, ...], error: Any, allowed: float) -> None:
        self.sources, self.error, self.allowed = sources, error, allowed

    def __call__(
        self,
        name: str,
        loss: Loss,
        *,
        compile: bool = False,
        compiles: bool = False,
        missing: str = "",
        allowed: float | None = None,
    ) -> Provider:
        """``compiles``: it calls torch.compile itself."""

        def prepare() -> Run:
            function = compiled(loss) if compile else loss

            def run() -> tuple[Tensor, ...]:
                leaves = [x.detach().requires_grad_() for x in self.sources]
                function(*leaves).backward()
                return tuple(x.grad for x in leaves)

            return run

        return Provider(name, prepare, self.error, allowed or self.allowed, compile or compiles, missing)

    def in_place(self, name: str, loss: Loss) -> Provider:
        """Of the first source, a copy of which is overwritten."""
        source = self.sources[0]
        overwritten = source.clone()

        def prepare() -> Run:
            def run() -> tuple[Tensor, ...]:
                x = overwritten.detach().requires_grad_()
                loss(x).backward()
                return (x.grad,)

            return run

        return Provider(name, prepare, self.error, self.allowed, reset=lambda: overwritten.copy_(source), ceiling=COPY)


def _from_logits(dtype: torch.dtype, tokens: int, vocab: int, device: str) -> Case:
    logits = torch.randn(SEQUENCES, tokens // SEQUENCES, vocab, device=device).mul_(3).to(dtype)
    ids = torch.randint(vocab, logits.shape[:-1], device=device)
    chunks = zip(logits.flatten(0, 1).split(64), ids.flatten().split(64), strict=True)
    exact = torch.cat([plain_logprobs_double(x, i) for x, i in chunks]).view(ids.shape)
    ref = (exact + 0.1 * torch.randn_like(exact)).float()
    rows = some_rows(tokens).to(device)
    truth = -torch.softmax(logits.flatten(0, 1)[rows].double(), -1)
    truth[torch.arange(len(rows)), ids.flatten()[rows]] += 1
    truth *= coefficients_of(exact, ref).flatten()[rows, None]

    def fused(x: Tensor, **options: Any) -> Tensor:
        return fusedpo.preference_loss_from_logits(x, ids, ref, objective=objectives.dpo(BETA), **options).loss

    def eager(x: Tensor) -> Tensor:
        return plain_dpo(plain_logprobs(x, ids), ref)

    def trl(x: Tensor) -> Tensor:
        from trl.trainer.utils import selective_log_softmax

        return plain_dpo(selective_log_softmax(x, ids).float(), ref)

    provider = _Providers((logits,), lambda g: relative_error(g[0].view(-1, vocab)[rows], truth), ALLOWED[dtype])
    return Case(
        group=f"DPO from logits, loss and gradient, {_dtype(dtype)}",
        sizes={"T": tokens, "V": vocab},
        providers=[
            clone(logits),
            copy(logits),
            provider("fusedpo", fused),
            provider.in_place("fusedpo, in place", lambda x: fused(x, inplace=True)),
            provider("fusedpo, torch.compile", fused, compile=True),
            provider("eager", eager),
            provider("torch.compile", eager, compile=True),
            provider("trl", trl, allowed=ROUNDED[dtype], missing=not_installed("trl")),
            Provider("liger", lambda: lambda: None, missing="starts from hidden states"),
        ],
        ceiling=CLONE,
        bytes_moved=2 * logits.numel() * logits.element_size(),
    )


def plain_logprobs_double(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax(logits.double(), -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _from_hidden(dtype: torch.dtype, tokens: int, width: int, vocab: int, device: str) -> Case:
    hidden = torch.randn(SEQUENCES, tokens // SEQUENCES, width, device=device).to(dtype)
    weight = (torch.randn(vocab, width, device=device) * 3 * width**-0.5).to(dtype)
    ids = torch.randint(vocab, hidden.shape[:-1], device=device)
    exact = Exact(hidden, weight, ids)
    # the reference is another head on the same hidden states, so that Liger, which computes it, sees the same
    ref_weight = (weight + 0.01 * torch.randn_like(weight)).to(dtype)
    ref = Exact(hidden, ref_weight, ids).logprobs.float()
    truth = exact.gradients(coefficients_of(exact.logprobs, ref))

    def error(gradients: tuple[Tensor, ...]) -> float:
        of_hidden, of_weight = gradients
        some = of_hidden.view(-1, width)[exact.rows], of_weight[exact.columns]
        return max(relative_error(result, t) for result, t in zip(some, truth, strict=True))

    def fused(h: Tensor, w: Tensor, **options: Any) -> Tensor:
        return fusedpo.preference_loss_from_hidden(h, w, ids, ref, objective=objectives.dpo(BETA), **options).loss

    def eager(h: Tensor, w: Tensor) -> Tensor:
        return plain_dpo(plain_logprobs(h @ w.T, ids), ref)

    def trl(h: Tensor, w: Tensor) -> Tensor:
        """Its fused head."""
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

        arguments = (h.flatten(0, 1), w, None, ids.flatten(), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
        return plain_dpo(ChunkedLogProbFunction.apply(*arguments)[0].view(ids.shape), ref)

    def liger(h: Tensor, w: Tensor) -> Tensor:
        """It computes the log-probs of the reference, too: one product more."""
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        return LigerFusedLinearDPOLoss(beta=BETA)(w, h, ids, ref_input=hidden, ref_weight=ref_weight)[0]

    provider = _Providers((hidden, weight), error, FROM_HIDDEN_ALLOWED[dtype])
    return Case(
        group=f"DPO from hidden states, loss and gradients, {_dtype(dtype)}",
        sizes={"T": tokens, "H": width, "V": vocab},
        providers=[
            three_products(hidden, weight, torch.ones_like(ids, dtype=torch.bool)),
            provider("fusedpo", fused),
            provider("fusedpo, four products", lambda h, w: fused(h, w, chunk_tokens=tokens // SEQUENCES)),
            provider("eager", eager),
            provider("torch.compile", eager, compile=True),
            provider(f"trl, {'Triton' if device == 'cuda' else 'PyTorch'}", trl, missing=not_installed("trl")),
            provider(
                "liger, torch.compile, with the reference", liger, compiles=True, missing=not_installed("liger_kernel")
            ),
        ],
        ceiling=PRODUCTS,
        bytes_moved=2 * (hidden.numel() + weight.numel()) * hidden.element_size(),
        flops=6 * tokens * width * vocab,
    )


def _exact_kl(dtype: torch.dtype, tokens: int, vocab: int, device: str) -> Case:
    logits, ref = (torch.randn(tokens, vocab, device=device).mul_(3).to(dtype) for _ in range(2))
    rows = some_rows(tokens).to(device)
    a, b = (torch.log_softmax(x[rows].double(), -1) for x in (logits, ref))
    truth = a.exp() * (a - b - (a.exp() * (a - b)).sum(-1, keepdim=True)) / tokens

    def fused(x: Tensor, **options: Any) -> Tensor:
        return fusedpo.exact_kl(x, ref, **options).loss

    def eager(x: Tensor) -> Tensor:
        p, q = torch.log_softmax(x.float(), -1), torch.log_softmax(ref.float(), -1)
        return F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()

    provider = _Providers((logits,), lambda g: relative_error(g[0][rows], truth), ALLOWED[dtype])
    return Case(
        group=f"KL divergence over the vocabulary, loss and gradient, {_dtype(dtype)}",
        sizes={"T": tokens, "V": vocab},
        providers=[
            clone(logits),
            copy(logits),
            provider("fusedpo", fused),
            provider.in_place("fusedpo, in place", lambda x: fused(x, inplace=True)),
            provider("eager", eager),
            provider("torch.compile", eager, compile=True),
        ],
        ceiling=CLONE,
        bytes_moved=3 * logits.numel() * logits.element_size(),
    )
