"""The rendered book in _build/html: complete, its links whole, nothing in it fetched from another host.

`make test` builds the book first and sets KNCORE_BOOK=required; without a built book these tests are skipped otherwise.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup

from kncore import claims, pipeline, stored

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
STAGED = ROOT / "_build" / "staging"
COMPUTED = [Path(path) for path in os.environ.get("KNCORE_COMPUTED", str(STAGED / "results")).split(os.pathsep)]

# What a browser fetches by itself, as opposed to what it fetches when a reader clicks.
LOADING = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "audio": ("src",),
    "video": ("src", "poster"),
    "track": ("src",),
    "input": ("src",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
}
LINKS_THAT_LOAD = {"stylesheet", "icon", "shortcut", "preload", "prefetch", "modulepreload", "preconnect", "manifest"}
CSS = re.compile(r"""(?:url\(\s*|@import\s+)["']?([^"')\s;]+)""")
FOREIGN = re.compile(r"^\s*(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
RECORDED_ELSEWHERE = {"versions", "packages", "seconds", "date", "platform", "checksum"}


@pytest.fixture(scope="module")
def pages() -> dict[Path, BeautifulSoup]:
    if not (HTML / "index.html").exists():
        if os.environ.get("KNCORE_BOOK") == "required":
            pytest.fail("there is no _build/html: `python -m kncore book` did not build the book")
        pytest.skip("the book is not built: `make book`")
    paths = [path for path in HTML.rglob("*.html") if "_static" not in path.parts]  # the theme leaves templates there
    return {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in paths}


def contents() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    return [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]


def loads(page: BeautifulSoup) -> list[str]:
    """The addresses that a browser fetches when it opens the page."""
    found = []
    for tag, attributes in LOADING.items():
        for element in page.find_all(tag):
            values = [element.get(attribute) or "" for attribute in attributes]
            found += [part.split()[0] for value in values for part in value.split(",") if part.split()]
    for link in page.find_all("link"):
        if LINKS_THAT_LOAD & set(link.get("rel") or []):
            found.append(link["href"])
    for style in [*page.find_all("style"), *page.find_all(style=True)]:
        found += CSS.findall(style.get_text() if style.name == "style" else style["style"])
    for refresh in page.find_all("meta", attrs={"http-equiv": re.compile("refresh", re.IGNORECASE)}):
        found.append(refresh["content"].split("url=")[-1])
    return [address for address in found if not address.startswith("data:")]


def test_the_reader_of_addresses_sees_every_way_to_load():
    page = BeautifulSoup(
        """<link rel="stylesheet" href="//a/1"><link rel="canonical" href="https://no/0">
        <script src="http://a/2"></script>
        <img src="https://a/3" srcset="https://a/4 1x, b.png 2x">
        <style>@import "https://a/5"; p {background: url(//a/6)}
        </style><p style="background: url('https://a/7')"></p><svg><image xlink:href="https://a/8"/></svg>
        <a href="https://no/0">far</a><img src="data:image/png;base64,AA"><iframe src="https://a/9"></iframe>""",
        "html.parser",
    )
    foreign = [address for address in loads(page) if FOREIGN.match(address)]
    assert sorted(address[-1] for address in foreign) == list("123456789")


@pytest.mark.parametrize("name", contents())
def test_every_page_of_the_contents_is_there_and_says_something(pages, name):
    page = pages[HTML / f"{name}.html"]
    assert page.find("h1") is not None
    assert len(page.find("article").get_text().split()) > 20


def test_no_page_loads_anything_from_another_host(pages):
    found = {(path.name, address) for path, page in pages.items() for address in loads(page) if FOREIGN.match(address)}
    for sheet in HTML.rglob("*.css"):
        found |= {(sheet.name, address) for address in CSS.findall(sheet.read_text("utf-8")) if FOREIGN.match(address)}
    assert not found


def test_no_script_on_a_page_names_another_host(pages):
    found = {
        (path.name, address)
        for path, page in pages.items()
        for script in page.find_all("script")
        for address in re.findall(r"""["'](?:https?:)?//[\w.-]+[^"']*""", script.get_text())
    }
    assert not found


def test_everything_a_page_loads_and_links_to_is_there(pages):
    missing = set()
    ids = {path: {tag["id"] for tag in page.find_all(id=True)} for path, page in pages.items()}
    for path, page in pages.items():
        targets = loads(page) + [anchor["href"] for anchor in page.find_all("a", href=True)]
        for target in targets:
            address, fragment = urldefrag(target)
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not file.is_file():
                missing.add((path.name, target))
            elif fragment and file in ids and unquote(fragment) not in ids[file]:
                missing.add((path.name, target))
    for sheet in HTML.rglob("*.css"):
        for address in CSS.findall(sheet.read_text("utf-8")):
            local = urlsplit(address)
            if not local.scheme and local.path and not (sheet.parent / unquote(local.path)).is_file():
                missing.add((sheet.name, address))
    assert not missing


def test_mathematics_is_typeset_from_the_books_own_files(pages):
    with_math = {path: page for path, page in pages.items() if page.find(class_="math")}
    assert with_math, "no page of the book holds a formula"
    for path, page in with_math.items():
        (script,) = [s["src"] for s in page.find_all("script", src=True) if "tex-mml-chtml.js" in s["src"]]
        file = path.parent / script.split("?")[0]
        assert file.stat().st_size > 1_000_000
        fonts = {font.name for font in (file.parent / "output" / "chtml" / "fonts" / "woff-v2").glob("*.woff")}
        wanted = set(re.findall(r"MathJax_[A-Za-z0-9]+-[A-Za-z]+\\?\.woff", file.read_text("utf-8")))
        assert fonts and {name.replace("\\", "") for name in wanted} <= fonts
        assert not re.search(
            r"\\require|\\cancel|\\ce\{|\\bbox|\\color", "".join(m.get_text() for m in page.find_all(class_="math"))
        ), f"{path.name} uses a TeX extension that is not in the bundled script"


def test_every_link_to_a_term_has_its_definition_at_hand(pages):
    script = (HTML / "_static" / "terms.js").read_text("utf-8")
    told = json.loads(script.removeprefix("const TERMS = ").removesuffix(";\n"))
    assert all(len(text.split()) > 5 and not re.search(r"[{}`$]", text) for text in told.values())
    linked = {page: page.select('a.reference[href*="#term-"]:has(.std-term)') for page in pages.values()}
    assert any(linked.values())
    for page, anchors in linked.items():
        assert {urldefrag(anchor["href"])[1] for anchor in anchors} <= set(told)
        if anchors:
            scripts = {Path(urlsplit(script["src"]).path).name for script in page.select("script[src]")}
            assert {"terms.js", "glossary.js"} <= scripts


def test_there_is_one_search_box(pages):
    page = pages[HTML / "book" / "index.html"]
    assert len(page.select("header form[role=search], .bd-header form")) == 0


def differences(one: object, other: object, where: str = "") -> list[str]:
    """Where two records differ: numbers beyond the tolerance, everything else at all."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = (one.keys() | other.keys()) - RECORDED_ELSEWHERE
        return [d for key in sorted(keys) for d in differences(one.get(key), other.get(key), f"{where}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{where}[{i}]")]
    if isinstance(one, float) and isinstance(other, float | int):
        same = math.isclose(one, other, rel_tol=stored.RELATIVE, abs_tol=stored.ABSOLUTE) or (
            one != one and other != other
        )
    else:
        same = stored.agree(one, other) if isinstance(one, str) and isinstance(other, str) else one == other
    return [] if same else [f"{where}: {one!r} is tracked, {other!r} was computed"]


def test_the_reader_of_records_sees_a_difference():
    assert differences({"a": [1, 0.5], "versions": 1}, {"a": [1, 0.50001], "versions": 2}) == []
    assert len(differences({"a": [1, 0.5]}, {"a": [2, 0.51]})) == 2
    assert len(differences({"a": 1}, {"b": 1})) == 2


def test_the_tracked_records_are_what_was_computed(pages):
    """By the book or, where $KNCORE_COMPUTED names other folders of records, by the runs that left them there."""
    found, compared = [], 0
    own = {chapter.defaults["model"] for chapter in pipeline.chapters(ROOT) if "model" in chapter.defaults}
    for folder in map(pipeline.slug, own):
        absent = {path.name for path in (ROOT / "results" / folder).glob("*.json")}
        absent -= {path.name for computed in COMPUTED for path in (computed / folder).glob("*.json")}
        found += [f"results/{folder}/{name} is tracked, no notebook records it" for name in sorted(absent)]
    for computed in COMPUTED:
        for path in sorted(computed.rglob("*.json")):
            tracked = ROOT / "results" / path.relative_to(computed)
            if not tracked.exists():
                found.append(f"{tracked.relative_to(ROOT)} is missing")
                continue
            compared += 1
            pair = [json.loads(p.read_text("utf-8")) for p in (tracked, path)]
            found += [f"{tracked.relative_to(ROOT)} {difference}" for difference in differences(*pair)]
    assert not found, "run `make notebooks` and look at what changed:\n" + "\n".join(found)
    assert compared, "no record was computed"


def test_the_tracked_records_of_the_models_that_the_book_runs_are_fresh():
    own = {chapter.defaults["model"] for chapter in pipeline.chapters(ROOT) if "model" in chapter.defaults}
    own |= set(pipeline.BESIDE)
    records = [told for told in claims.read(ROOT / "results") if told["model"] in own]
    assert records
    found = {(told["claim"], told["model"]): claims.stale(told) for told in records}
    assert not any(found.values()), f"run `make notebooks`: {found}"


def test_the_matrix_shows_every_record_with_its_verdict_and_where_it_came_from(pages):
    page = pages[HTML / "book" / "claims.html"]
    heads = [head.get_text() for head in page.select("table.matrix thead th")]
    rows = [row.find_all(["th", "td"]) for row in page.select("table.matrix tbody tr")]
    cells = {}
    for claim, row in zip(claims.CLAIMS, rows, strict=True):
        cells |= {(claim, head): cell for head, cell in zip(heads, row, strict=True)}
    chapters = [c for c in pipeline.chapters(ROOT) if f"notebooks/{c.path.stem}" in contents()]
    own = {chapter.number: chapter for chapter in chapters}
    records = {(told["claim"], told["model"]): told for told in claims.read(STAGED / "results")}
    assert records
    for place, told in records.items():
        lines = [line.get_text() for line in cells[place].find_all("p")]
        assert lines[:3] == [told["verdict"], claims.effect(told), f"n = {told['n']}"], place
        reasons = claims.stale(told)
        assert lines[3:] == ["stale: " + "; ".join(reasons)] * bool(reasons), place
        assert cells[place].find("span")["class"] == [told["verdict"], *["outdated"] * bool(reasons)], place
        chapter = own.get(told["chapter"])
        if chapter and told["model"] == chapter.defaults.get("model", told["model"]):
            assert cells[place].find("a")["href"] == f"../notebooks/{chapter.path.stem}.html", place
    silent = {place for place in cells if place[1] != "Claim"} - set(records)
    assert {cells[place].get_text(strip=True) for place in silent} <= {"not run"}
    assert len(page.select("table.provenance tbody tr")) == len(records)
