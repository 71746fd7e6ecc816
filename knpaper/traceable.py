"""Facts and sentences that can be traced, each with a partner to replace its subject."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from kncore import checks, predictions, tokens
from kncore.models import LM
from kncore.query import Query, subject_start
from kncore.tracing import frame
from knpaper import grammar, tasks

TRIES = 8  # sentences asked for each that is wanted
RELATIONS = ("capital", "official_language", "native_language", "field_of_work", "occupation", "birthplace")
# Phenomena, and what stands between the subject and the word that agrees.
PHENOMENA = {"subject_verb": " often", "subject_verb_distractor": " often", "anaphor_number": ""}


def groups(lm: LM, n: int, seed: int = 0) -> dict[str, list[tuple[Query, Query]]]:
    """Return `n` facts of every relation of chapter 6 and 2n sentences of every phenomenon, with partners, by name."""
    found = {relation: facts(lm, relation, n, seed) for relation in RELATIONS}
    return found | {name: agreement(lm, name, 2 * n, seed, then) for name, then in PHENOMENA.items()}


def facts(lm: LM, relation: str, n: int, seed: int = 0) -> list[tuple[Query, Query]]:
    """Return the first `n` facts, in the order of `seed`, that can be traced, each with a partner for its subject.

    Asked in the relation's first template that does not begin with the subject. The subject has 2 to 6 tokens, the
    model prefers the answer to every other of the relation, and the partner is another fact in the same template,
    its subject at the same tokens, its answer the foil. Fewer where the relation has no more. Raises ValueError for an
    unknown relation and an `n` below 1.
    """
    n = checks.whole(n, "n", 1)
    known = tasks.describe(relation)
    template = next(text for text in known.templates if not text.startswith("{}"))
    pool = tasks.facts(relation, seed=seed, templates=[template])
    spans = [tokens.span(lm, query) for query in pool]
    pool = [query for query, (first, last) in zip(pool, spans, strict=True) if 1 <= last - first <= 5]
    prefers = predictions.predict(lm, pool, tasks.candidates(relation))["prefers"]
    found = zip(pool, replacements(lm, pool, seed), prefers, strict=True)
    return [(replace(query, foil=other.target), other) for query, other, right in found if right and other][:n]


def agreement(lm: LM, phenomenon: str, n: int, seed: int = 0, then: str = "") -> list[tuple[Query, Query]]:
    """`n` sentences of a phenomenon that can be traced, each with its partner of the other number.

    The subject is the phrase from "the" to its noun, or for agreement of subject and verb to the end of the prompt;
    `then` is what follows the prompt before the word that agrees. The model prefers that word to its foil, and the
    partner is the other sentence of the minimal pair, its phrase at the same tokens. No lemma comes twice, and the two
    conditions take turns. Raises ValueError for an unknown phenomenon and an `n` below 1.
    """
    n = checks.whole(n, "n", 1)
    queries = [_phrase(query, then) for query in grammar.minimal_pairs(phenomenon, seed=seed)]
    pairs = [(query, queries[i ^ 1]) for i, query in enumerate(queries) if query and queries[i ^ 1]]
    tried = pairs[: TRIES * n]
    prefers = predictions.predict(lm, [query for query, _ in tried])["prefers"] if tried else []
    found: dict[str, tuple[Query, Query]] = {}
    last = ""
    for (query, partner), right in zip(tried, prefers, strict=True):
        if right and query.item not in found and query.value != last and _fit(lm, query, partner):
            found[query.item], last = (query, partner), query.value
    return list(found.values())[:n]


def _phrase(query: Query, then: str) -> Query | None:
    noun = subject_start(query)
    before, article, rest = query.prompt[:noun].rpartition("the ")
    if not article or rest or before[-1:].isalnum():
        return None
    end = len(query.prompt) if query.task.startswith("subject_verb") else noun + len(query.subject)
    phrase, prompt = query.prompt[len(before) : end], query.prompt + then
    return replace(query, prompt=prompt, subject=phrase, template=f"{before}{{}}{prompt[end:]}")


def _fit(lm: LM, query: Query, other: Query) -> bool:
    """Return whether another subject lies at the same tokens of an otherwise equal prompt, and has another target."""
    same = frame(lm, query) == frame(lm, other)
    return same and tokens.encode(lm, query).target[0] != tokens.encode(lm, other).target[0]


def replacements(lm: LM, queries: Sequence[Query], seed: int = 0) -> list[Query | None]:
    """Return for each query one of the same template, its subject at the same tokens, with another target; or None."""
    frames = [(query.template, *frame(lm, query)) for query in queries]
    first = [tokens.encode(lm, query).target[0] for query in queries]
    rng = random.Random(f"replacements {checks.whole(seed, 'seed')}")
    out = []
    for own_frame, target in zip(frames, first, strict=True):
        candidates = zip(queries, frames, first, strict=True)
        fit = [other for other, its_frame, its_target in candidates if its_frame == own_frame and its_target != target]
        out.append(rng.choice(fit) if fit else None)
    return out
