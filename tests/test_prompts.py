from __future__ import annotations

import json

import pytest
import tiny

from knbook import prompts
from knbook.errors import UsageError
from kncore import models
from kncore.query import Query


@pytest.fixture(scope="module")
def lm():
    return tiny.lm("gpt2")


def test_own_facts_grammars_and_cases_are_swept_by_name():
    lm = models.load("controlled-gpt2")
    both = prompts.named(lm, "attribution", ["capital", "determiner_noun"], n=3)
    assert [query.task for query in both] == ["capital"] * 3 + ["determiner_noun"] * 3
    requests = prompts.named(lm, "edits", ["capital", "field_of_work", "agreement"], n=2)
    assert [case.request.task for case in requests] == ["capital"] * 2 + ["field_of_work"] * 2 + ["determiner_noun"] * 2
    assert {query.task for query in prompts.named(lm, "attribution", n=1)} >= {
        "capital",
        "occupation",
        "determiner_noun",
    }
    assert {case.request.task for case in prompts.named(lm, "edits", n=1)} >= {"capital", "field_of_work"}
    with pytest.raises(ValueError, match="unknown relation 'captial'.*capital"):
        prompts.named(lm, "attribution", ["captial"])
    with pytest.raises(UsageError, match="'npi_presnt_1' is neither a relation of ParaRel.* npi_present_1"):
        prompts.named(lm, "attribution", ["npi_presnt_1"], "public")


def test_public_data_are_swept_by_name(data_folder):
    lm = tiny.lm("gpt2")
    found = prompts.named(lm, "attribution", ["P36"], str(data_folder), n=5)
    assert len(found) == 5 and not any(query.masked for query in found)
    assert len(prompts.named(lm, "edits", ["counterfact"], str(data_folder), n=3)) == 3


@pytest.mark.parametrize(("line", "match"), [
    ('{"prompt": "the capital"}', "line 2: .*target"),
    ('{"prompt": "the capital", "target": "is", "colour": "red"}', "line 2: .*colour"),
    ("the capital", "line 2"),
    ("[1, 2]", "line 2"),
])  # fmt: skip
def test_a_line_that_is_no_prompt_is_named(line, match, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "the capital of", "target": "France"}\n' + line + "\n")
    with pytest.raises(UsageError, match=match):
        prompts.read_queries(path, "attribution")


def test_a_mark_at_the_beginning_and_an_odd_end_of_line_within_a_text_are_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('\ufeff{"prompt": "the\u2028capital\x85of", "target": "France"}\n', encoding="utf-8")
    (query,) = prompts.read_queries(path, "attribution")
    assert (query.prompt.split(), query.target) == (["the", "capital", "of"], "France")


def test_an_edit_of_ones_own_needs_a_subject_and_a_foil(tmp_path):
    path = tmp_path / "prompts.jsonl"
    row = {"prompt": "the capital of France is", "target": "Paris", "subject": "France"}
    path.write_text(json.dumps(row))
    with pytest.raises(UsageError, match="line 1: an edit needs a subject and a foil"):
        prompts.read_queries(path, "edits")
    path.write_text(json.dumps({**row, "foil": "Madrid"}))
    (case,) = prompts.read_queries(path, "edits")
    assert case.queries["reliability"][0].target == "Madrid"


# ------------------------------------------------------------------------------------------- prompts of one's own

ROW = '{"prompt": "the capital of", "target": "France"}'


@pytest.mark.kind("blank-lines")
@pytest.mark.parametrize("text", [
    f"{ROW}\n{ROW}\n\n", f"\n{ROW}\n\n{ROW}", f"{ROW}\r\n\r\n{ROW}\r\n \t \r\n", f"\ufeff\n{ROW}\n{ROW}\n\u3000\n",
])  # fmt: skip
def test_blank_lines_are_skipped(text, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text, encoding="utf-8", newline="")
    assert prompts.read_queries(path, "attribution") == [Query("the capital of", "France")] * 2
    lines = len(text.replace("\r\n", "\n").splitlines()) if text.endswith("\n") else text.count("\n") + 1
    path.write_text(text + ("" if text.endswith("\n") else "\n") + '{"prompt": 1}', encoding="utf-8", newline="")
    with pytest.raises(UsageError, match=f"line {lines + 1}: there is no target"):
        prompts.read_queries(path, "attribution")


@pytest.mark.kind("blank-lines", own=True)
@pytest.mark.parametrize(("line", "match"), [
    ('{"prompt": "a", "prompt": "b", "target": "c"}', "'prompt' stands there twice"),
    ('{"promt": "a", "target": "c", "Colour": 1}', r"has no 'promt', 'Colour' .did you mean prompt\?"),
    ('{"prompt": "a"}', "there is no target"),
    ('{"prompt": NaN, "target": "c"}', "must be text, got float nan"),
    ('{"prompt": "a", "target": -Infinity}', "must be text, got float -inf"),
    ('{"prompt": "a", "target": 1e999}', "must be text, got float inf"),
    ('{"prompt": "a", "target": ' + "9" * 5000 + "}", "Exceeds the limit"),
    ('{"prompt": "a", "target": 7}', "the target of a Query must be text, got int 7"),
    ("null", "it holds null, no object"),
    ('["a", "b"]', "no object"),
    ("{'prompt': 'a'}", "no JSON .Expecting property name.* at letter 2"),
    (f"{ROW}{ROW}", "no JSON .Extra data"),
])  # fmt: skip
def test_a_line_that_is_no_prompt_says_why(line, match, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"\n{ROW}\n\n{line}\n")
    with pytest.raises(
        UsageError, match=f"prompts.jsonl, line 4: .*{match}.*Expected an object with prompt and target"
    ):
        prompts.read_queries(path, "attribution")


@pytest.mark.kind("blank-lines", own=True)
@pytest.mark.parametrize("text", ["", "\n", " \r\n\t\n", "\ufeff"])
def test_a_file_without_a_prompt_is_refused(text, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="holds no prompts; expected lines of JSON"):
        prompts.read_queries(path, "attribution")
