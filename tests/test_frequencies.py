from __future__ import annotations

from collections import Counter
from math import isclose, log2, log10

import pytest
import wordsegment
from hypothesis import given
from hypothesis import strategies as st

from knpaper.frequencies import Counts, counts

WEB = counts()

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
