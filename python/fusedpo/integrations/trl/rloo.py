"""TRL's ``RLOOTrainer`` with the head and the advantages of fusedpo."""

from __future__ import annotations

from typing import Any

from trl.trainer.rloo_trainer import RLOOTrainer

from .._versions import check_version
from .advantages import Estimated, EstimatorLike, GroupAdvantages
from .objective import refuse, refuse_split_sequences
from .patch import patch_trl
from .versions import TESTED


class FusedRLOOTrainer(Estimated, RLOOTrainer):
    """``trl.RLOOTrainer`` whose log-probs and entropies, and their gradient, are computed by fusedpo.

    Its loss is a function of the sum of the log-probs of each completion, of which the batch has few: it stays TRL's,
    with all of its options. What takes the time and the memory, from the last hidden state to those sums and back, is
    :func:`fusedpo.linear_token_statistics`. For an objective per token there is ``FusedGRPOTrainer``.

    Args:
        *args, **kwargs: those of ``trl.RLOOTrainer``.
        advantage_estimator: as in ``FusedGRPOTrainer``, in the place of leave-one-out; with ``beta=0`` and
            ``normalize_advantages=False``, for TRL makes the KL a part of the reward that it does not hand out.

    Raises:
        NotImplementedError: an option that is not supported; the message names it.
    """

    def __init__(self, *args: Any, advantage_estimator: EstimatorLike | None = None, **kwargs: Any) -> None:
        check_version("trl", *TESTED)
        with patch_trl():
            super().__init__(*args, **kwargs)
        refuse_split_sequences(getattr(self.accelerator, "parallelism_config", None), "FusedRLOOTrainer")
        if advantage_estimator is not None:
            if self.beta != 0:
                option = f"beta={self.beta} with advantage_estimator"
                raise refuse(option, "TRL subtracts the KL from rewards that it keeps to itself", "FusedRLOOTrainer")
            self._advantages = GroupAdvantages(
                advantage_estimator, self.args, self.num_generations, trainer="FusedRLOOTrainer"
            )
