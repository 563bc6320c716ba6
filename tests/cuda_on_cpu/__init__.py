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
from collections.abc import Sequence
from pathlib import Path

import ptx
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

Argument = Tensor | float | int | bool | None


def build(name: str, program: Path, *flags: str | Path) -> Path:
    """Compiles ``name.cpp`` of this directory."""
    assert COMPILER is not None
    flags = (
        "-std=c++20",
        "-O1",
        "-g",
        "-ffp-contract=off",
        "-pthread",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-include",
        HERE / "cuda_on_cpu.h",
        *(("-include", HERE / "cluster.h") if name == "one_pass" else ()),
        *("-I", CSRC, HERE / f"{name}.cpp", "-o", program),
        *flags,
    )
    subprocess.run([COMPILER, *flags], check=True)
    return program


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
    other = directory / program.name
    other.symlink_to(program)
    other.with_suffix(".ptx").write_text(compile_to_ptx(program.name, architecture))
    return other


@functools.cache
def nvcc_version() -> str:
    assert NVCC is not None
    return subprocess.run([NVCC, "--version"], check=True, capture_output=True, text=True).stdout


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


def compile_to_ptx(name: str, architecture: int) -> str:
    """What nvcc makes of ``csrc/cuda/name.cu``, once for these sources."""
    assert NVCC is not None
    command = [NVCC, "-std=c++17", "-O3", "-fmad=false", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += ["-I", str(CSRC), "-isystem", str(Path(torch.__file__).parent / "include")]
    command += [f"-arch=compute_{architecture}", "-ptx", "-lineinfo", str(CSRC / "cuda" / f"{name}.cu")]
    sources = b"".join(path.read_bytes() for path in sorted(CSRC.rglob("*.*")) if path.suffix in (".cu", ".cuh", ".h"))
    digest = hashlib.sha256(nvcc_version().encode() + sources + repr(command).encode()).hexdigest()[:16]
    target = ptx.BUILD / f"{name}-{digest}.ptx"
    with (ptx.BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            part = target.with_suffix(".part")
            subprocess.run([*command, "-o", part], check=True, capture_output=True)
            part.replace(target)
    return target.read_text()


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
