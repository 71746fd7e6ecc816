"""What a model says before anything is done to it: probabilities, preferences, and which items it knows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from kncore import checks, grammar, public, state, tasks, tokens
from kncore.models import LM
from kncore.replay import capture, expect_numbers
from kncore.tasks import Query

TEMPLATES = 5
TRIES = 150
RELATIONS = {
    "own": ("capital", "country_of_capital", "official_language", "native_language", "field_of_work", "occupation"),
    "public": (
        "P36",
        "P1376",
        "P101",
        "P106",
        "P19",
        "P176",
    ),  # those of ParaRel with five templates that end in [MASK]
}
PARADIGMS = (
    "determiner_noun_agreement_1",
    "determiner_noun_agreement_with_adjective_1",
    "determiner_noun_agreement_irregular_1",
    "regular_plural_subject_verb_agreement_1",
    "irregular_plural_subject_verb_agreement_1",
    "distractor_agreement_relational_noun",
    "anaphor_number_agreement",
    "anaphor_gender_agreement",
)


@state.computes(grad=False)
def log_probabilities(lm: LM, queries: Sequence[Query], batch: int = 32) -> Float[Tensor, "query vocab"]:
    """Log-probabilities of the token that the first target token competes with.

    Raises ValueError where there are no queries, one cannot be asked, or a log-probability is not a finite number.
    """
    queries = _listed(queries)
    out: list[Tensor | None] = [None] * len(queries)
    for i, row in _rows(lm, queries, batch):
        out[i] = row
    return torch.stack(out)


def _listed(queries: Sequence[Query]) -> list[Query]:
    queries = checks.items(queries, Query, "queries")
    if not queries:
        raise ValueError("no queries to predict; give at least one")
    return queries


def _rows(lm: LM, queries: Sequence[Query], batch: int = 32) -> Iterator[tuple[int, Float[Tensor, " vocab"]]]:
    """Place and log-probabilities of each query, the shortest first: ten thousand need not be held at once."""
    batch = checks.whole(batch, "batch", 1)
    encoded = [tokens.encode(lm, query) for query in queries]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
    for i in range(0, len(order), batch):
        part = order[i : i + batch]
        logits = capture(lm, [encoded[j] for j in part], sites=()).logits
        yield from zip(part, logits.log_softmax(-1).cpu(), strict=True)


@state.computes(grad=False)
def predict(lm: LM, queries: Sequence[Query], candidates: Sequence[str] = ()) -> pd.DataFrame:
    """One row per query: `probability` and `rank` of the target's first token, and whether the model `prefers` it.

    It is preferred if it is more probable than the foil and than every candidate with another first token; `margin` is
    the difference of log-probability to the best of those. Without foil and candidates: if it is the model's
    prediction. A foil that starts with the target's first token cannot be told from it: margin 0, no preference.
    Candidates are tokenised as targets of each prompt, once for all that end alike. Raises ValueError where there are
    no queries, one cannot be asked, a candidate is no word, or a probability is not a finite number.
    """
    queries = _listed(queries)
    candidates = checks.items(candidates, str, "candidates")
    for word in candidates:
        if not word.strip() or word != word.strip():
            raise ValueError(f"the candidate {word!r} is empty or has white space around it; give a word without")
    known: dict[tuple, list[int]] = {}
    rows: list[dict] = [{}] * len(queries)
    for i, row in _rows(lm, queries):
        query = queries[i]
        target = tokens.encode(lm, query).target[0]
        rivals = {tokens.encode(lm, query, query.foil).target[0]} if query.foil else set()
        if candidates:
            ending = tokens.ending(query)
            if ending not in known:
                known[ending] = [tokens.encode(lm, query, word).target[0] for word in candidates]
            rivals |= set(known[ending])
        closed = bool(rivals)
        rivals -= {target}
        rank = int((row > row[target]).sum())
        best = row[sorted(rivals)].max() if rivals else row[target] if closed else row.max()
        margin = float(row[target] - best)
        rows[i] = {
            "task": query.task,
            "item": query.item,
            "value": query.value,
            "template": query.template,
            "probability": float(row[target].exp()),
            "rank": rank,
            "margin": margin,
            "prefers": margin > 0 if closed else rank == 0,
        }
    return pd.DataFrame(rows)


@state.computes(grad=False)
def text_loss(lm: LM, texts: Sequence[str], batch: int = 16) -> Float[Tensor, " text"]:
    """Mean negative log-likelihood per token of each text, in nats; its exponential is the perplexity.

    Causal models predict every token from those before it. Of masked models every sixth token from the first on is
    masked, the same ones each time, and predicted from the rest; special tokens are neither masked nor counted. Text is
    read as `tokens.read` does. Raises ValueError for no texts, a text of fewer than two tokens that are not special or
    longer than the context, and a loss that is not a finite number.
    """
    texts, batch = checks.items(texts, str, "texts"), checks.whole(batch, "batch", 1)
    if not texts:
        raise ValueError("no texts to read; give at least one")
    special = torch.tensor(lm.tokenizer.all_special_ids, dtype=torch.long, device=lm.device)
    losses = []
    for i in range(0, len(texts), batch):
        part = texts[i : i + batch]
        ids, lengths = tokens.pad(lm, [tokens.Encoded(tuple(tokens.read(lm, text)), 0, ()) for text in part])
        real = torch.arange(ids.shape[1], device=lm.device) < lengths[:, None]
        ordinary = real & ~torch.isin(ids, special)
        for text, count in zip(part, ordinary.sum(1), strict=True):
            if count < 2:
                raise ValueError(f"text {text[:40]!r} has fewer than two tokens for {lm.name}; give a longer one")
        for text, length in zip(part, lengths.tolist(), strict=True):
            tokens.check_length(lm, length, f"text {text[:40]!r}")
        chosen, shown = real, ids
        if lm.spec.masked:
            chosen = ordinary & (ordinary.cumsum(1) % 6 == 1)
            shown = ids.masked_fill(chosen, lm.tokenizer.mask_token_id)
        with torch.no_grad():
            logp = lm.model(input_ids=shown, attention_mask=real.long()).logits.float().log_softmax(-1)
        if not lm.spec.masked:
            logp, ids, chosen = logp[:, :-1], ids[:, 1:], real[:, 1:]
        loss = -logp.gather(2, ids[..., None])[..., 0].masked_fill(~chosen, 0)
        losses.append((loss.sum(1) / chosen.sum(1)).cpu())
        expect_numbers(lm, losses[-1][:, None], ids.tolist(), "loss")
    return torch.cat(losses)


def relations(source: str = "own") -> list[str]:
    """The relations that the chapters ask about: of the project's own facts, or of ParaRel."""
    return list(RELATIONS["own" if source == "own" else "public"])


