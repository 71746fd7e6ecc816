"""The Sphinx extension: what plain Sphinx, with it, makes of stored notebooks and records. A toy book is built once."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import faults
import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from sphinx.application import Sphinx
from sphinx.errors import ConfigError
from sphinx.util.docutils import docutils_namespace, patch_docutils
from test_looking import SPECS, curves
from test_pages import put
from toy import notebook, snapshot

from knbook import book, runs, sphinxext
from knpaper import looking, stored

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "extensions": ["myst_nb", "sphinx_external_toc", "sphinx_design", "sphinxcontrib.bibtex", "knbook.sphinxext"],
    "bibtex_bibfiles": ["book/references.bib"],
    "external_toc_exclude_missing": True,
    "html_sourcelink_suffix": "",
    "html_theme": "basic",
    "myst_enable_extensions": ["attrs_inline", "colon_fence", "deflist", "dollarmath", "html_image"],
    "nb_execution_mode": "off",
    "nitpicky": True,
    "numfig": True,
    "suppress_warnings": ["mystnb.unknown_mime_type"],
}
TOC = "format: jb-book\nroot: book/index\nparts: [{chapters: [{file: notebooks/01-toy}, {file: notebooks/02-toy}]}]\n"
ROLES = (
    " ".join(f"{{{form}}}`equally-few`" for form in ("value", "share", "effect", "verdict"))
    + " {value}`equally-few@b/c`"
)
LINKS = "[a](../book/index.md) [b](02-toy.ipynb) [c](https://x.org/a) [d](01-toy.ipynb) ![e](e.svg)"
INDEX = """\
# Words & more

{term}`neuron` {ref}`there`

![drawn](drawn.svg)

```{glossary}
coarse set
  Of *one* {term}`neurons <neuron>` and {term}`neuron` {cite:p}`niu2024`.

  Two $x$.

neuron
  A number.
```

```{bibliography}
```

