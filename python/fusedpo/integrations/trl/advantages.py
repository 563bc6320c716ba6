"""Advantages of fusedpo from the rewards that TRL computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from trl.trainer.grpo_config import GRPOConfig

from ... import advantages
from .._common import OUTCOME_ESTIMATORS, check_options
from .objective import refuse

Estimator = Callable[..., Tensor]
EstimatorLike = str | Estimator | tuple[str | Estimator, Mapping[str, Any]]


class GroupAdvantages:
    """An estimator of advantages within groups of equal size, with its options."""

    def __init__(self, estimator: EstimatorLike, args: GRPOConfig) -> None:
        estimator, options = estimator if isinstance(estimator, tuple) else (estimator, {})
        if isinstance(estimator, str):
            if estimator not in OUTCOME_ESTIMATORS:
                known = f"known are {', '.join(OUTCOME_ESTIMATORS)}, and any function of rewards and group_size"
                raise refuse(f"advantage_estimator={estimator!r}", known)
            check_options(estimator, options, getattr(advantages, estimator))
            estimator = getattr(advantages, estimator)
        if args.scale_rewards == "batch":
            raise refuse("scale_rewards='batch' with advantage_estimator", "the estimator scales, or does not")
        if args.multi_objective_aggregation != "sum_then_normalize":
            option = f"multi_objective_aggregation={args.multi_objective_aggregation!r}"
            raise refuse(f"{option} with advantage_estimator", "the estimator sees the weighted sum of the rewards")
        assert callable(estimator)
        self._estimator = estimator
        self._options = dict(options)
        self._parameters = inspect.signature(estimator).parameters

    def __call__(self, rewards: Tensor, scorable: Tensor, lengths: Tensor, group_size: int) -> Tensor:
        """``[G]``: rewards, which of them count (bool) and lengths of all processes, to float32 advantages.

        Where too few count in a group, and where groups are smaller in evaluation than the estimator needs, they are 0.
        """
        given = {"group_size": group_size, "lengths": lengths, "mask": scorable, "small_groups": "zero"}
        own = {name: value for name, value in given.items() if name in self._parameters and name not in self._options}
        if self._options.get("scope") == "batch":
            del own["group_size"]
        result = self._estimator(rewards, **own, **self._options)
        return result.to(torch.float32).masked_fill(~scorable, 0)
