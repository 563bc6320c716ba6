"""Layer 1: token log-probs and entropy, forward and backward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

import fusedpo
from fusedpo import _checks, backends

from .batch import some_rows
from .harness import (
    CLONE,
    COPY,
    READ,
    Case,
    Provider,
    Run,
    clone,
    compiled,
    copy,
    microseconds,
    not_installed,
    one_read,
    relative_error,
)

SIZES = {
    ("cpu", False): [(512, 151_936), (128, 151_936), (512, 32_000), (128, 262_144)],
    ("cpu", True): [(64, 151_936)],
    ("cuda", False): [(8192, 151_936), (1024, 151_936), (8192, 32_000), (8192, 262_144)],
    ("cuda", True): [(8192, 151_936)],
}

Function = Callable[[Tensor, Tensor], tuple[Tensor, ...]]

OVERWRITE_LOGITS = ("fusedpo, in place", "liger, Triton, no entropy")


def cases(device: str, quick: bool, dtypes: list[torch.dtype]) -> Iterator[Case]:
    for dtype in dtypes:
        for tokens, vocab in SIZES[device, quick]:
            yield from _cases(tokens, vocab, dtype, device)
    if not quick:
        yield from _slice_against_next_tokens(*SIZES[device, quick][0], device)


def overhead() -> dict[str, float]:
    """Processor time of one small call in microseconds, on one thread of the CPU.

    "by Triton up to its launch": all that a call on an accelerator runs before Triton takes over, on CPU tensors.
    """
    x, ids = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)
    leaf = torch.randn(4, 8, requires_grad=True)
    calls = {
        "no gradient": lambda: fusedpo.token_logprobs(x, ids),
        "with gradient": lambda: fusedpo.token_logprobs(leaf, ids),
        "with gradient and entropy": lambda: fusedpo.token_logprobs(leaf, ids, return_entropy=True),
    }
    times = {f"token_logprobs, {name}": microseconds(call) for name, call in calls.items()}
    if not not_installed("triton"):
        with triton_without_its_launch():
            for name, call in calls.items():
                times[f"token_logprobs by Triton up to its launch, {name}"] = microseconds(call)
    return times | {"log_softmax and gather": microseconds(lambda: eager_without_entropy(leaf, ids))}


@contextmanager
def triton_without_its_launch() -> Iterator[None]:
    """CPU tensors go the way of a GPU's: through the Triton launcher, values unchecked; but no kernel is launched."""
    from fusedpo.triton_kernels import logprobs as kernels

    on_cpu = _checks.values_are_free
    no_kernel = defaultdict(lambda: lambda *arguments, **options: None)  # launched by no_kernel[grid](...)
    with (
        mock.patch.dict(backends.IMPLEMENTATIONS["token_logprobs"], triton=("cpu",)),
        mock.patch.object(_checks, "values_are_free", lambda *tensors: not on_cpu(*tensors)),
        mock.patch.object(kernels, "_token_logprobs_kernel", no_kernel),
        fusedpo.backend("triton"),
    ):
        yield


