"""Estimators of groups that are spread over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

from torch import Tensor

P = ParamSpec("P")


def spread_over_ranks(estimator: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorator that serves ``dp_group``, which the estimator declares and does not read."""

    @wraps(estimator)
    def estimate(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if kwargs.get("dp_group") is None:
            return estimator(*args, **kwargs)
        from ..distributed.groups import over_ranks  # where torch is built without distributed, nobody gets here

        named: dict[str, Any] = dict(kwargs)
        return over_ranks(estimator, named.pop("dp_group"), *args, **named)

    return estimate
