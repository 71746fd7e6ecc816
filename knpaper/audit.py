"""The audit of the claims: what a declaration does not say, what power a record had, how many verdicts chance makes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from scipy.stats import norm

from knpaper import claims, stats
from knpaper.records import estimate_of
from knpaper.rules import CLAIMS, Claim
from knpaper.stats import Estimate

ALARMS = 0.05  # of repeats in which the null is true, the share that may be judged supported
POWER = 0.8  # of repeats in which the expected effect is there, the share that should be


def audit(records: Sequence[Mapping]) -> pd.DataFrame:
    """Return a row for each claim and record: what is missing, the units, the power, and what is wrong with them.

    `supported if null` and `supported if expected` are shares of simulated repeats of the record's study, computed
    anew from its units (see `claims.power`). `faults` makes a claim fail the audit: a declaration that is not whole, a
    record without units, more false alarms than 5 %. `notes` says where a rule could hardly be met, or hardly missed.
    """
    rows = []
    for claim in CLAIMS.values():
        of_claim = [record for record in records if record["claim"] == claim.id]
        faults = [f"not declared: {', '.join(claim.missing)}"] if claim.missing else []
        for record in of_claim or [None]:
            row = {"claim": claim.id, "model": record["model"] if record else "–"}
            rows.append(
                row | (_of_record(claim, record, faults) if record else {"faults": faults, "notes": ["not run"]})
            )
    columns = ["claim", "model", "n", "supported if null", "supported if expected", "contradicted if null"]
    return pd.DataFrame(rows, columns=[*columns, "faults", "notes"])


def _of_record(claim: Claim, record: Mapping, faults: Sequence[str]) -> dict[str, object]:
    estimate = estimate_of(record)
    row: dict[str, object] = {"n": estimate.n}
    if not (found := claims.power(claim, estimate)):
        if estimate.sample or estimate.n < 2:
            return row | {"faults": faults, "notes": ["one unit, or units that are all alike: its power is not known"]}
        return row | {"faults": [*faults, "no units are recorded"], "notes": []}
    (alarms, refuted), (reached, _) = found["null"], found["expected"]
    at_border = found["threshold"][0]
    row |= {"supported if null": alarms, "supported if expected": reached, "contradicted if null": refuted}
    wrong = [f"{alarms:.0%} false alarms"] if alarms > ALARMS else []
    few = estimate.n < claim.min_n
    notes = [f"fewer than {claim.min_n} {claim.units}, so always inconclusive"] if few else []
    if at_border > ALARMS:
        notes.append(f"at the border itself {at_border:.0%} of repeats would support it, and not 2.5 %")
    if not few and reached < POWER:
        notes.append(f"would miss an effect of {claim.expected:g} in {1 - reached:.0%} of repeats")
    if not few and refuted < POWER:
        notes.append(f"would not contradict a value of {claim.null:g} in {1 - refuted:.0%} of repeats")
    return row | {"faults": [*faults, *wrong], "notes": notes}


def multiplicity(records: Sequence[Mapping]) -> dict[str, float]:
    """Return what the number of verdicts does to them: counts of `verdicts`, `decided`, `by chance` and `surviving`.

    `by chance` is how many of that many verdicts would be decided wrongly, on either side, if every true value lay at
    its threshold (5 % of them). `surviving` are the decided ones that stay below 0.05 in Holm's correction over all
    decided verdicts; their p values are of a normal distribution as wide as the interval, against the threshold, or of
    a sign test where n units that are all alike leave the interval without width: 2^(1 − n).
    """
    judged = [record for record in records if not CLAIMS[record["claim"]].check]
    return {
        "verdicts": len(judged),
        "decided": sum(record["verdict"] != "inconclusive" for record in judged),
        "by chance": 0.05 * len(judged),
        "surviving": len(surviving(judged)),
    }


def surviving(records: Sequence[Mapping]) -> list[Mapping]:
    """Return the records of claims, checks apart, whose decided verdict survives Holm's correction over all decided."""
    judged = [record for record in records if not CLAIMS[record["claim"]].check]
    decided = [record for record in judged if record["verdict"] != "inconclusive"]
    p_values = [_p_value(CLAIMS[record["claim"]], estimate_of(record)) for record in decided]
    return [record for record, p in zip(decided, stats.holm(p_values), strict=True) if p < 0.05]


def _p_value(claim: Claim, estimate: Estimate) -> float:
    """Return the two-sided p of a value at the threshold, the nearer of the two where the claim has two."""
    borders = [claim.threshold] if claim.kind == "above" else [claim.threshold, -claim.threshold]
    if not math.isfinite(estimate.high - estimate.low):
        return 1.0
    error = (estimate.high - estimate.low) / (2 * norm.ppf(0.975))
    gap = min(abs(estimate.value - border) for border in borders)
    return float(2 * norm.sf(gap / error)) if error else 2.0 ** (1 - estimate.n)
