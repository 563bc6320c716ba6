"""Estimators by name, for configuration files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from .samples import Array

Estimator = TypeVar("Estimator", bound=Callable[..., Any])

_ESTIMATORS: dict[str, Callable[..., Any]] = {}


def register(name: str) -> Callable[[Estimator], Estimator]:
    """Decorator that makes an estimator available to :func:`compute` under ``name``; the function itself is returned.

    Raises ``TypeError`` if ``name`` is no string, ``ValueError`` if another function has that name.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str (use @register('name')), got {type(name).__name__}")

    def add(function: Estimator) -> Estimator:
        if _ESTIMATORS.setdefault(name, function) is not function:
            raise ValueError(
                f"name {name!r} is taken by {_ESTIMATORS[name]!r}; register {function!r} under another one"
            )
        return function

    return add


def compute(name: str, rewards_or_values: Array, /, **kwargs: Any) -> Any:
    """Calls the estimator registered under ``name``: ``compute("maxpo", rewards, group_size=16, k=4)``.

    Returns what the estimator returns. Raises ``ValueError`` for an unknown name.
    """
    if name not in _ESTIMATORS:
        raise ValueError(f"name must be one of {', '.join(available())}; got {name!r}")
    return _ESTIMATORS[name](rewards_or_values, **kwargs)


def available() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(_ESTIMATORS))
