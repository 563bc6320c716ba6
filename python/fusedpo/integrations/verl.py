"""verl: policy losses and advantage estimators by name, and its log-prob functions.

The entry point ``verl.plugins`` (:mod:`fusedpo.integrations.verl_plugin`) calls :func:`register` in every process that
loads verl's registry. Then ``actor_rollout_ref.actor.policy_loss.loss_mode=fusedpo_nfpo`` and
``algorithm.adv_estimator=fusedpo_maxpo`` choose by name.

*Losses* are called ``fusedpo_<preset>``, for every preset of :mod:`fusedpo.objectives`; ``fusedpo_clip_cov`` and
``fusedpo_kl_cov``; and ``fusedpo_vanilla``, ``fusedpo_gpg``, ``fusedpo_geo_mean`` after verl's names for ``ppo``,
``reinforce`` and ``gmpo``. Thresholds are verl's own settings (``clip_ratio_low``, ``clip_ratio_high``,
``clip_ratio_c``, ``tau_pos``, ``tau_neg``, ``policy_loss.dro_beta``), the aggregation is ``loss_agg_mode``, normalised
by ``global_batch_info`` as in verl's ``agg_loss``: what both have agrees in value and gradient. verl adds the entropy
and KL terms.

*Advantages* are called ``fusedpo_<estimator>``, for the estimators in ``_common.OUTCOME_ESTIMATORS`` and
``_common.TOKEN_ESTIMATORS``.

*Options* that verl has no setting for, such as ``n`` of NFPO and ``k`` of MaxPO, come from the configuration
(``+algorithm.fusedpo.k=4``; for losses see :func:`policy_loss_config`), else from ``register(maxpo={"k": 4})``, else
from the environment: ``FUSEDPO_VERL="nfpo.n=8,maxpo.k=4"``.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import advantages
from ..aggregation import aggregate
from ..covariance import clip_cov_weights, kl_cov_penalty
from ..logprobs import linear_token_logprobs, token_logprobs
from ..losses import policy_loss
from ..objectives import PRESETS, Aggregation, NoTrustRegion, Objective, TokenRatio, ppo
from . import _common
from ._versions import check_version

__all__ = [
    "FusedLinearForPPO",
    "entropy_from_logits",
    "entropy_from_logits_with_chunking",
    "logprobs_from_logits",
    "patch_verl",
    "policy_loss_config",
    "register",
    "unpatch_verl",
    "vocab_parallel_entropy",
    "vocab_parallel_entropy_with_chunking",
    "vocab_parallel_log_probs_from_logits",
]

TESTED = ("0.9", "0.10")
PREFIX = "fusedpo_"
ESTIMATORS = (*_common.OUTCOME_ESTIMATORS, *_common.TOKEN_ESTIMATORS)
# verl's name of a loss where it is not that of the preset.
ALIASES = {"vanilla": "ppo", "gpg": "reinforce", "geo_mean": "gmpo"}

_registered: dict[str, dict[str, Any]] = {}  # options, by the name of a loss or an estimator


# -------------------------------------------------------------------------------------------------------- registration


def register(**options: Mapping[str, Any]) -> None:
    """Enters the losses and estimators into verl's registries, with options by name: ``register(nfpo={"n": 8})``.

    It may be called again to change options, the last ones count. Raises ``ValueError`` for a loss, an estimator or an
    option that does not exist; warns once if this version of verl is not a tested one.
    """
    check_version("verl", *TESTED)
    core_algos = importlib.import_module("verl.trainer.ppo.core_algos")
    given = _parse(os.environ.get("FUSEDPO_VERL", ""))
    for name, values in options.items():
        given[name] = {**given.get(name, {}), **values}
    for name, values in given.items():
        _check(name, values)
    for name, values in given.items():
        _registered.setdefault(name, {}).update(values)
    for name in (*PRESETS, *ALIASES, *_LOSSES):
        core_algos.register_policy_loss(PREFIX + name)(_policy_loss(ALIASES.get(name, name)))
    for name in ESTIMATORS:
        core_algos.register_adv_est(PREFIX + name)(_advantage(name))


def policy_loss_config(fusedpo: Mapping[str, Any] | None = None, **fields: Any) -> Any:
    """verl's ``PolicyLossConfig``, with options of a loss beside verl's own fields.

    verl instantiates what ``_target_`` names; its own dataclass has no room for options, this function has::

        actor_rollout_ref.actor.policy_loss._target_=fusedpo.integrations.verl.policy_loss_config
        actor_rollout_ref.actor.policy_loss.loss_mode=fusedpo_nfpo
        +actor_rollout_ref.actor.policy_loss.fusedpo.n=8
    """
    config = importlib.import_module("verl.workers.config").PolicyLossConfig(**fields)
    config.fusedpo = dict(fusedpo or {})
    return config


def _parse(text: str) -> dict[str, dict[str, Any]]:
    """``"nfpo.n=8,maxpo.k=4"`` as ``{"nfpo": {"n": 8}, "maxpo": {"k": 4}}``; what is no literal is a string."""
    parsed: dict[str, dict[str, Any]] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        key, equals, value = item.partition("=")
        name, dot, option = key.strip().partition(".")
        if not (equals and dot):
            raise ValueError(f"FUSEDPO_VERL must look like 'nfpo.n=8,maxpo.k=4', got {item!r}")
        try:
            literal = ast.literal_eval(value.strip())
        except (SyntaxError, ValueError):
            literal = value.strip()
        parsed.setdefault(name, {})[option] = literal
    return parsed


def _check(name: str, options: Mapping[str, Any]) -> None:
    functions = [PRESETS[name]] if name in PRESETS else []
    functions += [getattr(advantages, name)] if name in ESTIMATORS else []
    if not functions and name not in _LOSSES:
        losses = sorted((*PRESETS, *_LOSSES))
        raise ValueError(f"{name!r} is neither a loss, {losses}, nor an estimator, {sorted(ESTIMATORS)}")
    _common.check_options(name, options, *functions, extra=_LOSSES[name][1] if name in _LOSSES else ())


def _options(name: str, section: Any, function: Callable[..., Any] | None = None) -> dict[str, Any]:
    """The options of ``name``: those registered that ``function`` has, under those in ``section`` of verl's config."""
    registered = _registered.get(name, {})
    if function is not None:
        registered = _common.for_function(registered, function)
    configured = section.get("fusedpo") if section is not None else None
    return {**registered, **(configured or {})}


