"""The entry point ``verl.plugins``: registers fusedpo with verl in every process, driver and Ray workers.

verl loads it while ``import verl`` is under way, and keeps quiet about a plugin that fails. So nothing of verl is
imported here and nothing is computed: :func:`fusedpo.integrations.verl.register` runs once verl itself has loaded its
registry, and a failure is a warning.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "verl.trainer.ppo.core_algos"


def register() -> None:
    try:
        from . import verl

        verl.register()
    except Exception as error:
        warnings.warn(f"verl has no fusedpo_* losses and advantages: {type(error).__name__}: {error}", stacklevel=2)


class AfterImport(MetaPathFinder):
    """Finds the registry by the other finders, once, and lets :func:`register` follow its execution."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def then_register(module: ModuleType) -> None:
            execute(module)
            register()

        spec.loader.exec_module = then_register  # type: ignore[method-assign]
        return spec


if REGISTRY in sys.modules:
    register()
else:
    sys.meta_path.insert(0, AfterImport())
