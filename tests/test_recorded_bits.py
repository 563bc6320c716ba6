"""The bits of every operator are those that were recorded: a change that means to keep them has to."""

import json
import os
import subprocess
import sys

import pytest
from support import recorded

RECORDED = json.loads(recorded.FILE.read_text())


def digests(backend: str, **environment: str) -> tuple[str, dict[str, str]]:
    """In a process of its own: instruction set and interpreter are chosen when the package is imported."""
    run = subprocess.run(
        [sys.executable, recorded.__file__, backend], env=os.environ | environment, stdout=subprocess.PIPE, check=True
    )
    [(key, found)] = json.loads(run.stdout).items()
    return key, found


@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512"])
def test_native(capability: str) -> None:
    compare(*digests("native", FUSEDPO_CPU_CAPABILITY=capability))


@pytest.mark.triton
def test_triton() -> None:
    compare(*digests("triton", TRITON_INTERPRET="1"))


def compare(key: str, found: dict[str, str]) -> None:
    if key not in RECORDED:
        pytest.skip(f"nothing was recorded for {key}")
    changed = sorted(name for name in RECORDED[key].keys() | found if RECORDED[key].get(name) != found.get(name))
    assert not changed, f"other bits in {len(changed)} of {len(found)} cases: {changed[:9]}"
