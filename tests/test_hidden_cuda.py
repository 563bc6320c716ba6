"""From hidden states on a GPU: against float64, with one chunk of logits in memory and without a synchronisation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.hidden import OBJECTIVES, assert_equal_to_reference, make
from torch import Tensor

import fusedpo
from fusedpo import backends
from fusedpo import objectives as O

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True, params=["native", "triton"])
def backend(request):
    missing = backends.why_not(request.param, "linear_token_logprobs", "cuda")
    if missing is not None:
        pytest.skip(missing)
    with fusedpo.backend(request.param):
        yield request.param


@pytest.fixture
def as_users_run_it():
    """Deterministic algorithms sort before they write, which takes memory and may take a synchronisation."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nfpo(3)", "gspo", "cispo", "dppo_kl"])
def test_equal_to_the_composition_in_float64(backend, name, dtype, softcap, packed):
    """Logits are rounded, whose error enters the ratios: as large as eps times the logits, which are of order 5."""
    options = {"objective": OBJECTIVES[name], "chunk_tokens": 5, "loss_scale": 256.0, "softcap": softcap}
    rtol = max(8 * torch.finfo(dtype).eps, 1e-5)
    assert_equal_to_reference(*make(dtype, packed), rtol=rtol, backend=backend, device="cuda", **options)


def step(tokens: int, size: int, vocab: int, dtype: torch.dtype) -> tuple[list[Tensor], Callable[..., list[Tensor]]]:
    """Hidden states and weight, and a function that gives their gradients; a tenth of the tokens is masked."""
    g = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    leaves = [x.to(dtype).requires_grad_() for x in (randn(tokens, size), randn(vocab, size) / size**0.5)]
    ids = torch.randint(vocab, (tokens,), generator=g, device="cuda")
    mask = torch.rand(tokens, generator=g, device="cuda") < 0.9
    old_logprobs, advantages, num_live = randn(tokens) - 12, randn(tokens), int(mask.sum())

    def gradients(*leaves: Tensor, objective: O.Objective, known: bool = True, **options) -> list[Tensor]:
        loss = fusedpo.policy_loss_from_hidden(
            *leaves,
            ids,
            old_logprobs,
            advantages,
            mask=mask,
            objective=objective,
            num_live=num_live if known else None,
            loss_scale=256.0,
            **options,
        ).loss
        return list(torch.autograd.grad(loss, leaves))

    return leaves, gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", [O.reinforce(entropy_coef=0.01), O.cispo()], ids=["reinforce", "cispo"])
def test_sizes_for_which_tensor_cores_are_chosen(dtype, objective):
    """The gradient of the weight is a sum over ten chunks in float32, rounded once."""
    leaves, gradients = step(1000, 512, 32_000, dtype)
    got = gradients(*leaves, objective=objective, chunk_tokens=100)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    with fusedpo.backend("reference"):
        wanted = gradients(*doubles, objective=objective)
    for x, want in zip(got, wanted, strict=True):
        assert x.dtype == dtype
        assert (x.double() - want).norm() <= 8 * max(torch.finfo(dtype).eps, 1e-6) * want.norm()


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("objective", [O.nfpo(3), O.gspo()], ids=["nfpo", "gspo"])
def test_memory(dtype, softcap, objective):
    """The workspace (two with a softcap), and the gradients with the float32 sum of that of the weight."""
    tokens, size, vocab, chunk = 2048, 64, 100_000, 128
    leaves, gradients = step(tokens, size, vocab, dtype)

    def run() -> None:
        gradients(*leaves, objective=objective, softcap=softcap, chunk_tokens=chunk)

    run()  # what is kept for later calls is allocated: the workspace of cuBLAS
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    peak = torch.cuda.max_memory_allocated() - before
    workspace = (1 if softcap is None else 2) * chunk * vocab * dtype.itemsize
    rounded = 0 if dtype == torch.float32 else vocab * size * dtype.itemsize
    allowed = workspace + vocab * size * 4 + rounded + tokens * size * dtype.itemsize + (64 << 20)  # cuBLAS's
    assert workspace <= peak <= allowed < tokens * vocab * dtype.itemsize


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("threshold", [None, 2.0**-5, 2.0**-12])  # the last falls back to the plain products
@pytest.mark.parametrize("objective", [O.nfpo(3), O.ppo(), O.gspo()], ids=["nfpo", "ppo", "gspo"])
def test_no_synchronisation_where_the_number_of_rows_is_known(objective, threshold):
    """With a threshold the host waits for a number that is sent to it, but for nothing else."""
    leaves, gradients = step(300, 64, 1000, torch.bfloat16)
    options = {"objective": objective, "chunk_tokens": 128, "gradient_threshold": threshold}
    gradients(*leaves, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(*leaves, **options)
        with pytest.raises(RuntimeError, match="synchronizing"):
            gradients(*leaves, known=False, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
