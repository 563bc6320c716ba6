"""The benchmarks themselves: a wrong result gets no time, a missing provider is named, every operator is measured."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import mmap
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from fusedpo.bench import (
    OPERATORS,
    arguments,
    batch,
    cli,
    compare,
    harness,
    launch,
    overhead,
    plots,
    record,
    report,
    threshold,
)
from fusedpo.bench.harness import Case, Effort, Provider, compiled, measure, peak_extra_bytes, relative_error
from fusedpo.bench.record import Row
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.text import Text
from rich.console import Console

from fusedpo import backends
from fusedpo.__main__ import main

ONCE = Effort(most=3, seconds=1.0, least=3)


@pytest.fixture
def here(monkeypatch) -> None:
    """Measures in this process, with what runs without a compiler."""
    monkeypatch.setattr(cli, "launched", lambda plan, path: launch.main(plan, path, Console(quiet=True)))
    monkeypatch.setattr(launch, "effort", lambda *_: ONCE)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


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
    rows = {row.provider: row for row in measure(case(slow), "cpu", Effort(least=2, most=9, seconds=0.3))}
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
    "preference": {("cpu", True): [(16, 32, 512)]},
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_is_measured(operator, tmp_path, monkeypatch, capsys, here) -> None:
    """The files hold what the terminal shows, and each sample."""
    module = importlib.import_module(f"fusedpo.bench.{operator}")
    if operator in SMALL:
        monkeypatch.setattr(module, "SIZES", SMALL[operator])
    if hasattr(module, "overhead"):
        monkeypatch.setattr(module, "overhead", lambda: {"a call": 1.0})
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
    assert cli.main(options) == 0
    document = json.loads((tmp_path / f"{operator}.json").read_text())
    assert {"date", "device", "threads", "torch", "commit", "load", "huge_pages"} <= document["environment"].keys()
    rows = document["rows"]
    assert {row["provider"] for row in rows if row["median"]} >= {"fusedpo"}
    assert all(row["error"] is not None for row in rows if row["provider"].startswith(("fusedpo", "eager")))
    assert all(row["of_ceiling"] for row in rows if row["median"])
    assert all(row["samples"] == sum(map(len, row["times"])) > 0 for row in rows if row["median"])
    assert all(row["page_faults"] is not None for row in rows if row["median"])
    in_place = {row["ceiling"] for row in rows if "in place" in row["provider"]}
    assert in_place == ({harness.COPY} if operator in ("one_pass", "token_logprobs", "preference") else set())
    markdown, shown = (tmp_path / f"{operator}.md").read_text(), capsys.readouterr().out
    assert (tmp_path / f"{operator}.png").stat().st_size > 5000
    for row in rows:
        assert row["case"] in markdown
        assert row["provider"] in markdown
        assert row["group"].split(",")[0] in shown


def test_the_gradient_threshold_is_measured(tmp_path, monkeypatch, capsys, here) -> None:
    """Every policy and threshold beside the bare products, with what is left out and the errors that this makes."""
    monkeypatch.setattr(threshold, "SIZES", {("cpu", False): (64, 64, 4000)})
    assert threshold.main(["--device", "cpu", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    rows = [Row(**row) for row in json.loads((tmp_path / "threshold.json").read_text())["rows"]]
    for dtype, masked in itertools.product(("float32", "bfloat16"), ("", ", half masked")):
        block = {row.provider: row for row in rows if row.group == f"PPO, gradient threshold, {dtype}{masked}"}
        policies = threshold.MASKED if masked else threshold.POLICIES
        named = [
            f"fusedpo, {name}, " + ("exact" if power is None else f"2^{power}")
            for name in policies
            for power in threshold.POLICIES[name].powers
        ]
        assert list(block) == ["three matrix products", threshold.FLOOR, *named]
        assert all(row.median and row.of_ceiling for row in block.values())
        for name in named:
            row = block[name]
            found, entropy = row.details, threshold.POLICIES[name.split(", ")[1]].entropy
            assert entropy is None or entropy / 1.5 < found["nats"] < 1.5 * entropy
            assert row.error == max(found["error of dHidden"], found["error of dWeight"])
            left_out = found["dropped"] > 0
            assert left_out == (found["active"] <= 0.5)
            if not left_out:
                assert row.error == max(found["exact: dHidden"], found["exact: dWeight"])
        assert block["fusedpo, 1 nat, 2^-14"].details["dropped"] > 0
    assert "error of dWeight" in (tmp_path / "threshold.md").read_text()


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
        assert names <= {*arguments.PROVIDERS, each.ceiling, harness.COPY, *(p.ceiling for p in each.providers)}
        for row in measure(launch.select(each, ["fusedpo"]), "cpu", ONCE):
            assert row.median is not None, row
            assert row.error is not None or row.provider in (each.ceiling, harness.COPY)
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


def test_a_wrong_kernel_fails_the_command(tmp_path, monkeypatch, here) -> None:
    import fusedpo

    module = importlib.import_module("fusedpo.bench.one_pass")
    monkeypatch.setattr(module, "SIZES", SMALL["one_pass"])
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


# ------------------------------------------------------------------------------------------------- memory and processes


def test_all_get_huge_pages(tmp_path) -> None:
    """Only a process that starts with the switch: torch reads it once."""
    if harness.transparent_hugepage() != "madvise":
        pytest.skip(f"transparent_hugepage is {harness.transparent_hugepage()!r}, not a choice of the process")
    plan = launch.Plan("hidden", "cpu", True, ["bfloat16"], ["eager"], torch.get_num_threads(), 1)
    cli.launched(plan, tmp_path / "with")
    found = launch.read((tmp_path / "with").read_text())
    assert found.huge_pages
    assert {row.provider for row in found.rows if row.median} == {"three matrix products", "eager"}
    # Without it, in a process where no freed memory is at hand.
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    program = "from fusedpo.bench import harness; print(harness.has_huge_pages())"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "False\n"


def test_small_pages_are_noticed() -> None:
    assert not record.has_small_pages(Row("c", "g", {}, "p", allocated_megabytes=311.0, page_faults=900.0))
    assert record.has_small_pages(Row("c", "g", {}, "p", allocated_megabytes=311.0, page_faults=76_000.0))
    assert not record.has_small_pages(Row("c", "g", {}, "p", allocated_megabytes=4.0, page_faults=1000.0))


def test_faults_of_a_call_are_counted() -> None:
    def small_pages() -> mmap.mmap:
        memory = mmap.mmap(-1, 1 << 20)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        memory.write(bytes(1 << 20))
        return memory

    rows = rows_of(case(Provider("maps", lambda: small_pages)))
    assert rows["maps"].page_faults >= (1 << 20) // mmap.PAGESIZE > rows["floor"].page_faults


def test_the_work_of_others_is_watched(monkeypatch) -> None:
    """Two processors for ten seconds, one of them ours."""
    times = iter([(0.0, 100.0, 5.0), (10.0, 120.0, 15.0)])
    monkeypatch.setattr(harness.Watch, "_now", staticmethod(lambda: next(times)))
    assert harness.Watch().others() == 1.0


def test_slow_providers_get_ten_samples_unless_patience_ends() -> None:
    slow = Provider("slow", lambda: lambda: time.sleep(0.03))
    for patience, samples in ((8.0, 10), (0.05, 2)):
        rows = measure(case(slow), "cpu", replace(harness.effort(True, 1), seconds=0.01, patience=patience))
        assert rows[1].samples == samples
    assert 3 * harness.effort(False, 3).least >= record.ENOUGH


def timed(provider: str, *times: list[float]) -> Row:
    return Row("c", "g", {"T": 8}, provider, "floor", 1e6, times=list(times))


def test_processes_are_merged() -> None:
    floor = [timed("floor", [t]) for t in (1.0, 1.0, 2.0)]
    rows = [timed("p", times) for times in ([1.0, 2.0, 3.0], [6.0, 7.0], [4.0, 4.0, 4.0, 4.0])]
    for row, faults in zip(rows, (10.0, 30.0, 20.0), strict=True):
        row.page_faults = faults
    merged = record.merge([[f, row] for f, row in zip(floor, rows, strict=True)])[1]
    assert (merged.median, merged.low, merged.high, merged.samples) == (4.0, 2.0, 6.5, 9)
    assert (merged.of_ceiling, merged.page_faults) == (0.25, 30.0)
    rows[1].times, rows[1].note = [], "wrong: error 1"
    failed = record.merge([[row] for row in rows])[0]
    assert failed.median is None
    assert failed.note == "wrong: error 1"


@pytest.mark.parametrize(
    ("value", "samples", "text"),
    [(12.345, 12, "12.3"), (12.345, 9, "12"), (12.345, 2, "10"), (1234.5, 30, "1,230"), (0.01234, 30, "0.0123")],
)
def test_a_time_has_the_digits_that_its_samples_allow(value, samples, text) -> None:
    assert record.number(value, samples) == text


# ------------------------------------------------------------------------------------------------------------ recording


def recorded_document(operator: str = "one_pass", **environment: Any) -> record.Document:
    header = report.environment("cpu", 2) | {"commit": "abc1234", "huge_pages": True, "transparent_hugepage": "madvise"}
    rows = [timed(name, *[[1.0, 2.0, 3.0, 4.0]] * record.PROCESSES) for name in ("floor", "fusedpo")]
    for row in rows:
        row.allocated_megabytes, row.page_faults = 311.0, 200.0
    rows = [*record.summarise(rows), Row("c", "g", {"T": 8}, "liger", note="needs a GPU")]
    document = {"format": record.FORMAT, "operator": operator, "environment": header | environment}
    return document | {"rows": [row.__dict__ for row in rows]}


def spoilt(name: str) -> record.Document:
    document = recorded_document()
    environment, row = document["environment"], document["rows"][1]
    if name == "dirty":
        environment["commit"] += "-dirty"
    elif name == "no commit":
        environment["commit"] = None
    elif name == "pages of 4 KiB":
        environment["huge_pages"] = False
    elif name == "page faults":
        row["page_faults"] = 76_000.0
    elif name == "says 13 samples":
        row["samples"] = 13
    elif name == "not those of its samples":
        row["p80"] *= 1.1
    elif name == "2 of 3 processes":
        row |= record.summarise([replace(Row(**row), times=row["times"][:2])])[0].__dict__
        row["of_ceiling"] = 1.0
    elif name == "is of format":
        document["format"] = 1
    elif name == "neither a time nor a reason":
        document["rows"][2]["note"] = ""
    return document


def test_what_may_be_published(tmp_path) -> None:
    assert record.faults(recorded_document()) == []
    never = recorded_document(huge_pages=False, transparent_hugepage="never")
    assert record.faults(never) == []  # nobody has them there, and the page says so
    for name in OPERATORS:
        (tmp_path / f"{name}.json").write_text(record.dumps(recorded_document(name, run="now")))
    assert list(record.recorded(tmp_path)) == list(OPERATORS)
    other = json.loads((tmp_path / "hidden.json").read_text())
    other["environment"] |= {"commit": "def5678", "run": "later"}  # of this operator alone, again
    (tmp_path / "hidden.json").write_text(record.dumps(other))
    assert list(record.recorded(tmp_path)) == list(OPERATORS)
    other["environment"]["device"] = "another processor"
    (tmp_path / "hidden.json").write_text(record.dumps(other))
    with pytest.raises(ValueError, match="not one machine, device is .* and another processor"):
        record.recorded(tmp_path)
    (tmp_path / "hidden.json").unlink()
    with pytest.raises(ValueError, match="without hidden"):
        record.recorded(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "dirty",
        "no commit",
        "pages of 4 KiB",
        "page faults",
        "says 13 samples",
        "not those of its samples",
        "2 of 3 processes",
        "is of format",
        "neither a time nor a reason",
    ],
)
def test_what_may_not_be_published(name) -> None:
    (reason,) = record.faults(spoilt(name))
    assert name in reason or name in ("dirty", "no commit")


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A tree to record in, where measuring takes no time."""

    def measured(plan: launch.Plan, path: Path) -> None:
        rows = [timed(name, [1.0, 2.0, 3.0, 4.0]) for name in ("floor", "fusedpo")]
        entries = [{"huge_pages": True}, {"rows": [row.__dict__ for row in rows]}]
        path.write_text("\n".join(map(json.dumps, entries)))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "bench/results")
    monkeypatch.setattr(report, "commit", lambda: "abc1234")
    monkeypatch.setattr(cli, "launched", measured)
    monkeypatch.setattr(plots, "plot", lambda *_: None)
    return tmp_path / "bench/results/machine"


