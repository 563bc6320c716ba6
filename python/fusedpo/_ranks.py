"""What serves ``dp_group`` and ``cp``: the functions that are decorated declare them, and do not read them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

P = ParamSpec("P")
Result = TypeVar("Result")


def spread_over_ranks(estimator: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorator that serves ``dp_group``: the groups of an estimator are spread over data-parallel ranks."""

    @wraps(estimator)
    def estimate(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if kwargs.get("dp_group") is None:
            return estimator(*args, **kwargs)
        from .distributed.groups import over_ranks  # where torch is built without distributed, nobody gets here

        named: dict[str, Any] = dict(kwargs)
        return over_ranks(estimator, named.pop("dp_group"), *args, **named)

    return estimate


def split_sequences(*per_token: str) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Decorator that serves ``cp``: sequences are split over ranks, and with them the arguments ``per_token``."""

    def decorate(function: Callable[P, Result]) -> Callable[P, Result]:
        @wraps(function)
        def of_ranks(*args: P.args, **kwargs: P.kwargs) -> Result:
            if kwargs.get("cp") is None:
                return function(*args, **kwargs)
            from .distributed.context import on_whole_sequences

            named = signature(function).bind(*args, **kwargs).arguments
            cp, cu_seqlens = named.pop("cp"), named.pop("cu_seqlens", None)
            local = {name: named.pop(name, None) for name in per_token}
            return on_whole_sequences(function, cp, cu_seqlens, local, **named)

        return of_ranks

    return decorate
