"""The loss from hidden states by the Triton kernels: against the reference in float64; on a GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch
from support.hidden import OBJECTIVES, assert_equal_to_reference, make
from support.triton_device import DEVICE, _backend, pytestmark, small  # noqa: F401


@pytest.mark.parametrize(("packed", "softcap"), [(False, None), (True, 3.0)])
@pytest.mark.parametrize("name", ["nfpo(3)", "ppo", "gspo"])
def test_equal_to_the_composition_in_float64(name, packed, softcap):
    """Chunks end within sequences and within windows."""
    options = {"objective": OBJECTIVES[name], "softcap": softcap, "chunk_tokens": 5, "upstream": -1.7}
    with torch.device("cpu"):
        assert_equal_to_reference(*make(packed=packed), backend="triton", device=DEVICE, **options)
