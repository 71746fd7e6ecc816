"""How much of a lost answer single states bring back, at the end of the subject and of the prompt (chapter 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from kncore import tokens, tracing
from kncore.models import LM
from kncore.query import Query
from kncore.tracing import Restore
from knpaper import stats, traceable
from knpaper.stats import Estimate

# In a distractor's phrase, "the enemies of the painter", an earlier token than the last one tells the number.
KINDS = ("facts", "agreement", "distractor")


def collect(
    lm: LM, queries: Sequence[Query], restores: Sequence[Restore], least: float = 1.0, where: str = "ends", **options
) -> pd.DataFrame:
    """Trace prompts at the last token of the subject and where the answer is due; return a row for each.

    `clean` is the log-odds of the answer and `lost` what the corruption takes from it; prompts that lose `least` nats
    or less are left out. `first`, `subject` and `end` are the first and the last token of the subject and the last of
    the prompt, places in the `trace` (the first one only with `where` "all"). `kind` is one of `KINDS`. `options` as in
    `tracing.trace`.
    """
    traces = tracing.trace(lm, queries, restores, where=where, progress=True, **options)
    rows = pd.DataFrame(
        {
            "task": [t.query.task for t in traces],
            "item": [t.query.item for t in traces],
            "kind": [kind_of(t.query.task) for t in traces],
            "clean": [float(t.clean[1]) for t in traces],
            "lost": [float(t.clean[1] - t.corrupted[1]) for t in traces],
            "first": [t.subject[0] for t in traces],
            "subject": [t.subject[1] for t in traces],
            "end": [tokens.encode(lm, t.query).position for t in traces],
            "trace": traces,
        }
    )
    return rows[rows.lost > least].reset_index(drop=True)


def kind_of(task: str) -> str:
    """Return to which of `KINDS` the prompts of a relation or a phenomenon belong."""
    if task in traceable.RELATIONS:
        return "facts"
    return "distractor" if task.endswith("distractor") else "agreement"


def mean(values: Sequence[float], items: Sequence, seed: int = 0) -> Estimate:
    """Return `stats.mean` of values; of none an estimate that says nothing, of n = 0."""
    return stats.mean(values, items, seed) if len(values) else Estimate(0.0, -math.inf, math.inf, 0)


def share(rows: pd.DataFrame, restore: int, place: str) -> Float[np.ndarray, "prompt block"]:
    """Return the share of the lost log-odds that the restore of that number brings back, in every traced block.

    `place` is "first", "subject" or "end", `rows` are of `collect`.
    """
    effects = [t.effects[restore, at, :, 1].numpy() for t, at in zip(rows.trace, rows[place], strict=True)]
    return np.array(effects) / rows.lost.to_numpy()[:, None]


def curve(rows: pd.DataFrame, restore: int, place: str, seed: int = 0) -> dict[int, Estimate]:
    """Return the mean share over prompts in every traced block, as `figures.curves` takes it."""
    shares = share(rows, restore, place)
    blocks = rows.trace.iloc[0].blocks
    return {block: stats.mean(shares[:, i], rows.item, seed) for i, block in enumerate(blocks)}


def advantage(
    rows: pd.DataFrame, restore: int, other: int, place: str, blocks: Sequence[int] | range
) -> Float[np.ndarray, " prompt"]:
    """Return by how much one restore brings back more than another, as a mean share over those of `blocks` traced."""
    if rows.empty:
        return np.zeros(0)
    inside = np.isin(rows.trace.iloc[0].blocks, list(blocks))
    return (share(rows, restore, place) - share(rows, other, place))[:, inside].mean(1)
