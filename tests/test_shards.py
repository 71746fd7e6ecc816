from __future__ import annotations

import math

import pytest
import tiny
from sweeping import CASES, QUERIES, lines

from knbook import shards, sweep
from knbook.errors import RunError, UsageError


@pytest.fixture(scope="module")
def lm():
    return tiny.lm("gpt2")


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
    parts = [sweep.sweep(lm, kind, items, settings, tmp_path / "shards", (k, 3)) for k in (1, 2, 3)]
    assert all(len(lines(part)) in (len(items) // 3, len(items) // 3 + 1) for part in parts)
    merged = shards.merge([tmp_path / "shards"], tmp_path / "merged.jsonl")
    assert len(lines(merged)) == len(items)
    assert all(map(close, lines(merged), lines(whole)))
    assert shards.load_records([whole, whole]) == lines(whole)


def test_a_merge_names_what_is_missing(lm, tmp_path):
    for k in (1, 2, 4):
        sweep.sweep(lm, "attribution", QUERIES, {}, tmp_path, (k, 4))
    out = tmp_path / "merged"
    with pytest.raises(RunError, match="2 of 10 records are missing, number 6 .* run shard 3/4 again") as error:
        shards.merge([path for path in tmp_path.glob("*.jsonl") if "3-of-4" not in path.name], out)
    assert error.value.exit_code == 1 and not out.exists()


def test_a_merge_refuses_records_that_differ(lm, tmp_path):
    one = sweep.sweep(lm, "attribution", QUERIES, {}, tmp_path / "a")
    record = lines(one)[4]
    other = tmp_path / "other.jsonl"
    other.write_text(shards.dumps({**record, "probability": record["probability"] + 1e-6}))
    with pytest.raises(RunError, match=f"differ on '{record['query']['prompt']}' .record {record['id']}"):
        shards.merge([one, other], tmp_path / "merged")


def test_a_merge_refuses_a_record_that_was_changed(lm, tmp_path):
    path = sweep.sweep(lm, "attribution", QUERIES, {}, tmp_path)
    damage(path, '"rank": ', '"rank": 1')
    with pytest.raises(RunError, match=r"line 1: damaged; delete the file and run its shard again"):
        shards.merge([path], tmp_path / "merged")
    sweep.sweep(lm, "attribution", QUERIES, {}, tmp_path)
    assert len(shards.load_records([path])) == 10, "a damaged record was not computed again"


def test_a_merge_refuses_shards_of_different_sweeps(lm, tmp_path):
    one = sweep.sweep(lm, "attribution", QUERIES, {"steps": 4}, tmp_path / "a", (1, 2))
    two = sweep.sweep(lm, "attribution", QUERIES, {"steps": 5}, tmp_path / "b", (2, 2))
    with pytest.raises(UsageError, match="belong to different sweeps"):
        shards.merge([one, two], tmp_path / "merged")
    with pytest.raises(UsageError, match="no records in .*nothing"):
        shards.merge([tmp_path / "nothing.jsonl"], tmp_path / "merged")


@pytest.mark.kind("sweep-files", own=True)
def test_a_merge_does_not_replace_a_shard(lm, tmp_path):
    files = [sweep.sweep(lm, "attribution", QUERIES, {"steps": 2}, tmp_path, (k, 2)) for k in (1, 2)]
    before = files[0].read_text()
    with pytest.raises(UsageError, match="is the file of a shard.*another name"):
        shards.merge(files, files[0])
    assert files[0].read_text() == before
