"""Valid calls of the public functions against the definitions, in float64 and by autograd, token by token."""

from __future__ import annotations

import random

import torch
from torch import Tensor

import fusedpo
from fusedpo import advantages
from fusedpo import objectives as O


def check(rng: random.Random, backend: str = "native") -> None:
    torch.manual_seed(rng.getrandbits(32))
    with fusedpo.backend(backend):
        rng.choice((token_logprobs, policy_loss, group_advantages, token_advantages))(rng)


def _close(got: Tensor, want: Tensor, eps: float, scale: Tensor | float = 1.0) -> None:
    """Within ``eps`` of the value, or of ``scale``, the magnitude of what was added up to get it."""
    got, want = got.detach().double(), want.detach()
    bound = eps * (want.abs() + torch.as_tensor(scale).double())
    good = ((got - want).abs() <= bound) | (got == want)
    assert good.all(), f"got {got[~good][:4].tolist()}, want {want[~good][:4].tolist()}"


def _mask(rng: random.Random, shape: tuple[int, ...]) -> Tensor | None:
    kind = rng.randrange(4)
    if kind == 0:
        return None
    if kind == 1:  # any byte may stand for True
        return (torch.randint(256, shape, dtype=torch.uint8) * torch.randint(2, shape, dtype=torch.uint8)).view(
            torch.bool
        )
    return torch.rand(shape) < (0.8 if kind == 2 else 0.05)


