"""Sweeps: shards that join into what one run gives, records that survive a stop, merges that refuse what is wrong."""

from __future__ import annotations

import math
import os
import re
import types
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from sweeping import CASES, QUERIES, lines
from toy import COMPUTE, make_checkout, notebook

import kncore
from knbook import shards, sweep
from knbook.errors import RunError, UsageError
from kncore import attribution, editors
from kncore.query import Query
from knpaper import cases, criteria


@pytest.fixture(scope="module")
def lm():
    return tiny.lm("gpt2")


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
    assert [record["place"] for record in shards.load_records([path])] == list(range(1, 11))
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


# ------------------------------------------------------------------------------------------- what one prompt can spoil


def near_the_end(words):
    """A request of so many words about France."""
    return Query("the " * (words - 5) + "capital of France is in", "Paris", "France", "Madrid")


def one_case(request, *asked):
    flipped = replace(request, target=request.foil, foil=request.target)
    return cases.Case(request, {"reliability": (flipped,), "generality": asked})


SPOILT = [  # editor, case, what the record says
    ("rome-identity", one_case(near_the_end(60)), "after a piece of prose.* the context of tiny-gpt2 is 64"),
    ("context", one_case(near_the_end(40)), "with the new fact stated before it.* the context of tiny-gpt2 is 64"),
    ("fine-tuning", one_case(near_the_end(70)), "the context of tiny-gpt2 is 64"),
    ("neurons", one_case(near_the_end(70)), "the context of tiny-gpt2 is 64"),
    ("context", one_case(near_the_end(9), Query("the " * 60 + "cat", "is")), "before it.* context of tiny-gpt2 is 64"),
    ("rome-identity", one_case(near_the_end(9), Query("the cat is in", "Spain", "", "Rome")), "'Rome' is not in the"),
]


@pytest.mark.kind("prompt-too-long-in-sweep")
@pytest.mark.parametrize(("editor", "bad", "match"), SPOILT)
def test_a_case_that_cannot_be_edited_is_one_record_and_the_others_are_what_they_are_without_it(
    editor, bad, match, lm, tmp_path, monkeypatch
):
    monkeypatch.setattr(sweep, "BATCH", 2)
    settings = {"editor": editor}
    records = lines(sweep.sweep(lm, "edits", [*CASES[:2], bad, *CASES[2:4]], settings, tmp_path / "with"))
    without = lines(sweep.sweep(lm, "edits", CASES[:4], settings, tmp_path / "without"))
    assert [bool(record["failed"]) for record in records] == [False, False, True, False, False]
    assert re.search(match, records[2]["failed"]) and records[2]["asked"] == []
    assert [record["asked"] for record in records if record["asked"]] == [record["asked"] for record in without]


@pytest.mark.kind("prompt-too-long-in-sweep", own=True)
def test_an_error_that_nobody_foresaw_is_the_record_of_its_prompt_while_others_come_through(lm, tmp_path, monkeypatch):
    edit, attribute = editors.edit, attribution.attribute

    def breaks(function, prompt):
        def broken(lm, queries, *rest, **settings):
            if any(query.prompt == prompt for query in queries):
                raise IndexError("list index out of range")
            return function(lm, queries, *rest, **settings)

        return broken

    monkeypatch.setattr(editors, "edit", breaks(edit, CASES[1].request.prompt))
    monkeypatch.setattr(attribution, "attribute", breaks(attribute, QUERIES[2].prompt))
    for kind, items, settings in (
        ("edits", CASES[:3], {"editor": "context"}),
        ("attribution", QUERIES[:5], {"steps": 2}),
    ):
        records = lines(sweep.sweep(lm, kind, items, settings, tmp_path / kind))
        failed = [record["failed"] for record in records if record.get("failed")]
        assert failed == ["IndexError: list index out of range"] and len(records) == len(items)
    (record,) = lines(sweep.sweep(lm, "edits", CASES[1:2], {"editor": "context"}, tmp_path / "alone"))
    assert record["failed"] == "IndexError: list index out of range"


