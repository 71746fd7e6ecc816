"""Measure the pages of the rendered book as a browser shows them from disk.

Prints a table in Markdown. *First content* is when the first text or picture was painted, after the start of loading,
and *largest* when the largest one in sight was; *layout shift* is the sum of all shifts (0: nothing moved once it was
painted); *weight* is what a reader fetches for this page alone: all files but those that the pages share.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

import report
from playwright.sync_api import Browser, Page, Playwright, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
DESKTOP = {"viewport": {"width": 1300, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}

OBSERVE = """
window.shifted = 0;
new PerformanceObserver((list) => list.getEntries().forEach((entry) => {
  if (!entry.hadRecentInput) window.shifted += entry.value;
})).observe({ type: "layout-shift", buffered: true });
new PerformanceObserver((list) => {
  window.largest = list.getEntries().at(-1).startTime;
}).observe({ type: "largest-contentful-paint", buffered: true });
"""
SETTLED = """async () => {
  await window.MathJax?.startup?.promise;
  await document.fonts.ready;
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)));
}"""
FIGURES = """({
  first: performance.getEntriesByName("first-contentful-paint")[0].startTime,
  largest: window.largest,
  shift: window.shifted,
})"""


def chromium() -> str | None:
    """The browser: the one that $KNCORE_CHROMIUM names, or one of the usual names; None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("KNCORE_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def launch(playwright: Playwright) -> Browser:
    """Chromium without a window. It resolves no name, so that no other host can be reached."""
    arguments = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
    return playwright.chromium.launch(executable_path=chromium(), args=arguments)


def load(page: Page, address: str) -> dict[str, float]:
    """Open `address` and wait until it rests: ms to the `first` and the `largest` content, and the layout `shift`."""
    page.goto(address)
    page.evaluate(SETTLED)
    return page.evaluate(FIGURES)


def weight(addresses: list[str], html: Path = HTML) -> float:
    """The size in kB of the files of one page, without those that all pages share."""
    paths = {Path(unquote(urlsplit(address).path)) for address in addresses if address.startswith("file:")}
    shared = (html / "_static", html / "searchindex.js")
    return sum(path.stat().st_size for path in paths if not any(map(path.is_relative_to, shared))) / 1000


def measure(browser: Browser, path: Path, repeats: int = 3) -> Mapping[str, float]:
    """`load`, the median of `repeats` first visits, and `kB`, the weight."""
    runs = []
    for _ in range(repeats):
        context = browser.new_context(**DESKTOP)
        context.add_init_script(OBSERVE)
        page, addresses = context.new_page(), []
        page.on("request", lambda request, seen=addresses: seen.append(request.url))
        runs.append(load(page, path.as_uri()) | {"kB": weight(addresses)})
        context.close()
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    parser = report.parser(__doc__)
    options = parser.parse_args()
    if not chromium():
        parser.exit(1, "No Chromium was found: install one, or name it in KNCORE_CHROMIUM\n")
    paths = sorted(HTML.glob("book/*.html")) + sorted(HTML.glob("notebooks/*.html"))
    if not paths:
        parser.exit(1, f"No page in {HTML}: `make book` first\n")
    rows = []
    with sync_playwright() as playwright, contextlib.closing(launch(playwright)) as browser:
        about = f"Chromium {browser.version.split('.')[0]}, 1300 × 900, files from disk; median of three first visits."
        for path in paths:
            found = measure(browser, path)
            formats = {"first": ".0f", "largest": ".0f", "shift": ".3f", "kB": ".0f"}
            rows.append(
                [f"{path.parent.name}/{path.stem}", *(format(found[name], how) for name, how in formats.items())]
            )
    columns = ["page", "first content, ms", "largest, ms", "layout shift", "weight, kB"]
    report.show(f"{about}\n\n{report.table(columns, rows)}", options.out)


if __name__ == "__main__":
    main()
