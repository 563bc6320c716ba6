"""The recorded results are pages of the site: a link to ../bench/results stays right, and is checked, there too."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

RESULTS = Path(__file__).resolve().parents[2] / "bench/results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "results/index.md", content=index()))
    for path in sorted(RESULTS.rglob("*")):
        if path.is_file():
            uri = f"results/{path.relative_to(RESULTS).as_posix()}"
            file = File.generated(config, uri, abs_src_path=str(path))
            file.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(file)
    return files


def index() -> str:
    """What was recorded, by machine."""
    text = ["# Results", "Every row that was recorded. [Performance](../performance.md) says how to read them."]
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        tables = "\n".join(f"* [{path.stem}]({folder.name}/{path.name})" for path in sorted(folder.glob("*.md")))
        text += [f"## {folder.name}", tables or "No tables."]
    return "\n\n".join(text) + "\n"


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"\]\(\.\./((?:\.\./)*)bench/results/", r"](\1results/", markdown)
