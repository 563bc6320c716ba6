"""TRL: trainers whose loss is fused, and TRL's log-prob functions and head replaced wherever they were imported.

::

    from fusedpo.integrations.trl import FusedGRPOTrainer

    trainer = FusedGRPOTrainer(model, reward_funcs, args, train_dataset=dataset)  # the arguments of GRPOTrainer

What is supported, what is refused and what differs: docs/integrations/trl.md.
"""

from fusedpo.integrations.trl.versions import TESTED as TESTED  # first: it says what another version lacks

from .patch import patch_trl, unpatch_trl
from .rloo import FusedRLOOTrainer
from .trainer import FusedGRPOTrainer

__all__ = ["FusedGRPOTrainer", "FusedRLOOTrainer", "patch_trl", "unpatch_trl"]
