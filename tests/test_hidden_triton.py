"""The loss from hidden states by the Triton kernels: against the reference in float64; on a GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch
from support.active_columns import assert_marked, assert_operators_check, assert_written_up_to_most
from support.hidden import OBJECTIVES, assert_equal_to_reference, make, run
from support.triton_device import DEVICE, _backend, pytestmark, small  # noqa: F401


@pytest.mark.parametrize(("packed", "softcap"), [(False, None), (True, 3.0)])
@pytest.mark.parametrize("name", ["nfpo(3)", "ppo", "gspo"])
def test_equal_to_the_composition_in_float64(name, packed, softcap):
    """Chunks end within sequences and within windows."""
    options = {"objective": OBJECTIVES[name], "softcap": softcap, "chunk_tokens": 5, "upstream": -1.7}
    with torch.device("cpu"):
        assert_equal_to_reference(*make(packed=packed), backend="triton", device=DEVICE, **options)


@pytest.mark.parametrize("name", ["nfpo(3)", "ppo", "gspo"])
def test_gradient_threshold_as_native(name):
    """The same columns are left out, of the same gradient."""
    sources, batch = make(vocab=700)
    sources[1] *= 4
    options = {"objective": OBJECTIVES[name], "chunk_tokens": 7, "gradient_threshold": 2.0**-8}
    want, wanted = run(sources, batch, **options)
    there = [x.to(DEVICE) for x in sources], {n: x.to(DEVICE) for n, x in batch.items()}
    out, gradients = run(*there, backend="triton", **options)
    assert want.metrics["dropped"] > 1e-3
    torch.testing.assert_close(out.metrics["dropped"].cpu(), want.metrics["dropped"], rtol=1e-4, atol=1e-6)
    for got, expected in zip(gradients, wanted, strict=True):
        assert (got.cpu() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_operators_of_active_columns():
    assert_marked("triton", DEVICE)
    assert_written_up_to_most("triton", DEVICE)
    assert_operators_check("triton", DEVICE)
