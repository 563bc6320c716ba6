"""Where the tests of the Triton kernels run: on a GPU if there is one, else in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import fusedpo
from fusedpo import _chosen

triton = pytest.importorskip("triton")
tl = triton.language

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def interpreter_fails() -> bool:
    """Triton 3.6's interpreter takes int() of an array of one element, which NumPy 2.4 refuses."""
    return DEVICE == "cpu" and triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0"


pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(interpreter_fails(), reason=interpreter_fails.__doc__),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # NumPy's, of inf and NaN
]


@pytest.fixture(autouse=True, scope="module")
def _backend() -> Iterator[None]:
    """Everything in a file that imports this runs the Triton kernels, on DEVICE.

    The interpreter replaces the functions of the language at every call of a device function, most of its time: it may
    do so once. It truncates where a GPU rounds to bfloat16.
    """
    with pytest.MonkeyPatch.context() as patch, torch.device(DEVICE), fusedpo.backend("triton"):
        if DEVICE == "cpu":
            from triton.runtime import interpreter

            replace, convert = interpreter._patch_lang, interpreter._convert_float

            def replace_once(function: Callable[..., Any]) -> Any:
                languages = [x for x in function.__globals__.values() if x is tl or x is tl.core]
                missing = any(tl.core.is_builtin(language.load) for language in languages)
                return replace(function) if missing else interpreter._LangPatchScope()

            def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
                if (source, target) != (tl.float32, tl.bfloat16):
                    return convert(data, source, target, mode)
                return torch.from_numpy(np.array(data)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

            patch.setattr(interpreter, "_patch_lang", replace_once)
            patch.setattr(interpreter, "_convert_float", rounded)
        yield


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 128 logits have several blocks, windows of four tokens several chunks, nine rows three segments."""
    from fusedpo.triton_kernels import one_pass

    monkeypatch.setattr(_chosen, "WALK", (32, 1))
    monkeypatch.setattr(one_pass, "_BLOCK", 128)
    monkeypatch.setattr(one_pass, "_CHUNK", 4)
    use_segments(monkeypatch, 3)


def use_segments(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    from fusedpo.triton_kernels import one_pass

    monkeypatch.setattr(one_pass, "_num_segments", lambda device, num_rows, row_bytes: min(count, num_rows))
