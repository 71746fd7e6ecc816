"""What a model says before anything is done to it: probabilities, preferences, and which items it knows."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from kncore import grammar, tasks, tokens
from kncore.models import LM
from kncore.replay import capture
from kncore.tasks import Query


def log_probabilities(lm: LM, queries: Sequence[Query], batch: int = 32) -> Float[Tensor, "query vocab"]:
    """Log-probabilities of the token that the first target token competes with."""
    encoded = [tokens.encode(lm, query) for query in queries]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
    out: list[Tensor | None] = [None] * len(encoded)
    for i in range(0, len(order), batch):
        part = order[i : i + batch]
        logits = capture(lm, [encoded[j] for j in part], sites=()).logits
        for j, row in zip(part, logits.log_softmax(-1).cpu(), strict=True):
            out[j] = row
    return torch.stack(out)


def predict(lm: LM, queries: Sequence[Query], candidates: Sequence[str] = ()) -> pd.DataFrame:
    """One row per query: `probability` and `rank` of the target's first token, and whether the model `prefers` it.

    It is preferred if it is more probable than the foil and than every candidate with another first token; `margin` is
    the difference of log-probability to the best of those. Without foil and candidates: if it is the model's
    prediction. Candidates are tokenised as targets of each template's first query.
    """
    logp = log_probabilities(lm, queries)
    known: dict[str, list[int]] = {}
    rows = []
    for query, row in zip(queries, logp, strict=True):
        target = tokens.encode(lm, query).target[0]
        rivals = {tokens.encode(lm, query, query.foil).target[0]} if query.foil else set()
        if candidates:
            if query.template not in known:
                known[query.template] = [tokens.encode(lm, query, word).target[0] for word in candidates]
            rivals |= set(known[query.template])
        rivals -= {target}
        rank = int((row > row[target]).sum())
        margin = float(row[target] - (row[sorted(rivals)].max() if rivals else row.max()))
        rows.append(
            {
                "task": query.task,
                "item": query.item,
                "value": query.value,
                "template": query.template,
                "probability": float(row[target].exp()),
                "rank": rank,
                "margin": margin,
                "prefers": margin > 0 if rivals else rank == 0,
            }
        )
    return pd.DataFrame(rows)


def known_facts(lm: LM, relation: str, n: int, seed: int = 0) -> tuple[list[Query], int]:
    """The first `n` facts (in the order of `seed`) that the model knows, in all templates; and how many were tried.

    A fact is known if in at least half of its templates the model prefers the object to every other object of the
    relation. Fewer than `n` come back where the model knows fewer.
    """
    queries = tasks.facts(relation, seed=seed)
    templates = len(tasks.describe(relation).templates)
    candidates = tasks.candidates(relation)
    kept: list[Query] = []
    tried = 0
    for i in range(0, len(queries), 10 * templates):
        chunk = queries[i : i + 10 * templates]
        prefers = predict(lm, chunk, candidates)["prefers"].to_numpy().reshape(-1, templates)
        for j, right in enumerate(prefers.mean(1) >= 0.5):
            if len(kept) == n * templates:
                return kept, tried
            tried += 1
            if right:
                kept += chunk[j * templates : (j + 1) * templates]
    return kept, tried


def known_pairs(lm: LM, phenomenon: str, n: int, seed: int = 0) -> tuple[list[Query], int]:
    """The first `n` minimal pairs of each condition in which the model prefers the good member; and how many were tried.

    In the causal form for causal models, in the masked form for masked ones.
    """
    queries = grammar.minimal_pairs(phenomenon, seed=seed, form="masked" if lm.spec.masked else "causal")
    values = sorted({query.value for query in queries})
    kept: dict[str, list[Query]] = {value: [] for value in values}
    tried = 0
    for i in range(0, len(queries), 40):
        chunk = queries[i : i + 40]
        for query, right in zip(chunk, predict(lm, chunk)["prefers"], strict=True):
            if all(len(found) == n for found in kept.values()):
                return [query for value in values for query in kept[value]], tried
            tried += 1
            if right and len(kept[query.value]) < n:
                kept[query.value].append(query)
    return [query for value in values for query in kept[value]], tried
