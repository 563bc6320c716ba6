"""Logits, the bounds of their log-probs, and the memory that a function takes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import fusedpo
from fusedpo import reference


def total(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A scalar with a different upstream gradient for every element."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum((o * torch.arange(o.numel()).cos().reshape(o.shape)).sum() for o in outputs)


def peak_extra_bytes(function) -> int:
    """The largest sum of what was allocated and not freed while `function` ran, as the profiler saw it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def product_bytes(hidden: Tensor, weight: Tensor) -> list[int]:
    """What PyTorch's own products allocate besides results: the logits, gradients of the hidden states and the weight.

    In bfloat16 they copy: a result in float32, or an operand in the order of the processor's instructions.
    """
    hidden, weight = hidden.detach(), weight.detach()
    logits = hidden.new_zeros(hidden.shape[0], weight.shape[0])
    products = (
        (hidden, weight.t(), logits),
        (logits, weight, torch.empty_like(hidden)),
        (logits.t(), hidden, torch.empty_like(weight)),
    )
    return [peak_extra_bytes(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) for a, b, out in products]


PARTS = {"all": lambda x: x, "rows": lambda x: x[:, :-1], "columns": lambda x: x[..., 3:]}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 2, 31, 127, 1000, 4099, 32000, 50257, 128256, 151936]
EPS = torch.finfo(torch.float32).eps
ROUNDINGS = 12
EXPONENTIAL = {torch.float32: 0.0, torch.bfloat16: 2**-18, torch.float16: 2**-18}
KINDS = [
    "random",
    "confident",
    "negative",
    "large",
    "shift-300",
    "shift3e4",
    "around 1e9",
    "leading -inf",
    "leading minimum",
    "a row of -inf",
    "a row of the minimum",
    "rising",
    "wide",
]


def make_logits(kind: str, rows: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits of which `kind` names what is difficult."""
    x = 2 * torch.randn(rows, size, dtype=torch.float64)
    if kind == "confident":  # p(first column) from 1/2 to 1 - 1e-6
        p = 1 - torch.logspace(math.log10(0.5), -6, rows, dtype=torch.float64)
        x[:, 0] = x[:, 1:].logsumexp(-1) + torch.logit(p) if size > 1 else 0
    elif kind == "negative":
        x = -x.abs() - 50
    elif kind == "large":
        x = x + 80
    elif kind.startswith("shift"):
        x = x + float(kind.removeprefix("shift"))
    elif kind == "around 1e9":  # neighbours differ by 64 or more; in float16 all are inf
        x = 1e9 * (1 + torch.finfo(dtype).eps * x.round())
    elif kind.startswith("leading"):  # more than a block of the kernels
        x[:, : size // 2] = -torch.inf if kind.endswith("-inf") else torch.finfo(dtype).min
    elif kind.startswith("a row"):
        x[1] = -torch.inf if kind.endswith("-inf") else torch.finfo(dtype).min
    elif kind == "rising":  # every block has a new maximum, far above the last one
        x = x + torch.linspace(-300, 300, size, dtype=torch.float64)
    elif kind == "wide":
        x = x * 1e3
    return x.to(dtype)


def run(function, logits: Tensor, upstream: tuple[Tensor, Tensor], **options) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropy and the gradient of the logits, all in float64."""
    x = logits.detach().clone().requires_grad_()
    outputs = function(x, return_entropy=True, **options)
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)])
    return tuple(t.detach().double() for t in (*outputs, x.grad))


def sum_beside_one(x: Tensor) -> Tensor:
    """What `x` was rounded as a part of: 1 + `x`, unless one logit dominates; what is beside that is summed apart."""
    return torch.where(x > 2**-9, 1 + x, x)


