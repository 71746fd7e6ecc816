"""Whether a verdict on a controlled model is one about its kind: the same claim on its further training seeds."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from knpaper import stats
from knpaper.rules import CLAIMS, void
from knpaper.stats import Estimate

LEAST = 3  # training seeds
NAME = re.compile(r"(controlled-[a-z]+\d*)(-\d+)?")


class Stability(NamedTuple):
    """A claim over training seeds: its value by model, the mean with Student's interval, and the rule's verdict of it.

    Seeds on which the check that the claim needs failed are `left_out`: what an edit brings about is not seen where
    none was made. `word` is "stable" if the verdict is the one of the first model, over its own units, else "unstable
    over seeds"; with fewer than `LEAST` seeds left there is no mean, and the word is "not known over seeds".
    """

    values: dict[str, float]
    mean: Estimate | None
    verdict: str
    word: str
    left_out: list[str]

    @property
    def seen(self) -> list[str]:
        """The values in words, seed by seed; those left out in brackets."""
        return [f"({x:.2f})" if model in self.left_out else f"{x:.2f}" for model, x in self.values.items()]


def stability(records: Iterable[Mapping]) -> dict[tuple[str, str], Stability]:
    """Return what training seeds say to each claim that is recorded for three or more of a model, by (claim, model).

    `records` as of `records.read_records`; the model is the one without a number, which must be among them. Claims that
    count training seeds anyway and records of no units are left out.
    """
    found: dict[tuple[str, str], dict[str, Mapping]] = {}
    records = list(records)
    voids = void(records)
    for record in records:
        claim, name = CLAIMS[record["claim"]], NAME.fullmatch(record["model"])
        if name and claim.unit != "training seed" and record["n"]:
            found.setdefault((claim.id, name[1]), {})[record["model"]] = record
    return {
        key: _stability(key[0], of_seeds, of_seeds[key[1]]["verdict"], voids)
        for key, of_seeds in found.items()
        if key[1] in of_seeds and len(of_seeds) >= LEAST
    }


def _stability(claim_id: str, of_seeds: Mapping[str, Mapping], first: str, voids: Collection) -> Stability:
    left_out = sorted(model for model, record in of_seeds.items() if (claim_id, model, record["source"]) in voids)
    values = {model: record["value"] for model, record in sorted(of_seeds.items())}
    some = [value for model, value in values.items() if model not in left_out]
    if len(some) < LEAST:
        return Stability(values, None, "inconclusive", "not known over seeds", left_out)
    mean = stats.runs(some)
    verdict = replace(CLAIMS[claim_id], min_n=LEAST).verdict(mean)
    return Stability(values, mean, verdict, "stable" if verdict == first else "unstable over seeds", left_out)
