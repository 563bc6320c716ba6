"""What limits the one pass on a CPU: its parts, each alone, beside the whole: ``python -m fusedpo.bench.limits``.

clear      the pages of a new gradient: allocated, and one word of each page written
copy       the bytes: the logits read once and written once, into memory that is there
arithmetic the two sweeps over rows that stay in a core's L2; reduce: the first of them
call       what a call costs besides, by two rows of few logits

In place the pass can take ``max(copy, arithmetic) + call``, out of place ``clear`` more. Where it takes longer, its
parts do not overlap as they might; where ``arithmetic`` is above ``copy``, only fewer instructions help.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import fusedpo
from fusedpo import objectives

from .cli import MEMORY
from .harness import cold_caches, page_faults
from .report import markdown_table

SAMPLES = 15


def milliseconds(run: Callable[[], object], *, cold: bool, before: Callable[[], object] = lambda: None) -> float:
    times = []
    for _ in range(SAMPLES + 1):  # the first is not counted
        before()
        if cold:
            cold_caches()
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[1:])


def one_pass(logits: Tensor, n: int, *, inplace: bool) -> Callable[[], object]:
    shape = logits.shape[:-1]
    ids, old = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -12.0)
    advantages, objective = torch.ones(shape[0]), objectives.nfpo(n)

    def run() -> None:
        x = logits.detach().requires_grad_()
        fusedpo.policy_loss_from_logits(x, ids, old, advantages, objective=objective, inplace=inplace).loss.backward()

    return run


def parts(tokens: int, vocab: int, dtype: torch.dtype, n: int) -> list[str]:
    logits = torch.randn(4, tokens // 4, vocab).mul_(3).to(dtype)
    target, overwritten = logits.clone(), logits.clone()
    few = torch.randn(1, torch.get_num_threads(), vocab).mul_(3).to(dtype)  # one per thread, which keeps it
    rows, tiny = few.shape[1], torch.randn(4, 1, 64).to(dtype)
    ids, words = torch.zeros(few.shape[:-1], dtype=torch.int64), 4096 // logits.element_size()

    def reduce() -> None:
        fusedpo.token_logprobs(few, ids, return_entropy=True)

    call = milliseconds(one_pass(tiny, n, inplace=True), cold=False)
    figures = {
        "clear": milliseconds(lambda: torch.empty_like(logits).flatten()[::words].zero_(), cold=True),
        "copy": milliseconds(lambda: target.copy_(logits), cold=True),
        "clone": milliseconds(lambda: logits.clone(), cold=True),
        "arithmetic": (milliseconds(one_pass(few, n, inplace=False), cold=False) - call) * tokens / rows,
        "reduce": milliseconds(lambda: fusedpo.token_logprobs(few, ids, return_entropy=True), cold=False)
        * tokens
        / rows,
        "call": call,
        "in place": milliseconds(
            one_pass(overwritten, n, inplace=True), cold=True, before=lambda: overwritten.copy_(logits)
        ),
        "out of place": milliseconds(one_pass(logits, n, inplace=False), cold=True),
    }
    before = page_faults()
    one_pass(logits, n, inplace=False)()
    return [f"{dtype}, T = {tokens}", *(f"{value:.3g}" for value in figures.values()), str(page_faults() - before)]


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    names = ("clear", "copy", "clone", "arithmetic", "reduce", "call", "in place", "out of place", "page faults")
    cases = [(tokens, dtype) for dtype in (torch.float32, torch.bfloat16) for tokens in arguments.tokens]
    lines = [parts(tokens, arguments.vocab, dtype, arguments.n) for tokens, dtype in cases]
    print("\n".join(markdown_table(["ms", *names], lines)))


if __name__ == "__main__":
    if not MEMORY.items() <= os.environ.items():  # what the C library and torch read at their start
        os.execve(sys.executable, [sys.executable, "-m", "fusedpo.bench.limits", *sys.argv[1:]], os.environ | MEMORY)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 128])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    main(parser.parse_args())
