"""Requests to rewrite what a model knows, with the model's answers set by hand."""

from dataclasses import replace

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
    assert found == cases.moved(stimuli.occupations(LM, 1), 8, 1, known)
    assert len(stimuli.scholars(LM, 100, seed=1)[0]) == 20


def test_where_the_model_knows_fewer_than_three_all_scholars_are_drawn_from(knows):
    knows(lambda query: query.subject == sorted(cases.scholars())[0])
    found, n = stimuli.scholars(LM, 8, seed=1)
    assert n == 1 and found == cases.moved(stimuli.occupations(LM, 1), 8, 1)


def test_public_capitals_and_scholars_are_those_of_pararel(monkeypatch, knows):
    asked, drawn = [], cases.bijective(n=3)

    def public_cases(kind, path, n, seed):
        asked.append((kind, path, n, seed))
        return drawn

    monkeypatch.setattr(cases, "public_cases", public_cases)
    assert stimuli.capitals(LM, 4, 2, "public") is drawn and stimuli.capitals(LM, 4, 2, "folder") is drawn
    assert stimuli.rewrites(LM, 4, 2, "folder") is drawn and asked.pop() == ("counterfact", "folder", 4, 2)
    assert asked == [("P36", None, 4, 2), ("P36", "folder", 4, 2)]
    persons = replace(cases.work(), pairs=cases.work().pairs[:20])
    monkeypatch.setattr(cases, "work", lambda public, path: {(True, "folder"): persons}[public, path])
    names = [name for name, _ in persons.pairs]
    knows(lambda query: query.subject in names[3:9])
    found, n = stimuli.scholars(LM, 4, 2, "folder")
    assert n == 6 and found == cases.moved(stimuli.occupations(LM, 2), 4, 2, names[3:9], persons)
    knows(lambda query: False)
    found, n = stimuli.scholars(LM, 4, 2, "folder")
    assert n == 0 and found == cases.moved(stimuli.occupations(LM, 2), 4, 2, None, persons)


class Spelling:
    """A tokenizer of letters; what is not in its alphabet is unknown."""

    unk_token_id = 0

    def __init__(self, alphabet: str):
        self.alphabet = alphabet

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [self.alphabet.find(letter) + 1 for letter in text]}


def test_who_can_write_all_words_is_asked_for_those_that_do_not_look_alike():
    letters = "abcdefghijklmnopqrstuvwxyz"
    assert stimuli.occupations(replace(LM, tokenizer=Spelling(letters))) == cases.unlike()
    assert stimuli.occupations(replace(LM, tokenizer=Spelling(letters[:-5]))) != cases.unlike()


def test_where_words_are_whole_every_field_is_asked_with_the_occupation_of_another():
    rows, usual = stimuli.occupations(LM, 3), {field: names[0] for field, names in cases.synonyms().items()}
    assert {field: right for field, right, _ in rows} == usual
    assert sorted(decoy for *_, decoy in rows) == sorted(usual.values())
    assert all(right != decoy for _, right, decoy in rows)
    assert rows == stimuli.occupations(LM, 3) and dict.fromkeys(rows) != dict.fromkeys(stimuli.occupations(LM, 4))


def test_free_capitals_are_cities_that_the_model_can_write():
    drawn = cases.bijective(n=6)
    assert stimuli.free_capitals(LM, drawn) == []  # a vocabulary without any of them
    lm = replace(LM, tokenizer=Spelling("ABCDEFGHIJKLMNOPQRSTUVWXY abcdefghijklmnopqrstuvwxyz"))
    found = stimuli.free_capitals(lm, drawn, 5)
    assert found == cases.elsewhere(drawn, {k: v for k, v in cases.cities().items() if k != "Zurich"}, 5)
    assert len(found) == 6
