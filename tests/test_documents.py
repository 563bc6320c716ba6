"""Figures in README.md and docs/ are those of bench/results, and links within the repository lead somewhere."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
from fusedpo.bench import record
from fusedpo.bench.record import Row

import fusedpo

ROOT = Path(__file__).parents[1]


@pytest.fixture
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_agree_with_the_results(generate, capsys) -> None:
    assert generate.main(check=True) == 0, capsys.readouterr().out


def test_every_block_is_on_a_page(generate) -> None:
    pages = "".join((ROOT / page).read_text() for page in generate.PAGES)
    assert sorted(re.findall(r"<!-- generated: (\w+) -->", pages)) == sorted(generate.BLOCKS)


@pytest.fixture
def copy(generate, tmp_path, monkeypatch) -> Path:
    """A copy of what the generator reads and writes, with results that were recorded by all rules."""
    shutil.copytree(ROOT / "bench/results", tmp_path / "bench/results")
    for machine in (tmp_path / "bench/results").glob("cpu-*"):
        for name in record.OPERATORS:
            (machine / f"{name}.json").write_text(record.dumps(made_up(generate, name)))
        (machine / "threshold.json").write_text(record.dumps(made_up_threshold(generate)))
        (machine / "threshold.md").touch()
        (machine / "tensor_parallel.json").write_text(record.dumps(made_up_tensor_parallel(generate)))
    for page in generate.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "RESULTS", tmp_path / "bench/results")
    generate.main(check=False)
    return tmp_path


def made_up(generate, operator: str) -> record.Document:
    """Rows of every group that a page shows, at T = 512 and T = 128."""
    environment = {"device": "a processor", "capability": "AVX512", "threads": 2, "date": "2026-11-30", "torch": "2.13"}
    environment |= {"commit": "abc1234", "run": "now", "huge_pages": True, "transparent_hugepage": "madvise"}
    rows = []
    for _, group, _, baseline in (entry for entry in generate.TABLES if entry[0] == operator):
        for tokens in (512, 128):
            others = (("fusedpo, in place", 22.0), ("torch.compile", 60.0), ("trl, PyTorch", 100.0), ("verl", 90.0))
            for provider, time in (("clone (new memory)", 20.0), ("fusedpo", 25.0), (baseline, 123.0), *others):
                times = [[time, 1.1 * time, 1.2 * time, 1.3 * time]] * record.PROCESSES
                row = Row(
                    f"{group}, T = {tokens}", group, {"T": tokens, "V": 151_936}, provider, "clone (new memory)", 1e6
                )
                rows.append(replace(row, times=times, page_faults=150.0, peak_extra_megabytes=311.0, others=0.01))
    document = {"format": record.FORMAT, "operator": operator, "environment": environment}
    return document | {"rows": [asdict(row) for row in record.summarise(rows)]}


def made_up_threshold(generate) -> record.Document:
    document = made_up(generate, "one_pass")
    rows = []
    for dtype in generate.DTYPES:
        group = f"PPO, gradient threshold, {dtype}"
        for provider, time, active in (
            ("three matrix products", 2000.0, None),
            ("one product and zeros", 800.0, None),
            ("fusedpo, 1 nat, 2^-12", 1000.0, 0.06),
            ("fusedpo, flat, 2^-14", 2100.0, 0.97),
        ):
            row = Row(group, group, {"T": 512, "V": 151_936}, provider, "three matrix products", 1e6, others=0.01)
            if active is not None:
                errors = {
                    "error of dHidden": 2e-3,
                    "error of dWeight": 1e-4,
                    "exact: dHidden": 1e-3,
                    "exact: dWeight": 9e-5,
                }
                dropped = 0.01 if active < 0.5 else 0.0
                row = replace(row, details={"nats": 1.03, "active": active, "dropped": dropped, **errors})
            rows.append(replace(row, times=[[time, 1.1 * time, 1.2 * time, 1.3 * time]] * record.PROCESSES))
    return document | {"operator": "threshold", "rows": [asdict(row) for row in record.summarise(rows)]}


def made_up_tensor_parallel(generate) -> record.Document:
    document = made_up(generate, "one_pass")
    group, rows = "log-probs and gradient, float32", []
    for ranks in (1, 2):
        for provider, time in (("clone (new memory)", 20.0), ("fusedpo", 25.0), ("fusedpo, logits gathered", 100.0)):
            of = {"TP": ranks, "T": 256, "V": 151_936}
            row = Row(f"{group}, TP = {ranks}", group, of, provider, "clone (new memory)", 1e6, others=0.01)
            rows.append(replace(row, times=[[time] * 4] * record.PROCESSES, error=1e-7))
    return document | {"operator": "tensor_parallel", "rows": [asdict(row) for row in record.summarise(rows)]}


def edit(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_what_is_recorded_may_be_published() -> None:
    """One clean commit, as many samples as each row says, the same memory for all."""
    machines = [path for path in (ROOT / "bench/results").iterdir() if path.is_dir()]
    assert machines
    assert all(record.recorded(folder) for folder in machines)


def test_results_that_must_not_be_published_make_no_page(generate, copy) -> None:
    machine = next((copy / "bench/results").glob("cpu-*"))
    edit(machine / "one_pass.json", lambda document: document["environment"].update(commit="abc1234-dirty"))
    with pytest.raises(ValueError, match="one_pass: comes from no commit"):
        generate.main(check=True)


def test_a_busy_machine_is_marked(generate, copy) -> None:
    machine = next((copy / "bench/results").glob("cpu-*"))
    assert "busy" not in generate.measured()
    edit(machine / "one_pass.json", lambda document: [row.update(others=0.5) for row in document["rows"]])
    assert "**a busy machine**" in generate.measured()
    assert "`fusedpo`, on a busy machine" in generate.tables()


def test_the_readme_shows_both_sizes_the_spread_and_n(generate, copy) -> None:
    header, _, *lines = generate.measured().splitlines()
    assert [cell.strip() for cell in header.split("|")[2:6]] == [
        f"{dtype}, T = {tokens}" for dtype in generate.DTYPES for tokens in (512, 128)
    ]
    assert len([line for line in lines if line.startswith("|")]) == len(generate.IN_README) == 6
    fused = next(line for line in lines if "| `fusedpo` |" in line)
    assert fused.count("28.8 ms, **4.9x**<br>25.5 to 32.0, n = 12") == 4


def test_the_plots_of_every_operator_are_on_the_page(generate, copy) -> None:
    text = generate.generate("docs/performance.md")
    for name in ("one_pass", "advantages"):
        assert len(re.findall(rf"!\[{name} on [\w-]+\]\(\.\./bench/results/[\w-]+/{name}\.png\)", text)) == 1


def test_the_gradient_threshold_is_in_units_of_the_products_of_its_run(generate, copy) -> None:
    text = generate.threshold()
    line = "| 1 nat (1.03), 2^-12, {} | 0.500 | 0.443 to 0.557 | 12 "
    line += "| 6.0% | 1.0e-02 | 2.0e-03 (1.0e-03) | 1.0e-04 (9.0e-05) |"
    for dtype in generate.DTYPES:
        assert line.format(dtype) in text
        assert f"| flat (1.03), 2^-14, {dtype} | 1.05 | " in text
        assert f"| one product and zeros, {dtype} | 0.400 | " in text
    assert text.count("| all | 0 |") == 2
    assert "threshold.md)" in text
    machine = next((copy / "bench/results").glob("cpu-*"))
    edit(machine / "threshold.json", lambda document: document["environment"].update(commit="abc1234-dirty"))
    with pytest.raises(ValueError, match="threshold: comes from no commit"):
        generate.main(check=True)
    (machine / "threshold.json").unlink()
    assert generate.threshold() == (
        "Not recorded yet: `python -m fusedpo.bench.threshold --out bench/results/MACHINE`."
    )


def test_a_split_vocabulary_is_shown_for_every_number_of_ranks(generate, copy) -> None:
    text = generate.tensor_parallel()
    for ranks in (1, 2):
        start = f"| TP = {ranks}, T = 256, V = 151,936 | `fusedpo` | 25.0 | 25.0 to 25.0 | 12 | 25.0 to 25.0 | 4.0x |"
        assert f"{start} 80% of clone (new memory) |" in text
    next((copy / "bench/results").glob("cpu-*/tensor_parallel.json")).unlink()
    assert generate.tensor_parallel() == (
        "Not recorded yet: `python -m fusedpo.bench.tensor_parallel --out bench/results/MACHINE`."
    )


def test_another_result_or_figure_is_noticed(generate, copy) -> None:
    machine = next((copy / "bench/results").glob("cpu-*"))

    def slower(document: dict) -> None:
        rows = [Row(**row) for row in document["rows"]]
        rows = [replace(row, times=[[1234 * t for t in times] for times in row.times]) for row in rows]
        document["rows"] = [asdict(row) for row in record.summarise(rows)]

    def spilled(document: dict) -> None:
        document["rows"][0]["stack"] = 640

    def less_exact(document: dict) -> None:
        document["rows"][2]["details"]["dropped"] = 0.5

    def wrong(document: dict) -> None:
        document["results"][0]["ok"] = False

    assert generate.main(check=True) == 0
    changes = {
        "one_pass.json": slower,
        "advantages.json": slower,
        "threshold.json": less_exact,
        "tensor_parallel.json": slower,
    }
    changes |= {"../compiled.json": spilled, "verify.json": wrong}
    for name, change in changes.items():
        edit(machine / name, change)
        assert generate.main(check=True) == 1, name
        assert generate.main(check=False) == 0
        assert generate.main(check=True) == 0
    verification = (copy / "docs/verification.md").read_text()
    assert "640 bytes" in verification
    assert "WRONG" in verification
    readme = copy / "README.md"
    readme.write_text(readme.read_text().replace("x**", "0x**", 1))
    assert generate.main(check=True) == 1


def test_a_gpu_is_reported_once_it_has_run(generate, copy) -> None:
    assert "Nothing has run on a GPU" in generate.devices()
    gpu = copy / "bench/results/h200"
    shutil.copytree(next((copy / "bench/results").glob("cpu-*")), gpu)
    edit(gpu / "verify.json", lambda document: document["devices"].update(cpu="NVIDIA H200"))
    assert "NVIDIA H200" in generate.devices()
    assert "Nothing has run on a GPU" not in generate.devices()


@pytest.mark.parametrize("page", sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")))
def test_links_lead_somewhere(page) -> None:
    """Within the repository; the site's own build checks the rest."""
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text())
    missing = [link for link in links if "://" not in link and not ((ROOT / page).parent / link).exists()]
    assert missing == []


