"""The command ``fusedpo``: help without torch, what is here as a table and as JSON, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import fusedpo
from fusedpo import backends
from fusedpo.__main__ import main

SCRIPT = Path(sysconfig.get_path("scripts"), "fusedpo")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """The environment of processes that stop with status 9 when they import torch."""
    (tmp_path / "torch.py").write_text("import os\nos._exit(9)\n")
    return {"PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--help"], 0, "{env,verify,bench}"),
        (["--version"], 0, f"fusedpo {fusedpo.__version__}"),
        (["verify", "--help"], 0, "--device"),
        (["bench", "--help"], 0, "--providers"),
        (["bench", "compare", "--help"], 0, "--threshold"),
        ([], 2, "required: command"),
        (["env", "--quick"], 2, "unrecognized arguments: --quick"),
        (["bench", "--quack"], 2, "unrecognized arguments: --quack"),
        (["bench", "--providers", "fusedpo", "fusedposition"], 2, "no provider is called 'fusedposition'"),
        (["bench", "compare", "before.json", "after.json"], 2, "there is no file before.json"),
    ],
)
def test_what_needs_no_torch(arguments, status, says, without_torch) -> None:
    result = run(sys.executable, "-m", "fusedpo", *arguments, **without_torch)
    assert result.returncode == status, result.stderr
    assert says in result.stdout + result.stderr


def test_env_needs_torch(without_torch) -> None:
    assert run(sys.executable, "-m", "fusedpo", "env", **without_torch).returncode == 9


def test_other_processes_have_their_own_arguments(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import sys, fusedpo; print(sys.argv[1:], fusedpo.policy_loss.__name__)")
    result = run(sys.executable, str(tmp_path / "train.py"), "--help")
    assert result.stdout.strip() == "['--help'] policy_loss"
    module = run(sys.executable, "-m", "train", "fusedpo", "--help", PYTHONPATH=str(tmp_path))
    assert module.stdout.strip() == "['fusedpo', '--help'] policy_loss"


def test_the_console_script(without_torch) -> None:
    if not SCRIPT.exists():
        pytest.skip("fusedpo was not installed by pip")
    assert run(str(SCRIPT), "--version", **without_torch).stdout == f"fusedpo {fusedpo.__version__}\n"


def test_env_says_each_reason_once(capsys) -> None:
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert all(operator in shown for operator in backends.IMPLEMENTATIONS)
    assert shown.count("the operator has no triton kernel") == 1
    main(["env", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["environment"]["fusedpo"] == fusedpo.__version__
    by_operator = {choice["operator"]: choice for choice in found["operators"] if choice["device"] == "cpu"}
    assert set(by_operator) == set(backends.IMPLEMENTATIONS)
    assert by_operator["optimal_token_baseline"]["runs"] == "reference"
    assert "optimal_token_baseline has no triton kernel" in by_operator["optimal_token_baseline"]["reasons"]


def test_env_of_a_package_without_kernels(monkeypatch, capsys) -> None:
    monkeypatch.setattr(backends, "NATIVE_MISSING", "no compiler")
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert "missing: no compiler" in shown
    assert shown.count("] no compiler") == 1


@pytest.mark.parametrize("command", [["verify"], ["bench", "--quick"]])
def test_a_device_that_is_not_there_is_refused(command, capsys) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    if command[0] == "bench":
        pytest.importorskip("rich")
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as exit:
        main([*command, "--device", "cuda"])
    assert exit.value.code == 2
    assert "--device" in capsys.readouterr().err


def test_a_provider_that_is_not_installed_is_refused(monkeypatch, capsys) -> None:
    from fusedpo.bench import arguments

    monkeypatch.setitem(arguments.PROVIDERS, "trl", "no_such_package")
    with pytest.raises(SystemExit) as exit:
        main(["bench", "--providers", "fusedpo, in place", "trl, no entropy"])
    assert exit.value.code == 2
    assert "no_such_package is not installed" in capsys.readouterr().err
    assert arguments.why_not("fus") is arguments.why_not("eager, plain") is None
    assert arguments.why_not("eagerly") is not None
