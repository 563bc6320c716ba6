"""The benchmark of a split vocabulary: it runs, everybody is right, and its files say what was measured."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from types import SimpleNamespace

import pytest
from support import ranks

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from fusedpo.bench import tensor_parallel
from fusedpo.bench.record import Row, faults

pytestmark = [ranks.needs_gloo, pytest.mark.slow]


class Worker:
    """A process that need not import what it runs."""

    def __init__(self, command, env):
        assert command[:3] == [sys.executable, "-m", "fusedpo.bench.tensor_parallel"]
        self._process = ranks.forkserver().Process(target=work, args=(command[3:], dict(env)))
        self._process.start()
        self.kill = self._process.kill

    def wait(self):
        self._process.join()
        return self._process.exitcode


def work(arguments, environment):
    os.environ.update(environment)
    sys.exit(tensor_parallel.main(arguments))


def test_one_and_two_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_parallel, "subprocess", SimpleNamespace(Popen=Worker))
    small = ["--tokens", "8", "--vocab", "64", "--turns", "3", "--processes", "1", "--dtype", "bfloat16"]
    assert tensor_parallel.main([*small, "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "tensor_parallel.json").read_text())
    assert not [reason for reason in faults(document) if "figures" in reason or "neither" in reason]
    rows = [Row(**row) for row in document["rows"]]
    text = (tmp_path / "tensor_parallel.md").read_text()
    assert {row.sizes["TP"] for row in rows} == {1, 2}
    for row in rows:
        assert row.case in text
        measured = not row.note
        assert measured == (row.samples == 3)
        assert measured == (row.median is not None)
        if row.provider.startswith("clone"):
            assert row.error is None
        elif measured:
            assert row.error <= 1e-2
        elif row.provider.startswith("megatron"):
            assert importlib.util.find_spec("megatron") is None
        else:
            assert (row.note, row.sizes["TP"]) == ("one rank has all columns", 1)
    of_two = {row.provider for row in rows if row.sizes["TP"] == 2 and row.median is not None}
    assert of_two >= {"fusedpo", "fusedpo, in place", "fusedpo, logits gathered", "torch, loss_parallel"}


def test_sizes_that_do_not_divide_are_refused(capsys):
    with pytest.raises(SystemExit):
        tensor_parallel.main(["--tokens", "9"])
    assert "must be a multiple of 4" in capsys.readouterr().err
