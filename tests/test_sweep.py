"""Sweeps: shards that join into what one run gives, records that survive a stop, merges that refuse what is wrong."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch

import kncore
from kncore import __main__, cases, models, sweep
from kncore.pipeline import RunError, UsageError
from kncore.tasks import Query

PLACES = ("France", "Spain", "Paris", "Madrid", "Anna")
QUERIES = [Query(f"the capital of {place} is in", word) for word in ("Paris", "Madrid") for place in PLACES]
CASES = [
    cases.Case(Query(f"the capital of {place} is", "Paris", place, "Madrid"), {"reliability": (query,)})
    for place in PLACES
    for query in [Query(f"the capital of {place} is", "Madrid", place, "Paris")]
]


@pytest.fixture(scope="module")
def lm():
    return tiny.lm("gpt2")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def damage(path, old, new):
    text = path.read_text()
    assert text.count(old)
    path.write_text(text.replace(old, new, 1))


def close(a, b):
    """Equal but for the rounding of numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[name], b[name]) for name in a if name != "checksum")
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-5) if isinstance(a, float) else a == b


@pytest.mark.parametrize(("kind", "items", "settings"), [
    ("attribution", QUERIES, {"steps": 4}),
    ("edits", CASES, {"editor": "rome-identity"}),
])  # fmt: skip
def test_shards_join_into_what_one_run_gives(kind, items, settings, lm, tmp_path):
    whole = sweep.sweep(lm, kind, items, settings, tmp_path / "whole")
    shards = [sweep.sweep(lm, kind, items, settings, tmp_path / "shards", (k, 3)) for k in (1, 2, 3)]
    assert all(len(lines(shard)) in (len(items) // 3, len(items) // 3 + 1) for shard in shards)
    merged = sweep.merge([tmp_path / "shards"], tmp_path / "merged.jsonl")
    assert len(lines(merged)) == len(items)
    assert all(map(close, lines(merged), lines(whole)))
    assert sweep.load_records([whole, whole]) == lines(whole)


def test_a_record_has_the_numbers_of_attribute(lm, tmp_path):
    (record,) = lines(sweep.sweep(lm, "attribution", QUERIES[:1], {}, tmp_path))
    found = kncore.attribute(lm, QUERIES[:1])
    largest = float(found.scores.max())
    assert record["probability"] == pytest.approx(float(found.probability))
    assert (record["rank"], record["nodes"]) == (int(found.rank), int(found.nodes.sum()))
    assert record["gap"] == pytest.approx(float(found.gap.max()), abs=1e-7)
    inside = (found.scores[0] > 0.2 * largest).nonzero().tolist()
    assert {(b, i) for b, i, _ in record["neurons"]} == set(map(tuple, inside))
    assert record["neurons"][0][2] == pytest.approx(largest)


@pytest.mark.parametrize("torn", [False, True])
def test_a_stopped_shard_goes_on_where_it_was(torn, lm, tmp_path, monkeypatch):
    attributed, calls = sweep._attributed, []

    def dies(lm, queries, settings):
        calls.append(len(queries))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return attributed(lm, queries, settings)

    monkeypatch.setattr(sweep, "BATCH", 3)
    monkeypatch.setattr(sweep, "_attributed", dies)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(lm, "attribution", QUERIES, {}, tmp_path)
    assert not list(tmp_path.glob("*.jsonl")), "a shard's file appeared before the shard was complete"
    if torn:
        (part,) = tmp_path.glob(".*.part")
        part.write_text(part.read_text()[:-20])
    path = sweep.sweep(lm, "attribution", QUERIES, {}, tmp_path)
    assert sum(calls[3:]) == len(QUERIES) - 6 + torn
    assert [record["place"] for record in sweep.load_records([path])] == list(range(1, 11))
    assert list(tmp_path.iterdir()) == [path]
    before, n = path.read_bytes(), len(calls)
    assert sweep.sweep(lm, "attribution", QUERIES, {}, tmp_path).read_bytes() == before
    assert len(calls) == n, "a complete shard was computed again"


def test_a_prompt_that_cannot_be_asked_is_recorded_and_stops_nothing(lm, tmp_path):
    long = Query("the " * 80 + "book", "is")
    records = lines(sweep.sweep(lm, "attribution", [QUERIES[0], long, QUERIES[1]], {}, tmp_path))
    assert [("failed" in record) for record in records] == [False, True, False]
    assert "the context of tiny-gpt2 is 64" in records[1]["failed"]
    (strange,) = lines(
        sweep.sweep(lm, "attribution", [Query("the capital is", "Ouagadougou")], {}, tmp_path / "strange")
    )
    assert "'Ouagadougou' is not in the vocabulary of tiny-gpt2" in strange["failed"]
    bad = cases.Case(CASES[0].request, {"reliability": (long,)})
    records = lines(sweep.sweep(lm, "edits", [CASES[0], bad, CASES[1]], {"editor": "context"}, tmp_path))
    assert [bool(record["asked"]) for record in records] == [True, False, True]
    assert [record["asked"][0]["prompt"] for record in records if record["asked"]] == [
        case.request.prompt for case in CASES[:2]
    ]


def test_a_prompt_given_twice_is_swept_once(lm, tmp_path):
    assert len(lines(sweep.sweep(lm, "attribution", QUERIES[:2] * 3, {}, tmp_path))) == 2


def test_the_name_of_a_record_follows_all_that_decides_it(lm, tmp_path):
    def name(lm, settings, query, folder):
        return lines(sweep.sweep(lm, "attribution", [query], settings, tmp_path / folder))[0]["id"]

    names = [
        name(lm, {"steps": 4}, QUERIES[0], "a"),
        name(lm, {"steps": 5}, QUERIES[0], "b"),
        name(lm, {"steps": 4}, QUERIES[1], "c"),
        name(tiny.lm("gpt2", seed=1), {"steps": 4}, QUERIES[0], "d"),
        name(tiny.lm("gpt2", dtype=torch.float64), {"steps": 4}, QUERIES[0], "e"),
    ]
    assert len(set(names)) == 5
    assert name(lm, {"steps": 4}, QUERIES[0], "f") == names[0]


def test_a_merge_names_what_is_missing(lm, tmp_path):
    for k in (1, 2, 4):
        sweep.sweep(lm, "attribution", QUERIES, {}, tmp_path, (k, 4))
    out = tmp_path / "merged"
    with pytest.raises(RunError, match=r"2 of 10 records are missing: 6–7.*run shard 3/4 again") as error:
        sweep.merge([path for path in tmp_path.glob("*.jsonl") if "3-of-4" not in path.name], out)
    assert error.value.exit_code == 1 and not out.exists()


def test_a_merge_refuses_records_that_differ(lm, tmp_path):
    one = sweep.sweep(lm, "attribution", QUERIES, {}, tmp_path / "a")
    record = lines(one)[4]
    other = tmp_path / "other.jsonl"
    other.write_text(sweep._line({**record, "probability": record["probability"] + 1e-6}))
    with pytest.raises(RunError, match=f"differ on '{record['query']['prompt']}' .record {record['id']}"):
        sweep.merge([one, other], tmp_path / "merged")


def test_a_merge_refuses_a_record_that_was_changed(lm, tmp_path):
    path = sweep.sweep(lm, "attribution", QUERIES, {}, tmp_path)
    damage(path, '"rank": ', '"rank": 1')
    with pytest.raises(RunError, match=r"line 1: damaged; delete the file and run its shard again"):
        sweep.merge([path], tmp_path / "merged")
    sweep.sweep(lm, "attribution", QUERIES, {}, tmp_path)
    assert len(sweep.load_records([path])) == 10, "a damaged record was not computed again"


def test_a_merge_refuses_shards_of_different_sweeps(lm, tmp_path):
    one = sweep.sweep(lm, "attribution", QUERIES, {"steps": 4}, tmp_path / "a", (1, 2))
    two = sweep.sweep(lm, "attribution", QUERIES, {"steps": 5}, tmp_path / "b", (2, 2))
    with pytest.raises(UsageError, match="belong to different sweeps"):
        sweep.merge([one, two], tmp_path / "merged")
    with pytest.raises(UsageError, match="no records in .*nothing"):
        sweep.merge([tmp_path / "nothing.jsonl"], tmp_path / "merged")


@pytest.mark.parametrize(("change", "match"), [
    ({"kind": "tracing"}, "unknown kind of sweep 'tracing'"),
    ({"shard": (4, 3)}, "shard 4/3 does not exist"),
    ({"items": []}, "no prompts"),
    ({"settings": {"editor": "memit"}}, "all requests together"),
])  # fmt: skip
def test_nonsense_is_refused_before_any_work(change, match, lm, tmp_path):
    given = {"kind": "attribution", "items": QUERIES, "settings": {}, "shard": (1, 1), **change}
    with pytest.raises(UsageError, match=match):
        sweep.sweep(lm, out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_own_facts_grammars_and_cases_are_swept_by_name():
    lm = models.load("controlled-gpt2")
    both = sweep.asked(lm, "attribution", ["capital", "determiner_noun"], n=3)
    assert [query.task for query in both] == ["capital"] * 3 + ["determiner_noun"] * 3
    requests = sweep.asked(lm, "edits", ["capital", "field_of_work", "agreement"], n=2)
    assert [case.request.task for case in requests] == ["capital"] * 2 + ["field_of_work"] * 2 + ["determiner_noun"] * 2
    assert {query.task for query in sweep.asked(lm, "attribution", n=1)} >= {"capital", "occupation", "determiner_noun"}
    assert {case.request.task for case in sweep.asked(lm, "edits", n=1)} >= {"capital", "field_of_work"}
    with pytest.raises(ValueError, match="unknown relation 'captial'.*capital"):
        sweep.asked(lm, "attribution", ["captial"])
    with pytest.raises(UsageError, match="'npi_presnt_1' is neither a relation of ParaRel.* npi_present_1"):
        sweep.asked(lm, "attribution", ["npi_presnt_1"], "public")


def test_public_data_are_swept_by_name(data_folder):
    lm = tiny.lm("gpt2")
    found = sweep.asked(lm, "attribution", ["P36"], str(data_folder), n=5)
    assert len(found) == 5 and not any(query.masked for query in found)
    assert len(sweep.asked(lm, "edits", ["counterfact"], str(data_folder), n=3)) == 3


@pytest.fixture
def folder(tmp_path):
    tiny.model("gpt2").save_pretrained(tmp_path / "model")
    tiny.tokenizer(False).save_pretrained(tmp_path / "model")
    return tmp_path


def test_the_command_line_sweeps_prompts_of_ones_own_and_merges(folder, capsys):
    prompts = folder / "prompts.jsonl"
    rows = [{"prompt": query.prompt, "target": query.target} for query in QUERIES]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["sweep", "attribution", "--model", str(folder / "model"), "--queries", str(prompts)]
    for k in (1, 2):
        assert __main__.main([*common, "--dtype", "float64", "--shard", f"{k}/2", "--out", str(folder / "out")]) == 0
    assert __main__.main(["merge", str(folder / "out"), "--out", str(folder / "all.jsonl")]) == 0
    assert capsys.readouterr().out.split()[-1] == str(folder / "all.jsonl")
    records = lines(folder / "all.jsonl")
    assert [record["query"] for record in records] == rows
    assert {record["dtype"] for record in records} == {"float64"}


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
        sweep.read_queries(path, "attribution")


def test_a_mark_at_the_beginning_and_an_odd_end_of_line_within_a_text_are_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('\ufeff{"prompt": "the\u2028capital\x85of", "target": "France"}\n', encoding="utf-8")
    (query,) = sweep.read_queries(path, "attribution")
    assert (query.prompt.split(), query.target) == (["the", "capital", "of"], "France")


def test_an_edit_of_ones_own_needs_a_subject_and_a_foil(tmp_path):
    path = tmp_path / "prompts.jsonl"
    row = {"prompt": "the capital of France is", "target": "Paris", "subject": "France"}
    path.write_text(json.dumps(row))
    with pytest.raises(UsageError, match="line 1: an edit needs a subject and a foil"):
        sweep.read_queries(path, "edits")
    path.write_text(json.dumps({**row, "foil": "Madrid"}))
    (case,) = sweep.read_queries(path, "edits")
    assert case.asked["reliability"][0].target == "Madrid"


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "a/b", "-1/3", "1/0"])
def test_a_shard_that_is_none_is_a_usage_error(shard, capsys):
    with pytest.raises(SystemExit) as error:
        __main__.main(["sweep", "attribution", f"--shard={shard}", "--out", "x"])
    assert error.value.code == 2 and "expected K/N" in capsys.readouterr().err
