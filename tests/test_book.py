"""The rendered book in _build/html: complete, its links whole, nothing in it fetched from another host.

`make test` builds the book first and sets KNCORE_BOOK=required; without a built book these tests are skipped otherwise.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import re
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

import knbook
import kncore
import knpaper
from knbook import checkout, sphinxext
from knpaper import claims, looking, stored
from knpaper.records import column_of, effect, read_records
from knpaper.staleness import stale

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
RECORDED_ELSEWHERE = {"versions", "packages", "seconds", "date", "platform", "checksum", "products"}


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


def size(path: Path, page: BeautifulSoup, *, later: bool) -> int:
    """Bytes of a page and of its own pictures, without those in closed boxes, which are fetched when one is opened, and
    unless `later` without those that are fetched when a reader comes near them.

    Style sheets, scripts and fonts are shared by all pages.
    """
    drawn = [image for image in page.find_all("img", src=True) if not image.find_parent("details", open=False)]
    pictures = {image["src"].split("?")[0] for image in drawn if later or image.get("loading") != "lazy"}
    local = [path.parent / unquote(source) for source in pictures if not source.startswith("data:")]
    return path.stat().st_size + sum(file.stat().st_size for file in local)


@pytest.mark.parametrize(("later", "limit"), [(False, 500_000), (True, 1_000_000)])
def test_no_page_is_larger_than_it_should_be(pages, later, limit):
    sizes = {path.relative_to(HTML).as_posix(): size(path, page, later=later) for path, page in pages.items()}
    assert max(sizes.values()) > (500_000 if later else 100_000), "the pictures were not counted"
    assert not {name: n for name, n in sizes.items() if n > limit}


def test_every_figure_is_listed_once_and_its_number_leads_to_it(pages):
    path = HTML / "book" / "figures.html"
    listed = {}
    for link in pages[path].select("dl.figures li a"):
        address, fragment = urldefrag(link["href"])
        place = (path.parent / address).resolve(), fragment
        assert place not in listed, f"{place} is listed twice"
        listed[place] = " ".join(link.find_parent("li").get_text().split())
    own = [HTML / f"{name}.html" for name in contents()]
    figures = {
        (page, figure["id"]): figure.figcaption for page in own for figure in pages[page].select("article figure")
    }
    assert {page for page, _ in figures} > {HTML / "notebooks" / f"{c.path.stem}.html" for c in checkout.chapters(ROOT)}
    assert listed.keys() == figures.keys()
    for place, caption in figures.items():
        assert " ".join(caption.get_text().split()).startswith(listed[place]) and place[1].startswith("fig-"), place


def test_titles_of_runs_on_other_models_name_the_model_in_a_search_and_in_a_browser(pages):
    script = (HTML / "searchindex.js").read_text("utf-8")
    index = json.loads(script.removeprefix("Search.setIndex(").removesuffix(")"))
    titles = dict(zip(index["docnames"], index["titles"], strict=True))
    assert len(set(titles.values())) == len(titles)
    runs = [name for name in titles if name.startswith("book/runs/") and not name.endswith("/index")]
    assert runs
    for name in runs:
        _, _, model, chapter = name.split("/")
        assert titles[name] == f"{titles[f'notebooks/{chapter}']} · {model}"
        assert pages[HTML / f"{name}.html"].title.get_text().startswith(titles[name])
        assert index["alltitles"][titles[name]] == [[index["docnames"].index(name), None]], "found twice"


def looked_into(page: BeautifulSoup) -> list[tuple[str, dict]]:
    """The interactive figures of a page: what each is of, and its specification."""
    return [(place["data-look"], json.loads(place.find("script").string)) for place in page.select("div.look")]


def test_interactive_figures_stand_below_the_picture_that_they_stand_for(pages):
    found = {}
    for path, page in pages.items():
        for place in page.select("div.look"):
            cell = place.find_previous_sibling(class_="cell")
            picture = cell.select(".cell_output figure > img")[int(place["data-figure"])]
            assert picture["alt"] and picture.parent.find("figcaption").get_text(strip=True), path.name
            script = place.find("script")
            assert script["type"] == "application/json" and "src" not in script.attrs
            found.setdefault(path.relative_to(HTML).as_posix(), []).append(place["data-look"])
    chapters = {name: looks for name, looks in found.items() if name.startswith("notebooks/")}
    assert chapters == {
        "notebooks/01-a-few-neurons.html": ["attribution-map"],
        "notebooks/04-turning-the-neurons-off.html": ["dose", "dose"],
        "notebooks/06-where-the-effect-sits.html": ["trace", "trace"],
    }


def test_what_an_interactive_figure_holds_is_what_the_notebook_stored(pages):
    for chapter in checkout.chapters(STAGED):
        page = pages[HTML / "notebooks" / f"{chapter.path.stem}.html"]
        source = HTML / "_sources" / "notebooks" / chapter.path.name
        outputs = [o for cell in nbformat.read(source, 4).cells for o in cell.get("outputs", [])]
        kept = [output.data[looking.MIME] for output in outputs if looking.MIME in output.get("data", {})]
        shown = looked_into(page)
        assert len(shown) == len(kept)
        for (_, spec), original in zip(shown, kept, strict=True):
            rows, mine = looking.data(spec), looking.data(original)
            if "model" in rows:
                assert set(rows.model) > set(mine.model), "a chapter shows the runs on other models too"
                rows = rows[rows.model.isin(mine.model)]
            assert rows.reset_index(drop=True).equals(mine)


def test_scripts_for_interactive_figures_are_the_books_own(pages):
    vega = HTML / "_static" / "vega"
    assert "Redistribution and use" in (vega / "LICENSE").read_text("utf-8")
    for name in ("vega", "vega-lite", "vega-embed"):
        assert (vega / f"{name}.min.js").stat().st_size > 50_000
    for path, page in pages.items():
        scripts = [script["src"] for script in page.find_all("script", src=True)]
        assert not [source for source in scripts if "vega" in source], f"{path.name} loads Vega before it is wanted"
        wanted = bool(page.select("div.look, #claims-filter"))
        assert sum("look.js" in source for source in scripts) == 1 or not wanted, path.name


def test_the_filter_of_the_claims_names_what_the_matrix_holds(pages):
    page = pages[HTML / "book" / "claims.html"]
    form = page.find("form", id="claims-filter")
    options = {
        field["name"]: [o["value"] for o in field.find_all("option") if o["value"]] for field in form.select("select")
    }
    named = {model for row in page.select("tr[data-model]") for model in row["data-model"].split("|")}
    assert set(options["model"]) == named
    assert set(options["chapter"]) == {claim.chapter for claim in claims.CLAIMS.values()} & {
        chapter.number for chapter in checkout.chapters(ROOT)
    }
    shown = {name for row in page.select("tr[data-model]") for name in row["class"]}
    assert set(options["verdict"]) >= shown & {"supported", "contradicted", "inconclusive", "not-run"}
    assert set(options["speaks-for"]) >= {name for name in shown if name.startswith("for-")}
    assert form.find("output")["aria-live"] == "polite" and form.find(attrs={"name": "text"})


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


def differences(one: object, other: object, where: str = "", slack: float = stored.ABSOLUTE) -> list[str]:
    """Where two parts of records differ: numbers beyond the tolerance, everything else at all."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = (one.keys() | other.keys()) - RECORDED_ELSEWHERE
        return [d for key in sorted(keys) for d in differences(one.get(key), other.get(key), f"{where}.{key}", slack)]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, pair in pairs for d in differences(*pair, f"{where}[{i}]", slack)]
    if isinstance(one, float) and isinstance(other, float | int):
        same = math.isclose(one, other, rel_tol=stored.RELATIVE, abs_tol=slack) or (one != one and other != other)
    else:
        same = stored.agree(one, other) if isinstance(one, str) and isinstance(other, str) else one == other
    return [] if same else [f"{where}: {one!r} is tracked, {other!r} was computed"]


