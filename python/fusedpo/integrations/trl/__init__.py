"""TRL: a ``GRPOTrainer`` whose loss is fused, and its log-prob functions replaced wherever they were imported.

::

    from fusedpo.integrations.trl import FusedGRPOTrainer

    trainer = FusedGRPOTrainer(model, reward_funcs, args, train_dataset=dataset)  # the arguments of GRPOTrainer

What is supported, what is refused and what differs: docs/integrations/trl.md.
"""

from .patch import patch_trl, unpatch_trl
from .trainer import FusedGRPOTrainer

__all__ = ["FusedGRPOTrainer", "patch_trl", "unpatch_trl"]
