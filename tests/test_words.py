"""Nouns, plain prose, and the counts of words and pairs of words."""

from __future__ import annotations

import re
from collections import Counter
from math import isclose, log2, log10

import pytest
import transformers
import wordsegment
from hypothesis import given
from hypothesis import strategies as st

from kncore import models, tasks
from kncore.grammar import lexicon, plural
from kncore.words import Counts, counts, next_words, nouns, passages

WEB = counts()


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


def test_an_unknown_kind_of_noun_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown kind of noun 'iregular'.*Did you mean 'irregular'"):
        nouns("iregular")


@pytest.mark.model
def test_many_nouns_are_one_token_of_the_default_model_in_both_numbers():
    entry = models.REGISTRY[models.DEFAULT]
    folder = models.cache_folder() / "models" / f"{models.DEFAULT}-{entry.sha256[:16]}"
    if not folder.is_dir():
        pytest.skip("the default model is not in the cache; `make install` puts it there")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    whole = [n for n in nouns("regular") if all(len(tokenizer.encode(" " + form)) == 1 for form in n[:2])]
    paired = [n for n in whole if WEB.pair_count("these", n.plural) and WEB.pair_count("this", n.singular)]
    assert len(whole) >= 250 and len(paired) >= 80


# --------------------------------------------------------------------------------------------- passages


def test_passages_are_100_distinct_ones_of_25_to_45_words_in_ascii():
    assert len(passages()) == len(set(passages())) == 100
    for passage in passages():
        assert passage.isascii() and passage == " ".join(passage.split()) and passage[-1] in '."?'
        assert 25 <= len(passage.split()) <= 45, passage


def test_no_sentence_of_the_passages_shares_six_words_in_a_row_with_another():
    runs = Counter()
    for passage in passages():
        for sentence in re.split(r"[.?]", passage):
            words = re.findall(r"[\w'-]+", sentence.lower())
            runs.update({tuple(words[i : i + 6]) for i in range(len(words) - 5)})
    assert len(runs) > 1000 and max(runs.values()) == 1


def test_passages_name_no_subject_and_no_proper_object_of_a_fact():
    text = " ".join(passages())
    pairs = [pair for relation in tasks.relations() for pair in tasks.describe(relation).pairs]
    names = {name for pair in pairs for name in pair if name[0].isupper()}
    assert len(names) > 300
    assert [name for name in names if re.search(rf"\b{re.escape(name)}\b", text)] == []


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


# ----------------------------------------------------------------------------------------------- counts


def test_counts_of_a_small_folder_are_those_of_the_hand(tmp_path):
    (tmp_path / "a.txt").write_text("The cat sat. The CAT\nran!\n\nFast it isn\u2019t.", encoding="utf-8")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "b.txt").write_text("\ufeffA dog, the 'cat' sat", encoding="utf-8")
    (tmp_path / "c.md").write_text("cat cat cat")
    corpus = counts(tmp_path)
    assert corpus.unigrams == {"the": 3, "cat": 3, "sat": 2, "ran": 1, "fast": 1, "it": 1, "isn't": 1, "a": 1, "dog": 1}
    one = {"cat ran": 1, "fast it": 1, "it isn't": 1, "a dog": 1}
    assert corpus.pairs == {"the cat": 3, "cat sat": 2, **one}
    assert (corpus.total, corpus.floor) == (14, 1)
    assert isclose(corpus.frequency("Cat"), log10(3 / 14 * 1e9))
    assert isclose(corpus.association("The", "cat"), log2((3 / 14) / ((3 / 14) * (3 / 14))))
    assert isclose(corpus.association("cat", "ran"), log2(14 / 3))
    assert corpus.pair_count("the", "cat") == 3
    assert corpus.pair_count("sat", "the") is corpus.association("sat", "the") is corpus.frequency("gazebo") is None


@given(st.lists(st.sampled_from(["this", "these", "book", "books"]), min_size=2, max_size=60))
def test_association_is_the_log_ratio_of_observed_to_expected_pairs(words):
    pairs = list(zip(words, words[1:], strict=False))
    corpus = Counts(Counter(words), Counter(map(" ".join, pairs)), len(words), 1)
    for first, second in pairs:
        expected = words.count(first) * words.count(second) / len(words)
        assert isclose(corpus.association(first, second), log2(pairs.count((first, second)) / expected), abs_tol=1e-12)


def test_a_folder_without_words_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .txt file in .*; name a folder"):
        counts(tmp_path)
    (tmp_path / "empty.txt").write_text(" ...\n")
    with pytest.raises(ValueError, match="hold no word"):
        counts(str(tmp_path))
    (tmp_path / "old.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match="old.txt is not UTF-8 text"):
        counts(tmp_path)


def test_the_web_table_orders_words_as_everyone_would():
    assert WEB.frequency("the") > WEB.frequency("book") > WEB.frequency("gazebo") > 1
    assert 7 < WEB.frequency("THE") < 7.5
    assert WEB.frequency("blicket") is None
    assert WEB.association("these", "books") > 0 > WEB.association("book", "the")
    assert WEB.association("this", "book") > WEB.association("the", "book")
    assert counts() is WEB is counts("")
    assert len(repr(WEB)) < 100


def test_the_web_table_is_that_of_wordsegment_with_spellings_added_up():
    theirs = wordsegment.Segmenter()
    theirs.load()
    assert WEB.unigrams == theirs.unigrams and WEB.total == theirs.total
    assert WEB.pairs.keys() == theirs.bigrams.keys()
    assert all(WEB.pairs[pair] >= count for pair, count in theirs.bigrams.items())
    assert WEB.pair_count("these", "books") == 211_584 + 796_141  # "These books" and "these books"
    assert WEB.pair_count("united", "states") < 0.01 * WEB.unigrams["united"]  # no second word with a capital
    assert min(WEB.pairs.values()) == WEB.floor == 100_000
    assert WEB.pair_count("these", "gazebos") is WEB.association("these", "gazebos") is None
