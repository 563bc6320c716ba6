"""slime: the functions that its ``--custom-*-path`` options name.

::

    --loss-type custom_loss
    --custom-loss-function-path fusedpo.integrations.slime.policy_loss
    --custom-reward-post-process-path fusedpo.integrations.slime.post_process_rewards
    --custom-tis-function-path fusedpo.integrations.slime.tis
    --custom-config-path fusedpo.yaml

with the options in the file of ``--custom-config-path``, which slime puts into ``args``::

    fusedpo_objective: nfpo             # else: by --advantage-estimator, ppo, gspo or cispo
    fusedpo_options: {n: 4}
    fusedpo_advantage: maxpo
    fusedpo_advantage_options: {k: 4}

The vocabulary may be split over Megatron's tensor-parallel ranks, samples over its context-parallel ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import advantages as estimators
from .. import losses
from ..corrections import importance_weights
from ..distributed import ContextParallel
from ..logprobs import token_logprobs
from ..objectives import Objective
from ..reference.losses import LOG_RATIO_CLAMP
from . import _common

__all__ = [
    "advantages",
    "calculate_log_probs_and_entropy",
    "compute_policy_loss",
    "policy_loss",
    "post_process_rewards",
    "tis",
]

SumOfSampleMean = Callable[[Tensor], Tensor]


def policy_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: SumOfSampleMean
) -> tuple[Tensor, dict[str, Tensor]]:
    """A custom loss: slime's ``policy_loss_function`` for any objective.

    Args:
        args: slime's: ``eps_clip``, ``eps_clip_high``, ``eps_clip_c``, ``entropy_coef``, ``use_kl_loss``,
            ``kl_loss_coef``, ``kl_loss_type``, ``use_unbiased_kl``, ``rollout_temperature``, and the options above.
        batch: lists with one tensor ``[R_i]`` per sample: ``advantages``, ``log_probs`` (the old ones),
            ``ref_log_probs``, ``rollout_log_probs``, ``loss_masks``; ``unconcat_tokens`` of prompt and response; lists
            of ints ``total_lengths`` and ``response_lengths``.
        logits: ``[1, T, V]``, the samples one after another, padding last. Not sliced: the gradient is one tensor.
        sum_of_sample_mean: slime's reduction of ``[sum_i R_i]``.

    With tensor parallelism the logits are this rank's part of the vocabulary. With context parallelism they are two
    chunks of each sample; so are advantages and log-probs, but not ``loss_masks``, tokens and lengths. The loss, and
    what is logged, is then the share of this rank, as that of slime.
    """
    refused = (
        *("use_opsm", "use_tis", "get_mismatch_metrics", "use_score_centering"),
        "custom_pg_loss_reducer_function_path",
    )
    _common.refuse("slime", **{name: getattr(args, name, None) for name in refused})
    _common.refuse("slime", rollout_top_p=None if getattr(args, "rollout_top_p", 1.0) == 1.0 else args.rollout_top_p)
    cp = _context_parallel()
    _common.refuse("slime", allgather_cp=cp is not None and getattr(args, "allgather_cp", False))

    at = _response_rows(batch, logits, cp)
    lp, entropies = token_logprobs(
        logits[0],
        at.token_ids,
        temperature=getattr(args, "rollout_temperature", 1.0),
        mask=at.mask,
        return_entropy=True,
        tp_group=_common.tensor_parallel_group(),
    )
    of_samples, kept = slice(0, at.size), at.mask[at.rows]

    def response(key: str) -> Tensor:
        """0 at masked tokens: ``sum_of_sample_mean`` multiplies by the mask, and 0 * nan is nan."""
        return torch.cat(batch[key]).masked_fill(~kept, 0)

    def spread(x: Tensor) -> Tensor:
        """From the tokens of responses to the rows of samples."""
        return x.new_zeros(at.size).index_copy_(0, at.rows, x)

    key = "rollout_log_probs" if getattr(args, "use_rollout_logprobs", False) else "log_probs"
    old = response(key) if batch.get(key) else None
    objective = _common.with_dual_clip("slime", _objective(args), eps_clip_c=getattr(args, "eps_clip_c", None))
    out = losses.policy_loss(
        lp[of_samples],
        None if old is None else spread(old),
        spread(response("advantages")),
        objective=objective,
        mask=at.mask[of_samples],
        cu_seqlens=at.cu_seqlens,
        reduction="none",
        cp=cp,
    )
    lp, entropies = lp[at.rows], entropies[at.rows]
    pg_loss, entropy_loss = sum_of_sample_mean(out.loss[at.rows]), sum_of_sample_mean(entropies)
    loss = pg_loss - args.entropy_coef * entropy_loss
    log = {"pg_loss": pg_loss, "entropy_loss": entropy_loss}
    sampled = lp.detach() if old is None else old
    log["ppo_kl"] = sum_of_sample_mean(sampled - lp.detach())
    log["pg_clipfrac"] = out.metrics["clip_frac"] * sum_of_sample_mean(torch.ones_like(lp))
    if args.use_kl_loss:
        weight = None
        if getattr(args, "use_unbiased_kl", False):
            weight = (lp - sampled).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
        log["kl_loss"] = sum_of_sample_mean(_kl(args.kl_loss_type, lp, response("ref_log_probs"), weight))
        loss = loss + args.kl_loss_coef * log["kl_loss"]
    return loss, {"loss": loss.detach().clone(), **{name: value.detach().clone() for name, value in log.items()}}


def post_process_rewards(args: Any, samples: list[Any]) -> tuple[list[float], list[float]]:
    """Raw rewards, and the advantages of an estimator that compares responses to the same prompt.

    slime calls it with all samples of a rollout, before they are split over ranks, and with
    ``--advantage-estimator grpo`` gives each token the reward of its sample. Samples: ``group_index``,
    ``response_length``, ``get_reward_value(args)``, ``remove_sample`` and ``rollout_id``.

    A sample that is removed, or whose reward is None (aborted) or nan, gets 0 and counts for nobody; a raw reward of
    None is returned as 0. Samples with the same ``rollout_id`` are one trajectory that fanned out: it counts once, with
    the length of all of them, and they share its advantage. Raises ``ValueError`` if their rewards differ.
    """
    rewards = torch.tensor([_reward(args, sample) for sample in samples])
    counted = ~rewards.isnan() & torch.tensor([not getattr(sample, "remove_sample", False) for sample in samples])
    rollouts = [getattr(sample, "rollout_id", None) for sample in samples]
    trajectories = [
        i if rollout is None else (sample.group_index, rollout)
        for i, (sample, rollout) in enumerate(zip(samples, rollouts, strict=True))
    ]
    groups = _common.group_ids([sample.group_index for sample in samples], rewards.device)
    lengths = torch.tensor([sample.response_length for sample in samples])
    values = _estimate(args, rewards, groups, lengths, counted, trajectories)
    return rewards.nan_to_num(nan=0.0).tolist(), values.tolist()


def advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """A custom advantage: sets ``advantages`` and ``returns``, lists of ``[R_i]``, from one reward per sample.

    Groups are ``args.n_samples_per_prompt`` samples in a row, so that all samples must be on one rank: with data
    parallelism use :func:`post_process_rewards`. A sample that is removed, which slime shows by a loss mask of zeros,
    or whose reward is None or nan, gets 0 and counts for nobody.
    """
    mpu = _common.megatron()
    ranks = mpu.get_data_parallel_world_size()
    _common.refuse("slime", data_parallel_size=ranks if ranks > 1 else None)
    _common.refuse("slime", kl_coef=getattr(args, "kl_coef", 0.0))
    masks = rollout_data["loss_masks"]
    given = [math.nan if reward is None else float(reward) for reward in rollout_data["rewards"]]
    rewards = torch.tensor(given, device=masks[0].device)
    groups = torch.arange(len(rewards), device=rewards.device) // args.n_samples_per_prompt
    lengths = torch.stack([(mask != 0).sum() for mask in masks])
    values = _estimate(args, rewards, groups, lengths, ~rewards.isnan() & (lengths > 0))
    tokens = rollout_data["kl"] if mpu.get_context_parallel_world_size() > 1 else masks  # of this rank
    rollout_data["returns"] = [value.expand(like.shape).clone() for value, like in zip(values, tokens, strict=True)]
    rollout_data["advantages"] = list(rollout_data["returns"])


def tis(
    args: Any,
    *,
    pg_loss: Tensor,
    train_log_probs: list[Tensor],
    rollout_log_probs: list[Tensor],
    loss_masks: list[Tensor],
    total_lengths: Sequence[int] = (),
    response_lengths: Sequence[int] = (),
    **unused: Any,
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """A custom TIS, for slime's own losses: ``pg_loss`` times the ratio clipped to ``[tis_clip_low, tis_clip]``."""
    old, rollout = torch.cat(train_log_probs), torch.cat(rollout_log_probs)
    low, cp, masks = getattr(args, "tis_clip_low", 0) or None, _context_parallel(), loss_masks
    if cp is not None:  # which slime has whole, unlike log-probs
        pieces = [_pieces(*lengths, cp)[1] for lengths in zip(total_lengths, response_lengths, strict=True)]
        own = [mask[i:j] for mask, runs in zip(loss_masks, pieces, strict=True) for _, i, j in runs]
        masks = [loss_masks[0][:0], *own]
    mask = torch.cat(masks)
    weights, _ = importance_weights(old, rollout, mask=mask, low=low, high=args.tis_clip)
    ratio, _ = importance_weights(old, rollout, mask=mask, high=None)
    metrics = {"tis": ratio, "tis_clipfrac": (weights != ratio).float(), "tis_abs": (ratio - 1).abs()}
    return pg_loss * weights, loss_masks, metrics