def differences_of_records(tracked: dict, computed: dict) -> list[str]:
    """Where two records differ by more than a hundredth of the interval, a unit by more than a tenth, and a power by
    more than 0.02: what another processor rounds otherwise, a search for an edit amplifies, but it must be small
    against what other units would bring."""
    width = (tracked.get("high") or 0) - (tracked.get("low") or 0)
    slack = {"units": width / 10, "power": 0.02}
    keys = (tracked.keys() | computed.keys()) - RECORDED_ELSEWHERE
    found = []
    for key in sorted(keys):
        most = max(stored.ABSOLUTE, slack.get(key, width / 100))
        found += differences(tracked.get(key), computed.get(key), f".{key}", most)
    return found


def test_the_reader_of_records_sees_a_difference():
    record = {"value": 0.5, "low": 0.4, "high": 0.6, "verdict": "supported", "units": {"values": [[0.5, 0.0]]}}
    for near, far in (({"value": 0.5019}, {"value": 0.503}), ({"low": 0.4019}, {"low": 0.403})):
        assert differences_of_records(record, record | near) == []
        assert len(differences_of_records(record, record | far)) == 1
    assert differences_of_records(record, record | {"units": {"values": [[0.519, 0.0]]}}) == []
    assert len(differences_of_records(record, record | {"units": {"values": [[0.5, 0.021]]}})) == 1
    assert len(differences_of_records(record, record | {"verdict": "inconclusive", "n": 3})) == 2
    assert differences({"a": [1, 0.5], "versions": 1}, {"a": [1, 0.50001], "versions": 2}) == []
    assert len(differences({"a": [1, 0.5]}, {"a": [2, 0.51]})) == 2
    assert len(differences({"a": 1}, {"b": 1})) == 2


def test_the_tracked_records_are_what_was_computed(pages):
    """By the book or, where $KNCORE_COMPUTED names other folders of records, by the runs that left them there."""
    found, compared = [], 0
    own = {chapter.defaults["model"] for chapter in checkout.chapters(ROOT) if "model" in chapter.defaults}
    for folder in map(checkout.slug, own):
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
            found += [f"{tracked.relative_to(ROOT)} {difference}" for difference in differences_of_records(*pair)]
    assert not found, "run `make notebooks` and look at what changed:\n" + "\n".join(found)
    assert compared, "no record was computed"


