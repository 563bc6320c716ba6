"""What a ``GRPOConfig`` asks of the loss, as an :class:`fusedpo.Objective`; what it cannot be, refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trl.trainer.grpo_config import GRPOConfig

from ... import objectives
from ...objectives import CISPO, KL, SAPO, VESPO, Aggregation, Objective, PPOClip, SequenceRatio, TokenRatio, Trace
from .._common import objective as build_objective

ObjectiveLike = Objective | str | tuple[str, Mapping[str, Any]]

AGGREGATIONS: dict[str, Aggregation] = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "luspo": "seq-mean-token-sum",
    "dr_grpo": "seq-mean-token-sum-norm",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "vespo": "token-mean",
}

# An objective that the user gives takes the place of these options.
REPLACED = (
    *("loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta"),
    *("sapo_temperature_pos", "sapo_temperature_neg"),
    *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
)


def refuse(option: str, reason: str, trainer: str = "FusedGRPOTrainer") -> NotImplementedError:
    return NotImplementedError(f"{trainer} does not support {option}: {reason}")


def refuse_split_sequences(parallelism_config: Any, trainer: str = "FusedGRPOTrainer") -> None:
    """Of TRL's trainers, SFT alone has what splits a sequence over ranks."""
    for option in ("cp_size", "sp_size"):
        size = getattr(parallelism_config, option, 1)
        if size > 1:
            reason = "TRL splits the sequences of SFT alone; in a loop of your own, fusedpo.policy_loss takes cp="
            raise refuse(f"{option}={size}", reason, trainer)


def from_config(args: GRPOConfig) -> Objective:
    """The objective of TRL's loss types; raises ``NotImplementedError`` for what has no part in an objective."""
    if args.loss_type not in AGGREGATIONS:
        raise refuse(f"loss_type={args.loss_type!r}", f"known are {', '.join(AGGREGATIONS)}")
    _check_parts(args)
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    per_sequence = args.importance_sampling_level == "sequence"
    ratio: objectives.Ratio = SequenceRatio() if per_sequence else TokenRatio()
    region: objectives.TrustRegion
    if args.loss_type == "cispo":
        if high < 1:
            raise refuse(f"epsilon_high={high} with loss_type='cispo'", "the bound of the weight is below 1")
        region = CISPO(high=high - 1)  # TRL gives the bound itself
    elif args.loss_type == "sapo":
        region = SAPO(args.sapo_temperature_pos, args.sapo_temperature_neg)
    elif args.loss_type == "vespo":
        ratio = Trace("all", "all")
        region = VESPO(args.vespo_k_pos, args.vespo_lambda_pos, args.vespo_k_neg, args.vespo_lambda_neg)
    else:
        if args.delta is not None and not args.delta > 1 + high:
            raise refuse(f"delta={args.delta}", f"it is not above the upper clip, {1 + high}")
        region = PPOClip(args.epsilon, high, args.delta)
    aggregation = AGGREGATIONS[args.loss_type]
    return Objective(
        ratio,
        region,
        _kl(args),
        entropy_coef=args.entropy_coef,
        aggregation=aggregation,
        length_norm=args.max_completion_length if aggregation == "seq-mean-token-sum-norm" else None,
    )


def from_user(objective: ObjectiveLike, args: GRPOConfig) -> Objective:
    """``objective`` with the parts that ``args`` adds to it; raises ``ValueError`` where the two disagree."""
    preset, options = objective if isinstance(objective, tuple) else (objective, {})
    built = build_objective(preset, options)
    for field in dataclasses.fields(args):
        if field.name in REPLACED and getattr(args, field.name) != field.default:
            raise ValueError(f"objective takes the place of {field.name}: leave {field.name} at its default")
    if args.entropy_coef != 0:
        raise refuse(f"entropy_coef={args.entropy_coef} with objective", "the bonus is objective.entropy_coef")
    _check_parts(args)
    if built.kl is None and args.beta != 0:
        built = dataclasses.replace(built, kl=_kl(args))
    elif built.kl is not None and built.kl.coef != args.beta:
        raise ValueError(
            f"beta must be objective.kl.coef = {built.kl.coef}, or there is no reference model; got {args.beta}"
        )
    if built.aggregation == "seq-mean-token-sum-norm" and built.length_norm is None:
        built = dataclasses.replace(built, length_norm=args.max_completion_length)
    return built


def _kl(args: GRPOConfig) -> KL | None:
    return KL("k3", args.beta, weighted=args.use_bias_correction_kl) if args.beta != 0 else None


def _check_parts(args: GRPOConfig) -> None:
    """Options of which an objective has no part."""
    use_logprobs = "fuse='logprobs' supports it"
    if args.use_bias_correction_kl and args.beta != 0 and args.importance_sampling_level == "sequence":
        option = f"use_bias_correction_kl=True with beta={args.beta}"
        reason = "importance_sampling_level='sequence' weights the KL by the ratio of the sequence"
        raise refuse(option, f"{reason}; {use_logprobs}")
    if args.use_adaptive_entropy:
        raise refuse("use_adaptive_entropy=True", f"the coefficient changes while training; {use_logprobs}")
    if args.entropy_coef != 0 and args.loss_type != "bnpo":
        reason = "the bonus is a mean over the tokens of the micro-batch, as the loss of 'bnpo' alone is"
        raise refuse(f"entropy_coef={args.entropy_coef} with loss_type={args.loss_type!r}", f"{reason}; {use_logprobs}")
    if args.top_entropy_quantile < 1:
        raise refuse(f"top_entropy_quantile={args.top_entropy_quantile}", f"no part of an objective; {use_logprobs}")
    if args.off_policy_mask_threshold is not None:
        option = f"off_policy_mask_threshold={args.off_policy_mask_threshold}"
        raise refuse(option, f"no part of an objective; {use_logprobs}")
    per_token = args.use_vllm and args.vllm_importance_sampling_correction
    per_token = per_token and args.vllm_importance_sampling_mode.startswith("token_")
    if args.importance_sampling_level == "sequence" and per_token and args.loss_type not in ("cispo", "vespo"):
        option = f"vllm_importance_sampling_mode={args.vllm_importance_sampling_mode!r}"
        raise refuse(
            f"{option} with importance_sampling_level='sequence'",
            f"weights of tokens change the gradient of a sequence's ratio; {use_logprobs}",
        )
