"""Text that comes from a model, from data or from a name is shown on a page, and never run, loaded or typeset."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import faults
import matplotlib.pyplot as plt
import nbformat
import pages as browser
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from docutils.core import publish_string
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from myst_parser.parsers.docutils_ import Parser
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from pybtex.database import parse_string
from test_pages import put, unloaded
from test_pages import shown as page_of
from test_provenance import origin, root, said  # noqa: F401
from toy import make_checkout, notebook

from knbook import book, pages, provenance, sphinxext
from kncore.store import disk
from knpaper import claims, figures, looking, stored
from knpaper.records import checksum, read_records
from knpaper.stats import Estimate

EVIL = "<script>document.title='run'</script>"
IMAGE = '<img src="http://192.0.2.1/x.png" onerror="document.title=\'run\'">'
MARKUP = "![x](http://192.0.2.1/x.png) [y](javascript:alert(1)) **bold** `code` $x^2$ \\(y\\) {{z}} | a"
HOSTILE = (EVIL, IMAGE, MARKUP, "-->", "]]>", "$", "$$\\frac{", "\\", "a_b_c", "&lt;", "</table><script>", "<!--")
CLAIM = claims.CLAIMS["equally-few"]


def shown(html: str) -> str:
    """The text of a piece of HTML, white space as one blank; fails where an element in it could act."""
    soup = BeautifulSoup(html, "html.parser")
    assert not soup.find_all(["script", "img", "iframe", "object", "a"])
    assert not [tag for tag in soup.find_all(True) if any(name.startswith("on") for name in tag.attrs)]
    return " ".join(soup.get_text().split())


@pytest.mark.parametrize("text", HOSTILE)
def test_tables_and_verdicts_show_it(text):
    table = figures.table([{text: "column", "target": text}]).data
    assert " ".join(text.split()) in shown(table) and "mathjax_ignore" in table
    verdict = claims.Verdict(CLAIM, Estimate(0.1, 0.0, 0.2, 40), text)._repr_html_()
    assert " ".join(text.split()) in shown(verdict) and "mathjax_ignore" in verdict


@given(st.sampled_from(HOSTILE) | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=30))
def test_plain_text_in_markdown_is_that_text(text):
    html = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(f"*{figures.plain('a' + text + 'b')}* end")
    soup = BeautifulSoup(html, "html.parser")
    assert {tag.name for tag in soup.find_all(True)} == {"p", "em"}
    assert " ".join(soup.get_text().split()) == " ".join(f"a{text}b end".split())


def test_html_in_a_markdown_output_is_stored_as_text():
    sound = "within 10<sup>-3</sup>, 1 < 2, a <- b"
    evil = f"{EVIL} {IMAGE} </div> <!-- x --> <sup onclick=run()> \\<b> \\\\<b>"
    cell = new_code_cell("1", outputs=[new_output("display_data", {"text/markdown": f"{sound} {evil}"})])
    done = stored.finalise(new_notebook(cells=[cell]))
    kept = done.cells[0].outputs[0].data["text/markdown"]
    assert kept.endswith(r"\<b> \\&lt;b>")  # a mark that is escaped already stays as it is
    assert kept.startswith(sound) and set(re.findall(r"(?<!\\)<[a-zA-Z/!][^>]*>", kept)) == {"<sup>", "</sup>"}
    assert stored.dumps(stored.finalise(done)) == stored.dumps(done)


@pytest.mark.parametrize("text", HOSTILE)
def test_figures_draw_it(text):
    """As outlines, or as a comment that nothing can leave."""
    one = Estimate(0.1, 0.0, 0.2, 40)
    draw = (
        lambda: figures.intervals({text: one}, "x"),
        lambda: figures.matrix(torch.eye(2), [text, "b"], "unit"),
        lambda: figures.word_changes({"panel": {"group": {text: (one, True)}}}, {"group": "black"}),
        lambda: figures.trace_maps({"": (torch.ones(2, 3), [text, "b"], [0, 1, 2], (0, 0))}, "effect")[0],
        lambda: figures.leaders({text: []}),
    )
    for function in draw:
        ax = function()
        from IPython.core.pylabtools import print_figure

        svg = print_figure((ax if hasattr(ax, "figure") else ax[0]).figure, "svg")
        plt.close("all")
        elements = list(ElementTree.fromstring(svg).iter())
        drawn = {one.tag.rpartition("}")[2] for one in elements}
        assert "svg" in drawn and not {"script", "img", "a", "foreignObject"} & drawn
        links = [value for one in elements for name, value in one.attrib.items() if name.endswith("href")]
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


@pytest.mark.parametrize("text", HOSTILE)
def test_figures_to_look_into_hold_it_as_data(text):
    spec = {"usermeta": {"look": "trace"}, "data": {"values": pd.DataFrame([{"token": text}]).to_csv(index=False)}}
    soup = BeautifulSoup(sphinxext.look(spec, 0), "html.parser")
    (script,) = soup.find_all("script")
    assert script["type"] == "application/json" and json.loads(script.string) == spec
    assert len(soup.find_all(True)) == 2


@pytest.mark.parametrize("text", [*HOSTILE, "a ``` b"])
def test_pages_made_from_records_show_it(text, tmp_path, monkeypatch):
    name = " ".join(text.split()).replace("/", "--")
    monkeypatch.setenv("KNCORE_RESULTS", str(tmp_path / "results"))
    claims.record("equally-few", unloaded(name, text), Estimate(0.1, 0.0, 0.2, 40), seed=0, source=text)
    chapter = notebook()
    chapter.cells[1].source = f"model = {name!r}"
    make_checkout(tmp_path, **{f"n{CLAIM.chapter}_toy": chapter})
    page = f"notebooks/{CLAIM.chapter}-toy"
    for table in ("provenance", "matrix", "marks"):
        soup = page_of(tmp_path, table, [page])
        assert not soup.find_all(["script", "img", "iframe"]), table
        assert {link["href"] for link in soup.find_all("a")} <= {page}
        assert name in " ".join(soup.get_text().split()), table
    html = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(pages.claims_table(tmp_path))
    soup = BeautifulSoup(html, "html.parser")
    assert not soup.find_all(["script", "img", "iframe"])
    assert {link["href"] for link in soup.find_all("a")} <= {f"{page}.ipynb"}
    card = BeautifulSoup(MarkdownIt().render(sphinxext.model_card(name)), "html.parser")
    assert not card.find_all(["script", "img", "a"])


# ------------------------------------------------------------------------------- what lies next to the results

SHOWN, OWN = pytest.mark.kind("shown-is-data"), pytest.mark.kind("shown-is-data", own=True)


def covering(mark: pytest.MarkDecorator, once_wrong: Sequence, others: Sequence = ()) -> list:
    """Parameters of a test, of which those that once went wrong count for a kind."""
    return [*(pytest.param(text, marks=mark) for text in once_wrong), *others]


NOTE = {"seconds": 75, "threads": "2", "date": "2026-02-02", "kncore": "0.1.0", "torch": "2.6.0"}
FENCE = "a\n```\n\n<script>document.title='run'</script>\n\n```{include} /etc/passwd"
ROLES = (
    "{ref}`x` {include}`y` {math}`z` {code}`w` [^1] [a]: javascript:alert(1) %% +++ :::{note}",
    "&lt;script&gt; &#60;script&#62; <http://192.0.2.1> http://192.0.2.1 {abbr}`a (b)` {.class} $$x$$",
    FENCE,
    "a\r```\x85```\u2028```\x0b<b>",
)


def toml(**changes) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in {**NOTE, **changes}.items())


@pytest.mark.parametrize(
    "text",
    covering(SHOWN, [EVIL, IMAGE, MARKUP]) + covering(OWN, ["&lt;", "</table><script>", *ROLES], ["$", "-->", "a_b_c"]),
)
def test_what_a_run_noted_is_shown_as_text(root, text):  # noqa: F811
    disk.write(root / "results" / "tiny" / "02.toml", toml(threads=text, kncore=text))
    rows = said(root, "notebooks/02-more")
    assert all(stored.visible(" ".join(text.split())) in rows[name] for name in ("Run took", "Packages"))
    cells = origin(root, "notebooks/02-more").values()
    assert not any(cell.find_all(["script", "img", "math"]) for cell in cells)
    links = [link["href"] for cell in cells for link in cell.find_all("a")]
    assert {link.split("/")[1] for link in links} == {"_sources", "archives"}


@SHOWN
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<script>", "is not what a run notes"),
        ("[" * 100_000, "is not what a run notes"),
        (toml(seconds="75"), "its seconds is '75', expected int"),
        (toml(threads=2), "its threads is 2, expected str"),
        (toml(seconds=-166), "its seconds are -166"),
        (toml().replace("75", "nan"), "its seconds is nan, expected int"),
        (toml(seconds=10**30), "its seconds are 1000000"),
        (toml(date="yesterday"), "'yesterday'"),
        pytest.param("", "its", marks=OWN),
        pytest.param(toml().replace("75", "9" * 5000), "is not what a run notes", marks=OWN),
        pytest.param(toml(seconds=True), "its seconds is True", marks=OWN),
        pytest.param(toml().replace('"2026-02-02"', "2026-02-02"), "its date is datetime", marks=OWN),
        pytest.param(toml(torch=["2.6.0"]), "its torch is", marks=OWN),
        pytest.param(toml() + "seconds = 1\n", "is not what a run notes", marks=OWN),
    ],
)
def test_a_note_that_no_run_left_is_refused_in_one_line(tmp_path, text, why):
    path = tmp_path / "results" / "tiny" / "01.toml"
    disk.write(path, text)
    with pytest.raises(ValueError, match=re.escape(why)) as error:
        provenance.check_notes(tmp_path / "results")
    said = str(error.value)
    assert said.startswith(str(path)) and "delete it" in said and "\n" not in said and len(said) < 600


@pytest.fixture
def crafted(tmp_path_factory, monkeypatch):
    """Makes a record with fields of an attacker's choice and a checksum that agrees; its path."""
    template = put(tmp_path_factory.mktemp("template"), "equally-few", "tiny", monkeypatch)

    def craft(folder: Path, model: str, **changes) -> Path:
        record = json.loads(template.read_text(encoding="utf-8")) | {"model": model} | changes
        path = folder / model.replace("/", "--") / "equally-few.json"
        return disk.write(path, json.dumps(record | {"checksum": checksum(record)}))

    return craft


