"""The instruction sets that the CPU kernels are built for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
FLAGS["avx512_bf16"] = [*FLAGS["avx512"], "-mavx512bf16"]
LEVEL = {"DEFAULT": 0, "NO AVX": 0, "AVX2": 1, "AVX512": 2}.get(torch.backends.cpu.get_cpu_capability(), 0)
LEVEL += LEVEL == 2 and torch.cpu._is_avx512_bf16_supported()
BUILDS = [
    pytest.param(name, marks=pytest.mark.skipif(level > LEVEL, reason=f"this processor has no {name}"))
    for level, name in enumerate(FLAGS)
]
# But for the one that is taken anyway.
OTHER_BUILDS = [pytest.param(name) for level, name in enumerate(FLAGS) if level < LEVEL]

RUN = """
import sys
import pytest
from fusedpo import _C
assert _C.build_info()["cpu_capability"] == sys.argv[1]
sys.exit(pytest.main(["-q", "-x", *sys.argv[2:]]))
"""


def output_of(name: str, build: str, directory: Path, *flags: str) -> str:
    """What the program of tests/cpp prints, compiled for an instruction set."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program, tests = directory / name, Path(__file__).parent.parent
    source = [str(tests / "cpp" / f"{name}.cpp"), "-I", str(tests.parent / "csrc"), f"-DFUSEDPO_ISA={build}"]
    flags = ("-std=c++17", "-w", "-ffp-contract=off", *flags, *FLAGS[build])
    subprocess.run([compiler, *flags, *source, "-o", str(program)], check=True)
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout


def run_tests(build: str, *arguments: str) -> None:
    """Tests in a process that is forced to an instruction set; they must pass, and there must be some."""
    environment = {**os.environ, "FUSEDPO_CPU_CAPABILITY": build}
    command = [sys.executable, "-c", RUN, build, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
