"""Batches with hidden states, and what counts their matrix products."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedpo
from fusedpo import objectives as O
from support import one_pass


class Products(TorchDispatchMode):
    """The shapes ``[rows, inner, columns]`` of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = args[-2:]
            self.shapes.append((left.shape[0], left.shape[1], right.shape[1]))
        return function(*args, **kwargs or {})


GRID = [(h, w, b) for h in (False, True) for w in (False, True) for b in (False, True)]
B, T, H, V = 4, 6, 16, 90


def make(
    dtype: torch.dtype = torch.float32, packed: bool = False, seed: int = 0, vocab: int = V
) -> tuple[list[Tensor], dict]:
    """Hidden states, weight and bias, and a batch whose log-ratios are near 0: the third sequence is masked."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    sources = [x.to(dtype) for x in (randn(B, T, H), 1.5 * randn(vocab, H) / H**0.5, 0.5 * randn(vocab))]
    ids = torch.randint(vocab, (B, T), generator=g)
    hidden, weight, bias = (x.double() for x in sources)
    lp = (hidden @ weight.T + bias).log_softmax(-1).gather(-1, ids[..., None])[..., 0].float()
    mask = torch.rand(B, T, generator=g) < 0.8
    mask[2] = False
    batch = {
        "token_ids": ids,
        "old_logprobs": lp + 0.2 * randn(B, T),
        "ref_logprobs": lp + 0.2 * randn(B, T),
        "advantages": randn(B, T),
        "is_weights": randn(B, T).exp(),
        "mask": mask,
    }
    if packed:
        sources[0] = sources[0].flatten(0, 1)
        batch = {name: x.flatten() for name, x in batch.items()}
        batch["cu_seqlens"] = torch.tensor([0, 1, 2, 9, 10, 10, 23, 24], dtype=torch.int32)
        batch["advantages"] = randn(7)
    return sources, batch


def run(sources, batch, *, backend="native", upstream=1.0, needed=(True, True, True), **options):
    """The output, and the gradients of hidden, weight and bias; None for those that are not ``needed``."""
    leaves = [x.detach().clone().requires_grad_(n) for x, n in zip(sources, needed, strict=True)]
    with fusedpo.backend(backend):
        out = fusedpo.policy_loss_from_hidden(leaves[0], leaves[1], bias=leaves[2], **batch, **options)
        if any(needed):
            (upstream * out.loss).backward()
    return out, [x.grad for x in leaves]


def in_float64(sources, batch):
    doubles = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in batch.items()}
    return [x.double() for x in sources], doubles


def assert_equal_to_reference(
    sources, batch, *, rtol=1e-5, chunk_tokens=None, backend="native", device="cpu", **options
) -> None:
    """Loss, metrics, log-probs, entropy and gradients, by ``backend`` on ``device``.

    Errors are relative to the largest value: a gradient is a sum of terms as large as that, which may cancel.
    """
    there = [{n: x.to(device) if isinstance(x, Tensor) else x for n, x in xs.items()} for xs in (batch, options)]
    out, gradients = run(
        [x.to(device) for x in sources], there[0], backend=backend, chunk_tokens=chunk_tokens, **there[1]
    )
    want, wanted = run(*in_float64(sources, batch), backend="reference", **options)
    pairs = {
        "loss": (out.loss, want.loss),
        "logprobs": (out.logprobs, want.logprobs),
        "entropy": (out.entropy, want.entropy),
        **dict(zip(("hidden", "weight", "bias"), zip(gradients, wanted, strict=True), strict=True)),
        **{f"metrics[{name!r}]": (out.metrics[name], want.metrics[name]) for name in want.metrics},
    }
    assert list(out.metrics) == list(want.metrics)
    for name, (got, expected) in pairs.items():
        assert got.shape == expected.shape, name
        error, largest = (got.cpu().double() - expected).abs().max(), expected.abs().max()
        assert error <= rtol * largest + 1e-7, f"{name}: {error:.1e} of {largest:.1e}"


OBJECTIVES = one_pass.OBJECTIVES | one_pass.TWO_PASSES | {"nfpo(3)": O.nfpo(3, entropy_coef=0.1, kl=O.KL("k3", 0.1))}