```{figures}
```
"""
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="{}pt" height="6.0pt" viewBox="0 0 1 1"></svg>'


def build(root: Path) -> str:
    """Build the pages of a checkout into _build/html and return the warnings."""
    warnings = io.StringIO()
    folders = {
        "srcdir": root,
        "confdir": None,
        "outdir": root / "_build" / "html",
        "doctreedir": root / "_build" / "trees",
    }
    with patch_docutils(), docutils_namespace():
        Sphinx(**folders, buildername="html", confoverrides=CONFIG, status=None, warning=warnings).build()
    return warnings.getvalue()


def drawn(width: int, caption: str = "", **data: object) -> nbformat.NotebookNode:
    metadata = {"mystnb": {"figure": {"caption": caption}, "image": {"alt": "Two lines."}}} if caption else {}
    output = new_output("display_data", {"image/svg+xml": SVG.format(width), **data})
    return new_code_cell("plot()", metadata=metadata, outputs=[output], execution_count=1)


@pytest.fixture(scope="module")
def site(tmp_path_factory, checkout) -> Path:
    """A toy book with runs on two other models, one of whose folders has blanks; its pages."""
    root = tmp_path_factory.mktemp("site")
    folders = [root / "notebooks", root / "book" / "runs" / "b--c", root / "book" / "runs" / "my model (1)"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "e.svg").write_text(SVG.format(9)) if folder.name == "notebooks" else None
        model = "tiny" if folder.name == "notebooks" else folder.name
        width = 3 + folders.index(folder)
        parameters = notebook("x").cells[1:2]
        parameters[0].source = f"model = {model!r}"
        table = new_output("display_data", {"text/html": "<table><tr><th></th><th>n</th></tr></table>"})
        cells = [new_markdown_cell(f"(there)=\n# 1 · Toy\n\n{ROLES}\n\n{LINKS}"), *parameters, drawn(width, "First.")]
        cells += [
            drawn(width, "Second.", **{looking.MIME: curves(model)}),
            drawn(width, **{looking.MIME: SPECS["trace"]}),
        ]
        cells += [new_code_cell("table", outputs=[table], execution_count=1)]
        (folder / "01-toy.ipynb").write_text(stored.dumps(stored.finalise(new_notebook(cells=cells))))
    other = new_notebook(cells=[new_markdown_cell("# Other\n\nText."), notebook("x").cells[1]])
    (root / "notebooks" / "02-toy.ipynb").write_text(stored.dumps(stored.finalise(other)))
    shutil.copy(checkout / "book" / "references.bib", root / "book")
    (root / "_toc.yml").write_text(TOC)
    (root / "_config.yml").write_text("title: Toy\nauthor: Some one\ncopyright: '2026'\n")
    (root / "book" / "index.md").write_text(INDEX)
    (root / "book" / "drawn.svg").write_text('<?xml version="1.0"?>' + SVG.format(3))
    ends = {"low": 0.1, "high": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        put(root / "results", "equally-few", "tiny", patch, value=0.123, verdict="supported", **ends)
        put(root / "results", "equally-few", "b/c", patch, value=0.456, verdict="inconclusive", **ends)
    assert build(root) == ""
    return root / "_build" / "html"


def page(site: Path, name: str | Path) -> BeautifulSoup:
    return BeautifulSoup((site / f"{name}.html").read_text(encoding="utf-8"), "html.parser")


RUN, BLANKS = "book/runs/b--c/01-toy", "book/runs/my model (1)/01-toy"


def test_runs_on_other_models_are_a_part_of_the_contents_with_a_page_for_each_model(site):
    root = site.parent.parent
    toc = sphinxext.with_runs(sphinxext.contents(root), root)
    chapters = [
        {"file": f"book/runs/{m}/index", "sections": [{"file": f"book/runs/{m}/01-toy"}]}
        for m in ("b--c", "my model (1)")
    ]
    assert toc["parts"][-1] == {"caption": "The same on other models", "chapters": chapters}
    assert page(site, "book/runs/my model (1)/index").find("h1").get_text().startswith("my model (1)")
    assert sphinxext.with_runs({"root": "a"}, root / "book") == {"root": "a"}


def test_the_page_of_a_model_that_comes_with_the_package_is_its_card(tmp_path, monkeypatch):
    monkeypatch.setattr(sphinxext, "SHIPPED", tmp_path)
    (tmp_path / "known").mkdir()
    (tmp_path / "known" / "README.md").write_text("# known\n\nMade of sugar.\n")
    text = sphinxext.model_card("known")
    assert text.startswith("# known\n") and text.endswith("Made of sugar.\n") and text.count("# ") == 1
    assert "`make book` shows it and does not repeat it" in text
    assert "does not repeat" not in sphinxext.model_card("controlled-gpt2")


def test_the_list_of_pages_names_each_page_once_and_all_of_them_are_there(site):
    text = (site / "llms.txt").read_text(encoding="utf-8")
    links = re.findall(r"\[(.+)\]\((.+)\)", text)
    toc = sphinxext.with_runs(sphinxext.contents(site.parent.parent), site.parent.parent)
    assert [link for _, link in links] == ["records/all.json", *(f"{name}.html" for name in sphinxext.pages_of(toc))]
    assert all((site / link).is_file() for _, link in links)
    assert "## The same on other models" in text and ("1 · Toy", f"{RUN}.html") in links


def test_prose_gets_the_numbers_of_its_own_model_and_no_other(site):
    told = {name: page(site, name).find("p").get_text() for name in ("notebooks/01-toy", RUN, BLANKS)}
    assert told["notebooks/01-toy"] == "0.12 12 % 0.12 [0.10, 0.50] supported 0.46"
    assert told[RUN] == "0.46 46 % 0.46 [0.10, 0.50] inconclusive 0.46"
    assert told[BLANKS] == "not run not run not run not run 0.46"
    assert page(site, "notebooks/01-toy").select_one("span.supported").get_text() == "supported"
    assert len(page(site, BLANKS).select("span.not-run")) == 4


def test_the_links_of_a_run_lead_where_they_led_in_the_notebook(site):
    links = {name: [a["href"] for a in page(site, name).select("h1 ~ p a")][:4] for name in ("notebooks/01-toy", RUN)}
    assert links["notebooks/01-toy"] == ["../book/index.html", "02-toy.html", "https://x.org/a", "#"]
    assert links[RUN] == ["../../index.html", "../../../notebooks/02-toy.html", "https://x.org/a", "#"]
    for name in links:
        assert (site / name).parent.joinpath(page(site, name).find("img", alt="e")["src"]).resolve().is_file()


def test_a_label_stays_with_the_chapter(site):
    assert (
        page(site, "book/index").find("a", class_="reference", string="1 · Toy")["href"]
        == "../notebooks/01-toy.html#there"
    )


@pytest.mark.kind("shown-is-data", own=True)
def test_a_figure_has_that_of_every_other_model_below_it(site):
    chapter = page(site, "notebooks/01-toy")
    below = chapter.select("details.beside")
    assert len(below) == 2
    for box in below:
        assert [label.get_text() for label in box.find_all("label")] == ["b--c", "my model (1)"]
        assert [image["alt"] for image in box.find_all("img")] == ["Two lines. On b--c.", "Two lines. On my model (1)."]
        pictures = [(site / "notebooks" / image["src"]).resolve().read_text() for image in box.find_all("img")]
        assert [re.search(r'width="(\d)pt"', picture)[1] for picture in pictures] == ["4", "5"]
        links = [link["href"] for link in box.select("p a")]
        assert links == ["../book/runs/b--c/01-toy.html", "../book/runs/my%20model%20%281%29/01-toy.html"]
    assert len({tag["id"] for tag in chapter.find_all(id=True)}) == len(chapter.find_all(id=True))
    assert not page(site, RUN).select("details.beside")


def test_figures_are_listed_by_number_with_anchors_made_of_their_captions(site):
    items = page(site, "book/index").select("dl.figures li")
    assert [(item.get_text(), item.a["href"]) for item in items] == [
        ("Fig. 1 First.", "../notebooks/01-toy.html#fig-first"),
        ("Fig. 2 Second.", "../notebooks/01-toy.html#fig-second"),
    ]


def test_the_title_of_a_run_names_its_model_and_the_contents_do_not(site):
    for name, title in (
        (BLANKS, "1 · Toy · my model (1)"),
        ("notebooks/01-toy", "1 · Toy"),
        ("book/runs/my model (1)/index", "my model (1)"),
    ):
        shown = page(site, name)
        assert shown.h1.get_text().removesuffix("¶") == title and shown.title.get_text().startswith(f"{title} — ")
    assert "Toy · my model" not in (site / "llms.txt").read_text(encoding="utf-8")


def test_the_picture_stays_and_the_specification_stands_below_its_cell(site):
    for name, model, others in (("notebooks/01-toy", "tiny", ["b--c", "my model (1)"]), (RUN, "b--c", [])):
        looks = page(site, name).select("div.look")
        assert [look["data-figure"] for look in looks] == ["0", "0"]
        found = [json.loads(look.find("script").string) for look in looks]
        assert found == [looking.combine(curves(model), [curves(other) for other in others]), SPECS["trace"]]
        for look in looks:
            assert "plot()" in look.find_previous_sibling("div", class_="cell").get_text()
    nb = nbformat.read(site / "_sources" / "notebooks" / "01-toy.ipynb", as_version=4)
    assert looking.MIME in nb.cells[3].outputs[0].data, "the notebook to download is as it was run"


def test_no_text_of_a_specification_ends_the_script_that_holds_it():
    html = sphinxext.look(SPECS["attribution-map"], 0)
    assert html.count("</script>") == 1 and "\n" not in html
    assert json.loads(BeautifulSoup(html, "html.parser").find("script").string) == SPECS["attribution-map"]


def test_every_page_ends_with_how_to_cite_it_and_a_notebook_with_where_it_comes_from(site):
    for name in ("book/index", "notebooks/01-toy", "book/runs/b--c/index", RUN):
        blocks = page(site, name).select("details.cite .highlight-bibtex")
        own, paper = (block.get_text() for block in blocks)
        assert own.startswith("@misc{kncore") and paper.startswith("@inproceedings{niu2024")
        rows = page(site, name).select("#where-this-page-comes-from table.origin tr")
        assert bool(rows) == name.endswith("-toy")
    assert "{1 ·" not in page(site, RUN).select_one(".cite pre").get_text()
    assert (site / "records" / "all.json").is_file() and (site / "archives" / "01-toy-b--c.zip").is_file()


def test_definitions_are_told_in_plain_text_by_their_anchors(site):
    script = (site / "_static" / "terms.js").read_text(encoding="utf-8")
    terms = json.loads(script.removeprefix("const TERMS = ").removesuffix(";\n"))
    assert terms == {"term-coarse-set": "Of one neurons and neuron. Two x.", "term-neuron": "A number."}


def test_pictures_keep_their_place_and_empty_header_cells_are_no_headers(site):
    image = page(site, "book/index").find("img")
    assert (image["width"], image["height"]) == ("4", "8")
    cells = page(site, "notebooks/01-toy").select("div.cell div.output.text_html tr > *")  # the box that scrolls
    assert [cell.name for cell in cells] == ["td", "th"]
    assert page(site, "book/index").select_one("div.citation, #niu2024")["role"] == "listitem"


def test_a_picture_without_a_size_is_refused(tmp_path):
    (tmp_path / "bare.svg").write_text('<svg viewBox="0 0 3 6"></svg>')
    with pytest.raises(sphinxext.ExtensionError, match="bare.svg has no width"):
        sphinxext.svg_size(tmp_path / "bare.svg")


def test_a_claim_that_is_not_declared_is_warned_of(toy):
    (toy / "book" / "index.md").write_text("# Toy\n\n{value}`equaly-few`\n")
    assert re.search(r"index.md.*no claim is called 'equaly-few'", build(toy))


def test_a_record_that_is_none_is_named_by_the_plain_tool(toy):
    (toy / "results" / "tiny").mkdir(parents=True)
    (toy / "results" / "tiny" / "equally-few.json").write_text("{")
    with pytest.raises(ConfigError, match="equally-few.json is not a record"):
        build(toy)


def test_every_toggle_of_the_contents_has_a_name():
    context = {
        "generate_toctree_html": lambda kind: BeautifulSoup(
            "<a>Other</a><details><summary></summary></details>", "html.parser"
        )
    }
    sphinxext.name_toggles(None, "", "", context, None)
    assert context["generate_toctree_html"]("sidebar").find("summary")["aria-label"] == "Chapters: Other"


def test_the_plain_tool_makes_the_pages_that_the_command_renders(tmp_path, monkeypatch):
    """With the settings of the book itself; nothing but pages that git ignores is added to the checkout."""
    root, html = faults._site(tmp_path)
    folder = root / "book" / "runs" / "other"
    folder.mkdir(parents=True)
    shutil.copy(root / "notebooks" / "01-first.ipynb", folder)
    before = snapshot(root)
    book.book(root, execute=False)
    names = [path.relative_to(html).with_suffix("") for path in html.glob("*/**/*.html")]
    articles = {name: str(page(html, name).find("article")) for name in names}
    shutil.rmtree(root / "_build")
    monkeypatch.setenv("PYTHONPATH", runs.python_path())
    command = [Path(sys.executable).with_name("jupyter-book"), "build", root, "-n", "-W", "--keep-going"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(articles) > 4
    for name, article in articles.items():
        assert str(page(html, name).find("article")) == article, name
    shutil.rmtree(root / "_build")
    added = set(snapshot(root)) - set(before)
    assert added == {"book/runs/other/index.md"} and "/book/runs/*/index.md" in (ROOT / ".gitignore").read_text()