# --------------------------------------------------------------------------------------------------------------- losses


class _Reduction(NamedTuple):
    """verl's ``agg_loss`` in our terms."""

    aggregation: Aggregation
    length_norm: float | None
    denominator: float | Tensor | None
    loss_scale: float

    def aggregate(self, loss: Tensor, mask: Tensor) -> Tensor:
        total = aggregate(loss, self.aggregation, mask=mask, length_norm=self.length_norm, denominator=self.denominator)
        return total * self.loss_scale


def _reduction(
    loss_agg_mode: Aggregation,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> _Reduction:
    counts = {"token-mean": ("batch_num_tokens", batch_num_tokens), "token-sum": ("", None)}
    name, count = counts.get(loss_agg_mode, ("global_batch_size", global_batch_size))
    if name and count is None and dp_size > 1:
        raise ValueError(f"global_batch_info must have {name} when dp_size > 1, got dp_size={dp_size}")
    length_norm = loss_scale_factor if loss_agg_mode == "seq-mean-token-sum-norm" else None
    return _Reduction(loss_agg_mode, length_norm, count, float(dp_size))


class _Batch(NamedTuple):
    """What verl hands to a loss."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    is_weights: Tensor | None
    reduction: _Reduction

    def loss(self, objective: Objective) -> tuple[Tensor, dict[str, Tensor]]:
        out = policy_loss(
            self.logprobs,
            self.old_logprobs,
            self.advantages,
            objective=objective,
            mask=self.mask,
            is_weights=self.is_weights,
            denominator=self.reduction.denominator,
            loss_scale=self.reduction.loss_scale,
        )
        return out.loss, out.metrics


@functools.cache  # verl refuses another function under a name that it knows
def _policy_loss(name: str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: Aggregation = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if config is None:
            raise ValueError(f"config is needed by {PREFIX}{name}, got None")
        if name in ("sapo", "gmpo"):  # whatever the mode, as in verl
            loss_agg_mode = "seq-mean-token-mean"
        reduction = _reduction(loss_agg_mode, **config.global_batch_info)
        batch = _Batch(log_prob, old_log_prob, advantages, response_mask, rollout_is_weights, reduction)
        function = _LOSSES[name][0] if name in _LOSSES else functools.partial(_preset, name)
        value, metrics = function(batch, config)
        return value, _floats(metrics)

    loss.__name__ = loss.__qualname__ = PREFIX + name
    return loss


def _preset(name: str, batch: _Batch, config: Any) -> tuple[Tensor, dict[str, Tensor]]:
    if name == "gmpo" and batch.is_weights is not None:
        batch = batch._replace(is_weights=_geometric_mean(batch.is_weights, batch.mask))
    section = config.get("policy_loss")
    objective = _common.objective(
        name,
        _options(name, section, PRESETS[name]),
        thresholds=_thresholds(config),
        aggregation=batch.reduction.aggregation,
        length_norm=batch.reduction.length_norm,
    )
    return batch.loss(objective)


def _clip_cov(batch: _Batch, config: Any) -> tuple[Tensor, dict[str, Tensor]]:
    low, high = _clip_range(config)
    section = config.policy_loss
    options = {
        "fraction": section.clip_cov_ratio,
        "low": section.clip_cov_lb,
        "high": section.clip_cov_ub,
        **_options("clip_cov", section),
    }
    weights = clip_cov_weights(
        batch.logprobs, batch.old_logprobs, batch.advantages, mask=batch.mask, clip_low=low, clip_high=high, **options
    )
    if batch.is_weights is not None:
        weights = weights * batch.is_weights
    objective = _common.objective(
        ppo(low, high), aggregation=batch.reduction.aggregation, length_norm=batch.reduction.length_norm
    )
    return batch._replace(is_weights=weights).loss(objective)


def _kl_cov(batch: _Batch, config: Any) -> tuple[Tensor, dict[str, Tensor]]:
    section = config.policy_loss
    options = {"fraction": section.kl_cov_ratio, "coef": section.ppo_kl_coef, **_options("kl_cov", section)}
    penalty = kl_cov_penalty(batch.logprobs, batch.old_logprobs, batch.advantages, mask=batch.mask, **options)
    if batch.is_weights is not None:
        penalty = penalty * batch.is_weights
    objective = _common.objective(
        Objective(TokenRatio(), NoTrustRegion()),
        aggregation=batch.reduction.aggregation,
        length_norm=batch.reduction.length_norm,
    )
    value, metrics = batch.loss(objective)
    return value + batch.reduction.aggregate(penalty, batch.mask), metrics


# Losses that are no preset: what computes them, and the names of their options.
_LOSSES: dict[str, tuple[Callable[[_Batch, Any], tuple[Tensor, dict[str, Tensor]]], tuple[str, ...]]] = {
    "clip_cov": (_clip_cov, ("fraction", "low", "high")),
    "kl_cov": (_kl_cov, ("fraction", "coef")),
}


def _clip_range(config: Any) -> tuple[float, float]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return config.clip_ratio if low is None else low, config.clip_ratio if high is None else high


def _thresholds(config: Any) -> dict[str, Any]:
    low, high = _clip_range(config)
    thresholds = {"clip_low": low, "clip_high": high, "low": low, "high": high}
    thresholds["dual"] = thresholds["cap"] = config.get("clip_ratio_c", 3.0)
    thresholds.update(tau_pos=config.get("tau_pos", 1.0), tau_neg=config.get("tau_neg", 1.05))
    section = config.get("policy_loss")
    beta = None if section is None else section.get("dro_beta")
    return thresholds if beta is None else {**thresholds, "beta": beta}


def _geometric_mean(weights: Tensor, mask: Tensor) -> Tensor:
    """``[B, 1]``: verl's weight of a sequence in its GMPO."""
    kept = mask != 0
    log_weights = (weights + 1e-10).log().masked_fill(~kept, 0)
    return (log_weights.sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)).exp()


