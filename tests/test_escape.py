"""Text that comes from a model, from data or from a name is shown on a page, and never run, loaded or typeset."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import nbformat
import pages as browser
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from toy import make_checkout, notebook

from kncore import book, claims, figures, looking, pages, stored
from kncore.stats import Estimate

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
        lambda: figures.trace_map(torch.ones(2, 3), [text, "b"], [0, 1, 2], "effect", (0, 0)),
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
    soup = BeautifulSoup(looking.markup(spec, 0), "html.parser")
    (script,) = soup.find_all("script")
    assert script["type"] == "application/json" and json.loads(script.string) == spec
    assert len(soup.find_all(True)) == 2


@pytest.mark.parametrize("text", [*HOSTILE, "a ``` b"])
def test_pages_made_from_records_show_it(text, tmp_path, monkeypatch):
    name = " ".join(text.split()).replace("/", "--")
    monkeypatch.setenv("KNCORE_RESULTS", str(tmp_path / "results"))
    lm = SimpleNamespace(name=name, revision=text, dtype=torch.float32)
    claims.record("equally-few", lm, Estimate(0.1, 0.0, 0.2, 40), seed=0, source=text)
    chapter = notebook()
    chapter.cells[1].source = f"model = {name!r}"
    make_checkout(tmp_path, **{f"n{CLAIM.chapter}_toy": chapter})
    named = (pages.provenance(tmp_path / "results"), pages.claims_matrix(tmp_path))
    for made in (*named, pages.claims_table(tmp_path)):
        table = made.replace("```{list-table}", "").replace("```", "", 0)
        html = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(
            "\n\n".join(re.findall(r"^(?:\* -|  -) (.*)$", table, re.MULTILINE)) if "list-table" in made else made
        )
        soup = BeautifulSoup(html, "html.parser")
        assert not soup.find_all(["script", "img", "iframe"]), made
        assert {link["href"] for link in soup.find_all("a")} <= {f"notebooks/{CLAIM.chapter}-toy.ipynb"}
        assert made not in named or name in " ".join(soup.get_text().split())
    assert not BeautifulSoup(MarkdownIt().render(book._card(name)), "html.parser").find_all(["script", "img", "a"])


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
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
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


def test_the_page_of_this_test_is_typeset_like_the_book(checkout):
    """The book's own settings of Markdown, so that what is tried above is what the book does."""
    told = (checkout / "_config.yml").read_text(encoding="utf-8")
    mine = re.search(r"myst_enable_extensions = \[(.*)\]", PAGE)[1].replace('"', "")
    theirs = re.search(r"myst_enable_extensions: \[(.*)\]", told)[1]
    assert set(mine.split(", ")) <= set(theirs.split(", "))
    assert Path(checkout, "book", "assets", "mathjax", "tex-mml-chtml.js").is_file()
