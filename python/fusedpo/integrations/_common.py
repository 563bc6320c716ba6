"""What the adapters share: objectives and advantages by name, patches of a package, refusals."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _names, advantages
from ..advantages.samples import as_labels
from ..logprobs import token_logprobs
from ..objectives import KL, OLD_NAMES, PRESETS, Aggregation, Objective, PPOClip, with_new_names

# The thresholds of a trainer that set options of a preset; ``low`` and ``high`` are bounds that it has for a loss other
# than PPO's clip. Options that are not here (CTPO's bounds of a log-ratio, VESPO's exponents) mean something that no
# trainer has a setting for: they keep their defaults unless given.
THRESHOLDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("ppo", "dapo"), ("clip_low", "clip_high", "dual")),
    **dict.fromkeys(("grpo", "dr_grpo", "two_sided_grpo", "gspo", "luspo", "nfpo"), ("clip_low", "clip_high")),
    **dict.fromkeys(("cispo", "gmpo"), ("low", "high")),
    **dict.fromkeys(("dppo_tv", "dppo_kl"), ("low", "high", "cap")),
    "sapo": ("tau_pos", "tau_neg"),
    "dro": ("beta",),
}

# Estimators of one reward per response, and of one per token. The others need values, steps or statistics that a
# trainer hands to its own estimators only.
OUTCOME_ESTIMATORS = (
    *("grpo", "dr_grpo", "rloo", "opo", "gpg", "raft", "reinforce_rej", "reinforce_plus_plus_baseline"),
    *("maxpo", "pkpo", "passk", "grpo_passk", "order_statistic"),
)
TOKEN_ESTIMATORS = ("reward_to_go", "reinforce_plus_plus")


# ----------------------------------------------------------------------------------------------------------- objectives


def objective(
    preset: str | Objective,
    options: Mapping[str, Any] | None = None,
    *,
    thresholds: Mapping[str, Any] | None = None,
    aggregation: Aggregation | None = None,
    length_norm: float | None = None,
) -> Objective:
    """The objective of a preset's name.

    ``options`` are the preset's arguments, or ``kl_coef`` with ``kl_kind`` (k3) for ``KL(kl_kind, kl_coef)``;
    ``thresholds``, by the names in :data:`THRESHOLDS`, are what the trainer's own settings say where no option does;
    ``aggregation``, where given, replaces that of the preset. Raises ``ValueError`` for names that do not exist.
    """
    options = dict(options or {})
    kl_coef, kl_kind = options.pop("kl_coef", 0.0), options.pop("kl_kind", "k3")
    if isinstance(preset, Objective):
        if options:
            raise ValueError(f"options {sorted(options)} are those of a preset, but objective is an Objective")
        built = preset
    else:
        if preset not in PRESETS:
            raise ValueError(f"objective must be an Objective or one of {sorted(PRESETS)}, got {preset!r}")
        check_options(preset, options, PRESETS[preset])
        new = OLD_NAMES.get(preset, {})
        own = {new.get(name, name): x for name, x in (thresholds or {}).items() if name in THRESHOLDS.get(preset, ())}
        built = PRESETS[preset](**{**own, **with_new_names(preset, options)})
    if kl_coef:
        built = dataclasses.replace(built, kl=KL(kl_kind, kl_coef))
    if aggregation is not None:
        built = dataclasses.replace(built, aggregation=aggregation, length_norm=length_norm)
    return built


def with_dual_clip(trainer: str, built: Objective, **dual: float | None) -> Objective:
    """``built`` with the trainer's dual clip, ``dual_clip=3.0`` by its name there; refused where nothing is clipped."""
    ((name, value),) = dual.items()
    if value is None:
        return built
    if not isinstance(built.trust_region, PPOClip):
        raise NotImplementedError(
            f"fusedpo.integrations.{trainer} does not support {name}={value!r} with {type(built.trust_region).__name__}"
        )
    return dataclasses.replace(built, trust_region=dataclasses.replace(built.trust_region, dual=value))


