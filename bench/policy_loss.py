"""Layer 2: NFPO's loss and gradient from log-probs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

import fusedpo
from fusedpo import objectives

from .advantages import VERL, VERL_MISSING, Config
from .harness import CLONE, Case, Provider, clone, compiled, microseconds, not_installed, relative_error

Loss = Callable[[Tensor], Tensor]


def cases(device: str, quick: bool, dtypes: list[torch.dtype]) -> Iterator[Case]:
    """In float32, whatever ``dtypes``."""
    if quick:
        yield _case(8, 512, 4, device)
        return
    for n in (1, 4, 64):
        for rows, width in ((64, 4096), (8, 32_768)):
            yield _case(rows, width, n, device)


def overhead() -> dict[str, float]:
    """Processor time of one small call in microseconds, on one thread of the CPU."""
    leaf, old, advantages = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), torch.randn(4)
    objective = objectives.nfpo(4)
    return {
        "policy_loss": microseconds(lambda: fusedpo.policy_loss(leaf, old, advantages, objective=objective)),
        "policy_loss and backward": microseconds(
            lambda: fusedpo.policy_loss(leaf, old, advantages, objective=objective).loss.backward()
        ),
    }


def _case(rows: int, width: int, n: int, device: str) -> Case:
    logprobs = -torch.rand(rows, width, device=device)
    old = logprobs + 0.1 * torch.randn_like(logprobs)
    advantages, mask = torch.randn(rows, device=device), torch.rand_like(logprobs) < 0.9
    objective = objectives.nfpo(n)

    def loss(lp: Tensor) -> Tensor:
        return fusedpo.policy_loss(lp, old, advantages, objective=objective, mask=mask).loss

    def reference(lp: Tensor) -> Tensor:
        with fusedpo.backend("reference"):
            return loss(lp)

    def plain(lp: Tensor) -> Tensor:
        """Padded rows only, no metrics."""
        x = torch.where(mask, (lp - old).clamp(-20, 20), 0)
        ahead = torch.nn.functional.pad(x.detach(), (0, n))
        log_trace = sum((ahead[:, k : k + width] for k in range(1, n)), x.new_zeros(()))
        ratio, a = x.exp(), advantages[:, None]
        surrogate = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)) * log_trace.clamp(-20, 20).exp()
        return torch.where(mask, surrogate, 0).sum() / mask.sum().clamp(min=1)

    exact = logprobs.double().requires_grad_()
    with fusedpo.backend("reference"):
        options = {"objective": objective, "mask": mask}
        fusedpo.policy_loss(exact, old.double(), advantages.double(), **options).loss.backward()

    def both(function: Loss, compile: bool) -> Callable[[], Callable[[], Tensor]]:
        def prepare() -> Callable[[], Tensor]:
            call = compiled(function, fullgraph=True) if compile else function

            def run() -> Tensor:
                x = logprobs.detach().requires_grad_()
                call(x).backward()
                return x.grad

            return run

        return prepare

    def provider(name: str, function: Loss, *, compile: bool = False, missing: str = "") -> Provider:
        prepare = both(function, compile)
        return Provider(name, prepare, lambda x: relative_error(x, exact.grad), 1e-5, compile, missing)

    no_trace = "has no forward trace" if n > 1 else ""
    return Case(
        group=f"NFPO N={n}, forward and backward",
        sizes={"sequences": rows, "T": width},
        providers=[
            clone(logprobs),
            provider("fusedpo", loss),
            provider("eager, reference", reference),
            provider("torch.compile, reference", reference, compile=True),
            provider("eager, plain", plain),
            provider("torch.compile, plain", plain, compile=True),
            provider("trl", _trl(old, advantages, mask), missing=no_trace or not_installed("trl")),
            provider("verl", _verl(old, advantages, mask), missing=no_trace or VERL_MISSING),
        ],
        ceiling=CLONE,
        bytes_moved=13 * logprobs.numel(),  # two log-probs and a mask in, a gradient out
        count_launches=True,
    )


def _trl(old: Tensor, advantages: Tensor, mask: Tensor) -> Loss:
    """The loss and metrics of its trainer, for a stand-in that has log-probs already; ``bnpo`` is the token mean."""
    accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x)
    entropy, ids = torch.zeros_like(old), torch.zeros_like(old, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :0],
        "prompt_mask": ids[:, :0],
        "completion_ids": ids,
        "completion_mask": mask.long(),
    }
    inputs |= {"advantages": advantages, "old_per_token_logps": old}
    trainer = SimpleNamespace(
        loss_type="bnpo",
        importance_sampling_level="token",
        epsilon_low=0.2,
        epsilon_high=0.2,
        beta=0.0,
        args=SimpleNamespace(delta=None),
        model=torch.nn.Identity(),
        accelerator=accelerator,
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _entropy_bonus_enabled=False,
    )

    def loss(lp: Tensor) -> Tensor:
        from trl.trainer.grpo_trainer import GRPOTrainer

        trainer._metrics = {"train": defaultdict(list)}
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (lp, entropy, None)
        return GRPOTrainer._compute_loss(trainer, None, inputs)

    return loss


def _verl(old: Tensor, advantages: Tensor, mask: Tensor) -> Loss:
    """With its metrics, and a dual clip that does nothing."""
    bounds = dict.fromkeys(("clip_ratio", "clip_ratio_low", "clip_ratio_high"), 0.2)
    config = Config(bounds, clip_ratio_c=1e9, global_batch_info={})
    per_token = advantages[:, None].expand_as(old).contiguous()
    return lambda lp: VERL.compute_policy_loss_vanilla(old, lp, per_token, mask.to(lp.dtype), config=config)[0]
