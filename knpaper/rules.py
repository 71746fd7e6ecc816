"""The claims of the book, each declared once with the rule of its verdict, in data/claims.toml.

A rule speaks about the interval of one number, the metric, and is fixed before the number is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from knpaper import resources
from knpaper.stats import Estimate

VERDICTS = ("supported", "contradicted", "inconclusive")


@dataclass(frozen=True)
class Claim:
    """A claim and its rule.

    `kind` "above": supported if the whole interval lies above `threshold`, contradicted if it lies below. "within":
    supported if the whole interval lies within ±`threshold` of zero, contradicted if it lies outside on one side.
    Otherwise, and with fewer than `min_n` independent units, inconclusive.
    """

    id: str
    chapter: str
    statement: str
    section: str
    metric: str
    kind: str
    threshold: float
    min_n: int

    @property
    def rule(self) -> str:
        """The rule in words."""
        if self.kind == "above":
            yes, no = f"above {self.threshold:g}", f"below {self.threshold:g}"
        else:
            yes, no = f"within ±{self.threshold:g}", f"outside ±{self.threshold:g}, on one side"
        return (
            f"supported if the whole 95 % interval lies {yes}, contradicted if it lies {no}, "
            f"otherwise (or with n < {self.min_n}) inconclusive"
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


CLAIMS = {claim_id: Claim(claim_id, **fields) for claim_id, fields in resources.toml("claims.toml").items()}
