"""Triton kernels compiled ahead of time, without a GPU, exactly as their launchers would have them compiled.

A stand-in for the driver lets a launcher run up to the point where Triton would compile. What it would compile is
recorded, and compiled for each target instead. Under TRITON_INTERPRET=1 the interpreter takes the compiler's place, so
all of this happens in a process without: ``call("test_module", "function")``.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Variant(NamedTuple):
    """What Triton would have compiled."""

    kernel: Any
    signature: dict
    constants: dict
    attributes: dict
    options: dict


class _Driver:
    """A driver whose one device nothing can be launched on."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS["sm_90"]


def variants(launch: Callable[[], object]) -> list[Variant]:
    """The distinct variants that the kernels launched by ``launch`` need."""
    found: dict[str, Variant] = {}

    def record(*, key: str, fn: Any, compile: dict, **_: Any) -> bool:
        given = json.loads(compile["specialization_data"])["options"]
        options = {name: given[name] for name in ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")}
        found[f"{fn.name}{key}"] = Variant(
            fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0], options
        )
        return True  # compile nothing, launch nothing

    triton.runtime.driver.set_active(_Driver())
    knobs.runtime.jit_cache_hook = record
    try:
        launch()
    finally:
        knobs.runtime.jit_cache_hook = None
    return list(found.values())


def compile_for(variant: Variant, target: str) -> dict:
    """A compiled variant: its constants, its intermediate code and assembly, and what a thread of it uses.

    ``registers`` of 4 bytes, and ``stack``: bytes of local memory, which is where spilled registers go.
    """
    source = ASTSource(variant.kernel, variant.signature, variant.constants, variant.attributes)
    options = {name: x for name, x in variant.options.items() if name != "maxnreg" or target.startswith("sm_")}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    names = variant.kernel.arg_names
    result = {
        "kernel": variant.kernel.__name__,
        "target": target,
        "num_warps": variant.options["num_warps"],
        "ttir": compiled.asm["ttir"],
        **{names[index]: value for (index,), value in variant.constants.items()},
    }
    if TARGETS[target].backend == "cuda":
        return result | {"asm": compiled.asm["ptx"]} | _cubin_resources(compiled.asm["cubin"])
    return result | {"asm": compiled.asm["amdgcn"]} | _amd_resources(compiled.asm["amdgcn"])


def _cubin_resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    fields = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {"registers": int(fields["REG"]), "stack": int(fields["STACK"]) + int(fields["LOCAL"])}


def _amd_resources(assembly: str) -> dict[str, int]:
    fields = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size): +(\d+)", assembly))
    stack = 4 * int(fields["vgpr_spill_count"]) + int(fields["private_segment_fixed_size"])
    return {"registers": int(fields["vgpr_count"]), "stack": stack}


def call(module: str, function: str) -> Any:
    """What a function of a test file returns in a process where Triton compiles; through JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command, tests = [sys.executable, "-m", "support.triton_aot", module, function], Path(__file__).parents[1]
    result = subprocess.run(command, env=environment, cwd=tests, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-5000:]
    return json.loads(result.stdout)


if __name__ == "__main__":
    json.dump(getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(), sys.stdout)