def test_the_tracked_records_of_the_models_that_the_book_runs_are_fresh():
    own = {chapter.defaults["model"] for chapter in checkout.chapters(ROOT) if "model" in chapter.defaults}
    own |= set(checkout.COMPANION_MODELS)
    records = [told for told in read_records(ROOT / "results") if told["model"] in own]
    assert records
    found = {(told["claim"], column_of(told)): stale(told) for told in records}
    assert not any(found.values()), f"run `make notebooks`: {found}"


def test_the_matrix_shows_every_record_with_its_verdict_and_where_it_came_from(pages):
    page = pages[HTML / "book" / "claims.html"]
    chapters = [c for c in checkout.chapters(ROOT) if f"notebooks/{c.path.stem}" in contents()]
    own = {chapter.number: chapter for chapter in chapters}
    records = {(told["claim"], column_of(told)): told for told in read_records(STAGED / "results")}
    rows = {}
    for body in page.select("table.matrix > tbody"):
        rows |= {(body["id"], row["data-model"]): row for row in body.select("tr[data-model]:not(.not-run)")}
    further = {key for key in records if re.fullmatch(r"controlled-[a-z]+\d*-\d+", key[1])}
    assert records and rows.keys() == records.keys() - further
    assert any(told["n"] == 0 for told in records.values())
    for place, row in rows.items():
        told, claim, said = records[place], claims.CLAIMS[place[0]], {}
        checks = {records[check, place[1]]["verdict"] for check in claim.needs.split() if (check, place[1]) in records}
        check = "contradicted" if "contradicted" in checks else ""
        if check:
            told = told | {"verdict": "inconclusive", "side": "neither"}
        for cell in row.find_all("td"):
            said[cell["data-label"]] = cell.get_text().strip()
        reasons = stale(records[place])
        verdict = claim.word(told["verdict"]) + (" stale: " + "; ".join(reasons) if reasons else "")
        verdict += " void: its check failed" * (check == "contradicted")
        assert re.sub(" (unstable|not known) over seeds$", "", said["Verdict"]) == verdict, place
        shown = effect(told) if told["n"] else "– –"
        assert f"{said['Effect']} {said['95 % interval']}" == shown and said["n"] == str(told["n"]), place
        assert claim.check or said["Speaks for"] == told.get("side", "neither"), place
        chapter = own.get(told["chapter"])
        if chapter and place[1] == chapter.defaults.get("model", place[1]):
            assert row.find("a")["href"] == f"../notebooks/{chapter.path.stem}.html", place
    assert {body["id"] for body in page.select("table.matrix > tbody")} == set(claims.CLAIMS)
    assert len(page.select("table.provenance tbody tr")) == len(records)


def test_every_mark_leads_to_its_claim(pages):
    for name in ("index", "across-models"):
        marks = pages[HTML / "book" / f"{name}.html"].select("table.marks a.mark")
        assert marks, name
        for mark in marks:
            assert claims.CLAIMS[mark["href"].partition("#")[2]].statement in mark["aria-label"]


def test_every_page_can_be_cited_and_every_notebook_says_where_it_comes_from(pages):
    for name in sphinxext.pages_of(sphinxext.with_runs(sphinxext.contents(STAGED), STAGED)):
        page = pages[HTML / f"{name}.html"]
        assert len(page.select("details.cite .highlight-bibtex, .cite .highlight-bibtex")) == 2, name
        rows = {row.find("th").get_text(strip=True): row.find("td") for row in page.select("table.origin tr")}
        if not (STAGED / f"{name}.ipynb").is_file():
            assert not rows, name
            continue
        assert {"Model", "Data", "Seed", "Packages", "Run took", "Rendered from", "Take away"} <= set(rows), name
        assert all(link.has_attr("download") for link in rows["Take away"].find_all("a")), name


def test_the_button_of_the_theme_gives_the_notebook_as_it_ran(pages):
    for chapter in checkout.chapters(ROOT):
        page = pages[HTML / "notebooks" / f"{chapter.path.stem}.html"]
        (button,) = page.select("a.btn-download-source-button")
        nb = nbformat.read((HTML / "notebooks" / button["href"]).resolve(), as_version=4)
        assert len(nb.cells) == len(nbformat.read(chapter.path, as_version=4).cells), chapter.path.name


def test_the_reference_documents_everything_public(pages):
    reference = [pages[HTML / "book" / f"{name}.html"] for name in ("api", "api-study", "api-claims", "api-press")]
    there = {tag["id"] for page in reference for tag in page.find_all(id=True)}
    wanted = set()
    for name in [name for package in (kncore, knpaper, knbook) for name in sphinxext.modules(package)]:
        module = importlib.import_module(name)
        for member, what in vars(module).items():
            own = (inspect.isfunction(what) or inspect.isclass(what)) and what.__module__ == module.__name__
            wanted |= {f"{name}.{member}"} if own and not member.startswith("_") else set()
    assert wanted and wanted <= there, wanted - there
