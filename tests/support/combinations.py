"""The combinations of parts that the kernels run through, and the arguments of their operators."""

from __future__ import annotations

import itertools

import torch

from fusedpo import objectives as O
from fusedpo.ops import policy_loss as ops_policy_loss
from support import policy_loss as contract
from support.parts import REGIONS, TRACES

RATIOS = [*contract.RATIOS, *TRACES, O.Trace(9, 12), O.Trace("all", 3, differentiate=True)]
COMBINATIONS = list(contract.combinations(itertools.product(RATIOS, contract.REGIONS + REGIONS)))


def operator_arguments(objective, per_token, packed=False):
    lp, olp, ref, entropy = (-torch.rand(2, 5) for _ in range(4))
    batch = [lp, -entropy, olp, torch.randn(2, 1), torch.rand(2, 5) > 0.3, None, ref, torch.rand(2, 5)]
    if packed:
        batch = [x if x is None or x.shape == (2, 1) else x.flatten() for x in batch]
        batch[5] = torch.tensor([0, 4, 10])
    return (*batch, torch.tensor(3.0), torch.tensor(0.5), *ops_policy_loss.encode(objective), per_token)
