"""The path from hidden states with a gradient threshold, beside three bare matrix products, with its errors.

    python -m fusedpo.bench.threshold [--out bench/results/MACHINE]

The logits of a policy are ``s (2 z + log f)`` with Gaussian z, Zipf's frequencies f of the tokens, and the scale s with
which the mean entropy is what the name says: a row condenses on few tokens, with a power law behind them, and rows have
tokens in common as those of a text have. ``scattered``: logits ``s z``, and hardly two rows with a token in common.
``flat``: ``z``, a model that has not been trained. All policies have the same weight, and take turns.

``error`` is the larger one of those of the gradients of the hidden states and of the weight, as Frobenius norms over
those of the exact ones, for some rows of both, against float64 from the same hidden states and weight. ``active`` is
the share of columns above the threshold in some row, all rows taken together.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fusedpo

from .batch import OBJECTIVES, SEQUENCES, exact_coefficients, make_batch
from .harness import Case, Provider
from .hidden import ALLOWED, PRODUCTS, Exact, logits_and, three_products
from .record import THRESHOLD

SIZES = {
    ("cpu", False): (512, 1024, 151_936),
    ("cpu", True): (64, 256, 32_000),
    ("cuda", False): (8192, 4096, 151_936),
    ("cuda", True): (2048, 4096, 151_936),
}
SPREAD = 2.0  # of z, beside log f


class Kind(NamedTuple):
    """Of a policy: its mean entropy in nats, whether it has frequent tokens, the exponents of the thresholds.

    Without an exponent the gradient is exact.
    """

    entropy: float | None
    frequent: bool
    powers: Sequence[int | None]


POLICIES = {
    "0.3 nats": Kind(0.3, True, (-14,)),
    "1 nat": Kind(1.0, True, (None, -14)),
    "2 nats": Kind(2.0, True, (-14,)),
    "2 nats scattered": Kind(2.0, False, (-14,)),
    "flat": Kind(None, False, (None, -14)),
}
FLOOR = "one product and zeros"
MASKED = ("1 nat",)
COLUMNS = 256  # whose gradient is compared
PATIENCE = 240.0

Gradients = tuple[Tensor, Tensor, Tensor]  # of hidden states and weight; and the dropped probability


class Policy:
    """Hidden states ``[B, T, H]`` that give, with the weight of :func:`make_weight`, such rows; and tokens drawn.

    ``doubled``: the weight in float64.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, doubled: Tensor, kind: Kind) -> None:
        hidden = hidden.clone()
        hidden[..., 0] = 1 / SPREAD if kind.frequent else 0.0
        scale = 1.0 if kind.entropy is None else scale_of(hidden.flatten(0, 1), weight, kind.entropy)
        self.hidden, self.weight = (hidden * scale).to(weight.dtype), weight
        logits = [(h @ weight.T).float() for h in self.hidden]
        self.widest = max(x.abs().max().item() for x in logits)
        logp = [torch.log_softmax(x, -1) for x in logits]
        self.entropy = torch.stack([mean_entropy(x) for x in logp]).mean().item()
        self.ids = torch.stack([x.exp().multinomial(1)[:, 0] for x in logp])
        halves = [torch.stack([x.amax(0) for x in row.chunk(2)]) for row in logp]
        self.largest = torch.stack(halves).amax(0).exp()  # the largest probability of each column, by halves of [B, T]
        self.exact = Exact(self.hidden, doubled, self.ids, COLUMNS)


def make_weight(vocab: int, width: int, device: str) -> Tensor:
    """Its first column is the logarithm of the frequency of each token, the others are random."""
    weight = torch.randn(vocab, width, device=device) / (width - 1) ** 0.5
    rank = torch.randperm(vocab, device=device) + 1.0
    weight[:, 0] = rank.log().mean() - rank.log()
    return weight


def mean_entropy(logp: Tensor) -> Tensor:
    return -(logp.exp() * logp).sum(-1).mean()


