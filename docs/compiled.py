"""Records what the compilers make of the GPU kernels, without a GPU: ``python docs/compiled.py``, in a few minutes.

nvcc compiles ``csrc/cuda/*.cu`` and Triton what its launchers would have compiled (``tests/support/triton_aot.py``),
for every architecture. Registers of a thread, and bytes of stack and spills, go to bench/results/compiled.json.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/compiled.json"
ARCHITECTURES = (80, 90, 100, 120)
NVCC = shutil.which("nvcc", path=f"{os.environ['CUDA_HOME']}/bin" if "CUDA_HOME" in os.environ else None)


class Compiled(NamedTuple):
    """One variant of a kernel; ``stack`` in bytes of a thread, which is where spilled registers go."""

    compiler: str
    kernel: str
    target: str
    registers: int
    stack: int


def by_nvcc(source: Path, architecture: int) -> list[Compiled]:
    options = ["-std=c++17", "-O3", "-fmad=false", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    include = ["-I", str(ROOT / "csrc"), "-isystem", str(Path(torch.__file__).parent / "include")]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        command = [NVCC, *options, *include, "-Xptxas", "-v", f"-arch=sm_{architecture}", "-cubin", str(source)]
        output = subprocess.run([*command, "-o", cubin.name], check=True, capture_output=True, text=True).stderr
    found = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_\d+'.*?(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads.*?Used (\d+) registers",
        output,
        re.DOTALL,
    )
    assert len(found) == output.count("Compiling entry function"), output
    return [
        Compiled("nvcc", f"{source.stem}: {_plain(name)}", f"sm_{architecture}", int(registers), max(map(int, spills)))
        for name, *spills, registers in found
    ]


def _plain(mangled: str) -> str:
    """The function's own name."""
    demangled = subprocess.run(["c++filt", "-p", mangled], check=True, capture_output=True, text=True).stdout.strip()
    return re.sub(r"<.*", "", demangled).rsplit("::", 1)[-1]


def by_triton(module: str) -> list[Compiled]:
    sys.path.insert(0, str(ROOT / "tests"))
    from support import triton_aot

    family = re.sub(r"test_triton_|_?compile", "", module) or "logprobs"
    return [
        Compiled("triton", f"{family}: {r['kernel'].strip('_')}", r["target"], r["registers"], r["stack"])
        for r in triton_aot.call(module, "compile_cases")
    ]


def main() -> None:
    rows: list[Compiled] = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
        modules = sorted(path.stem for path in (ROOT / "tests").glob("test_triton_*compile.py"))
        jobs = [pool.submit(by_nvcc, source, sm) for source in sources for sm in ARCHITECTURES]
        jobs += [pool.submit(by_triton, module) for module in modules]
        for job in jobs:
            rows += job.result()
    nvcc = subprocess.run([str(NVCC), "--version"], check=True, capture_output=True, text=True).stdout
    versions = {"nvcc": re.search(r"release ([\d.]+)", nvcc)[1], "triton": triton.__version__}
    document = {"date": datetime.date.today().isoformat(), **versions, "rows": [r._asdict() for r in rows]}
    RESULTS.write_text(json.dumps(document, indent=None).replace("{", "\n{") + "\n")


if __name__ == "__main__":
    main()
