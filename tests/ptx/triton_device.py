"""A device for Triton: its binaries are PTX, its memory is that of the CPU, and the machine executes its kernels."""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from triton import knobs
from triton.backends.compiler import GPUTarget

from . import Module, Region

ARCHITECTURES = (80, 90, 100, 120)
# Bytes of shared memory that a block may have.
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}


@functools.lru_cache(maxsize=256)
def module(text: str) -> Module:
    return Module(text)


_change: Callable[[str, str], str] | None = None


@contextlib.contextmanager
def changed(change: Callable[[str, str], str]) -> Iterator[None]:
    """Kernels are launched after ``change(name, text)`` has made another text of theirs."""
    global _change
    _change = change
    try:
        yield
    finally:
        _change = None


# -------------------------------------------------------------------------------------------------- memory and launches


class Allocations:
    """What of the results of torch.empty and the like was written since: a byte for every byte of a storage.

    Memory is filled with ones when it is allocated: what the host has written since are words of 4 bytes that differ.
    """

    def __init__(self) -> None:
        self._written: dict[int, tuple[StorageWeakRef, bytearray]] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0 or tensor.device.type != "cpu" or storage.data_ptr() == 0:
            return
        _bytes(storage).fill_(0xFF)
        self._written = {k: v for k, v in self._written.items() if not v[0].expired()}
        self._written[storage.data_ptr()] = StorageWeakRef(storage), bytearray(storage.nbytes())

    def written(self, storage: torch.UntypedStorage) -> bytearray | None:
        reference, written = self._written.get(storage.data_ptr(), (None, None))
        if reference is None or reference.expired() or len(written) != storage.nbytes():
            return None
        known = torch.frombuffer(written, dtype=torch.uint8)
        differs = torch.nn.functional.pad(_bytes(storage) != 0xFF, (0, -len(written) % 4)).view(-1, 4).any(1)
        known |= differs.repeat_interleave(4)[: len(written)]
        return written


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.tensor([], dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),))


ALLOCATIONS = Allocations()


@contextlib.contextmanager
def watched_allocations() -> Iterator[None]:
    """Loads of what torch.empty and the like return, and nothing was written to, are found."""
    functions = [(torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")]
    originals = [getattr(owner, name) for owner, name in functions]

    def watched(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            tensor = original(*args, **kwargs)
            if not torch.compiler.is_compiling() and type(tensor) is Tensor:
                ALLOCATIONS.add(tensor)
            return tensor

        return allocate

    for (owner, name), original in zip(functions, originals, strict=True):
        setattr(owner, name, watched(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(functions, originals, strict=True):
            setattr(owner, name, original)


def _pack(kind: str, value: Any) -> bytes:
    if kind.startswith("*"):
        return struct.pack("<Q", value.data_ptr())
    if kind in ("fp32", "fp64"):
        return struct.pack("<f" if kind == "fp32" else "<d", value)
    bits = max(8, int(kind[1:]))
    return (int(value) & ((1 << bits) - 1)).to_bytes(bits // 8, "little")


class Launcher:
    """Launches a compiled kernel; what Triton makes of its source and metadata."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.kinds = list(source.signature.values())
        self.block = 32 * metadata.num_warps
        self.shared = metadata.shared

    def __call__(self, x: int, y: int, z: int, stream: int, kernel: tuple, *rest: Any) -> None:
        _packed, _metadata, _enter, _exit, *arguments = rest
        given = [(k, v) for k, v in zip(self.kinds, arguments, strict=True) if k != "constexpr"]
        regions = {}
        for kind, tensor in given:
            if kind.startswith("*") and tensor.numel():
                storage = tensor.untyped_storage()
                regions[storage.data_ptr()] = storage
        text, name = kernel
        compiled = module(text if _change is None else _change(name, text))
        compiled.launch(
            name,
            (x, y, z),
            self.block,
            compiled.pack(name, [_pack(kind, value) for kind, value in given]),
            [Region(begin, s.nbytes(), ALLOCATIONS.written(s)) for begin, s in regions.items()],
            self.shared,
        )


# ----------------------------------------------------------------------------------------------------------- the device


class Utilities:
    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        registers = spills = 0
        return (binary, (binary.decode(), name), registers, spills, 1024)

    def unload_module(self, handle: object) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.architecture], "multiprocessor_count": 1, "warpSize": 32}


class Device:
    """What Triton calls a driver."""

    launcher_cls = Launcher

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.utils = Utilities(architecture)

    def get_current_device(self) -> int:
        return ARCHITECTURES.index(self.architecture)  # Triton keeps what it compiled by the number of the device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def _stop_at_ptx(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str] | None:
    """Tells Triton to take PTX for the binary. Without arguments it asks what that adds to its keys."""
    if stages is None:
        return "ptx", "ptx"
    stages["cubin"] = lambda source, metadata: source.encode()
    return None


def install(architecture: int) -> None:
    """From now on Triton compiles for ``architecture``, and launches on the machine."""
    triton.runtime.driver.set_active(Device(architecture))
    knobs.runtime.add_stages_inspection_hook = _stop_at_ptx


def is_installed() -> bool:
    return isinstance(triton.runtime.driver._active, Device)


@contextlib.contextmanager
def target(architecture: int) -> Iterator[None]:
    """Another architecture."""
    before = triton.runtime.driver.active
    install(architecture)
    try:
        yield
    finally:
        triton.runtime.driver.set_active(before)