def scale_of(hidden: Tensor, weight: Tensor, entropy: float) -> float:
    """Of logits whose rows have this entropy, by some of the rows."""
    logits = hidden[:: max(1, len(hidden) // 128)].to(weight.dtype) @ weight.T
    low, high = 1.0, 64.0
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        wide = mean_entropy(torch.log_softmax(logits.float() * middle, -1)) < entropy
        low, high = (low, middle) if wide else (middle, high)
    return low


class Task:
    """Loss and gradients of PPO on the tokens that the policy has drawn: no rounding of wide logits decides a clip.

    Of each sequence ``masked`` of the tokens are left out, at its beginning.
    """

    objective = OBJECTIVES["PPO"][0]

    def __init__(self, policy: Policy, masked: float) -> None:
        self.policy, exact = policy, policy.exact
        self.batch = make_batch(exact.logprobs, policy.ids, masked=masked)._replace(old_logprobs=exact.logprobs)
        self.wanted = exact.gradients(exact_coefficients(exact.logprobs, self.batch, self.objective))

    def run(self, threshold: float | None) -> Gradients:
        h, w = self.policy.hidden.detach().requires_grad_(), self.policy.weight.detach().requires_grad_()
        arguments = (h, w, self.policy.ids, None, self.batch.advantages)
        options = {"objective": self.objective, "mask": self.batch.mask, "gradient_threshold": threshold}
        out = fusedpo.policy_loss_from_hidden(*arguments, **options)
        out.loss.backward()
        return h.grad, w.grad, out.metrics["dropped"]

    def errors(self, result: Gradients) -> tuple[float, ...]:
        exact = self.policy.exact
        found = result[0].flatten(0, 1)[exact.rows], result[1][exact.columns]
        return tuple(((x - w).norm() / w.norm()).item() for x, w in zip(found, self.wanted, strict=True))

    @functools.cached_property
    def exact_errors(self) -> tuple[float, ...]:
        return self.errors(self.run(None))

    def active(self, threshold: float) -> float:
        """The share of the columns that are not left out."""
        largest, mask = self.policy.largest, self.batch.mask
        found = (largest.amax(0) if mask.all() else largest[1]) > threshold
        found[self.policy.ids[mask]] = True
        return found.float().mean().item()

    def provider(self, name: str, power: int | None) -> Provider:
        threshold = None if power is None else 2.0**power

        def details(result: Gradients) -> dict[str, float]:
            errors = *self.errors(result), *self.exact_errors
            names = ("error of dHidden", "error of dWeight", "exact: dHidden", "exact: dWeight")
            active = 1.0 if threshold is None else self.active(threshold)
            found = {"nats": self.policy.entropy, "active": active, "dropped": result[2].item()}
            return found | dict(zip(names, errors, strict=True))

        # A logit is off by half a unit in its last place, and a probability by as much. Of a row of dHidden, the square
        # of what is left out is at most the threshold times its probability: rows of this weight are random.
        dtype = self.policy.weight.dtype
        allowed = ALLOWED[dtype] + torch.finfo(dtype).eps / 2 * self.policy.widest + (threshold or 0.0) ** 0.5
        return Provider(
            f"fusedpo, {name}, {'exact' if power is None else f'2^{power}'}",
            lambda: lambda: self.run(threshold),
            lambda result: max(self.errors(result)),
            allowed,
            details=details,
        )


def floor(hidden: Tensor, weight: Tensor, mask: Tensor) -> Provider:
    """What no threshold leaves out: the product that makes the logits, and a gradient of the weight that is 0."""
    return logits_and(FLOOR, hidden, weight, mask, lambda *_: torch.zeros_like(weight))


def cases(device: str, quick: bool, dtypes: list[torch.dtype]) -> Iterator[Case]:
    tokens, width, vocab = SIZES[device, quick]
    hidden = torch.randn(SEQUENCES, tokens // SEQUENCES, width, device=device)
    weight = make_weight(vocab, width, device)
    for dtype in dtypes:
        rounded = weight.to(dtype)
        doubled = rounded.double()
        policies = {name: Policy(hidden, rounded, doubled, kind) for name, kind in POLICIES.items()}
        yield _case(policies, dtype)
        yield _case({name: policies[name] for name in MASKED}, dtype, masked=0.5)


def _case(policies: dict[str, Policy], dtype: torch.dtype, *, masked: float = 0.0) -> Case:
    tasks = {name: Task(policy, masked) for name, policy in policies.items()}
    first = next(iter(tasks.values()))
    hidden, weight, mask = first.policy.hidden, first.policy.weight, first.batch.mask
    (vocab, width), tokens = weight.shape, mask.numel()
    return Case(
        group=f"PPO, gradient threshold, {str(dtype).removeprefix('torch.')}" + (", half masked" if masked else ""),
        sizes={"T": tokens, "H": width, "V": vocab},
        providers=[
            three_products(hidden, weight, mask),
            floor(hidden, weight, mask),
            *(task.provider(name, power) for name, task in tasks.items() for power in POLICIES[name].powers),
        ],
        ceiling=PRODUCTS,
        bytes_moved=2 * (hidden.numel() + weight.numel()) * hidden.element_size(),
        flops=6 * int(mask.sum()) * width * vocab,
    )


def main(argv: Sequence[str]) -> int:
    """As ``python -m fusedpo bench``: 1 if a row is wrong, 2 if the run may not be recorded."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedpo.bench.threshold",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(op=THRESHOLD)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", choices=[str(dtype).removeprefix("torch.") for dtype in ALLOWED])
    parser.add_argument("--quick", action="store_true", help="bfloat16, and less of everything")
    parser.add_argument("--providers", nargs="+", help='only those whose name starts so, as "fusedpo, 1 nat"')
    parser.add_argument("--threads", type=int)
    parser.add_argument("--processes", type=int, default=1, help="3 in a recording")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="under bench/results it is a recording")
    from . import cli

    return cli.measured(parser.parse_args(argv), THRESHOLD, PATIENCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
