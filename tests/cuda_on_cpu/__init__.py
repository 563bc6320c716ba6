"""CUDA kernels compiled by the host's C++ compiler and run on the CPU: see cuda_on_cpu.h."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")

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


def build(name: str, program: Path, *flags: str) -> Path:
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
        "-include",
        HERE / "cuda_on_cpu.h",
        *flags,
    )
    subprocess.run([COMPILER, *flags, "-I", CSRC, HERE / f"{name}.cpp", "-o", program], check=True)
    return program


def run(
    program: Path, calls: Sequence[Sequence[Argument]], results: Sequence[tuple[torch.Size, torch.dtype]]
) -> list[Tensor]:
    """Runs all calls in one process; ``results`` are the shapes and dtypes of what they return, one after the other."""
    source, target = program.with_suffix(".in"), program.with_suffix(".out")
    source.write_bytes(b"".join(_pack(argument) for call in calls for argument in call))
    finished = subprocess.run([program, source, target], capture_output=True, text=True)
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
