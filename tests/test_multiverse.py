"""The multiverse: what is judged, in scores made by hand; what is kept; how it is counted and drawn."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from knbook import pages
from knpaper import multiverse, specifications
from knpaper.rules import CLAIMS
from knpaper.stats import Estimate
from knpaper.stimuli import Selection

CLAIM = CLAIMS["fact-search"]


def made(facts=6, conditions=8, m=15):
    """Scores of one relation in which each fact has two neurons of its own, and of conditions that have two each."""
    scores = torch.zeros(facts * 5 + conditions * m, 2, 64)
    for prompt in range(facts * 5):
        scores[prompt, 1, 2 * (prompt // 5) : 2 * (prompt // 5) + 2] = 1.0
    for prompt in range(conditions * m):
        own = 20 + 2 * (prompt // m)
        scores[facts * 5 + prompt, 1, own : own + 2] = 1.0
    relations = {"r": Selection([None] * (facts * 5), facts, facts)}
    pairs = {("p", str(c)): Selection([None] * (2 * m), 2 * m, 2 * m) for c in range(conditions)}
    return SimpleNamespace(scores=scores, relations=relations, pairs=pairs, m=m, seed=0)


def test_what_is_owed_to_one_fact_and_one_condition_is_found(monkeypatch):
    monkeypatch.setattr(multiverse, "_suppressed", lambda *_: {})
    found = list(multiverse.estimates(made()))
    assert len(found) == 2 * 2 * (1 + 3 * 3)
    for specification, estimates in found:
        # A mixed group of five facts shares no neuron: its search ends at a low p, and fails.
        for claim in {"fact-search", "grammar-search"} & estimates.keys():
            assert estimates[claim].value == 1.0, specification
        if "follows-the-fact" in estimates:
            # One fact: all vectors alike, 1. Five facts in one template: at right angles, 0.
            assert estimates["follows-the-fact"].value == pytest.approx(1)
            assert estimates["as-similar"].value == pytest.approx(-1)
            assert estimates["follows-the-fact"].n == 1
    counts = [estimates["grammar-search"].n for _, estimates in found if "grammar-search" in estimates]
    assert set(counts) == {8}


def test_a_run_goes_on_where_it_was_and_drops_rows_of_other_code(tmp_path, monkeypatch):
    studied = []
    monkeypatch.setattr(multiverse, "study", lambda **universe: studied.append(universe) or universe)
    some = [({"blocks": "all", "templates": 5}, {CLAIM.id: Estimate(0.5, 0.4, 0.6, 40)})]
    monkeypatch.setattr(multiverse, "estimates", lambda given: iter(some))
    monkeypatch.setattr(multiverse.fingerprint, "code", lambda *_: "one")
    path, universes = tmp_path / "m.tsv", multiverse.UNIVERSES[:3]
    multiverse.run(path, universes[:2])
    rows = multiverse.run(path, universes)
    assert studied == universes and len(rows) == 3 and set(rows.verdict) == {"supported"}
    assert len(specifications.read(path)) == 3
    monkeypatch.setattr(multiverse.fingerprint, "code", lambda *_: "another")
    assert len(multiverse.run(path, universes[:1])) == 1 and len(studied) == 4


def rows(verdicts):
    """Rows of one claim on one model: the book's choices first, then others that differ in the threshold."""
    book = {"claim": CLAIM.id, "model": "m", **specifications.BOOK}
    return pd.DataFrame(
        [
            {**book, "threshold": (0.2, 0.1, 0.3)[i], "verdict": verdict, "value": i, "low": i - 1, "high": i + 1}
            | {"units": 9}
            for i, verdict in enumerate(verdicts)
        ]
    )


def test_agreement_counts_verdicts_and_names_the_choice_on_which_they_turn():
    (found,) = specifications.agreement(rows(["supported", "contradicted", "inconclusive"]))
    assert {name: found[name] for name in ("verdict", "agree", "all", "opposite")} == {
        "verdict": "supported",
        "agree": 1,
        "all": 3,
        "opposite": 1,
    }
    assert (found["turns"], found["share"]) == ("threshold: 0.1", 0)
    assert specifications.agreement(rows(["supported"]).assign(threshold=0.3)) == []


def test_a_curve_has_its_specifications_by_value_and_its_choices_below():
    found = specifications.curve(rows(["supported", "contradicted", "inconclusive"])[::-1], CLAIM)
    assert list(found["points"]) == ["supported", "contradicted", "inconclusive"] and found["number"] == 3
    dots = [re.fullmatch(r"M([\d.]+) ([\d.]+)h0", path).groups() for path in found["points"].values()]
    xs, ys = np.array(dots, float).T
    assert np.allclose(np.diff(xs), 24) and xs[0] == specifications.LEFT + 12
    # From −1, the lowest end, to 3, the highest: 134 pixels from the eighth one down.
    assert np.allclose(ys, [8 + 134 * (3 - value) / 4 for value in (0, 1, 2)], atol=0.06)
    assert [words for words, *_ in found["choices"]] == ["threshold: 0.2", "threshold: 0.1", "threshold: 0.3"]
    lines = [re.fullmatch(r"M(\d) (\d+)h1", path).groups() for *_, path in found["choices"]]
    assert [int(first) for first, _ in lines] == [0, 1, 2]
    assert np.allclose(np.diff([int(y) for _, y in lines]), specifications.ROW)


def test_specifications_of_one_choice_that_follow_each_other_are_one_line():
    five = pd.concat([rows(["supported"])] * 5, ignore_index=True)
    five["value"], five["seed"] = range(5), [0, 0, 1, 0, 0]
    lines = {words: path for words, _, path in specifications.curve(five, CLAIM)["choices"]}
    y = specifications.PLOT + specifications.ROW - 4
    assert lines == {"seed: 0": f"M0 {y}h2M3 {y}h2", "seed: 1": f"M2 {y + specifications.ROW}h1"}


def test_the_page_shows_counts_and_curves_and_says_where_there_are_none(tmp_path):
    book = SimpleNamespace(root=tmp_path, page=lambda chapter: "", records={(CLAIM.id, "m"): {"void": True}})
    assert "Not run" in pages.table("multiverse", book)
    (tmp_path / "results").mkdir()
    rows(["supported", "contradicted"]).to_csv(tmp_path / "results" / "multiverse.tsv", sep="\t", index=False)
    shown = pages.table("multiverse", book)
    assert (
        "supported</span>, void" in shown
        and "1 of 2 (50 %)" in shown
        and len(re.findall(r"M[\d.]+ [\d.]+h0", shown)) == 2
    )
