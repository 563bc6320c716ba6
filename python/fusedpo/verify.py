"""``python -m fusedpo verify``: the kernels that run here against the reference in float64, on awkward inputs.

It needs neither the tests nor anything but torch. The bounds are roundings: of float32 arithmetic, and one of the dtype
of a gradient that is stored. Where no kernel runs, the reference in float32 is compared with itself in float64.
"""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fusedpo

from . import advantages, backends, objectives
from .objectives import KL, Objective


class Finding(NamedTuple):
    """The error of one comparison and its bound; that of bitwise equality is 0."""

    what: str
    error: float
    bound: float


class Result(NamedTuple):
    """What one kind of comparison came to; ``note`` says why it did not take place, or what was raised."""

    operator: str
    device: str
    implementation: str
    what: str
    comparisons: int = 0
    worst: float = 0.0
    bound: float = 0.0
    ok: bool = True
    note: str = ""


FLOAT32 = 1e-5
# Of the reference, which divides by the temperature before it subtracts the maximum: a logit of -300 over 0.7 is
# rounded by up to 1.5e-5, and an eager sum over the vocabulary adds to it.
EAGER_FLOAT32 = 1e-4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (1, 31, 1000, 50_257)


def rounding(dtype: torch.dtype) -> float:
    return FLOAT32 + (0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)


def error(result: Tensor, truth: Tensor, at_least: float = 0.0) -> float:
    """The largest difference over the largest value or ``at_least``; infinite for a NaN that the truth has not."""
    result, truth = result.detach().double().cpu(), truth.detach().double().cpu()
    if result.shape != truth.shape:
        return float("inf")
    same = result == truth  # infinities, too
    difference = (result - truth).abs().masked_fill(same, 0)
    scale = max(at_least, truth[truth.isfinite()].abs().max().item() if truth.isfinite().any() else 0.0)
    largest = difference.max().item() if difference.numel() else 0.0
    return largest / (scale or 1.0) if difference.isfinite().all() else float("inf")


def unequal(a: Tensor, b: Tensor) -> float:
    return 0.0 if torch.equal(a, b) else float("inf")


# -------------------------------------------------------------------------------------------------------------- layer 1


