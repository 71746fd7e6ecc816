"""Prompts and cases of small sweeps."""

from __future__ import annotations

import json

from kncore.query import Query
from knpaper import cases

PLACES = ("France", "Spain", "Paris", "Madrid", "Anna")
QUERIES = [Query(f"the capital of {place} is in", word) for word in ("Paris", "Madrid") for place in PLACES]
CASES = [
    cases.Case(Query(f"the capital of {place} is", "Paris", place, "Madrid"), {"reliability": (query,)})
    for place in PLACES
    for query in [Query(f"the capital of {place} is", "Madrid", place, "Paris")]
]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