def test_links_of_the_readme_lead_somewhere() -> None:
    test_links_lead_somewhere("README.md")


def documented() -> tuple[set[str], list[object]]:
    """The modules that the API reference documents, and everything that it shows of them."""
    modules, shown = set(), []
    for page in (ROOT / "docs/reference").glob("*.md"):
        for path, members in re.findall(r"^::: ([\w.]+)(?:\n +options:\n +members: \[(.*)\])?", page.read_text(), re.M):
            parent, _, name = path.rpartition(".")
            try:
                module = importlib.import_module(path)
            except ModuleNotFoundError as error:
                if not error.name.startswith("fusedpo"):  # a trainer that is not installed: its adapter is there
                    modules.add(path)
                    continue
                shown.append(getattr(importlib.import_module(parent), name))
                continue
            modules.add(path)
            shown += [getattr(module, name) for name in (members.split(", ") if members else module.__all__)]
    return modules, shown


def test_the_api_reference_has_all_that_is_public() -> None:
    """A new module needs a line ``::: fusedpo.MODULE`` in docs/reference."""
    modules, shown = documented()
    for name in fusedpo.__all__:
        thing = getattr(fusedpo, name)
        there = thing.__name__ in modules if isinstance(thing, ModuleType) else any(thing is other for other in shown)
        assert there, name
    adapters = (ROOT / "python/fusedpo/integrations").iterdir()
    public = {path.stem for path in adapters if not path.stem.startswith("_")} - {"verl_plugin"}
    assert {f"fusedpo.integrations.{name}" for name in public} <= modules
