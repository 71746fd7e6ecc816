"""Nouns over the whole range of frequency, and words of plain prose to predict, both written for this project."""

import random
from functools import cache
from typing import NamedTuple

from kncore import checks
from kncore.prose import passages
from kncore.query import Query
from knpaper import resources, tasks


class Noun(NamedTuple):
    """A countable noun. `kind`: regular, irregular or invented (no English word; plural by the regular spelling
    rules); `noun_class`: person, animal, thing, place or abstract. Invented nouns are things."""

    singular: str
    plural: str
    kind: str
    noun_class: str


@cache
def nouns() -> tuple[Noun, ...]:
    """Return the nouns in the order of the alphabet."""
    return tuple(Noun(*line.split("\t")) for line in resources.text("nouns.tsv").splitlines()[1:])


def next_words(n: int, seed: int = 0) -> list[Query]:
    """`n` passages (1 to 100), each cut before a word drawn from `seed` (from 0 on), which is to be predicted.

    The word is of letters only and the sixth or a later one of its passage. Raises ValueError for another n.
    """
    texts = passages()
    n, seed = checks.whole(n, "n"), checks.whole(seed, "seed", 0)
    tasks.first(texts, n, "passages")
    rng = random.Random(seed)
    queries = []
    for number in rng.sample(range(len(texts)), n):
        parts = texts[number].split(" ")
        at = rng.choice([i for i, word in enumerate(parts) if i >= 5 and word.isalpha()])
        queries.append(Query(" ".join(parts[:at]), parts[at], task="text", item=f"text:{number}"))
    return queries
