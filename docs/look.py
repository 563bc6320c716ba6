"""Opens the site as a reader does, from its folder: ``make docs && python docs/look.py [PAGE ...]``.

Takes pictures of the pages at two widths, and fails where something is cut off, a picture or formula is missing, or the
search finds nothing. Needs ``pip install playwright`` and a Chromium: ``--browser``, or that of ``playwright install``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, TimeoutError, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "out/site"
PAGES = ("index", "getting-started", "objectives", "performance", "reference/losses")
WIDTHS = (1280, 400)

# What is wider than its box, which neither scrolls nor is in one that does.
CUT_OFF = """() => {
  const scrolls = e => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  const within = e => { for (; e; e = e.parentElement) if (scrolls(e)) return true; return false; };
  const shown = e => e.offsetParent && getComputedStyle(e).visibility === "visible";
  const wide = [...document.querySelectorAll("article *")].filter(e => shown(e) && !within(e)
    && (e.getBoundingClientRect().right > innerWidth + 1
        || (getComputedStyle(e).overflowX === "hidden" && e.scrollWidth > e.clientWidth + 1)));
  return wide.map(e => `${e.tagName}: ${e.textContent.trim().slice(0, 60)}`);
}"""
MISSING = "() => [...document.images].filter(i => i.naturalWidth === 0).map(i => i.src)"


def faults(page: Page, width: int) -> Iterator[str]:
    if page.evaluate("document.scrollingElement.scrollWidth") > width:
        yield "the page scrolls sideways"
    yield from (f"cut off: {what}" for what in page.evaluate(CUT_OFF))
    yield from (f"no picture: {where}" for where in page.evaluate(MISSING))


def search(page: Page, word: str) -> Iterator[str]:
    page.set_viewport_size({"width": WIDTHS[0], "height": 900})
    page.goto((SITE / "index.html").as_uri())
    page.fill("input[name=query]", word)
    try:
        page.wait_for_selector(".md-search-result__item", timeout=20_000)
    except TimeoutError:
        yield f"the search does not find {word}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE", default=PAGES, help="all: every page of the site")
    parser.add_argument("--out", type=Path, default=ROOT / "out/pages")
    parser.add_argument("--browser", default=shutil.which("chromium"))
    args = parser.parse_args()
    pages = args.pages
    if list(pages) == ["all"]:
        pages = sorted(
            path.relative_to(SITE).with_suffix("").as_posix()
            for path in SITE.rglob("*.html")
            if path.name != "404.html"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    wrong = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("requestfailed", lambda request: wrong.append(f"not loaded: {request.url}"))
        page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
        for name in pages:
            for width in WIDTHS:
                page.set_viewport_size({"width": width, "height": 900})
                page.goto((SITE / f"{name}.html").as_uri())
                wrong += [f"{name} at {width}: {fault}" for fault in faults(page, width)]
                page.screenshot(path=args.out / f"{name.replace('/', '-')}-{width}.png", full_page=True)
        wrong += search(page, "policy_loss_from_logits")
        page.screenshot(path=args.out / "search.png")
        browser.close()
    print("\n".join(wrong) or f"{len(pages)} pages, {args.out}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
