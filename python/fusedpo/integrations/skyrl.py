"""SkyRL: policy losses and advantage estimators by name, and its log-prob function.

:func:`register`, before SkyRL's ``sync_registries()``, enters ``fusedpo_<preset>`` and ``fusedpo_<estimator>``; then
``trainer.algorithm.policy_loss_type=fusedpo_nfpo`` and ``trainer.algorithm.advantage_estimator=fusedpo_maxpo`` choose
by name.

``fusedpo_ppo`` is SkyRL's ``regular``, ``fusedpo_dual_clip`` its ``dual_clip``.

SkyRL divides advantages by what its ``loss_reduction`` averages over, and adds up the losses of tokens. So a loss here
is a sum, and DRO, which has a term that no advantage multiplies, is left out. SkyRL adds the KL and entropy terms.

SkyRL hands the log-probs of whole sequences to its losses, gathered over the ranks that share a vocabulary (Megatron's
tensor parallelism) or a sequence (Ulysses, Megatron's context parallelism): they need no group.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .. import advantages
from ..logprobs import token_logprobs
from ..losses import policy_loss
from ..objectives import PRESETS
from . import _common

__all__ = [
    "advantage_estimator",
    "logprobs_from_logits",
    "patch_logprobs",
    "policy_loss_fn",
    "register",
    "unpatch_logprobs",
]

PREFIX = "fusedpo_"
LOSSES = (*(name for name in PRESETS if name != "dro"), "dual_clip")
ESTIMATORS = (*_common.OUTCOME_ESTIMATORS, *_common.TOKEN_ESTIMATORS)


def register(**options: Mapping[str, Any]) -> None:
    """Enters the losses and estimators into SkyRL's registries, with options by name: ``register(nfpo={"n": 8})``.

    Raises ``ValueError`` for a loss, an estimator or an option that does not exist.
    """
    losses = {name: _preset(name) for name in LOSSES}
    estimators = {name: getattr(advantages, name) for name in ESTIMATORS}
    for name, given in options.items():
        functions = [functions[name] for functions in (losses, estimators) if name in functions]
        if not functions:
            raise ValueError(f"{name!r} is neither a loss, {sorted(losses)}, nor an estimator, {sorted(estimators)}")
        _common.check_options(name, given, *functions)
    ppo_utils = importlib.import_module("skyrl.backends.skyrl_train.utils.ppo_utils")
    for name, function in losses.items():
        given = _common.for_function(options.get(name, {}), function)
        ppo_utils.register_policy_loss(PREFIX + name)(policy_loss_fn(name, **given))
    for name, function in estimators.items():
        given = _common.for_function(options.get(name, {}), function)
        ppo_utils.register_advantage_estimator(PREFIX + name)(advantage_estimator(name, **given))


def policy_loss_fn(preset: str, **options: Any) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """A loss with SkyRL's signature: ``(log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs)``.

    ``preset``: a preset's name, or ``"dual_clip"``, PPO with the dual clip ``clip_ratio_c``. Thresholds are SkyRL's
    settings (``eps_clip_low``, ``eps_clip_high``, ``sapo``, ``cispo``, ``dppo``) unless ``options`` say otherwise.
    Refuses the options of ``config.off_policy_correction``, and CISPO's ratio to the rollout.
    """

    def loss(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        _refuse_correction(config.off_policy_correction, rollout_logprobs)
        if preset == "cispo":
            anchor = getattr(config.cispo, "cispo_anchor", "old")
            _common.refuse("skyrl", **{"cispo.cispo_anchor": None if anchor == "old" else anchor})
        thresholds = _thresholds(preset, config)
        objective = _common.objective(_preset(preset).__name__, options, thresholds=thresholds, aggregation="token-sum")
        out = policy_loss(log_probs, old_log_probs, advantages, objective=objective, mask=loss_mask)
        return out.loss, {"clip_ratio": out.metrics["clip_frac"].item()}

    loss.__name__ = loss.__qualname__ = PREFIX + preset
    return loss


def advantage_estimator(name: str, **options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """An estimator with SkyRL's signature, all by keyword; ``options`` such as ``k`` of MaxPO."""

    def estimator(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any,
        values: Tensor | None = None,
        grpo_norm_by_std: bool = True,
        gamma: float = 1.0,
        lambd: float = 1.0,
        config: Any = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor]:
        return _common.estimate(
            name, token_level_rewards, response_mask, index, options, std=grpo_norm_by_std, gamma=gamma
        )

    estimator.__name__ = estimator.__qualname__ = PREFIX + name
    return estimator


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """``torch_utils.logprobs_from_logits``: ``[B, T]`` float32 from ``[B, T, V]`` and ``[B, T]``.

    The gradient overwrites ``logits`` unless ``inplace_backward=False``. With sequence parallelism both are the part of
    this rank, which SkyRL gathers.
    """
    return token_logprobs(logits, labels, inplace_backward=inplace_backward)