@pytest.mark.parametrize("text", covering(OWN, [FENCE], [*HOSTILE, *(text for text in ROLES if text != FENCE)]))
def test_a_crafted_record_is_shown_as_text_on_every_page(root, text, crafted):  # noqa: F811
    """The tables as a browser reads them."""
    name = text.replace("/", "--")
    versions = dict.fromkeys(("kncore", "torch", text), text)
    crafted(root / "results", name, source=text, revision=text, dtype=text, date=text, code=text, versions=versions,
            statement=text, metric=text, rule=text, parameters={text: text})  # fmt: skip
    line = stored.visible(" ".join(name.split()))
    for table in ("matrix", "marks", "filter", "provenance"):
        html = page_of(root, table, ["notebooks/01-toy", "notebooks/02-more"])
        assert not html.find_all(["script", "img", "iframe", "math"]), table
        links = [link["href"] for link in html.find_all("a")]
        assert all(re.fullmatch(r"notebooks/0[12]-\w+", link) for link in links), table
        assert line in " ".join(html.get_text().split()), table
    assert "<script>" not in pages.claims_table(root)


@SHOWN
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"value": "0.1"}, "its value is '0.1', and a number"),
        ({"value": None}, "its value is None"),
        ({"value": True}, "its value is True"),
        ({"n": 40.5}, "its n is 40.5, and a whole number"),
        ({"n": -1}, "got -1"),
        ({"source": ["own"]}, "its source is ['own'], and text"),
        ({"versions": {"kncore": 1}}, "versions"),
        pytest.param({"low": 0.5, "high": 0.1}, "its ends are exchanged", marks=OWN),
        pytest.param({"value": float("nan")}, "not JSON compliant", marks=OWN),
        pytest.param({"high": float("inf")}, "not JSON compliant", marks=OWN),
        pytest.param({"value": 10**400}, "its value is 1000", marks=OWN),
        pytest.param({"revision": "\ud800"}, "surrogates not allowed", marks=OWN),
        pytest.param({"seed": "0"}, "its seed is '0'", marks=OWN),
        pytest.param({"parameters": []}, "parameters", marks=OWN),
        pytest.param({"date": 2026}, "its date is 2026", marks=OWN),
        pytest.param({"chapter": "../../x"}, "its chapter is '../../x'", marks=OWN),
        pytest.param({"chapter": "**"}, "its chapter is '**'", marks=OWN),
        pytest.param({"family": "x"}, "its family 'x'", marks=OWN),
        pytest.param({"data": {"/dev/stdin": ""}}, "are not those of the package", marks=OWN),
        pytest.param({"data": {"../../x": ""}}, "are not those of the package", marks=OWN),
    ],
)
def test_a_record_that_is_none_is_refused_though_its_checksum_agrees(tmp_path, changes, why, crafted):
    path = crafted(tmp_path, "tiny", **changes)
    with pytest.raises(ValueError, match=re.escape(why)) as error:
        read_records(tmp_path)
    assert str(error.value).startswith(f"{path} is not a record") and "\n" not in str(error.value)