def token_logprobs(rng: random.Random) -> None:
    rows = rng.choice(((rng.randint(1, 40),), (rng.randint(1, 5), rng.randint(1, 9))))
    size, num_ids = rng.choice((1, 2, 17, 255, 1000, 4099)), rng.choice((None, 1, 3, 40))
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
    x = (torch.randn(*rows, size) * rng.choice((0.0, 1.0, 30.0, 1000.0))).to(dtype)
    if rng.random() < 0.2 and size > 2:
        x[..., : size // 2] = -torch.inf
    ids = torch.randint(size // 2 if size > 2 else 0, size, rows if num_ids is None else (*rows, num_ids))
    temperature = torch.rand(rows) * 2 + 0.3 if rng.random() < 0.5 else torch.tensor(rng.choice((0.5, 1.0, 3.0)))
    mask = _mask(rng, rows)
    if rng.random() < 0.3:  # rows with a stride
        x = torch.cat([x, x], -1)[..., :size]
    got, want = x.clone().requires_grad_(), x.double().requires_grad_()
    logprobs, entropy = fusedpo.token_logprobs(got, ids, temperature=temperature, mask=mask, return_entropy=True)

    logp = torch.log_softmax(want / temperature.double().unsqueeze(-1), -1)
    chosen = logp.gather(-1, ids if num_ids is not None else ids.unsqueeze(-1)).reshape(ids.shape)
    of_rows = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)
    if mask is not None:
        kept = mask != 0
        chosen = torch.where(kept if num_ids is None else kept.unsqueeze(-1), chosen, 0.0)
        of_rows = torch.where(kept, of_rows, 0.0)
    _close(logprobs, chosen, 4e-6)
    _close(entropy, of_rows, 1e-5)
    up = torch.randn(ids.shape)
    (logprobs * up).sum().backward()
    (chosen * up.double()).sum().backward()
    eps = max(2 * torch.finfo(dtype).eps, 2e-6)
    inverse = (1 / temperature.double()).reshape(*temperature.shape, 1)
    magnitude = up.double().abs().sum(-1, keepdim=True) if num_ids is not None else up.double().abs().unsqueeze(-1)
    _close(got.grad, want.grad, eps, 0.1 * magnitude * inverse)


def policy_loss(rng: random.Random) -> None:
    sequences, width = rng.randint(1, 5), rng.choice((1, 3, 17, 300))
    shape = (sequences, width)
    old = -torch.rand(shape) * rng.choice((1.0, 20.0))
    now = (old + torch.randn(shape) * rng.choice((0.0, 0.01, 0.3))).requires_grad_()
    advantages = torch.randn(shape) if rng.random() < 0.5 else torch.randn(sequences, 1)
    mask = _mask(rng, shape)
    kept = torch.ones(shape, dtype=torch.bool) if mask is None else mask != 0
    back, ahead = rng.choice((0, 1, 5, 40)), rng.choice((0, 2, 30))
    low, high = 0.1 + rng.random(), 0.1 + rng.random()
    kl = rng.choice((None, "k1", "k2", "k3"))
    aggregation = rng.choice(O.AGGREGATIONS)
    objective = O.Objective(
        ratio=rng.choice((O.TokenRatio(), O.Trace(back=back, ahead=ahead))),
        trust_region=rng.choice((O.NoTrustRegion(), O.CISPO(low, high))),
        kl=None if kl is None else O.KL(kl, coef=0.1),
        aggregation=aggregation,
    )
    ref = old + 0.1 * torch.randn(shape)
    out = fusedpo.policy_loss(now, old, advantages, objective=objective, mask=mask, ref_logprobs=ref)
    out.loss.backward()

    x = now.detach().double().requires_grad_()
    log_ratio = torch.where(kept, x - old.double(), 0.0)
    trace = torch.ones(shape, dtype=torch.float64)
    if isinstance(objective.ratio, O.Trace):
        summed = [
            [
                sum(
                    float(log_ratio.detach()[b, s])
                    for s in range(max(0, t - back), min(width, t + ahead + 1))
                    if s != t
                )
                for t in range(width)
            ]
            for b in range(sequences)
        ]
        trace = torch.tensor(summed, dtype=torch.float64).clamp(-20, 20).exp()
    ratio, a = log_ratio.exp(), advantages.double()
    if isinstance(objective.trust_region, O.CISPO):
        losses = -a * (ratio.detach().clamp(1 - low, 1 + high) * trace) * x
    else:
        losses = -a * ratio * trace
    d = x - ref.double()
    penalty = {None: 0 * d, "k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d}[kl]
    losses = torch.where(kept, losses + 0.1 * penalty, 0.0)
    tokens = kept.sum(1)
    live = max(1, int((tokens > 0).sum()))
    loss = {
        "token_mean": losses.sum() / max(1, int(tokens.sum())),
        "token_sum": losses.sum(),
        "seq_mean_token_mean": (losses.sum(1) / tokens.clamp(min=1)).sum() / live,
        "seq_mean_token_sum": losses.sum() / live,
        "seq_mean_token_sum_norm": losses.sum() / live / width,
    }[aggregation.replace("-", "_")]
    loss.backward()
    # Log-ratios come from float32 log-probs that are exact here: what is lost is lost in exponentials and sums.
    weight = (a * ratio * trace).detach().abs().max() * (1 + x.detach().abs().max()) + 1
    _close(out.loss, loss, 2e-5, weight if aggregation != "token_sum" else weight * shape[0] * width)
    _close(now.grad, x.grad, 2e-5, x.grad.abs().max() + 1e-12)


def group_advantages(rng: random.Random) -> None:
    groups, size = rng.randint(1, 5), rng.randint(2, 8)
    rewards = torch.randn(groups * size).double() * rng.choice((0.0, 1.0, 1e6))
    mask = _mask(rng, (groups * size,))
    for name, got in {
        "rloo": advantages.rloo(rewards, group_size=size, mask=mask),
        "grpo": advantages.grpo(rewards, group_size=size, mask=mask),
    }.items():
        for g in range(groups):
            mine = range(g * size, (g + 1) * size)
            kept = [i for i in mine if mask is None or bool(mask[i] != 0)]
            n = len(kept)
            mean = sum(float(rewards[i]) for i in kept) / max(1, n)
            deviation = (sum((float(rewards[i]) - mean) ** 2 for i in kept) / max(1, n - 1)) ** 0.5
            for i in mine:
                centred = float(rewards[i]) - mean if i in kept else 0.0
                want = centred / (deviation + 1e-6) if name == "grpo" else centred * n / max(1, n - 1)
                _close(
                    got[i],
                    torch.tensor(want, dtype=torch.float64),
                    1e-9,
                    1e-3 if name == "grpo" else rewards.abs().max(),
                )


def token_advantages(rng: random.Random) -> None:
    batch, width = rng.randint(1, 4), rng.randint(1, 30)
    rewards, values = torch.randn(batch, width), torch.randn(batch, width)
    mask, gamma, lam = _mask(rng, (batch, width)), rng.random(), rng.random()
    got, returns = advantages.gae(rewards, values, gamma=gamma, lam=lam, mask=mask)
    for b in range(batch):
        after, value_after = 0.0, 0.0
        for t in reversed(range(width)):
            if mask is not None and not bool(mask[b, t] != 0):
                assert got[b, t] == 0
                continue
            value = float(values[b, t])
            after = float(rewards[b, t]) + gamma * value_after - value + gamma * lam * after
            value_after = value
            _close(got[b, t], torch.tensor(after, dtype=torch.float64), 1e-6, 1e-3)
            _close(returns[b, t], torch.tensor(after + value, dtype=torch.float64), 1e-6, 1e-3)
