"""docs/extending.md, followed to the letter in a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

DRIVER = """
#include "core/objective.h"

#include <cstdio>

using namespace fusedpo;

int main() {
  const int64_t parts[kNumParts] = {kTokenRatio, 0, 0, 0, kSPO, kNoKL, kTokenSum};
  const double values[] = {0, kLargest, 0, 0, 0.3};
  const Objective o = decode(parts, values, 5);
  Token<float> x{};
  x.is_weight = 1;
  std::printf("%d 0\\n", (int)kSPO);
  while (std::scanf("%f %f %f", &x.logprob, &x.old_logprob, &x.advantage) == 3) {
    const TokenResult<float> result = evaluate(o, x);
    std::printf("%.9g %.9g\\n", result.loss, result.d_logprob);
  }
}
"""

PYTHON = """
import json
import torch
import fusedpo
from fusedpo import objectives as O

objective = O.Objective(O.TokenRatio(), O.SPO(0.3), aggregation="token-sum")
lp, olp = -torch.tensor([0.1, 0.5, 2.0, 1.0, 0.7]), -torch.tensor([0.2, 0.4, 1.0, 1.0, 3.0])
a = torch.tensor([1.0, -2.0, 0.5, 1.0, 0.0])
found = {"inputs": torch.stack((lp, olp, a), 1).tolist(), "number": O.TRUST_REGIONS[O.SPO], "file": fusedpo.__file__}
found["one pass"] = fusedpo.ops.one_pass.is_possible(objective)
for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
    leaf = lp.to(dtype).requires_grad_()
    with fusedpo.backend(backend):
        out = fusedpo.policy_loss(leaf, olp, a, objective=objective, reduction="none")
    out.loss.sum().backward()
    found[backend] = torch.stack((out.loss, leaf.grad), 1).tolist()
print(json.dumps(found))
"""


def insert(path: Path, before: str, text: str) -> None:
    source = path.read_text()
    assert source.count(before) == 1, f"{before!r} in {path}"
    path.write_text(source.replace(before, text + before))


def follow(document: str, package: Path, csrc: Path) -> None:
    blocks = [textwrap.dedent(block) for block in re.findall(r"```(?:python|cpp)\n(.*?)```", document, re.DOTALL)]
    part, number, reference, cpp, triton = blocks[:5]
    objectives, losses = package / "objectives.py", package / "reference/losses.py"
    header, kernels = csrc / "core/objective.h", package / "triton_kernels/objective.py"
    insert(objectives, "TrustRegion = NoTrustRegion |", part + "\n\n")
    insert(objectives, "NoTrustRegion | PPOClip |", "SPO | ")
    insert(objectives, "}\nKL_NUMBERS", textwrap.indent(number, "    "))
    insert(losses, "_TRUST_REGIONS: dict", "from ..objectives import SPO\n\n" + reference + "\n\n")
    insert(losses, "    NoTrustRegion: _no_trust_region,\n", "    SPO: _spo,\n")
    insert(header, "// What the trust region sums over a sequence, 0", cpp + "\n")
    insert(header, "  kNumTrustRegions\n", "  kSPO,\n")
    insert(header, "    case kNoTrustRegion:\n", "    case kSPO:\n      return spo(p, x, w);\n")
    insert(kernels, "PPO_CLIP = tl", "SPO = tl.constexpr(O.TRUST_REGIONS[O.SPO])\n")
    insert(kernels, "@triton.jit\ndef summand", triton + "\n\n")
    insert(
        kernels,
        "    elif o.trust_region == LOG_CLIP:\n",
        "    elif o.trust_region == SPO:\n        term = spo(o.p0, x, w)\n",
    )


@pytest.mark.triton
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_trust_region_is_a_class_three_formulas_and_a_number(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "integrations")
    shutil.copytree(ROOT / "python/fusedpo", tmp_path / "fusedpo", ignore=ignored)
    shutil.copytree(ROOT / "triton_kernels", tmp_path / "fusedpo/triton_kernels", ignore=ignored, dirs_exist_ok=True)
    shutil.copytree(ROOT / "csrc/core", tmp_path / "csrc/core")
    follow((ROOT / "docs/extending.md").read_text(), tmp_path / "fusedpo", tmp_path / "csrc")

    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", PYTHON], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, check=True
    )
    found = json.loads(run.stdout)
    assert Path(found["file"]).is_relative_to(tmp_path)
    assert found["one pass"], "what it declares is believed"

    (tmp_path / "driver.cpp").write_text(DRIVER)
    program = tmp_path / "driver"
    command = ["g++", "-std=c++17", "-Wall", "-Werror", "-I", tmp_path / "csrc", tmp_path / "driver.cpp", "-o", program]
    subprocess.run(command, check=True)
    numbers = "\n".join(" ".join(map(repr, token)) for token in found["inputs"])
    printed = subprocess.run([program], input=numbers, capture_output=True, text=True, check=True).stdout
    (number, _), *cpp = [[float(x) for x in line.split()] for line in printed.splitlines()]

    assert number == found["number"]
    # a few roundings of float32, of results near 1
    for results in (found["triton"], cpp):
        assert len(results) == len(found["reference"]) == 5
        for got, want in zip(results, found["reference"], strict=True):
            assert got == pytest.approx(want, rel=1e-5, abs=1e-6)
