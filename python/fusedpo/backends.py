"""Which implementation of an operator runs where, and why not another.

``reference`` is plain PyTorch and runs everywhere; ``native`` is C++ and CUDA; ``triton`` is for accelerators (and for
the CPU under ``TRITON_INTERPRET=1``). ``auto`` takes the first of the device's order that can run; a backend that was
forced never falls back. What is forced is a module global: a ``ContextVar`` would break the graph under
``torch.compile``, and autograd runs backwards, and what checkpoints compute again, in threads of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from contextlib import ContextDecorator
from pathlib import Path
from types import TracebackType

import torch

from . import _checks

BACKENDS = ("reference", "native", "triton")

# What each operator has been written for, by backend and device type.
IMPLEMENTATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "token_logprobs": {"native": ("cpu",), "triton": ("cuda", "xpu")},
    "token_statistics": {"native": ("cpu",), "triton": ("cuda", "xpu")},
    "linear_token_logprobs": {"native": ("cpu",), "triton": ("cuda", "xpu")},
    "one_pass": {"native": ("cpu", "cuda"), "triton": ("cuda", "xpu")},
    "exact_kl": {"native": ("cpu",), "triton": ("cuda", "xpu")},
    "policy_loss": {"native": ("cpu", "cuda"), "triton": ("cuda", "xpu")},
    "group_advantages": {"native": ("cpu", "cuda"), "triton": ("cuda", "xpu")},
    "token_advantages": {"native": ("cpu", "cuda"), "triton": ("cuda", "xpu")},
    "step_advantages": {"native": ("cpu", "cuda"), "triton": ("cuda", "xpu")},
    "whiten": {"native": ("cpu", "cuda"), "triton": ("cuda", "xpu")},
    "whiten (process group)": {},
    "optimal_token_baseline": {},
}

# Kernels that run only when their backend is forced: nothing in bench/results shows yet that they are right and faster.
_UNPROVEN = {("one_pass", "native", "cuda")}

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_ORDER = {"cpu": ("native",), "cuda": ("native", "triton")}  # then the reference; other devices: triton


class BackendUnavailable(RuntimeError):
    """A backend that was asked for cannot run here; the message says why."""


def _load_native() -> str | None:
    """Loads the native operators; returns why they are missing, if they are."""
    try:
        from ._build import NATIVE_MISSING
    except ImportError:
        NATIVE_MISSING = None
    if NATIVE_MISSING is not None:
        return NATIVE_MISSING
    library = Path(__file__).with_name("libfusedpo.so")
    if not library.exists():
        return f"{library} is not there: these are sources that have not been built"
    try:
        torch.ops.load_library(str(library))  # registers the operators
        importlib.import_module("fusedpo._C")
    except (OSError, ImportError) as error:
        return f"the native library does not load: {error}"
    return None


def _has_cuda_kernels() -> bool:
    if NATIVE_MISSING is not None:
        return False
    from . import _C

    return bool(_C.build_info()["cuda_architectures"])


def _warn_where_fusedpo_is_imported(message: str) -> None:
    """A warning at the line outside of the package, however many modules of it and of the import lie between."""
    inside = (str(Path(__file__).parent) + os.sep, "<frozen ", importlib.__file__)
    frame = sys._getframe()
    while frame.f_back and frame.f_code.co_filename.startswith(inside):
        frame = frame.f_back
    module = frame.f_globals.get("__name__", "<unknown>")
    warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno, module)


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    importlib.import_module("fusedpo.triton_kernels")  # registers the operators

    return None


NATIVE_MISSING = _load_native()
HAS_CUDA_KERNELS = _has_cuda_kernels()
TRITON_MISSING = _triton_missing()
if NATIVE_MISSING is not None and os.environ.get("FUSEDPO_NATIVE") != "0":
    _warn_where_fusedpo_is_imported(f"fusedpo runs without its native kernels: {NATIVE_MISSING}")


def _parse(name: str) -> str | None:
    if name in ("", "auto"):
        return None
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {_checks.brief(name)}")
    return name


class _Choice:
    """Compared by identity."""

    def __init__(self, name: str | None) -> None:
        self.name = name


# What the environment chose, and every context that is open, in the order in which they were entered, whatever their
# thread. Threads need no lock: each operation on the list is atomic.
_choices = [_Choice(_parse(os.environ.get("FUSEDPO_BACKEND", "")))]
_forced = _choices[-1].name  # compiled code is guarded by this alone, not by how many contexts are open


def _follow() -> None:
    """Brings ``_forced`` up to date; whoever writes it last has seen the list as it is."""
    global _forced
    followed = None
    while followed is not _choices[-1]:
        followed = _choices[-1]
        _forced = followed.name


class backend(ContextDecorator):
    """``with fusedpo.backend("reference"): ...`` forces one implementation; ``"auto"`` lifts that. Also a decorator.

    It holds for all threads of the process while it is open: of several, the one entered last. The environment variable
    ``FUSEDPO_BACKEND`` does the same for a whole process. Raises ``ValueError`` for an unknown name; an operator that
    the forced backend cannot run raises :class:`BackendUnavailable`. There is one implementation, which runs whatever
    is forced, of ``next_tokens``, ``shift``, ``aggregate``, ``global_denominator``, ``value_loss``,
    ``importance_weights``, ``rejection_mask``, ``clip_cov_weights``, ``kl_cov_penalty`` and ``rewards_on_kept``.
    """

    def __init__(self, name: str) -> None:
        self._name = _parse(name)
        self._entered: list[_Choice] = []  # an object may be entered more than once

    def __enter__(self) -> None:
        choice = _Choice(self._name)
        self._entered.append(choice)
        _choices.append(choice)
        _follow()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _choices.remove(self._entered.pop())
        _follow()


def forced() -> str | None:
    """The backend that is forced, if one is."""
    return _forced


def why_not(name: str, operator: str, device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why backend ``name`` cannot run ``operator`` on ``device`` (a device type) for ``dtype``; None if it can."""
    if name == "reference":
        return None
    devices = IMPLEMENTATIONS[operator].get(name)
    if devices is None:
        return f"{operator} has no {name} kernel"
    if name == "native" and NATIVE_MISSING is not None:
        return NATIVE_MISSING
    if name == "triton" and TRITON_MISSING is not None:
        return TRITON_MISSING
    interpreted = name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device not in devices and not interpreted:
        return f"the {name} kernel of {operator} runs on {', '.join(devices)}, not on {device}"
    if name == "native" and device == "cuda" and not HAS_CUDA_KERNELS:
        return "the native library was built without CUDA kernels; a build with FUSEDPO_CUDA=1 has them"
    if (operator, name, device) == ("one_pass", "native", "cuda") and torch.cuda.get_device_capability() < (9, 0):
        return "the native kernel of one_pass needs a device of compute capability 9.0"
    if dtype not in _KERNEL_DTYPES:
        return f"kernels compute in float32 for {', '.join(str(d) for d in _KERNEL_DTYPES)}, not for {dtype}"
    return None


