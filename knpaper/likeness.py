"""How many neurons groups of prompts have, and how alike their attribution is (chapter 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from kncore import neurons
from kncore.neurons import Found
from knpaper import stats


def places(counts: Sequence[int]) -> list[Int[np.ndarray, " prompt"]]:
    """Return the places of prompts that stand one group after the other, group by group, from how many each has."""
    ends = np.cumsum([0, *counts])
    return [np.arange(first, last) for first, last in zip(ends[:-1], ends[1:], strict=True)]


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
