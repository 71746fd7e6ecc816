"""Claims across models: which verdicts agree, which flip, and what the models on either side of a flip have in common.

Records are given by claim and column, a column being a model or, where the data are not the project's own, a model with
the name of its data after a comma. Checks of a manipulation are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from kncore import arch
from knpaper.rules import CLAIMS, SIDES, VERDICTS, Claim

Records = Mapping[tuple[str, str], Mapping]
# Kinds of models by which a flip may go: what a kind is called, and which records are of it.
KINDS = {
    "models trained here, on sentences of our own": lambda record: record["model"].startswith("controlled-"),
    "masked models": lambda record: arch.SPECS[record["family"]].masked,
}


@dataclass(frozen=True)
class Across:
    """A claim with its records by column."""

    claim: Claim
    records: Mapping[str, Mapping]

    def on(self, *verdicts: str) -> list[str]:
        """Return the columns with one of these verdicts."""
        return [column for column, record in self.records.items() if record["verdict"] in verdicts]

    @property
    def decided(self) -> list[str]:
        """The columns on which the claim is supported or contradicted."""
        return self.on("supported", "contradicted")

    @property
    def flips(self) -> bool:
        """Whether the claim is supported on one column and contradicted on another."""
        return bool(self.on("supported") and self.on("contradicted"))

    @property
    def agreement(self) -> float:
        """From 0 to 1: how many columns more support than contradict the claim, or the reverse, as a share of all."""
        more = len(self.on("supported")) - len(self.on("contradicted"))
        return abs(more) / len(self.records)

    @property
    def verdict(self) -> str:
        """The verdict of all decided columns; "" where none is decided, or the claim flips."""
        return "" if self.flips or not self.decided else self.records[self.decided[0]]["verdict"]


def own(records: Records) -> Records:
    """Return the records on the project's own data: one column a model."""
    return {key: record for key, record in records.items() if key[1] == record["model"]}


def across(records: Records) -> list[Across]:
    """Return the claims that have a record, by agreement from high to low; claims that flip come last."""
    found = []
    for claim in CLAIMS.values():
        here = {column: record for (name, column), record in records.items() if name == claim.id}
        found += [Across(claim, here)] if here and not claim.check else []
    return sorted(found, key=lambda row: (row.flips, -row.agreement, -len(row.records)))


def tally(records: Records) -> dict[str, int]:
    """Return how many verdicts speak for each of `SIDES`, how many are inconclusive, and how many rules were fixed."""
    judged = [record for (claim, _), record in records.items() if not CLAIMS[claim].check]
    counts = {side: sum(record["side"] == side for record in judged) for side in SIDES}
    return counts | {
        "verdicts": len(judged),
        "inconclusive": sum(record["verdict"] == "inconclusive" for record in judged),
        "fixed": sum(bool(CLAIMS[record["claim"]].fixed) for record in judged),
        "models": len({record["model"] for record in judged}),
    }


def evidence(rows: Sequence[Across], side: str, most: int = 3) -> list[tuple[Across, str, list[str]]]:
    """Return up to `most` claims that speak most widely for a side: each with its verdict and the columns that say so.

    A claim counts where more columns speak for the side than for the other; wide is what most columns say, net of those
    that speak for the other side.
    """
    found = []
    for row in rows:
        here = [column for column, record in row.records.items() if record["side"] == side]
        against = [column for column, record in row.records.items() if record["side"] not in (side, "neither")]
        if len(here) > len(against):
            found.append((len(here) - len(against), row, row.records[here[0]]["verdict"], here))
    found.sort(key=lambda item: -item[0])
    return [tuple(item[1:]) for item in found[:most]]


def pairs(rows: Sequence[Across]) -> list[tuple[str, str, int, int]]:
    """Return for each two columns how many claims both decide and how many of them with opposite verdicts.

    From the pair with the largest share of opposite verdicts to that with the smallest; pairs without a claim that both
    decide are left out.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row.records))
    found = []
    for first, second in combinations(columns, 2):
        both = [row for row in rows if {first, second} <= set(row.decided)]
        opposite = sum(row.records[first]["verdict"] != row.records[second]["verdict"] for row in both)
        found += [(first, second, len(both), opposite)] if both else []
    return sorted(found, key=lambda pair: -pair[3] / pair[2])


def pretrained(rows: Sequence[Across]) -> tuple[list[str], list[Across], list[Across]]:
    """Return the columns of causal models that others trained on natural text, and the claims that all of them decide:
    those with the same verdict on each, and those with opposite ones. No claims where there are not two such columns.
    """
    records = {column: record for row in rows for column, record in row.records.items()}
    columns = [name for name, record in records.items() if not any(kind(record) for kind in KINDS.values())]
    decided = [row for row in rows if len(columns) > 1 and set(columns) <= set(row.decided)]
    alike = [row for row in decided if len({row.records[column]["verdict"] for column in columns}) == 1]
    return columns, alike, [row for row in decided if row not in alike]


def alone(rows: Sequence[Across]) -> dict[str, list[Across]]:
    """Return the flips in which one column stands alone against two or more, by that column."""
    found: dict[str, list[Across]] = {}
    for row in filter(lambda row: row.flips, rows):
        few, many = sorted((row.on("supported"), row.on("contradicted")), key=len)
        if len(few) == 1 and len(many) > 1:
            found.setdefault(few[0], []).append(row)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def split_by(rows: Sequence[Across], kind: str) -> tuple[int, int]:
    """Return how many flips are decided on models of a kind and on others, and how many of them go by that kind.

    A flip goes by the kind where all that support the claim are of it and all that contradict it are not, or the
    reverse.
    """
    could = does = 0
    for row in filter(lambda row: row.flips, rows):
        of_kind = {v: {KINDS[kind](row.records[column]) for column in row.on(v)} for v in VERDICTS[:2]}
        could += len(of_kind["supported"] | of_kind["contradicted"]) == 2
        does += sorted(map(sorted, of_kind.values())) == [[False], [True]]
    return could, does


def leaning(rows: Sequence[Across]) -> dict[str, tuple[int, int]]:
    """Return how often each column speaks for the thesis and for the paper in claims that flip, by column."""
    found: dict[str, tuple[int, int]] = {}
    for row in filter(lambda row: row.flips, rows):
        for column in row.decided:
            side, counts = row.records[column]["side"], found.get(column, (0, 0))
            found[column] = (counts[0] + (side == "the thesis"), counts[1] + (side == "the paper"))
    return dict(sorted(found.items(), key=lambda item: item[1][1] - item[1][0]))
