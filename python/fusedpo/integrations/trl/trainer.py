"""TRL's ``GRPOTrainer`` with the loss of fusedpo."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ...alignment import next_tokens
from ...losses import PolicyLossOutput
from ...objectives import VESPO, Objective
from .._versions import check_version
from .advantages import Estimated, EstimatorLike, GroupAdvantages
from .heads import HiddenHead, LogitsHead, add_fused_forward
from .objective import ObjectiveLike, from_config, from_user, refuse, refuse_split_sequences
from .patch import patch_trl
from .versions import TESTED

Fuse = Literal["loss", "logprobs"]


class FusedGRPOTrainer(Estimated, GRPOTrainer):
    """``trl.GRPOTrainer`` whose loss, and its gradient with respect to the logits, is one function of fusedpo.

    Without the options below it computes what TRL computes, to float32 accuracy, and logs the same metrics. Options of
    ``GRPOConfig`` that the fused loss does not support are refused by name: docs/integrations/trl.md lists them.

    Args:
        *args, **kwargs: those of ``trl.GRPOTrainer``.
        objective: a :class:`fusedpo.Objective`, the name of a preset in :mod:`fusedpo.objectives`, or a name and a
            dictionary of its arguments, ``("nfpo", {"n": 4})``. It takes the place of ``loss_type``, ``epsilon``,
            ``epsilon_high``, ``delta``, ``importance_sampling_level``, ``sapo_*`` and ``vespo_*``, which must be at
            their defaults. ``GRPOConfig.beta`` adds ``KL("k3", beta)``; where the objective has a KL part, ``beta``
            must be its coefficient, since TRL loads the reference model for it. The loss is divided by what TRL divides
            that aggregation by; ``token-sum`` is the sum over all processes and accumulated micro-batches. None: the
            loss type of ``GRPOConfig``.
        advantage_estimator: the name of an estimator of one reward per sample in :mod:`fusedpo.advantages`, a function
            of ``rewards`` ``[G]`` and, if it has such parameters, ``group_size``, ``lengths`` and ``mask`` (which
            samples have a reward), or either of them and a dictionary of options, ``("maxpo", {"k": 2})``. It takes the
            place of ``scale_rewards``. None: the advantages of TRL.
        from_hidden: compute the loss from the last hidden state, by :func:`fusedpo.policy_loss_from_hidden`: only the
            logits of ``chunk_tokens`` tokens exist at a time. False: from the logits ``[B, completion + 1, V]``, whose
            gradient takes their memory.
        fuse: ``"loss"``, or ``"logprobs"``: log-probs and entropy by fusedpo, the loss of a token by TRL's own code,
            which supports every option of ``GRPOConfig`` and no ``objective``.

    Raises:
        NotImplementedError: an option that is not supported; the message names it. ValueError: options that disagree.
    """

    args: GRPOConfig
    model: PreTrainedModel
    objective: Objective

    def __init__(
        self,
        *args: Any,
        objective: ObjectiveLike | None = None,
        advantage_estimator: EstimatorLike | None = None,
        from_hidden: bool = False,
        chunk_tokens: int = 512,
        fuse: Fuse = "loss",
        **kwargs: Any,
    ) -> None:
        check_version("trl", *TESTED)
        if fuse not in get_args(Fuse):
            raise ValueError(f"fuse must be one of {get_args(Fuse)}, got {fuse!r}")
        if fuse == "logprobs" and objective is not None:
            raise ValueError("objective needs fuse='loss': with fuse='logprobs' the loss is TRL's")
        with patch_trl():  # the head that log-probs of the sampling policy and of the reference come from
            super().__init__(*args, **kwargs)
        self._fuse = fuse
        self._has_own_objective = objective is not None
        if fuse == "loss":
            self.objective = from_config(self.args) if objective is None else from_user(objective, self.args)
        if advantage_estimator is not None:
            self._advantages = GroupAdvantages(advantage_estimator, self.args, self.num_generations)
        model: Any = self.model
        if hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        self._check_setup(from_hidden)
        self._head: LogitsHead | HiddenHead = LogitsHead()
        if from_hidden:
            self._head = HiddenHead(chunk_tokens, self.args.cast_lm_head_to_fp32)
        self._head.check(model)
        add_fused_forward(model)

    def _check_setup(self, from_hidden: bool) -> None:
        refuse_split_sequences(getattr(self.accelerator, "parallelism_config", None))
        if self.args.fp16:
            raise refuse("fp16=True", "the gradient of the logits would be stored before it is scaled; use bf16")
        if self.args.torch_compile:
            raise refuse("torch_compile=True", "each step would be compiled anew")
        if not from_hidden:
            if self.args.cast_lm_head_to_fp32:
                raise refuse("cast_lm_head_to_fp32=True", "logits are as the model makes them; from_hidden=True casts")
        elif self.aux_loss_enabled:
            option = f"router_aux_loss_coef={self.router_aux_loss_coef}"
            raise refuse(f"{option} with from_hidden=True", "the model computes that loss in the forward for logits")
        elif self._is_vlm:
            raise refuse("a processor for images with from_hidden=True", "only language models are")
        elif self.is_deepspeed_enabled or (self.is_fsdp_enabled and not getattr(self.accelerator, "is_fsdp2", False)):
            raise refuse("DeepSpeed and FSDP1 with from_hidden=True", "the weight of the head may be a shard")

    # ------------------------------------------------------------------------------------------------------------ loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's own method, with a stand-in for the model that returns what the fused function gave.

        With ``fuse="loss"`` TRL sees detached log-probs and entropies, and computes its metrics from them.
        """
        fuse_loss = self._fuse == "loss"
        width = inputs["completion_ids"].shape[1] + 1
        mask = inputs["completion_mask"]
        if fuse_loss:
            mask = mask * inputs.get("tool_mask", 1)
            options = self._loss_options(inputs)
        else:
            options = {}
        results: list[Any] = []

        def stand_in(*, input_ids: Tensor, labels: Tensor, fused_lm_head: bool, **model_inputs: Any) -> Any:
            # Of the last `width` positions, all but the last one predict a token of the completion.
            token_ids, predicts = next_tokens(input_ids[:, -width:], pad(mask, (1, 0)))
            fused = functools.partial(
                self._head,
                loss=fuse_loss,
                width=width,
                options={"token_ids": token_ids, "mask": predicts, "temperature": self.temperature, **options},
            )
            result, aux_loss = model(input_ids=input_ids, fused=fused, **model_inputs)
            results[:] = result, aux_loss
            logprobs, entropy = (result.logprobs, result.entropy) if fuse_loss else result
            return FusedCausalLMOutput(log_probs=logprobs[:, :-1], entropy=entropy[:, :-1], aux_loss=aux_loss)

        loss = super()._compute_loss(stand_in, inputs)
        if not fuse_loss:
            return loss
        output, aux_loss = results
        if self._has_own_objective:
            self._log_objective(output)
        if self.aux_loss_enabled:
            return output.loss + self.router_aux_loss_coef * aux_loss / self._accumulation
        return output.loss

    @property
    def _accumulation(self) -> int:
        """How many micro-batches make up an optimiser step; evaluation does not accumulate."""
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _loss_options(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of :func:`fusedpo.policy_loss` beside the log-probs; per-token ones have one column more."""

        def padded(x: Tensor | None) -> Tensor | None:
            return pad(x, (0, 1)) if x is not None and x.shape[1:] == inputs["completion_ids"].shape[1:] else x

        old_logprobs, is_weights = inputs.get("old_per_token_logps"), None
        if self.use_vllm and self.vllm_importance_sampling_correction:
            is_weights = inputs["importance_sampling_ratio"]
            if isinstance(self.objective.trust_region, VESPO):
                # its weight is a function of the whole ratio to the policy that sampled
                old_logprobs = old_logprobs - is_weights.log().clamp(math.log(1e-8), 20.0)
                is_weights = None
        denominator, loss_scale = self._normalisation(inputs)
        return {
            "objective": self.objective,
            "old_logprobs": padded(old_logprobs),
            "advantages": padded(inputs["advantages"]),
            "ref_logprobs": padded(inputs.get("ref_per_token_logps")),
            "is_weights": padded(is_weights),
            "denominator": denominator,
            "loss_scale": loss_scale,
        }

    def _normalisation(self, inputs: dict[str, Any]) -> tuple[Any, float]:
        """TRL's ``denominator`` and ``loss_scale`` of a micro-batch; gradients are averaged over processes."""
        if self.objective.aggregation == "token-sum":
            return None, float(self.accelerator.num_processes)
        if self.objective.aggregation != "token-mean":
            return inputs["completion_ids"].shape[0], 1 / self._accumulation
        if self.loss_type == "bnpo" and not self._has_own_objective:
            return None, 1 / self._accumulation
        # tokens of one optimiser step; num_items_in_batch counts those of a generation batch, on all processes
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            tokens = tokens * self._accumulation / self.args.steps_per_generation
        return tokens, 1.0

    def _log_objective(self, output: PolicyLossOutput) -> None:
        """Metrics of an objective that is not TRL's in place of TRL's clip metrics, which are those of its loss."""
        log = self._metrics["train" if self.model.training else "eval"]
        for name in [name for name in log if name.startswith("clip_ratio/")]:
            del log[name]
        values = torch.stack(list(output.metrics.values()))
        per_process = dict(zip(output.metrics, self.accelerator.gather(values[None]).unbind(1), strict=True))
        tokens = per_process.pop("tokens")
        for name in ("kl", "entropy", "rows"):  # TRL logs the first two; every kept token is a row
            per_process.pop(name, None)

        nobody = (tokens == 0) & (tokens.sum() > 0)  # a process without a kept token, beside others

        def over_processes(name: str, x: Tensor) -> Tensor:
            if name.endswith("_min"):
                return x.masked_fill(nobody, math.inf).amin()
            if name.endswith("_max"):
                return x.masked_fill(nobody, -math.inf).amax()
            return (x * tokens).sum() / tokens.sum().clamp(min=1)

        reduced = torch.stack([over_processes(name, x) for name, x in per_process.items()])
        for name, value in zip(per_process, reduced.tolist(), strict=True):
            log[f"fusedpo/{name}"].append(value)
