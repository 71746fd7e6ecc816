import json
import math
import re
import shutil
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recording import CLEAR, LM, files, on, put, values

from knpaper.records import checksum, effect, keep_dates, read_records, results_folder
from knpaper.staleness import stale
from knpaper.stats import Estimate


def test_a_hub_name_gives_one_folder(results):
    put(lm=replace(LM, name="owner/name@abc"))
    assert files(results) == ["owner--name@abc/fact-search.json"]
    assert read_records(results)[0]["model"] == "owner/name@abc"


def test_an_endless_interval_is_null_in_the_record_and_open_where_it_is_shown(results):
    assert "Inconclusive" in str(put(estimate=Estimate(0.8, -math.inf, math.inf, 1)))
    text = (results / "tiny-gpt2" / "fact-search.json").read_text()
    told = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (told["low"], told["high"], told["verdict"]) == (None, None, "inconclusive")
    assert effect(read_records(results)[0]) == "0.80 [?, ?]"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda told: json.dumps(told | {"verdict": "proved"}),
        lambda told: json.dumps(told | {"claim": "no-such-claim"}),
        lambda told: json.dumps({name: value for name, value in told.items() if name != "low"}),
        lambda told: json.dumps({name: value for name, value in told.items() if name != "model"}),
        lambda told: json.dumps([told]),
        lambda told: json.dumps(told)[:-5],
        lambda told: "",
    ],
    ids=["verdict", "claim", "no-low", "no-model", "list", "cut", "empty"],
)
def test_a_spoiled_record_is_named(spoil, results):
    put()
    path = results / "tiny-gpt2" / "fact-search.json"
    path.write_text(spoil(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is not a record of a declared claim.*make notebooks"):
        read_records(results)


def test_a_record_in_the_place_of_another_is_named(results):
    put()
    shutil.copytree(results / "tiny-gpt2", results / "other")
    with pytest.raises(ValueError, match="its place is tiny-gpt2/fact-search.json"):
        read_records(results)


# Date and checksum


def test_the_date_is_the_day_of_the_record_whatever_the_epoch_of_the_build(results, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1714694400")
    before = datetime.now(UTC).date().isoformat()
    put()
    assert read_records(results)[0]["date"] in (before, datetime.now(UTC).date().isoformat())


def test_new_records_take_the_dates_of_earlier_ones_that_say_the_same(results, tmp_path, monkeypatch):
    on(monkeypatch, "2026-01-01")
    for claim in ("fact-search", "fact-owner", "equally-few"):
        put(claim)
    earlier = tmp_path / "earlier"
    results.rename(earlier)
    on(monkeypatch, "2026-02-02")
    put("fact-search")
    put("fact-owner", CLEAR._replace(n=41))
    put("same-blocks")
    keep_dates(results, earlier)
    dates = {told["claim"]: told["date"] for told in read_records(results)}
    assert dates == {"fact-search": "2026-01-01", "fact-owner": "2026-02-02", "same-blocks": "2026-02-02"}
    assert not any(map(stale, read_records(results)))


@given(told=st.dictionaries(st.text(), values, min_size=1, max_size=8), data=st.data())
def test_any_change_of_one_field_breaks_the_checksum_and_nothing_else_does(told, data):
    told.pop("checksum", None)
    told["checksum"] = checksum(told)
    stored = json.dumps(told, indent=1, ensure_ascii=False)
    assert checksum(json.loads(stored)) == checksum(dict(reversed(told.items()))) == told["checksum"]
    name = data.draw(st.sampled_from([name for name in told if name != "checksum"]) | st.text())
    if name == "checksum":
        return
    changed = {key: value for key, value in told.items() if key != name}
    if name not in told or data.draw(st.booleans(), label="replace rather than remove"):
        value = data.draw(values)
        if name in told and json.dumps(value, sort_keys=True) == json.dumps(told[name], sort_keys=True):
            return
        changed[name] = value
    assert checksum(changed) != told["checksum"]


def test_records_go_to_the_book_that_the_notebook_is_in(tmp_path, monkeypatch):
    monkeypatch.delenv("KNCORE_RESULTS")
    (tmp_path / "book" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "book" / "notebooks")
    assert results_folder() == tmp_path / "book" / "notebooks" / "results"
    (tmp_path / "book" / "_toc.yml").touch()
    assert results_folder() == tmp_path / "book" / "results"
    monkeypatch.setenv("KNCORE_RESULTS", str(tmp_path / "elsewhere"))
    assert results_folder() == tmp_path / "elsewhere"