@SHOWN
@pytest.mark.parametrize("name", ["seed", "source", "revision", "versions", "parameters", "dtype", "code"])
def test_a_record_without_a_field_is_refused(tmp_path, name, crafted):
    path = crafted(tmp_path, "tiny")
    record = {key: value for key, value in json.loads(path.read_text()).items() if key != name}
    path.write_text(json.dumps(record | {"checksum": checksum(record)}))
    with pytest.raises(ValueError, match=f"no {name}"):
        read_records(tmp_path)


@SHOWN
@pytest.mark.parametrize(
    "text",
    ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"]
    + [
        pytest.param(text, marks=OWN)
        for text in (" =1", "\u200b=1", "\uff1d1", "\n=1", '=HYPERLINK("x","y")', "\x00=1")
    ],
)
def test_no_text_of_a_record_is_a_formula_in_the_table(tmp_path, text, crafted):
    """An apostrophe before it, as spreadsheets do themselves; numbers are numbers, and JSON is exact."""
    name = "m" if "\x00" in text else text
    crafted(tmp_path / "results", name, source=text, value=-0.25, low=-0.5, high=-0.125, seed=-3, **{text: 1})
    (record,) = read_records(tmp_path / "results")
    record = {**record, "stale": []}
    (row,) = csv.DictReader(io.StringIO(provenance.to_csv([record]), newline=""))
    assert row["source"] == f"'{text}" and row[f"'{text}"] == "1" and row["model"] in ("m", f"'{text}")
    assert [row[name] for name in ("value", "low", "seed")] == ["-0.25", "-0.5", "-3"]
    assert not [cell for cell in (*row, *row.values()) if re.match(r"[\s=@+\x00\u200b\uff1d]", cell)]
    assert record["source"] == text


