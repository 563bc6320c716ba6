"""The cases of ``python -m fusedpo bench --quick`` under pytest-benchmark, to follow a regression: ``pytest bench/``,
or ``pytest --pyargs fusedpo.bench`` where only the package is.

pytest bench/ -k "one_pass and fusedpo" --benchmark-autosave
pytest bench/ --benchmark-compare --benchmark-compare-fail=median:10%
"""

import importlib

import pytest
import torch
from fusedpo.bench import OPERATORS
from fusedpo.bench.harness import Case, Provider

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pairs() -> list:
    found = []
    for operator in OPERATORS:
        torch.manual_seed(0)
        for case in importlib.import_module(f"fusedpo.bench.{operator}").cases(DEVICE, True, [torch.bfloat16]):
            found += [pytest.param(case, p, id=f"{operator}: {case.name}: {p.name}") for p in case.providers]
    return found


@pytest.mark.parametrize(("case", "provider"), pairs())
def test_bench(benchmark, case: Case, provider: Provider) -> None:
    if provider.missing:
        pytest.skip(provider.missing)
    benchmark.group = case.name
    run = provider.prepare()
    if provider.reset is not None:
        provider.reset()
    result = run()
    if provider.check is not None:
        error = benchmark.extra_info["error"] = provider.check(result)
        assert error <= provider.allowed

    def synchronous() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def setup() -> None:  # pytest-benchmark would take what reset() returns for arguments
        if provider.reset is not None:
            provider.reset()

    benchmark.pedantic(synchronous, setup=setup, rounds=5, warmup_rounds=1)
