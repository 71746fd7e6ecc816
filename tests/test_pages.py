"""From stored notebooks and records to what Jupyter Book renders, on toy notebooks that need no model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from docutils.core import publish_string
from hypothesis import example, given
from hypothesis import strategies as st
from myst_parser.parsers.docutils_ import Parser
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from toy import COMPUTE, make_checkout, notebook, snapshot

from kncore import book, claims, models, pages, pipeline
from kncore.stats import Estimate

SHOWN, OWN = pytest.mark.kind("shown-is-data"), pytest.mark.kind("shown-is-data", own=True)
NOTEBOOK = nbformat.writes(notebook("1"))

# ------------------------------------------------------------------------------------------------ the book


def test_staging_copies_and_adds_the_runs_on_other_models(toy):
    (toy / "book" / "runs" / "other").mkdir(parents=True)
    shutil.copy(toy / "notebooks" / "01-toy.ipynb", toy / "book" / "runs" / "other")
    before = snapshot(toy)
    staging = book.stage(toy)
    assert (staging / "book" / "index.md").read_text() == "# Toy\n"
    contents = yaml.safe_load((staging / "_toc.yml").read_text())
    below = [{"file": "book/runs/other/01-toy"}]
    assert contents["parts"][-1]["chapters"] == [{"file": "book/runs/other/index", "sections": below}]
    assert (staging / "book" / "runs" / "other" / "index.md").read_text().startswith("# other\n")
    assert {name: data for name, data in snapshot(toy).items() if not name.startswith("_build")} == before


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("_toc.yml", "root: [", "cannot be read"),
        ("_toc.yml", "", "names with values are expected"),
        ("_toc.yml", "root: book/index", "no parts"),
        ("_toc.yml", "root: book/index\nparts:\n- chapters:\n  - book/index", "each with a file"),
        ("_toc.yml", "root: book/nowhere\nparts: []", "names book/nowhere"),
        ("_config.yml", "- title", "names with values are expected"),
        ("book/index.md", b"\xff", "git checkout -- book/index.md"),
        ("notebooks/01-toy.ipynb", "{", "is no notebook"),
        ("results/other/claim.json", "{", "toy/results/other/claim.json is not a record"),
        ("results/other/claim.json", "[" * 100_000, "toy/results/other/claim.json is not a record"),
        pytest.param("results/tiny/01.toml", "<script>", "toy/results/tiny/01.toml is not what a run", marks=SHOWN),
        pytest.param("results/09.toml", b"\xff", "toy/results/09.toml is not what a run", marks=SHOWN),
        pytest.param("book/runs/<b>/01-toy.ipynb", NOTEBOOK, "'<b>' is no plain name", marks=SHOWN),
        pytest.param("book/runs/a  b/01-toy.ipynb", NOTEBOOK, "'a  b' is no plain name", marks=OWN),
        pytest.param("book/runs/a#b/01-toy.ipynb", NOTEBOOK, "'a#b' is no plain name", marks=OWN),
        pytest.param("book/runs/{ref}`a`/01-toy.ipynb", NOTEBOOK, "'{ref}`a`' is no plain name", marks=OWN),
        pytest.param("book/runs/b/01-a\nb.ipynb", NOTEBOOK, "is no plain name", marks=OWN),
    ],
)
@pytest.mark.parametrize("execute", [True, False])
def test_what_a_book_cannot_be_made_of_is_named_before_anything_runs(toy, monkeypatch, name, text, said, execute):
    monkeypatch.setattr(book, "_run_all", lambda *_: pytest.fail("notebooks ran"))
    (toy / name).parent.mkdir(parents=True, exist_ok=True)
    pipeline.write(toy / name, text)
    with pytest.raises((pipeline.UsageError, ValueError), match=re.escape(said)) as error:
        book.book(toy, execute=execute)
    assert "staging" not in str(error.value) and "\n" not in str(error.value)


def test_the_page_of_a_model_that_comes_with_the_package_is_its_card(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "SHIPPED", tmp_path / "weights")
    (tmp_path / "weights" / "known").mkdir(parents=True)
    (tmp_path / "weights" / "known" / "README.md").write_text("# known\n\nMade of sugar.\n")
    (toy / "book" / "runs" / "known").mkdir(parents=True)
    shutil.copy(toy / "notebooks" / "01-toy.ipynb", toy / "book" / "runs" / "known")
    page = (book.stage(toy) / "book" / "runs" / "known" / "index.md").read_text()
    assert page.startswith("# known\n") and page.endswith("Made of sugar.\n") and page.count("# ") == 1


def test_a_chapter_that_compares_models_is_given_one_and_has_no_run_of_its_own(tmp_path):
    compares = notebook("print(models)")
    compares.cells[1].source = 'models = "tiny,other"'
    root = make_checkout(tmp_path / "toy", n01_toy=notebook(COMPUTE), n02_both=compares)
    written = pipeline.run(root, model="gpt2")
    assert [path.name for path in written] == ["01-toy.ipynb"]
    assert not (root / "book" / "runs" / "gpt2" / "02-both.ipynb").exists()
    pipeline.run(root, model="gpt2", only=["02"], out=tmp_path / "out")
    ran = nbformat.read(tmp_path / "out" / "02-both.ipynb", as_version=4)
    assert ran.cells[-1].outputs[0].text == "gpt2\n"


def test_a_run_leaves_the_records_that_another_one_made_meanwhile(tmp_path):
    meanwhile = tmp_path / "toy" / "results" / "other" / "claim.json"
    source = COMPUTE + f"\n_ = pathlib.Path({str(meanwhile)!r}).write_text('newer')"
    root = make_checkout(tmp_path / "toy", n01_toy=notebook(source))
    meanwhile.parent.mkdir(parents=True)
    meanwhile.write_text("older")
    pipeline.run(root)
    assert meanwhile.read_text() == "newer"
    assert (root / "results" / "tiny" / "claim.json").is_file()


def test_the_models_beside_run_together_and_their_records_join(tmp_path, monkeypatch):
    source = COMPUTE.replace('"tiny")', "model)")
    root = make_checkout(tmp_path / "toy", n01_toy=notebook(source))
    monkeypatch.setattr(book, "BESIDE", ("gpt2", "gpt2-xl", "llama-2-7b"))
    for name in ("gpt2", "gpt2-xl"):
        (root / "book" / "runs" / name).mkdir(parents=True)
        shutil.copy(root / "notebooks" / "01-toy.ipynb", root / "book" / "runs" / name)
    staging = book.stage(root)
    book._run_all(root, staging, 60)
    for name in ("gpt2", "gpt2-xl"):
        ran = nbformat.read(staging / "book" / "runs" / name / "01-toy.ipynb", as_version=4)
        assert ran.cells[-1].outputs[0].text.startswith(f"{name} 0.0")
        assert (staging / "results" / name / "claim.json").is_file()
        assert not (staging / "book" / "runs" / name / "results").exists()
    assert not (staging / "book" / "runs" / "llama-2-7b").exists()


def test_chapters_that_attribute_share_a_job(tmp_path):
    attributing = notebook("kncore.attribute(lm, queries)")
    root = make_checkout(tmp_path / "toy", n01_one=attributing, n02_two=notebook(COMPUTE), n03_three=attributing)
    jobs = book._jobs(root, root / "_build" / "staging")
    assert [arguments for arguments, *_ in jobs.values()] == [["--only", "01,03"], ["--only", "02"]]


def test_a_model_beside_that_fails_is_named_with_its_cell(tmp_path, monkeypatch):
    root = make_checkout(tmp_path / "toy", n01_toy=notebook('1 / (model != "gpt2")'))
    monkeypatch.setattr(book, "BESIDE", ("gpt2",))
    (root / "book" / "runs" / "gpt2").mkdir(parents=True)
    shutil.copy(root / "notebooks" / "01-toy.ipynb", root / "book" / "runs" / "gpt2")
    with pytest.raises(pipeline.RunError, match=r"(?s)gpt2:.*cell 4 .*ZeroDivisionError"):
        book._run_all(root, book.stage(root), 60)


def test_a_figure_has_that_of_every_other_model_below_it(toy):
    def drawn(path, *pictures):
        cells = [
            new_code_cell(
                "plot()",
                metadata={"mystnb": {"figure": {"caption": caption}, "image": {"alt": "Two lines."}}},
                outputs=[new_output("display_data", {"image/svg+xml": svg, "text/plain": "figure"})],
            )
            for caption, svg in pictures
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(new_notebook(cells=[new_markdown_cell("# Toy"), *cells]), path)

    drawn(toy / "notebooks" / "01-toy.ipynb", ("First.", "<svg>a</svg>"), ("Second.", "<svg>b</svg>"))
    drawn(toy / "book" / "runs" / "minilm-mlm" / "01-toy.ipynb", ("Second.", "<svg>m</svg>"))
    drawn(toy / "book" / "runs" / "controlled-gpt2" / "01-toy.ipynb", ("Second.", "<svg>g</svg>"), ("No.", "<svg/>"))
    (toy / "_config.yml").touch()
    staging = book.stage(toy)
    book._set_beside(staging)
    _, first, second, beside = nbformat.read(staging / "notebooks" / "01-toy.ipynb", as_version=4).cells
    assert first.cell_type == second.cell_type == "code" and beside.cell_type == "markdown"
    assert re.findall(r"tab-item} (.+)", beside.source) == ["controlled-gpt2", "minilm-mlm"]
    pictures = [staging / "notebooks" / path for path in re.findall(r"{image} (.+)", beside.source)]
    assert [path.read_text() for path in pictures] == ["<svg>g</svg>", "<svg>m</svg>"]
    assert re.findall(r":alt: (.+)", beside.source) == ["Two lines. On controlled-gpt2.", "Two lines. On minilm-mlm."]
    assert all((staging / "notebooks" / path).is_file() for path in re.findall(r"]\((.+)\)", beside.source))


def test_a_label_stays_with_the_chapter(toy):
    (toy / "book" / "runs" / "other").mkdir(parents=True)
    nbformat.write(
        new_notebook(cells=[new_markdown_cell("(there)=\n## There\n\n(not) = one")]),
        toy / "book" / "runs" / "other" / "01-toy.ipynb",
    )
    staging = book.stage(toy)
    cell = nbformat.read(staging / "book" / "runs" / "other" / "01-toy.ipynb", as_version=4).cells[0]
    assert cell.source == "## There\n\n(not) = one"


def test_the_links_of_a_run_lead_where_they_led_in_the_notebook(toy):
    (toy / "book" / "runs" / "other").mkdir(parents=True)
    (toy / "book" / "thesis.md").touch()
    links = "[a](../book/thesis.md#part) [](02-toy.ipynb) ![c](03-toy.ipynb) [d](https://x.org/a) [e](#part) [f](no.md)"
    for folder, names in (("notebooks", "123"), ("book/runs/other", "12")):
        for number in names:
            nbformat.write(new_notebook(cells=[new_markdown_cell(links)]), toy / folder / f"0{number}-toy.ipynb")
    staging = book.stage(toy)
    nb = nbformat.read(staging / "book" / "runs" / "other" / "01-toy.ipynb", as_version=4)
    assert nb.cells[0].source == links.replace("../book", "../..").replace("03-", "../../../notebooks/03-")
    assert nbformat.read(staging / "notebooks" / "01-toy.ipynb", as_version=4).cells[0].source == links


def unloaded(name: str, revision: str = "0123456789abcdef") -> SimpleNamespace:
    """What a record needs of a model, without one."""
    spec = SimpleNamespace(family="gpt2")
    return SimpleNamespace(name=name, revision=revision, dtype="float32", touched=False, spec=spec)


def put(folder: Path, claim: str, model: str, monkeypatch, **changes) -> Path:
    """A record with made-up numbers below `folder`; `changes` are made and sealed after it was recorded."""
    monkeypatch.setenv("KNCORE_RESULTS", str(folder))
    claims.record(claim, unloaded(model), Estimate(0.8, 0.6, 0.9, 40), seed=0, source="own")
    path = folder / model.replace("/", "--") / f"{claim}.json"
    told = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(told | {"checksum": claims.checksum(told)}, indent=1, ensure_ascii=False) + "\n")
    return path


def test_the_book_keeps_the_dates_of_unchanged_records_and_no_claim_that_is_no_longer_recorded(tmp_path, monkeypatch):
    new, old = tmp_path / "new", tmp_path / "toy" / "results"
    told = [put(new, claim, "tiny", monkeypatch) for claim in ("fact-has-neurons", "fact-owns-neuron")]
    source = "import json, os, pathlib\nfolder = pathlib.Path(os.environ['KNCORE_RESULTS'], 'tiny')\nfolder.mkdir()\n"
    source += "\n".join(f"_ = (folder / {p.name!r}).write_text({p.read_text()!r})" for p in told)
    toy = make_checkout(tmp_path / "toy", n01_toy=notebook(source))
    (toy / "_config.yml").touch()
    put(old, "fact-has-neurons", "tiny", monkeypatch, date="2020-02-02")
    put(old, "fact-owns-neuron", "tiny", monkeypatch, date="2020-02-02", value=0.7)
    put(old, "equally-few", "tiny", monkeypatch, date="2020-02-02")
    put(old, "equally-few", "other", monkeypatch, date="2020-02-02")

    def build(command, **_):
        pipeline.write(Path(command[-1]) / "_build" / "html" / "index.html", "")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(book, "subprocess", SimpleNamespace(run=build, Popen=subprocess.Popen))
    before = snapshot(toy)
    book.book(toy)
    assert {name: data for name, data in snapshot(toy).items() if not name.startswith("_build")} == before
    staging = toy / "_build" / "staging"
    dates = {(told["claim"], told["model"]): told["date"] for told in claims.read(staging / "results")}
    today = json.loads(told[0].read_text())["date"]
    assert dates == {
        ("fact-has-neurons", "tiny"): "2020-02-02",
        ("fact-owns-neuron", "tiny"): today,
        ("equally-few", "other"): "2020-02-02",
    }
    rows = body(shown(staging, "provenance.md"))
    assert [row[-1].get_text() for row in rows] == ["2020-02-02", today, "2020-02-02"]


def test_pages_that_a_killed_run_had_put_aside_come_back(toy, monkeypatch):
    pipeline.write(toy / "_build" / "html.old-x" / "was" / "index.html", "earlier")
    monkeypatch.setattr(book, "stage", lambda *_, **__: pytest.fail("the book does not build"))
    with pytest.raises(pytest.fail.Exception):
        book.book(toy, execute=False)
    assert (toy / "_build" / "html" / "index.html").read_text() == "earlier"
    assert not list((toy / "_build").glob("html.old-*/was"))


def test_pages_keep_the_place_of_pictures_and_name_their_toggles(tmp_path):
    (tmp_path / "_static").mkdir()
    (tmp_path / "_static" / "part.html").write_text("<th></th>")
    (tmp_path / "points.svg").write_text(
        '<?xml version="1.0"?><svg viewBox="0 0 3 6" height="6.0pt" width="3pt"></svg>'
    )
    (tmp_path / "pixels.svg").write_text('<svg width="900" height="566"></svg>')
    page = tmp_path / "page.html"
    page.write_text(
        '<img alt="a" src="points.svg" /><img src="pixels.svg"/><img width="1" src="points.svg"><img src="a.png">'
        '<a href="x">Other</a><details open="open"><summary><i></i></summary></details><th></th><th>n</th>'
        "<dl>\n<dd><em>a</em>, </dd>\n<dd>b</dd>\n</dl><dl><dt>t</dt><dd>d</dd></dl>"
    )
    book.finish(tmp_path)
    assert page.read_text() == (
        '<img width="4" height="8" alt="a" src="points.svg" /><img width="900" height="566" src="pixels.svg"/>'
        '<img width="1" src="points.svg"><img src="a.png">'
        '<a href="x">Other</a><details open="open"><summary aria-label="Chapters: Other"><i></i></summary></details>'
        '<td></td><th>n</th><span class="sig-lines"><span><em>a</em>, </span>\n<span>b</span>\n</span>'
        "<dl><dt>t</dt><dd>d</dd></dl>"
    )
    assert (tmp_path / "_static" / "part.html").read_text() == "<th></th>"


def test_a_picture_without_a_size_is_refused(tmp_path):
    (tmp_path / "bare.svg").write_text('<svg viewBox="0 0 3 6"></svg>')
    (tmp_path / "page.html").write_text('<img src="bare.svg">')
    with pytest.raises(pipeline.RunError, match="bare.svg has no width"):
        book.finish(tmp_path)


# -------------------------------------------------------------------------------------------------- claims


def shown(staging: Path, name: str) -> BeautifulSoup:
    """A generated page as a reader sees it; whatever the parser warns of is an error."""
    root = Path(__file__).resolve().parent.parent
    extensions = yaml.safe_load((root / "_config.yml").read_text())["parse"]["myst_enable_extensions"]
    settings = {"myst_enable_extensions": extensions, "myst_all_links_external": True, "halt_level": 2}
    settings |= {"output_encoding": "unicode", "embed_stylesheet": False, "stylesheet_path": None}
    text = (staging / "book" / "generated" / name).read_text(encoding="utf-8")
    html = publish_string(text, parser=Parser(), writer_name="html5", settings_overrides=settings)
    return BeautifulSoup(html, "html.parser")


def body(page: BeautifulSoup) -> list:
    return [row.find_all(["th", "td"]) for row in page.select("tbody tr")]


def lines(cell) -> list[str]:
    return [paragraph.get_text() for paragraph in cell.find_all("p")]


@pytest.fixture
def staging(toy):
    (toy / "_toc.yml").write_text(
        yaml.safe_dump({"root": "book/index", "parts": [{"chapters": [{"file": "notebooks/01-toy"}]}]})
    )
    return toy


def test_the_matrix_has_a_row_for_each_claim_and_a_column_for_each_model(staging, monkeypatch):
    for claim in claims.CLAIMS:
        put(staging / "results", claim, "tiny", monkeypatch)
    put(staging / "results", "fact-has-neurons", "z", monkeypatch)
    put(staging / "results", "equally-few", "a/b@c", monkeypatch)
    pages.generate(staging)
    page = shown(staging, "matrix.md")
    assert [head.get_text() for head in page.select("thead th")] == ["Claim", "tiny", "a/b@c", "z"]
    rows = dict(zip(claims.CLAIMS, body(page), strict=True))
    for claim, cells in rows.items():
        told = claims.CLAIMS[claim]
        assert lines(cells[0]) == [told.statement, f"Chapter {told.chapter}, {claim}: {told.metric}"]
        verdict = told.verdict(Estimate(0.8, 0.6, 0.9, 40))
        assert lines(cells[1]) == [verdict, "0.80 [0.60, 0.90]", "n = 40"]
        assert cells[1].find("span")["class"] == [verdict]
    empty = {
        (claim, column) for claim, cells in rows.items() for column in (2, 3) if lines(cells[column]) == ["not run"]
    }
    assert len(empty) == 2 * len(rows) - 2
    assert not empty & {("fact-has-neurons", 3), ("equally-few", 2)}


def test_a_cell_leads_to_the_chapter_or_the_run_that_it_came_from(staging, monkeypatch):
    for model in ("tiny", "owner/ran", "unran"):
        for claim in ("fact-has-neurons", "grammar-has-neurons"):
            put(staging / "results", claim, model, monkeypatch)
    (staging / "book" / "runs" / "owner--ran").mkdir(parents=True)
    shutil.copy(staging / "notebooks" / "01-toy.ipynb", staging / "book" / "runs" / "owner--ran")
    nbformat.write(notebook(), staging / "notebooks" / "02-not-in-the-contents.ipynb")
    staging = book.stage(staging)
    pages.generate(staging)
    rows = dict(zip(claims.CLAIMS, body(shown(staging, "matrix.md")), strict=True))
    links = [[a["href"] for a in cell.find_all("a")] for cell in rows["fact-has-neurons"]]
    assert links == [["../notebooks/01-toy.ipynb"], ["../notebooks/01-toy.ipynb"], ["runs/owner--ran/01-toy.ipynb"], []]
    assert all((staging / "book" / target).is_file() for cell in links for target in cell)
    assert not [a for cell in rows["grammar-has-neurons"] for a in cell.find_all("a")], "there is no page of chapter 02"


def test_the_matrix_says_what_is_stale_and_why(staging, monkeypatch):
    results = staging / "results"
    put(results, "fact-has-neurons", "fresh", monkeypatch)
    put(results, "fact-has-neurons", "other", monkeypatch, code="0" * 16, metric="m")
    path = put(results, "fact-has-neurons", "edited", monkeypatch)
    path.write_text(path.read_text().replace('"supported"', '"contradicted"'))
    path = put(results, "fact-has-neurons", "old", monkeypatch)
    unsealed = json.loads(path.read_text())
    path.write_text(json.dumps({name: unsealed[name] for name in unsealed if name not in ("date", "checksum")}))
    pages.generate(staging)
    page = shown(staging, "matrix.md")
    models = [head.get_text() for head in page.select("thead th")]
    assert models[:2] == ["Claim", "tiny"]
    cells = dict(zip(models, body(page)[0], strict=True))
    assert lines(cells["fresh"]) == ["supported", "0.80 [0.60, 0.90]", "n = 40"]
    assert lines(cells["edited"])[::3] == ["contradicted", "stale: edited after it was recorded"]
    assert lines(cells["other"])[-1] == "stale: the code has changed since; the metric has changed since"
    assert lines(cells["old"])[-1] == "stale: it has no checksum"
    assert {model: "outdated" in cells[model].find("span")["class"] for model in models[2:]} == {
        "fresh": False,
        "edited": True,
        "other": True,
        "old": True,
    }
    dates = {row[1].get_text(): row[-1].get_text() for row in body(shown(staging, "provenance.md"))}
    assert dates["old"] == "not recorded" and dates["fresh"] == unsealed["date"]


def test_provenance_has_a_row_for_each_record(staging, monkeypatch):
    code = json.loads(put(staging / "results", "fact-has-neurons", "tiny", monkeypatch).read_text())["code"]
    put(staging / "results", "equally-few", "a/b@c", monkeypatch, date="2026-03-04", code=code)
    pages.generate(staging)
    rows = [[cell.get_text() for cell in row] for row in body(shown(staging, "provenance.md"))]
    known = ["01234567", "own", "0", "40", code[:8], claims.package_version()]
    assert [row[:-1] for row in rows] == [["fact-has-neurons", "tiny", *known], ["equally-few", "a/b@c", *known]]
    assert rows[1][-1] == "2026-03-04"


def test_hub_models_without_a_record_have_the_command_that_runs_them(staging, monkeypatch):
    put(staging / "results", "fact-has-neurons", "gpt2", monkeypatch)
    pages.generate(staging)
    rows = {row[0].get_text(): row[-1].get_text() for row in body(shown(staging, "hub.md"))}
    hub = [name for name, entry in models.REGISTRY.items() if isinstance(entry, models.Hub)]
    assert rows == {name: f"python -m kncore run --model {name}" for name in hub if name != "gpt2"}


def test_without_records_the_matrix_says_that_nothing_has_been_run(staging):
    pages.generate(staging)
    page = shown(staging, "matrix.md")
    assert [head.get_text() for head in page.select("thead th")] == ["Claim", "tiny"]
    assert [lines(row[1]) for row in body(page)] == [["not run"]] * len(claims.CLAIMS)
    assert shown(staging, "provenance.md").find("p").get_text() == "No claim has a record yet."


@pytest.mark.kind("clock")
@given(st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S", "Z")), min_size=1))
@example("<script>alert(1)</script>")
@example("*a* _b_ `c` [d](e) ![f](g) $h$ {{i}} {.j} {k}`l` | \\ <m> &amp; https://n.org --- # + 1. \n\n```\n:::")
def test_generated_text_is_shown_as_it_is(tmp_path_factory, text):
    plain = " ".join(text.split()) or "x"
    folder = tmp_path_factory.mktemp("text")
    table = pages._list_table([["Claim", "Code"], [[pages._text(plain)] * 2, pages._code(plain)]], "x")
    pipeline.write(folder / "book" / "generated" / "x.md", table)
    (row,) = body(shown(folder, "x.md"))
    assert lines(row[0]) == [plain, plain] and row[1].get_text() == plain
    assert not row[0].find(["script", "em", "code", "a", "img", "span"])


def test_the_claims_in_small_have_a_row_for_each_chapter_and_words_for_each_mark(staging, monkeypatch):
    for claim in claims.CLAIMS:
        put(staging / "results", claim, "tiny", monkeypatch)
    put(staging / "results", "equally-few", "other", monkeypatch, code="0" * 16)
    pages.generate(staging)
    page = shown(staging, "marks.md")
    assert [head.get_text() for head in page.select("thead th")] == ["Chapter", "tiny", "other"]
    rows = {row[0].get_text(): row[1:] for row in body(page)}
    by_chapter = {}
    for claim in claims.CLAIMS.values():
        by_chapter.setdefault(claim.chapter, []).append(claim)
    assert [len(row[0].select("span[role=img]")) for row in rows.values()] == [len(c) for c in by_chapter.values()]
    for told, row in zip(by_chapter.values(), rows.values(), strict=True):
        for claim, mark in zip(told, row[0].find_all("span"), strict=True):
            verdict = claim.verdict(Estimate(0.8, 0.6, 0.9, 40))
            assert mark["class"] == ["told", verdict]
            assert mark["aria-label"] == f"{verdict}: {claim.statement}"
            assert mark["title"].endswith("0.80 [0.60, 0.90], n = 40")
    others = [mark for row in rows.values() for mark in row[1].find_all("span")]
    assert sum("not-run" in mark["class"] for mark in others) == len(claims.CLAIMS) - 1
    assert [mark["aria-label"].split(":")[0] for mark in others if "outdated" in mark["class"]] == ["supported, stale"]
    (link,) = page.find_all("a")
    assert link["href"] == "../notebooks/01-toy.html" and link.get_text() == "Toy"


@pytest.mark.parametrize("value", [0.8, 0.2])
def test_the_findings_say_what_the_records_say(staging, monkeypatch, value):
    low, high = value - 0.1, value + 0.1
    for claim, phrases in pages.FINDINGS.items():
        path = put(staging / "results", claim, "tiny", monkeypatch)
        verdict = claims.CLAIMS[claim].verdict(Estimate(value, low, high, 40))
        told = json.loads(path.read_text()) | {"value": value, "low": low, "high": high, "verdict": verdict}
        path.write_text(json.dumps(told | {"checksum": claims.checksum(told)}))
        assert set(phrases) == set(claims.VERDICTS)
    pages.generate(staging)
    said = shown(staging, "findings.md").get_text()
    for claim, phrases in pages.FINDINGS.items():
        verdict = claims.CLAIMS[claim].verdict(Estimate(value, low, high, 40))
        assert [v for v in phrases if phrases[v] in said] == [verdict]
    assert f"Of {len(pages.FINDINGS)} claims" in said


def test_prose_gets_the_numbers_of_its_own_model_and_no_other(staging, monkeypatch):
    text = " ".join(f"{{{form}}}`equally-few`" for form in ("value", "share", "effect", "verdict"))
    text += " {value}`equally-few@b/c`"
    ends = {"low": 0.1, "high": 0.5}
    put(staging / "results", "equally-few", "tiny", monkeypatch, value=0.123, verdict="supported", **ends)
    put(staging / "results", "equally-few", "b/c", monkeypatch, value=0.456, verdict="inconclusive", **ends)
    (staging / "book" / "runs" / "b--c").mkdir(parents=True)
    for place in ("notebooks/01-toy.ipynb", "book/runs/b--c/01-toy.ipynb", "book/runs/none/01-toy.ipynb"):
        (staging / place).parent.mkdir(parents=True, exist_ok=True)
        nb = notebook("x")
        nb.cells[0].source = text
        nbformat.write(nb, staging / place)
    pages.fill(staging)
    read = {p.parent.name: nbformat.read(p, 4).cells[0].source for p in staging.rglob("01-toy.ipynb")}
    assert read["notebooks"] == "0.12 12 % 0.12 [0.10, 0.50] [supported]{.supported} 0.46"
    assert read["b--c"] == "0.46 46 % 0.46 [0.10, 0.50] [inconclusive]{.inconclusive} 0.46"
    assert read["none"] == " ".join(["[not run]{.not-run}"] * 4 + ["0.46"])
    nb.cells[0].source = "{value}`equaly-few`"
    nbformat.write(nb, staging / "notebooks" / "01-toy.ipynb")
    with pytest.raises(pipeline.UsageError, match=r"01-toy.ipynb asks for .*equaly-few"):
        pages.fill(staging)


def test_definitions_are_told_in_plain_text_by_their_anchors(tmp_path):
    page = tmp_path / "glossary.md"
    page.write_text(
        "# Words\n\n```{glossary}\ncoarse set\n  Of *one* {term}`neurons <neuron>`\n  and {term}`block`"
        " {cite:p}`x`.\n\n  Two $x$.\n\nneuron\n  A number.\n```\n"
    )
    script = pages.terms(page)
    told = json.loads(script.removeprefix("const TERMS = ").removesuffix(";\n"))
    assert told == {"term-coarse-set": "Of one neurons and block. Two x.", "term-neuron": "A number."}
    assert pages.terms(tmp_path / "none.md") == "const TERMS = {};\n"


def test_the_readme_has_a_row_for_each_chapter_with_a_mark_for_each_claim(toy, monkeypatch):
    put(toy / "results", "fact-has-neurons", "tiny", monkeypatch)
    put(toy / "results", "fact-has-neurons", "other", monkeypatch)
    _, _, row = pages.claims_table(toy).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    claim = claims.CLAIMS["fact-has-neurons"].statement
    assert cells == ["[Toy](notebooks/01-toy.ipynb)", claim, "0.80 [0.60, 0.90], supported", "✓·"]
    put(toy / "results", "fact-owns-neuron", "tiny", monkeypatch, code="0" * 16)
    assert pages.claims_table(toy).rstrip().endswith("| ✓✓ (stale) |")


def test_the_readme_keeps_all_but_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "claims_table", lambda *_, **__: "| new |\n")
    path = tmp_path / "README.md"
    path.write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    assert pages.readme(tmp_path) == f"before\n{pages.BEGIN}\n| new |\n{pages.END}\nafter\n"
    path.write_text("no markers\n")
    with pytest.raises(pipeline.UsageError, match="once each"):
        pages.readme(tmp_path)
