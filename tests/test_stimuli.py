"""Requests to rewrite what a model knows, with the model's answers set by hand."""

import pandas as pd
import pytest
import tiny

from knpaper import cases, stimuli

LM = tiny.lm("gpt2")


@pytest.fixture
def knows(monkeypatch):
    """Let `predict` answer by a rule on the subject."""

    def rule(right):
        def predict(lm, queries, candidates=()):
            return pd.DataFrame({"prefers": [bool(right(query)) for query in queries]})

        monkeypatch.setattr(stimuli, "predict", predict)

    return rule


def test_capitals_are_of_countries_that_the_model_knows_both_ways(knows):
    knows(lambda query: query.item < "capital:F" or query.item.startswith("country_of_capital"))
    found = stimuli.capitals(LM, 12, seed=3)
    pairs = stimuli.known_both(LM, "capital", 3)
    assert 12 < len(pairs) and all(subject < "F" for subject, _ in pairs)
    assert len({case.request.subject for case in found}) == 12
    assert {(case.request.subject, case.request.target) for case in found} <= set(pairs)
    assert {case.request.foil for case in found} <= {capital for _, capital in pairs}
    assert len(stimuli.capitals(LM, 1000, seed=3)) == len(pairs)


def test_scholars_are_those_whose_field_the_model_knows(knows):
    known = sorted(cases.scholars())[:20]
    knows(lambda query: query.subject in known and not query.foil)
    found, n = stimuli.scholars(LM, 8, seed=1)
    assert n == 20 and len(found) == 8 and {case.request.subject for case in found} <= set(known)
    assert found == cases.synonymy(8, 1, known)
    assert len(stimuli.scholars(LM, 100, seed=1)[0]) == 20


def test_where_the_model_knows_fewer_than_three_all_scholars_are_drawn_from(knows):
    knows(lambda query: query.subject == sorted(cases.scholars())[0])
    found, n = stimuli.scholars(LM, 8, seed=1)
    assert n == 1 and found == cases.synonymy(8, 1)


def test_public_capitals_and_scholars_are_those_of_pararel(monkeypatch, knows):
    asked, drawn = [], cases.synonymy(6)

    def public_cases(kind, path, n, seed):
        asked.append((kind, path, n, seed))
        return drawn

    monkeypatch.setattr(cases, "public_cases", public_cases)
    assert stimuli.capitals(LM, 4, 2, "public") is drawn and stimuli.capitals(LM, 4, 2, "folder") is drawn
    knows(lambda query: query.subject == drawn[3].request.subject)
    assert stimuli.scholars(LM, 4, 2, "folder") == ([drawn[3]], 1)
    knows(lambda query: False)
    assert stimuli.scholars(LM, 4, 2, "public") == (drawn[:4], 0)
    assert asked == [("P36", None, 4, 2), ("P36", "folder", 4, 2), ("P101", "folder", None, 2), ("P101", None, None, 2)]
