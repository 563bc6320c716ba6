"""What others call our options: hints for messages. ``docs/migrating.md`` has the tables."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LOW, _HIGH = "clip_low, how far the ratio may fall below 1", "clip_high, how far the ratio may rise above 1"
_KL = "kl, the coefficient of k3 or a KL"
_DUAL = "dual of ppo and dapo"

OTHERS = {
    **dict.fromkeys(("beta", "kl_beta", "kl_coef", "kl_coeff", "kl_loss_coef"), _KL),
    **dict.fromkeys(("epsilon", "eps", "eps_clip", "clip_eps", "clip_ratio", "cliprange"), "clip_low and clip_high"),
    **dict.fromkeys(("epsilon_low", "eps_clip_low", "clip_eps_low", "clip_ratio_low", "ratio_clip_min"), _LOW),
    **dict.fromkeys(("epsilon_high", "eps_clip_high", "clip_eps_high", "clip_ratio_high", "ratio_clip_max"), _HIGH),
    **dict.fromkeys(("clip_ratio_c", "eps_clip_c", "ratio_clip_c", "dual_clip", "c_clip"), _DUAL),
    "delta": f"delta of two_sided_grpo, or {_DUAL}",
    **dict.fromkeys(("max_completion_length", "loss_scale_factor", "max_new_tokens"), "length_norm of dr_grpo"),
    **dict.fromkeys(("loss_agg_mode", "loss_reduction", "reduction"), "aggregation"),
    **dict.fromkeys(("entropy_coeff", "ent_coef", "entropy_loss_coef"), "entropy_coef"),
    **dict.fromkeys(("sapo_temperature_pos", "sapo_temperature_neg"), "tau_pos and tau_neg of sapo"),
    "loss_type": "the name of a preset",
    "importance_sampling_level": "gspo, the preset whose ratio is that of the sequence",
    "num_generations": "group_size of the functions of fusedpo.advantages",
    "scale_rewards": "std of fusedpo.advantages.grpo",
    "temperature": "temperature of policy_loss_from_logits or policy_loss_from_hidden",
}


def hint(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown ``name``, empty if nothing comes near it."""
    meant = OTHERS.get(name) if isinstance(name, str) else None
    if meant is None:
        meant = next(iter(difflib.get_close_matches(str(name), list(known), n=1)), None)
    return "" if meant is None else f"; did you mean {meant}?"
