"""Imports trainers from PyPI that need Python 3.12, a GPU or a cluster, for their loss functions alone."""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
import types
import typing
from typing import Any

import pytest
import typing_extensions

# What has no build for a CPU, and is imported where the functions lie beside models or engines.
NOT_FOR_A_CPU = ("deepspeed", "flash_attn")


class _Anything(types.ModuleType):
    """A module that has every class that is imported from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


class _Stubs:
    """Finds those modules last, after every real one."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        found = name.split(".")[0] in NOT_FOR_A_CPU
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if found else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _Anything(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def trainer(name: str, bare: str = "") -> types.ModuleType:
    """The module of a trainer; where it is not installed the test is skipped, but fails in ``make test-trainers``.

    ``bare``: a package above it that is not executed, for it imports an engine.
    """
    before = dict(sys.modules)
    stubs, typed_dict = _Stubs(), typing.TypedDict
    sys.meta_path.append(stubs)  # type: ignore[arg-type]
    if sys.version_info < (3, 12):
        typing.TypedDict = typing_extensions.TypedDict  # SkyRL is for Python 3.12, and pydantic asks for this before
    try:
        if bare and bare not in sys.modules:
            parent = importlib.import_module(bare.rpartition(".")[0])
            package = types.ModuleType(bare)
            package.__path__ = [os.path.join(folder, bare.rpartition(".")[2]) for folder in parent.__path__]
            sys.modules[bare] = package
        return importlib.import_module(name)
    except ImportError as error:
        for imported in set(sys.modules) - set(before):
            del sys.modules[imported]
        if os.environ.get("FUSEDPO_TRAINERS"):
            raise
        pytest.skip(f"make test-trainers installs it: {error}")
    finally:
        sys.meta_path.remove(stubs)  # type: ignore[arg-type]
        typing.TypedDict = typed_dict
        for imported in [m for m in sys.modules if m.split(".")[0] in NOT_FOR_A_CPU]:
            if isinstance(sys.modules[imported], _Anything):
                del sys.modules[imported]
