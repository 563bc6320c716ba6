"""Estimators have the same numbers in Python, C++ and Triton."""

import re
from pathlib import Path

import pytest

from fusedpo.ops.advantages import ESTIMATORS, TOKEN_ESTIMATORS

CORE = Path(__file__).parent.parent / "csrc" / "core"


def spelled(name: str) -> str:
    """``kPkpoSloo1``, ``PKPO_SLOO_1`` and ``pkpo sloo-1`` alike."""
    return re.sub("[^a-z0-9]", "", name.removeprefix("k").lower())


@pytest.mark.parametrize(
    ("header", "enumeration", "count", "names"),
    [
        ("group_advantages.h", "Estimator", "kNumEstimators", ESTIMATORS),
        ("token_advantages.h", "TokenEstimator", "kNumTokenEstimators", TOKEN_ESTIMATORS),
    ],
)
def test_cpp(header, enumeration, count, names):
    source = (CORE / header).read_text()
    (body,) = re.findall(rf"enum class {enumeration} : int32_t {{([^}}]*)}}", source)
    (number,) = re.findall(rf"constexpr int64_t {count} = (\d+);", source)
    assert [spelled(name) for name in re.findall(r"\w+", body)] == [spelled(name) for name in names]
    assert int(number) == len(names)


@pytest.mark.triton
def test_triton():
    import triton.language as tl
    from fusedpo.triton_kernels import advantages

    numbers = {spelled(name): i for names in (ESTIMATORS, TOKEN_ESTIMATORS) for i, name in enumerate(names)}
    constants = {name: x.value for name, x in vars(advantages).items() if isinstance(x, tl.constexpr)}
    known = {spelled(name): number for name, number in constants.items() if spelled(name) in numbers}
    assert len(known) >= len(ESTIMATORS) // 2
    assert known == {name: numbers[name] for name in known}
