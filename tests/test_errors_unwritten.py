"""An element that no kernel wrote cannot pass a test, because it is nan."""

import pytest
import torch


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(3),
        lambda: torch.empty(3, dtype=torch.bfloat16),
        lambda: torch.empty_like(torch.ones(3)),
        lambda: torch.ops.aten.new_empty(torch.ones(3), [3]),  # what the kernels of the extension call
    ],
)
def test_memory_that_nothing_has_written_is_nan(allocate):
    assert allocate().isnan().all()
