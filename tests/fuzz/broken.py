"""Calls of the raw operators with one argument broken: each raises ValueError or RuntimeError, or returns."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from fusedpo import objectives as O
from fusedpo.ops import one_pass as ops_one_pass
from fusedpo.ops import policy_loss as ops_policy_loss
from fusedpo.ops.advantages import ESTIMATORS

Call = tuple[str, list[Any]]

OBJECTIVES = (
    O.ppo(),
    O.Objective(ratio=O.Trace(back=3, ahead=4, differentiate=True), trust_region=O.NoTrustRegion()),
    O.Objective(ratio=O.Trace(back="all", ahead="all"), kl=O.KL("k3", coef=0.1)),
    O.Objective(ratio=O.SequenceRatio(), trust_region=O.PPOClip(0.2, 0.2), entropy_coef=0.01),
    O.Objective(ratio=O.Trace(ahead=40), trust_region=O.NoTrustRegion()),
    O.Objective(ratio=O.TokenRatio(), trust_region=O.CPPO(0.1, 0.1, 0.5)),
)


def calls(rng: random.Random) -> list[Call]:
    """A valid call of each operator, of random sizes."""
    batch, width, size, ids = rng.randint(1, 4), rng.randint(1, 40), rng.randint(2, 300), rng.choice((None, 1, 5))
    packed = rng.random() < 0.5
    shape = (batch * width,) if packed else (batch, width)
    sequences = batch
    cu_seqlens = torch.arange(batch + 1) * width if packed else None
    logits = torch.randn(*shape, size).to(rng.choice((torch.float32, torch.bfloat16, torch.float16)))
    mask = torch.rand(shape) < 0.7 if rng.random() < 0.7 else None
    temperature = torch.rand(shape) + 0.5 if rng.random() < 0.5 else torch.tensor(0.7)
    token_ids = torch.randint(size, shape if ids is None else (*shape, ids))
    stats = torch.ops.fusedpo.token_logprobs.native(logits, token_ids, temperature, mask, True)[2]
    backward = [torch.randn(token_ids.shape), torch.randn(shape), logits, token_ids, temperature, mask, stats]

    def floats() -> Tensor:
        return torch.randn(shape)

    def maybe(x: Tensor) -> Tensor | None:
        return x if rng.random() < 0.6 else None

    advantages = floats() if rng.random() < 0.5 else torch.randn(sequences, 1)
    tokens = [maybe(floats()), advantages, mask, cu_seqlens, floats()]
    objective = rng.choice(OBJECTIVES)
    parts, values = ops_policy_loss.encode(objective)
    per_token = rng.random() < 0.3
    policy_loss = [floats(), floats(), *tokens, maybe(floats()), maybe(torch.tensor(3.0)), torch.tensor(1.0)]
    ahead = rng.choice([o for o in OBJECTIVES if ops_one_pass.is_possible(o)])
    one_pass = [
        logits,
        torch.empty_like(logits),
        floats(),
        floats(),
        None,
        torch.randint(size, shape),
        temperature,
        *tokens,
        None,
        floats(),
    ]
    rows = torch.arange(shape[0] * (1 if packed else width)) if mask is None else mask.flatten().nonzero().flatten()
    some = logits.reshape(-1, size)[rows]
    of_rows = [some, some, *one_pass[2:4], rows, *one_pass[5:]]
    count, group = batch * 6, 6
    of_ids = rng.random() < 0.5
    labels = [torch.arange(count) // group, torch.randperm(count)] if of_ids else [None, None]
    estimator, k = rng.randrange(len(ESTIMATORS)), rng.randint(1, 3)
    name = ESTIMATORS[estimator]
    other = {"opo": torch.rand(count), "remax": torch.randn(batch), "order_statistic": torch.rand(k)}.get(name)
    rewards = torch.randint(2, (count,)).float()
    token_estimator = rng.randrange(4)
    critic = [floats() if token_estimator >= 2 else None] + [floats() if token_estimator == 3 else None] * 2
    steps = rng.randint(1, 9)
    return [
        ("token_logprobs", [logits, token_ids, temperature, mask, rng.random() < 0.5]),
        ("token_logprobs_backward", backward),
        ("token_logprobs_backward_out", [*backward, torch.empty_like(logits)]),
        ("exact_kl_out", [logits, logits * 2, *[temperature] * 2, mask, floats(), True, torch.empty_like(logits)]),
        ("policy_loss", [*policy_loss, parts, values, per_token]),
        ("policy_loss_backward", [floats(), floats(), floats(), floats(), tokens[0], mask, cu_seqlens, 3, 2]),
        ("one_pass", [*one_pass, *ops_policy_loss.encode(ahead)]),
        ("one_pass", [*of_rows, *ops_policy_loss.encode(ahead)]),
        ("scale_", [logits, torch.tensor(2.0)]),
        ("group_advantages", [rewards, *labels, group, other, None, estimator, k, False, 0.1, rng.random() < 0.5]),
        (
            "token_advantages",
            [floats(), *critic, mask, cu_seqlens, torch.randn(sequences), token_estimator, 0.9, 0.9, 1.0, 1.0, False],
        ),
        (
            "step_advantages",
            [torch.rand(2, steps + 1), torch.rand(2, steps), torch.randint(-1, steps, (2, width)), False],
        ),
        ("whiten", [floats(), torch.rand(shape), mask, False]),
    ]


NUMBERS = (0, -1, 1, 2, 7, 1 << 31, 1 << 62, (1 << 63) - 1, -(1 << 63))
DTYPES = (torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)


def _break_tensor(rng: random.Random, x: Tensor) -> Any:
    kind = rng.randrange(10)
    if kind == 0:
        return x.to(rng.choice(DTYPES))
    if kind == 1:
        return x.flatten()[: rng.randint(0, max(0, x.numel() - 1))]
    if kind == 2:
        return x.new_zeros([max(0, size + rng.choice((-1, 0, 1, 3))) for size in x.shape])
    if kind == 3:
        return x.to("meta")
    if kind == 4:
        return x.new_zeros(())
    if kind == 5:
        return x.unsqueeze(0) if rng.random() < 0.5 else x.unsqueeze(-1)
    if kind == 6:  # the same shape with other strides
        wide = torch.stack([x, x], -1) if rng.random() < 0.5 else x.new_zeros((*x.shape, 2))
        return wide[..., 0]
    if kind == 7:
        return x.new_zeros((1,) * x.dim()).expand(x.shape)
    if kind == 8 and x.numel() and x.dtype in (torch.int64, torch.int32):
        x = x.clone()
        fitting = [n for n in NUMBERS if abs(n) < 1 << 31 or x.dtype == torch.int64]
        x.view(-1)[rng.randrange(x.numel())] = rng.choice(fitting)
        return x
    if kind == 9 and x.dtype == torch.bool:
        return torch.randint(256, x.shape, dtype=torch.uint8).view(torch.bool)
    return None


def _break(rng: random.Random, argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return _break_tensor(rng, argument)
    if isinstance(argument, bool):
        return not argument
    if isinstance(argument, int):
        return rng.choice(NUMBERS)
    if isinstance(argument, float):
        return rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e300))
    if isinstance(argument, list):
        changed = list(argument)
        if rng.random() < 0.5:
            place = rng.randrange(len(changed))
            changed[place] = _break(rng, changed[place])
            return changed
        return (changed * 4)[: rng.choice((0, 1, 3, len(changed) - 1, len(changed) + 1, 3 * len(changed)))]
    return torch.zeros(rng.randint(0, 5), dtype=rng.choice((*DTYPES, torch.float32)))


def broken(rng: random.Random) -> Call:
    """A call of some operator with one argument broken, on copies."""
    torch.manual_seed(rng.getrandbits(32))
    name, arguments = rng.choice(calls(rng))
    arguments = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
    place = rng.randrange(len(arguments))
    arguments[place] = _break(rng, arguments[place])
    return name, arguments


def run(call: Call, backend: str) -> str | None:
    """What it said, or None where it returned."""
    name, arguments = call
    try:
        getattr(getattr(torch.ops.fusedpo, name), backend)(*arguments)
    except (ValueError, RuntimeError, NotImplementedError, TypeError, OverflowError) as error:
        return str(error)
    return None


def describe(call: Call) -> str:
    def text(x: Any) -> str:
        return f"{x.dtype}{list(x.shape)}" if isinstance(x, Tensor) else str(x)

    return f"{call[0]}({', '.join(map(text, call[1]))})"
