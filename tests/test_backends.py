"""Which implementation runs, who may force it, and what is said where it cannot."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fusedpo.bench import choose

import fusedpo
from fusedpo import _chosen, backends
from fusedpo.ops import token_logprobs as ops_token_logprobs

X, IDS = torch.randn(3, 5), torch.tensor([0, 1, 2])
native = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))


@pytest.fixture
def calls(monkeypatch):
    """The backends whose kernels were really called."""
    seen = []
    original = ops_token_logprobs.token_logprobs

    def spy(*args):
        seen.append(args[-1])
        return original(*args)

    monkeypatch.setattr(ops_token_logprobs, "token_logprobs", spy)
    return seen


@native
def test_native_runs_on_the_cpu(calls):
    fusedpo.token_logprobs(X, IDS)
    assert calls == ["native"]


def test_forced_reference_runs_no_kernel(calls):
    with fusedpo.backend("reference"):
        fusedpo.token_logprobs(X, IDS)
    assert calls == []


def test_float64_runs_on_the_reference(calls):
    assert fusedpo.token_logprobs(X.double(), IDS).dtype == torch.float64
    assert calls == []


@native
def test_forced_backend_never_falls_back():
    with fusedpo.backend("native"), pytest.raises(fusedpo.BackendUnavailable, match=r"'native' was forced.*float64"):
        fusedpo.token_logprobs(X.double(), IDS)


def hidden_logprobs(hidden):
    return fusedpo.linear_token_logprobs(hidden, X, IDS, return_entropy=False).sum()


def hidden_loss(hidden):
    objective, advantages = fusedpo.objectives.ppo(), torch.ones(3)
    return fusedpo.policy_loss_from_hidden(hidden, X, IDS, None, advantages, objective=objective).loss


@pytest.mark.parametrize("function", [hidden_logprobs, hidden_loss])
def test_forced_backend_never_falls_back_where_kernels_cannot_be_functional(function):
    transformed = torch.func.grad(function)
    with fusedpo.backend("reference"):
        expected = transformed(X)
    torch.testing.assert_close(transformed(X), expected)
    if backends.NATIVE_MISSING is None:
        with (
            fusedpo.backend("native"),
            pytest.raises(fusedpo.BackendUnavailable, match=r"'native' was forced for linear_token_logprobs.*outside"),
        ):
            transformed(X)


@native
@pytest.mark.parametrize("function", [hidden_logprobs, hidden_loss])
def test_forced_backend_is_compiled(function):
    torch._dynamo.reset()
    with fusedpo.backend("native"):
        torch.testing.assert_close(torch.compile(function, backend="aot_eager", fullgraph=True)(X), function(X))


def test_missing_native_part_is_named(monkeypatch):
    monkeypatch.setattr(backends, "NATIVE_MISSING", "no compiler; pip install --no-build-isolation fusedpo")
    assert backends.choose("token_logprobs", "cpu") == "reference"
    with fusedpo.backend("native"), pytest.raises(fusedpo.BackendUnavailable, match="--no-build-isolation"):
        fusedpo.token_logprobs(X, IDS)


def test_nesting_restores_what_was_forced():
    with fusedpo.backend("reference"):
        with fusedpo.backend("auto"):
            assert backends.forced() is None
        assert backends.forced() == "reference"
        with pytest.raises(KeyError), fusedpo.backend("native"):
            raise KeyError
        assert backends.forced() == "reference"


def test_an_object_is_entered_again():
    reference = fusedpo.backend("reference")
    with reference:
        with fusedpo.backend("native"), reference:
            assert backends.forced() == "reference"
        assert backends.forced() == "reference"
        with reference, pytest.raises(KeyError), reference:
            raise KeyError
    assert backends.forced() is None
    with reference:
        assert backends.forced() == "reference"
    assert backends.forced() is None


def test_decorator():
    @fusedpo.backend("reference")
    def countdown(n):
        return [backends.forced(), *(countdown(n - 1) if n else [])]

    assert countdown(2) == ["reference"] * 3
    assert backends.forced() is None


def test_threads_may_leave_in_any_order():
    contexts = [fusedpo.backend(name) for name in ("reference", "native")]
    for first in (0, 1):
        for context in contexts:
            context.__enter__()
        contexts[first].__exit__(None, None, None)
        assert backends.forced() == ("native", "reference")[first]
        contexts[1 - first].__exit__(None, None, None)
        assert backends.forced() is None


def test_nothing_is_forced_after_many_threads():
    shared = fusedpo.backend("reference")

    def work(_):
        for _ in range(200):
            with shared, fusedpo.backend("native"):
                assert backends.forced() is not None

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert backends.forced() is None


def test_compiled_code_follows_the_choice():
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: fusedpo.token_logprobs(x, IDS), backend=compiler, fullgraph=True)
    for name in ("auto", "reference", "auto", "reference"):
        with fusedpo.backend("auto"), fusedpo.backend(name):
            torch.testing.assert_close(compiled(X), fusedpo.token_logprobs(X, IDS))
    assert len(graphs) == 2 - (backends.NATIVE_MISSING is not None)


def test_a_second_copy_of_the_triton_kernels_is_refused(monkeypatch):
    """It would register its own operators in place of the first's."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    with pytest.raises(ImportError, match=r"import fusedpo\.triton_kernels$"):
        importlib.import_module("triton_kernels")


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of"):
        fusedpo.backend("cuda")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_environment_variable_forces_a_backend():
    code = "import torch, fusedpo; from fusedpo import backends; print(backends.choose('token_logprobs', 'cpu'))"
    assert python("-c", code, FUSEDPO_BACKEND="reference").stdout.strip() == "reference"
    assert "backend must be one of" in python("-c", code, FUSEDPO_BACKEND="fast").stderr


