"""``patch_trl`` and ``unpatch_trl``, and what is said about versions of trl that were not tested."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (extra [peers])")

from trl.trainer import utils as trl_utils

from fusedpo.integrations import _versions
from fusedpo.integrations.trl import FusedGRPOTrainer, patch_trl, unpatch_trl

PATCHED = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")


def holders() -> dict[tuple[str, str], Any]:
    """Every attribute of a trl module that is one of the functions, but for the kernels beneath them."""
    modules = [(name, module) for name, module in sys.modules.items() if name == "trl" or name.startswith("trl.")]
    return {
        (name, attribute): value
        for name, module in modules
        for attribute, value in vars(module).items()
        if getattr(value, "__name__", None) in PATCHED and not value.__module__.startswith("trl.kernels")
    }


@pytest.fixture
def importer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of trl that takes the function by value, under another name."""

    def import_module(name: str) -> ModuleType:
        module = ModuleType(f"trl.{name}")
        exec("from trl.trainer.utils import selective_log_softmax as taken", vars(module))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module

    return import_module


def test_patch_reaches_every_module_and_leaves_no_trace(importer: Callable[[str], ModuleType]) -> None:
    importlib.import_module("trl.experimental.cpo.cpo_trainer")
    early = importer("early")
    before = holders()
    assert ("trl.experimental.cpo.cpo_trainer", "selective_log_softmax") in before
    try:
        patch_trl()
        assert early.taken.__module__.startswith("fusedpo")
        assert all(value.__module__.startswith("fusedpo") for value in holders().values())
        late = importer("late")
        with patch_trl():  # a second patch changes nothing, neither does its end
            assert trl_utils.entropy_from_logits.__module__.startswith("fusedpo")
        assert early.taken is late.taken is trl_utils.selective_log_softmax is not before["trl.early", "taken"]
    finally:
        unpatch_trl()
    assert {key: value for key, value in holders().items() if key != ("trl.late", "taken")} == before
    assert late.taken is early.taken is before["trl.early", "taken"]
    with patch_trl():
        assert trl_utils.selective_log_softmax.__module__.startswith("fusedpo")
    unpatch_trl()  # nothing left to undo
    assert trl_utils.selective_log_softmax is early.taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patched_functions_agree_with_trls(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 7, 101).mul(3).to(dtype)
    index, several = torch.randint(0, 101, (3, 7)), torch.randint(0, 101, (3, 7, 4))
    row_mask = torch.rand(3, 7) < 0.5
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("selective_log_softmax", (index,), {}),
        ("selective_log_softmax", (index, 0.7, row_mask), {}),
        ("selective_log_softmax", (several,), {"row_mask": torch.rand(3, 7, 4) < 0.5}),
        ("entropy_from_logits", (), {"chunk_size": 4}),
        ("selective_log_softmax_and_entropy", (index,), {"temperature": 0.7, "row_mask": row_mask}),
        ("selective_log_softmax_and_entropy", (index, False), {}),
    ]

    def run(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        leaf = logits.clone().requires_grad_()
        results = getattr(trl_utils, name)(leaf, *args, **kwargs)
        results = results if isinstance(results, tuple) else (results,)
        torch.manual_seed(2)
        live = [r for r in results if r.requires_grad]
        torch.autograd.backward(live, [torch.randn(r.shape).to(r.dtype) for r in live])
        return [*(r.float() for r in results), torch.tensor(len(live)), leaf.grad.float()]

    eps = torch.finfo(dtype).eps
    for call in calls:
        expected = run(*call)
        with patch_trl():
            got = run(*call)
        for a, b in zip(got, expected, strict=True):
            # TRL computes in the dtype of the logits: in bfloat16 its results carry roundings of values up to 20
            torch.testing.assert_close(a, b, rtol=4 * eps, atol=20 * eps)


def test_untested_versions_warn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(version: str) -> list[str]:
        monkeypatch.setattr(_versions, "version", lambda package: version)
        _versions.check_version.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                with pytest.raises(ValueError, match="fuse must be"):
                    FusedGRPOTrainer(fuse="nothing")
            with patch_trl():
                pass
        return [str(w.message) for w in caught if "fusedpo was tested with" in str(w.message)]

    try:
        for version in ("1.15.0", "1.16.2"):
            assert found(version) == []
        for version in ("1.14.2", "1.17.0"):
            (message,) = found(version)
            assert "trl>=1.15,<1.17" in message
            assert version in message
        _versions.check_version.cache_clear()
        with pytest.warns(UserWarning, match="1.17.0"), patch_trl():
            pass
    finally:
        _versions.check_version.cache_clear()


def test_the_version_is_said_before_anything_is_missing() -> None:
    """An import by a trl that lacks what is needed: first the warning, then the reason, by name."""
    program = """
import importlib.metadata, sys, types
version = importlib.metadata.version
importlib.metadata.version = lambda name: "1.14.0" if name == "trl" else version(name)
trl, trainer, utils = (types.ModuleType(name) for name in ("trl", "trl.trainer", "trl.trainer.utils"))
trl.trainer, trainer.utils = trainer, utils
sys.modules |= {"trl": trl, "trl.trainer": trainer, "trl.trainer.utils": utils}
import fusedpo.integrations.trl
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "fusedpo was tested with trl>=1.15,<1.17, found 1.14.0" in run.stderr
    assert "ImportError: fusedpo.integrations.trl needs trl>=1.15, found 1.14.0" in run.stderr
