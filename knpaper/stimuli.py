"""What the chapters ask: facts and minimal pairs that a model knows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from kncore import checks
from kncore.models import LM
from kncore.predictions import predict
from kncore.query import Query
from knpaper import cases, grammar, tasks
from knpaper.cases import Case
from knpaper.datasets import blimp, files, pararel

TEMPLATES = 5  # of each fact
TRIES = 150  # facts or sentences asked before unknown ones fill up the number
RELATIONS = {
    "own": ("capital", "country_of_capital", "official_language", "native_language", "field_of_work", "occupation"),
    "public": (  # of ParaRel: those with five patterns that end in [MASK]
        *("P36", "P1376", "P101", "P106", "P19", "P176", "P138", "P159", "P178", "P20", "P264", "P27", "P39", "P449"),
        *("P47", "P495", "P740", "P937"),
    ),
}
PARADIGMS = (  # of BLiMP: those in which what stands before the word decides on it, as a causal model needs it
    "determiner_noun_agreement_1",
    "determiner_noun_agreement_with_adjective_1",
    "determiner_noun_agreement_irregular_1",
    "regular_plural_subject_verb_agreement_1",
    "irregular_plural_subject_verb_agreement_1",
    "distractor_agreement_relational_noun",
    "anaphor_number_agreement",
    "anaphor_gender_agreement",
)


def relations(source: str = "own") -> list[str]:
    """Return the relations that the chapters ask about: of the project's own facts, or those of ParaRel that the source
    holds; of what is fetched, all."""
    names = RELATIONS["own" if source == "own" else "public"]
    held = names if source in ("own", "public") else pararel.relations(source)
    return [name for name in names if name in held]


def phenomena(source: str = "own") -> list[str]:
    """Return the phenomena that the chapters ask about: of the project's own grammars, or the paradigms of BLiMP that
    the source holds; of what is fetched, all."""
    if source in ("own", "public"):
        return grammar.phenomena() if source == "own" else list(PARADIGMS)
    return [name for name in PARADIGMS if files.holds(files.source("blimp", name), source)]


class Selection(NamedTuple):
    """Queries to ask a model, item after item: how many items were tried, and how many of those here it knows.

    `candidates` are the objects of the relation, all that a fact's answer competes with.
    """

    queries: list[Query]
    tried: int
    known: int
    candidates: Sequence[str] = ()


def known_facts(lm: LM, relation: str, n: int, seed: int = 0, source: str = "own") -> Selection:
    """Return the first `n` facts (in the order of `seed`) that the model knows, each in five templates.

    A fact is known if in at least half of its templates the model prefers the object to every other object of the
    relation. After 150 tries, or at the end of the data, unknown facts fill up the number, and `known` is below `n`.
    `source` is "own", "public" (ParaRel, fetched) or a folder with the public data sets. Raises ValueError for an
    unknown relation, an `n` below 1, and a model whose probabilities are not numbers.
    """
    n = checks.whole(n, "n", 1)
    if source == "own":
        queries, candidates = tasks.facts(relation, seed=seed), tasks.candidates(relation)
    else:
        queries = pararel.read(relation, _path(source), form="masked" if lm.spec.masked else "causal")
        candidates = sorted({query.target for query in queries})

    def known(facts: Sequence[Sequence[Query]]) -> list[bool]:
        prefers = predict(lm, [query for fact in facts for query in fact], candidates)["prefers"].to_numpy()
        return prefers.reshape(len(facts), -1).mean(1) >= 0.5

    kept, *counts = _sort(_by_item(queries, None if source == "own" else seed), known, n, 10)
    return Selection([query for fact in kept for query in fact], *counts, candidates)


def _path(source: str) -> str | None:
    """Return the folder of public data that a source names; None where they are fetched."""
    return None if source == "public" else source


def _sort(items: Sequence, known: Callable[[Sequence], Iterable[bool]], n: int, step: int) -> tuple[list, int, int]:
    """Return the first `n` items that are known, filled up with others, how many were tried, and how many known."""
    right, wrong = [], []
    for i in range(0, min(len(items), TRIES), step):
        some = items[i : min(i + step, TRIES)]
        for item, is_known in zip(some, known(some), strict=True):
            if len(right) < n:
                (right if is_known else wrong).append(item)
        if len(right) == n:
            break
    return (right + wrong)[:n], len(right) + len(wrong), len(right)


def _known_items(lm: LM, relation: str, seed: int) -> set[str]:
    """Return the items of all facts of a relation (of the project's own) that the model knows."""
    found = known_facts(lm, relation, len(tasks.describe(relation).pairs), seed)
    return {query.item for query in found.queries[: found.known * TEMPLATES]}


def known_both(lm: LM, relation: str, seed: int = 0) -> list[tuple[str, str]]:
    """Return the facts (subject, object) of a two-way relation that the model knows from both sides.

    Where it knows fewer than three, all facts that can be asked from both sides. Raises ValueError for an unknown
    relation or one without an inverse.
    """
    there = tasks.describe(relation)
    back = dict(tasks.describe(there.inverse).pairs)
    pairs = [(subject, target) for subject, target in there.pairs if back.get(target) == subject]
    known = _known_items(lm, relation, seed) | _known_items(lm, there.inverse, seed)
    both = [pair for pair in pairs if {f"{relation}:{pair[0]}", f"{there.inverse}:{pair[1]}"} <= known]
    return both if len(both) > 2 else pairs


def capitals(lm: LM, n: int, seed: int = 0, source: str = "own") -> list[Case]:
    """Return at most `n` requests to rewrite a capital, of countries and with capitals that the model knows both ways.

    From ParaRel (`source` as in `known_facts`) they are `n`, and what the model knows is not asked.
    """
    if source != "own":
        return cases.public_cases("P36", _path(source), n, seed)
    pairs = known_both(lm, "capital", seed)
    subjects, objects = map(list, zip(*pairs, strict=True))
    return cases.bijective("capital", min(n, len(pairs)), seed, subjects, objects)


def rewrites(lm: LM, n: int, seed: int = 0, source: str = "own") -> list[Case]:
    """Return at most `n` facts to rewrite: capitals (see `capitals`), or cases of CounterFact from public data.

    What the model knows of CounterFact is not asked.
    """
    if source == "own":
        return capitals(lm, n, seed)
    return cases.public_cases("counterfact", _path(source), n, seed)


def scholars(lm: LM, n: int, seed: int = 0, source: str = "own") -> tuple[list[Case], int]:
    """Return at most `n` requests to rewrite a scholar's field of work, and how many scholars' fields the model knows.

    They are of scholars that it knows; of all where it knows fewer than three. The new fields are those of
    `occupations`.
    """
    relation = cases.work(source != "own", _path(source))
    everyone = cases.synonymy(seed=seed, known=relation)
    right = predict(lm, [replace(case.request, foil="") for case in everyone], sorted(cases.synonyms()))["prefers"]
    names = [case.request.item.partition(":")[2] for case in everyone]
    known = [name for name, prefers in zip(names, right, strict=True) if prefers]
    subjects = known if len(known) > 2 else names
    return cases.moved(occupations(lm, seed), min(n, len(subjects)), seed, subjects, relation), len(known)


def occupations(lm: LM, seed: int = 0) -> list[tuple[str, str, str]]:
    """Return fields, what a worker in each is called, and a decoy: `cases.unlike`, if the model can write the words.

    One that cannot has a vocabulary of whole words, in which no two are spelt alike. It is asked for all fields of
    `cases.synonyms`; the decoy is then the occupation of another field, drawn from `seed`.
    """
    rows = cases.unlike()
    if all(_writes(lm, word) for row in rows for word in row):
        return rows
    usual = [(field, names[0]) for field, names in cases.synonyms().items()]
    random.Random(f"decoys {seed}").shuffle(usual)
    return [(field, word, usual[i - 1][1]) for i, (field, word) in enumerate(usual)]


def free_capitals(lm: LM, drawn: Sequence[Case], seed: int = 0) -> list[Case]:
    """Return the requests of `capitals` with a city that is no capital as the new one, if the model can write it."""
    cities = {city: country for city, country in cases.cities().items() if _writes(lm, f"{city} {country}")}
    return cases.elsewhere(drawn, cities, seed)


def _writes(lm: LM, text: str) -> bool:
    """Return whether a model has tokens for a text."""
    return lm.tokenizer.unk_token_id not in lm.tokenizer(text, add_special_tokens=False)["input_ids"]


def _by_item(queries: Sequence[Query], seed: int | None) -> list[list[Query]]:
    """Return the queries of each item with one answer in its first five templates; shuffled if there is a seed."""
    items: dict[str, dict[str, Query]] = {}
    several = set()
    for query in queries:
        before = items.setdefault(query.item, {}).setdefault(query.template, query)
        if before.target != query.target:
            several.add(query.item)
    whole = [
        list(by_template.values())[:TEMPLATES]
        for item, by_template in items.items()
        if item not in several and len(by_template) >= TEMPLATES
    ]
    if seed is not None:
        random.Random(seed).shuffle(whole)
    return whole


def known_pairs(lm: LM, phenomenon: str, n: int, seed: int = 0, source: str = "own") -> dict[str, Selection]:
    """Return for each condition of a phenomenon, the first `n` minimal pairs whose good member the model prefers.

    In the causal form for causal models, in the masked form for masked ones. `seed`, `source` (here BLiMP) and the
    filling up after 150 tries as in `known_facts`. Raises ValueError for an unknown phenomenon, an `n` below 1, and a
    model whose probabilities are not numbers.
    """
    n = checks.whole(n, "n", 1)
    form = "masked" if lm.spec.masked else "causal"
    if source == "own":
        queries = grammar.minimal_pairs(phenomenon, seed=seed, form=form)
    else:
        queries = blimp.read(phenomenon, _path(source), form=form)
        random.Random(seed).shuffle(queries)
    found = {}
    for value in ("singular", "plural", "feminine", "masculine"):
        mine = [query for query in queries if query.value == value]
        if mine:
            found[value] = Selection(*_sort(mine, lambda some: predict(lm, some)["prefers"], n, 20))
    return found
