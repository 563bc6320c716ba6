"""``python -m fusedpo verify`` passes here, and notices kernels that are wrong."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

import fusedpo
from fusedpo import advantages, backends, verify

CHEAP = ("group_advantages", "token_advantages", "step_advantages", "whiten", "linear_token_logprobs")


@pytest.mark.slow
@pytest.mark.parametrize("missing", [pytest.param(backends.NATIVE_MISSING, id="here"), "no compiler"])
def test_everything_is_right(missing, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(backends, "NATIVE_MISSING", missing)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the interpreter takes minutes
    monkeypatch.setattr(verify, "VOCABULARIES", verify.VOCABULARIES[:3])
    if missing:  # other processes have the kernels all the same
        monkeypatch.delitem(verify.CHECKS, "several ranks")
    assert verify.main(["cpu"], tmp_path / "verify.json") == 0
    shown = capsys.readouterr().out
    document = json.loads((tmp_path / "verify.json").read_text())
    found = {r["operator"] for r in document["results"] if r["comparisons"]}
    assert found == set(verify.CHECKS) - {"no_sync"}
    implementations = {r["implementation"] for r in document["results"] if r["comparisons"]}
    assert implementations == {"auto", "reference" if missing else "native"}
    assert all(name in shown for name in found)
    assert "all right" in shown


def test_every_operator_is_checked() -> None:
    left_out = {"whiten (process group)", "optimal_token_baseline"}
    assert set(backends.IMPLEMENTATIONS) - left_out == set(verify.CHECKS) - {
        "torch.compile",
        "no_sync",
        "several ranks",
    }


def test_the_error_of_what_is_not_a_number() -> None:
    one = torch.ones(2)
    assert verify.error(torch.tensor([1.0, math.nan]), one) == math.inf
    assert verify.error(torch.tensor([1.0, math.inf]), one) == math.inf
    assert verify.error(torch.tensor([1.0, -math.inf]), torch.tensor([1.0, -math.inf])) == 0
    assert verify.error(one, torch.ones(3)) == math.inf
    assert verify.error(torch.tensor([2.0, 4.4]), torch.tensor([2.0, 4.0])) == pytest.approx(0.1)
    assert verify.error(torch.tensor([0.1]), torch.tensor([0.0]), at_least=1.0) == pytest.approx(0.1)


@pytest.mark.parametrize(("bound", "right"), [(verify.FLOAT32, True), (0.0, False)], ids=["rounding", "bits"])
def test_the_bound_of_the_reference_is_its_own(bound, right, monkeypatch) -> None:
    monkeypatch.setitem(verify.CHECKS, "whiten", lambda device: iter([verify.Finding("sum", 2e-5, bound)]))
    assert [verify.check("whiten", "cpu", name)[0].ok for name in ("auto", "reference")] == [False, right]


def is_reference() -> bool:
    return backends._forced == "reference"


def spoil(module: object, name: str, change, monkeypatch) -> None:
    """The function gives something else wherever a kernel, not the reference, is asked."""
    right = getattr(module, name)

    def spoiled(*args, **options):
        result = right(*args, **options)
        return result if is_reference() else change(result)

    monkeypatch.setattr(module, name, spoiled)


def off(x: Tensor) -> Tensor:
    return x * (1 + 1e-4)


@pytest.mark.parametrize(
    ("operator", "module", "name", "change"),
    [
        ("token_logprobs", fusedpo, "token_logprobs", lambda r: (off(r[0]), r[1]) if isinstance(r, tuple) else r),
        ("token_logprobs", fusedpo, "token_logprobs", lambda r: (r[0], off(r[1])) if isinstance(r, tuple) else r),
        ("token_logprobs", fusedpo, "token_logprobs", lambda r: r if isinstance(r, tuple) else r + torch.rand(())),
        ("policy_loss", fusedpo, "policy_loss", lambda r: r._replace(loss=off(r.loss))),
        ("whiten", advantages, "whiten", off),
        ("token_advantages", advantages, "gae", lambda r: r._replace(returns=off(r.returns))),
        ("token_advantages", advantages, "reward_to_go", off),
        ("step_advantages", advantages, "vineppo", off),
        ("group_advantages", advantages, "compute", off),
        ("group_advantages", advantages, "maxpo", lambda r: r + 1e-4),
        ("one_pass", fusedpo, "policy_loss_from_logits", lambda r: r._replace(loss=off(r.loss))),
        ("one_pass", fusedpo, "policy_loss_from_logits", lambda r: r._replace(logprobs=off(r.logprobs))),
        ("linear_token_logprobs", fusedpo, "policy_loss_from_hidden", lambda r: r._replace(loss=r.loss * 1.001)),
    ],
)
def test_a_wrong_kernel_is_noticed(operator, module, name, change, monkeypatch) -> None:
    monkeypatch.setattr(verify, "VOCABULARIES", (31,))
    monkeypatch.setattr(verify, "FUSED", dict(list(verify.FUSED.items())[:2]))
    implementation = "auto" if operator == "linear_token_logprobs" else "native"
    if implementation == "native" and backends.NATIVE_MISSING is not None:
        pytest.skip(backends.NATIVE_MISSING)
    assert all(result.ok for result in verify.check(operator, "cpu", implementation))
    spoil(module, name, change, monkeypatch)
    assert not all(result.ok for result in verify.check(operator, "cpu", implementation))


def test_a_kernel_that_raises_fails_and_the_others_are_checked(monkeypatch, capsys) -> None:
    def raises(*_, **__):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(verify, "CHECKS", {name: verify.CHECKS[name] for name in ("whiten", "step_advantages")})
    monkeypatch.setattr(advantages, "whiten", raises)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # Triton would compile for it
    assert verify.main(["cpu"], None) == 1
    shown = capsys.readouterr().out
    assert "no kernel image is available" in shown
    assert "FAILED" in shown
    assert "vineppo" in shown


def test_without_rich(monkeypatch, capsys) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "rich", None)
    verify.show(verify.check("whiten", "cpu", "auto"))
    assert "against float64" in capsys.readouterr().out
