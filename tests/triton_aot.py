"""Triton kernels compiled ahead of time, without a GPU, as their launchers would have them compiled.

A stand-in for the driver lets launchers run up to the point where Triton would compile: what it would compile is recorded, and
compiled for each target instead. The interpreter replaces the compiler in a process that runs with TRITON_INTERPRET=1, so this
happens in a process of its own: ``report("module")`` runs this file there, with the ``CASES`` of that module.
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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}


class Variant(NamedTuple):
    """What Triton would have compiled."""

    kernel: Any
    signature: dict
    constants: dict
    attributes: dict
    options: dict

    def __str__(self) -> str:
        values = {self.kernel.arg_names[index]: value for (index,), value in self.constants.items()}
        return f"{self.kernel.__name__}{values}"


class _Driver:
    """A driver with one device that nothing can be launched on."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS["sm_90"])


def variants(launch: Callable[[], object]) -> list[Variant]:
    """The distinct variants that the kernels launched by ``launch`` need."""
    import triton
    from triton import knobs

    found: dict[str, Variant] = {}

    def record(*, key: str, fn: Any, compile: dict, **_: Any) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        kernel = fn.jit_function
        variant = Variant(kernel, compile["signature"], compile["constants"], compile["configs"][0], options)
        found[f"{kernel.__name__} {key}"] = variant
        return True  # do not compile

    triton.runtime.driver.set_active(_Driver())
    knobs.runtime.jit_cache_hook = record
    try:
        launch()
    finally:
        knobs.runtime.jit_cache_hook = None
    return list(found.values())


def compile_for(variant: Variant, target: str) -> dict:
    """Intermediate code and resources of a variant: registers, and bytes on the stack or spilled, per thread."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(variant.kernel, variant.signature, variant.constants, variant.attributes)
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=variant.options)
    if "cubin" in compiled.asm:
        resources = _cubin_resources(compiled.asm["cubin"])
    else:
        resources = _amd_resources(compiled.asm["amdgcn"])
    names = variant.kernel.arg_names
    constants = {names[index]: value for (index,), value in variant.constants.items()}
    result = {"kernel": variant.kernel.__name__, "target": target, "num_warps": variant.options["num_warps"]}
    return result | {"constants": constants, "ttir": compiled.asm["ttir"], "asm": compiled.asm.get("ptx", "")} | resources


def _cubin_resources(cubin: bytes) -> dict[str, int]:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([cuobjdump, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    fields = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
    return {"registers": int(fields["REG"]), "stack": int(fields["STACK"]) + int(fields["LOCAL"])}


def _amd_resources(assembly: str) -> dict[str, int]:
    fields = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size): +(\d+)", assembly))
    stack = sum(int(value) for name, value in fields.items() if name != "vgpr_count")
    return {"registers": int(fields["vgpr_count"]), "stack": stack}


def _compile_all(cases: dict[str, Callable[[], object]]) -> list[dict]:
    jobs = [(name, variant, target) for name, launch in cases.items() for variant in variants(launch) for target in TARGETS]
    return [{"case": name} | compile_for(variant, target) for name, variant, target in jobs]


def report(module: str, argument: str = "") -> Any:
    """What ``main`` of this module returns in a process where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, module]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-5000:]
    return json.loads(result.stdout)


if __name__ == "__main__":
    json.dump(_compile_all(importlib.import_module(sys.argv[1]).CASES), sys.stdout)
