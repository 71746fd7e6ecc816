"""Estimates with intervals: thin wrappers over SciPy and statsmodels, in the one form that records and tables use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

RESAMPLES = 5000


class Estimate(NamedTuple):
    """A value with its 95 % interval and the number of independent units behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}], n = {self.n}"


def cluster_means(values: Sequence[float], clusters: Sequence | None = None) -> np.ndarray:
    """One mean per cluster (per value where there are no clusters): what an interval may take as independent."""
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected a list of numbers, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{(~np.isfinite(values)).sum()} of {len(values)} values are not finite; drop or explain them")
    if clusters is None:
        return values
    if len(clusters) != len(values):
        raise ValueError(f"{len(values)} values but {len(clusters)} clusters")
    _, where = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    return np.bincount(where, values) / np.bincount(where)


def mean(values: Sequence[float], clusters: Sequence | None = None, seed: int = 0) -> Estimate:
    """Mean over clusters with a bootstrap interval (BCa; clusters are resampled, not values)."""
    units = cluster_means(values, clusters)
    return Estimate(float(units.mean()), *_bootstrap((units,), np.mean, seed), len(units))


def difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: tuple[Sequence, Sequence] | None = None,
    seed: int = 0,
) -> Estimate:
    """Mean of `first` minus mean of `second`, independent groups, with a bootstrap interval; n is the smaller group."""
    one, two = (cluster_means(v, c) for v, c in zip((first, second), clusters or (None, None), strict=True))

    def gap(a, b, axis=-1):
        return np.mean(a, axis=axis) - np.mean(b, axis=axis)

    return Estimate(float(gap(one, two)), *_bootstrap((one, two), gap, seed), min(len(one), len(two)))


def share(flags: Sequence[bool]) -> Estimate:
    """Share of true among independent yes-or-no outcomes, with Wilson's interval."""
    flags = np.asarray(flags, dtype=bool)
    if not len(flags):
        raise ValueError("no outcomes to take a share of")
    low, high = proportion_confint(flags.sum(), len(flags), method="wilson")
    return Estimate(float(flags.mean()), float(low), float(high), len(flags))


def _bootstrap(groups: tuple[np.ndarray, ...], statistic, seed: int) -> tuple[float, float]:
    if any(len(group) < 2 for group in groups):
        return float("-inf"), float("inf")  # one unit says nothing about the spread
    if all(np.ptp(group) == 0 for group in groups):
        only = float(statistic(*groups))
        return only, only
    method = "BCa" if len(groups) == 1 else "percentile"
    rng = np.random.default_rng(seed)
    found = stats.bootstrap(groups, statistic, n_resamples=RESAMPLES, method=method, rng=rng, vectorized=True)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
