"""What a gradient threshold costs a trained policy: ``python -m fusedpo.bench.threshold_policy TEXTS [--plot]``.

A small transformer learns to continue the words of ``TEXTS`` (files). Then, of its hidden states: the errors of the
gradients in bfloat16 against float64, by this library with several thresholds and by PyTorch in the same dtype; and
twenty steps of PPO, each on samples of its own, with and without threshold.
"""

from __future__ import annotations

import argparse
import collections
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedpo
from fusedpo import objectives
from fusedpo.ops import active_columns

LENGTH, WIDTH = 32, 128
THRESHOLDS = (None, 2.0**-12, 2.0**-14, 2.0**-16, 2.0**-18, 2.0**-20)


class Model(nn.Module):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, WIDTH), nn.Embedding(LENGTH, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(length)
        states: Tensor = self.blocks(self.tokens(ids) + self.positions.weight[:length], mask=causal, is_causal=True)
        return states


def corpus(paths: list[Path]) -> tuple[Tensor, int]:
    words = [w for path in paths for w in re.findall(r"\w+|[^\w\s]", path.read_text(errors="ignore"))]
    numbers = {word: i for i, (word, _) in enumerate(collections.Counter(words).most_common())}
    return torch.tensor([numbers[w] for w in words]), len(numbers)


def batch(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(text) - LENGTH - 1, (count,), generator=generator)
    return torch.stack([text[i : i + LENGTH + 1] for i in starts.tolist()])


def trained(text: Tensor, vocab: int, steps: int) -> Model:
    torch.manual_seed(0)
    model, generator = Model(vocab), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        ids = batch(text, 32, generator)
        logprobs = fusedpo.linear_token_logprobs(
            model(ids[:, :-1]), model.head.weight, ids[:, 1:], return_entropy=False
        )
        loss = -logprobs.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: {loss.item():.2f} nats", flush=True)
    return model


def gradients(hidden: Tensor, weight: Tensor, ids: Tensor, advantages: Tensor, how: Any) -> tuple[Tensor, Tensor, Any]:
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    if how == "PyTorch":
        logprobs = torch.log_softmax((h @ w.T).float(), -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        loss, dropped = fusedpo.policy_loss(logprobs, None, advantages, objective=objectives.ppo()).loss, 0.0
    else:
        out = fusedpo.policy_loss_from_hidden(
            h, w, ids, None, advantages, objective=objectives.ppo(), gradient_threshold=how
        )
        loss, dropped = out.loss, out.metrics["dropped"]
    loss.backward()
    return h.grad, w.grad, float(dropped)


def errors(model: Model, text: Tensor) -> None:
    """Without the fallback to plain products, which would hide what a threshold costs where many columns are active."""
    most, active_columns.MOST_ACTIVE = active_columns.MOST_ACTIVE, 1.0
    ids = batch(text, 16, torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model(ids[:, :-1]).bfloat16()
    weight, advantages = model.head.weight.detach().bfloat16(), torch.randn(16, LENGTH)
    logp = torch.log_softmax(hidden.double() @ weight.double().T, -1)
    entropy, p = -(logp.exp() * logp).sum(-1), logp.exp().flatten(0, 1)
    tokens = p.float().multinomial(1, generator=torch.Generator().manual_seed(2)).view(16, LENGTH)
    print(f"entropy: mean {entropy.mean():.2f}, from {entropy.min():.2f} to {entropy.max():.2f} nats")
    exact = gradients(hidden.double(), weight.double(), tokens, advantages, None)
    for how in ("PyTorch", *THRESHOLDS):
        *got, dropped = gradients(hidden, weight, tokens, advantages, how)
        found = [((g.double() - e).norm() / e.norm()).item() for g, e in zip(got, exact, strict=False)]
        active = (p.amax(0) > how).double().mean().item() if isinstance(how, float) else 1.0
        name = how if how in ("PyTorch", None) else f"2^{torch.tensor(how).log2().item():.0f}"
        print(f"{name!s:>8}: errors {found[0]:.3e} {found[1]:.3e}, active {active:.1%}, dropped {dropped:.1e}")
    active_columns.MOST_ACTIVE = most


def curves(model: Model, text: Tensor, steps: int) -> dict[str, list[float]]:
    """The mean reward: whether a sampled word is the most frequent one after its context ("the", a comma, ...)."""
    start, result = {n: x.clone() for n, x in model.state_dict().items()}, {}
    for threshold in (None, 2.0**-16, 2.0**-12):
        model.load_state_dict(start)
        optimizer, generator = torch.optim.AdamW(model.parameters(), lr=1e-4), torch.Generator().manual_seed(3)
        rewards = []
        for _ in range(steps):
            context = batch(text, 64, generator)[:, :-1]
            with torch.no_grad():
                logits = model(context) @ model.head.weight.T
                tokens = logits.softmax(-1).flatten(0, 1).multinomial(1, generator=generator).view(context.shape)
            reward = (tokens < 100).float()
            hidden, weight = model(context).bfloat16(), model.head.weight.bfloat16()
            out = fusedpo.policy_loss_from_hidden(
                hidden,
                weight,
                tokens,
                None,
                reward - reward.mean(),
                objective=objectives.ppo(),
                gradient_threshold=threshold,
            )
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            rewards.append(reward.mean().item())
        result["exact" if threshold is None else f"2^{torch.tensor(threshold).log2().item():.0f}"] = rewards
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    text, vocab = corpus(args.texts)
    print(f"{len(text):,} words, {vocab:,} different ones")
    model = trained(text, vocab, args.steps)
    errors(model, text)
    runs = curves(model, text, 20)
    for name, rewards in runs.items():
        print(f"{name:>8}: {' '.join(f'{r:.3f}' for r in rewards)}")
    if args.plot is not None:
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(4, 2.2), layout="constrained")
        for (name, rewards), style in zip(runs.items(), ("-", "--", ":"), strict=True):
            axes.plot(range(1, len(rewards) + 1), rewards, style, label=name)
        axes.set(xlabel="step", ylabel="mean reward")
        axes.legend(title="gradient_threshold", fontsize=7, title_fontsize=7)
        figure.savefig(args.plot)


if __name__ == "__main__":
    main()