def compute_policy_loss(
    ppo_kl: Tensor, advantages: Tensor, eps_clip: float, eps_clip_high: float, eps_clip_c: float | None = None
) -> tuple[Tensor, Tensor]:
    """``slime.utils.ppo_utils.compute_policy_loss``: loss and clip indicator of each token, ``[N]``.

    ``ppo_kl`` is old minus new log-prob.
    """
    objective = _common.objective("ppo", {"clip_low": eps_clip, "clip_high": eps_clip_high, "dual": eps_clip_c})
    out = losses.policy_loss(-ppo_kl, torch.zeros_like(ppo_kl), advantages, objective=objective, reduction="none")
    ratio = (-ppo_kl.detach()).clamp(max=20.0).exp()
    clipped = (advantages < 0) & (ratio < 1 - eps_clip) | (advantages > 0) & (ratio > 1 + eps_clip_high)
    return out.loss, clipped.float()


def calculate_log_probs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    tp_group: Any,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: Tensor | None = None,
    with_entropy_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``slime.utils.ppo_utils.calculate_log_probs_and_entropy``: ``[R, 1]``, and ``[R]`` or None, from ``[R, V]``.

    ``chunk_size`` is not needed. With a ``tp_group``, the logits are this rank's equal part of the vocabulary.
    """
    if log_prob_keep_mask is not None:
        raise NotImplementedError("fusedpo.integrations.slime does not support log_prob_keep_mask")
    if not with_entropy:
        return token_logprobs(logits, tokens, tp_group=tp_group).unsqueeze(-1), None
    logprobs, entropy = token_logprobs(logits, tokens, return_entropy=True, tp_group=tp_group)
    return logprobs.unsqueeze(-1), entropy if with_entropy_grad else entropy.detach()


# --------------------------------------------------------------------------------------------------------------- parts


class _Rows(NamedTuple):
    """What the rows of the logits on this rank predict."""

    rows: Tensor  # int64 [R]: those that predict tokens of responses, in the order of slime's own tensors
    token_ids: Tensor  # int64 [T]
    mask: Tensor  # bool [T]: tokens of responses that count
    size: int  # rows of samples; the others are padding
    cu_seqlens: Tensor  # of the samples on all ranks


def _context_parallel() -> ContextParallel | None:
    """slime cuts each sample in twice as many chunks as there are ranks, each of which has one from either end."""
    mpu = _common.megatron()
    if mpu.get_context_parallel_world_size() == 1:
        return None
    return ContextParallel(mpu.get_context_parallel_group(), "zigzag-sequences")


def _pieces(total: int, response: int, cp: ContextParallel | None) -> tuple[int, list[tuple[int, int, int]]]:
    """How many rows of a sample this rank has; and of those that predict its response, runs of one after another.

    A run: its first row, and from which on and up to which token of the response.
    """
    size, chunks = total, [0]
    if cp is not None:
        rank, last = cp.group.rank(), 2 * cp.size - 1
        size, chunks = -(-total // (last + 1)), [rank, last - rank]
    before, runs = total - response - 1, []
    for place, chunk in enumerate(chunks):
        start, stop = max(chunk * size, before), min((chunk + 1) * size, total - 1)
        if start < stop:
            runs.append((start + (place - chunk) * size, start - before, stop - before))
    return size * len(chunks), runs


def _response_rows(batch: dict[str, Any], logits: Tensor, cp: ContextParallel | None) -> _Rows:
    token_ids = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    mask = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    rows, count, ends = [token_ids[:0]], 0, [0]
    samples = zip(batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"], strict=True)
    for (tokens, total, response), loss_mask in zip(samples, batch["loss_masks"], strict=True):
        size, runs = _pieces(total, response, cp)
        for row, start, stop in runs:
            own = slice(count + row, count + row + stop - start)
            token_ids[own] = tokens[total - response :][start:stop]
            mask[own] = loss_mask[start:stop] != 0
            rows.append(torch.arange(own.start, own.stop, device=logits.device))
        count += size
        ends.append(count if cp is None else count * cp.size)
    return _Rows(torch.cat(rows), token_ids, mask, count, torch.tensor(ends, device=logits.device))


def _objective(args: Any) -> Objective:
    """The aggregation is slime's ``sum_of_sample_mean``: that of the preset has no effect."""
    by_estimator = {"gspo": "gspo", "cispo": "cispo"}.get(args.advantage_estimator, "ppo")
    low, high = args.eps_clip, args.eps_clip_high
    return _common.objective(
        getattr(args, "fusedpo_objective", None) or by_estimator,
        getattr(args, "fusedpo_options", None),
        thresholds={"clip_low": low, "clip_high": high, "low": low, "high": high},
    )


