"""What every chapter has for its reader: a result in short, exercises, commands that work, links to terms."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import nbformat
import pytest
from commands import parsed

from knbook import checkout
from knbook.parameters import check_parameters, parse_parameters
from knpaper import claims

ROOT = Path(__file__).resolve().parent.parent
ALL = checkout.chapters(ROOT)
CHAPTERS = [chapter for chapter in ALL if chapter.number in {claim.chapter for claim in claims.CLAIMS.values()}]
ROLE = re.compile(r"\{(?:value|share|effect|verdict)\}`([\w-]+)[@`]")


@cache
def prose(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def named(chapters):
    return pytest.mark.parametrize("chapter", chapters, ids=lambda chapter: chapter.number)


@named(CHAPTERS)
def test_a_chapter_says_its_result_near_the_top_with_the_numbers_of_the_records(chapter):
    first = nbformat.read(chapter.path, as_version=4).cells[0].source
    short = next(part for part in first.split("\n\n") if part.startswith("**In short.**"))
    asked = set(ROLE.findall(short))
    mine = {claim.id for claim in claims.CLAIMS.values() if claim.chapter == chapter.number}
    assert asked and asked <= mine
    bare = re.sub(r"\{\w+\}`[^`]*`", "", short)
    typed = set(re.findall(r"(?<![\w-])\d+(?:\.\d+)?", bare)) - {"0", "1", "2.7"}  # the ends of a scale, and e
    assert not typed, f"{chapter.path.name} types {typed} where it tells its result"


def test_prose_asks_for_claims_that_are_declared():
    for path in [*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "book").glob("*.md")]:
        text = prose(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
        assert set(ROLE.findall(text)) <= set(claims.CLAIMS), path.name


@named(CHAPTERS)
def test_a_chapter_says_what_it_does_not_show_and_has_exercises_with_hidden_answers(chapter):
    text = prose(chapter.path)
    assert "**What this does not show.**" in text
    _, exercises = text.split("\n## Exercises\n")
    assert len(re.findall(r"^\*\*\d\.\*\* ", exercises, re.MULTILINE)) in (2, 3)
    assert len(re.findall(r"^\*\*\d\.\*\* ", exercises, re.MULTILINE)) == exercises.count("{dropdown} Answer")


@named(ALL)
def test_the_commands_of_a_chapter_run_that_chapter_with_parameters_that_it_has(chapter, tmp_path, monkeypatch):
    (tmp_path / "my-corpus").mkdir()
    blocks = re.findall(r"^```bash\n(.*?)^```", prose(chapter.path) + "\n", re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    assert lines
    monkeypatch.chdir(tmp_path)
    for program, *rest in lines:
        if program.endswith("papermill"):
            notebook, out, *options = rest
            assert (notebook, out) == (f"notebooks/{chapter.path.name}", "out.ipynb")
            assert set(options[::3]) <= {"-p"}
            given = [f"{name}={value}" for name, value in zip(options[1::3], options[2::3], strict=True)]
        else:
            assert [program, *rest[:2]] == [".venv/bin/python", "-m", "kncore"]
            options = parsed(rest[2:])
            assert options["only"] == chapter.number
            given = [*options["parameters"], *([f"model={options['model']}"] if options["model"] else [])]
        check_parameters(chapter, parse_parameters(given))


@named(CHAPTERS)
def test_the_terms_of_a_chapter_are_in_the_glossary_and_linked_where_they_come_first(chapter):
    defined = set(re.findall(r"^(\S.*)\n  ", (ROOT / "book" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE))
    linked = re.findall(r"\{term\}`(?:[^`<]*<)?([^`<>]+)>?`", prose(chapter.path))
    assert len(linked) >= 5
    assert {term.lower() for term in linked} <= {term.lower() for term in defined}
    assert len({term.lower() for term in linked}) == len(linked), "a term is linked once, at its first use"


@named(ALL)
def test_every_figure_of_a_notebook_has_a_caption_and_words_for_those_who_do_not_see_it(chapter):
    for cell in nbformat.read(chapter.path, as_version=4).cells:
        if any("image/svg+xml" in output.get("data", {}) for output in cell.get("outputs", [])):
            told = cell.metadata["mystnb"]
            assert told["figure"]["caption"].strip()[-1] == "." and len(told["image"]["alt"]) > 20, cell.id
