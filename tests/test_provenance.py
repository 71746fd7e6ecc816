"""Provenance of each page: where it comes from, how it is cited, what to download; the reference; the PDF."""

from __future__ import annotations

import codecs
import csv
import http.server
import importlib.util
import inspect
import io
import json
import re
import shutil
import subprocess
import threading
import tomllib
import types
import zipfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.inputtransformer2 import TransformerManager
from pybtex.database import parse_string
from test_pages import body, put
from toy import COMPUTE, make_checkout, notebook, snapshot

import knbook
import kncore
import knpaper
from knbook import book, errors, pages, provenance, runner, sphinxext
from kncore.store import disk
from knpaper.records import package_version

ROOT = Path(__file__).resolve().parent.parent
HUB = "https://github.com/owner/name"
GIT = shutil.which("git")


@pytest.fixture(autouse=True)
def no_addresses(monkeypatch):
    for name in ("KNCORE_REPOSITORY", "KNCORE_SITE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root(tmp_path) -> Path:
    """A checkout with a chapter, a run of it on another model, an appendix without claims, and a page of prose."""
    root = make_checkout(tmp_path / "toy", n01_toy=notebook(COMPUTE), n02_more=notebook(COMPUTE))
    (root / "_config.yml").write_text("title: A toy & a book\nauthor: Some one\ncopyright: '2026'\n")
    (root / "LICENSE").write_text("free\n")
    (root / "book" / "runs" / "other").mkdir(parents=True)
    shutil.copy(root / "notebooks" / "01-toy.ipynb", root / "book" / "runs" / "other")
    (root / "book" / "index.md").write_text("# A title\n\nText.\n")
    shutil.copy(ROOT / "book" / "references.bib", root / "book")
    return root


def downloads(root: Path) -> Path:
    """The folder of a rendered site with what can be downloaded."""
    site = root / "_build" / "html"
    shutil.rmtree(site, ignore_errors=True)
    provenance.write_downloads(pages.load(root), provenance.book_info(root), site)
    return site


def origin(root: Path, page: str) -> dict[str, BeautifulSoup]:
    """The table at the end of a page, as a reader sees it: name, cell."""
    values = provenance.origin(pages.load(root), provenance.book_info(root), page)
    page = BeautifulSoup(pages.fill("origin.html", **values), "html.parser")
    return {row[0].get_text(): row[1] for row in body(page)}


def said(root: Path, page: str) -> dict[str, str]:
    return {name: " ".join(cell.get_text().split()) for name, cell in origin(root, page).items()}


# ----------------------------------------------------------------------------------- where a page comes from


def test_a_chapter_ends_with_where_it_comes_from(root, monkeypatch):
    put(root / "results", "fact-search", "tiny", monkeypatch, date="2026-02-03")
    put(root / "results", "fact-owner", "tiny", monkeypatch, date="2026-02-01")
    put(root / "results", "equally-few", "tiny", monkeypatch, date="2020-01-01")
    disk.write(root / "results" / "tiny" / "01.toml", 'seconds = 75\ndate = "2026-02-02"\nthreads = "2"\n')
    told = said(root, "notebooks/01-toy")
    assert told["Model"] == "tiny, revision 0123456789abcdef, float32"
    assert (told["Data"], told["Seed"]) == ("written for this book", "0")
    versions = (f"{name} {package_version(name)}" for name in ("kncore", "torch", "transformers"))
    assert told["Packages"] == ", ".join(versions)
    assert told["Records"] == "2, of 2026-02-01 to 2026-02-03"
    assert told["Run took"].startswith("75 s on 2 threads, on 2026-02-02;")
    assert told["Rendered from"] == "an unknown commit"


def test_a_stale_record_is_called_stale_at_the_end_of_its_page(root, monkeypatch):
    put(root / "results", "fact-search", "tiny", monkeypatch)
    put(root / "results", "fact-owner", "tiny", monkeypatch, code="0" * 16)
    assert "1 of them stale: the code has changed since" in said(root, "notebooks/01-toy")["Records"]


def test_a_run_on_another_model_ends_with_its_own_origin(root, monkeypatch):
    put(root / "results", "fact-search", "tiny", monkeypatch)
    put(root / "results", "fact-search", "other", monkeypatch, seed=3)
    disk.write(root / "results" / "other" / "01.toml", 'seconds = 7\ndate = "2026-02-02"\nthreads = "1"\n')
    told = said(root, "book/runs/other/01-toy")
    assert (
        told["Model"].startswith("other,") and told["Seed"] == "3" and told["Run took"].startswith("7 s on one thread")
    )
    assert said(root, "notebooks/01-toy")["Run took"] == provenance.UNKNOWN


def test_a_chapter_without_claims_takes_the_model_from_other_records_and_the_packages_from_its_run(root, monkeypatch):
    put(root / "results", "fact-search", "tiny", monkeypatch)
    told = 'seconds = 7\ndate = "2026-02-02"\nthreads = "1"\nkncore = "9.8"\ntorch = "7.6"\n'
    disk.write(root / "results" / "tiny" / "02.toml", told)
    told = said(root, "notebooks/02-more")
    assert told["Model"].startswith("tiny, revision 0123456789abcdef") and told["Packages"] == "kncore 9.8, torch 7.6"
    assert "Records" not in told


@pytest.mark.skipif(GIT is None, reason="git is not installed")
def test_the_commit_is_named_with_whether_anything_differs_from_it(root, monkeypatch):
    def git(*words: str) -> str:
        command = [GIT, "-C", root, "-c", "user.name=n", "-c", "user.email=e", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (root / ".gitignore").write_text("/_build/\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "m")
    sha = git("rev-parse", "HEAD")
    assert said(root, "notebooks/01-toy")["Rendered from"] == f"commit {sha[:12]}"
    monkeypatch.setenv("KNCORE_REPOSITORY", f"{HUB}.git")
    assert origin(root, "notebooks/01-toy")["Rendered from"].find("a")["href"] == f"{HUB}/tree/{sha}"
    first = snapshot(downloads(root))
    assert snapshot(downloads(root)) == first, "two renders of one checkout give the same bytes"
    (root / "LICENSE").write_text("changed\n")
    assert said(root, "notebooks/01-toy")["Rendered from"].endswith("with changes that are not in it")


def test_a_run_notes_how_long_it_took_and_one_that_changed_nothing_keeps_the_note(tmp_path):
    root = make_checkout(tmp_path / "toy", n01_toy=notebook("print(1)"))
    runner.run(root)
    note = root / "results" / "tiny" / "01.toml"
    told = tomllib.loads(note.read_text())
    assert {"seconds", "threads", "date", "kncore", "torch", "transformers"} == set(told) and told["seconds"] >= 0
    note.write_text(note.read_text().replace("seconds = ", "seconds = 12345"))
    kept = note.read_text()
    runner.run(root)
    assert note.read_text() == kept
    nbformat.write(notebook("print(2)"), root / "notebooks" / "01-toy.ipynb")
    runner.run(root)
    assert note.read_text() != kept


def test_a_book_that_is_computed_keeps_the_times_that_are_tracked(tmp_path):
    for folder, text in (("new", "new"), ("old", "old")):
        disk.write(tmp_path / folder / "tiny" / "01.toml", text)
    disk.write(tmp_path / "new" / "02.toml", "new")
    runner.keep_times(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "new" / "tiny" / "01.toml").read_text() == "old"
    assert (tmp_path / "new" / "02.toml").read_text() == "new"


# ------------------------------------------------------------------------------------------ what is cited


def test_every_page_can_be_cited(root, monkeypatch):
    monkeypatch.setenv("KNCORE_SITE", "https://owner.github.io/name/")
    info, keys = provenance.book_info(root), set()
    for page in ("book/index", "notebooks/01-toy", "book/runs/other/01-toy", "book/runs/other/index"):
        ((key, entry),) = parse_string(provenance.bibtex(info, page, "A title"), "bibtex").entries.items()
        keys.add(key)
        assert entry.fields["url"] == f"https://owner.github.io/name/{page}.html"
        assert entry.fields["year"] == "2026" and "kncore" in entry.fields["note"] and entry.persons["author"]
    assert len(keys) == 4


@given(st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S", "Z")), min_size=1))
def test_any_title_makes_a_sound_entry(title):
    info = provenance.BookInfo("Book", "Author", "2026", "", "", "", False)
    ((_, entry),) = parse_string(provenance.bibtex(info, "notebooks/01-toy", f"T {title}"), "bibtex").entries.items()
    written = codecs.decode(entry.fields["title"].removeprefix("{").removesuffix("}"), "ulatex")
    assert "".join(written.split()) == "T" + "".join(re.sub(r"[{}\\]", "", title).split())


def test_the_citation_file_and_the_pages_cite_alike():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    info = provenance.book_info(ROOT)
    assert info.author == citation["authors"][0]["name"] and info.title == citation["title"]
    entry = parse_string(provenance.paper(ROOT / "book" / "references.bib"), "bibtex").entries["niu2024"]
    paper = citation["preferred-citation"]
    assert entry.fields["title"].replace("{", "").replace("}", "") == paper["title"]
    assert [person.last_names[0] for person in entry.persons["author"]] == [a["family-names"] for a in paper["authors"]]
    assert entry.fields["year"] == str(paper["year"])


# --------------------------------------------------------------------------------------- what is taken away


def test_the_links_at_the_end_of_a_page_lead_to_the_downloads(root, monkeypatch):
    put(root / "results", "fact-search", "tiny", monkeypatch)
    put(root / "results", "fact-search", "other", monkeypatch)
    site = downloads(root)
    for page in ("notebooks/01-toy", "book/runs/other/01-toy", "notebooks/02-more"):
        links = [link["href"] for link in origin(root, page)["Take away"].find_all("a", download=True)]
        assert len(links) == (2 if page == "notebooks/02-more" else 4)
        targets = [(site / page).parent.joinpath(link).resolve() for link in links]
        assert targets[0] == site / "_sources" / f"{page}.ipynb", "where Sphinx copies the source of a page"
        assert all(target.is_file() for target in targets[1:]), targets


def test_records_are_given_as_json_and_as_csv(root, monkeypatch):
    put(root / "results", "fact-search", "tiny", monkeypatch)
    put(root / "results", "fact-search", "other", monkeypatch, code="0" * 16)
    put(root / "results", "equally-few", "tiny", monkeypatch)
    folder = downloads(root) / "records"
    told = json.loads((folder / "01.json").read_text())
    assert [(r["model"], r["stale"]) for r in told] == [("other", ["the code has changed since"]), ("tiny", [])]
    assert len(json.loads((folder / "all.json").read_text())) == 3
    rows = list(csv.DictReader(io.StringIO((folder / "01.csv").read_text())))
    assert [(r["model"], float(r["value"]), r["stale"]) for r in rows] == [
        ("other", 0.8, "the code has changed since"),
        ("tiny", 0.8, ""),
    ]


def test_an_archive_holds_the_notebook_its_records_the_data_and_the_licence(root, monkeypatch):
    put(root / "results", "fact-search", "tiny", monkeypatch)
    site = downloads(root)
    with zipfile.ZipFile(site / "archives" / "01-toy.zip") as archive:
        names = set(archive.namelist())
        assert {"01-toy.ipynb", "records/01.csv", "records/01.json", "LICENSE", "data/facts/capital.tsv"} <= names
        assert archive.read("01-toy.ipynb") == (root / "notebooks" / "01-toy.ipynb").read_bytes()
    assert (site / "archives" / "01-toy-other.zip").is_file()


def test_colab_is_offered_where_the_repository_is_known_and_only_there(root, monkeypatch):
    for elsewhere in ("", "https://example.org/owner/name"):
        monkeypatch.setenv("KNCORE_REPOSITORY", elsewhere)
        assert not (downloads(root) / "colab").exists() and "Run it on Colab" not in origin(root, "notebooks/01-toy")
    monkeypatch.setenv("KNCORE_REPOSITORY", HUB)
    (link,) = origin(root, "notebooks/01-toy")["Run it on Colab"].find_all("a")
    assert link["href"] == f"{provenance.COLAB}/owner/name/blob/{provenance.BRANCH}/01-toy.ipynb"
    assert "Run it on Colab" not in origin(root, "book/runs/other/01-toy")
    nb = nbformat.read(downloads(root) / "colab" / "01-toy.ipynb", as_version=4)
    nbformat.validate(nb)
    assert "install" in nb.cells[0].metadata.tags and nb.cells[1].source == "# Toy"


@pytest.mark.parametrize("there", [True, False])
def test_the_install_cell_installs_where_the_package_is_missing_and_else_does_nothing(there, monkeypatch):
    source = TransformerManager().transform_cell(provenance.install_cell(HUB, "0" * 40).source)
    done = []
    shell = types.SimpleNamespace(
        run_line_magic=lambda *words: done.append(words), system=lambda what: done.append(what)
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)
    exec(source, {"get_ipython": lambda: shell})
    asked = [("pip", f'install --quiet "kncore @ git+{HUB}@{"0" * 40}"'), "python -m kncore fetch"]
    assert done == ([] if there else asked)


# -------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("package", [kncore, knpaper, knbook])
def test_the_reference_goes_through_every_module_and_each_says_what_it_is(package):
    names = sphinxext.modules(package)
    root = Path(package.__file__).parent
    paths = [path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py")]
    whole = {".".join(path.parts).removesuffix(".__init__") for path in paths} - {package.__name__}
    assert names == sorted(name for name in whole if not name.rpartition(".")[2].startswith("_"))
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "book").glob("api*.md")))
    # Whole on one page, or on two pages: those that are named, and all others.
    parts = [part.split() for part in re.findall(rf"{{modules}} {package.__name__}\n([^`]*)```", pages)]
    named = [[name for name in part if name != ":without:"] for part in parts]
    assert parts == [[]] or (sorted(map(len, parts)) == [len(named[0]), len(named[0]) + 1] and named[0] == named[1])
    assert {f"{package.__name__}.{name}" for name in named[0]} <= whole
    silent = []
    for name in names:
        module = importlib.import_module(name)
        for member, what in vars(module).items():
            own = (inspect.isfunction(what) or inspect.isclass(what)) and what.__module__ == name
            if own and not member.startswith("_") and not inspect.getdoc(what):
                silent.append(f"{name}.{member}")
    assert not silent and package.__doc__


# ------------------------------------------------------------------------------------------------- on paper


def test_what_is_printed_leads_nowhere_on_this_machine(root, monkeypatch):
    """Links to pages beside the printed one are within it or nowhere; a browser that prints nothing is an error."""
    page = '<a class="x" href="book/index.html#here">a</a><a href="runs/x.html">b</a><a href="https://n.org/#c">c</a>'

    def render(root: Path, staging: Path, builder: str) -> Path:
        assert not (staging / "book" / "runs").exists()
        disk.write(staging / "_build" / builder / "book" / "index.html", page)
        return staging / "_build" / builder

    def browse(command, **_):
        target = next(word.partition("=")[2] for word in command if word.startswith("--print-to-pdf="))
        printed.append(Path(unquote(urlsplit(command[-1]).path)).read_text())
        if prints:
            Path(target).write_text("%PDF")
        return types.SimpleNamespace(returncode=0, stderr="no display")

    prints, printed = True, []
    monkeypatch.setattr(book, "_render", render)
    monkeypatch.setattr(book, "subprocess", types.SimpleNamespace(run=browse))
    monkeypatch.setattr(book.shutil, "which", lambda name: name)
    monkeypatch.setattr(provenance, "commit", lambda root: ("", False))
    assert book.pdf(root).read_text() == "%PDF"
    links = [link.get("href") for link in BeautifulSoup(printed[0], "html.parser").find_all("a")]
    assert links == ["#here", None, "https://n.org/#c"]
    prints = False
    with pytest.raises(errors.RunError, match="no display"):
        book.pdf(root)
    assert (root / "_build" / "book.pdf").read_text() == "%PDF", "the earlier one is lost"
    monkeypatch.setattr(book.shutil, "which", lambda name: None)
    with pytest.raises(errors.UsageError, match="chromium"):
        book.pdf(root)


# --------------------------------------------------------------------------------------------- links, weekly


def test_the_weekly_check_tells_what_is_gone_from_what_is_only_refused(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("links", ROOT / ".ci" / "links.py")
    links = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(links)

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(int(self.path.strip("/")))
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_address[1]}"
        links.ask.__defaults__ = (5, 1, 0)
        (tmp_path / "a.html").write_text(f'<a href="{here}/200#x"></a><a href="{here}/403"></a><a href="b.html"></a>')
        assert links.main(tmp_path) == 0
        (tmp_path / "b.html").write_text(f'<a href="{here}/404"></a><a href="{here}/200"></a>')
        assert links.main(tmp_path) == 1
        server.shutdown()
    told = capsys.readouterr().out
    assert "/404: gone: 404" in told and "(on b.html)" in told and "/403: 403" in told and "3 addresses, 1 gone" in told


def test_text_of_a_source_is_shown_as_it_is(root, monkeypatch):
    put(root / "results", "fact-search", "tiny", monkeypatch, source="a_*folder*<b>")
    assert said(root, "notebooks/01-toy")["Data"] == "a_*folder*<b>"
