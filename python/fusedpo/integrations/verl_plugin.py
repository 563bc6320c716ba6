"""The entry point ``verl.plugins``: registers fusedpo with verl in every process, driver and Ray workers.

verl loads it while ``import verl`` is under way, and keeps quiet about a plugin that fails. So nothing of verl is
imported here and nothing is computed: :func:`fusedpo.integrations.verl.register` runs once verl itself has loaded its
registry, and a failure is a warning.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

REGISTRY = "verl.trainer.ppo.core_algos"


def register() -> None:
    try:
        from . import verl

        verl.register()
    except Exception as error:
        warnings.warn(f"verl has no fusedpo_* losses and advantages: {type(error).__name__}: {error}", stacklevel=2)


class AfterImport(MetaPathFinder):
    """Finds the registry by the other finders, and lets :func:`register` follow its execution.

    It stays until the registry has been executed: a spec may be asked for without any import, and an import may fail.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = ThenRegister(spec.loader, self)
        return spec


class ThenRegister(Loader):
    """A module's own loader but for the call of :func:`register`."""

    def __init__(self, loader: Loader, hook: AfterImport) -> None:
        self._loader, self._hook = loader, hook

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._hook in sys.meta_path:
            sys.meta_path.remove(self._hook)
        register()


if REGISTRY in sys.modules:
    register()
else:
    sys.meta_path.insert(0, AfterImport())