@pytest.mark.kind("prompt-too-long-in-sweep", own=True)
def test_what_is_not_finite_for_one_prompt_is_its_own_record(lm, tmp_path, monkeypatch):
    attribute = attribution.attribute

    def overflows(lm, queries, **settings):
        found = attribute(lm, queries, **settings)
        for row, query in zip(found.scores, queries, strict=True):
            row[0, 0] = math.inf if query == QUERIES[1] else row[0, 0]
        return found

    monkeypatch.setattr(attribution, "attribute", overflows)
    records = lines(sweep.sweep(lm, "attribution", QUERIES[:3], {"steps": 2}, tmp_path))
    assert [record.get("failed") for record in records] == [None, "the scores are not finite in torch.float32", None]

    def wild(lm, requests, editor, **_):
        found = edit(lm, requests, editor)
        loud = torch.zeros(1, lm.n_neurons), torch.full((1, 16), 3e38)
        loud[0][0, 0] = 1
        return [replace(one, deltas=(kncore.interventions.Delta(0, *loud),)) if r == CASES[1].request else one
                for one, r in zip(found, requests, strict=True)]  # fmt: skip

    edit = editors.edit
    monkeypatch.setattr(editors, "edit", wild)
    records = lines(sweep.sweep(lm, "edits", CASES[:3], {"editor": "context"}, tmp_path))
    assert [bool(record["failed"]) for record in records] == [False, True, False]


@pytest.mark.kind("prompt-too-long-in-sweep", own=True)
@pytest.mark.parametrize(("kind", "items", "settings"), [
    ("attribution", QUERIES[:4], {"steps": 2}),
    ("edits", CASES[:3], {"editor": "rome-identity"}),
    ("attribution", QUERIES[:1], {}),
])  # fmt: skip
def test_what_concerns_the_model_stops_the_sweep_with_its_message(kind, items, settings, tmp_path, monkeypatch):
    spoilt = tiny.model("gpt2")
    spoilt.transformer.h[1].mlp.c_fc.bias[3] = math.nan
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "model", lambda *_: spoilt)
        broken = tiny.lm("gpt2")
    with pytest.raises(RunError, match=r"the weights of tiny-gpt2 are not numbers .*h\.1\.mlp\.c_fc\.bias"):
        sweep.sweep(broken, kind, items, settings, tmp_path)
    for error in (MemoryError("7 TiB"), OSError(28, "No space left on device"), KeyboardInterrupt()):

        def stops(*_, error=error, **__):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(sweep, {"attribution": "_attributed", "edits": "_edited"}[kind], stops)
            with pytest.raises(type(error)):
                sweep.sweep(tiny.lm("gpt2"), kind, items, settings, tmp_path)

    def refuses(*_, **__):
        raise ValueError("the model is used by another thread")

    monkeypatch.setattr(attribution, "attribute", refuses)
    monkeypatch.setattr(criteria, "measure", refuses)
    with pytest.raises(ValueError, match="used by another thread"):
        sweep.sweep(tiny.lm("gpt2"), kind, items, settings, tmp_path)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- sweeps side by side


@pytest.mark.kind("sweep-files")
def test_sweeps_of_other_prompts_models_and_settings_stand_side_by_side(lm, tmp_path):
    other = tiny.lm("gpt2", seed=1)
    paths, texts = [], []
    for model, items, settings in (
        (lm, QUERIES, {"steps": 2}), (lm, QUERIES[:4], {"steps": 2}), (lm, QUERIES, {"steps": 3}),
        (other, QUERIES, {"steps": 2}),
    ):  # fmt: skip
        paths.append(sweep.sweep(model, "attribution", items, settings, tmp_path))
        texts.append(paths[-1].read_text())
    assert len(set(paths)) == 4 and [path.read_text() for path in paths] == texts
    assert [len(shards.load_records([path])) for path in paths] == [10, 4, 10, 10]
    with pytest.raises(UsageError, match="belong to different sweeps, of other revision, settings") as error:
        shards.merge([tmp_path], tmp_path / "all")
    for path in paths:
        assert f"{path.name.removesuffix('1-of-1.jsonl')}*.jsonl" in str(error.value)
    assert '{"steps": 3}' in str(error.value)
    with pytest.raises(UsageError, match=r"different sweeps, of other prompts.*\(10 of 10.*\(4 of 4"):
        shards.load_records(paths[:2])


