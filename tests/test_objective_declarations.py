"""What parts declare decides how they are computed; what declares nothing is computed the safe way."""

from dataclasses import dataclass
from unittest import mock

import torch

from fusedpo import objectives as O
from fusedpo._batch import Batch
from fusedpo.ops import hidden as ops_hidden
from fusedpo.ops import one_pass as ops_one_pass
from fusedpo.ops import policy_loss as ops_policy_loss


@dataclass(frozen=True)
class MadeUp(O._Part):
    """Declares nothing."""


def with_parts(**parts: object) -> O.Objective:
    """An objective of parts that its checks do not know."""
    objective = O.ppo()
    for name, part in parts.items():
        object.__setattr__(objective, name, part)
    return objective


def test_a_part_that_declares_nothing_takes_two_passes():
    assert ops_one_pass.is_possible(O.ppo())
    assert not ops_one_pass.is_possible(with_parts(trust_region=MadeUp()))
    assert not ops_one_pass.is_possible(with_parts(ratio=MadeUp()))


def evaluated(objective: O.Objective) -> list[bool] | None:
    """Of two sequences of three tokens, of which one token has an advantage."""
    advantages, mask = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), torch.ones(2, 3, dtype=torch.bool)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    batch = Batch(None, advantages, mask, None, None, None, None, torch.ones(()))
    found = ops_hidden.evaluated_tokens(ids, batch, objective)
    assert found is not None
    return None if found is mask else found.flatten().tolist()


def test_a_part_that_declares_nothing_is_never_skipped():
    assert evaluated(O.ppo()) == [False, True, False, False, False, False]
    assert evaluated(with_parts(trust_region=MadeUp())) is None
    assert evaluated(with_parts(ratio=MadeUp())) == [True, True, True, False, False, False]


def test_a_part_that_declares_nothing_has_its_sequence_looked_at():
    objective = with_parts(ratio=MadeUp(), trust_region=MadeUp())
    numbers = {MadeUp: 0}
    with mock.patch.multiple(ops_policy_loss, RATIOS=numbers, TRUST_REGIONS=numbers):
        parts, _ = ops_policy_loss.encode(objective)
    assert parts[-2:] == (O.SEQUENCE, O.SEQUENCE)


def test_a_trace_looks_where_its_window_is():
    looks = {
        (0, 0, False): O.TOKEN,
        (0, 3, False): O.AHEAD,
        ("all", 0, False): O.PREFIX,
        (1, "all", False): O.AHEAD | O.PREFIX,
        (0, 0, True): O.TOKEN,
        (0, 3, True): O.AHEAD | O.PREFIX,  # its log-prob is in the loss of tokens before it
    }
    assert {key: O.Trace(*key).looks_at for key in looks} == looks
    assert O.ForwardTrace(4, True).looks_at == O.Trace(0, 3, True).looks_at
