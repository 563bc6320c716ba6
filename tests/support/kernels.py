"""The estimators of one backend, without the checks of ``fusedpo.advantages``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from fusedpo.ops.advantages import _GROUP_CALLS, _TOKEN_CALLS, Groups, estimate_by_kernels, estimate_tokens_by_kernels
from fusedpo.reference import advantages as reference


class Kernels(SimpleNamespace):
    """The functions of the reference, with the same signatures, by the operators of a backend."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        for name in _GROUP_CALLS:
            setattr(self, name, _of_groups(backend, name))
        for name in _TOKEN_CALLS:
            setattr(self, name, _of_tokens(backend, name))


def _named(name: str) -> Callable[..., dict[str, Any]]:
    """All arguments of a function of the reference by name; whitening over processes is the reference's alone."""
    parameters = [p for p in inspect.signature(getattr(reference, name)).parameters.values() if p.name != "group"]
    names = [parameter.name for parameter in parameters]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return lambda *args, **given: {**defaults, **dict(zip(names, args, strict=False)), **given}


def _of_groups(backend: str, name: str) -> Callable[..., Any]:
    named = _named(name)

    def function(*args: Any, **given: Any) -> Any:
        arguments = named(*args, **given)
        groups = Groups(*(arguments.pop(field, None) for field in Groups._fields))
        return estimate_by_kernels(backend, name, groups, **arguments)

    return function


def _of_tokens(backend: str, name: str) -> Callable[..., Any]:
    named, (first, *_) = _named(name), inspect.signature(getattr(reference, name)).parameters

    def function(*args: Any, **given: Any) -> Any:
        arguments = named(*args, **given)
        return estimate_tokens_by_kernels(backend, name, arguments.pop(first), **arguments)

    return function