@pytest.mark.kind("sweep-files")
def test_an_interrupted_sweep_keeps_its_records_when_another_runs_in_its_folder(lm, tmp_path, monkeypatch):
    attributed, calls = sweep._attributed, []

    def dies(lm, queries, settings):
        calls.append(len(queries))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return attributed(lm, queries, settings)

    monkeypatch.setattr(sweep, "BATCH", 3)
    monkeypatch.setattr(sweep, "_attributed", dies)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(lm, "attribution", QUERIES, {"steps": 2}, tmp_path)
    (part,) = tmp_path.glob(".*.part")
    before = part.read_bytes()
    sweep.sweep(lm, "attribution", QUERIES, {"steps": 3}, tmp_path)
    assert part.read_bytes() == before
    n = len(calls)
    sweep.sweep(lm, "attribution", QUERIES, {"steps": 2}, tmp_path)
    assert sum(calls[n:]) == 4 and not list(tmp_path.glob(".*"))


@pytest.mark.kind("sweep-files")
@pytest.mark.parametrize("moment", ["computing", "writing"])
def test_two_processes_on_one_shard_both_end_with_the_file_of_the_first(moment, lm, tmp_path, monkeypatch):
    attributed, write, files = sweep._attributed, sweep.write, []

    def meanwhile():
        if not files:
            files.append(None)
            files.append(sweep.sweep(lm, "attribution", QUERIES, {"steps": 2}, tmp_path))
            files.append(files[1].read_bytes())

    def computes(lm, queries, settings):
        if moment == "computing" and list(tmp_path.glob(".*.part")):  # its first batch is written
            meanwhile()
        return [{**one, "gap": one["gap"] + 1e-9 * len(files)} for one in attributed(lm, queries, settings)]

    def writes(path, text):
        if moment == "writing" and not files:
            meanwhile()
            raise FileNotFoundError(2, "No such file or directory", "what stood beside it")
        return write(path, text)

    monkeypatch.setattr(sweep, "BATCH", 4)
    monkeypatch.setattr(sweep, "_attributed", computes)
    monkeypatch.setattr(sweep, "write", writes)
    path = sweep.sweep(lm, "attribution", QUERIES, {"steps": 2}, tmp_path)
    assert path == files[1] and path.read_bytes() == files[2]
    assert len(shards.load_records([tmp_path])) == 10 and list(tmp_path.iterdir()) == [path]


def test_a_shard_that_was_killed_before_its_file_was_moved_goes_on_with_all_its_records(lm, tmp_path, monkeypatch):
    path = sweep.sweep(lm, "attribution", QUERIES, {"steps": 2}, tmp_path)
    text = path.read_text()
    path.rename(tmp_path / f".{path.name}.k3x_.part")
    monkeypatch.setattr(sweep, "_attributed", lambda *_: pytest.fail("computed again"))
    assert sweep.sweep(lm, "attribution", QUERIES, {"steps": 2}, tmp_path).read_text() == text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.kind("sweep-files")
def test_a_sweep_in_another_number_of_shards_takes_what_is_there(lm, tmp_path, monkeypatch):
    attributed, calls = sweep._attributed, []
    monkeypatch.setattr(sweep, "_attributed", lambda *given: calls.append(len(given[1])) or attributed(*given))
    half = sweep.sweep(lm, "attribution", QUERIES, {"steps": 2}, tmp_path, (1, 2))
    (tmp_path / f".{half.name.replace('1-of-2', '2-of-2')}.x.part").write_text("")
    files = [sweep.sweep(lm, "attribution", QUERIES, {"steps": 2}, tmp_path, (k, 3)) for k in (1, 2, 3)]
    assert sum(calls) == 10
    assert len(shards.load_records([tmp_path])) == 10 and half.is_file() and len(set(files)) == 3
    files[2].unlink()
    with pytest.raises(RunError, match="4 of 10 records are missing, number 7 is the first; run shard 2/2 again"):
        shards.load_records([tmp_path])


@pytest.mark.kind("sweep-files", own=True)
def test_a_folder_may_hold_other_files_and_they_stay_as_they_are(lm, tmp_path):
    out = tmp_path / "out [1]*"
    out.mkdir()
    others = {"prompts.jsonl": '{"prompt": "a", "target": "b"}\n', "attribution.jsonl": "", "merged.jsonl": "x",
              ".attribution-notes.part": "y"}  # fmt: skip
    for name, text in others.items():
        (out / name).write_text(text)
    sweep.sweep(lm, "attribution", QUERIES[:3], {"steps": 2}, out, (1, 2))
    sweep.sweep(lm, "attribution", QUERIES[:3], {"steps": 2}, out, (2, 2))
    assert {name: (out / name).read_text() for name in others} == others
    merged = shards.merge([out], out / "merged.jsonl")
    assert len(lines(merged)) == 3 and len(shards.load_records([out])) == 3 and len(shards.load_records([merged])) == 3
    with pytest.raises(RunError, match="prompts.jsonl, line 1: no record of a sweep"):
        shards.load_records([out / "prompts.jsonl"])


