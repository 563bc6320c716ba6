"""NeMo-RL: a ``LossFunction`` in the place of ``ClippedPGLossFn``, for any objective.

There is no registry. :func:`patch` replaces the class wherever NeMo-RL builds its loss (GRPO, PPO and the single
controller), before the algorithm is set up::

    import fusedpo.integrations.nemo_rl

    fusedpo.integrations.nemo_rl.patch(objective="nfpo", n=4)

NeMo-RL hands the log-probs of whole sequences to its loss, gathered over the ranks that share a vocabulary or a
sequence: the loss needs no group. :func:`patch_logprobs` has the log-probs of a split vocabulary computed here, too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..aggregation import aggregate, to_floats
from ..corrections import importance_weights
from ..logprobs import linear_token_logprobs
from ..losses import policy_loss
from ..objectives import Objective
from . import _common

__all__ = ["ClippedPGLossFn", "patch", "patch_logprobs", "unpatch", "unpatch_logprobs"]

_patched: dict[str, Any] = {}  # while patched: NeMo-RL's class, and the objective and options of those that are built


def patch(objective: str | Objective | None = None, **options: Any) -> None:
    """Replaces ``ClippedPGLossFn`` in every imported module of NeMo-RL; those imported later import the replacement.

    ``objective`` and ``options`` are those of :class:`ClippedPGLossFn`, for every loss that is built while it lasts. A
    second call changes them; :func:`unpatch` undoes it. Raises ``ValueError`` for names that do not exist.
    """
    if objective is not None:
        _common.objective(objective, options)
    module = importlib.import_module("nemo_rl.algorithms.loss")
    _patched.setdefault("original", module.ClippedPGLossFn)
    _patched.update(objective=objective, options=options)
    _common.swap("nemo_rl", {_patched["original"]: ClippedPGLossFn})


def unpatch() -> None:
    """Gives every module of NeMo-RL its own class back."""
    if _patched:
        _common.swap("nemo_rl", {ClippedPGLossFn: _patched["original"]})
        _patched.clear()


class ChunkedDistributedHiddenStatesToLogprobs:
    """In the place of the autograd function of that name: log-probs from hidden states, a chunk of logits at a time."""

    @staticmethod
    def apply(
        tensor_parallel_hidden_states: Tensor,
        target: Tensor,
        output_weight_layer: Tensor,
        vocab_start_index: int,
        vocab_end_index: int,
        chunk_size: int,
        tp_group: Any,
        inference_only: bool = False,
    ) -> Tensor:
        """Sequence-parallel hidden states ``[S / P, B, H]``, ``[V_r, H]`` and ids ``[B, S]`` to ``[B, S]``.

        ``chunk_size`` is not needed. The gradient of the hidden states is summed over the ranks, as NeMo-RL sums it.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only):
            return linear_token_logprobs(
                tensor_parallel_hidden_states.transpose(0, 1),
                output_weight_layer,
                target,
                tp_group=tp_group,
                vocab_start=vocab_start_index,
            )


_LOGPROBS = (_common.DistributedLogprob, _common.ChunkedDistributedLogprob, ChunkedDistributedHiddenStatesToLogprobs)
_originals: dict[Any, Any] = {}  # of NeMo-RL, by what replaces them


def patch_logprobs() -> None:
    """Log-probs of a split vocabulary by this library, in every imported module of NeMo-RL.

    What computes them from logits, and from hidden states where the loss is fused with the head, is replaced: for
    policies of Megatron and of DTensors, padded and packed, for training and for ``prev_logprobs``. How sequences are
    split over ranks and gathered stays NeMo-RL's, and so do log-probs after top-k or top-p filtering, and those for
    which there is no tensor-parallel group. Call it in each worker; calling it again patches modules loaded since.
    """
    module = importlib.import_module("nemo_rl.distributed.model_utils")
    _common.put_in_place("nemo_rl", module, _LOGPROBS, _originals)


def unpatch_logprobs() -> None:
    """Undoes :func:`patch_logprobs`."""
    _common.put_back("nemo_rl", _originals)


