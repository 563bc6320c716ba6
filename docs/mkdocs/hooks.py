"""What the site has beside the pages.

The recorded results are pages of it: a link to ../bench/results stays right, and is checked, there too. The roles that
docstrings refer to names with are taken out of the API reference.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "bench/results"
ASSETS = ("iframe-worker.js", "site.css")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted(RESULTS.rglob("*")):
        if path.is_file():
            uri = f"results/{path.relative_to(RESULTS).as_posix()}"
            file = File.generated(config, uri, abs_src_path=str(path))
            file.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(file)
    for name in ASSETS:
        files.append(File.generated(config, f"assets/{name}", abs_src_path=str(HERE / name)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"\]\(\.\./((?:\.\./)*)bench/results/", r"](\1results/", markdown)


def on_page_content(html: str, **_: object) -> str:
    html = re.sub(r":(?:func|class|mod|meth|data|attr):<code>([^<]*)</code>", r"<code>\1</code>", html)
    return html.replace("::</p>", ":</p>")
