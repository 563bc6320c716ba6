"""Which implementation runs, who may force it, and what is said where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fusedpo
from fusedpo import backends, ops

X, IDS = torch.randn(3, 5), torch.tensor([0, 1, 2])
native = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))


@pytest.fixture
def calls(monkeypatch):
    """The backends whose kernels were really called."""
    seen = []
    original = ops.token_logprobs

    def spy(*args):
        seen.append(args[-1])
        return original(*args)

    monkeypatch.setattr(ops, "token_logprobs", spy)
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


def test_forced_backend_never_falls_back():
    with fusedpo.backend("native"), pytest.raises(fusedpo.BackendUnavailable, match=r"'native' was forced.*float64"):
        fusedpo.token_logprobs(X.double(), IDS)


def test_missing_native_part_is_named(monkeypatch):
    monkeypatch.setattr(backends, "NATIVE_MISSING", "no compiler; pip install --no-build-isolation fusedpo")
    assert backends.choose("token_logprobs", "cpu") == "reference"
    with fusedpo.backend("native"), pytest.raises(fusedpo.BackendUnavailable, match="--no-build-isolation"):
        fusedpo.token_logprobs(X, IDS)


def test_nesting_restores_what_was_forced():
    with fusedpo.backend("reference"):
        with fusedpo.backend("auto"):
            assert backends._forced is None
        assert backends._forced == "reference"
        with pytest.raises(KeyError), fusedpo.backend("native"):
            raise KeyError
        assert backends._forced == "reference"


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


def test_env_reports_versions_and_the_choice_for_every_operator():
    result = python("-m", "fusedpo", "env")
    assert result.returncode == 0, result.stderr
    for word in (fusedpo.__version__, torch.__version__, *backends.IMPLEMENTATIONS):
        assert word in result.stdout
    if backends.NATIVE_MISSING is None:
        assert "native: cpu_capability" in result.stdout
    forced = python("-m", "fusedpo", "env", FUSEDPO_BACKEND="reference").stdout
    assert "FUSEDPO_BACKEND" in forced
    assert "native kernel" not in forced.partition("operator")[2] or "has no native kernel" in forced


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
        (ValueError, "temperature must be positive, got 0", lambda: fusedpo.token_logprobs(X, IDS, temperature=0.0)),
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
