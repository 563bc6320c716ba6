"""Several ranks: the vocabulary split over them (``tp_group=``), sequences (``cp=``), the batch (``denominator=``).

How each is used: docs/distributed.md. The engine is ``torch.distributed`` as it is; every collective is in
:mod:`.collectives`.
"""

from .context import ContextParallel
from .metrics import reduce_metrics

__all__ = ["ContextParallel", "reduce_metrics"]