def terms_of_gradient(logits: Tensor, ids: Tensor, upstream: tuple[Tensor, Tensor], temperature=1.0, mask=None):
    """For each logit, the terms of its gradient added up as if none had a sign, and |log p|; both in float64."""
    temperature = torch.as_tensor(temperature, dtype=torch.float64)
    temperature = temperature.unsqueeze(-1) if temperature.dim() > 0 else temperature
    logp = torch.log_softmax(logits.double() / temperature, -1).clamp(min=-800)  # exp(-800) is 0
    p = logp.exp()
    entropy = -(p * logp).sum(-1, keepdim=True)
    ids = ids if ids.dim() == logits.dim() else ids.unsqueeze(-1)
    g, g_entropy = upstream[0].double().abs().reshape(ids.shape), upstream[1].double().abs().unsqueeze(-1)
    here = torch.zeros_like(p).scatter_add(-1, ids, g)
    others = g.sum(-1, keepdim=True) - here
    terms = here * sum_beside_one(-logp.expm1()) + p * (others + g_entropy * (entropy - logp))
    return terms / temperature * (1 if mask is None else mask.unsqueeze(-1)), -logp


def assert_accurate(logits: Tensor, ids: Tensor, **options) -> None:
    """Each log-prob, entropy and gradient by itself: the float64 truth, but for the roundings of float32 and the dtype.

    PyTorch in the same dtype is not that close: it rounds logits / temperature, and sums probabilities beside 1.
    """
    upstream = torch.randn(ids.shape), torch.randn(logits.shape[:-1])
    truth = run(reference.token_logprobs, logits.double(), upstream, token_ids=ids, **options)
    result = run(fusedpo.token_logprobs, logits, upstream, token_ids=ids, **options)
    terms, exponent = terms_of_gradient(logits, ids, upstream, **options)
    logprobs, entropy, gradient = (want.abs() for want in truth)
    allowed = {
        "logprobs": ROUNDINGS * EPS * sum_beside_one(logprobs),
        "entropy": ROUNDINGS * EPS * sum_beside_one(entropy),
        "gradient": ((ROUNDINGS + exponent) * EPS + EXPONENTIAL[logits.dtype]) * terms
        + (gradient.to(logits.dtype).double() - gradient).abs(),
    }
    for got, want, (name, bound) in zip(result, truth, allowed.items(), strict=True):
        finite = want.isfinite()
        assert torch.equal(got.isfinite(), finite), name
        assert torch.equal(got[~finite].nan_to_num(1), want[~finite].nan_to_num(1)), name
        error, bound = (got - want).abs()[finite], bound[finite] + 2**-40  # which float64 loses beside 1
        far = error > bound
        assert not far.any(), f"{name}: error {error[far][0]:.2e}, allowed {bound[far][0]:.2e}, {far.sum()} times"


STRIDED = {
    "slice": lambda x: x[:, :-1],
    "step": lambda x: x[:, ::2],
    "columns": lambda x: x[..., 3:-2],
    "transposed rows": lambda x: x.transpose(0, 1),
    "transposed vocabulary": lambda x: x.transpose(1, 2),
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "unaligned": lambda x: x.flatten()[1 : 1 + 3 * 5 * 37].view(3, 5, 37),
    "one row": lambda x: x[0, 0],
}


def check_strided_arguments(x: Tensor, ids: Tensor, mask: Tensor, temperature: Tensor, upstream: Tensor) -> None:
    """The others come transposed: ids ``[T, K, B]``, upstream gradients ``[T, B, 2]``, the rest ``[T, B]``."""
    upstreams = upstream[0, :, :1].unsqueeze(1).expand(x.shape[0], x.shape[1], ids.shape[1]), upstream[..., 1].T
    views = ids.permute(2, 0, 1), mask.T, temperature.T, *upstreams
    results = []
    for ids, mask, temperature, *upstream in (views, [view.contiguous() for view in views]):
        leaf = x.clone().requires_grad_()
        out = fusedpo.token_logprobs(leaf, ids, mask=mask, temperature=temperature, return_entropy=True)
        torch.autograd.backward(out, upstream)
        results.append((*out, leaf.grad))
    assert all(map(torch.equal, *results))


def everything(x: Tensor, ids: Tensor, upstream: tuple[Tensor, Tensor], rows: Tensor | slice) -> list[Tensor]:
    """Results and gradient of these rows."""
    leaf = x[rows].clone().requires_grad_()
    out = fusedpo.token_logprobs(leaf, ids[rows], return_entropy=True)
    torch.autograd.backward(out, [u[rows] for u in upstream])
    return [*(o.detach() for o in out), leaf.grad]