@pytest.mark.parametrize(("value", "asked"), [("1", "True"), ("0", "False")])
def test_environment_variable_asks_for_checks_that_wait_for_a_device(value, asked):
    code = """
import torch
from fusedpo import _checks
class Elsewhere:  # there is no such device here
    device, is_meta = torch.device("cuda"), False
_checks._PLAIN = (Elsewhere,)
print(_checks.values_are_free(Elsewhere()))
"""
    result = python("-c", code, FUSEDPO_DEBUG=value)
    assert result.stdout.strip() == asked, result.stderr


def test_env_reports_versions_and_the_choice_for_every_operator():
    result = python("-m", "fusedpo", "env", FUSEDPO_BACKEND="auto")
    assert result.returncode == 0, result.stderr
    assert "was forced" not in result.stdout
    for word in (fusedpo.__version__, torch.__version__, *backends.IMPLEMENTATIONS):
        assert word in result.stdout
    if backends.NATIVE_MISSING is None:
        assert "native: cpu_capability" in result.stdout
    forced = python("-m", "fusedpo", "env", FUSEDPO_BACKEND="reference").stdout
    (row,) = (line for line in forced.splitlines() if line.startswith("token_logprobs  ") and " cpu " in line)
    assert row.split(maxsplit=3)[2:] == ["reference", "[1]"]
    assert "[1] reference was forced by FUSEDPO_BACKEND or fusedpo.backend\n" in forced


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("name", ["reference", pytest.param("native", marks=native)])
@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "logits must be a torch.Tensor, got list", lambda: fusedpo.token_logprobs([[1.0]], IDS)),
        (TypeError, "logits must have a floating-point dtype", lambda: fusedpo.token_logprobs(X.long(), IDS)),
        (TypeError, "token_ids must have dtype .* got torch.float32", lambda: fusedpo.token_logprobs(X, IDS.float())),
        (ValueError, r"token_ids must have shape \[3\] or \[3, 'K'\]", lambda: fusedpo.token_logprobs(X, IDS[:2])),
        (ValueError, "logits must have shape", lambda: fusedpo.token_logprobs(torch.randn(3, 0), IDS)),
        (ValueError, "token_ids must be in", lambda: fusedpo.token_logprobs(X, IDS + 3)),
        (ValueError, "token_ids must be in", lambda: fusedpo.token_logprobs(X, IDS - 1)),
        (
            ValueError,
            "temperature must be positive",
            lambda: fusedpo.token_logprobs(X, IDS, temperature=torch.tensor([1.0, -1.0, 1.0])),
        ),
        (
            ValueError,
            r"temperature must have shape \[3\]",
            lambda: fusedpo.token_logprobs(X, IDS, temperature=torch.ones(2)),
        ),
        (
            ValueError,
            "temperature must be on the device of logits",
            lambda: fusedpo.token_logprobs(X, IDS, temperature=torch.ones(3, device="meta")),
        ),
        (
            ValueError,
            "mask must be on the device of logits",
            lambda: fusedpo.token_logprobs(X, IDS, mask=torch.ones(3, device="meta")),
        ),
        (
            ValueError,
            "mask must be on the device of input_ids",
            lambda: fusedpo.next_tokens(IDS, torch.ones(3, device="meta")),
        ),
        (
            ValueError,
            "cu_seqlens must be on the device of input_ids",
            lambda: fusedpo.next_tokens(IDS, cu_seqlens=torch.tensor([0, 3], device="meta")),
        ),
        (TypeError, "input_ids must have dtype", lambda: fusedpo.next_tokens(X)),
        (
            ValueError,
            r"input_ids must have shape \[T\] or \[1, T\] with cu_seqlens, got \[2, 3\]",
            lambda: fusedpo.next_tokens(IDS.expand(2, 3), cu_seqlens=IDS),
        ),
        (ValueError, "cu_seqlens must", lambda: fusedpo.next_tokens(IDS, cu_seqlens=torch.tensor([0, 2, 1, 3]))),
        (ValueError, r"mask must have shape \[3\]", lambda: fusedpo.next_tokens(IDS, torch.ones(2))),
        (ValueError, r"mask must have shape \[3\]", lambda: fusedpo.token_logprobs(X, IDS, mask=torch.ones(3, 1))),
        (
            ValueError,
            "token_ids must be on the device of logits",
            lambda: fusedpo.token_logprobs(X.to("meta"), IDS),
        ),
    ],
)
def test_bad_input(name, error, message, call):
    with fusedpo.backend(name), pytest.raises(error, match=message):
        call()


