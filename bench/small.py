"""One call of every kernel, for sanitizers and profilers: ``python bench/small.py [cuda|cpu] [large]``."""

from __future__ import annotations

import sys

import torch

import fusedpo
from fusedpo import advantages, backends, objectives

CLUSTER_VOCAB = 151_936  # a row in bfloat16 takes the shared memory of two blocks


def main(device: str, rows: int, vocab: int) -> None:
    torch.manual_seed(0)
    objective = objectives.nfpo(4)
    logits = torch.randn(2, rows // 2, vocab, device=device).bfloat16()
    ids = torch.randint(vocab, logits.shape[:-1], device=device)
    mask = torch.rand(ids.shape, device=device) < 0.7
    rewards = torch.randn(64, device=device)
    old = fusedpo.token_logprobs(logits, ids).detach()
    wide = torch.randn(2, rows // 2, CLUSTER_VOCAB, device=device).bfloat16()
    no_clusters = backends.why_not("native", "one_pass", device, wide.dtype)
    if no_clusters:
        print(f"without the native one_pass: {no_clusters}")

    def fused(source: torch.Tensor, inplace: bool) -> None:
        x = source.clone().requires_grad_()
        fusedpo.policy_loss_from_logits(
            x, ids, old, adv, objective=objective, mask=mask, inplace=inplace
        ).loss.backward()
        assert torch.isfinite(x.grad).all()

    for _ in range(2):
        adv = advantages.maxpo(rewards, k=4, group_size=16)[:2]
        advantages.maxpo(rewards, k=4, group_ids=torch.arange(64, device=device) % 5)
        advantages.whiten(advantages.gae(old * mask, old, mask=mask, gamma=0.99, lam=0.95).advantages, mask=mask)
        x = logits.detach().requires_grad_()
        logprobs, entropy = fusedpo.token_logprobs(x, ids, mask=mask, return_entropy=True)
        fusedpo.policy_loss(logprobs, old, adv, objective=objective, mask=mask, entropy=entropy).loss.backward()
        for inplace in (False, True):
            fused(logits, inplace)
            if not no_clusters:
                with fusedpo.backend("native"):
                    fused(wide, inplace)
        hidden = torch.randn(2, rows // 2, 64, device=device).bfloat16().requires_grad_()
        weight = torch.randn(vocab, 64, device=device).bfloat16().requires_grad_()
        fusedpo.policy_loss_from_hidden(hidden, weight, ids, old, adv, objective=objective, mask=mask).loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    assert torch.isfinite(weight.grad).all()


if __name__ == "__main__":
    device, large = (sys.argv[1:] or ["cuda"])[0], "large" in sys.argv
    main(device, *((2048, 151_936) if large else (16, 5000)))
