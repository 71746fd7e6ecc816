"""How many neurons it takes: neurons suppressed in order of attribution, one, two, three, and so on to a thousand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from kncore import ablation
from kncore.ablation import Ablation, CapturedPrompts
from kncore.models import LM
from knpaper import stats
from knpaper.groups import Condition, Group, mates
from knpaper.stats import Estimate

DOSES = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
FACT, NEIGHBOUR, UNRELATED, PAIR = "the fact", "a fact of the relation", "an unrelated fact", "a minimal pair"
CONDITION, OTHER, KNOWN = "the condition's pairs", "another phenomenon", "a known fact"
ACTIVE, RANDOM = "most active neurons", "random neurons"
ENHANCED = {2.0: "enhanced ×2", 4.0: "enhanced ×4"}
Row = tuple[Ablation, int, int]  # a trial, how many neurons it takes, the fact or the sentence that it counts for


def doses(lm: LM) -> list[int]:
    """Return the numbers of neurons to suppress: those up to a twentieth of the model's neurons."""
    return [dose for dose in DOSES if dose <= max(1, len(lm.blocks) * lm.n_neurons // 20)]


def of_facts(
    held: CapturedPrompts,
    facts: Sequence[Group],
    conditions: Mapping[Condition, Group],
    rng: np.random.Generator,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure the facts that the model gets right under each number of their neurons, and what else falls with them.

    Beside up to two prompts of the `FACT`: four of `NEIGHBOUR`s, one of an `UNRELATED` fact and of a minimal `PAIR`,
    all right before and drawn by `rng`. The first prompt of the fact is also measured under random and under the most
    active neurons, and with its own enhanced. Returns the table of `ablation.measure`, with the number of neurons
    (`dose`) and the place of the fact (`unit`).
    """
    pairs = [p for condition in conditions.values() for p in condition.right]
    rows: list[Row] = []
    for i, fact in enumerate(facts):
        if fact.right:
            prompts = {
                FACT: fact.right[:2],
                NEIGHBOUR: _some([p for j in mates(facts, i) for p in facts[j].right], 4, rng),
                UNRELATED: _some([p for other in facts if other.task != fact.task for p in other.right], 1, rng),
                PAIR: _some(pairs, 1, rng),
            }
            trials = _trials(held.lm, fact, prompts, fact.right[:1], 2, seed + i, ENHANCED)
            rows += [(trial, dose, i) for trial, dose, _ in trials]
    return _measured(held, rows)


def of_conditions(
    held: CapturedPrompts,
    facts: Sequence[Group],
    conditions: Mapping[Condition, Group],
    rng: np.random.Generator,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure unseen sentences of each condition under each number of its neurons, and what else falls with them.

    Five sentences of the `CONDITION`, three of an `OTHER` phenomenon and three prompts of `KNOWN` facts, all right
    before and drawn by `rng`; the condition's own also under random and under the most active neurons. Returns a table
    as `of_facts` does, where `unit` is the prompt.
    """
    known = [p for fact in facts for p in fact.right]
    rows: list[Row] = []
    for i, condition in enumerate(conditions.values()):
        others = [p for other in conditions.values() if other.task != condition.task for p in other.right]
        prompts = {
            CONDITION: _some(condition.right, 5, rng),
            OTHER: _some(others, 3, rng),
            KNOWN: _some(known, 3, rng),
        }
        rows += _trials(held.lm, condition, prompts, prompts[CONDITION], 1, seed + i)
    return _measured(held, rows)


def _some(prompts: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
    return rng.permutation(np.asarray(prompts, dtype=int))[:count].tolist()


def _trials(
    lm: LM,
    group: Group,
    watched: Mapping[str, Sequence[int]],
    compared: Sequence[int],
    draws: int,
    seed: int,
    enhanced: Mapping[float, str] | None = None,
) -> list[Row]:
    """Return the trials of one group, each counted for its prompt; see `of_facts`."""
    sizes = doses(lm)
    order = group.ranked(sizes[-1])
    series = [
        *((order, 0.0, what, prompts) for what, prompts in watched.items()),
        *((drawn, 0.0, RANDOM, compared) for drawn in ablation.matched_controls(group.sizes, order, draws, seed)),
        (ablation.most_active(group.sizes, sizes[-1]), 0.0, ACTIVE, compared),
        *((order, factor, what, compared) for factor, what in (enhanced or {}).items()),
    ]
    return [
        (Ablation(p, ranked[:size], factor, what), size, p)
        for size in sizes
        for ranked, factor, what, prompts in series
        for p in prompts
    ]


def _measured(held: CapturedPrompts, rows: Sequence[Row]) -> pd.DataFrame:
    table = ablation.measure(held, [trial for trial, _, _ in rows])
    return table.assign(dose=[dose for _, dose, _ in rows], unit=[unit for _, _, unit in rows])


def curves(table: pd.DataFrame, labels: Sequence[str]) -> dict[str, dict[int, Estimate]]:
    """Return the share of what stays right at each dose, by label, as `figures.curves` takes it."""
    parts = {label: table[table.label == label].groupby("dose") for label in labels}
    return {
        label: {dose: stats.share(part.prefers_after, part.unit) for dose, part in doses}
        for label, doses in parts.items()
    }


def falls(table: pd.DataFrame) -> pd.DataFrame:
    """Return the facts by place: at which `dose` each falls first, nan where at none, and whether it falls alone.

    A fact falls where fewer than half of its prompts stay right. It falls `alone` at a dose at which the unrelated fact
    beside it stays right, and `in_company` at one at which three of four prompts of its neighbours do. `table` is of
    `of_facts`.
    """
    fallen = table[table.label == FACT].groupby(["unit", "dose"]).prefers_after.mean() < 0.5
    stands = table.groupby(["label", "unit", "dose"]).prefers_after.mean() >= 0.75
    found = {"dose": fallen[fallen].reset_index().groupby("unit").dose.min()}
    for name, label in (("alone", UNRELATED), ("in_company", NEIGHBOUR)):
        beside = stands[label].reindex(fallen.index, fill_value=False) if label in stands else fallen & False
        found[name] = (fallen & beside).groupby("unit").any()
    return pd.DataFrame(found)
