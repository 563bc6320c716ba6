"""Valid calls of the public functions against the definitions, in float64 and by autograd, token by token."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import accumulate, combinations, pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import fusedpo
from fusedpo import advantages
from fusedpo import objectives as O


def check(rng: random.Random, backend: str = "native") -> None:
    torch.manual_seed(rng.getrandbits(32))
    with fusedpo.backend(backend):
        rng.choice(ORACLES)(rng)


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
    x = (torch.randn(*rows, size) * rng.choice((0.0, 1.0, 30.0, 1e4))).to(dtype)
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


def _lengths(rng: random.Random, packed: bool) -> list[int]:
    width = rng.choice((1, 3, 17, 130))
    if not packed:
        return [width] * rng.randint(1, 4)
    return [rng.choice((0, 1, width, rng.randint(1, width))) for _ in range(rng.randint(1, 5))] + [1]


def _batch(rng: random.Random) -> tuple[tuple[int, ...], Tensor | None, list[int]]:
    """The shape of an array of tokens, ``cu_seqlens`` of a packed one, and the lengths of its sequences."""
    packed = rng.random() < 0.5
    lengths = _lengths(rng, packed)
    if not packed:
        return (len(lengths), lengths[0]), None, lengths
    dtype = rng.choice((torch.int32, torch.int64))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    return (sum(lengths),) if rng.random() < 0.5 else (1, sum(lengths)), cu_seqlens, lengths


PRESETS: tuple[Callable[[], O.Objective], ...] = (
    O.ppo,
    lambda: O.ppo(dual=3.0, kl=O.KL("k3", coef=0.1), aggregation="token-sum"),
    O.grpo,
    O.dr_grpo,
    O.two_sided_grpo,
    O.dapo,
    O.gspo,
    O.luspo,
    O.gmpo,
    O.vespo,
    O.ctpo,
    O.cispo,
    O.sapo,
    O.dppo_tv,
    O.dppo_kl,
    O.cppo,
    lambda: O.dro(0.1),
    O.reinforce,
    O.opo,
    lambda: O.nfpo(2),
    lambda: O.nfpo(3, differentiate=True),
)


def presets(rng: random.Random) -> None:
    """Every objective by every entry point and in every layout, against the reference in float64."""
    objective = rng.choice(PRESETS)()
    shape, cu_seqlens, lengths = _batch(rng)
    mask = _mask(rng, shape)
    source = rng.choice(("logprobs", "logits", "hidden"))
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16)) if source == "logits" else torch.float32
    size, scale = rng.choice((2, 33, 500)), rng.choice((0.1, 1.0, 10.0, 1e4))
    ids = torch.randint(size, shape)
    options: dict[str, Any] = {"objective": objective, "mask": mask, "cu_seqlens": cu_seqlens}
    inputs: list[Tensor]
    if source == "logprobs":
        inputs = [-torch.rand(shape) * min(scale, 50.0)]
    elif source == "logits":
        x = (torch.randn(*shape, size) * scale).to(dtype)
        if rng.random() < 0.3:  # tokens that cannot be drawn
            x = x.masked_fill((torch.rand(x.shape) < 0.3).scatter(-1, ids.unsqueeze(-1), False), -torch.inf)
        inputs = [x]
    else:
        inputs = [torch.randn(*shape, 12) * min(scale, 3.0), torch.randn(size, 12)]
        options |= {"softcap": rng.choice((None, 5.0)), "logit_scale": rng.choice((1.0, 0.5)), "chunk_tokens": 7}
    if source != "logprobs":
        options["temperature"] = torch.rand(shape) + 0.5 if rng.random() < 0.5 else rng.choice((1.0, 0.7))

    def call(inputs: list[Tensor], old: Tensor | None, options: dict[str, Any]) -> Any:
        if source == "logprobs":
            return fusedpo.policy_loss(inputs[0], old, advantages_, **options)
        if source == "logits":
            return fusedpo.policy_loss_from_logits(inputs[0], ids, old, advantages_, **options)
        return fusedpo.policy_loss_from_hidden(*inputs, ids, old, advantages_, **options)

    advantages_ = torch.randn(shape) if rng.random() < 0.5 else torch.randn(len(lengths))
    wide = [x.double().requires_grad_() for x in inputs]
    with torch.no_grad(), fusedpo.backend("reference"):
        if source == "logprobs":
            now = wide[0].detach()
        elif source == "logits":
            now = fusedpo.token_logprobs(wide[0], ids, temperature=options["temperature"], mask=mask)
        else:
            named = {name: options[name] for name in ("softcap", "logit_scale", "temperature", "mask")}
            now = fusedpo.linear_token_logprobs(*wide, ids, **named)
    old = (now + torch.randn(shape) * rng.choice((0.0, 0.01, 0.5))).float()
    options |= {"ref_logprobs": old + 0.1 * torch.randn(shape)} if objective.kl else {}
    if rng.random() < 0.3:
        options["is_weights"] = torch.rand(shape) + 0.5
    on_policy = isinstance(objective.ratio, O.OnPolicy) and not isinstance(objective.trust_region, O.DRO)
    given = None if on_policy else old

    leaves = [x.clone().requires_grad_() for x in inputs]
    got = call(leaves, given, options)
    got.loss.backward()
    advantages_ = advantages_.double()
    wide_options = {
        name: x.double() if isinstance(x, Tensor) and x.dtype == torch.float32 else x for name, x in options.items()
    }
    with fusedpo.backend("reference"):
        want = call(wide, None if given is None else given.double(), wide_options)
    want.loss.backward()
    # A log-prob of the size of the logits has float32's relative error, and so has what exp makes of it.
    kept = torch.ones(shape, dtype=torch.bool) if mask is None else mask != 0
    largest = float(now[kept].abs().max()) if kept.any() else 0.0
    summed = max(lengths) if isinstance(objective.ratio, O.SequenceRatio | O.Trace) else 1
    eps = 1e-5 + 1e-7 * largest * summed
    total = float(advantages_.abs().max()) * (1 + largest)
    _close(got.loss, want.loss, eps, total * (kept.sum() if "sum" in objective.aggregation else 1))
    # Where the terms of a coefficient cancel (a KL of almost equal policies), float32's roundings of the terms remain.
    rounded = torch.finfo(torch.float32).eps * total
    for leaf, x in zip(leaves, wide, strict=True):
        tolerance = eps + 2 * torch.finfo(leaf.dtype).eps
        _close(leaf.grad, x.grad, tolerance, x.grad.abs().max() + rounded / tolerance)


def _walk(lengths: list[int], mask: Tensor | None, shape: tuple[int, ...]) -> list[list[int]]:
    """The flat places of the kept tokens of each sequence."""
    kept = [True] * sum(lengths) if mask is None else [bool(x != 0) for x in mask.flatten()]
    ends = list(accumulate(lengths))
    return [[i for i in range(end - n, end) if kept[i]] for end, n in zip(ends, lengths, strict=True)]


def token_advantages(rng: random.Random) -> None:
    """Each estimator over tokens, by the recursion of its docstring, token by token."""
    shape, cu_seqlens, lengths = _batch(rng)
    mask = _mask(rng, shape)
    rewards, values, now, old = torch.randn(4, *shape).double().unbind()
    if mask is not None:
        rewards = rewards.masked_fill(mask == 0, 0.0)
        values = values.masked_fill(mask == 0, torch.nan)
    gamma, lam, rho_bar, c_bar = rng.random(), rng.random(), 0.5 + rng.random(), 0.5 + rng.random()
    bootstrap = torch.randn(len(lengths)).double() if rng.random() < 0.5 else None
    tokens = {"mask": mask, "cu_seqlens": cu_seqlens}
    more = {**tokens, "gamma": gamma, "bootstrap": bootstrap}
    gae = advantages.gae(rewards, values, lam=lam, **more)
    vtrace = advantages.vtrace(
        rewards, values, lam=lam, logprobs=now, old_logprobs=old, rho_bar=rho_bar, c_bar=c_bar, **more
    )
    togo = advantages.reward_to_go(rewards, **more)

    want = torch.zeros(5, togo.numel(), dtype=torch.float64)
    r, v, log_ratio = (x.flatten().tolist() for x in (rewards, values, now - old))
    for s, places in enumerate(_walk(lengths, mask, shape)):
        end = 0.0 if bootstrap is None else float(bootstrap[s])
        g, a, v_next, target_next = end, 0.0, end, end
        for i in reversed(places):
            g = r[i] + gamma * g
            a = r[i] + gamma * v_next - v[i] + gamma * lam * a
            ratio = math.exp(max(-20.0, min(20.0, log_ratio[i])))
            rho, c = min(rho_bar, ratio), lam * min(c_bar, ratio)
            target = v[i] + rho * (r[i] + gamma * v_next - v[i]) + gamma * c * (target_next - v_next)
            advantage = rho * (r[i] + gamma * target_next - v[i])
            want[:, i] = torch.tensor([g, a, a + v[i], advantage, target], dtype=torch.float64)
            v_next, target_next = v[i], target
    for got, expected in zip((togo, *gae, *vtrace), want, strict=True):
        _close(got.flatten(), expected, 1e-11, 1.0)

    kept = [i for places in _walk(lengths, mask, shape) for i in places]
    x = rewards.flatten()[kept]
    white = torch.zeros(rewards.numel(), dtype=torch.float64)
    if len(kept) > 1:
        white[kept] = (x - x.mean()) / (x.var() + 1e-8).sqrt()
    _close(advantages.whiten(rewards, mask=mask).flatten(), white, 1e-10, 1.0)
    if mask is not None:
        per_sequence = torch.randn(len(lengths)).double()
        spread = torch.zeros_like(white)
        moved, raw = torch.zeros_like(white), torch.randn(shape).double()
        ends = list(accumulate(lengths))
        for s, places in enumerate(_walk(lengths, mask, shape)):
            spread[places] = per_sequence[s]
            for i in range(ends[s] - lengths[s], ends[s]):
                if places:
                    moved[max([p for p in places if p <= i], default=places[0])] += raw.flatten()[i]
        _close(advantages.to_tokens(per_sequence, mask, cu_seqlens=cu_seqlens).flatten(), spread, 0.0)
        _close(advantages.rewards_on_kept(raw, mask, cu_seqlens=cu_seqlens).flatten(), moved, 1e-11, 1.0)


def step_advantages(rng: random.Random) -> None:
    """VinePPO, with values that are missing, and the steps of a text."""
    batch, steps, width = rng.randint(1, 3), rng.randint(1, 12), rng.randint(1, 30)
    values, rewards = torch.randn(batch, steps + 1).double(), torch.randn(batch, steps).double()
    values[torch.rand(values.shape) < rng.choice((0.0, 0.3, 1.0))] = torch.nan
    ids = torch.randint(-2, steps, (batch, width))
    got = advantages.vineppo(values, step_rewards=rewards, step_ids=ids)
    for b in range(batch):
        v, r, of_step = values[b].tolist(), rewards[b].tolist(), [0.0] * steps
        after = 0.0 if math.isnan(v[-1]) else v[-1]
        for s in reversed(range(steps)):
            state = r[s] + after if math.isnan(v[s]) else v[s]
            of_step[s], after = r[s] + after - state, state
        want = [of_step[i] if i >= 0 else 0.0 for i in ids[b].tolist()]
        _close(got[b], torch.tensor(want, dtype=torch.float64), 1e-11, 1.0)

    text = "".join(rng.choice(("a", "b ", "\n", "\n\n", "é")) for _ in range(rng.randint(0, 40)))
    cuts = sorted(rng.sample(range(len(text) + 1), rng.randint(0, len(text))))
    offsets = list(pairwise([0, *cuts, len(text)]))
    split = advantages.segment_steps([text], [offsets])
    step = -1
    assert split.states[0][0] == ""
    assert all(text.startswith(state) for state in split.states[0])
    for (first, end), got_step in zip(offsets, split.step_ids[0].tolist(), strict=True):
        if first < end:
            step = sum(len(state) <= first for state in split.states[0]) - 1
        assert got_step == step, (text, offsets)


def subsets(rng: random.Random) -> None:
    """Order statistics by all subsets of a group."""
    n = rng.randint(2, 7)
    k, groups = rng.randint(1, n - 1), rng.randint(1, 3)
    r = torch.randint(-3, 4, (groups * n,)).double() * rng.choice((1.0, 1e4))
    shuffle = torch.randperm(groups * n)
    ids = (torch.arange(groups * n) // n)[shuffle]
    weights = [rng.gauss(0, 1) for _ in range(k)]
    got = advantages.order_statistic(r, k=k, weights=weights, group_ids=ids)
    highest = advantages.maxpo(r, k=k, group_ids=ids)
    for g in range(groups):
        mine = (ids == g).nonzero().flatten().tolist()
        chosen = [(set(c), sorted(float(r[i]) for i in c)) for c in combinations(mine, k)]
        for result, w in ((got, weights), (highest, [0.0] * (k - 1) + [1.0])):
            worth = [(c, sum(a * b for a, b in zip(w, x, strict=True))) for c, x in chosen]
            for i in mine:
                want = fmean(x for c, x in worth if i in c) - fmean(x for c, x in worth if i not in c)
                _close(result[i], torch.tensor(want, dtype=torch.float64), 1e-10, r.abs().max())


ORACLES = (
    token_logprobs,
    policy_loss,
    presets,
    presets,
    group_advantages,
    subsets,
    token_advantages,
    step_advantages,
)
