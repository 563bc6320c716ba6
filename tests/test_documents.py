"""Figures in README.md and docs/ are those of bench/results, and links within the repository lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

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
    """A copy of what the generator reads and writes."""
    shutil.copytree(ROOT / "bench/results", tmp_path / "bench/results")
    for page in generate.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "RESULTS", tmp_path / "bench/results")
    return tmp_path


def edit(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_another_result_or_figure_is_noticed(generate, copy) -> None:
    machine = next((copy / "bench/results").glob("cpu-*"))

    def slower(document: dict) -> None:
        for row in document["rows"]:
            row["median"] = row["median"] and row["median"] * 1234

    def spilled(document: dict) -> None:
        document["rows"][0]["stack"] = 640

    def wrong(document: dict) -> None:
        document["results"][0]["ok"] = False

    assert generate.main(check=True) == 0
    changes = {"one_pass.json": slower, "advantages.json": slower, "../compiled.json": spilled, "verify.json": wrong}
    for name, change in changes.items():
        edit(machine / name, change)
        assert generate.main(check=True) == 1, name
        assert generate.main(check=False) == 0
        assert generate.main(check=True) == 0
    verification = (copy / "docs/verification.md").read_text()
    assert "640 bytes" in verification
    assert "WRONG" in verification
    readme = copy / "README.md"
    readme.write_text(readme.read_text().replace("x faster", "0x faster", 1))
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
