"""Layer 1 on this machine: token log-probs and entropy, forward and backward, against what trainers use today.

python bench/token_logprobs.py [--rows 512] [--vocab 151936] [--repeats 9] [--quick] [--out out/bench]
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from harness import Provider, Row, measure, microseconds, progress, relative_error, report
from torch import Tensor

import fusedpo

Function = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


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
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return selective_log_softmax(logits, ids), entropy_from_logits(logits)


def functions() -> Iterator[tuple[str, Function, str]]:
    """Name, function, and why it is missing."""
    yield "fusedpo", fused, ""
    yield "fusedpo, no entropy", fused_without_entropy, ""
    yield "fusedpo, in place", fused_in_place, ""
    yield "eager", eager, ""
    yield "eager, no entropy", eager_without_entropy, ""
    yield "torch.compile", eager, ""
    yield "trl", trl, "" if importlib.util.find_spec("trl") else "not installed"
    yield "liger", eager, "its Triton kernels need a GPU" if not torch.cuda.is_available() else "not wrapped"


def cases(rows: int, vocab: int, dtype: torch.dtype, repeats: int) -> Iterator[list[Row]]:
    logits = torch.randn(rows, vocab).mul_(3).to(dtype)
    ids = torch.randint(0, vocab, (rows,))
    upstream = torch.randn(rows), torch.randn(rows)
    size = logits.numel() * logits.element_size()
    label = f"{str(dtype).removeprefix('torch.')} {rows} x {vocab}"

    few = slice(0, 8)  # rows that are compared with float64
    x64 = logits[few].double().requires_grad_()
    truth = eager_float64(x64, ids[few])
    torch.autograd.backward(truth, [u[few].double() for u in upstream])
    entropy_error_is_seen_by = {"fusedpo", "fusedpo, in place", "eager", "torch.compile", "trl"}

    def value_error(result: tuple[Tensor, ...]) -> float:
        return max(relative_error(r[few], t.detach()) for r, t in zip(result, truth, strict=False))

    def gradient_error(gradient: Tensor) -> float:
        return relative_error(gradient[few], x64.grad)

    def forward(name: str, function: Function) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            call = torch.compile(function, dynamic=False) if name == "torch.compile" else function

            def run() -> object:
                with torch.no_grad():
                    return call(logits, ids)

            return run

        return prepare

    def both(name: str, function: Function) -> Callable[[], Callable[[], object]]:
        """Forward and backward, from fresh logits where the last call overwrote them (the copy is not part of it)."""

        def prepare() -> Callable[[], object]:
            call = torch.compile(function, dynamic=False) if name == "torch.compile" else function
            leaf = logits.clone() if name == "fusedpo, in place" else logits

            def run() -> Tensor:
                x = leaf.detach().requires_grad_()
                outputs = call(x, ids)
                torch.autograd.backward(outputs, list(upstream[: len(outputs)]))
                return x.grad

            return run

        return prepare

    def read() -> Callable[[], object]:
        words = logits.view(torch.int32)
        return lambda: words.max()

    def copy() -> Callable[[], object]:
        target = torch.empty_like(logits)
        return lambda: target.copy_(logits)

    exact = torch.finfo(torch.float32).eps * 100
    rounded = 2 * torch.finfo(dtype).eps + exact
    yield measure(
        f"forward {label}",
        [
            Provider("one read", read),
            *(Provider(n, forward(n, f), value_error, 1e-2, n == "torch.compile", m) for n, f, m in functions()),
        ],
        bytes_moved=size,
        ceiling="one read",
        repeats=repeats,
    )
    yield measure(
        f"forward+backward {label}",
        [
            Provider("one copy", copy),
            *(
                Provider(
                    n,
                    both(n, f),
                    gradient_error if n in entropy_error_is_seen_by else None,
                    max(rounded, 1e-2),
                    n == "torch.compile",
                    m,
                )
                for n, f, m in functions()
            ),
        ],
        bytes_moved=3 * size,
        ceiling="one copy",
        repeats=repeats,
    )


def eager_float64(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits, -1)
    return logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def slice_against_next_tokens(rows: int, vocab: int, repeats: int) -> list[Row]:
    """Dropping the last position by a slice of the logits, and by rolling the ids instead."""
    logits = torch.randn(4, rows // 4, vocab)
    ids = torch.randint(0, vocab, logits.shape[:-1])
    target, mask = fusedpo.next_tokens(ids)

    def sliced() -> Tensor:
        x = logits.detach().requires_grad_()
        fusedpo.token_logprobs(x[:, :-1], ids[:, 1:]).sum().backward()
        return x.grad

    def rolled() -> Tensor:
        x = logits.detach().requires_grad_()
        fusedpo.token_logprobs(x, target, mask=mask).sum().backward()
        return x.grad

    def sliced_forward() -> Tensor:
        return fusedpo.token_logprobs(logits[:, :-1], ids[:, 1:])

    def rolled_forward() -> Tensor:
        return fusedpo.token_logprobs(logits, target, mask=mask)

    rows_ = []
    for case, one, other in (
        ("slice or roll, forward", sliced_forward, rolled_forward),
        ("slice or roll, forward+backward", sliced, rolled),
    ):
        providers = [Provider("logits[:, :-1]", lambda f=one: f), Provider("next_tokens", lambda f=other: f)]
        size = logits.numel() * logits.element_size()
        rows_ += measure(case, providers, bytes_moved=size, ceiling="next_tokens", repeats=repeats)
    return rows_


def overhead() -> dict[str, float]:
    """Processor time of one small call in microseconds, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, ids = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)
    one, leaf = torch.ones(()), torch.randn(4, 8, requires_grad=True)
    operator = torch.ops.fusedpo.token_logprobs.native
    result = {
        "operator alone": microseconds(lambda: operator(x, ids, one, None, False)),
        "token_logprobs, no gradient": microseconds(lambda: fusedpo.token_logprobs(x, ids)),
        "token_logprobs, with gradient": microseconds(lambda: fusedpo.token_logprobs(leaf, ids)),
        "log_softmax and gather": microseconds(lambda: eager_without_entropy(leaf, ids)),
    }
    torch.set_num_threads(threads)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="64 rows, three repeats")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    rows, repeats = (64, 3) if arguments.quick else (arguments.rows, arguments.repeats)
    results: list[Row] = []
    for dtype in progress([torch.float32, torch.bfloat16], "token_logprobs"):
        for block in cases(rows, arguments.vocab, dtype, repeats):
            results += block
    results += slice_against_next_tokens(rows, arguments.vocab, repeats)
    report("token_logprobs", results, arguments.out, overhead_microseconds=overhead())


if __name__ == "__main__":
    main()