def fused(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    return fusedpo.token_logprobs(logits, ids, return_entropy=True)


def fused_without_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    return (fusedpo.token_logprobs(logits, ids),)


def fused_in_place(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    return fusedpo.token_logprobs(logits, ids, return_entropy=True, inplace_backward=True)


def eager(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """As trainers write it: float32 log-softmax, gather, entropy from the same log-probs."""
    logp = torch.log_softmax(logits.float(), -1)
    return logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def eager_without_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    return (torch.log_softmax(logits.float(), -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1),)


def trl(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, ids)


def trl_without_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    from trl.trainer.utils import selective_log_softmax

    return (selective_log_softmax(logits, ids),)


def liger(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return (-liger_cross_entropy(logits, ids, reduction="none"),)


def _functions(device: str) -> Iterator[tuple[str, Function, str]]:
    """Name, function, and why it is missing."""
    yield "fusedpo", fused, ""
    yield "fusedpo, no entropy", fused_without_entropy, ""
    yield "fusedpo, in place", fused_in_place, ""
    yield "eager", eager, ""
    yield "eager, no entropy", eager_without_entropy, ""
    yield "torch.compile", eager, ""
    kernels = "Triton" if device == "cuda" else "PyTorch"
    yield f"trl, {kernels}", trl, not_installed("trl")
    yield f"trl, {kernels}, no entropy", trl_without_entropy, not_installed("trl")
    no_gpu = "" if device == "cuda" else "its Triton kernels need a GPU"
    yield "liger, Triton, no entropy", liger, not_installed("liger_kernel") or no_gpu


def _cases(tokens: int, vocab: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    logits = torch.randn(tokens, vocab, device=device).mul_(3).to(dtype)
    overwritten = logits.clone()
    ids = torch.randint(vocab, (tokens,), device=device)
    upstream = torch.randn(2, tokens, device=device)
    size = logits.numel() * logits.element_size()
    label = str(dtype).removeprefix("torch.")
    rows = some_rows(tokens).to(device)  # they are compared with float64

    def truth(count: int) -> tuple[list[Tensor], Tensor]:
        """The first ``count`` results, and the gradient from these."""
        x = logits[rows].double().requires_grad_()
        logp = torch.log_softmax(x, -1)
        results = [logp.gather(-1, ids[rows].unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)][:count]
        torch.autograd.backward(results, list(upstream[:count, rows].double()))
        return [r.detach() for r in results], x.grad

    def provider(name: str, function: Function, missing: str, *, backward: bool) -> Provider:
        is_compiled, in_place = name == "torch.compile", name in OVERWRITE_LOGITS
        source = overwritten if in_place else logits
        results, exact_gradient = truth(1 if name.endswith("no entropy") else 2)

        def prepare() -> Run:
            call = compiled(function) if is_compiled else function

            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return call(logits, ids)

            def both() -> Tensor:
                x = source.detach().requires_grad_()
                outputs = call(x, ids)
                torch.autograd.backward(outputs, list(upstream[: len(outputs)]))
                return x.grad

            return both if backward else forward

        def value_error(outputs: tuple[Tensor, ...]) -> float:
            return max(relative_error(o[rows], r) for o, r in zip(outputs, results, strict=True))

        def gradient_error(gradient: Tensor) -> float:
            return relative_error(gradient[rows], exact_gradient)

        check = gradient_error if backward else value_error
        allowed = max(1e-4, 4 * torch.finfo(dtype).eps)  # some compute in the dtype of the logits
        reset = (lambda: overwritten.copy_(logits)) if in_place and backward else None
        return Provider(name, prepare, check, allowed, is_compiled, missing, reset, COPY if reset else "")

    sizes = {"T": tokens, "V": vocab}
    forward = [provider(*f, backward=False) for f in _functions(device) if f[0] != "fusedpo, in place"]
    yield Case(f"forward, {label}", sizes, [one_read(logits), *forward], READ, size)
    both = [provider(*f, backward=True) for f in _functions(device)]
    yield Case(f"forward and backward, {label}", sizes, [clone(logits), copy(logits), *both], CLONE, 3 * size)


def _slice_against_next_tokens(tokens: int, vocab: int, device: str) -> Iterator[Case]:
    """Dropping the last position by a slice of the logits, and by rolling the ids instead."""
    logits = torch.randn(4, tokens // 4, vocab, device=device)
    ids = torch.randint(vocab, logits.shape[:-1], device=device)
    target, mask = fusedpo.next_tokens(ids)
    rows = some_rows(ids.shape[1] - 1, 4).to(device)  # of each sequence: they are compared with float64
    x = logits[:, rows].double().requires_grad_()
    exact = torch.log_softmax(x, -1).gather(-1, ids[:, rows + 1].unsqueeze(-1)).squeeze(-1)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), x)

    def sliced(x: Tensor) -> Tensor:
        return fusedpo.token_logprobs(x[:, :-1], ids[:, 1:])

    def rolled(x: Tensor) -> Tensor:
        return fusedpo.token_logprobs(x, target, mask=mask)

    def both(function: Callable[[Tensor], Tensor]) -> Run:
        def run() -> Tensor:
            x = logits.detach().requires_grad_()
            function(x).sum().backward()
            return x.grad

        return run

    def error(result: Tensor) -> float:
        return relative_error(result[:, rows], exact.detach() if result.dim() == 2 else exact_gradient)

    functions = {"logits[:, :-1]": sliced, "next_tokens": rolled}
    sizes, size = {"T": tokens, "V": vocab}, logits.numel() * logits.element_size()
    forward = [Provider(name, lambda f=f: lambda: f(logits), error, 1e-4) for name, f in functions.items()]
    yield Case("slice or roll, forward", sizes, forward, "next_tokens", size)
    backward = [Provider(name, lambda f=f: both(f), error, 1e-4) for name, f in functions.items()]
    yield Case("slice or roll, forward and backward", sizes, backward, "next_tokens", 3 * size)