def _reward(args: Any, sample: Any) -> float:
    """nan where there is none; slime looks into the reward of an aborted sample too."""
    reward = None if getattr(sample, "reward", 0.0) is None else sample.get_reward_value(args)
    return math.nan if reward is None else float(reward)


def _estimate(
    args: Any,
    rewards: Tensor,
    groups: Tensor,
    lengths: Tensor,
    mask: Tensor,
    trajectories: Sequence[Hashable] | None = None,
) -> Tensor:
    name = getattr(args, "fusedpo_advantage", None) or "grpo"
    if name not in _common.OUTCOME_ESTIMATORS:
        raise ValueError(f"fusedpo_advantage must be one of {_common.OUTCOME_ESTIMATORS}, got {name!r}")
    function, options = getattr(estimators, name), getattr(args, "fusedpo_advantage_options", None) or {}
    _common.check_options(name, options, function)
    given = {"group_ids": groups, "lengths": lengths, "mask": mask, "small_groups": "zero"}
    given["trajectory_ids"] = trajectories
    if options.get("scope") == "batch":
        del given["group_ids"]
    own = _common.for_function(given, function)
    return function(rewards, **{**own, **options})


def _kl(kind: str, logprobs: Tensor, ref_logprobs: Tensor, weight: Tensor | None) -> Tensor:
    """Times the weight where there is one; then slime's ``low_var_kl``, which is k3, is kept within +-10."""
    kl = _common.kl_per_token("k3" if kind == "low_var_kl" else kind, logprobs, ref_logprobs)
    kl = kl if weight is None else weight * kl
    return kl.clamp(-10, 10) if kind == "low_var_kl" else kl
