"""How many neurons groups of prompts have, and how alike their attribution is (chapter 3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import comb

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from kncore import neurons
from kncore.neurons import Found, Neuron
from knpaper import stats
from knpaper.stats import Estimate
from knpaper.stimuli import TEMPLATES, Selection

CLEAR = 0.5  # the share of prompts that a search must reach to count as a success
COMPANY = 6  # other facts of a relation among which a leader is sought


def places(counts: Sequence[int]) -> list[Int[np.ndarray, " prompt"]]:
    """Return the places of prompts that stand one group after the other, group by group, from how many each has."""
    ends = np.cumsum([0, *counts])
    return [np.arange(first, last) for first, last in zip(ends[:-1], ends[1:], strict=True)]


def known_facts(relations: Sequence[Selection]) -> list[Int[np.ndarray, "fact template"]]:
    """Return the places of the prompts of each relation's known facts, of relations with at least five.

    Prompts stand relation after relation. Of a model that knows no five facts of any relation: all facts.
    """
    spans = [span.reshape(-1, TEMPLATES) for span in places([len(some.queries) for some in relations])]
    known = [table[: some.known] for table, some in zip(spans, relations, strict=True)]
    return [table for table in known if len(table) >= TEMPLATES] or spans


def mixed(table: Int[np.ndarray, "fact template"]) -> list[Int[np.ndarray, " template"]]:
    """Return as many groups as facts, each with another fact in every template; each prompt is in one of them.

    The null of whatever is said of the prompts of one fact. Empty where a relation has fewer facts than templates.
    """
    n_facts, k = table.shape
    each = np.arange(k)
    return [table[(fact + each) % n_facts, each] for fact in range(n_facts)] if n_facts >= k else []


def split(span: Int[np.ndarray, " prompt"], k: int = TEMPLATES) -> list[Int[np.ndarray, " prompt"]]:
    """Return consecutive groups of `k` prompts; a rest of fewer is left out."""
    return [span[i : i + k] for i in range(0, len(span) - k + 1, k)]


def across(
    spans: Sequence[Int[np.ndarray, " prompt"]], rng: np.random.Generator, k: int = TEMPLATES
) -> list[list[Int[np.ndarray, " prompt"]]]:
    """Return for each span as many groups as `split` makes of it, each of prompts of `k` spans, this one among them.

    The other spans and the prompts are drawn. Where there are fewer than `k` spans, all of them are taken in turn.
    """
    out = []
    for own, span in enumerate(spans):
        others = [i for i in range(len(spans)) if i != own]
        groups = []
        for _ in split(span, k):
            chosen = [own, *rng.permutation(others)[: k - 1].tolist()]
            groups.append(np.array([rng.choice(spans[chosen[i % len(chosen)]]) for i in range(k)]))
        out.append(groups)
    return out


def successes(found: Iterable[Found]) -> list[bool]:
    """Return which searches end with the neurons that they seek in at least half of the prompts."""
    return [f.converged and f.p >= CLEAR - 1e-9 for f in found]


def alone(leaders: Sequence[Neuron | None], company: int = COMPANY) -> list[float]:
    """Return for each group's leader the probability that it leads none of `company` others, drawn from the rest.

    Of all others where there are fewer; 0 where a group has no leader.
    """
    rest, out = len(leaders) - 1, []
    for leader in leaders:
        others = leaders.count(leader) - 1
        size = min(company, rest)
        out.append(comb(rest - others, size) / comb(rest, size) if leader else 0.0)
    return out


def owners(searches: Sequence[Sequence[Found]], company: int = COMPANY, seed: int = 0) -> tuple[list[float], Estimate]:
    """Return how far the leader of each group is its own among those of its relation (see `alone`), and the mean."""
    each = [x for found in searches for x in alone([f.neurons[0] if f.neurons else None for f in found], company)]
    return each, stats.mean(each, seed=seed)


def one_template(table: Int[np.ndarray, "fact template"]) -> list[Int[np.ndarray, " prompt"]]:
    """Return for each template of a relation the places of as many of its facts as there are templates."""
    n_facts, k = table.shape
    return [table[(template + np.arange(k)) % n_facts, template] for template in range(k)] if n_facts >= k else []


def shuffled(
    tables: Sequence[Int[np.ndarray, "fact template"]], rng: np.random.Generator
) -> list[Int[np.ndarray, " template"]]:
    """Return the rows of the tables after the facts of every template have changed places: labels that mean nothing."""
    return [row for table in tables for row in np.stack([rng.permutation(column) for column in table.T], axis=1)]


def sizes(scores: Float[Tensor, "query block neuron"], sets: Sequence[Sequence[int]], seed: int = 0) -> dict[str, str]:
    """Return, as text for a table, how the search for neurons ends in sets of prompts."""
    found: list[Found] = [neurons.find_neurons(scores[group]) for group in sets]
    return {
        "found 2 to 5 [95 %]": str(stats.share([f.converged for f in found])),
        "p reached, mean [95 %]": str(stats.mean([f.p for f in found], seed=seed)),
        "refined, mean": f"{np.mean([len(f.neurons) for f in found]):.2f}",
    }


def localisation(
    scores: Float[Tensor, "query block neuron"],
    cosines: Float[Tensor, "query query"],
    groups: Mapping[str, Sequence[Sequence[int]]],
    seed: int = 0,
) -> pd.DataFrame:
    """Return the paper's table of how local relations and conditions are, a row for each name of `groups`.

    `|KN|` is the mean number of refined neurons of its groups of prompts, `p` (the paper's τ) the mean share of prompts
    at which their search ended, `found` the share of groups with two to five neurons, and `R1²` the mean similarity,
    from 0 to 1, with its interval over groups (`low`, `high`).
    """
    rows = []
    for name, sets in groups.items():
        found = [neurons.find_neurons(scores[group]) for group in sets]
        alike = stats.mean(neurons.similarity_of_sets(cosines, sets).tolist(), seed=seed)
        counts = np.mean([[len(f.neurons), f.p, f.converged] for f in found], axis=0)
        rows.append([name, len(found), *counts, *alike[:3]])
    return pd.DataFrame(rows, columns=["of", "groups", "|KN|", "p", "found", "R1²", "low", "high"]).round(3)


def by_chance(
    cosines: Float[Tensor, "query query"],
    tables: Sequence[Int[np.ndarray, "fact template"]],
    rng: np.random.Generator,
    times: int = 500,
) -> dict[str, str]:
    """Return, as text for a table, the mean R₁² of one fact and of facts that were shuffled within each template.

    The p value is the share of `times` shuffles, and the actual order with them, that are at least as alike.
    """
    actual = np.mean(neurons.similarity_of_sets(cosines, [row for table in tables for row in table]).tolist())
    sets = [row for _ in range(times) for row in shuffled(tables, rng)]
    drawn = neurons.similarity_of_sets(cosines, sets).numpy().reshape(times, -1).mean(1)
    return {
        "R₁² of one fact": f"{actual:.3f}",
        "shuffled, mean": f"{drawn.mean():.3f}",
        f"shuffled, largest of {times}": f"{drawn.max():.3f}",
        "p": f"{(1 + (drawn >= actual).sum()) / (1 + times):.3f}",
    }