def _awkward_logits(dtype: torch.dtype, vocab: int, device: str) -> Iterator[Tensor]:
    """[5, V]: random, all far below and above 0, confident, with columns of -inf, and rows with a stride."""
    x = torch.randn(5, vocab, device=device) * 3
    yield x.to(dtype)
    yield (x - 300).to(dtype)
    yield (x + 80).to(dtype)
    yield (x.clone().index_fill_(1, torch.tensor([vocab // 2], device=device), 40.0)).to(dtype)
    yield x.masked_fill(torch.arange(vocab, device=device) % 3 == 1, -torch.inf).to(dtype)
    yield torch.randn(10, 2 * vocab, device=device).to(dtype)[::2, :vocab]


def _outputs_and_gradient(logits: Tensor, dtype: torch.dtype, upstream: Tensor, **arguments: Any) -> list[Tensor]:
    leaf = (logits.double() if dtype == torch.float64 else logits.detach()).requires_grad_()
    outputs = fusedpo.token_logprobs(leaf, **arguments, temperature=0.7, return_entropy=True)
    (gradient,) = torch.autograd.grad(outputs, leaf, list(upstream.to(outputs[0].dtype)))
    return [*outputs, gradient]


def token_logprobs(device: str) -> Iterator[Finding]:
    for dtype, vocab in itertools.product(DTYPES, VOCABULARIES):
        for logits in _awkward_logits(dtype, vocab, device):
            ids = torch.randint(vocab, (5,), device=device) // 3 * 3  # a column that is never -inf
            mask = torch.tensor([True, True, False, True, True], device=device)
            upstream = torch.randn(2, 5, device=device)
            with backends.backend("reference"):
                truth = _outputs_and_gradient(logits, torch.float64, upstream, token_ids=ids, mask=mask)
            ignored = ids.masked_fill(~mask, -100)
            result = _outputs_and_gradient(logits, dtype, upstream, token_ids=ignored, mask=mask)
            for name, r, t in zip(("log-probs", "entropy"), result[:2], truth[:2], strict=True):
                yield Finding(f"{name} against float64", error(r, t, at_least=1.0), FLOAT32)
            yield Finding("gradient against float64", error(result[2], truth[2]), rounding(dtype))
            with torch.no_grad():
                whole = fusedpo.token_logprobs(logits, ids)
                again = fusedpo.token_logprobs(logits, ids)
                alone = torch.cat([fusedpo.token_logprobs(logits[i : i + 1], ids[i : i + 1]) for i in range(5)])
            yield Finding("the same from run to run, bitwise", unequal(whole, again), 0.0)
            yield Finding("a row does not depend on its batch, bitwise", unequal(whole, alone), 0.0)
    if device == "cuda" and torch.cuda.mem_get_info()[0] > 12 << 30:
        rows, vocab = 16_384, 151_936
        logits, ids = torch.empty(rows, vocab, dtype=torch.bfloat16, device=device).normal_(), torch.arange(rows) * 9
        whole, last = fusedpo.token_logprobs(logits, ids.to(device)), logits[-1].double().log_softmax(-1)
        yield Finding("the last row of more than 2^31 logits", error(whole[-1], last[ids[-1]]), FLOAT32)


def token_statistics(device: str) -> Iterator[Finding]:
    for dtype, vocab in itertools.product(DTYPES, VOCABULARIES):
        for logits in _awkward_logits(dtype, vocab, device):
            ids = torch.randint(vocab, (5,), device=device) // 3 * 3  # a column that is never -inf
            ids[::2] = logits[::2].argmax(-1)
            with backends.backend("reference"):
                truth = fusedpo.token_statistics(logits.double(), ids, temperature=0.7)
            result = fusedpo.token_statistics(logits, ids, temperature=0.7)
            for name, r, t in zip(truth._fields[:4], result, truth, strict=False):
                yield Finding(f"{name} against float64", error(r, t, at_least=1.0), FLOAT32)
            yield Finding("is_top1", unequal(result.is_top1, truth.is_top1), 0.0)


# -------------------------------------------------------------------------------------------------------------- layer 2

OBJECTIVES: dict[str, Objective] = {
    **{name: getattr(objectives, name)() for name in ("ppo", "grpo", "dr_grpo", "dapo", "gspo", "luspo", "gmpo")},
    **{name: getattr(objectives, name)() for name in ("vespo", "ctpo", "cispo", "sapo", "dppo_tv", "dppo_kl", "cppo")},
    **{f"nfpo({n})": objectives.nfpo(n) for n in (1, 4, 64)},
    "nfpo, differentiated": objectives.nfpo(4, differentiate=True),
    "dro": objectives.dro(0.1),
    "reinforce, KL, entropy": objectives.reinforce(kl=KL("k3", 0.1), entropy_coef=0.01),
}


def _tokens(device: str, packed: bool) -> dict[str, Any]:
    """A batch with masked tokens, which hold nothing but nan; some ratios are far outside of any clip."""
    shape = (64,) if packed else (4, 16)
    mask = torch.rand(shape) < 0.8
    logprobs = -3 * torch.rand(shape)
    old = logprobs + torch.where(torch.rand(shape) < 0.1, 30.0, 0.2) * torch.randn(shape)
    batch = {
        "logprobs": logprobs.masked_fill(~mask, torch.nan),
        "old_logprobs": old.masked_fill(~mask, torch.inf),
        "ref_logprobs": old + 0.1 * torch.randn(shape),
        "entropy": torch.rand(shape),
        "is_weights": torch.rand(shape),
        "advantages": torch.randn(6 if packed else 4),
        "mask": mask,
    }
    if packed:
        batch["cu_seqlens"] = torch.tensor([0, 1, 20, 20, 41, 50, 64])
    return {name: x.to(device) for name, x in batch.items()}


def _loss_and_gradients(objective: Objective, batch: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
    leaves = [cast[name].requires_grad_() for name in ("logprobs", "entropy")]
    arguments = [cast.pop(name) for name in ("logprobs", "old_logprobs", "advantages")]
    out = fusedpo.policy_loss(*arguments, objective=objective, loss_scale=8.0, **cast)
    gradients = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    return [
        out.loss.detach(),
        *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)),
    ]


def policy_loss(device: str) -> Iterator[Finding]:
    for objective, packed in itertools.product(OBJECTIVES.values(), (False, True)):
        batch = _tokens(device, packed)
        with backends.backend("reference"):
            truth = _loss_and_gradients(objective, batch, torch.float64)
        result = _loss_and_gradients(objective, batch, torch.float32)
        again = _loss_and_gradients(objective, batch, torch.float32)
        layout = "packed" if packed else "padded"
        for name, r, t in zip(("loss", "gradient", "gradient of the entropy"), result, truth, strict=True):
            yield Finding(f"{name} against float64, {layout}", error(r, t), FLOAT32)
        yield Finding("the same from run to run, bitwise", max(map(unequal, result, again)), 0.0)


# -------------------------------------------------------------------------------------------------------------- layer 3


def _maxpo_by_enumeration(rewards: Tensor, k: int) -> Tensor:
    """The mean of the maximum over the subsets of size k with a sample, minus that over those without it."""
    values, everyone = rewards.tolist(), range(len(rewards))
    subsets = [(set(s), max(values[i] for i in s)) for s in itertools.combinations(everyone, k)]

    def mean(numbers: list[float]) -> float:
        return sum(numbers) / len(numbers)

    return torch.tensor(
        [mean([m for s, m in subsets if i in s]) - mean([m for s, m in subsets if i not in s]) for i in everyone],
        dtype=torch.float64,
    )


def group_advantages(device: str) -> Iterator[Finding]:
    rewards = torch.randn(120, device=device)
    rewards[:8] = 0.3  # a group of ties
    ids = torch.arange(120, device=device) % 7
    named: dict[str, dict[str, Any]] = {name: {} for name in ("grpo", "dr_grpo", "rloo", "gpg", "reinforce_rej")}
    named |= {name: {"k": 3} for name in ("maxpo", "pkpo")} | {"opo": {"lengths": torch.arange(120, device=device)}}
    for name, options in named.items():
        for groups in ({"group_size": 8}, {"group_ids": ids}):
            with backends.backend("reference"):
                truth = advantages.compute(name, rewards.double(), **groups, **options)
            result = advantages.compute(name, rewards, **groups, **options)
            yield Finding("every estimator against float64", error(result, truth), FLOAT32)
    few = torch.tensor([0.5, -1.0, 0.5, 2.0, 0.0, 1.0, -0.25], device=device)
    for k in (1, 2, 4, 6):
        result = advantages.maxpo(few, k=k, group_size=7)
        yield Finding("maxpo against all subsets", error(result, _maxpo_by_enumeration(few, k)), FLOAT32)


def token_advantages(device: str) -> Iterator[Finding]:
    rewards, values = torch.randn(2, 5, 33, device=device)
    mask = torch.rand(5, 33, device=device) < 0.8
    garbage, rewards = rewards.masked_fill(~mask, torch.nan), rewards.masked_fill(~mask, 0)
    options: dict[str, Any] = {"gamma": 0.99, "lam": 0.95}
    with backends.backend("reference"):
        truth = advantages.gae(rewards.double(), values.double(), mask=mask, **options)
        returns = advantages.reward_to_go(rewards.double(), mask=mask, gamma=0.9)
    result = advantages.gae(garbage, values, mask=mask, **options)
    yield Finding("gae against float64", max(map(error, result, truth)), FLOAT32)
    sums = advantages.reward_to_go(garbage, mask=mask, gamma=0.9)
    yield Finding("reward_to_go against float64", error(sums, returns), FLOAT32)


def step_advantages(device: str) -> Iterator[Finding]:
    values, step_rewards = torch.randn(3, 6, device=device), torch.randn(3, 5, device=device)
    steps = (torch.arange(40, device=device) // 7 - 1).clamp(max=4).expand(3, 40).contiguous()
    with backends.backend("reference"):
        truth = advantages.vineppo(values.double(), step_rewards=step_rewards.double(), step_ids=steps)
    result = advantages.vineppo(values, step_rewards=step_rewards, step_ids=steps)
    yield Finding("vineppo against float64", error(result, truth), FLOAT32)


def whiten(device: str) -> Iterator[Finding]:
    x, mask = 5 + torch.randn(4, 100, device=device), torch.rand(4, 100, device=device) < 0.7
    with backends.backend("reference"):
        truth = advantages.whiten(x.double(), mask=mask)
    result = advantages.whiten(x.masked_fill(~mask, torch.nan), mask=mask)
    yield Finding("against float64", error(result, truth), FLOAT32)


# ----------------------------------------------------------------------------------------------------------- the fusion


def _fused(device: str, dtype: torch.dtype, vocab: int) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Any]]:
    logits = (3 * torch.randn(3, 40, vocab, device=device)).to(dtype)
    ids = torch.randint(vocab, (3, 40), device=device)
    with backends.backend("reference"):
        logprobs = fusedpo.token_logprobs(logits.float(), ids)
    # No ratio is near a clip bound: rounding would decide there.
    far = 0.4 * torch.randint(-1, 2, (3, 40), device=device) + 0.2 * (torch.rand(3, 40, device=device) - 0.5)
    mask = torch.rand(3, 40, device=device) < 0.6
    return logits, (ids, logprobs - far, torch.randn(3, device=device)), {"mask": mask, "ref_logprobs": logprobs + far}


FUSED = {
    "ppo": objectives.ppo(),
    "grpo, KL": objectives.grpo(kl=KL("k3", 0.05)),
    "nfpo(4)": objectives.nfpo(4),
    "nfpo(4), entropy": objectives.nfpo(4, entropy_coef=0.01),
    "cispo": objectives.cispo(),
    "gspo": objectives.gspo(0.1, 0.1),
    "reinforce": objectives.reinforce(),
}


def _from_logits(logits: Tensor, tokens: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    out = fusedpo.policy_loss_from_logits(leaf, *tokens, **options)
    out.loss.backward(torch.full_like(out.loss, 0.5))
    assert leaf.grad is not None
    return [out.loss.detach(), out.logprobs, leaf.grad]


def one_pass(device: str) -> Iterator[Finding]:
    for objective, dtype, vocab in itertools.product(FUSED.values(), DTYPES[:2], (1000, 4099)):
        logits, tokens, options = _fused(device, dtype, vocab)
        options["objective"] = objective
        with backends.backend("reference"):
            truth = _from_logits(logits.double(), tokens, **options)
        for inplace in (False, True):
            result = _from_logits(logits, tokens, inplace=inplace, **options)
            for name, r, t in zip(("loss", "log-probs", "gradient"), result, truth, strict=True):
                bound = rounding(dtype) if name == "gradient" else FLOAT32
                yield Finding(f"{name} against float64" + inplace * ", in place", error(r, t), bound)


def _exact_kl(logits: Tensor, ref_logits: Tensor, **options: Any) -> list[Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    out = fusedpo.exact_kl(leaf, ref_logits, **options)
    out.loss.backward(torch.full_like(out.loss, 0.5))
    assert leaf.grad is not None
    return [out.loss.detach(), out.kl, leaf.grad]


def exact_kl(device: str) -> Iterator[Finding]:
    for direction, dtype, vocab in itertools.product(("reverse", "forward"), DTYPES[:2], (1000, 4099)):
        logits, _, options = _fused(device, dtype, vocab)
        ref_logits = (logits.float() + 0.3 * torch.randn(logits.shape, device=device)).to(dtype)
        options = {"direction": direction, "mask": options["mask"]}
        with backends.backend("reference"):
            truth = _exact_kl(logits.double(), ref_logits.double(), **options)
        result = _exact_kl(logits, ref_logits, **options)
        for name, r, t in zip(("loss", "divergences", "gradient"), result, truth, strict=True):
            bound = rounding(dtype) if name == "gradient" else FLOAT32
            yield Finding(f"{name} against float64", error(r, t), bound)


def _from_hidden(leaves: tuple[Tensor, ...], tokens: tuple[Tensor, ...], dtype: torch.dtype, **options: Any) -> list:
    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    leaves = tuple(cast(x).requires_grad_() for x in leaves)
    out = fusedpo.policy_loss_from_hidden(*leaves, *map(cast, tokens), **{k: cast(x) for k, x in options.items()})
    return [out.loss.detach(), *torch.autograd.grad(out.loss, leaves)]


def linear_token_logprobs(device: str) -> Iterator[Finding]:
    for objective in FUSED.values():
        _, tokens, options = _fused(device, torch.float32, 1000)
        leaves = torch.randn(3, 40, 32, device=device), torch.randn(1000, 32, device=device) * 0.5
        options["objective"] = objective
        with backends.backend("reference"):
            truth = _from_hidden(leaves, tokens, torch.float64, **options)
        result = _from_hidden(leaves, tokens, torch.float32, **options)
        for name, r, t in zip(("loss", "gradient of hidden", "gradient of weight"), result, truth, strict=True):
            yield Finding(f"policy_loss_from_hidden, {name} against float64", error(r, t), 10 * FLOAT32)


def row_stats(device: str) -> Iterator[Finding]:
    """Rows whose columns are cut in three, one part of them empty: what ranks would send, merged."""
    from .distributed.tensor import operators as operators_of

    operators = operators_of(backends.forced() or "reference")
    for dtype, size in itertools.product(DTYPES, (31, 4099)):
        logits = (4 * torch.randn(6, size, device=device)).to(dtype)
        ids = torch.randint(size, (6,), device=device)
        t = torch.full((), 0.7, device=device)
        cuts = list(itertools.pairwise((0, size // 3, size // 3, size)))
        parts = [operators.row_stats(logits[:, a:b], ids, t, None, a, b - a, 0, True) for a, b in cuts]
        logprobs, entropy, stats = operators.merge_row_stats(torch.stack(parts), t, None, True)
        x = logits.double().cpu().requires_grad_()
        with backends.backend("reference"):
            truth = fusedpo.token_logprobs(x, ids.cpu(), temperature=0.7, return_entropy=True)
        upstream = torch.randn(6)
        expected = torch.autograd.grad(truth, x, (upstream.double(), upstream.double()))[0]
        g = upstream.to(device)
        backward = operators.token_logprobs_backward
        gradient = torch.cat([backward(g, g, logits[:, a:b], ids, t, None, stats, vocab_start=a) for a, b in cuts], -1)
        yield Finding("log-probs of merged shards against float64", error(logprobs[:, 0], truth[0].detach()), FLOAT32)
        yield Finding("entropy of merged shards against float64", error(entropy, truth[1].detach()), FLOAT32)
        yield Finding(f"gradient of shards, {dtype}", error(gradient, expected), rounding(dtype))


def several_ranks(device: str) -> Iterator[Finding]:
    """Two processes on gloo: a loss from logits that are split, and one of sequences that are."""
    from .distributed import selfcheck

    for what, found, bound in selfcheck.on_two_processes():
        yield Finding(what, found, bound)


def torch_compile(device: str) -> Iterator[Finding]:
    """Without a graph break; the graph itself is executed eagerly, which needs no compiler."""
    logits, tokens, options = _fused(device, torch.float32, 1000)
    options |= {"objective": objectives.nfpo(4)}

    def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
        x = logits.detach().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0]

    def loss(x: Tensor) -> Tensor:
        return fusedpo.policy_loss_from_logits(x, *tokens, **options).loss

    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
    yield Finding("fullgraph=True gives the eager gradient", error(gradient(traced), gradient(loss)), FLOAT32)


def no_sync(device: str) -> Iterator[Finding]:
    """On a GPU: any wait of the host for the device raises."""
    logits, (ids, old, _), options = _fused(device, torch.bfloat16, 4099)
    options["objective"] = objectives.nfpo(4)
    for attempt in range(2):  # kernels are compiled and loaded in the first
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            x = logits.detach().requires_grad_()
            adv = advantages.maxpo(torch.randn(3, device=device), k=2, group_size=3)
            fusedpo.policy_loss_from_logits(x, ids, old, adv, **options).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    yield Finding("advantages, loss and gradient without a host sync", 0.0, 0.0)


CHECKS: dict[str, Callable[[str], Iterator[Finding]]] = {
    "token_logprobs": token_logprobs,
    "token_statistics": token_statistics,
    "policy_loss": policy_loss,
    "group_advantages": group_advantages,
    "token_advantages": token_advantages,
    "step_advantages": step_advantages,
    "whiten": whiten,
    "one_pass": one_pass,
    "exact_kl": exact_kl,
    "linear_token_logprobs": linear_token_logprobs,
    "row_stats": row_stats,
    "several ranks": several_ranks,
    "torch.compile": torch_compile,
    "no_sync": no_sync,
}


def _has_gloo() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_gloo_available()


def implementations(operator: str, device: str) -> Iterator[tuple[str, str]]:
    """What is to be checked, and why it cannot be (empty: it can)."""
    if operator not in backends.IMPLEMENTATIONS or not backends.IMPLEMENTATIONS[operator]:
        if operator == "several ranks":
            if device == "cpu":
                yield "auto", "" if _has_gloo() else "torch has no gloo"
        elif operator != "no_sync" or device == "cuda":
            yield "auto", ""
        return
    for name in backends.IMPLEMENTATIONS[operator]:
        yield name, backends.why_not(name, operator, device) or ""
    if all(backends.why_not(name, operator, device) for name in backends.IMPLEMENTATIONS[operator]):
        yield "reference", ""


def check(operator: str, device: str, implementation: str) -> list[Result]:
    """One result per kind of comparison."""
    torch.manual_seed(0)
    findings: dict[str, list[Finding]] = {}
    here = (operator, device, implementation)
    failures = []
    try:
        with backends.backend(implementation), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for finding in CHECKS[operator](device):
                if implementation == "reference" and finding.bound > 0:
                    finding = finding._replace(bound=max(finding.bound, EAGER_FLOAT32))
                findings.setdefault(finding.what, []).append(finding)
    except Exception as raised:  # a kernel that does not run has failed; the others are still checked
        reason = (str(raised).strip() or "no message").splitlines()[0]
        failures = [Result(*here, "raised", ok=False, note=f"{type(raised).__name__}: {reason}")]
    results = []
    for what, found in findings.items():
        worst = max(found, key=lambda f: f.error - f.bound)
        ok = all(f.error <= f.bound for f in found)
        results.append(Result(*here, what, len(found), worst.error, worst.bound, ok))
    return results + failures


def run(devices: Sequence[str]) -> Iterator[Result]:
    for device, operator in itertools.product(devices, CHECKS):
        for implementation, missing in implementations(operator, device):
            if missing:
                yield Result(operator, device, implementation, "not checked", note=missing)
            else:
                yield from check(operator, device, implementation)


def _blocks(results: Iterable[Result]) -> Iterator[tuple[str, list[Result]]]:
    for here, block in itertools.groupby(results, key=lambda r: r[:3]):
        operator, device, implementation = here
        yield f"{operator} ({implementation}, {device})", list(block)


def _cells(r: Result) -> tuple[str, ...]:
    what = f"  {r.what}: {r.note}" if r.note else f"  {r.what}"
    if not r.comparisons:
        return what, "", "", "", "-" if r.ok else "FAILED"
    return what, str(r.comparisons), f"{r.worst:.1e}", f"{r.bound:.0e}", "ok" if r.ok else "FAILED"


def show(results: Iterable[Result]) -> None:
    """With rich, if it is there."""
    header = ("checked", "cases", "worst error", "bound", "")
    lines = [(name, [_cells(r) for r in block]) for name, block in _blocks(results)]
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\t".join(header))
        for name, block in lines:
            print("\n".join([name, *("\t".join(line) for line in block)]))
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for title in header:
        table.add_column(title, justify="left" if title == "checked" else "right")
    for name, block in lines:
        table.add_row(name, style="bold")
        for line in block:
            table.add_row(*line, style="red" if line[-1] == "FAILED" else None)
    Console().print(table)


def main(devices: Sequence[str], out: Path | None) -> int:
    """Prints what was checked; 1 if anything is wrong."""
    started = time.perf_counter()
    results = list(run(devices))
    show(results)
    failed, done = sum(not r.ok for r in results), sum(r.comparisons for r in results)
    seconds = time.perf_counter() - started
    print(f"{done} comparisons in {seconds:.0f} s: " + (f"{failed} kinds FAILED" if failed else "all right"))
    if out is not None:
        cpu = f"CPU, {torch.backends.cpu.get_cpu_capability()}"
        names = {d: torch.cuda.get_device_name() if d == "cuda" else cpu if d == "cpu" else d for d in devices}
        versions = {"fusedpo": fusedpo.__version__, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        document = {"devices": names, **versions, "results": [r._asdict() for r in results]}
        out.write_text(json.dumps(document, indent=1) + "\n")
    return int(failed > 0)