def check_options(name: str, options: Iterable[str], *functions: Callable[..., Any], extra: Iterable[str] = ()) -> None:
    """Every option is a parameter of one of ``functions``, which go by ``name``, or among ``extra``."""
    known = {parameter for function in functions for parameter in inspect.signature(function).parameters} | set(extra)
    known_before = {old for function in functions for old in OLD_NAMES.get(function.__name__, ())}
    for option in options:
        if option not in known | known_before:
            raise ValueError(f"{name} has no option {option!r}; it has {sorted(known)}{_names.hint(option, known)}")


def for_function(options: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Those of ``options`` that ``function`` has: a loss and an estimator may share a name, such as grpo."""
    parameters = {*inspect.signature(function).parameters, *OLD_NAMES.get(function.__name__, ())}
    return {option: value for option, value in options.items() if option in parameters}


# ----------------------------------------------------------------------------------------------------------- advantages


def estimate(
    name: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    options: Mapping[str, Any],
    *,
    std: bool = True,
    gamma: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns ``[B, T]`` by the name of an estimator, in the layout of verl and SkyRL.

    ``token_level_rewards``, ``response_mask``: ``[B, T]``. ``index`` ``[B]``: which responses answer the same prompt,
    any labels. ``std`` and ``gamma`` are the trainer's settings, for the estimators that have such an option. Returns
    are the advantages of an outcome estimator, as in those trainers, and discounted sums of rewards otherwise.

    A reward at a masked token, such as the outcome of a rollout that ended in a tool's answer, counts for the last kept
    token before it. A response with a reward of nan could not be scored: it gets 0 and counts for nobody, and so does
    a group in which too few are left for the estimator.
    """
    function = getattr(advantages, name)
    parameters = inspect.signature(function).parameters
    check_options(name, options, function)
    outcomes = token_level_rewards.sum(1)
    scorable = ~outcomes.isnan()
    own: dict[str, Any] = {"std": std, "gamma": gamma, "mask": scorable, "small_groups": "zero"}
    if name in TOKEN_ESTIMATORS:
        own["mask"] = (response_mask != 0) & scorable[:, None]
        given = {**for_function(own, function), **options}
        rewards = advantages.rewards_on_kept(token_level_rewards, own["mask"])
        return function(rewards, **given), advantages.reward_to_go(rewards, mask=own["mask"], gamma=given["gamma"])
    if "group_ids" in parameters and options.get("scope") != "batch":
        own["group_ids"] = group_ids(index, token_level_rewards.device)
    own["lengths"] = (response_mask != 0).sum(1)
    given = {**for_function(own, function), **options}
    missing = [
        p.name for p in parameters.values() if p.default is p.empty and p.name not in given and p.name != "rewards"
    ]
    if missing:
        raise ValueError(f"{name} needs the option {missing[0]!r}")
    result = advantages.to_tokens(function(outcomes, **given), response_mask)
    return result, result


def group_ids(index: Any, device: torch.device) -> Tensor:
    """int64 ``[B]`` from labels of any kind: an array or a list of strings or numbers, or a tensor."""
    if index is None:
        raise ValueError("index (the prompt of each response) is needed by an estimator that compares within groups")
    labels = index.tolist() if isinstance(index, Tensor) else index
    return as_labels("index", labels, torch.empty(0, device=device))


# ------------------------------------------------------------------------------------------------------------ log-probs


def entropy(logits: Tensor, tp_group: Any = None) -> Tensor:
    """Entropy ``[...]`` in nats of ``softmax(logits)``, ``[..., V]``, where no token was chosen.

    With a ``tp_group``, the logits are this rank's equal part of the vocabulary.
    """
    any_token = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs(logits, any_token, return_entropy=True, tp_group=tp_group)[1]


def megatron() -> Any:
    """Megatron's module of process groups."""
    return importlib.import_module("megatron.core.parallel_state")


def tensor_parallel_group() -> Any:
    """Megatron's, whose ranks hold equal parts of the vocabulary."""
    return megatron().get_tensor_model_parallel_group()


class DistributedLogprob:
    """In the place of the autograd function of that name, of which NeMo-RL and SkyRL have a copy each.

    Every log-prob from logits that are split along the vocabulary passes through it: of padded and of packed sequences,
    whole or in parts. The gradient is that of this rank's columns; it has the dtype of the logits.
    """

    @staticmethod
    def apply(
        vocab_parallel_logits: Tensor,
        target: Tensor,
        vocab_start_index: int,
        vocab_end_index: int,
        group: Any,
        inference_only: bool = False,
    ) -> Tensor:
        """``[..., V_r]``, the columns from ``vocab_start_index`` on, and ids of the vocabulary ``[...]`` to ``[...]``.

        float32, or float64 from such logits; no gradient with ``inference_only``.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only):
            return token_logprobs(vocab_parallel_logits, target, tp_group=group, vocab_start=vocab_start_index)


class ChunkedDistributedLogprob:
    """:class:`DistributedLogprob`, which allocates nothing of the size of the logits: ``chunk_size`` is not needed."""

    @staticmethod
    def apply(
        vocab_parallel_logits: Tensor,
        target: Tensor,
        vocab_start_index: int,
        vocab_end_index: int,
        chunk_size: int,
        tp_group: Any,
        inference_only: bool = False,
    ) -> Tensor:
        given = (vocab_start_index, vocab_end_index, tp_group, inference_only)
        return DistributedLogprob.apply(vocab_parallel_logits, target, *given)


def kl_per_token(
    kind: str, logprobs: Tensor, ref_logprobs: Tensor, *, input_clamp: float | None = 20.0, clamp: float | None = None
) -> Tensor:
    """``KL(kind, 1)`` of each token, for trainers whose KL term no objective can express.

    ``input_clamp`` bounds the log-ratio, ``clamp`` the value; there is no gradient beyond them.
    """
    if kind not in ("k1", "k2", "k3"):
        raise ValueError(f"the kind of KL must be 'k1', 'k2' or 'k3', got {kind!r}")
    d = logprobs.float() - ref_logprobs.float()
    if input_clamp is not None:
        d = d.clamp(-input_clamp, input_clamp)
    value = {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(-d) + d}[kind]()
    return value if clamp is None else value.clamp(-clamp, clamp)


# -------------------------------------------------------------------------------------------------------------- patches


def swap(package: str, replacements: Mapping[Any, Any]) -> None:
    """Replaces objects wherever a loaded module of ``package`` holds them: ``from x import f`` copies the name."""
    by_id = {id(old): new for old, new in replacements.items()}
    for name, module in list(sys.modules.items()):
        if module is None or not (name == package or name.startswith(package + ".")):
            continue
        for attribute, value in list(vars(module).items()):
            if id(value) in by_id:
                setattr(module, attribute, by_id[id(value)])


def put_in_place(package: str, module: Any, own: Iterable[Any], originals: dict[Any, Any]) -> None:
    """Replaces what ``module`` has by the names of ``own``, in all loaded modules of ``package``.

    ``originals`` gets what was there before, by what replaces it, for :func:`put_back`.
    """
    for replacement in own:
        if hasattr(module, replacement.__name__):
            originals.setdefault(replacement, getattr(module, replacement.__name__))
    swap(package, {original: replacement for replacement, original in originals.items()})


def put_back(package: str, originals: dict[Any, Any]) -> None:
    """Undoes :func:`put_in_place`, in modules that were loaded in between too."""
    swap(package, originals)
    originals.clear()


# ------------------------------------------------------------------------------------------------------------- refusals


def refuse(trainer: str, **options: Any) -> None:
    """Raises ``NotImplementedError`` that names the first option that is set: neither None, False, 0 nor empty."""
    for name, value in options.items():
        if value is not None and value is not False and value != 0 and value != ():
            raise NotImplementedError(f"fusedpo.integrations.{trainer} does not support {name}={value!r}")
