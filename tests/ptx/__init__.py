"""A machine for PTX: executes compiled kernels on the CPU, and finds what is wrong with them. See README.md."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MACHINE = Path(__file__).parent / "machine"
BUILD = Path(__file__).parent.parent.parent / "build" / "ptx"
COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-frounding-math", "-fPIC", "-Wall", "-Wextra"]


class Found(AssertionError):
    """What the machine found, or why it could not go on."""


@dataclasses.dataclass(frozen=True)
class Options:
    races: bool = True
    noise: int = 0  # units in the last place that approximate instructions are off by, at most
    late_copies: bool = True  # bulk copies arrive when somebody waits for them
    seed: int = 0  # not 0: warps take turns at random


class _Region(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_uint64), ("bytes", ctypes.c_uint64), ("written", ctypes.c_void_p)]


class _Options(ctypes.Structure):
    _fields_ = [(field.name, ctypes.c_int) for field in dataclasses.fields(Options)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32),
        ("dynamic_shared", ctypes.c_uint32),
        ("parameters", ctypes.c_char_p),
        ("num_regions", ctypes.c_uint32),
        ("regions", ctypes.POINTER(_Region)),
        ("options", _Options),
        ("counters", ctypes.c_uint64 * 21),
    ]


@dataclasses.dataclass(frozen=True)
class Region:
    """Memory that a kernel may access; ``written`` has a byte for every byte, not 0 where something was written."""

    begin: int
    size: int
    written: bytearray | None = None


def build() -> Path:
    """The library, compiled once for these sources, this compiler and this processor."""
    assert COMPILER is not None
    sources = sorted(MACHINE.iterdir())
    macros = subprocess.run([COMPILER, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull], check=True, capture_output=True)
    content = b"".join(source.read_bytes() for source in sources)
    digest = hashlib.sha256(macros.stdout + content + repr(FLAGS).encode()).hexdigest()[:16]
    library = BUILD / f"libptx-{digest}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that test side by side
        if not library.exists():
            objects = [BUILD / f"{s.stem}-{digest}.o" for s in sources if s.suffix == ".cpp"]

            def compile_one(target: Path) -> None:
                source = MACHINE / f"{target.stem.rpartition('-')[0]}.cpp"
                subprocess.run([COMPILER, *FLAGS, "-c", source, "-o", target], check=True)

            with ThreadPoolExecutor(2) as pool:
                list(pool.map(compile_one, objects))
            part = library.with_suffix(".part")
            subprocess.run([COMPILER, "-shared", *objects, "-o", part], check=True)
            part.replace(library)
            for target in objects:
                target.unlink()
    return library


@functools.cache
def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build()))
    library.ptx_load.restype = ctypes.c_void_p
    library.ptx_load.argtypes = [ctypes.c_char_p]
    library.ptx_free.argtypes = [ctypes.c_void_p]
    library.ptx_error.restype = ctypes.c_char_p
    library.ptx_error.argtypes = [ctypes.c_void_p]
    library.ptx_parameters.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]
    library.ptx_launch.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(_Launch)]
    library.ptx_counter_name.restype = ctypes.c_char_p
    return library


def named_counters(values: Sequence[int]) -> dict[str, int]:
    return {_load().ptx_counter_name(i).decode(): value for i, value in enumerate(values)}


_options = Options()
_recorded: list[tuple[str, dict[str, int]]] | None = None


@contextlib.contextmanager
def options(**changes: int) -> Iterator[None]:
    """Launches with other options."""
    global _options
    before = _options
    _options = dataclasses.replace(before, **changes)
    try:
        yield
    finally:
        _options = before


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, dict[str, int]]]]:
    """The launches within: kernels, and their counters."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def runs_triton() -> bool:
    """Whether Triton kernels are launched on the machine."""
    device = sys.modules.get("ptx.triton_device")
    return device is not None and device.is_installed()


class Module:
    """The kernels of a text of PTX."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._library = _load()
        self._handle = self._library.ptx_load(text.encode())
        self._raise_error()

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._library.ptx_free(self._handle)

    def _raise_error(self) -> None:
        if error := self._library.ptx_error(self._handle):
            raise Found(error.decode(errors="replace"))

    def pack(self, kernel: str, values: Sequence[bytes]) -> bytes:
        """The parameters of a kernel; those that no value is given for are 0."""
        offsets, sizes = (ctypes.c_int * 256)(), (ctypes.c_int * 256)()
        count = self._library.ptx_parameters(self._handle, kernel.encode(), offsets, sizes)
        assert len(values) <= count, f"{len(values)} values for {count} parameters of {kernel}"
        parameters = bytearray(max((offsets[i] + sizes[i] for i in range(count)), default=0))
        for i, value in enumerate(values):
            assert len(value) == sizes[i], f"{len(value)} bytes for parameter {i} of {kernel}, which has {sizes[i]}"
            parameters[offsets[i] : offsets[i] + sizes[i]] = value
        return bytes(parameters)

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: int,
        parameters: bytes,
        regions: Sequence[Region],
        dynamic_shared: int = 0,
        cluster: int = 1,
    ) -> dict[str, int]:
        """Runs a kernel, and returns what was counted. Raises Found."""

        def address(written: bytearray | None) -> int | None:
            return None if written is None else ctypes.addressof(ctypes.c_char.from_buffer(written))

        arrays = [_Region(r.begin, r.size, address(r.written)) for r in regions]
        launch = _Launch(
            (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * 3)(block, 1, 1),
            cluster,
            dynamic_shared,
            parameters,
            len(arrays),
            (_Region * max(1, len(arrays)))(*arrays),
            _Options(*dataclasses.astuple(_options)),
        )
        failed = self._library.ptx_launch(self._handle, kernel.encode(), launch)
        counters = named_counters(launch.counters)
        if _recorded is not None:
            _recorded.append((kernel, counters))
        if failed:
            self._raise_error()
        return counters