@pytest.mark.parametrize("text", covering(OWN, ["a\rb"], ['a"b', "a,b", "a;b\nc", "'=1", "a=1"]))
def test_the_table_of_records_is_read_as_it_was_written(tmp_path, text, crafted):
    crafted(tmp_path / "results", "m", source=text)
    (record,) = read_records(tmp_path / "results")
    (row,) = csv.DictReader(io.StringIO(provenance.to_csv([{**record, "stale": []}]), newline=""))
    assert row["source"] == text and row["n"] == "40"


@OWN
@pytest.mark.parametrize("model", ["my model", "a,b", "a{b}", "x\ny", "{\\input}"])
def test_the_entry_of_a_run_can_be_cited_whatever_its_folder_is_called(model):
    info = provenance.BookInfo("Book", "Author", "2026", "", "https://n.org", "", False)
    ((key, entry),) = parse_string(provenance.bibtex(info, f"book/runs/{model}/01-toy", "T"), "bibtex").entries.items()
    assert re.fullmatch(r"[\w.-]+", key) and " " not in entry.fields["url"] and "\n" not in entry.fields["url"]


@OWN
@pytest.mark.parametrize("text", ["# a", "1. a", "2) a", "- a", "+ a", "% a", "(a)=", "::: a", ": a"])
def test_plain_text_that_begins_a_line_begins_nothing_else(text):
    source = f"a\n\n{figures.plain(text)}"
    settings = {"myst_enable_extensions": ["colon_fence", "deflist"], "output_encoding": "unicode", "halt_level": 2}
    settings |= {"embed_stylesheet": False, "stylesheet_path": None}
    html = publish_string(source, parser=Parser(), writer_name="html5", settings_overrides=settings)
    assert [p.get_text() for p in BeautifulSoup(html, "html.parser").find_all("p")] == ["a", text]


CONTROL = ["\x00", "\x01", "a\x1b[31mb", "\x7f", "a\x85b", "\ud800", "\ufffe", "\u202eabc", "a\rb\tc"]


