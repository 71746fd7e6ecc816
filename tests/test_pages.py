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
from knpaper import across, audit, claims, records, rules, seeds, shapes, staleness
from knpaper.records import checksum, package_version, read_records
from knpaper.rules import VERDICTS, Claim
from knpaper.stats import Estimate

SHOWN, OWN = pytest.mark.kind("shown-is-data"), pytest.mark.kind("shown-is-data", own=True)
NOTEBOOK = nbformat.writes(notebook("1"))
PLAIN = [claim for claim in claims.CLAIMS.values() if not claim.check]
CHECKS = [claim for claim in claims.CLAIMS.values() if claim.check]
FIRST = next(claim for claim in PLAIN if claim.chapter == "01")
ESTIMATE = Estimate(0.8, 0.6, 0.9, 40)

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
    book._run_all(root, staging, 600)
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
        book._run_all(root, book.stage(root), 600)


def unloaded(name: str, revision: str = "0123456789abcdef") -> SimpleNamespace:
    """What a record needs of a model, without one."""
    spec = SimpleNamespace(family="gpt2")
    return SimpleNamespace(name=name, revision=revision, dtype="float32", is_modified=False, spec=spec)


def put(folder: Path, claim: str, model: str, monkeypatch, **changes) -> Path:
    """A record with made-up numbers below `folder`; `changes` are made and sealed after it was recorded."""
    monkeypatch.setenv("KNCORE_RESULTS", str(folder))
    claims.record(claim, unloaded(model), ESTIMATE, seed=0, source="own")
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


def cells(row) -> dict[str, str]:
    """The cells of a model's row in the matrix, by their labels."""
    return {cell["data-label"]: cell.get_text().strip() for cell in row.find_all("td")}


def rows_of(page: BeautifulSoup, claim: str) -> dict[str, object]:
    """The rows of a claim in the matrix, by model."""
    return {row["data-model"]: row for row in page.find(id=claim).find_all("tr", attrs={"data-model": True})}


def test_the_matrix_has_a_row_for_each_claim_and_model_and_the_checks_stand_apart(toy, monkeypatch):
    for claim in claims.CLAIMS:
        put(toy / "results", claim, "tiny", monkeypatch)
    put(toy / "results", FIRST.id, "z", monkeypatch)
    put(toy / "results", FIRST.id, "a/b@c", monkeypatch)
    page, checks = shown(toy, "matrix"), shown(toy, "checks")
    bodies = {body["id"]: body for part in (page, checks) for body in part.find_all("tbody")}
    assert {body["id"] for body in checks.find_all("tbody")} == {claim.id for claim in CHECKS}
    assert list(bodies) == [claim.id for claim in [*PLAIN, *CHECKS]]
    for claim, body in zip([*PLAIN, *CHECKS], bodies.values(), strict=True):
        heads = [line.get_text().replace("’", "'") for line in body.select("tr.claim p")]
        assert heads == [claim.statement, f"Chapter {claim.chapter}, {claim.id}: {claim.metric}"]
        verdict, row = claim.verdict(ESTIMATE), body.find("tr", attrs={"data-model": "tiny"})
        assert list(cells(row))[:5] == ["Verdict", "n", "Effect", "95 % interval", "Smallest effect"]
        assert list(cells(row).values())[:5] == [claim.word(verdict), "40", "0.80", "[0.60, 0.90]", claim.border]
        side = "the intervention" if claim.check else claim.side(verdict)
        assert list(cells(row).values())[6] == side
    assert list(rows_of(page, FIRST.id)) == ["tiny", "a/b@c", "z"]
    assert rows_of(page, PLAIN[1].id)["a/b@c|z"].get_text() == "not run on a/b@c, z"


def test_what_a_claim_declares_stands_above_its_rows(toy):
    found = shown(toy, "matrix").find(id=FIRST.id).find("dl")
    said = [(name.get_text(), text.get_text()) for name, text in zip(*map(found.find_all, ("dt", "dd")), strict=True)]
    names = ["null", "unit", "smallest effect that matters", "expected", "rule chosen"]
    assert [name for name, _ in said] == names
    assert said[0][1] == f"{FIRST.control} (the metric is then {FIRST.null:g})"
    assert said[1][1] == f"{FIRST.unit}, at least {FIRST.min_n}"


