"""The fusion from the last hidden state: loss, and gradients of it and of the head's weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fusedpo

from .batch import OBJECTIVES, SEQUENCES, Loss, exact_coefficients, make_batch, on_gpu, plain_loss, some_rows
from .harness import Case, Provider, Run, compiled, not_installed, relative_error

SIZES = {
    ("cpu", False): [(512, 1024, 151_936), (128, 1024, 151_936)],
    ("cpu", True): [(64, 256, 32_000)],
    ("cuda", False): [(8192, 4096, 151_936), (2048, 4096, 151_936), (8192, 4096, 32_000)],
    ("cuda", True): [(8192, 4096, 151_936)],
}
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
PRODUCTS = "three matrix products"


def cases(device: str, quick: bool, dtypes: list[torch.dtype]) -> Iterator[Case]:
    sizes = SIZES[device, quick]
    for dtype in dtypes:
        slow = device == "cpu" and dtype == torch.float32  # three seconds a product at the first of several sizes
        for size in sizes[-1:] if slow else sizes:
            yield _case(dtype, *size, device)
    if not quick:
        yield _case(dtypes[-1], *sizes[-1], device, masked=0.5)


def _case(dtype: torch.dtype, tokens: int, width: int, vocab: int, device: str, *, masked: float = 0.0) -> Case:
    objective, n = OBJECTIVES["PPO"]
    hidden = torch.randn(SEQUENCES, tokens // SEQUENCES, width, device=device).to(dtype)
    weight = (torch.randn(vocab, width, device=device) * 3 * width**-0.5).to(dtype)
    ids = torch.randint(vocab, hidden.shape[:-1], device=device)
    exact = Exact(hidden, weight, ids)
    batch = make_batch(exact.logprobs.float(), ids, masked=masked)
    truth = exact.gradients(exact_coefficients(exact.logprobs, batch, objective))

    def error(gradients: tuple[Tensor, Tensor]) -> float:
        of_hidden, of_weight = gradients
        some = of_hidden.view(-1, width)[exact.rows], of_weight[exact.columns]
        return max(relative_error(result, t) for result, t in zip(some, truth, strict=True))

    def gradients(loss: Loss) -> Run:
        def run() -> tuple[Tensor, Tensor]:
            h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            loss(h, w).backward()
            return h.grad, w.grad

        return run

    def provider(
        name: str, loss: Loss, *, compile: bool = False, compiles: bool = False, missing: str = ""
    ) -> Provider:
        """``compiles``: it calls torch.compile itself."""

        def prepare() -> Run:
            return gradients(compiled(loss) if compile else loss)

        return Provider(name, prepare, error, ALLOWED[dtype], compile or compiles, missing)

    def fused(h: Tensor, w: Tensor) -> Tensor:
        options = {"objective": objective, "mask": batch.mask}
        return fusedpo.policy_loss_from_hidden(h, w, *batch[:3], **options).loss

    def eager(h: Tensor, w: Tensor) -> Tensor:
        logprobs = torch.log_softmax((h @ w.T).float(), -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        return plain_loss(logprobs, batch, n)

    def trl(h: Tensor, w: Tensor) -> Tensor:
        """As its fused head calls it: where Triton runs, with the kept tokens alone."""
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

        scored = batch.mask if device == "cuda" else torch.ones_like(batch.mask)
        arguments = (h[scored], w, None, ids[scored], 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
        logprobs = ChunkedLogProbFunction.apply(*arguments)[0]
        return plain_loss(torch.zeros_like(batch.old_logprobs).masked_scatter(scored, logprobs), batch, n)

    def verl(h: Tensor, w: Tensor) -> Tensor:
        from verl.utils.experimental.torch_functional import FusedLinearForPPO

        return plain_loss(FusedLinearForPPO()(h, w, ids)[0], batch, n)

    def verl_by_triton(h: Tensor, w: Tensor) -> Tensor:
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

        return plain_loss(linear_cross_entropy(h, w, ids)[0].view(ids.shape), batch, n)

    def cut_cross_entropy(h: Tensor, w: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        impl = "cce" if device == "cuda" else "torch_compile"
        return plain_loss(-linear_cross_entropy(h, w, ids, reduction="none", impl=impl).float(), batch, n)

    def liger(h: Tensor, w: Tensor) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo")
        return loss(h, w, ids, batch.mask.int(), batch.advantages, old_per_token_logps=batch.old_logprobs)[0]

    kernels, no_gpu = ("Triton", "") if device == "cuda" else ("PyTorch", "its Triton kernels need a GPU")
    return Case(
        group=f"PPO, loss and gradients, {str(dtype).removeprefix('torch.')}" + (", half masked" if masked else ""),
        sizes={"T": tokens, "H": width, "V": vocab},
        providers=[
            three_products(hidden, weight, batch.mask),
            provider("fusedpo", fused),
            provider("fusedpo, torch.compile", fused, compile=True),
            *(
                provider(f"fusedpo, {backend}", loss, missing=missing)
                for backend, loss, missing in on_gpu(fused, "linear_token_logprobs", device, dtype)
            ),
            provider("eager", eager),
            provider("torch.compile", eager, compile=True),
            provider(f"trl, {kernels}", trl, missing=not_installed("trl")),
            provider("verl, PyTorch", verl, missing=not_installed("verl")),
            provider("verl, Triton", verl_by_triton, missing=not_installed("verl") or no_gpu),
            provider("liger, torch.compile", liger, compiles=True, missing=not_installed("liger_kernel")),
            provider(
                f"cut-cross-entropy, {'Triton' if device == 'cuda' else 'torch.compile'}",
                cut_cross_entropy,
                compiles=True,
                missing=not_installed("cut_cross_entropy"),
            ),
        ],
        ceiling=PRODUCTS,
        bytes_moved=2 * (hidden.numel() + weight.numel()) * hidden.element_size(),
        flops=6 * int(batch.mask.sum()) * width * vocab,
    )


def logits_and(
    name: str, hidden: Tensor, weight: Tensor, mask: Tensor, others: Callable[[Tensor, Tensor], object]
) -> Provider:
    """The product that makes the logits of the kept tokens, in memory that is there, and ``others(rows, logits)``."""

    def prepare() -> Run:
        rows = hidden[mask]
        logits = rows @ weight.T

        def run() -> None:
            others(rows, torch.mm(rows, weight.T, out=logits))

        return run

    return Provider(name, prepare)


def three_products(hidden: Tensor, weight: Tensor, mask: Tensor) -> Provider:
    """The logits of the kept tokens, and the two gradients from a gradient of theirs: 6 H V flops per token."""
    return logits_and(PRODUCTS, hidden, weight, mask, lambda rows, logits: (logits @ weight, logits.T @ rows))


class Exact:
    """Log-probs, and the gradients of some rows of the hidden states and of the weight, in float64."""

    def __init__(self, hidden: Tensor, weight: Tensor, ids: Tensor, columns: int = 16) -> None:
        self.hidden, self.weight, self.ids = hidden.flatten(0, 1).double(), weight.double(), ids.flatten()
        self.rows = some_rows(len(self.ids)).to(hidden.device)
        self.columns = torch.cat([self.ids[self.rows], some_rows(len(weight), columns).to(hidden.device)])
        logprobs, probabilities = [], []
        for h, i in zip(self.hidden.split(256), self.ids.split(256), strict=True):
            logp = torch.log_softmax(h @ self.weight.T, -1)
            logprobs.append(logp.gather(-1, i.unsqueeze(-1)).squeeze(-1))
            probabilities.append(logp[:, self.columns].exp())
        self.logprobs, self.probabilities = torch.cat(logprobs).view(ids.shape), torch.cat(probabilities)

    def gradients(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        c = coefficients.flatten()[:, None]
        p = torch.softmax(self.hidden[self.rows] @ self.weight.T, -1)
        of_hidden = c[self.rows] * (self.weight[self.ids[self.rows]] - p @ self.weight)
        of_logits = c * ((self.ids[:, None] == self.columns).double() - self.probabilities)
        return of_hidden, of_logits.T @ self.hidden
