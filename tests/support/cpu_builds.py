"""The instruction sets that the CPU kernels are built for."""

from __future__ import annotations

import pytest
import torch

FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
FLAGS["avx512_bf16"] = [*FLAGS["avx512"], "-mavx512bf16"]
LEVEL = {"DEFAULT": 0, "NO AVX": 0, "AVX2": 1, "AVX512": 2}.get(torch.backends.cpu.get_cpu_capability(), 0)
LEVEL += LEVEL == 2 and torch.cpu._is_avx512_bf16_supported()
BUILDS = [
    pytest.param(name, marks=pytest.mark.skipif(level > LEVEL, reason=f"this processor has no {name}"))
    for level, name in enumerate(FLAGS)
]
# But for the one that is taken anyway.
OTHER_BUILDS = [pytest.param(name) for level, name in enumerate(FLAGS) if level < LEVEL]