def test_a_row_leads_to_the_chapter_or_the_run_that_it_came_from(toy, monkeypatch):
    other = next(claim for claim in PLAIN if claim.chapter == "02")
    for model in ("tiny", "owner/ran", "unran"):
        for claim in (FIRST, other):
            put(toy / "results", claim.id, model, monkeypatch)
    nbformat.write(notebook(), toy / "notebooks" / "02-not-in-the-contents.ipynb")
    page = shown(toy, "matrix", ["notebooks/01-toy", "book/runs/owner--ran/01-toy"])
    links = {model: [a["href"] for a in row.find_all("a")] for model, row in rows_of(page, FIRST.id).items()}
    assert links == {"tiny": ["notebooks/01-toy"], "owner/ran": ["book/runs/owner--ran/01-toy"], "unran": []}
    assert not page.find(id=other.id).find_all("a"), "there is no page of chapter 02"


def test_the_matrix_says_what_is_stale_and_why(toy, monkeypatch):
    results = toy / "results"
    put(results, FIRST.id, "fresh", monkeypatch)
    put(results, FIRST.id, "other", monkeypatch, code="0" * 16, metric="m")
    path = put(results, FIRST.id, "edited", monkeypatch)
    verdict = FIRST.verdict(ESTIMATE)
    changed = next(other for other in VERDICTS if other != verdict)
    path.write_text(path.read_text().replace(f'"verdict": "{verdict}"', f'"verdict": "{changed}"'))
    path = put(results, FIRST.id, "old", monkeypatch)
    unsealed = json.loads(path.read_text())
    path.write_text(json.dumps({name: unsealed[name] for name in unsealed if name not in ("date", "checksum")}))
    rows = rows_of(shown(toy, "matrix"), FIRST.id)
    said = {model: cells(row)["Verdict"] for model, row in rows.items() if model in ("fresh", "edited", "other", "old")}
    assert said == {
        "fresh": verdict,
        "edited": f"{changed} stale: edited after it was recorded",
        "other": f"{verdict} stale: the code has changed since; the metric has changed since",
        "old": f"{verdict} stale: it has no checksum",
    }
    assert {model: "outdated" in rows[model].find("span")["class"] for model in said} == {
        model: model != "fresh" for model in said
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


def test_hub_models_have_their_size_their_records_and_hours_scaled_from_a_run(toy, monkeypatch):
    rows = {row[0].get_text(): [cell.get_text() for cell in row[1:]] for row in body(shown(toy, "hub"))}
    assert rows.keys() == {name for name, entry in zoo.REGISTRY.items() if isinstance(entry, zoo.Hub)}
    assert {row[-2] for row in rows.values()} == {"–"} and {row[-1] for row in rows.values()} == {"none: not run"}
    assert rows["gpt2-xl"] == ["15ea56de", "48 × 6,400", "5.8 / 2.9", "17, 20", "–", "none: not run"]
    put(toy / "results", "fact-search", "gpt2", monkeypatch)
    noted = 'date = "2026-01-01"\nthreads = "1"\nkncore = "1"\ntorch = "2"\ntransformers = "5"\n'
    (toy / "results" / pages.TIMED).mkdir()
    for number, seconds in (("01", 3600), ("02", 7200)):
        (toy / "results" / pages.TIMED / f"{number}.toml").write_text(f"seconds = {seconds}\n{noted}")
    rows = {row[0].get_text(): [cell.get_text() for cell in row[1:]] for row in body(shown(toy, "hub"))}
    assert rows["gpt2"][-1] == "1" and rows["bert-base-cased"][-2] == "under 1"
    assert float(rows["llama-2-7b"][-2]) == round(3 * 6607077376 / 493961216 * 32 / 24)


def test_one_edit_has_a_row_for_the_first_question_of_each_kind_with_the_first_answers(tmp_path):
    heads = "".join(f"<th>{head}</th>" for head in pages.ASKED)
    lines = [
        ("the request", "A is", "x", "y 0.50, z 0.10", "x 0.90"),
        ("reversed", "x is", "A", "B 0.80", "B 0.70, A 0.1"),
        ("reversed", "of x", "A", "C 0.80", "C 0.70"),
    ]
    cells = ["<tr>" + "".join(f"<td>{text}</td>" for text in line) + "</tr>" for line in lines]
    outputs = [f"<table>{rows}</table>" for rows in ("<tr><th>other</th></tr>", f"<tr>{heads}</tr>{''.join(cells)}")]
    shown = [nbformat.v4.new_output("display_data", {"text/html": html}) for html in outputs]
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=shown)]), tmp_path / "00-a.ipynb"
    )
    found = SimpleNamespace(chapters={"00": SimpleNamespace(path=tmp_path / "00-a.ipynb")}, page=lambda number: "")
    rows = pages.one_edit(found)["rows"]
    assert [tuple(row[name] for name in pages.ASKED) for row in rows] == [
        ("the request", "A is", "x", "y 0.50", "x 0.90"), ("reversed", "x is", "A", "B 0.80", "B 0.70"),
    ]  # fmt: skip
    table = BeautifulSoup(pages.fill("one-edit.html", rows=rows), "html.parser")
    assert [row[0].get_text().strip() for row in body(table)] == ["A is\xa0…", "x is\xa0…"]
    assert pages.one_edit(SimpleNamespace(chapters={}, page=lambda number: ""))["rows"] == []


