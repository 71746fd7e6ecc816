"""Verdicts by truth table, records as files, what makes a record stale, the table that README and book show."""

import json
import os
import re
from dataclasses import replace

import pytest
import tiny
from recording import ABOVE, CLEAR, LM, WITHIN, files, on, put

import kncore
from knpaper.claims import CLAIMS, Verdict
from knpaper.records import read_records
from knpaper.staleness import stale
from knpaper.stats import Estimate


def test_a_record_says_what_was_found_by_what_rule_on_what(results):
    verdict = put(n=12, quadrature="gauss")
    assert verdict == Verdict(CLAIMS["fact-search"], CLEAR, "tiny-gpt2")
    assert files(results) == ["tiny-gpt2/fact-search.json"]
    told = json.loads((results / "tiny-gpt2" / "fact-search.json").read_text(encoding="utf-8"))
    claim = CLAIMS["fact-search"]
    want = {
        "claim": claim.id,
        "chapter": "01",
        "statement": claim.statement,
        "metric": claim.metric,
        "rule": claim.rule,
    }
    want |= {"verdict": "supported", "value": 0.8, "low": 0.6, "high": 0.9, "n": 40}
    want |= {"model": "tiny-gpt2", "revision": "seed0", "dtype": "float32", "source": "own", "seed": 0}
    want |= {"parameters": {"n": 12, "quadrature": "gauss"}}
    assert {name: told[name] for name in want} == want
    assert {"torch", "transformers", "numpy", "scipy", "kncore"} <= set(told["versions"])
    assert read_records(results) == [told]


def test_a_record_replaces_the_one_before(results):
    put()
    put(estimate=Estimate(0.1, 0.0, 0.15, 40))
    (told,) = read_records(results)
    assert (told["value"], told["verdict"]) == (0.1, "contradicted")


@pytest.mark.parametrize("before", [False, True])
def test_a_record_that_cannot_be_written_leaves_what_was_there(before, results, monkeypatch):
    if before:
        put()

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        put(estimate=Estimate(0.1, 0.0, 0.2, 40))
    assert files(results) == (["tiny-gpt2/fact-search.json"] if before else [])
    if before:
        assert read_records(results)[0]["value"] == 0.8


def test_parameters_that_are_no_json_leave_nothing_behind(results):
    with pytest.raises(TypeError):
        put(lm_itself=LM)
    assert files(results) == []


def test_a_rerun_that_finds_the_same_keeps_the_date_and_the_file(results, monkeypatch):
    path = results / "tiny-gpt2" / "fact-search.json"
    on(monkeypatch, "2026-01-01")
    put(n=(1, 2))
    first = path.read_bytes()
    on(monkeypatch, "2026-02-02")
    assert put(n=(1, 2)) == Verdict(CLAIMS["fact-search"], CLEAR, "tiny-gpt2")
    assert path.read_bytes() == first
    put(estimate=CLEAR._replace(value=0.81), n=(1, 2))
    assert json.loads(path.read_text())["date"] == "2026-02-02"


@pytest.mark.parametrize("edit", [{"date": "2020-01-01"}, {"value": 0.9}, {"checksum": "0" * 16}, None])
def test_a_date_set_by_hand_is_not_kept(edit, results, monkeypatch):
    on(monkeypatch, "2026-01-01")
    put()
    path = results / "tiny-gpt2" / "fact-search.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit) if edit else "spoiled")
    on(monkeypatch, "2026-02-02")
    put()
    (told,) = read_records(results)
    assert (told["date"], told["value"], stale(told)) == ("2026-02-02", 0.8, [])


@pytest.mark.kind("identity")
def test_a_model_that_was_changed_is_not_recorded(results):
    lm = tiny.lm("llama")
    with kncore.suppress(lm, [(0, 1)]), pytest.raises(ValueError, match="not as it was loaded.*end the intervention"):
        put(lm=lm)
    assert read_records(results) == []
    put(lm=lm)


# What a reader sees


def test_a_verdict_in_words_and_in_html():
    verdict = Verdict(ABOVE, CLEAR, "m1")
    assert str(verdict) == repr(verdict) == "Supported on m1: A. m: 0.80 [0.60, 0.90], n = 40"
    html = verdict._repr_html_()
    for said in ('class="verdict supported ', "A.", "0.80 [0.60, 0.90], n = 40", "lies above 0.5"):
        assert said in html
    assert 'class="verdict contradicted ' in Verdict(WITHIN, CLEAR, "m1")._repr_html_()


def test_html_of_a_verdict_says_what_it_rests_on_in_order_and_for_whom_it_speaks():
    claim = replace(
        ABOVE, unit="fact", control="c", null=0.1, expected=0.9, smallest="s", thesis="supported", fixed="abc"
    )
    html = Verdict(claim, CLEAR, "m1")._repr_html_()
    names = [
        "null",
        "unit",
        "n",
        "effect",
        "95 % interval",
        "smallest effect that matters",
        "speaks for",
        "rule chosen",
    ]
    assert re.findall("<dt>(.*?)</dt>", html) == names, "power is not known without units"
    assert "speaks for the thesis</span>" in html and 'class="verdict supported for-thesis ' in html
    assert "<dd>before its number was known, in commit abc</dd>" in html and "exploratory" not in html
    seen = Verdict(replace(claim, fixed="", exploratory="why"), CLEAR, "m1")._repr_html_()
    assert ">exploratory</span>" in seen and "<dd>exploratory: why</dd>" in seen


def test_a_check_looks_like_a_check():
    html = Verdict(replace(ABOVE, check=True, thesis="supported"), CLEAR, "m1")._repr_html_()
    assert "<strong>Check passed on m1.</strong>" in html and 'class="verdict supported check ' in html
    assert "speaks for the" not in html and "for-thesis" not in html


def test_html_of_a_verdict_escapes_what_it_shows():
    claim = replace(ABOVE, statement="<b>bold</b> & more", metric='"<i>"')
    html = Verdict(claim, CLEAR, "<script>alert(1)</script>")._repr_html_()
    assert "<script" not in html and "<b>" not in html and "<i>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "&amp; more" in html
    assert "fewer than 30 units" in html
