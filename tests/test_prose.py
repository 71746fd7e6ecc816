from __future__ import annotations

import re
from collections import Counter

from kncore.prose import passages
from knpaper import tasks

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