@pytest.mark.kind("sweep-files", own=True)
def test_a_record_is_used_again_only_for_what_it_says_it_is(lm, tmp_path, monkeypatch):
    path = sweep.sweep(lm, "attribution", QUERIES[:3], {"steps": 2}, tmp_path)
    before = path.read_text()
    records = lines(path)
    changed = [{**records[0], "query": {**records[0]["query"], "target": "cat"}}, {**records[1], "revision": "other"}]
    path.write_text("".join(map(shards.dumps, [*changed, records[2]])))
    assert sweep.sweep(lm, "attribution", QUERIES[:3], {"steps": 2}, tmp_path).read_text() == before
    for nonsense in (
        {},
        {"id": 1},
        {**records[0], "place": "1"},
        {**records[0], "place": 9},
        {**records[0], "query": 1},
    ):
        path.write_text(shards.dumps(nonsense))
        with pytest.raises(RunError, match="line 1: damaged"):
            shards.load_records([path])


@pytest.mark.kind("sweep-files", own=True)
def test_the_name_of_the_machine_does_not_matter(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "uname", lambda: types.SimpleNamespace(nodename="rack/1 *[a]\n"))
    path = sweep.sweep(lm, "attribution", QUERIES[:2], {"steps": 2}, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.kind("sweep-files", own=True)
def test_a_model_that_is_changed_while_the_sweep_runs_ends_it(lm, tmp_path, monkeypatch):
    attributed = sweep._attributed

    def changes(lm, queries, settings):
        object.__setattr__(lm, "revision", "another")
        return attributed(lm, queries, settings)

    monkeypatch.setattr(sweep, "_attributed", changes)
    with pytest.raises(RunError, match="was changed while the sweep ran"):
        sweep.sweep(tiny.lm("gpt2"), "attribution", QUERIES, {"steps": 2}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.kind("raw-errors")
def test_records_of_sweeps_do_not_land_among_what_a_checkout_tracks(lm, tmp_path, monkeypatch):
    root = make_checkout(tmp_path / "toy", n01_toy=notebook(COMPUTE))
    (root / "results" / "gpt2").mkdir(parents=True)
    (tmp_path / "link").symlink_to(root / "results")
    monkeypatch.chdir(root)
    for out in ("results", "results/gpt2", "results/new/er", "notebooks", "../link/x", "./runs/../results"):
        with pytest.raises(UsageError, match="in (results|notebooks)/ of a checkout.*give a folder of its own"):
            sweep.sweep(lm, "attribution", QUERIES[:1], {"steps": 2}, Path(out))
        with pytest.raises(UsageError, match="give a folder of its own"):
            shards.merge([Path(out)], Path(out) / "all.jsonl")
    assert not (root / "results" / "new").exists()
    sweep.sweep(lm, "attribution", QUERIES[:1], {"steps": 2}, Path("runs"))
    for taken in (os.environ["KNCORE_SCORES"], os.environ["KNCORE_RESULTS"]):
        with pytest.raises(UsageError, match="is for other things"):
            sweep.sweep(lm, "attribution", QUERIES[:1], {"steps": 2}, Path(taken) / "runs")


@pytest.mark.kind("raw-errors", own=True)
def test_a_full_disk_is_named_and_what_was_computed_stays(lm, tmp_path, monkeypatch):
    calls, sync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(sweep, "BATCH", 4)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*\.part"):
        sweep.sweep(lm, "attribution", QUERIES, {"steps": 2}, tmp_path)
    monkeypatch.setattr(os, "fsync", sync)
    computed, sizes = sweep._attributed, []
    monkeypatch.setattr(sweep, "_attributed", lambda *given: sizes.append(len(given[1])) or computed(*given))
    assert len(lines(sweep.sweep(lm, "attribution", QUERIES, {"steps": 2}, tmp_path))) == 10
    assert sum(sizes) <= 6
