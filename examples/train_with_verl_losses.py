"""verl's registry with fusedpo's losses and advantages in it, chosen by name as verl's configuration does.

    python examples/train_with_verl_losses.py
    python examples/train_with_verl_losses.py --loss-mode vanilla --adv-estimator rloo      # verl's own, to compare
    python examples/train_with_verl_losses.py --loss-mode fusedpo_gspo --adv-estimator fusedpo_opo

The policy is a table of next-token logits, the task to count: a response to digit d earns the fraction of its tokens
that are the one before plus 1. What samples and updates is a loop of a few lines; advantages and loss are called with
verl's configuration objects and arguments, as verl's workers call them. Needs verl (see docs/integrations/verl.md).
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.utils.torch_functional import logprobs_from_logits
from verl.workers.config import ActorConfig

from fusedpo.integrations.verl import register

DIGITS, LENGTH, PROMPTS, SAMPLES = 10, 8, 10, 8
UPDATES = 2  # per batch of samples, so that ratios leave 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss-mode", default="fusedpo_nfpo")
    parser.add_argument("--adv-estimator", default="fusedpo_maxpo")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@torch.no_grad()
def sample(table: Tensor, prompts: Tensor) -> Tensor:
    """``[B, LENGTH]`` tokens that continue ``prompts`` ``[B]``."""
    tokens = [prompts]
    for _ in range(LENGTH):
        tokens.append(torch.multinomial(table[tokens[-1]].softmax(-1), 1)[:, 0])
    return torch.stack(tokens[1:], 1)


def train(args: argparse.Namespace) -> list[float]:
    """The mean reward of each step."""
    register(nfpo={"n": 4}, maxpo={"k": 4})
    torch.manual_seed(args.seed)
    actor = ActorConfig(strategy="fsdp", rollout_n=SAMPLES, ppo_micro_batch_size_per_gpu=PROMPTS * SAMPLES)
    algorithm = AlgoConfig(adv_estimator=args.adv_estimator)
    table = torch.zeros(DIGITS, DIGITS, requires_grad=True)
    optimiser = torch.optim.Adam([table], lr=0.1)
    prompts = torch.arange(PROMPTS).repeat_interleave(SAMPLES)
    uid = np.array([f"prompt-{p}" for p in prompts.tolist()], dtype=object)
    mask = torch.ones(PROMPTS * SAMPLES, LENGTH)
    curve = []

    for step in range(args.steps):
        tokens = sample(table, prompts)
        previous = torch.cat((prompts[:, None], tokens[:, :-1]), 1)
        correct = (tokens == (previous + 1) % DIGITS).float()
        rewards = torch.zeros_like(mask)
        rewards[:, -1] = correct.mean(1)  # of the response, at its last token, as verl places it
        advantages, _ = get_adv_estimator_fn(args.adv_estimator)(
            token_level_rewards=rewards, response_mask=mask, index=uid, config=algorithm
        )
        old_log_prob = logprobs_from_logits(table[previous].detach(), tokens)
        for _ in range(UPDATES):
            loss, metrics = get_policy_loss_fn(args.loss_mode)(
                old_log_prob=old_log_prob,
                log_prob=logprobs_from_logits(table[previous], tokens),
                advantages=advantages,
                response_mask=mask,
                loss_agg_mode=actor.loss_agg_mode,
                config=actor,
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        curve.append(correct.mean().item())
        if step % 5 == 0 or step == args.steps - 1:
            print(f"step {step:3d}: reward {curve[-1]:.3f}, ppo_kl {metrics['actor/ppo_kl']:.4f}")
    return curve


if __name__ == "__main__":
    train(arguments())