def test_without_records_the_matrix_says_that_nothing_has_been_run(toy):
    rows = shown(toy, "matrix").select("tr[data-model]")
    assert [row.get_text() for row in rows] == ["not run on tiny"] * len(PLAIN)
    assert shown(toy, "provenance").find("p").get_text() == "No claim has a record yet."


@pytest.mark.kind("clock")
@given(st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S", "Z")), min_size=1))
@example("<script>alert(1)</script>")
@example("*a* _b_ `c` [d](e) ![f](g) $h$ {{i}} {.j} {k}`l` | \\ <m> &amp; https://n.org --- # + 1. \n\n```\n:::")
def test_text_in_a_template_is_shown_as_it_is(text):
    plain = " ".join(text.split())
    size = shapes.size(shapes.config("gpt2"))
    entry = dict(name=text, revision=text, size=size, rome=None, hours=None, records=text)
    page = BeautifulSoup(pages.fill("hub.html", rows=[entry]), "html.parser")
    (row,) = body(page)
    assert row[0].get_text().strip() == plain and row[-1].get_text().strip() == plain
    assert {tag.name for tag in row[0].find_all(True)} <= {"p", "code", "span"}


def test_the_claims_in_small_have_a_row_for_each_chapter_and_words_for_each_mark(toy, monkeypatch):
    for claim in claims.CLAIMS:
        put(toy / "results", claim, "tiny", monkeypatch)
    put(toy / "results", FIRST.id, "other", monkeypatch, code="0" * 16)
    page = shown(toy, "marks", ["notebooks/01-toy", "book/claims"])
    assert [head.get_text() for head in page.select("thead th")] == ["Chapter", "tiny", "other"]
    by_chapter = {}
    for claim in PLAIN:
        by_chapter.setdefault(claim.chapter, []).append(claim)
    groups = [*by_chapter.values(), *([CHECKS] if CHECKS else [])]
    for group, row in zip(groups, body(page), strict=True):
        for claim, mark in zip(group, row[1].select(".mark"), strict=True):
            verdict = claim.verdict(ESTIMATE)
            speaks = f"check {claim.word(verdict)}" if claim.check else f"{verdict}, speaks for {claim.side(verdict)}"
            explored = ", exploratory" * bool(claim.exploratory)
            words = f"{speaks}{explored}: {claim.statement} 0.80 [0.60, 0.90], n = 40 {claim.units}"
            assert mark["aria-label"] == words
            assert mark.name == "a" and mark["href"] == f"book/claims#{claim.id}"
            kind = "check" if claim.check else claims.side_class(claim.side(verdict))
            assert {"mark", verdict, kind} <= set(mark["class"])
            assert ("explored" in mark["class"]) == bool(claim.exploratory)
            assert mark.get_text() == pages.MARKS[verdict]
    others = [mark for row in body(page) for mark in row[2].select(".mark")]
    assert sum(mark.name == "span" and "not-run" in mark["class"] for mark in others) == len(claims.CLAIMS) - 1
    (outdated,) = [mark for mark in others if "outdated" in mark["class"]]
    assert ", stale: " in outdated["aria-label"]
    assert [link["href"] for link in page.select("th a")] == ["notebooks/01-toy"]


def recorded(toy: Path, monkeypatch, **verdicts: dict[str, str]) -> None:
    """Records of claims by model with these verdicts, and the sides that follow; names have _ for -."""
    for name, by_model in verdicts.items():
        claim = claims.CLAIMS[name.replace("_", "-")]
        for model, verdict in by_model.items():
            put(toy / "results", claim.id, model, monkeypatch, verdict=verdict, side=claim.side(verdict))


def declare(monkeypatch, *declared: Claim) -> None:
    """Let these be the claims of the book."""
    for module in (rules, claims, records, across, audit, seeds, staleness):
        monkeypatch.setattr(module, "CLAIMS", {claim.id: claim for claim in declared})


def claim_of(name: str, thesis: str, paper: str, **fields) -> Claim:
    shared = {"chapter": "01", "section": "2", "metric": "m", "kind": "above", "threshold": 0.5, "min_n": 3}
    return Claim(name, statement=f"{name} is so.", thesis=thesis, paper=paper, **shared | fields)


@pytest.fixture
def family(monkeypatch) -> None:
    """Three claims of which two have sides, and a check."""
    for_thesis = claim_of("a", "supported", "contradicted", exploratory="seen")
    for_paper = claim_of("b", "contradicted", "supported", fixed="abc")
    declare(monkeypatch, for_thesis, for_paper, claim_of("c", "", "", fixed="abc"), claim_of("d", "", "", check=True))


def test_the_findings_count_by_side_and_name_what_speaks_for_either(toy, monkeypatch, family):
    yes, no = "supported", "contradicted"
    recorded(toy, monkeypatch, a={"x": yes, "y": yes, "z": no}, b={"x": yes, "y": yes}, c={"x": no}, d={"x": yes})
    paper, thesis = shown(toy, "findings").select(".findings > div")
    assert [line.get_text() for line in paper.find_all(["strong", "li"])] == [
        "Most widely for the paper",
        "b is so. Supported on 2 of 2 models.",
    ]
    assert thesis.find("li").get_text() == "a is so. Supported on 2 of 3 models."
    assert (paper["class"], thesis["class"]) == (["for-paper"], ["for-thesis"])
    said = " ".join(shown(toy, "counts").get_text().split())
    assert "Of 6 verdicts on 3 models, 0 are inconclusive." in said
    assert "Of the 6 decided ones, 2 speak for the thesis, 3 for the paper and 1 for neither" in said
    assert "3 follow a rule that was fixed before their number was known, 3 are exploratory." in said
    assert "1 of 2 claims that two or more models decide have opposite verdicts." in said
    assert "The pretrained causal models, z and y and x, decide 1 claims together, 0 of them alike." in said


def test_the_findings_say_where_they_rest_on_models_trained_here_and_seeds_do_not_confirm_them(monkeypatch):
    claim = claim_of("a", "supported", "contradicted")
    record = {"claim": "a", "verdict": "supported", "side": "the thesis"}
    records = {
        ("a", model): record | {"model": model, "over_seeds": seeds}
        for model, seeds in (("controlled-gpt2", ""), ("controlled-bert", "unstable over seeds"))
    }
    declare(monkeypatch, claim)
    ((found,),) = [pages.findings(SimpleNamespace(judged=records))["widely"]["the thesis"]]
    assert found == (claim, "supported", 2, 2, True, 1)
    text = pages.fill("findings.html", widely={"the thesis": [found], "the paper": []})
    assert "Supported on 2 of 2 models, all of them trained for this book; on 1 of them other training seeds" in text


def test_without_records_nothing_is_said_to_be_found(toy):
    for name, words in {"counts": "No claim has", "multiplicity": "No claim has", "across": "No claim is"}.items():
        assert words in shown(toy, name).get_text()


def test_models_are_set_side_by_side(toy, monkeypatch, family):
    yes, no, open_ = "supported", "contradicted", "inconclusive"
    recorded(
        toy,
        monkeypatch,
        a={"controlled-x": no, "controlled-y": no, "z": yes},
        b={"controlled-x": yes, "z": yes, "w": open_},
        c={"z": open_},
    )
    page = shown(toy, "across")
    said = " ".join(page.get_text().split())
    assert "2 claims are decided, supported or contradicted, on two models or more. On 1 of them all" in said
    assert "and 1 flip: supported" in said
    assert "Another 1 are decided on one model at most" in said
    assert "b is so. Supported on 2 of 3 models, open on the others." in said
    assert "a is so. Supported on z (0.80 [0.60, 0.90]); contradicted on controlled-x (0.80" in said
    assert "Models trained here, on sentences of our own: in 1 of the 1 flips" in said
    assert "Masked models:" not in said, "none of these models is masked"
    assert "z stands alone against at least two others in 1 of the 1." in said
    assert "z and controlled-y differ most: opposite verdicts on 1 of the 1 claims" in said
    rows = [[cell.get_text().strip() for cell in row] for row in body(shown(toy, "by-model"))]
    assert shown(toy, "by-model").select("thead th")[1].get_text() == "tiny"
    assert [row[0] for row in rows] == ["b is so.", "c is so.", "a is so."]
    assert [row[-1] for row in rows] == ["0.67", "0.00", "flips"]


def test_a_verdict_that_its_seeds_do_not_share_is_marked_and_further_seeds_are_no_models(toy, monkeypatch, family):
    recorded(toy, monkeypatch, a={"controlled-gpt2": "supported", "controlled-bert": "supported"})
    for seed, value in enumerate((0.3, 0.9), 1):
        put(toy / "results", "a", f"controlled-gpt2-{seed}", monkeypatch, value=value)
        put(toy / "results", "a", f"controlled-bert-{seed}", monkeypatch, value=0.8 + seed / 1000)
    marks = {mark.find_parent("td")["data-label"]: mark for mark in shown(toy, "marks").select(".mark.supported")}
    assert set(marks) == {"controlled-gpt2", "controlled-bert"}
    assert {model: "unstable" in mark["class"] for model, mark in marks.items()} == {
        "controlled-gpt2": True,
        "controlled-bert": False,
    }
    assert "unstable over seeds" in marks["controlled-gpt2"]["aria-label"]
    said = " ".join(shown(toy, "seeds").get_text().split())
    assert "2 verdicts are of models" in said and "1 are unstable over seeds." in said
    assert len(body(shown(toy, "provenance"))) == 6


def test_a_claim_whose_check_failed_is_void_and_one_on_too_few_seeds_is_not_called_unstable(toy, monkeypatch):
    check = claim_of("took", "", "", check=True)
    declare(monkeypatch, claim_of("a", "supported", "contradicted", needs="absent took", exploratory="seen"), check)
    recorded(toy, monkeypatch, a={"x": "supported", "controlled-gpt2": "supported"}, took={"x": "contradicted"})
    for seed, verdict in ((1, "contradicted"), (2, "supported")):
        put(toy / "results", "a", f"controlled-gpt2-{seed}", monkeypatch)
        put(toy / "results", "took", f"controlled-gpt2-{seed}", monkeypatch, verdict=verdict)
    found = [mark for mark in shown(toy, "marks").select(".mark") if "a is so." in mark["aria-label"]]
    marks = {mark.find_parent("td")["data-label"]: mark for mark in found}
    assert {"inconclusive", "for-neither"} <= set(marks["x"]["class"])
    assert marks["x"]["aria-label"].startswith("inconclusive, speaks for neither, void, its check failed")
    assert "unstable" not in marks["controlled-gpt2"]["class"]
    assert "not known over seeds" in marks["controlled-gpt2"]["aria-label"]
    assert "1 rest on a check that failed on some of the seeds" in " ".join(shown(toy, "seeds").get_text().split())


def test_withdrawn_claims_are_listed_with_reasons(toy, monkeypatch):
    gone = {"chapter": "01", "statement": "It was so.", "metric": "m", "reason": "It <was> not.", "instead": [FIRST.id]}
    monkeypatch.setattr(pages, "WITHDRAWN", {"gone": gone, "went": gone | {"instead": []}})
    page = shown(toy, "withdrawn", ["book/claims"])
    assert [term.get_text() for term in page.find_all("dt")] == ["It was so."] * 2
    first, second = page.find_all("dd")
    assert first.find("p").get_text() == "It <was> not." and first.find("a")["href"] == f"book/claims#{FIRST.id}"
    assert "Nothing takes its place" in second.get_text()


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
