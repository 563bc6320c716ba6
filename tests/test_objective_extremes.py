"""Every part of an objective at the ends of its domain, token by token against the reference in float64.

Compared is each element with itself, not with the largest: where terms cancel, or one is infinite and the other 0, it
shows. Every implementation takes part: the reference in float32, C++ (by other instruction sets in
test_cpu_kernels.py), CUDA as nvcc compiles it.
"""

from __future__ import annotations

import cuda_on_cpu
import pytest
from support import policy_loss_cuda as cuda
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


@cuda.on_the_cpu
def test_cuda(tmp_path):
    program = cuda_on_cpu.build_as_compiled("policy_loss", tmp_path / "policy_loss")
    calls = [cuda.call(batch_of(name), parts, True) for name, parts in OBJECTIVES.items()]
    for name, call, (loss, _, gradient, *_) in zip(OBJECTIVES, calls, cuda.run(program, calls), strict=True):
        compare(name, [loss, gradient], [call.expected[0], call.expected[2]])
