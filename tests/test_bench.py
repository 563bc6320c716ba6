"""The benchmarks themselves: a wrong result gets no time, a missing provider is named, every operator is measured."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from fusedpo.bench import OPERATORS, batch, cli, compare, report
from fusedpo.bench.harness import Case, Effort, Provider, Row, compiled, measure, peak_extra_bytes, relative_error

from fusedpo import backends
from fusedpo.__main__ import main

ONCE = Effort(most=3, seconds=1.0, least=3)


def case(*providers: Provider, **options: Any) -> Case:
    floor = Provider("floor", lambda: lambda: time.sleep(2e-3))
    return Case("group", {"T": 8}, [floor, *providers], "floor", 1e6, **options)


def rows_of(case: Case) -> dict[str, Row]:
    return {row.provider: row for row in measure(case, "cpu", ONCE)}


def test_a_wrong_result_has_no_time() -> None:
    rows = rows_of(
        case(
            Provider("right", lambda: lambda: torch.ones(2), lambda x: relative_error(x, torch.ones(2).double()), 1e-6),
            Provider(
                "wrong", lambda: lambda: torch.tensor([1.0, 1.1]), lambda x: relative_error(x, torch.ones(2)), 1e-6
            ),
            Provider("nan", lambda: lambda: torch.tensor(math.nan), float, 1e9),
        )
    )
    assert rows["right"].median is not None
    assert rows["right"].error == 0
    for name in ("wrong", "nan"):
        assert rows[name].median is rows[name].of_ceiling is None
        assert rows[name].note.startswith("wrong: error")


def test_what_is_missing_or_fails_is_named() -> None:
    def fails() -> None:
        raise RuntimeError("no such device\nand more")

    rows = rows_of(case(Provider("absent", fails, missing="not installed"), Provider("broken", lambda: fails)))
    assert rows["absent"].note == "not installed"
    assert rows["broken"].note == "failed: RuntimeError: no such device"
    assert rows["absent"].median is rows["broken"].median is None


def test_times_and_rates() -> None:
    rows = rows_of(case(Provider("slow", lambda: lambda: time.sleep(8e-3)), flops=4e6))
    slow, floor = rows["slow"], rows["floor"]
    assert 8 <= slow.p20 <= slow.median <= slow.p80 < 100
    assert slow.of_ceiling == floor.median / slow.median < 0.6
    assert slow.gigabytes_per_second == pytest.approx(1e6 / slow.median / 1e6)
    assert slow.teraflops == pytest.approx(4e6 / slow.median / 1e9)
    assert floor.of_ceiling == 1
    assert slow.samples == 3


def test_what_is_fast_gets_more_turns_than_what_is_slow() -> None:
    slow = Provider("slow", lambda: lambda: time.sleep(0.2))
    rows = {row.provider: row for row in measure(case(slow), "cpu", Effort(most=9, seconds=0.3))}
    assert rows["slow"].samples == 2
    assert rows["slow"].p20 <= rows["slow"].median <= rows["slow"].p80
    assert 2 < rows["floor"].samples <= 9


def test_the_turns_of_each_are_spread_over_the_case() -> None:
    turns = []

    def provider(name: str, seconds: float) -> Provider:
        return Provider(name, lambda: lambda: (turns.append(name), time.sleep(seconds)))

    providers = [provider("slow", 0.1), provider("fast", 1e-3)]
    measure(case(*providers), "cpu", Effort(most=30, seconds=0.5, least=4))
    last = len(turns) - 1 - turns[::-1].index("slow")
    timed = turns[turns.index("slow", turns.index("fast")) :]  # after the first calls of both
    assert timed.count("slow") >= 4
    assert turns[last:].count("fast") < timed.count("fast") / 2


def test_what_compiles_does_so_once_per_case() -> None:
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def double(x):
        return 2 * x

    def square(x):
        return x * x

    def provider(function) -> Provider:
        def prepare():
            call = compiled(function, backend=compiler)
            return lambda: call(torch.ones(2))

        return Provider(function.__name__, prepare, compiles=True)

    for cases in (1, 2):
        rows_of(case(provider(double), provider(square)))
        assert len(graphs) == 2 * cases


def test_a_reset_restores_what_a_call_overwrites() -> None:
    x = torch.zeros(4)
    reset = lambda: x.zero_()  # noqa: E731
    rows = rows_of(
        case(Provider("in place", lambda: lambda: x.add_(1), lambda y: float(y.max()) - 1, 0.0, reset=reset))
    )
    assert rows["in place"].median is not None
    assert x.max() == 1


def test_peak_memory_counts_what_is_alive_together() -> None:
    def run() -> torch.Tensor:
        a = torch.ones(1000, 1000)
        b = a + 1
        del a
        return b + 1

    assert peak_extra_bytes(run, "cpu") == pytest.approx(8e6, rel=0.01)


def test_launches_count_operators_without_views() -> None:
    rows = rows_of(case(Provider("three", lambda: lambda: (torch.ones(4).view(2, 2) + 1).exp()), count_launches=True))
    assert rows["three"].launches == 3


SMALL = {
    "one_pass": {("cpu", True): [(16, 512)]},
    "token_logprobs": {("cpu", True): [(16, 512)]},
    "hidden": {("cpu", True): [(16, 32, 512)]},
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_is_measured(operator, tmp_path, monkeypatch, capsys) -> None:
    """With what runs without a compiler; the files hold what the terminal shows."""
    module = importlib.import_module(f"fusedpo.bench.{operator}")
    if operator in SMALL:
        monkeypatch.setattr(module, "SIZES", SMALL[operator])
    if hasattr(module, "overhead"):
        monkeypatch.setattr(module, "overhead", lambda: {"a call": 1.0})
    monkeypatch.setattr(cli, "EFFORT", {("cpu", True): ONCE})
    options = [
        "--op",
        operator,
        "--device",
        "cpu",
        "--quick",
        "--providers",
        "fusedpo",
        "eager",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    threads = torch.get_num_threads()
    assert cli.main(options) == 0
    torch.set_num_threads(threads)
    document = json.loads((tmp_path / f"{operator}.json").read_text())
    assert {"date", "device", "threads", "torch", "commit", "load"} <= document["environment"].keys()
    rows = document["rows"]
    assert {row["provider"] for row in rows if row["median"]} >= {"fusedpo"}
    assert all(row["error"] is not None for row in rows if row["provider"].startswith(("fusedpo", "eager")))
    assert all(row["of_ceiling"] for row in rows if row["median"])
    markdown, shown = (tmp_path / f"{operator}.md").read_text(), capsys.readouterr().out
    assert (tmp_path / f"{operator}.png").stat().st_size > 5000
    for row in rows:
        assert row["case"] in markdown
        assert row["provider"] in markdown
        assert row["group"].split(",")[0] in shown


@pytest.mark.parametrize("operator", ["one_pass", "hidden"])
def test_all_cases_are_right_and_name_every_peer(operator, monkeypatch) -> None:
    """The whole run, for small sizes: no other makes half-masked and float16 cases."""
    module = importlib.import_module(f"fusedpo.bench.{operator}")
    monkeypatch.setattr(module, "SIZES", {("cpu", False): SMALL[operator][("cpu", True)]})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    groups = set()
    for each in module.cases("cpu", False, [torch.float32, torch.bfloat16]):
        groups.add(each.group)
        names = {provider.name.partition(",")[0] for provider in each.providers}
        assert names >= {"fusedpo", "eager", "torch.compile", "trl", "verl", "liger", "cut-cross-entropy"}
        for row in measure(cli.select(each, ["fusedpo"]), "cpu", ONCE):
            assert row.median is not None, row
            assert row.error is not None or row.provider == each.ceiling
    for part in ("half masked", "float16") if operator == "one_pass" else ("half masked",):
        assert any(part in group for group in groups)


def test_a_gpu_has_a_choice_of_backends() -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        names.append(backends.forced())
        return x

    names: list[str | None] = []
    assert not list(batch.on_gpu(loss, "one_pass", "cpu", torch.bfloat16))
    for name, function, missing in batch.on_gpu(loss, "one_pass", "cuda", torch.bfloat16):
        assert isinstance(missing, str)
        function(torch.ones(()))
        assert names[-1] == name
    assert names == ["native", "triton"]


def test_a_wrong_kernel_fails_the_command(tmp_path, monkeypatch) -> None:
    import fusedpo

    module = importlib.import_module("fusedpo.bench.one_pass")
    monkeypatch.setattr(module, "SIZES", SMALL["one_pass"])
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    right = fusedpo.policy_loss_from_logits

    def wrong(logits, *args, **options):
        return right(logits * 1.2, *args, **options)

    monkeypatch.setattr(fusedpo, "policy_loss_from_logits", wrong)
    options = ["--op", "one_pass", "--device", "cpu", "--quick", "--providers", "fusedpo", "--out", str(tmp_path)]
    assert cli.main(options) == 1
    rows = {row["provider"]: row for row in json.loads((tmp_path / "one_pass.json").read_text())["rows"]}
    assert rows["fusedpo"]["note"].startswith("wrong")
    assert rows["fusedpo"]["median"] is None
    assert rows["fusedpo, two passes"]["median"] is not None  # it does not use the function


# -------------------------------------------------------------------------------------------------------------- compare


def document(**medians: float | None) -> dict:
    rows = []
    for provider, median in medians.items():
        row = Row("case", "group", {}, provider, of_ceiling=None)
        if median is not None:
            row.median, row.p20, row.p80 = median, 0.95 * median, 1.05 * median
            row.of_ceiling = medians["floor"] / median
        rows.append(row.__dict__)
    return {"environment": report.environment("cpu"), "rows": rows}


@pytest.mark.parametrize(
    ("before", "after", "of_ceiling", "verdicts"),
    [
        ({"floor": 1, "a": 10}, {"floor": 1, "a": 10}, False, ["", ""]),
        ({"floor": 1, "a": 10}, {"floor": 1, "a": 13}, False, ["", "slower"]),
        ({"floor": 1, "a": 10}, {"floor": 1, "a": 5}, False, ["", "faster"]),
        ({"floor": 1, "a": 10}, {"floor": 1, "a": 10.9}, False, ["", ""]),
        ({"floor": 1, "a": 10}, {"floor": 2, "a": 20}, True, ["", ""]),
        ({"floor": 1, "a": 10}, {"floor": 2, "a": 10}, True, ["", "faster"]),
        ({"floor": 2, "a": 10}, {"floor": 1, "a": 10}, True, ["", "slower"]),
        ({"floor": 1, "a": 10}, {"floor": 1}, False, ["", "missing"]),
        ({"floor": 1, "a": 10}, {"floor": 1, "a": None}, False, ["", "no time"]),
        ({"floor": 1, "a": None}, {"floor": 1, "a": None}, False, [""]),
        ({"floor": 1}, {"floor": 1, "b": 3}, False, ["", "new"]),
    ],
)
def test_compare(before, after, of_ceiling, verdicts, tmp_path) -> None:
    first, second = document(**before), document(**after)
    changes = compare.compare(first, second, 0.1, of_ceiling=of_ceiling)
    assert [change.verdict for change in changes] == verdicts
    for name, content in (("first", first), ("second", second)):
        (tmp_path / name).write_text(json.dumps(content))
    arguments = ["compare", str(tmp_path / "first"), str(tmp_path / "second"), *["--of-ceiling"] * of_ceiling]
    assert cli.main(arguments) == int(any(v in ("slower", "missing", "no time") for v in verdicts))


def test_a_slowdown_within_the_spread_is_none() -> None:
    first, second = document(floor=1, a=10), document(floor=1, a=12)
    for row in (*first["rows"], *second["rows"]):
        row["p20"], row["p80"] = 0.5 * row["median"], 2 * row["median"]
    assert not any(change.fails for change in compare.compare(first, second, 0.1))
    assert not any(c.fails for c in compare.compare(document(floor=1, a=10), document(floor=1, a=12), threshold=0.3))


# --------------------------------------------------------------------------------------------------------- the commands


def test_bench_without_rich_says_what_to_install(monkeypatch, capsys) -> None:
    for name in list(sys.modules):
        if name.startswith("fusedpo.bench"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["bench", "--quick"]) == 2
    assert "pip install rich matplotlib" in capsys.readouterr().err


def test_help_and_unknown_arguments(capsys) -> None:
    for arguments, status in ((["bench", "--help"], 0), (["env", "--quick"], 2), (["bench", "--quack"], 2)):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == status
    assert "--providers" in capsys.readouterr().out


def test_on_gpu_is_a_valid_script(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "bench/on_gpu.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    usage = subprocess.run(
        ["bash", script, "--only", "everything", "--out", tmp_path], capture_output=True, check=False
    )
    assert usage.returncode == 2
