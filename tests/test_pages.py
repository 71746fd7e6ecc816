"""Tables made from records, and the commands that render a book, on toy notebooks that need no model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from bs4 import BeautifulSoup
from commands import parsed
from hypothesis import example, given
from hypothesis import strategies as st
from toy import COMPUTE, make_checkout, notebook, snapshot

from knbook import book, errors, pages, runner
from kncore import zoo
from kncore.store import disk
from knpaper import claims
from knpaper.records import checksum, package_version, read_records
from knpaper.rules import VERDICTS
from knpaper.stats import Estimate

SHOWN, OWN = pytest.mark.kind("shown-is-data"), pytest.mark.kind("shown-is-data", own=True)
NOTEBOOK = nbformat.writes(notebook("1"))

# ------------------------------------------------------------------------------------------------ the book


def test_stage_copies_what_the_book_is_made_of(toy):
    (toy / "book" / "runs" / "other").mkdir(parents=True)
    shutil.copy(toy / "notebooks" / "01-toy.ipynb", toy / "book" / "runs" / "other")
    before = snapshot(toy)
    staging = book.stage(toy)
    assert snapshot(staging) == before
    assert not (book.stage(toy, with_runs=False) / "book" / "runs").exists()
    assert {name: data for name, data in snapshot(toy).items() if not name.startswith("_build")} == before


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("_toc.yml", "root: [", "cannot be read"),
        ("_toc.yml", "", "toc is not a mapping"),
        ("_toc.yml", "parts: [{chapters: [{file: book/index}]}]", "'root' key not found"),
        ("_toc.yml", "format: jb-book\nroot: book/index\nparts:\n- chapters:\n  - book/index", "not a mapping type"),
        ("_toc.yml", "root: book/nowhere", "names book/nowhere"),
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
    disk.write(toy / name, text)
    with pytest.raises((errors.UsageError, ValueError), match=re.escape(said)) as error:
        book.book(toy, execute=execute)
    assert "staging" not in str(error.value) and "\n" not in str(error.value)


def test_a_chapter_that_compares_models_is_given_one_and_has_no_run_of_its_own(tmp_path):
    compares = notebook("print(models)")
    compares.cells[1].source = 'models = "tiny,other"'
    root = make_checkout(tmp_path / "toy", n01_toy=notebook(COMPUTE), n02_both=compares)
    written = runner.run(root, model="gpt2")
    assert [path.name for path in written] == ["01-toy.ipynb"]
    assert not (root / "book" / "runs" / "gpt2" / "02-both.ipynb").exists()
    runner.run(root, model="gpt2", only=["02"], out=tmp_path / "out")
    ran = nbformat.read(tmp_path / "out" / "02-both.ipynb", as_version=4)
    assert ran.cells[-1].outputs[0].text == "gpt2\n"


def test_a_run_leaves_the_records_that_another_one_made_meanwhile(tmp_path):
    meanwhile = tmp_path / "toy" / "results" / "other" / "claim.json"
    source = COMPUTE + f"\n_ = pathlib.Path({str(meanwhile)!r}).write_text('newer')"
    root = make_checkout(tmp_path / "toy", n01_toy=notebook(source))
    meanwhile.parent.mkdir(parents=True)
    meanwhile.write_text("older")
    runner.run(root)
    assert meanwhile.read_text() == "newer"
    assert (root / "results" / "tiny" / "claim.json").is_file()


def test_the_models_beside_run_together_and_their_records_join(tmp_path, monkeypatch):
    source = COMPUTE.replace('"tiny")', "model)")
    root = make_checkout(tmp_path / "toy", n01_toy=notebook(source))
    monkeypatch.setattr(book, "COMPANION_MODELS", ("gpt2", "gpt2-xl", "llama-2-7b"))
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


def test_a_chapter_is_a_job_on_its_own_model_and_on_each_that_the_book_has_a_run_of(tmp_path, monkeypatch):
    root = make_checkout(tmp_path / "toy", n01_one=notebook(COMPUTE), n02_two=notebook(COMPUTE))
    monkeypatch.setattr(book, "COMPANION_MODELS", ("gpt2", "gpt2-xl"))
    (root / "book" / "runs" / "gpt2-xl").mkdir(parents=True)
    shutil.copy(root / "notebooks" / "02-two.ipynb", root / "book" / "runs" / "gpt2-xl")
    found = book._jobs(root, root, tmp_path, 60)
    assert [job.name for job in found] == ["01-one", "02-two", "02-two (gpt2-xl)"]
    assert [folder for _, folder, _ in found.values()] == [root / "notebooks"] * 2 + [
        root / "book" / "runs" / "gpt2-xl"
    ]
    assert len({out for out, *_ in found.values()}) == 3
    for job, (out, *_) in found.items():
        options = parsed(["run", *job.options])
        assert (options["only"], options["out"], options["timeout"]) == (job.name[:2], out, 60)
        assert options["model"] == ("gpt2-xl" if "gpt2" in job.name else None)


def test_a_model_beside_that_fails_is_named_with_its_cell(tmp_path, monkeypatch):
    root = make_checkout(tmp_path / "toy", n01_toy=notebook('1 / (model != "gpt2")'))
    monkeypatch.setattr(book, "COMPANION_MODELS", ("gpt2",))
    (root / "book" / "runs" / "gpt2").mkdir(parents=True)
    shutil.copy(root / "notebooks" / "01-toy.ipynb", root / "book" / "runs" / "gpt2")
    with pytest.raises(errors.RunError, match=r"(?s)01-toy \(gpt2\):.*cell 4 .*ZeroDivisionError"):
        book._run_all(root, book.stage(root), 60)


def unloaded(name: str, revision: str = "0123456789abcdef") -> SimpleNamespace:
    """What a record needs of a model, without one."""
    spec = SimpleNamespace(family="gpt2")
    return SimpleNamespace(name=name, revision=revision, dtype="float32", is_modified=False, spec=spec)


def put(folder: Path, claim: str, model: str, monkeypatch, **changes) -> Path:
    """A record with made-up numbers below `folder`; `changes` are made and sealed after it was recorded."""
    monkeypatch.setenv("KNCORE_RESULTS", str(folder))
    claims.record(claim, unloaded(model), Estimate(0.8, 0.6, 0.9, 40), seed=0, source="own")
    path = folder / model.replace("/", "--") / f"{claim}.json"
    told = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(told | {"checksum": checksum(told)}, indent=1, ensure_ascii=False) + "\n")
    return path


def test_the_book_keeps_the_dates_of_unchanged_records_and_no_claim_that_is_no_longer_recorded(tmp_path, monkeypatch):
    new, old = tmp_path / "new", tmp_path / "toy" / "results"
    told = [put(new, claim, "tiny", monkeypatch) for claim in ("fact-search", "fact-owner")]
    source = "import json, os, pathlib\nfolder = pathlib.Path(os.environ['KNCORE_RESULTS'], 'tiny')\nfolder.mkdir()\n"
    source += "\n".join(f"_ = (folder / {p.name!r}).write_text({p.read_text()!r})" for p in told)
    toy = make_checkout(tmp_path / "toy", n01_toy=notebook(source))
    (toy / "_config.yml").touch()
    put(old, "fact-search", "tiny", monkeypatch, date="2020-02-02")
    put(old, "fact-owner", "tiny", monkeypatch, date="2020-02-02", value=0.7)
    put(old, "equally-few", "tiny", monkeypatch, date="2020-02-02")
    put(old, "equally-few", "other", monkeypatch, date="2020-02-02")

    def build(command, **_):
        disk.write(Path(command[-1]) / "_build" / "html" / "index.html", "")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(book, "subprocess", SimpleNamespace(**{**vars(subprocess), "run": build}))
    before = snapshot(toy)
    book.book(toy)
    assert {name: data for name, data in snapshot(toy).items() if not name.startswith("_build")} == before
    staging = toy / "_build" / "staging"
    dates = {(told["claim"], told["model"]): told["date"] for told in read_records(staging / "results")}
    today = json.loads(told[0].read_text())["date"]
    assert dates == {
        ("fact-search", "tiny"): "2020-02-02",
        ("fact-owner", "tiny"): today,
        ("equally-few", "other"): "2020-02-02",
    }
    rows = body(shown(staging, "provenance"))
    assert [row[-1].get_text() for row in rows] == ["2020-02-02", today, "2020-02-02"]


def test_pages_that_a_killed_run_had_put_aside_come_back(toy, monkeypatch):
    disk.write(toy / "_build" / "html.old-x" / "was" / "index.html", "earlier")
    monkeypatch.setattr(book, "stage", lambda *_, **__: pytest.fail("the book does not build"))
    with pytest.raises(pytest.fail.Exception):
        book.book(toy, execute=False)
    assert (toy / "_build" / "html" / "index.html").read_text() == "earlier"
    assert not list((toy / "_build").glob("html.old-*/was"))


# -------------------------------------------------------------------------------------------------- claims


def shown(root: Path, name: str, names: Iterable[str] = ("notebooks/01-toy",)) -> BeautifulSoup:
    """A table as a reader sees it, in a book with pages of these names."""
    return BeautifulSoup(pages.table(name, pages.load(root, names)), "html.parser")


def body(page: BeautifulSoup) -> list:
    return [row.find_all(["th", "td"]) for row in page.select("tbody tr")]


def lines(cell) -> list[str]:
    return [paragraph.get_text() for paragraph in cell.find_all("p")]


def test_the_matrix_has_a_row_for_each_claim_and_a_column_for_each_model(toy, monkeypatch):
    for claim in claims.CLAIMS:
        put(toy / "results", claim, "tiny", monkeypatch)
    put(toy / "results", "fact-search", "z", monkeypatch)
    put(toy / "results", "equally-few", "a/b@c", monkeypatch)
    page = shown(toy, "matrix")
    assert [head.get_text() for head in page.select("thead th")] == ["Claim", "tiny", "a/b@c", "z"]
    rows = dict(zip(claims.CLAIMS, body(page), strict=True))
    for claim, cells in rows.items():
        told = claims.CLAIMS[claim]
        said = [line.replace("’", "'") for line in lines(cells[0])]
        assert said == [told.statement, f"Chapter {told.chapter}, {claim}: {told.metric}"]
        verdict = told.verdict(Estimate(0.8, 0.6, 0.9, 40))
        assert lines(cells[1]) == [verdict, "0.80 [0.60, 0.90]", "n = 40"]
        assert cells[1].find("span")["class"] == [verdict]
    empty = {
        (claim, column) for claim, cells in rows.items() for column in (2, 3) if lines(cells[column]) == ["not run"]
    }
    assert len(empty) == 2 * len(rows) - 2
    assert not empty & {("fact-search", 3), ("equally-few", 2)}


def test_a_cell_leads_to_the_chapter_or_the_run_that_it_came_from(toy, monkeypatch):
    for model in ("tiny", "owner/ran", "unran"):
        for claim in ("fact-search", "grammar-search"):
            put(toy / "results", claim, model, monkeypatch)
    nbformat.write(notebook(), toy / "notebooks" / "02-not-in-the-contents.ipynb")
    page = shown(toy, "matrix", ["notebooks/01-toy", "book/runs/owner--ran/01-toy"])
    rows = dict(zip(claims.CLAIMS, body(page), strict=True))
    links = [[a["href"] for a in cell.find_all("a")] for cell in rows["fact-search"]]
    assert links == [["notebooks/01-toy"], ["notebooks/01-toy"], ["book/runs/owner--ran/01-toy"], []]
    assert not [a for cell in rows["grammar-search"] for a in cell.find_all("a")], "there is no page of chapter 02"


def test_the_matrix_says_what_is_stale_and_why(toy, monkeypatch):
    results = toy / "results"
    put(results, "fact-search", "fresh", monkeypatch)
    put(results, "fact-search", "other", monkeypatch, code="0" * 16, metric="m")
    path = put(results, "fact-search", "edited", monkeypatch)
    path.write_text(path.read_text().replace('"supported"', '"contradicted"'))
    path = put(results, "fact-search", "old", monkeypatch)
    unsealed = json.loads(path.read_text())
    path.write_text(json.dumps({name: unsealed[name] for name in unsealed if name not in ("date", "checksum")}))
    page = shown(toy, "matrix")
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
    dates = {row[1].get_text(): row[-1].get_text() for row in body(shown(toy, "provenance"))}
    assert dates["old"] == "not recorded" and dates["fresh"] == unsealed["date"]


def test_provenance_has_a_row_for_each_record(toy, monkeypatch):
    code = json.loads(put(toy / "results", "fact-search", "tiny", monkeypatch).read_text())["code"]
    put(toy / "results", "equally-few", "a/b@c", monkeypatch, date="2026-03-04", code=code)
    rows = [[cell.get_text() for cell in row] for row in body(shown(toy, "provenance"))]
    known = ["01234567", "own", "0", "40", code[:8], package_version()]
    assert [row[:-1] for row in rows] == [["fact-search", "tiny", *known], ["equally-few", "a/b@c", *known]]
    assert rows[1][-1] == "2026-03-04"


def test_hub_models_without_a_record_have_the_command_that_runs_them(toy, monkeypatch):
    put(toy / "results", "fact-search", "gpt2", monkeypatch)
    rows = {row[0].get_text(): row[-1].get_text() for row in body(shown(toy, "hub"))}
    hub = [name for name, entry in zoo.REGISTRY.items() if isinstance(entry, zoo.Hub)]
    assert rows == {name: f"python -m kncore run --model {name}" for name in hub if name != "gpt2"}


def test_without_records_the_matrix_says_that_nothing_has_been_run(toy):
    page = shown(toy, "matrix")
    assert [head.get_text() for head in page.select("thead th")] == ["Claim", "tiny"]
    assert [lines(row[1]) for row in body(page)] == [["not run"]] * len(claims.CLAIMS)
    assert shown(toy, "provenance").find("p").get_text() == "No claim has a record yet."


@pytest.mark.kind("clock")
@given(st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S", "Z")), min_size=1))
@example("<script>alert(1)</script>")
@example("*a* _b_ `c` [d](e) ![f](g) $h$ {{i}} {.j} {k}`l` | \\ <m> &amp; https://n.org --- # + 1. \n\n```\n:::")
def test_text_in_a_template_is_shown_as_it_is(text):
    plain = " ".join(text.split())
    entry = SimpleNamespace(revision=text)
    page = BeautifulSoup(pages.fill("hub.html", models=[(text, entry)]), "html.parser")
    (row,) = body(page)
    assert row[0].get_text().strip() == plain and row[2].get_text().endswith(plain)
    assert {tag.name for tag in row[0].find_all(True)} <= {"p", "code", "span"}


def test_the_claims_in_small_have_a_row_for_each_chapter_and_words_for_each_mark(toy, monkeypatch):
    for claim in claims.CLAIMS:
        put(toy / "results", claim, "tiny", monkeypatch)
    put(toy / "results", "equally-few", "other", monkeypatch, code="0" * 16)
    page = shown(toy, "marks")
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
    assert link["href"] == "notebooks/01-toy" and link.get_text() == "Toy"


@pytest.mark.parametrize("value", [0.8, 0.2])
def test_the_findings_say_what_the_records_say(toy, monkeypatch, value):
    low, high = value - 0.1, value + 0.1
    for claim, phrases in pages.FINDINGS.items():
        path = put(toy / "results", claim, "tiny", monkeypatch)
        verdict = claims.CLAIMS[claim].verdict(Estimate(value, low, high, 40))
        told = json.loads(path.read_text()) | {"value": value, "low": low, "high": high, "verdict": verdict}
        path.write_text(json.dumps(told | {"checksum": checksum(told)}))
        assert set(phrases) == set(VERDICTS)
    said = shown(toy, "findings").get_text()
    for claim, phrases in pages.FINDINGS.items():
        verdict = claims.CLAIMS[claim].verdict(Estimate(value, low, high, 40))
        assert [v for v in phrases if phrases[v] in said] == [verdict]
    assert f"Of {len(pages.FINDINGS)} claims" in said


def test_the_readme_has_a_row_for_each_chapter_with_a_mark_for_each_claim(toy, monkeypatch):
    put(toy / "results", "fact-search", "tiny", monkeypatch)
    put(toy / "results", "fact-search", "other", monkeypatch)
    _, _, row = pages.claims_table(toy).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    claim = claims.CLAIMS["fact-search"].statement
    assert cells == ["[Toy](notebooks/01-toy.ipynb)", claim, "0.80 [0.60, 0.90], supported", "✓·"]
    put(toy / "results", "fact-owner", "tiny", monkeypatch, code="0" * 16)
    assert pages.claims_table(toy).rstrip().endswith("| ✓✓ (stale) |")


def test_the_readme_keeps_all_but_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "claims_table", lambda *_, **__: "| new |\n")
    path = tmp_path / "README.md"
    path.write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    assert pages.readme(tmp_path) == f"before\n{pages.BEGIN}\n| new |\n{pages.END}\nafter\n"
    path.write_text("no markers\n")
    with pytest.raises(errors.UsageError, match="once each"):
        pages.readme(tmp_path)