# --------------------------------------------------------------------------------------------------- what was measured


@pytest.mark.parametrize(
    "operator", sorted(o for o, by in backends.IMPLEMENTATIONS.items() if "cuda" in by.get("native", ()))
)
def test_native_cuda_kernels_run_where_they_were_chosen(monkeypatch, operator):
    """All alike: forced, or after a measurement."""
    monkeypatch.setattr(backends, "why_not", lambda *_: None)
    monkeypatch.setattr(_chosen, "NATIVE_ON_CUDA", ())
    assert backends.kernel_for(operator, "cuda") == "triton"
    assert backends.kernel_for(operator, "cpu") == "native"
    with fusedpo.backend("native"):
        assert backends.kernel_for(operator, "cuda") == "native"
    monkeypatch.setattr(_chosen, "NATIVE_ON_CUDA", (operator,))
    assert backends.kernel_for(operator, "cuda") == "native"


def test_what_is_chosen_was_recorded():
    """A native CUDA kernel runs by itself only where bench/results has a GPU's sweep that chooses it."""
    sweeps = sorted((Path(__file__).parents[1] / "bench/results").glob("*/sweep.json"))
    chosen = {operator for path in sweeps for operator in choose.decide(json.loads(path.read_text())).native}
    assert set(_chosen.NATIVE_ON_CUDA) <= chosen