@pytest.mark.parametrize("text", covering(OWN, [*CONTROL, "$\\frac{$", "_hidden"], ["$", "$x$ $y$"]))
def test_every_label_of_a_figure_is_drawn_as_it_is(text, recwarn):
    """Control characters as escapes: a picture with one is no XML, and a browser shows nothing of it."""
    from IPython.core.pylabtools import print_figure

    one = Estimate(0.1, 0.0, 0.2, 40)
    frame = pd.DataFrame({"x": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 2.5], "kind": [text] * 3})
    draw = {
        "grouped": lambda: figures.grouped({text: {text: one}}, "x", {text: "red"}),
        "curves": lambda: figures.curves({text: {text: {1: one, 2: one}}}, "x", "y", {text: "red"}, log=False),
        "depths": lambda: figures.depths({text: []}, 3, ["red"]),
        "token_rows": lambda: figures.token_rows({text: ([text], [0.5])}, "x"),
        "word_changes": lambda: figures.word_changes({text: {text: {text: (one, True)}}}, {text: "black"}),
        "block_shares": lambda: figures.block_shares({text: [1, 2], "other": [2, 3]}, "y"),
        "trace_maps": lambda: figures.trace_maps({text: (torch.ones(1, 2), [text], [0, 1], (0, 0))}, "x"),
        "leaders": lambda: figures.leaders({text: []}),
        "matrix": lambda: figures.matrix(torch.eye(2), [text, "b"], "u"),
        "intervals": lambda: figures.intervals({text: one}, "x"),
        "scatter": lambda: figures.scatter(frame, {"x": "x"}, "y", "y", "kind", {text: "red"}),
    }
    for name, function in draw.items():
        axes = function()
        svg = print_figure((axes if hasattr(axes, "figure") else axes[0]).figure, "svg")
        plt.close("all")
        comments = re.findall(r"<!-- (.*?) -->", svg, re.DOTALL)
        assert ElementTree.fromstring(svg) is not None, name
        wanted = stored.visible(text).replace("--", "- -").strip()
        told = wanted.replace("_", " ") if name == "leaders" else wanted
        assert any(told in comment.replace(r"\$", "$") for comment in comments), (name, comments)


@pytest.mark.parametrize("text", covering(OWN, [*CONTROL, "a\rb", "007", "1e5", "True"], ["a\nb", 'a"b,c', "NA"]))
def test_a_figure_to_look_into_keeps_every_row_and_every_name(text):
    """A line end in a token is no row of its own, and a name that looks like a number stays that name."""
    spec = looking.trace_maps({text: (torch.ones(2, 3), [text, "b"], (0, 1, 2), (0, 0))}, "nats")
    values = looking.data(spec)
    assert len(values) == 6 and set(values.site) == {stored.visible(text)}
    assert list(values.block) == [0, 1, 2] * 2
    rows = list(csv.reader(io.StringIO(spec["data"]["values"], newline="")))
    assert len(rows) == 7 and {len(row) for row in rows} == {4}
    points = {"p": {"w": {at: Estimate(0.5, 0.4, 0.6, 20) for at in (1, 10)}}}
    several = [looking.curves(points, "x", "y", {"w": "red"}, name) for name in (text, "2")]
    both = looking.data(looking.combine(*several[:1], several[1:]))
    assert list(both.model) == [stored.visible(text)] * 2 + ["2"] * 2 and both["at"].tolist() == [1, 10] * 2


@pytest.mark.parametrize("text", covering(OWN, ["a\u2028b", "a\x85b", '"><script>'], ["</script>", "a\x0cb", "```"]))
def test_the_page_reads_back_the_specification_that_it_was_given(text):
    spec = {"usermeta": {"look": text}, "data": {"values": f"token\n{text}\n"}}
    (script,) = BeautifulSoup(sphinxext.look(spec, 0), "html.parser").find_all("script")
    assert json.loads(script.string) == spec and script.parent["class"] == ["look"]


# ------------------------------------------------------------------------------------------- in a browser


PAGE = """\
import sys
sys.path.insert(0, {root!r})
extensions = ["myst_nb", "sphinx.ext.mathjax"]
nb_execution_mode = "off"
smartquotes = False
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath", "html_image"]
html_theme = "basic"
html_static_path = [{assets!r}]
mathjax_path = "mathjax/tex-mml-chtml.js"
"""


