"""Batches with logits for the tests of ``policy_loss_from_logits`` and of the one-pass kernels, and their reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedpo
from fusedpo import objectives as O
from fusedpo.ops.one_pass import MAX_AHEAD

# Every ratio, trust region, KL and aggregation that one pass can serve is in one of them;
OBJECTIVES = {
    "ppo": O.ppo(),
    "grpo": O.grpo(kl=O.KL("k3", 0.1)),
    "dr_grpo": O.dr_grpo(),
    "dapo": O.dapo(),
    "dual": O.Objective(trust_region=O.PPOClip(0.1, 0.2, dual=1.3)),
    "cispo": O.cispo(),
    "sapo": O.sapo(),
    "dppo_tv": O.dppo_tv(),
    "dppo_kl": O.dppo_kl(),
    "dro": O.dro(0.1),
    "reinforce": O.reinforce(entropy_coef=0.1),
    "opo": O.opo(),
    "vespo of tokens": O.Objective(trust_region=O.VESPO()),
    "reinforce, KL": O.reinforce(kl=O.KL("k2", 0.2)),
    "reinforce, weighted KL": O.reinforce(kl=O.KL("k1", 0.2, weighted=True)),
    "grpo, clamped KL": O.grpo(kl=O.KL("k3", 0.3, clamp=0.02)),
    "grpo, clamped and weighted KL": O.grpo(kl=O.KL("k3+", 0.3, clamp=0.02, weighted=True)),
    "nfpo": O.nfpo(4),
    "nfpo, entropy, KL": O.nfpo(3, entropy_coef=0.05, kl=O.KL("k1", 0.1), aggregation="seq-mean-token-mean"),
    "nfpo, weighted KL": O.nfpo(3, kl=O.KL("k3", 0.2, weighted=True)),
    "nfpo, product": O.nfpo(2, trust_region=O.PPOClip(0.1, 0.2, cap=1.5, on="product"), aggregation="token-sum"),
    "nfpo beyond the sequence": O.nfpo(50),
    "no clip": O.Objective(O.Trace(0, 5), O.NoTrustRegion(), aggregation="seq-mean-token-sum"),
    "vespo of windows": O.Objective(O.Trace(0, 3), O.VESPO(), O.KL("k3+", 0.1)),
}
# every one that cannot in one of these.
TWO_PASSES = {
    "gspo": O.gspo(0.1, 0.2),
    "gmpo": O.gmpo(0.2, 0.2),
    "ctpo": O.ctpo(),
    "log clip": O.Objective(trust_region=O.LogClip(0.1, 0.1), entropy_coef=0.1),
    "cppo": O.cppo(0.05, 0.01),
    "vespo": O.vespo(),
    "back": O.Objective(O.Trace(2, 1), kl=O.KL("k3", 0.1)),
    "nfpo, differentiated": O.nfpo(4, differentiate=True, entropy_coef=0.1),
    "nfpo, long": O.nfpo(MAX_AHEAD + 2),
}


class Operators(TorchDispatchMode):
    """The names of the operators that ran."""

    def __enter__(self) -> Operators:
        self.names: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))

    def one_pass(self) -> bool:
        return any(name.startswith("fusedpo::one_pass") for name in self.names)


def batch(
    shape: tuple[int, ...],
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    lengths: list[int] | None = None,
    kept: float = 0.7,
    seed: int = 0,
    spread: float = 0.3,
) -> dict[str, Any]:
    """Keyword arguments of ``policy_loss_from_logits``, all in float32 but the logits; ``lengths`` make it packed."""
    g = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    logits = (2 * randn(*shape, vocabulary)).to(dtype)
    token_ids = torch.randint(vocabulary, shape, generator=g)
    temperature = 0.5 + torch.rand(shape, generator=g)
    scaled = (logits.float() / temperature[..., None]).log_softmax(-1)
    logprobs = scaled.gather(-1, token_ids[..., None])[..., 0]
    result = {
        "logits": logits,
        "token_ids": token_ids,
        "old_logprobs": (logprobs + spread * randn(*shape)).clamp(max=-1e-3),
        "ref_logprobs": (logprobs + spread * randn(*shape)).clamp(max=-1e-3),
        "advantages": randn(*shape),
        "is_weights": randn(*shape).exp(),
        "mask": torch.rand(shape, generator=g) < kept,
        "temperature": temperature,
    }
    if lengths is not None:
        result["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return result


def _in_double(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() and name != "mask" else x
        for name, x in batch.items()
    }


def by_reference(batch: dict[str, Any], objective: O.Objective, **options: Any) -> tuple[Any, Tensor]:
    """The output in float64, and the gradient of the logits."""
    double = _in_double(batch)
    leaf = double.pop("logits").requires_grad_()
    with fusedpo.backend("reference"):
        out = fusedpo.policy_loss_from_logits(leaf, **double, objective=objective, **options)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    return out, gradient


def check_loss(out: Any, batch: dict[str, Any], objective: O.Objective, **options: Any) -> None:
    """Loss and metrics are those of the log-probs and the entropy of ``out`` in float64.

    That leaves the rounding of the log-probs out, which an objective may amplify at will: VESPO's weight of a window
    by ``k - lambda w`` for each of them.
    """
    double = {name: x for name, x in _in_double(batch).items() if name not in ("logits", "token_ids", "temperature")}
    with fusedpo.backend("reference"):
        expected = fusedpo.policy_loss(
            out.logprobs.double(), **double, entropy=out.entropy.double(), objective=objective, **options
        )
    # A float32 mean of terms of both signs, each rounded: of some 100 to 4e-6.
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=2e-6, atol=2e-5)
    metrics, values = (torch.stack(list(x.metrics.values())).double() for x in (out, expected))
    torch.testing.assert_close(metrics, values, rtol=1e-5, atol=2e-6)


def check_gradient(result: Tensor, expected: Tensor, window: int = 1) -> None:
    """Float32 arithmetic, rounded once to the dtype of the logits: some ten roundoffs, and half a unit of that dtype.

    A trace over a window of log-probs of about -10, each rounded by up to 5e-7, has the error of their sum besides.

    What is small beside the largest values is a difference of numbers of that size, in a row or in the coefficient of
    a token (policy term and KL). Below the smallest normal number the rounding is absolute.
    """
    info = torch.finfo(result.dtype)
    largest = expected[expected.isfinite()].abs().amax() if expected.isfinite().any() else 0
    bound = (
        (0.5 * info.eps + 5e-6 + 1e-6 * window**0.5) * expected.abs() + 1e-6 * largest + info.smallest_normal * info.eps
    )
    error = (result.double() - expected).abs()
    assert torch.equal(result.isnan(), expected.isnan())
    assert bool((error <= bound)[~expected.isnan()].all()), float((error - bound).nan_to_num(0).max())


def signalling_nan(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """NaNs that every operation on floating-point numbers would change."""
    integer, pattern = {
        torch.float32: (torch.int32, 0x7F800001),
        torch.bfloat16: (torch.int16, 0x7F81),
        torch.float16: (torch.int16, 0x7C01),
    }[dtype]
    return torch.full(shape, pattern, dtype=integer).view(dtype)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)