class ClippedPGLossFn:
    """``nemo_rl.algorithms.loss.ClippedPGLossFn``; ``objective`` replaces what the flags of ``cfg`` say.

    Args:
        cfg: NeMo-RL's configuration, an object or a dict. Its bounds ``ratio_clip_min``, ``ratio_clip_max`` and
            ``ratio_clip_c``, its aggregation (``token_level_loss``), its KL term, and its importance weights per token
            (none, ``tis`` or ``icepop``) hold for any objective.
        objective: an ``Objective`` or a preset's name, with the preset's arguments in ``options``. None: PPO, CISPO
            (``use_cispo``), GSPO (``sequence_level_importance_ratios``) or REINFORCE (``disable_ppo_ratio``), unless
            :func:`patch` was given one.

    Raises ``NotImplementedError`` for ``seq-mask-tis``, importance weights per sequence,
    ``use_on_policy_kl_approximation`` and ``positive_example_nll_weight``; ``ValueError`` for importance weights that
    are truncated without a bound, or without ``use_importance_sampling_correction``.
    """

    def __init__(
        self,
        cfg: Any,
        use_fused_linear_logprobs: bool = False,
        *,
        objective: str | Objective | None = None,
        **options: Any,
    ) -> None:
        if objective is None and _patched:
            objective, options = _patched["objective"], {**_patched["options"], **options}

        def get(name: str, default: Any) -> Any:
            return cfg.get(name, default) if isinstance(cfg, dict) else getattr(cfg, name, default)

        interfaces = importlib.import_module("nemo_rl.algorithms.loss.interfaces")
        token_level = get("token_level_loss", True)
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.input_type = interfaces.LossInputType.LOGPROB
        self.loss_type = interfaces.LossType.TOKEN_LEVEL if token_level else interfaces.LossType.SEQUENCE_LEVEL
        self.per_sequence = per_sequence = get("sequence_level_importance_ratios", False)
        self.correct = get("use_importance_sampling_correction", False)
        self.truncation = get("truncated_importance_sampling_type", None)
        _common.refuse(
            "nemo_rl",
            use_on_policy_kl_approximation=get("use_on_policy_kl_approximation", False),
            positive_example_nll_weight=get("positive_example_nll_weight", 0.0),
            truncated_importance_sampling_type=self.truncation if self.truncation == "seq-mask-tis" else None,
            sequence_level_importance_ratios=per_sequence and self.correct,
        )
        self.bounds = {
            "low": get("truncated_importance_sampling_ratio_min", None) or None,
            "high": get("truncated_importance_sampling_ratio", None),
        }
        if self.truncation not in (None, "tis", "icepop"):
            raise ValueError(
                f"truncated_importance_sampling_type must be None, 'tis' or 'icepop', got {self.truncation!r}"
            )
        if self.truncation is not None and (not self.correct or self.bounds["high"] is None):
            raise ValueError(
                f"truncated_importance_sampling_type={self.truncation!r} needs use_importance_sampling_correction=True "
                "and truncated_importance_sampling_ratio"
            )
        self.force_on_policy_ratio = get("force_on_policy_ratio", False)
        self.kl_coef = 0.0 if get("use_kl_in_reward", False) else get("reference_policy_kl_penalty", 0.01)
        self.kl_kind = get("reference_policy_kl_type", "k3")
        self.kl_clamps = {"input_clamp": get("kl_input_clamp_value", 20.0), "clamp": get("kl_output_clamp_value", 10.0)}
        by_flags = (
            ("cispo", get("use_cispo", False)),
            ("gspo", per_sequence),
            ("reinforce", get("disable_ppo_ratio", False)),
        )
        low, high = get("ratio_clip_min", 0.2), get("ratio_clip_max", 0.2)
        built = _common.objective(
            objective or next((name for name, flag in by_flags if flag), "ppo"),
            options,
            thresholds={"clip_low": low, "clip_high": high, "low": low, "high": high},
            aggregation="token-mean" if token_level else "seq-mean-token-mean",
        )
        self.objective = _common.with_dual_clip("nemo_rl", built, ratio_clip_c=get("ratio_clip_c", None))

    def __call__(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of a micro-batch, divided by the global count, and the metrics that NeMo-RL adds up.

        ``next_token_logprobs`` is ``[B, S - 1]``; ``data`` holds ``[B, S]`` each (position 0 is dropped)
        ``advantages``, ``prev_logprobs``, ``generation_logprobs``, ``reference_policy_logprobs``, ``token_mask``, and
        ``sample_mask`` ``[B]``.
        """
        for name in ("curr_logprobs_keep_mask", "curr_logprobs_unfiltered"):  # of top-k or top-p filtering
            if data.get(name) is not None:
                raise NotImplementedError(f"fusedpo.integrations.nemo_rl does not support {name}")
        lp = next_token_logprobs
        mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        generation = data["generation_logprobs"][:, 1:]
        old = lp.detach() if self.force_on_policy_ratio else data["prev_logprobs"][:, 1:]
        token_level = self.objective.aggregation == "token-mean"
        count = global_valid_toks if token_level else global_valid_seqs
        out = policy_loss(
            lp,
            old,
            data["advantages"][:, 1:].contiguous(),
            objective=self.objective,
            mask=mask,
            is_weights=self._weights(old, generation, mask),
            denominator=count,
        )
        loss, kl = out.loss, lp.new_zeros(())
        if self.kl_coef != 0:
            # Masked before exp: what is cut afterwards still has the gradient 0 * inf.
            kept, ref = (x.masked_fill(mask == 0, 0) for x in (lp, data["reference_policy_logprobs"][:, 1:]))
            # The weight has value 1: it adds the gradient through the probability of having sampled the token.
            weight = torch.exp(kept - kept.detach())
            tokens = weight * _common.kl_per_token(self.kl_kind, kept, ref, **self.kl_clamps)
            kl = aggregate(tokens, self.objective.aggregation, mask=mask, denominator=count)
            loss = loss + self.kl_coef * kl
        counts = global_valid_seqs, global_valid_toks
        return loss, self._metrics(loss, kl, out.metrics, lp, old, generation, mask, data, counts)

    def _weights(self, old: Tensor, generation: Tensor, mask: Tensor) -> Tensor | None:
        if not self.correct:
            return None
        if self.truncation is None:
            return importance_weights(old, generation, mask=mask, high=None)[0]
        mode = "truncate" if self.truncation == "tis" else "mask"
        return importance_weights(old, generation, mask=mask, mode=mode, **self.bounds)[0]  # type: ignore[arg-type]

    @torch.no_grad()
    def _metrics(
        self,
        loss: Tensor,
        kl: Tensor,
        ours: dict[str, Tensor],
        lp: Tensor,
        old: Tensor,
        generation: Tensor,
        mask: Tensor,
        data: Any,
        counts: tuple[Tensor, Tensor],
    ) -> dict[str, float]:
        """By NeMo-RL's names; means are sums over this micro-batch divided by the global count. One wait for them."""
        global_valid_seqs, global_valid_toks = counts

        def mean(x: Tensor) -> Tensor:
            return aggregate(x, mask=mask, denominator=global_valid_toks)

        shift = old - generation
        none = ours["tokens"] == 0
        share = (ours["tokens"] / global_valid_toks).masked_fill(none, 0)
        metrics = {
            "loss": loss,
            "probs_ratio": ours["ratio_mean"] * share,
            # NeMo-RL takes the extremes of all micro-batches, and leaves out what is infinite.
            "probs_ratio_min": ours["ratio_min"].masked_fill(none, torch.inf),
            "probs_ratio_max": ours["ratio_max"].masked_fill(none, -torch.inf),
            "clip_frac": ours["clip_frac"] * share,
            "kl_penalty": kl,
            "token_mult_prob_error": mean(shift.abs().clamp(max=20.0).exp()),
            "gen_kl_error": mean(_common.kl_per_token("k3", generation, old)),
            "policy_kl_error": mean(_common.kl_per_token("k3", old, generation)),
            "sampling_importance_ratio": self._sampling_ratio(shift, mask, mean, data, global_valid_seqs),
            "approx_entropy": mean(-(lp - generation).clamp(-20.0, 20.0).exp() * lp),
            "num_valid_samples": data["sample_mask"].sum().float(),
        }
        if self.truncation is not None:
            ratio = shift.exp().nan_to_num(nan=0.0, posinf=0.0)
            outside = (ratio < (self.bounds["low"] or 0.0)) | (ratio > self.bounds["high"])
            metrics["is_oob_ratio"] = mean(outside.float())
        return to_floats(metrics)

    def _sampling_ratio(
        self, shift: Tensor, mask: Tensor, mean: Callable[[Tensor], Tensor], data: Any, global_valid_seqs: Tensor
    ) -> Tensor:
        """NeMo-RL's mean of the weights: truncated as those of the loss, even where the loss takes none.

        Infinite and nan weights count as 0; those of sequences are the ratio of the whole sequence.
        """
        if self.per_sequence:
            ratio = shift.masked_fill(mask == 0, 0).sum(1).exp().nan_to_num(nan=0.0, posinf=0.0)
            return (ratio * data["sample_mask"]).sum() / global_valid_seqs.masked_fill(global_valid_seqs == 0, 1)
        ratio = shift.exp().nan_to_num(nan=0.0, posinf=0.0)
        if self.truncation is not None:
            low, high = self.bounds["low"] or 0.0, self.bounds["high"]
            inside = (ratio >= low) & (ratio <= high)
            ratio = ratio.clamp(low, high) if self.truncation == "tis" else ratio.where(inside, 0)
        return mean(ratio)
