"""Every part of an objective at the ends of its domain, token by token against the reference in float64.

Compared is each element with itself, not with the largest: where terms cancel, or one is infinite and the other 0, it
shows. Every implementation takes part: the reference in float32, C++ by instruction set, CUDA as nvcc compiles it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import cuda_on_cpu
import pytest
from support import policy_loss_cuda as cuda
from support.cpu_builds import OTHER_BUILDS
from support.extremes import OBJECTIVES, batch_of, compare, run

from fusedpo import backends

every_objective = pytest.mark.parametrize("name", OBJECTIVES)


@every_objective
def test_reference(name):
    compare(name, run(name, "reference"))


@pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
@every_objective
def test_native(name):
    compare(name, run(name, "native"))


@pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
@pytest.mark.parametrize("build", OTHER_BUILDS)
def test_native_build(build):
    environment = {**os.environ, "FUSEDPO_CPU_CAPABILITY": build}
    pytest_run = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "test_native and not build"]
    result = subprocess.run(pytest_run, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


@cuda.on_the_cpu
def test_cuda(tmp_path):
    program = cuda_on_cpu.build_as_compiled("policy_loss", tmp_path / "policy_loss")
    calls = [cuda.call(batch_of(name), parts, True) for name, parts in OBJECTIVES.items()]
    for name, call, (loss, _, gradient, *_) in zip(OBJECTIVES, calls, cuda.run(program, calls), strict=True):
        compare(name, [loss, gradient], [call.expected[0], call.expected[2]])
