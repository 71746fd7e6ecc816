"""Nouns, plain prose, and the counts of words and pairs of words."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from kncore import zoo
from kncore.prose import passages
from knpaper import words
from knpaper.frequencies import counts
from knpaper.grammar import lexicon, plural
from knpaper.words import next_words

WEB = counts()


def nouns(*kinds: str) -> list[words.Noun]:
    return [noun for noun in words.nouns() if not kinds or noun.kind in kinds]


# ----------------------------------------------------------------------------------------------- nouns


def test_every_form_of_every_noun_is_one_lower_case_word_that_stands_there_once():
    forms = Counter(form for noun in nouns() for form in noun[:2])
    assert max(forms.values()) == 1
    assert all(re.fullmatch("[a-z]{2,}", form) for form in forms)
    assert [noun.singular for noun in nouns()] == sorted(noun.singular for noun in nouns())


def test_there_are_enough_nouns_of_every_kind_and_real_ones_of_every_class():
    assert Counter(noun.kind for noun in nouns()).keys() == {"regular", "irregular", "invented"}
    for kind, least in {"regular": 600, "irregular": 60, "invented": 60}.items():
        assert len(nouns(kind)) >= least
    classes = Counter(noun.noun_class for noun in nouns("regular"))
    assert classes.keys() == {"person", "animal", "thing", "place", "abstract"} and min(classes.values()) >= 80
    assert {noun.noun_class for noun in nouns("invented")} == {"thing"}


def test_plurals_follow_the_spelling_rules_but_for_the_irregular_ones():
    for noun in nouns("regular") + nouns("invented"):
        assert noun.plural == plural(noun.singular)
    for noun in nouns("irregular"):
        word = noun.singular
        assert noun.plural == lexicon()["irregular"].get(word, noun.plural)
        assert noun.plural not in {word, word + "s", word + "es", re.sub("y$", "ies", word)}
    endings = Counter(noun.plural.removeprefix(noun.singular) for noun in nouns("invented"))
    assert endings["s"] > endings["es"] > 5
    assert sum(noun.plural.endswith("ies") for noun in nouns("invented")) > 5


def test_invented_nouns_are_in_no_table_of_words_and_real_ones_are():
    known = set(WEB.unigrams)
    for noun in nouns():
        assert known.isdisjoint(noun[:2]) if noun.kind == "invented" else known.issuperset(noun[:2]), noun
    for kind in ("regular", "irregular"):
        frequencies = [WEB.frequency(noun.singular) for noun in nouns(kind)]
        assert max(frequencies) - min(frequencies) > 3


@pytest.mark.model
def test_many_nouns_are_one_token_of_the_default_model_in_both_numbers():
    entry = zoo.REGISTRY[zoo.DEFAULT]
    folder = zoo.cache_folder() / "models" / f"{zoo.DEFAULT}-{entry.sha256[:16]}"
    if not folder.is_dir():
        pytest.skip("the default model is not in the cache; `make install` puts it there")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    whole = [n for n in nouns("regular") if all(len(tokenizer.encode(" " + form)) == 1 for form in n[:2])]
    paired = [n for n in whole if WEB.pair_count("these", n.plural) and WEB.pair_count("this", n.singular)]
    assert len(whole) >= 250 and len(paired) >= 80


@given(st.integers(1, 100), st.integers(0, 2**32))
def test_next_words_are_words_of_letters_after_the_first_five_of_distinct_passages(n, seed):
    queries = next_words(n, seed)
    assert queries == next_words(n, seed)
    assert len(queries) == n == len({query.item for query in queries})
    for query in queries:
        passage = passages()[int(query.item.removeprefix("text:"))]
        before, after = passage[: len(query.prompt)], passage[len(query.prompt) :]
        assert before == query.prompt and not before.endswith(" ")
        assert after.startswith(f" {query.target}") and after[len(query.target) + 1] in " "
        assert re.fullmatch("[A-Za-z]+", query.target) and len(query.prompt.split()) >= 5
        assert (query.task, query.subject, query.foil, query.masked) == ("text", "", "", False)


def test_another_seed_draws_other_words():
    assert next_words(100) == next_words(100, seed=0)
    drawn = [{(query.item, query.prompt) for query in next_words(100, seed)} for seed in range(2)]
    assert len(drawn[0] & drawn[1]) < 20
    places = {len(query.prompt.split()) for seed in range(20) for query in next_words(100, seed)}
    assert places >= set(range(5, 35))


@pytest.mark.parametrize("n", [0, -1, 101])
def test_more_passages_than_there_are_is_an_error_that_says_how_many(n):
    with pytest.raises(ValueError, match=f"n={n} passages asked for; there are 100"):
        next_words(n)
