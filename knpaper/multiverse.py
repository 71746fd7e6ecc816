"""One multiverse: headline claims of chapters 1 to 4 under each reasonable way to find neurons.

`python -m kncore multiverse` computes it, universe after universe, into results/multiverse.tsv. A universe is one
attribution: a model, a draw of prompts, a site and a quadrature. In each of them the choices that cost no new
attribution are crossed (`CHOICES`): which blocks are searched, the coarse threshold, how the search moves, and how many
templates of a fact or sentences of a condition it is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

import kncore
from kncore import ablation, neurons
from kncore.ablation import Ablation, CapturedPrompts
from kncore.store import fingerprint
from kncore.store.disk import write
from knpaper import chapter, groups, likeness, stats, suppression
from knpaper.groups import Condition, Group
from knpaper.rules import CLAIMS
from knpaper.stats import Estimate
from knpaper.stimuli import TEMPLATES, Selection

SEARCHES = {"p from 0.7, 2 to 5": {}, "p from 0.5, 2 to 5": {"p": 0.5}, "p from 0.7, 1 to 5": {"at_least": 1}}
CHOICES = {"blocks": ("all", "above 0"), "templates": (5, 3), "threshold": (0.2, 0.1, 0.3), "search": tuple(SEARCHES)}
ATTRIBUTIONS = [("neuron", "gauss", 0), ("published", "gauss", 0), ("neuron", "riemann", 0), ("neuron", "gauss", 1)]
MODELS = ("smollm2-135m", "controlled-gpt2", "controlled-llama", "controlled-bert")
# The default model takes a second for a prompt: beyond the chapters' own attribution fewer facts are asked.
UNIVERSES = [
    {"model": model, "site": site, "quadrature": rule, "seed": seed, "n": 7 if i == 0 or model != MODELS[0] else 5}
    for model in MODELS
    for i, (site, rule, seed) in enumerate(ATTRIBUTIONS)
]
OF_UNIVERSE, OF_SPECIFICATION = list(UNIVERSES[0]), list(CHOICES)


@dataclass(eq=False)
class Study:
    """What is asked of a model in a universe, and the scores: of all facts, then of `m` sentences of each condition."""

    relations: Mapping[str, Selection]
    pairs: Mapping[Condition, Selection]
    m: int
    scores: Float[Tensor, "query block neuron"]
    held: CapturedPrompts
    facts: list[Group]
    conditions: dict[Condition, Group]
    seed: int


def study(model: str, site: str, quadrature: str, seed: int, n: int) -> Study:
    """Ask a model as chapter 4 does, and attribute at a site by a rule (20 steps of it, unless it is adaptive)."""
    lm, m = kncore.load(model), 2 * n + 1
    relations, pairs = chapter.known_facts(lm, n, seed), chapter.known_pairs(lm, 2 * m, seed)
    queries = [query for some in relations.values() for query in some.queries]
    queries += [query for some in pairs.values() for query in some.queries[:m]]
    scores = kncore.attribute(lm, queries, site=site, quadrature=quadrature).scores
    return Study(relations, pairs, m, scores, *groups.capture(lm, relations, pairs, m, scores), seed)


def estimates(given: Study) -> Iterator[tuple[dict, dict[str, Estimate]]]:
    """Yield each specification with the estimates of the claims that depend on it and not only on an earlier one."""
    cache: dict = {}
    for blocks, templates in product(CHOICES["blocks"], CHOICES["templates"]):
        scores = given.scores.clone()
        scores[:, 0] *= blocks == "all"
        tables = [table[:, :templates] for table in likeness.known_facts(list(given.relations.values()))]
        spans = likeness.places([given.m] * len(given.pairs))
        first = sum(len(some.queries) for some in given.relations.values())
        known = [min(some.known, given.m) for some in given.pairs.values()]
        usable = [first + span[:count] for span, count in zip(spans, known, strict=True) if count >= TEMPLATES]
        usable = usable or [first + span for span in spans]
        counts = [sum(some.known >= TEMPLATES for some in given.relations.values()), sum(x >= TEMPLATES for x in known)]
        specification = {"blocks": blocks, "templates": templates}
        yield specification, _similar(scores, tables, usable, counts, given.seed, templates)
        for threshold, search in product(CHOICES["threshold"], CHOICES["search"]):
            options = {"threshold": threshold, **SEARCHES[search]}
            found = _searched(given, scores, tables, usable, counts, options, templates)
            found |= _suppressed(given, scores, options, templates, cache)
            yield {**specification, "threshold": threshold, "search": search}, found


def _similar(scores, tables, spans, counts: Sequence[int], seed: int, k: int) -> dict[str, Estimate]:
    """Return the claims on similarity, for which nothing is searched."""
    cosines = neurons.gram(scores.flatten(1))

    def r1(some: Sequence[Sequence]) -> list[float]:
        return [float(neurons.similarity_of_sets(cosines, sets).mean()) for sets in some if sets]

    one, mixture, template = ([r(t) for t in tables] for r in (list, likeness.mixed, likeness.one_template))
    alike = stats.difference(r1(mixture), r1([likeness.split(span, k) for span in spans]), seed=seed)
    follows = stats.mean(np.subtract(r1(one), r1(template)), seed=seed)
    return {"as-similar": _least(alike, min(counts)), "follows-the-fact": _least(follows, counts[0])}


def _searched(given: Study, scores, tables, spans, counts, options: dict, k: int) -> dict[str, Estimate]:
    """Return the claims on what the search finds."""

    def search(some: Sequence[Sequence]) -> list[list[neurons.Found]]:
        return [[neurons.find_neurons(scores[group], **options) for group in sets] for sets in some]

    own, mixed = search([list(table) for table in tables]), search([likeness.mixed(table) for table in tables])
    split, across = (
        [likeness.split(span, k) for span in spans],
        likeness.across(spans, np.random.default_rng(given.seed), k),
    )
    of_one, of_all = ([np.mean(likeness.successes(some)) for some in search(sets)] for sets in (split, across))
    known, seed = sum(some.known for some in given.relations.values()), given.seed
    gap = stats.difference(*(likeness.successes(sum(some, [])) for some in (own, mixed)), seed=seed)
    owner = stats.difference(*(likeness.owners(some)[0] for some in (own, mixed)), seed=seed)
    grammar = stats.mean(np.subtract(of_one, of_all), seed=seed)
    return {
        "fact-search": _least(gap, known),
        "fact-owner": _least(owner, known),
        "grammar-search": _least(grammar, counts[1]),
    }


def _suppressed(given: Study, scores, options: dict, k: int, cache: dict) -> dict[str, Estimate]:
    """Return the claims on what is lost without the neurons found."""

    def with_neurons(group: Group, rows: Float[Tensor, "query block neuron"], searched: int | None) -> Group:
        found = neurons.find_neurons(rows[:searched], **options).neurons
        return replace(group, scores=rows, neurons=found or [neurons.top(rows[:searched].mean(0), 1)[0][0]])

    end = TEMPLATES * len(given.facts)
    parts = scores[:end].split(TEMPLATES)
    facts = [with_neurons(fact, part, k) for fact, part in zip(given.facts, parts, strict=True)]
    parts = scores[end:].split(given.m)
    conditions = [with_neurons(group, part, None) for group, part in zip(given.conditions.values(), parts, strict=True)]
    own = _measure(given.held, [(p, fact.neurons) for fact in facts for p in fact.prompts], cache)
    another, crossed, labels = [], [], []
    for i, fact in enumerate(facts):
        mates = groups.mates(facts, i)
        ranked = facts[mates[i % len(mates)]].ranked(len(fact.neurons))
        another += [(p, ranked) for p in fact.prompts]
        crossed += [(facts[j].prompts[(i + j) % TEMPLATES], fact.neurons) for j in mates]
        labels += [fact.name] * len(mates)
    beyond = own.loss.to_numpy() - _measure(given.held, another, cache).loss.to_numpy()
    loss = own.groupby("item").loss.mean()
    neighbours = _measure(given.held, crossed, cache).assign(of=labels).groupby("of").loss.mean()
    choices = own[own.item.isin([fact.name for fact in facts if fact.is_whole])]
    pairs = _measure(given.held, [(p, group.neurons) for group in conditions for p in group.prompts], cache)
    right = pairs[pairs.prefers_before]
    known, seed = sum(some.known for some in given.relations.values()), given.seed
    whole = sum(some.known >= 2 * given.m for some in given.pairs.values())
    kept = suppression.by_condition(right.prefers_after.astype(float), right, seed)
    return {
        "fact-beats-neighbour": _least(stats.mean(beyond, own.item, seed), known),
        "edit-spares-answer": _least(suppression.stays(choices), known),
        "edit-spares-word": _least(suppression.stays(choices, "says"), known),
        "fact-alone": _least(stats.ratio(loss - neighbours, loss, seed=seed), known),
        "edit-spares-agreement": _least(kept, whole),
    }


def _measure(held: CapturedPrompts, trials: Sequence[tuple[int, Sequence]], cache: dict) -> pd.DataFrame:
    """Return the table of `ablation.measure`, a row for each prompt and neurons to suppress; each is measured once."""
    keys = [(p, tuple(sorted(chosen))) for p, chosen in trials]
    new = [key for key in dict.fromkeys(keys) if key not in cache]
    if new:
        cache |= zip(new, ablation.measure(held, [Ablation(*key) for key in new]).to_dict("records"), strict=True)
    return pd.DataFrame([cache[key] for key in keys])


def _least(estimate: Estimate, known: int) -> Estimate:
    return estimate._replace(n=min(estimate.n, known))


def run(path: Path, universes: Sequence[Mapping] = UNIVERSES) -> pd.DataFrame:
    """Write a row for each claim and specification to a TSV file, universe after universe, and return all rows.

    Universes that the file holds already, of the same code, are not computed again; rows of other code go.
    """
    code = fingerprint.digest(fingerprint.code(study, estimates))[:16]
    done = pd.read_csv(path, sep="\t") if path.is_file() else pd.DataFrame(columns=[*OF_UNIVERSE, "code"])
    done = done[done.code == code]
    for universe in universes:
        if not (done[OF_UNIVERSE] == pd.Series(universe)).all(axis=1).any():
            rows = [
                {
                    "claim": claim,
                    **universe,
                    **specification,
                    **dict(zip(("value", "low", "high", "units"), estimate, strict=True)),
                }
                | {"verdict": CLAIMS[claim].verdict(estimate), "code": code}
                for specification, found in estimates(study(**universe))
                for claim, estimate in found.items()
            ]
            done = pd.concat([done, pd.DataFrame(rows)])
            write(path, done.to_csv(sep="\t", index=False, float_format="%.4g"))
    return done