@pytest.mark.skipif(browser.chromium() is None, reason="there is no Chromium")
def test_nothing_runs_in_a_browser(tmp_path, checkout):
    """A page like those of the book with all of it, in every kind of output, and one formula that is meant."""
    outputs = [new_output("display_data", {"text/html": figures.table([{"target": text} for text in HOSTILE]).data})]
    for text in HOSTILE:
        verdict = claims.Verdict(CLAIM, Estimate(0.1, 0.0, 0.2, 40), text)._repr_html_()
        outputs += [new_output("display_data", {"text/html": verdict})]
        outputs += [new_output("display_data", {"text/markdown": f"*{figures.plain(text)}* said"})]
        outputs += [new_output("stream", text=text + "\n")]
    outputs += [new_output("display_data", {"text/markdown": f"{EVIL} {IMAGE}"})]  # not escaped by who wrote it
    figures.intervals({EVIL: Estimate(0.1, 0.0, 0.2, 40)}, "x").figure.savefig(tmp_path / "f.svg")
    plt.close("all")
    outputs += [new_output("display_data", {"image/svg+xml": (tmp_path / "f.svg").read_text()})]
    cells = [new_markdown_cell("# Title\n\nMeant: $a^2$."), new_code_cell("1", outputs=outputs, execution_count=1)]
    source = tmp_path / "source"
    source.mkdir()
    (source / "conf.py").write_text(PAGE.format(root=str(checkout), assets=str(checkout / "book" / "assets")))
    nbformat.write(stored.finalise(new_notebook(cells=cells)), source / "index.ipynb")
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", str(source), str(tmp_path / "html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    command = [browser.chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=15000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "html" / "index.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    soup = BeautifulSoup(dom, "html.parser")
    assert soup.title.string.startswith("Title") and len(soup.find_all("mjx-container")) == 1
    body = soup.find("div", class_="body")
    assert not body.find_all("script")
    assert not [image for image in body.find_all("img") if image["src"].startswith("http")]
    assert not [link for link in body.find_all("a") if link.get("href", "").startswith(("http", "javascript"))]
    text = " ".join(body.get_text().split())
    for wanted in HOSTILE:
        assert text.count(" ".join(wanted.split())) >= 4, wanted
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)


@OWN
def test_a_book_with_hostile_files_beside_its_results_is_built_and_runs_nothing(tmp_path, crafted):
    """The whole way, with the book's own settings: a note of a run, a record, a folder with blanks and brackets."""
    site, _ = faults._site(tmp_path)
    folder = site / "book" / "runs" / "my model (1)"
    folder.mkdir(parents=True)
    shutil.copy(site / "notebooks" / "01-first.ipynb", folder)
    tables = (f"```{{book-table}} {name}\n```" for name in ("marks", "filter", "matrix", "provenance"))
    (site / "book" / "index.md").write_text("\n\n".join(["# Toy", *tables]))
    for place in ("tiny", "my model (1)"):
        disk.write(site / "results" / place / "01.toml", toml(threads=EVIL, torch=IMAGE, kncore=MARKUP))
    crafted(site / "results", EVIL.replace("/", "--"), source=IMAGE, date=MARKUP, dtype=FENCE)
    crafted(site / "results", FENCE.replace("/", "--"), source=EVIL, revision=EVIL)
    book.book(site, execute=False)
    html = site / "_build" / "html"
    for name in ("book/index", "notebooks/01-first", "book/runs/my model (1)/01-first"):
        if browser.chromium() is None:
            page = (html / f"{name}.html").read_text(encoding="utf-8")
        else:
            command = [browser.chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
            command += ["--virtual-time-budget=15000", "--host-resolver-rules=MAP * ~NOTFOUND"]
            command += [f"--user-data-dir={tmp_path / 'profile'}", (html / f"{name}.html").as_uri()]
            page = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        soup = BeautifulSoup(page, "html.parser")
        assert soup.title.string.startswith("Toy"), name
        article = soup.find("article")
        assert not article.find_all(["img", "mjx-container"]), name
        assert not [script for script in article.find_all("script") if "title" in script.get_text()], name
        links = [link.get("href", "") for link in article.find_all("a")]
        assert not [link for link in links if link.startswith(("http", "javascript"))], name
        text = " ".join(article.get_text().split()).translate(str.maketrans("‘’“”", "''\"\""))  # Sphinx sets them
        wanted = (MARKUP, EVIL, IMAGE) if name != "book/index" else (EVIL, IMAGE, MARKUP, EVIL.replace("/", "--"))
        assert not [one for one in wanted if " ".join(one.split()) not in text], name
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)


def test_the_page_of_this_test_is_typeset_like_the_book(checkout):
    """The book's own settings of Markdown, so that what is tried above is what the book does."""
    told = (checkout / "_config.yml").read_text(encoding="utf-8")
    mine = re.search(r"myst_enable_extensions = \[(.*)\]", PAGE)[1].replace('"', "")
    theirs = re.search(r"myst_enable_extensions: \[(.*)\]", told)[1]
    assert set(mine.split(", ")) <= set(theirs.split(", "))
    assert Path(checkout, "book", "assets", "mathjax", "tex-mml-chtml.js").is_file()