def recorded_rows() -> list[Row]:
    """Two groups of five providers, one with sizes far apart and close together; times over four decades."""
    rows = []
    for group, tokens, vocabularies in (
        ("PPO, bfloat16, half masked", (512, 128), (151_936, 128_256)),
        ("grpo", (9,), (4,)),
    ):
        for number, (T, V) in enumerate(itertools.product(tokens, vocabularies)):
            for place, provider in enumerate(("clone (new memory)", "fusedpo", "fusedpo, in place", "eager", "trl")):
                times = [[10.0**place * (1 + 0.3 * sample) for sample in range(4)]] * 3
                sizes = {"T": T, "V": V}
                rows.append(Row(f"{group} {number}", group, sizes, provider, "clone (new memory)", 1.0, times=times))
    return record.summarise(replace(row, peak_extra_megabytes=1234.0) for row in rows)


MACHINE = {"device": "a processor", "threads": 2, "torch": "2.13", "date": "2026-11-30"}


def test_plots_say_what_was_measured_and_no_label_hides_another() -> None:
    figure = plots.draw("one_pass", recorded_rows(), MACHINE)
    assert figure is not None
    figure.draw_without_rendering()
    not_drawn = {
        label
        for panel in figure.get_axes()
        for axis in (panel.xaxis, panel.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)
        if not panel.axison or not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    boxes = {}
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text() and text not in not_drawn:
            box = text.get_window_extent()
            boxes[text.get_text(), round(box.x0), round(box.y0)] = box
            assert figure.bbox.contains(box.x0, box.y0), text
            assert figure.bbox.contains(box.x1, box.y1), text
    said = {name for name, *_ in boxes}
    assert "one_pass, 2 threads of a processor; torch 2.13; 2026-11-30" in said
    assert {"PPO, bfloat16, half masked, T = 512, V = 151,936", "grpo, float32, T = 9, V = 4"} <= said
    assert sum("n = 12" in name for name in said) == 4
    hidden = [(a, b) for a, b in itertools.combinations(boxes, 2) if boxes[a].overlaps(boxes[b])]
    assert hidden == []
    colours = {to_hex(bar.get_facecolor()) for panel in figure.get_axes() for bar in panel.patches}
    assert colours == {plots.OURS, plots.OTHERS}
    plt.close(figure)


def test_a_median_outside_of_the_percentiles_is_plotted() -> None:
    """Of three processes, one of which was fast and has most of the samples."""
    rows = [replace(row, times=[[1.0] * 20, [1.0, 5.0], [5.0]]) for row in recorded_rows()]
    rows = record.summarise(rows)
    assert rows[0].p80 < rows[0].median
    figure = plots.draw("one_pass", rows, MACHINE)
    assert figure is not None
    plt.close(figure)


def test_a_clean_tree_is_recorded(tree, capsys) -> None:
    assert cli.main(["--device", "cpu", "--out", str(tree)]) == 0, capsys.readouterr().out
    assert set(record.recorded(tree)) == set(OPERATORS)
    assert " 12 " in (tree / "one_pass.md").read_text()


def test_one_operator_is_recorded_again(tree, monkeypatch, capsys) -> None:
    assert cli.main(["--device", "cpu", "--out", str(tree)]) == 0, capsys.readouterr().out
    monkeypatch.setattr(report, "commit", lambda: "def5678")
    assert cli.main(["--device", "cpu", "--op", "one_pass", "--out", str(tree)]) == 0, capsys.readouterr().out
    commits = {name: document["environment"]["commit"] for name, document in record.recorded(tree).items()}
    assert commits == dict.fromkeys(OPERATORS, "abc1234") | {"one_pass": "def5678"}


def test_the_gradient_threshold_is_recorded_apart(tree, monkeypatch, capsys) -> None:
    """With the samples of three processes, none of which is given up for its time; what was recorded before stays."""
    plans = []
    launched = cli.launched
    monkeypatch.setattr(cli, "launched", lambda plan, path: plans.append(plan) or launched(plan, path))
    assert cli.main(["--device", "cpu", "--out", str(tree)]) == 0, capsys.readouterr().out
    before = (tree / "one_pass.json").read_text()
    plans.clear()
    assert threshold.main(["--device", "cpu", "--dtype", "bfloat16", "--out", str(tree)]) == 2
    assert not plans
    assert threshold.main(["--device", "cpu", "--out", str(tree)]) == 0, capsys.readouterr().out
    assert [(plan.operator, plan.number) for plan in plans] == [("threshold", number) for number in range(3)]
    assert all(plan.effort.patience > 10 * plan.effort.least for plan in plans)
    assert set(record.recorded(tree, record.THRESHOLD)) == {"threshold"}
    assert set(record.recorded(tree)) == set(OPERATORS)
    assert (tree / "one_pass.json").read_text() == before


def test_progress_is_told() -> None:
    shares = []
    measure(case(Provider("slow", lambda: lambda: time.sleep(0.01))), "cpu", ONCE, shares.append)
    assert shares == sorted(shares)
    assert len(shares) > 3
    assert shares[-1] == 1


def test_a_dirty_tree_cannot_record(tree, monkeypatch, capsys) -> None:
    monkeypatch.setattr(report, "commit", lambda: "abc1234-dirty")
    assert cli.main(["--device", "cpu", "--out", str(tree)]) == 2
    assert "not that of a commit" in capsys.readouterr().out
    assert not tree.exists()
    assert cli.main(["--device", "cpu", "--op", "hidden", "--out", "elsewhere"]) == 0
    assert json.loads(Path("elsewhere/hidden.json").read_text())["environment"]["commit"] == "abc1234-dirty"


def test_neither_a_part_of_a_run_nor_a_tree_that_changes_is_recorded(tree, monkeypatch, capsys) -> None:
    assert cli.main(["--device", "cpu", "--quick", "--out", str(tree)]) == 2
    commits = iter(["abc1234", "def5678"])
    monkeypatch.setattr(report, "commit", lambda: next(commits))
    assert cli.main(["--device", "cpu", "--out", str(tree)]) == 2
    assert "changed during the run" in capsys.readouterr().out
    assert not tree.exists()


def test_the_commit_says_what_differs_from_it(tmp_path, monkeypatch) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(report, "RESULTS", tmp_path / "bench/results")
    assert report.commit() is None
    git("init")
    (tmp_path / "code").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    first = report.commit()
    assert first
    assert not first.endswith("-dirty")
    report.RESULTS.mkdir(parents=True)
    (report.RESULTS / "new.json").write_text("{}")  # what a recording itself writes
    assert report.commit() == first
    for name in ("code", "untracked"):
        (tmp_path / name).write_text("2")
        assert report.commit() == f"{first}-dirty"
        git("stash", "--include-untracked")
        report.RESULTS.mkdir(parents=True, exist_ok=True)


# -------------------------------------------------------------------------------------------------------------- compare


def document(**medians: float | None) -> dict:
    rows = []
    for provider, median in medians.items():
        row = Row("case", "group", {}, provider, of_ceiling=None)
        if median is not None:
            row.median, row.p20, row.p80 = median, 0.95 * median, 1.05 * median
            row.of_ceiling = medians["floor"] / median
        rows.append(row.__dict__)
    return {"environment": report.environment("cpu", 2), "rows": rows}


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


def test_few_calls_of_the_dispatcher_come_before_the_first_kernel() -> None:
    """As long as each takes as all checks of a tensor: arguments that kernels take as they are cost none."""
    expected = {
        "token_logprobs": [],
        "policy_loss": ["aten::reshape"],  # advantages of sequences
        "policy_loss_from_logits": ["aten::reshape", "aten::new_zeros", "aten::unbind"],  # log-probs and entropy
    }
    found = {}
    for name, call in overhead.cases("cpu").items():
        call()  # loads
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            call()
        events = sorted(profiler.events(), key=lambda event: event.time_range.start)
        first = next(event for event in events if event.name.startswith("fusedpo::")).time_range.start
        called = [event for event in events if event.time_range.start < first and event.name.startswith("aten::")]
        found[name] = [e.name for e in called if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
    assert found == expected