def kernel_for(operator: str, device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """The backend whose kernel runs ``operator`` for tensors of this device type and dtype; None: the reference does.

    A kernel that spares work of others may be missing from the backend that was forced: then they do the work.
    """
    if _forced is not None:
        return _forced if _forced != "reference" and why_not(_forced, operator, device, dtype) is None else None
    for name in _ORDER.get(device, ("triton",)):
        if (operator, name, device) not in _UNPROVEN and why_not(name, operator, device, dtype) is None:
            return name
    return None


def rows_at_a_time(device: torch.device, row_bytes: int) -> tuple[int, int]:
    """How many rows of logits the Triton kernel of one_pass can have in the L2 cache, and how many it would need there.

    It needs one for each multiprocessor, and reads each again while it is there: 2/3 of the cache are for them.
    """
    processors, cache = 128, 48 << 20
    if device.type == "cuda" and torch.version.hip is None:  # ROCm knows the L2 of one die, and not what lies beyond it
        properties = torch.cuda.get_device_properties(device)
        processors, cache = properties.multi_processor_count, properties.L2_cache_size
    return max(1, min(processors, cache * 2 // 3 // row_bytes)), processors


def takes_two_passes(logits: torch.Tensor, backend: str) -> bool:
    """Whether they are predicted to be faster: more than a fifth of the device would have no row to walk.

    Not where a backend was forced.
    """
    if _forced is not None or backend != "triton" or logits.device.type == "cpu":
        return False
    row_bytes = logits.shape[-1] * logits.element_size()
    rows, processors = rows_at_a_time(logits.device, max(1, row_bytes))
    return 5 * min(rows, logits.shape[:-1].numel()) < 4 * processors


def choose(operator: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend that runs ``operator`` for tensors of this device type and dtype."""
    name, choice = kernel_for(operator, device, dtype), _forced
    if name is None and choice not in (None, "reference"):
        reason = why_not(choice, operator, device, dtype)
        raise BackendUnavailable(f"backend {choice!r} was forced for {operator}, but {reason}")
    return name or "reference"
