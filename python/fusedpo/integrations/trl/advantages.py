"""Advantages of fusedpo from the rewards that TRL computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ... import advantages
from .._common import OUTCOME_ESTIMATORS, check_options
from .objective import refuse

Estimator = Callable[..., Tensor]
EstimatorLike = str | Estimator | tuple[str | Estimator, Mapping[str, Any]]


class GroupAdvantages:
    """An estimator of advantages within groups of equal size, with its options."""

    def __init__(
        self, estimator: EstimatorLike, args: Any, group_size: int | None, trainer: str = "FusedGRPOTrainer"
    ) -> None:
        """``args``: of the trainer; what the estimator cannot do in groups of ``group_size`` samples raises."""
        estimator, options = estimator if isinstance(estimator, tuple) else (estimator, {})
        name = estimator
        if isinstance(estimator, str):
            if estimator not in OUTCOME_ESTIMATORS:
                known = f"known are {', '.join(OUTCOME_ESTIMATORS)}, and any function of rewards and group_size"
                raise refuse(f"advantage_estimator={estimator!r}", known, trainer)
            check_options(estimator, options, getattr(advantages, estimator))
            estimator = getattr(advantages, estimator)
        self._check_setup(args, trainer)
        if not callable(estimator):
            raise TypeError(f"advantage_estimator must be a name or a function of rewards, got {estimator!r}")
        self._estimator = estimator
        self._options = dict(options)
        self._parameters = inspect.signature(estimator).parameters
        assert group_size is not None
        self._check_call(group_size, known=isinstance(name, str))

    @staticmethod
    def _check_setup(args: Any, trainer: str) -> None:
        if getattr(args, "scale_rewards", None) == "batch":
            raise refuse("scale_rewards='batch' with advantage_estimator", "the estimator scales, or does not", trainer)
        if getattr(args, "normalize_advantages", False):
            option = "normalize_advantages=True with advantage_estimator"
            raise refuse(option, "the estimator scales, or does not", trainer)
        aggregation = getattr(args, "multi_objective_aggregation", "sum_then_normalize")
        if aggregation != "sum_then_normalize":
            option = f"multi_objective_aggregation={aggregation!r} with advantage_estimator"
            raise refuse(option, "the estimator sees the weighted sum of the rewards", trainer)

    def _check_call(self, group_size: int, known: bool) -> None:
        """When the trainer is built, not after the first rollouts: a group of zeros, or the signature of a function."""
        given = {"group_size": group_size, "lengths": None, "mask": None, **self._options}
        missing = [
            name
            for name, p in list(self._parameters.items())[1:]
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in given
        ]
        if missing:
            raise ValueError(f"advantage_estimator needs {missing[0]!r}, which it is not given: add it to its options")
        if known:
            strict = {"small_groups": "error"} if "small_groups" in self._parameters else {}
            count = torch.ones(group_size, dtype=torch.int64)
            self._call(torch.zeros(group_size), {"group_size": group_size, "lengths": count, **strict})

    def __call__(self, rewards: Tensor, scorable: Tensor, lengths: Tensor, group_size: int) -> Tensor:
        """``[G]``: rewards, which of them count (bool) and lengths of all processes, to float32 advantages.

        Where too few count in a group, and where groups are smaller in evaluation than the estimator needs, they are 0.
        """
        given = {"group_size": group_size, "lengths": lengths, "mask": scorable, "small_groups": "zero"}
        return self._call(rewards, given).to(torch.float32).masked_fill(~scorable, 0)

    def _call(self, rewards: Tensor, given: Mapping[str, Any]) -> Tensor:
        own = {name: value for name, value in given.items() if name in self._parameters and name not in self._options}
        if self._options.get("scope") == "batch":
            own.pop("group_size", None)
        return self._estimator(rewards, **own, **self._options)


class Estimated:
    """A part of a trainer of TRL: advantages of an estimator, if there is one, in the place of TRL's."""

    _advantages: GroupAdvantages | None = None

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards_per_func: Tensor = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        return self._rewards_per_func

    def _generate_and_score_completions(self: Any, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if self._advantages is None:
            return output
        rewards = self._rewards_per_func  # of all processes, [samples, functions], NaN where a function gave None
        scorable = ~rewards.isnan().all(1)
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        if getattr(self, "reward_clip_range", None):
            weighted = weighted.clamp(*self.reward_clip_range)
        lengths = self.accelerator.gather((output["completion_mask"] * output.get("tool_mask", 1)).sum(1))
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        assert group_size is not None
        advantages = self._advantages(weighted, scorable, lengths, group_size)

        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages.tolist())
        here = len(output["advantages"])
        start = self.accelerator.process_index * here
        output["advantages"] = advantages[start : start + here]
        return output
