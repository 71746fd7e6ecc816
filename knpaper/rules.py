"""The claims of the book, each declared once with the rule of its verdict, in data/claims.toml.

A rule speaks about the interval of one number, the metric, and is fixed before the number is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from knpaper import resources
from knpaper.stats import Estimate

VERDICTS = ("supported", "contradicted", "inconclusive")
SIDES = ("the thesis", "the paper", "neither")
PLURALS = {"phenomenon": "phenomena", "pair of edits": "pairs of edits"}  # of units, where it is no s at the end
CHECKED = {"supported": "passed", "contradicted": "failed", "inconclusive": "undecided"}  # what a check is said to be


@dataclass(frozen=True)
class Claim:
    """A claim and its rule.

    `kind` "above": supported if the whole interval lies above `threshold`, contradicted if it lies below. "within":
    supported if the whole interval lies within ±`threshold` of zero, contradicted if it lies outside on one side.
    Otherwise, and with fewer than `min_n` independent units, inconclusive. So the threshold is the smallest effect that
    matters; `smallest` says why. `unit` was treated and is resampled; `control` is the null in words and `null` the
    metric where it holds; `expected` is the metric that a run should not miss. `thesis` and `paper` are the verdicts
    that the two expect, "" for none; where neither expects anything, `neutral` says why. Metric and rule were `fixed`
    in a commit before their number was known, or the claim is `exploratory`, for a reason. A `check` that an edit took
    is no claim and speaks for nobody. What follows from an edit that was not made is not known: a claim that `needs` a
    check is void where that failed (`void`).
    """

    id: str
    chapter: str
    statement: str
    section: str
    metric: str
    kind: str
    threshold: float
    min_n: int
    unit: str = ""
    control: str = ""
    null: float | None = None
    expected: float | None = None
    smallest: str = ""
    thesis: str = ""
    paper: str = ""
    fixed: str = ""
    exploratory: str = ""
    check: bool = False
    needs: str = ""  # names of checks, apart by blanks
    neutral: str = ""

    @property
    def units(self) -> str:
        """What is counted, in the plural."""
        return PLURALS.get(self.unit) or f"{self.unit or 'unit'}s".replace(" or ", "s or ")

    @property
    def border(self) -> str:
        """The smallest effect that matters, in short: `> 0.5`, `within ±0.1`."""
        return f"> {self.threshold:g}" if self.kind == "above" else f"within ±{self.threshold:g}"

    @property
    def rule(self) -> str:
        """The rule in words."""
        if self.kind == "above":
            yes, no = f"above {self.threshold:g}", f"below {self.threshold:g}"
        else:
            yes, no = f"within ±{self.threshold:g}", f"outside ±{self.threshold:g}, on one side"
        return (
            f"supported if the whole 95 % interval lies {yes}, contradicted if it lies {no}, "
            f"otherwise (or with fewer than {self.min_n} {self.units}) inconclusive"
        )

    def verdict(self, estimate: Estimate) -> str:
        """`supported`, `contradicted` or `inconclusive`. Raises ValueError for an estimate that is not a number."""
        value, low, high, n = estimate
        if any(map(math.isnan, estimate)) or math.isinf(value) or low == math.inf or high == -math.inf:
            raise ValueError(f"claim {self.id!r}: the estimate {tuple(estimate)} is not a number with its interval")
        if n < self.min_n:
            return "inconclusive"
        t = self.threshold
        yes, no = (low > t, high < t) if self.kind == "above" else (low > -t and high < t, low > t or high < -t)
        return "supported" if yes else "contradicted" if no else "inconclusive"

    def side(self, verdict: str) -> str:
        """Return for whom a verdict speaks: whoever alone expected it, of the thesis and the paper; else `neither`."""
        expecting = [name for name in ("thesis", "paper") if getattr(self, name) == verdict]
        return f"the {expecting[0]}" if len(expecting) == 1 and not self.check else "neither"

    def word(self, verdict: str) -> str:
        """Return a verdict as readers see it: of a check of the manipulation `passed`, `failed` or `undecided`."""
        return CHECKED[verdict] if self.check else verdict

    @property
    def when(self) -> str:
        """When metric and rule were chosen, in words; "" where the declaration does not say."""
        if self.exploratory:
            return f"exploratory: {self.exploratory}"
        return f"before its number was known, in commit {self.fixed}" if self.fixed else ""

    @property
    def missing(self) -> list[str]:
        """What the declaration does not say: names of fields."""
        empty = [name for name in ("unit", "control", "smallest") if not getattr(self, name)]
        empty += [name for name in ("null", "expected") if getattr(self, name) is None]
        if bool(self.fixed) == bool(self.exploratory):
            empty.append("fixed or exploratory")
        if not self.check and not (self.thesis or self.paper or self.neutral):
            empty.append("thesis or paper")
        return empty


def void(records: Iterable[Mapping]) -> set[tuple[str, str, str]]:
    """Return those of the records whose claim needs a check that failed on the same model and data: claim, model and
    source of each."""
    verdicts = {(record["claim"], record["model"], record["source"]): record["verdict"] for record in records}
    failed = {key for key, verdict in verdicts.items() if verdict == "contradicted"}
    return {key for key in verdicts if any((check, *key[1:]) in failed for check in CLAIMS[key[0]].needs.split())}


CLAIMS = {claim_id: Claim(claim_id, **fields) for claim_id, fields in resources.toml("claims.toml").items()}
WITHDRAWN = resources.toml("withdrawn.toml")  # by id: what a claim said, and why it is one no more