class _VocabParallelEntropy:
    """In the place of the autograd function of that name, through which all entropy of a split vocabulary passes."""

    @staticmethod
    def apply(vocab_parallel_logits: Tensor) -> Tensor:
        """``[...]`` in nats from this rank's equal part of the logits, ``[..., V_r]``, which are not changed."""
        return _common.entropy(vocab_parallel_logits, _common.tensor_parallel_group())


_LOGPROBS = (_common.DistributedLogprob, _common.ChunkedDistributedLogprob, _VocabParallelEntropy)
_originals: dict[Any, Any] = {}  # of SkyRL, by what replaces them


def patch_logprobs() -> None:
    """Log-probs and entropy of Megatron's split vocabulary by this library, in every imported module of SkyRL.

    Of padded and packed sequences, for training and for the old log-probs. How sequences are split over ranks and
    gathered stays SkyRL's. So does its fused head: SkyRL adds up the gradient of the hidden states around it, and
    ``linear_token_logprobs`` would have added it up already. Call it in each worker; calling it again patches modules
    that were loaded since.
    """
    module = importlib.import_module("skyrl.backends.skyrl_train.distributed.megatron.model_utils")
    _common.put_in_place("skyrl", module, _LOGPROBS, _originals)


def unpatch_logprobs() -> None:
    """Undoes :func:`patch_logprobs`."""
    _common.put_back("skyrl", _originals)


def _refuse_correction(correction: Any, rollout_logprobs: Tensor | None) -> None:
    """SkyRL corrects where there are log-probs of the rollout and an option of the correction is set."""
    if correction is None or rollout_logprobs is None:
        return
    sides = [f"{kind}_is_threshold_{side}" for kind in ("outlier_token", "token_mask") for side in ("low", "high")]
    options = ("tis_ratio_type", "sequence_mask_metric", *sides)
    given = {f"off_policy_correction.{option}": getattr(correction, option, None) for option in options}
    _common.refuse("skyrl", **given)


def _preset(name: str) -> Callable[..., Any]:
    return PRESETS["ppo" if name == "dual_clip" else name]


def _thresholds(preset: str, config: Any) -> dict[str, Any]:
    thresholds = {"clip_low": config.eps_clip_low, "clip_high": config.eps_clip_high}
    if preset == "dual_clip":
        thresholds["dual"] = config.clip_ratio_c
    if preset == "sapo":
        thresholds.update(tau_pos=config.sapo.tau_pos, tau_neg=config.sapo.tau_neg)
    elif preset == "cispo":
        thresholds.update(low=config.cispo.cispo_eps_clip_low, high=config.cispo.cispo_eps_clip_high)
    elif preset in ("dppo_tv", "dppo_kl"):
        thresholds.update(low=config.dppo.delta_low, high=config.dppo.delta_high)
    return thresholds
