"""The first half hour on a GPU, bench/on_gpu.sh: rehearsed without one; and what is chosen by a sweep."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from fusedpo.bench import choose

from fusedpo import _chosen

ROOT = Path(__file__).parent.parent


def on_gpu(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "FUSEDPO_DEVICE": "cpu"} | variables
    command = ["bash", "bench/on_gpu.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [[], ["sweep"], ["everything", "--out", "x"], ["sweep", "--ouch", "x"]], ids=str)
def test_usage(arguments):
    finished = on_gpu(*arguments)
    assert finished.returncode == 2
    assert "bench/on_gpu.sh sweep --out DIR" in finished.stderr


@pytest.mark.slow
def test_sweep_is_rehearsed_on_the_cpu(tmp_path):
    """Every variant that a CPU has is right and has a time; results come in one file."""
    finished = on_gpu("sweep", "--out", tmp_path, "--pack", SWEEP="--tokens 128 --vocab 1000 --seconds 0.001")
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["summary.txt", "sweep.tar.gz"]
    with tarfile.open(tmp_path / "sweep.tar.gz") as archive:
        archive.extractall(tmp_path / "all", filter="data")
    document = json.loads((tmp_path / "all/sweep.json").read_text())
    assert [row for row in document["rows"] if row["milliseconds"] is None] == []
    assert {row["dtype"] for row in document["rows"]} == {"float32", "bfloat16"}
    assert {row["setting"][0] for row in document["rows"] if row["setting"]} == set(PRESENT) == set(document["chosen"])
    assert "| question | go |" in (tmp_path / "all/choose.log").read_text()
    assert choose.main([str(tmp_path / "all/sweep.json"), "--write"]) == 2  # it is no GPU's


@pytest.mark.parametrize("command", ["sweep", "test", "bench"])
def test_steps_of_a_command(command, tmp_path):
    """What they name is there, and they end within ten minutes."""
    finished = on_gpu(command, "--out", tmp_path, DRY_RUN="1")
    assert finished.returncode == 0, finished.stderr
    steps = re.findall(r"^== (\S+), (\d+) s: (.*)", finished.stdout, re.MULTILINE)
    for name, _, text in steps:
        for path in re.findall(r"(?:bench|tests)/\w+\.py", text):
            assert (ROOT / path).exists(), f"{name}: {path}"
    assert sum(int(seconds) for name, seconds, _ in steps if name != "build") <= 10 * 60 + 100  # most end sooner
    if command == "test":
        named = set(re.findall(r"tests/(test_\w+\.py)", finished.stdout))
        tests = Path(__file__).parent
        marked = {
            p.name for p in tests.glob("test_*.py") if re.search(r"@(pytest\.mark\.gpu|on_a_gpu|gpu)\b", p.read_text())
        }
        assert marked <= named


# ----------------------------------------------------------------------------------------------------------- decisions


PRESENT = {"L2_SHARE": 2 / 3, "FORWARD": [512, 4], "BACKWARD": [16384, 8], "WALK": [2048, 16]}


def record(*rows: tuple[Any, ...]) -> dict[str, Any]:
    """Rows of operator, backend, name, dtype, milliseconds and, where there is one, a setting."""
    names = ("operator", "backend", "name", "dtype", "milliseconds", "setting")
    without = {"setting": None, "error": None}
    return {
        "device": "H200",
        "date": "2030-01-01",
        "chosen": PRESENT,
        "rows": [without | dict(zip(names, row, strict=False)) for row in rows],
    }


CEILINGS = [("ceiling", "torch", name, "bfloat16", 1.0) for name in ("read", "copy", "write")]


def test_native_kernels_are_chosen_where_they_are_right_and_faster():
    document = record(
        *CEILINGS,
        ("one_pass", "native", "one pass", "bfloat16", 1.1),
        ("one_pass", "native", "one pass", "float32", 2.1),
        ("one_pass", "triton", "one pass, 0.50 of L2", "bfloat16", 1.3, ["L2_SHARE", 0.50]),
        ("one_pass", "triton", "one pass, 0.67 of L2", "bfloat16", 1.4, ["L2_SHARE", 0.67]),
        ("one_pass", "triton", "one pass, 0.50 of L2", "float32", 2.4, ["L2_SHARE", 0.50]),
        ("policy_loss", "native", "policy_loss", "float32", 0.1),  # no faster
        ("policy_loss", "triton", "policy_loss", "float32", 0.1),
        ("whiten", "native", "whiten", "float32", None),  # wrong
        ("whiten", "triton", "whiten", "float32", 0.1),
    )
    decision = choose.decide(document)
    assert (decision.native, decision.constants["L2_SHARE"]) == (("one_pass",), 0.5)
    verdicts = {line[0]: line[3:] for line in choose.answers(document)}
    assert verdicts["one pass, native, bfloat16"] == ("1.10", "go")
    assert verdicts["one pass, triton, bfloat16"] == ("1.30", "between")
    assert verdicts["forward, triton, bfloat16"] == ("", "not measured, or wrong")


def test_one_wrong_dtype_is_enough():
    rows = [
        ("one_pass", b, "one pass", d, t)
        for b, t in (("native", 1.0), ("triton", 2.0))
        for d in ("bfloat16", "float32")
    ]
    assert choose.decide(record(*rows)).native == ("one_pass",)
    rows[0] = (*rows[0][:4], None)
    assert choose.decide(record(*rows)).native == ()


def test_what_is_written_is_what_was_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "CHOSEN", tmp_path / "chosen.py")
    rows = [("one_pass", b, "", "float32", t, ["L2_SHARE", 0.5]) for b, t in (("native", 1.0), ("triton", 2.0))]
    (tmp_path / "sweep.json").write_text(json.dumps(record(*rows)))
    assert choose.main([str(tmp_path / "sweep.json"), "--write"]) == 0
    written: dict[str, Any] = {}
    exec((tmp_path / "chosen.py").read_text(), written)
    assert (written["NATIVE_ON_CUDA"], written["L2_SHARE"], written["FORWARD"]) == (("one_pass",), 0.5, (512, 4))


def test_the_file_of_what_is_chosen_is_one_that_is_written():
    constants = {name: getattr(_chosen, name) for name in PRESENT}
    written = choose.source(record(), choose.Decision(_chosen.NATIVE_ON_CUDA, constants))
    assert written.partition("\n# ")[2] == choose.CHOSEN.read_text().partition("\n# ")[2]


def shapes(*rows: tuple[str, list[int], float | None]) -> dict[str, Any]:
    return record(*(("token_logprobs", "triton", "forward", dtype, ms, ["FORWARD", x]) for dtype, x, ms in rows))


def test_a_shape_has_to_be_faster_beyond_noise():
    """Sums follow from it."""
    present, other, third = [512, 4], [256, 2], [128, 1]
    base = [("bfloat16", present, 1.0), ("float32", present, 2.0)]
    assert choose.shape(record(), "FORWARD") == (512, 4)
    for times, chosen in (
        ((0.9, 2.0), (256, 2)),
        ((0.9, 2.05), (256, 2)),  # the other dtype loses by noise
        ((0.9, 2.2), (512, 4)),
        ((0.99, 1.99), (512, 4)),
        ((0.5, None), (512, 4)),  # wrong in one dtype, or does not run
    ):
        rows = [(dtype, other, time) for dtype, time in zip(("bfloat16", "float32"), times, strict=True)]
        assert choose.shape(shapes(*base, *rows), "FORWARD") == chosen
    rows = [("bfloat16", other, 0.9), ("float32", other, 2.0), ("bfloat16", third, 0.8), ("float32", third, 2.0)]
    assert choose.shape(shapes(*base, *rows), "FORWARD") == (128, 1)
    assert choose.shape(shapes(("bfloat16", present, None), *rows), "FORWARD") == (512, 4)


def test_a_shape_that_does_not_run_says_nothing_of_its_kernel():
    document = shapes(("bfloat16", [512, 4], 1.0), ("bfloat16", [1024, 8], None))
    assert choose.times(document, "token_logprobs", "triton")["bfloat16"]["milliseconds"] == 1.0
    document["rows"][1]["error"] = 0.5
    assert choose.times(document, "token_logprobs", "triton") == {}