def _floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """verl's names; one wait for the device, where verl itself waits for each metric."""
    names = {
        "actor/pg_clipfrac": "clip_frac",
        "actor/pg_clipfrac_low": "clip_frac_low",
        "actor/pg_clipfrac_high": "clip_frac_high",
        "actor/ppo_kl": "approx_kl",
        "actor/ratio_max": "ratio_max",
        "actor/trace_max": "trace_max",
        "actor/ess": "ess",
    }
    values = torch.stack([metrics[ours] for ours in names.values()]).tolist()
    return dict(zip(names, values, strict=True))


# ----------------------------------------------------------------------------------------------------------- advantages


@functools.cache
def _advantage(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def advantage(
        token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, config: Any = None, **unused: Any
    ) -> tuple[Tensor, Tensor]:
        settings = config if config is not None else {}
        return _common.estimate(
            name,
            token_level_rewards,
            response_mask,
            index,
            _options(name, config, getattr(advantages, name)),
            std=settings.get("norm_adv_by_std_in_grpo", True),
            gamma=settings.get("gamma", 1.0),
        )

    advantage.__name__ = advantage.__qualname__ = PREFIX + name
    return advantage


# ------------------------------------------------------------------------------------------------------------ log-probs


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """``verl.utils.torch_functional.logprobs_from_logits``: ``[...]`` float32 from ``[..., V]`` and ``[...]``.

    As in verl with flash-attn, the gradient overwrites ``logits`` unless ``inplace_backward=False``; a use of them that
    was saved before raises then.
    """
    return token_logprobs(logits, labels, inplace_backward=inplace_backward)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """``verl.utils.torch_functional.entropy_from_logits``: ``[...]`` float32, in nats, from ``[..., V]``."""
    return _common.entropy(logits)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """:func:`entropy_from_logits`, which allocates nothing of the size of the logits: ``chunk_size`` is not needed."""
    return entropy_from_logits(logits)


def vocab_parallel_log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """That of ``verl.utils.megatron.tensor_parallel``: ``[...]`` from this rank's part of the logits, ``[..., V_r]``.

    The group is Megatron's tensor-parallel one, whose ranks hold equal parts. Columns that Megatron adds to make them
    equal count as vocabulary, as they do in verl.
    """
    return token_logprobs(logits, labels, tp_group=_common.tensor_parallel_group())


def vocab_parallel_entropy(vocab_parallel_logits: Tensor) -> Tensor:
    """The entropy of :func:`vocab_parallel_log_probs_from_logits`, ``[...]`` in nats; the logits are not changed."""
    return _common.entropy(vocab_parallel_logits, _common.tensor_parallel_group())


def vocab_parallel_entropy_with_chunking(vocab_parallel_logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """:func:`vocab_parallel_entropy`, which allocates nothing of the size of the logits."""
    return vocab_parallel_entropy(vocab_parallel_logits)


class FusedLinearForPPO(torch.nn.Module):
    """``verl.utils.experimental.torch_functional.FusedLinearForPPO``, over :func:`fusedpo.linear_token_logprobs`.

    ``impl_backend`` is accepted and not used. Both results are float32, where verl's entropy has the dtype of
    ``hidden_states``.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """``[..., H]``, ``[V, H]`` and ``[...]`` to log-probs and entropy ``[...]``."""
        logprobs, entropy = linear_token_logprobs(
            hidden_states,
            vocab_weights,
            input_ids.to(torch.int64),
            temperature=temperature,
            return_entropy=True,
            chunk_tokens=self.chunk_size,
        )
        return logprobs, entropy


_MEGATRON = "verl.utils.megatron.tensor_parallel"  # where Megatron is used, its engine has loaded it
_REPLACEMENTS = {
    "verl.utils.torch_functional": (logprobs_from_logits, entropy_from_logits, entropy_from_logits_with_chunking),
    "verl.utils.experimental.torch_functional": (FusedLinearForPPO,),
    _MEGATRON: (vocab_parallel_log_probs_from_logits, vocab_parallel_entropy, vocab_parallel_entropy_with_chunking),
}
_originals: dict[Any, Any] = {}  # of verl, by what replaces them


def patch_verl() -> None:
    """Puts the functions above in the place of verl's, in every loaded module of verl.

    Call it in each worker process before verl builds its engines, which keep the functions they find: in a module of
    yours that ``model.external_lib`` names, say. Calling it again patches modules that were loaded since.
    """
    check_version("verl", *TESTED)
    for module, own in _REPLACEMENTS.items():
        if module != _MEGATRON or module in sys.modules:
            _common.put_in_place("verl", importlib.import_module(module), own, _originals)


def unpatch_verl() -> None:
    """Undoes :func:`patch_verl`, in modules that were loaded in between too."""
    _common.put_back("verl", _originals)
