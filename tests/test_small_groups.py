"""Groups that keep too few samples for an estimator: an error, or advantage 0, on every implementation."""

import pytest
import torch

import fusedpo
from fusedpo import _checks, advantages, backends

# The fewest samples of a group, and arguments.
ESTIMATORS = {
    "maxpo": (4, {"k": 3}),
    "order_statistic": (4, {"k": 3, "weights": [0.5, 0.0, 0.5]}),
    "pkpo": (3, {"k": 3}),
    "passk": (3, {"k": 3}),
    "grpo_passk": (2, {}),
}
interpreted = [pytest.mark.triton, pytest.mark.skipif(torch.cuda.is_available(), reason="not under the interpreter")]
native = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")

# Groups of 0 to 5 kept samples, in no order.
IDS = torch.repeat_interleave(torch.arange(6), 5)
KEPT = torch.arange(30) % 5 < IDS
ORDER = torch.randperm(30, generator=torch.Generator().manual_seed(0))
REWARDS = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["reference", pytest.param("native", marks=native), pytest.param("triton", marks=interpreted)])
def backend(request):
    with fusedpo.backend(request.param):
        yield request.param


@pytest.mark.parametrize("name", ESTIMATORS)
def test_zero(backend, name, monkeypatch):
    smallest, options = ESTIMATORS[name]
    estimator = getattr(advantages, name)
    rewards = (torch.arange(30) % 5 == 1).double() if name == "passk" else REWARDS
    large = smallest <= IDS
    expected = torch.zeros_like(rewards)
    expected[large] = estimator(rewards[large], group_ids=IDS[large], mask=KEPT[large], **options)
    assert (expected != 0).sum() > 1

    def check():
        rows = estimator(rewards, group_size=5, mask=KEPT, small_groups="zero", **options)
        torch.testing.assert_close(rows, expected)
        assert torch.equal(rows == 0, expected == 0)
        given = {"group_ids": IDS[ORDER] - 3, "mask": KEPT[ORDER], "small_groups": "zero"}
        torch.testing.assert_close(estimator(rewards[ORDER], **given, **options), expected[ORDER])
        few = estimator(rewards[:3], group_size=1, small_groups="zero", **options)
        assert few.tolist() == [0, 0, 0]
        assert estimator(rewards[:0], group_size=5, small_groups="zero", **options).shape == (0,)

    check()
    monkeypatch.setattr(_checks, "values_are_free", lambda *tensors: False)  # as on a GPU
    check()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_error_is_the_default(backend, name):
    options = ESTIMATORS[name][1]
    estimator, few = getattr(advantages, name), {"mask": KEPT[5:10], "group_size": 5}
    for more in ({}, {"small_groups": "error"}):
        with pytest.raises(ValueError, match="group 0 has size 1"):
            estimator(torch.ones(5), **few, **options, **more)
    with pytest.raises(ValueError, match=r"small_groups must be one of \('error', 'zero'\), got 'nan'"):
        estimator(torch.ones(5), **few, **options, small_groups="nan")


def test_a_nan_is_no_small_group(backend):
    rewards = torch.tensor([torch.nan, 1.0, 2.0, 0.0, 1.0, 2.0])
    result = advantages.maxpo(rewards, k=2, group_size=3, small_groups="zero")
    assert result.isnan().tolist() == [True] * 3 + [False] * 3
