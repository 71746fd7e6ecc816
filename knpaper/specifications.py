"""What the multiverse says: for each claim, how many specifications agree with the verdict, and their curve."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from knpaper.multiverse import ATTRIBUTIONS, CHOICES, MODELS
from knpaper.rules import Claim

FACTORS = {
    "model": MODELS,
    "site": ("neuron", "published"),
    "quadrature": ("gauss", "riemann"),
    "seed": (0, 1),
    **CHOICES,
}
# The book's own choices; a claim for which nothing is searched has no threshold and no search.
BOOK = dict(zip(("site", "quadrature", "seed"), ATTRIBUTIONS[0], strict=True))
BOOK |= {name: values[0] for name, values in CHOICES.items()}
WIDTH, LEFT, PLOT, ROW = 760, 170, 150, 11  # pixels: of a curve, of its labels, of its upper part, of a choice


def read(path: Path) -> pd.DataFrame:
    """Return the rows that `multiverse.run` wrote; claims for which nothing is searched have no threshold (nan)."""
    return pd.read_csv(path, sep="\t")


def agreement(rows: pd.DataFrame) -> list[dict]:
    """Return for each claim and model: the verdict by the book's choices, and how many of `all` specifications agree.

    `opposite` have the opposite verdict; `turns` is the choice under which the fewest agree, with their share.
    """
    found = []
    rows = rows.sort_values(
        "model", key=lambda names: names.map({name: i for i, name in enumerate(MODELS)}), kind="stable"
    )
    for (claim, model), part in rows.groupby(["claim", "model"], sort=False):
        book = part[
            [all(pd.isna(row[f]) or row[f] == value for f, value in BOOK.items()) for _, row in part.iterrows()]
        ]
        if len(book) != 1:
            continue
        verdict = book.verdict.iloc[0]
        agree = part.verdict == verdict
        shares = {
            f"{factor}: {level}": some.mean()
            for factor in list(FACTORS)[1:]
            for level, some in agree.groupby(part[factor])
            if part[factor].nunique() > 1
        }
        least = min(shares, key=shares.get)
        opposite = {"supported": "contradicted", "contradicted": "supported"}.get(verdict)
        found.append(
            {"claim": claim, "model": model, "verdict": verdict, "agree": int(agree.sum()), "all": len(part)}
            | {"opposite": int((part.verdict == opposite).sum()), "turns": least, "share": shares[least]}
        )
    return found


def curve(part: pd.DataFrame, claim: Claim) -> dict:
    """Return the specification curve of one claim in pixels: its specifications by value, and below each its choices.

    `intervals`, `points` and `choices` are paths of SVG, by verdict and by choice; `number` is how many specifications
    there are. In the first two each specification begins at its x. A choice has lines through specifications that
    follow each other, counted from 0, on an axis that is scaled by `step`: most curves have hundreds.
    """
    part = part.sort_values("value", kind="stable").reset_index(drop=True)
    ends = part[["low", "high"]].clip(part.value.quantile(0.01) - 3, part.value.quantile(0.99) + 3)
    borders = [claim.threshold] if claim.kind == "above" else [-claim.threshold, claim.threshold]
    first, last = min(ends.low.min(), *borders, 0), max(ends.high.max(), *borders, 0)
    step = min(24, (WIDTH - LEFT - 10) / len(part))

    def across(place: int) -> str:
        return f"{LEFT + step * (place + 0.5):.1f}"

    def down(value: float) -> str:
        return f"{8 + (PLOT - 16) * (last - value) / (last - first or 1):.1f}"

    intervals: dict[str, str] = {}
    points: dict[str, str] = {}
    for i, row in part.iterrows():
        x, high, low = across(i), down(ends.high[i]), down(ends.low[i])
        intervals[row.verdict] = intervals.get(row.verdict, "") + f"M{x} {high}V{low}"
        points[row.verdict] = points.get(row.verdict, "") + f"M{x} {down(row.value)}h0"
    choices, y = [], PLOT
    for factor, levels in FACTORS.items():
        used = [level for level in levels if (part[factor] == level).any()]
        for level in used if len(used) > 1 else ():
            y += ROW
            here = part[factor] == level
            runs = here[here].groupby((~here).cumsum()[here])
            lines = "".join(f"M{run.index[0]} {y - 4}h{len(run)}" for _, run in runs)
            choices.append((f"{factor}: {level}", y, lines))
    return {
        "intervals": intervals,
        "points": points,
        "number": len(part),
        "choices": choices,
        "borders": [(down(x), f"{x:g}") for x in borders],
        "step": f"{step:.5g}",
        "thick": f"{max(step * 0.9, 0.6):.2f}",
        "width": WIDTH,
        "left": LEFT,
        "height": y + ROW,
        "ends": (f"{last:.2g}", f"{first:.2g}"),
        "plot": PLOT,
    }
