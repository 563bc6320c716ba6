"""The versions of trl that this was tested with, checked before anything of it is imported."""

from __future__ import annotations

import importlib
from importlib.metadata import version

from .._versions import check_version

TESTED = ("1.15", "1.17")
"""The first version, and the first one that was not."""

check_version("trl", *TESTED)
if not hasattr(importlib.import_module("trl.trainer.utils"), "add_fused_lm_head"):
    raise ImportError(
        f"fusedpo.integrations.trl needs trl>=1.15, found {version('trl')}: before, trl had no add_fused_lm_head, the "
        "head that its trainers share and that this takes the place of; in a trainer of your own call "
        "fusedpo.token_logprobs or fusedpo.policy_loss_from_logits"
    )