def phenomena(source: str = "own") -> list[str]:
    """The phenomena that the chapters ask about: of the project's own grammars, or of BLiMP."""
    return grammar.phenomena() if source == "own" else list(PARADIGMS)


class Asked(NamedTuple):
    """Queries to ask a model, item after item: how many items were tried, and how many of those here it knows.

    `candidates` are the objects of the relation, all that a fact's answer competes with.
    """

    queries: list[Query]
    tried: int
    known: int
    candidates: Sequence[str] = ()


def known_facts(lm: LM, relation: str, n: int, seed: int = 0, source: str = "own") -> Asked:
    """The first `n` facts (in the order of `seed`) that the model knows, each in five templates.

    A fact is known if in at least half of its templates the model prefers the object to every other object of the
    relation. After 150 tries, or at the end of the data, unknown facts fill up the number, and `known` is below `n`.
    `source` is "own", "public" (ParaRel, fetched) or a folder with the public data sets. Raises ValueError for an
    unknown relation, an `n` below 1, and a model whose probabilities are not numbers.
    """
    n = checks.whole(n, "n", 1)
    if source == "own":
        queries, candidates = tasks.facts(relation, seed=seed), tasks.candidates(relation)
    else:
        form = "masked" if lm.spec.masked else "causal"
        queries = public.pararel(relation, None if source == "public" else source, form=form)
        candidates = sorted({query.target for query in queries})
    items = _by_item(queries, None if source == "own" else seed)
    known, unknown = [], []
    for i in range(0, min(len(items), TRIES), 10):
        chunk = items[i : i + 10]
        prefers = predict(lm, [query for item in chunk for query in item], candidates)["prefers"].to_numpy()
        for item, share in zip(chunk, prefers.reshape(len(chunk), -1).mean(1), strict=True):
            if len(known) < n:
                (known if share >= 0.5 else unknown).append(item)
        if len(known) == n:
            break
    kept = (known + unknown)[:n]
    return Asked([query for item in kept for query in item], len(known) + len(unknown), len(known), candidates)


def known_subjects(lm: LM, relation: str, seed: int = 0) -> list[str]:
    """The subjects of all facts of a relation (of the project's own) that the model knows, as in `known_facts`."""
    asked = known_facts(lm, relation, len(tasks.describe(relation).pairs), seed)
    names = {f"{relation}:{subject}": subject for subject, _ in tasks.describe(relation).pairs}
    return [names[query.item] for query in asked.queries[: asked.known * TEMPLATES : TEMPLATES]]


def known_both(lm: LM, relation: str, seed: int = 0) -> list[tuple[str, str]]:
    """The facts (subject, object) of a two-way relation that the model knows from both sides.

    Where it knows fewer than three, all facts that can be asked from both sides. Raises ValueError for an unknown
    relation or one without an inverse.
    """
    there = tasks.describe(relation)
    back = dict(tasks.describe(there.inverse).pairs)
    pairs = [(subject, target) for subject, target in there.pairs if back.get(target) == subject]
    known = [set(known_subjects(lm, name, seed)) for name in (relation, there.inverse)]
    both = [(subject, target) for subject, target in pairs if subject in known[0] and target in known[1]]
    return both if len(both) > 2 else pairs


def _by_item(queries: Sequence[Query], seed: int | None) -> list[list[Query]]:
    """Queries of each item in its first five templates; items with one answer only, shuffled if there is a seed."""
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


def known_pairs(lm: LM, phenomenon: str, n: int, seed: int = 0, source: str = "own") -> dict[str, Asked]:
    """For each condition of a phenomenon, the first `n` minimal pairs whose good member the model prefers.

    In the causal form for causal models, in the masked form for masked ones. `seed`, `source` (here BLiMP) and the
    filling up after 150 tries as in `known_facts`. Raises ValueError for an unknown phenomenon, an `n` below 1, and a
    model whose probabilities are not numbers.
    """
    n = checks.whole(n, "n", 1)
    form = "masked" if lm.spec.masked else "causal"
    if source == "own":
        queries = grammar.minimal_pairs(phenomenon, seed=seed, form=form)
    else:
        queries = public.blimp(phenomenon, None if source == "public" else source, form=form)
        random.Random(seed).shuffle(queries)
    out = {}
    for value in ("singular", "plural", "feminine", "masculine"):
        mine = [query for query in queries if query.value == value][:TRIES]
        if not mine:
            continue
        known, unknown = [], []
        for i in range(0, len(mine), 20):
            for query, right in zip(mine[i : i + 20], predict(lm, mine[i : i + 20])["prefers"], strict=True):
                if len(known) < n:
                    (known if right else unknown).append(query)
            if len(known) == n:
                break
        out[value] = Asked((known + unknown)[:n], len(known) + len(unknown), len(known))
    return out
