"""CUDA kernels run on the CPU: as nvcc compiles them, by the machine of tests/ptx, see as_compiled.h; or compiled by
the host's C++ compiler, for its sanitizers, see cuda_on_cpu.h."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ptx
import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")


@functools.cache
def find_nvcc() -> str | None:
    """That of CUDA_HOME, of PATH, or of the package nvidia-cuda-nvcc."""
    places = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    found = shutil.which("nvcc", path=str(places[0])) if places else shutil.which("nvcc")
    package = importlib.util.find_spec("nvidia")
    places = [] if package is None else [Path(place) for place in package.submodule_search_locations or ()]
    return found or next((str(nvcc) for place in places for nvcc in place.glob("cu*/bin/nvcc")), None)


NVCC = find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc: CUDA kernels are not executed as compiled")

# In the order of DType in csrc/core/array.h.
DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)

# What csrc/cuda/*.cu instantiate for each type of elements.
INSTANCES = {
    "one_pass": ("row_kernel<T>(OnePass, bool)", "scale_kernel<T>(Scaling)"),
    "row_stats": ("row_stats_kernel<T>(RowStatsCall)", "shard_gradient_kernel<T>(ShardGradientCall)"),
}
ELEMENTS = ("float", "__half", "__nv_bfloat16")

Argument = Tensor | float | int | bool | None


def make_once(name: str, command: Sequence[str | Path], sources: Iterable[Path], compiler: str) -> Path:
    """What a command makes of these sources, kept for other tests and processes."""
    content = [compiler.encode(), repr(command).encode(), *(path.read_bytes() for path in sorted(sources))]
    digest = hashlib.sha256(b"".join(content)).hexdigest()[:16]
    target = ptx.BUILD / f"{name}-{digest}"
    ptx.BUILD.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            part = target.with_suffix(".part")
            subprocess.run([*command, "-o", part], check=True)
            part.replace(target)
    return target


def native_sources() -> list[Path]:
    return [path for path in CSRC.rglob("*.*") if path.suffix in (".cu", ".cuh", ".h")]


@functools.cache
def compiler_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout


def build(name: str, program: Path, *flags: str | Path) -> Path:
    """Compiles ``name.cpp`` of this directory; ``program`` becomes a link."""
    assert COMPILER is not None
    flags = (
        "-std=c++20",
        "-O1",
        "-g1",  # lines, for what sanitizers say
        "-ffp-contract=off",
        "-pthread",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-include",
        HERE / "cuda_on_cpu.h",
        *(("-include", HERE / "cluster.h") if name in ("one_pass", "row_stats") else ()),
        *("-I", CSRC, HERE / f"{name}.cpp"),
        *flags,
    )
    sources = [*native_sources(), *HERE.glob("*.h"), HERE / f"{name}.cpp", ptx.MACHINE / "ptx.h"]
    program.symlink_to(make_once(f"{name}-on-cpu", [COMPILER, *flags], sources, compiler_version(COMPILER)))
    return program


def build_with_sanitizer(name: str, program: Path, sanitizer: str) -> Path:
    return build(name, program, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")


def build_as_compiled(name: str, program: Path, architecture: int = 90) -> Path:
    """Likewise, but it runs what nvcc makes of ``csrc/cuda/name.cu``; without nvcc, see build()."""
    if NVCC is None:
        return build(name, program)
    library = ptx.build()
    build(name, program, "-DCUDA_AS_COMPILED", "-rdynamic", library, f"-Wl,-rpath,{library.parent}", "-ldl")
    program.with_suffix(".ptx").write_text(compile_to_ptx(name, architecture))
    return program


def for_architecture(program: Path, architecture: int, directory: Path) -> Path:
    """A program of build_as_compiled, with code for another architecture."""
    directory.mkdir()
    other = directory / program.name
    other.symlink_to(program)
    other.with_suffix(".ptx").write_text(compile_to_ptx(program.name, architecture))
    return other


def for_others(program: Path, architectures: Iterable[int], directory: Path) -> Iterator[Path]:
    """One of build_as_compiled, for each of the architectures that has a code of its own."""
    for architecture in other_codes(program.name, 90, architectures):
        yield for_architecture(program, architecture, directory / str(architecture))


def other_codes(name: str, known: int, architectures: Iterable[int]) -> list[int]:
    """Architectures with a code that neither the known one nor another in the list has."""
    first: dict[str, int] = {}
    for architecture in (known, *architectures):
        text = compile_to_ptx(name, architecture).partition(".entry")[2].partition("\n\t.file")[0]
        lines = re.sub(r"^\s*(\.loc|//|\$L__tmp).*\n", "", text, flags=re.M)  # where in the sources
        first.setdefault(lines, architecture)
    return [architecture for architecture in first.values() if architecture != known]


def nvcc_version() -> str:
    assert NVCC is not None
    return compiler_version(NVCC)


def nvcc_release() -> str:
    return nvcc_version().partition("release ")[2].partition(",")[0]


def kernel_name(symbol: str) -> str:
    """Without namespaces and types."""
    return re.findall(r"\d([a-z_]+_kernel)", symbol)[-1]


def read_counters(path: Path) -> list[tuple[str, dict[str, int]]]:
    """The launches that were recorded in a file by PTX_COUNTERS: kernels, and their counters."""
    launches = []
    for line in path.read_text().splitlines():
        symbol, *values = line.split()
        launches.append((kernel_name(symbol), ptx.named_counters([int(value) for value in values])))
    return launches


def kernels_alone(name: str) -> Path:
    """``csrc/cuda/name.cu`` without what is the same for every architecture, and takes three times as long."""
    lines = [f'#include "cuda/{name}.cuh"', "namespace fusedpo {"]
    for kernel in INSTANCES.get(name, ()):
        declaration = f"template __global__ void {kernel};".replace("(", "(const __grid_constant__ ")
        lines += [declaration.replace("<T>", f"<{element}>") for element in ELEMENTS]
    source = ptx.BUILD / f"{name}-{os.getpid()}.cu"
    ptx.BUILD.mkdir(parents=True, exist_ok=True)
    source.write_text("\n".join([*lines, "}", ""]))
    target = source.with_name(f"{name}.cu")
    source.replace(target)
    return target


def compile_to_ptx(name: str, architecture: int) -> str:
    """What nvcc makes of ``csrc/cuda/name.cu``, once for these sources; but for 9.0, of its kernels alone."""
    assert NVCC is not None
    command = [NVCC, "-std=c++17", "-O3", "-fmad=false", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += ["-Werror", "all-warnings", "-I", str(CSRC), "-isystem", str(Path(torch.__file__).parent / "include")]
    command += [f"-arch=compute_{architecture}", "-ptx", "-lineinfo"]
    source = CSRC / "cuda" / f"{name}.cu" if architecture == 90 else kernels_alone(name)
    return make_once(f"{name}-ptx", [*command, source], [*native_sources(), source], nvcc_version()).read_text()


class Kernel(NamedTuple):
    """What a thread of device code takes, in registers and in bytes of local memory."""

    name: str
    registers: int
    stack: int
    spilled: int


def kernels_of(name: str, architecture: int) -> list[Kernel]:
    """What ptxas makes of ``csrc/cuda/name.cu``."""
    assert NVCC is not None
    ptxas = [Path(NVCC).with_name("ptxas"), f"-arch=sm_{architecture}", "-v", "-Werror", "-o", os.devnull, "-"]
    text = compile_to_ptx(name, architecture)
    output = subprocess.run(ptxas, input=text, check=True, capture_output=True, text=True).stderr
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    found = re.findall(pattern, output, re.S)
    assert len(found) == text.count(".entry ")
    return [Kernel(kernel, int(used), int(stack), int(out) + int(back)) for kernel, stack, out, back, used in found]


def compile_to_machine_code(name: str, architecture: int) -> bytes:
    """What ptxas makes of that."""
    assert NVCC is not None
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / f"{name}.ptx", Path(directory) / f"{name}.cubin"
        source.write_text(compile_to_ptx(name, architecture))
        command = [NVCC, f"-arch=sm_{architecture}", "-cubin", source, "-o", target]
        subprocess.run(command, check=True, capture_output=True)
        return target.read_bytes()


def run(
    program: Path, calls: Sequence[Sequence[Argument]], results: Sequence[tuple[torch.Size, torch.dtype]]
) -> list[Tensor]:
    """Runs all calls in one process; ``results`` are the shapes and dtypes of what they return, one after the other."""
    source, target = program.with_suffix(".in"), program.with_suffix(".out")
    source.write_bytes(b"".join(_pack(argument) for call in calls for argument in call))
    environment = dict(os.environ, PTX_FILE=str(program.with_suffix(".ptx")))
    finished = subprocess.run([program, source, target], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr[-5000:]
    data, tensors = bytearray(target.read_bytes()), []
    for shape, dtype in results:
        size = shape.numel() * dtype.itemsize
        tensors.append(
            torch.frombuffer(data[:size], dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
        )
        del data[:size]
    assert not data
    return tensors


def _pack(argument: Argument) -> bytes:
    if argument is None:
        return b"n"
    if isinstance(argument, float):
        return b"d" + struct.pack("<d", argument)
    if isinstance(argument, int):
        return b"i" + struct.pack("<q", argument)
    data = argument.contiguous().flatten().view(torch.uint8).numpy().tobytes() if argument.numel() else b""
    return b"t" + struct.pack("<qq", DTYPES.index(argument.dtype), len(data)) + data
