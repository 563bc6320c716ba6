"""The builds of the CPU kernels: each instruction set by itself, and the exponential they share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.cpu_builds import BUILDS, OTHER_BUILDS, output_of, run_tests

from fusedpo import backends

TESTS = Path(__file__).parent


@pytest.mark.parametrize("build", BUILDS)
def test_error_of_the_exponential(build, tmp_path):
    """At most 2 units in the last place; for 16-bit logits 3 in the sums, and 2^-18 in the gradient, of which float16
    keeps 11 bits. Sampled over every binade in use.
    """
    output = output_of("exp2_error", build, tmp_path, "-O3")
    ulps, of_sums, relative, corners = map(float, output.split())
    assert corners == 1
    assert ulps <= 2.0
    assert of_sums <= 3.0
    assert relative <= 2**-18


# What depends on the width of the vectors: rows and what is left after the last whole vector, conversions from and to
# 16 bits, exponentials and logarithms, sums in blocks, tiles and segments, and every objective in one dtype.
OF_LOGITS = "(values and (1000 or 4099)) or extremes_of_the_dtype or subnormal or minus_inf or several_ids or long_rows"
OF_ONE_PASS = "(against_the_reference and packed and float32) or (any_vocabulary and not 151936) or depend"
OF_TOKENS = "several_tiles or threads or error_of_the_windows or kl_entropy or test_native"
ACCURACY = [f"test_{name}.py" for name in ("token_logprobs", "one_pass", "policy_loss_kernel", "objective_extremes")]


@pytest.mark.slow
@pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
@pytest.mark.parametrize("build", OTHER_BUILDS)
def test_each_build_is_right(build):
    """The accuracy tests once more, in a process that is forced to this instruction set."""
    files = [str(TESTS / name) for name in ACCURACY]
    run_tests(build, *files, "-k", " or ".join((OF_LOGITS, OF_ONE_PASS, OF_TOKENS)))


@pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
def test_unknown_capability_is_refused():
    environment = {**os.environ, "FUSEDPO_CPU_CAPABILITY": "sse9"}
    code = "from fusedpo import _C; _C.build_info()"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "FUSEDPO_CPU_CAPABILITY must be avx512_bf16, avx512, avx2 or portable, got sse9" in result.stderr
