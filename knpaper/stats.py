"""Estimates with intervals: thin wrappers over SciPy and statsmodels, in the one form that records and tables use."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from kncore import checks

RESAMPLES = 5000
FEW = 10  # units: with fewer a bootstrap's interval is too narrow, and Student's is taken


class Sample(NamedTuple):
    """The units behind an estimate: a value each, in one group ("mean", "share") or in two ("difference").

    Of a statistic that is no mean they are the jackknife's pseudo-values, n·T − (n − 1)·T without the unit, whose mean
    is near T and whose spread is that of T.
    """

    kind: str
    groups: tuple[np.ndarray, ...]


class Estimate(namedtuple("Estimate", "value low high n")):
    """A value with its 95 % interval and the number of independent units behind it.

    The ends may be infinite; of no units (n = 0) all three may be nan. Raises ValueError for anything else that is not
    a number, an n that is not a whole number from 0 on, and an interval whose lower end is above its upper one. A value
    may lie outside: percentiles of a bootstrap are not centred on it. `sample` has the units that it was made of, where
    they are known; it takes no part in comparisons.
    """

    sample: Sample | None

    def __new__(cls, value: float, low: float, high: float, n: int, sample: Sample | None = None) -> Estimate:
        if isinstance(n, float | np.floating) and float(n).is_integer():
            n = int(n)  # a column of counts that pandas holds as floats
        n = checks.whole(n, "n of an estimate", 0)
        value, low, high = (float(x) for x in checks.reals([value, low, high], "estimate"))
        nothing = n == 0 and all(map(math.isnan, (value, low, high)))
        if not nothing and (not math.isfinite(value) or math.isnan(low) or math.isnan(high)):
            raise ValueError(f"the estimate {(value, low, high)} of {n} units is not a number with its interval")
        if low > high:
            raise ValueError(f"the interval of an estimate goes from {low:g} up to {high:g}; its ends are exchanged")
        made = super().__new__(cls, value, low, high, n)
        made.sample = sample
        return made

    @classmethod
    def _make(cls, fields) -> Estimate:
        return cls(*fields)

    def _replace(self, **fields) -> Estimate:
        made = super()._replace(**fields)
        made.sample = self.sample
        return made

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}], n = {self.n}"


class Paired(NamedTuple):
    """A paired comparison: mean difference, its size in standard deviations, and two two-sided p values."""

    difference: Estimate
    effect: float
    p_t: float
    p_wilcoxon: float


def cluster_means(values: Sequence[float], clusters: Sequence | None = None) -> np.ndarray:
    """Return one mean per cluster (per value where there are no clusters): what an interval may take as independent.

    Raises ValueError for values that are no list of finite numbers, and where a value has no cluster.
    """
    return _means(checks.reals(values), _labels(clusters))


def _means(values: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError(f"{(~np.isfinite(values)).sum()} of {len(values)} values are not finite; drop or explain them")
    if labels is None:
        return values
    if len(labels) != len(values):
        raise ValueError(f"{len(values)} values but {len(labels)} clusters")
    _, where = np.unique(labels, return_inverse=True)
    return np.bincount(where, values) / np.bincount(where)


def _labels(clusters: Sequence | None) -> np.ndarray | None:
    """Return the names of clusters as text, in the order of the values."""
    if clusters is None:
        return None
    if isinstance(clusters, str | bytes | Mapping) or not isinstance(clusters, Iterable):
        raise ValueError(f"clusters are a list of names, one for each value; got {clusters!r:.80}")
    labels = [label.item() if hasattr(label, "item") else label for label in clusters]
    names: dict[Hashable, str] = {}
    for label in labels:
        if label is None or not isinstance(label, Hashable) or pd.isna(label) is True:
            raise ValueError(f"a cluster has the name {label!r:.80}; each value must belong to one, or be dropped")
        names.setdefault(label, str(label))  # 1 and 1.0 are one cluster
    if len(set(names.values())) < len(names):
        raise ValueError("two clusters have names that read alike, such as 1 and '1'; give names of one type")
    return np.asarray([names[label] for label in labels], dtype=str)


def _spread(units: np.ndarray) -> np.ndarray:
    """Return the units, if their squares and cubes are numbers too."""
    largest = np.abs(units).max()
    if largest > 1e100 or 0 < largest < 1e-100:
        raise ValueError(f"values as large as {largest:g} have no spread in floating point; give them in another unit")
    return units


def mean(values: Sequence[float], clusters: Sequence | None = None, seed: int = 0) -> Estimate:
    """Return the mean over clusters with a bootstrap interval (BCa; clusters are resampled, not values).

    Of fewer than ten clusters the interval is Student's.
    """
    units = _spread(cluster_means(values, clusters))
    limits = _interval((units,), np.mean, seed)
    return Estimate(units.mean(), *limits, len(units), Sample("mean", (units,)))


def difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: tuple[Sequence, Sequence] | None = None,
    seed: int = 0,
) -> Estimate:
    """Return the mean of `first` minus that of `second`, independent groups, with a bootstrap interval.

    n is the smaller group; `clusters` are those of the first group and those of the second. With fewer than ten in a
    group the interval is Student's, for unequal variances (Welch).
    """
    if clusters is not None and len(clusters) != 2:
        raise ValueError(f"clusters are two lists, one for each group; got {len(clusters)} of them")
    a, b = map(cluster_means, (first, second), (None, None) if clusters is None else clusters)

    def gap(a, b, axis=-1):
        return np.mean(a, axis=axis) - np.mean(b, axis=axis)

    n = min(len(a), len(b))
    limits = _interval((a, b), gap, seed)
    return Estimate(gap(a, b), *limits, n, Sample("difference", (a, b)))


def share(flags: Sequence[bool], clusters: Sequence | None = None) -> Estimate:
    """Return the share of true among yes-or-no outcomes, with Wilson's interval; n counts clusters, if there are any.

    Clusters weigh alike, and each counts as one outcome, so the interval is rather too wide than too narrow. Raises
    ValueError for no outcomes, and for one that is neither true nor false.
    """
    flags = checks.reals(flags, "outcomes")
    if not np.isin(flags, (0, 1)).all():
        raise ValueError(f"expected outcomes that are true or false, got {flags[~np.isin(flags, (0, 1))][0]}")
    units = _means(flags, _labels(clusters))
    limits = proportion_confint(units.sum(), len(units), method="wilson")
    return Estimate(units.mean(), *limits, len(units), Sample("share", (units,)))


def runs(values: Sequence[float]) -> Estimate:
    """Return the mean over a few independent runs, such as training seeds, with Student's interval; n is runs.

    Runs that agree to the digit give an interval without width. Raises ValueError for fewer than two.
    """
    units = _spread(cluster_means(values))
    if len(units) < 2:
        raise ValueError(f"{len(units)} run has no spread; an interval over runs needs two or more")
    return Estimate(units.mean(), *_student(units.mean(), [units]), len(units), Sample("mean", (units,)))


def paired(before: Sequence[float], after: Sequence[float], clusters: Sequence | None = None, seed: int = 0) -> Paired:
    """Return what changed from `before` to `after`, item by item; the units are clusters where there are any.

    `difference` is the mean of after − before with its interval as in `mean`; `effect` is Cohen's d_z, that mean over
    the standard deviation of the units' differences (ddof 1). The p values are of Student's paired t test and of
    Wilcoxon's signed-rank test, which drops units without a difference and cannot fall below 2^(1−n).

    Spread below rounding error (1e-12 of the largest value) counts as none. Where nothing differs, the effect is 0 and
    both p are 1. Where all units differ by the same amount, the effect is infinite and p_t is 0, the limit of t; p of
    Wilcoxon is what n allows. With one unit the effect is undefined (nan) and both p are 1.
    """
    first, second = map(_spread, _pair(before, after, clusters))
    units = second - first
    noise = 1e-12 * max(np.abs(first).max(), np.abs(second).max())
    if np.ptp(units) <= noise:
        units = np.full(len(units), units.mean() if abs(units.mean()) > noise else 0.0)
    gap = mean(units, seed=seed)
    if len(units) < 2:
        return Paired(gap, math.nan, 1.0, 1.0)
    if not units.any():
        return Paired(gap, 0.0, 1.0, 1.0)
    p_wilcoxon = float(stats.wilcoxon(units).pvalue)
    if not np.ptp(units):
        return Paired(gap, math.copysign(math.inf, gap.value), 0.0, p_wilcoxon)
    return Paired(gap, gap.value / float(units.std(ddof=1)), float(stats.ttest_1samp(units, 0).pvalue), p_wilcoxon)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values of a family of tests, in their order: at most a share α of families has a false one ≤ α.

    Raises ValueError for p values that are not from 0 to 1.
    """
    p_values = checks.reals(p_values, "p values", least=0)
    wrong = p_values[~((p_values >= 0) & (p_values <= 1))]
    if len(wrong):
        raise ValueError(f"expected p values from 0 to 1, got {wrong.tolist()}")
    return multipletests(p_values, method="holm")[1].tolist() if len(p_values) else []


def family(comparisons: Mapping[str, tuple], seed: int = 0) -> pd.DataFrame:
    """Return the table of a family of paired tests; each comparison is (before, after) or (before, after, clusters)."""
    return table({name: paired(*values, seed=seed) for name, values in comparisons.items()})


def table(tests: Mapping[str, Paired]) -> pd.DataFrame:
    """Return one row per test of a family, as text; Holm's correction is over all rows, by Wilcoxon's p values."""
    corrected = holm([test.p_wilcoxon for test in tests.values()])
    rows = [
        (
            name,
            test.difference.n,
            _signed(test.difference),
            "–" if math.isnan(test.effect) else f"{test.effect:+.2f}",
            *("< 0.001" if p < 0.001 else f"{p:.3f}" for p in (test.p_t, test.p_wilcoxon, p_holm)),
        )
        for (name, test), p_holm in zip(tests.items(), corrected, strict=True)
    ]
    effects = ["difference [95 %]", "effect size d"]
    return pd.DataFrame(rows, columns=["comparison", "n", *effects, "p (t)", "p (Wilcoxon)", "p (Wilcoxon, Holm)"])


def relative_change(
    before: Sequence[float], after: Sequence[float], clusters: Sequence | None = None, seed: int = 0
) -> Estimate:
    """Return the paper's edit effect, (B − A)/min(A, B) of means before and after: +1 is doubled, −1 halved.

    The bootstrap (percentile) resamples pairs, or clusters of pairs; a limit is infinite where a resampled mean is 0.
    Raises ValueError for negative values, and where one side is 0 throughout.
    """
    before, after = checks.reals(before), checks.reals(after)
    first, second = _pair(before, after, clusters)
    for name, values, units in (("before", before, first), ("after", after, second)):
        if (values < 0).any():
            raise ValueError(f"values {name} reach down to {values.min():g}; a relative change needs probabilities")
        if not units.any():
            raise ValueError(f"all values {name} are 0, so the relative change is unbounded; compare differences")
    tiny = np.finfo(float).tiny  # keeps the logarithm of a resampled 0 finite and is lost in any other mean

    def log_ratio(a, b, axis=-1):
        return np.log(np.mean(b, axis=axis) + tiny) - np.log(np.mean(a, axis=axis) + tiny)

    def change(log):
        return math.copysign(math.expm1(abs(log)) if abs(log) < 600 else math.inf, log)

    value = change(float(log_ratio(first, second)))
    if math.isinf(value):
        raise ValueError("one mean is more than e^600 times the other, beyond floating point; compare differences")
    limits = _bootstrap((first, second), log_ratio, seed, jointly=True)
    return Estimate(value, *map(change, limits), len(first))


def _over(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the mean of `a` over that of `b`, infinite where the latter is 0."""
    over, under = np.mean(a, axis=axis), np.mean(b, axis=axis)
    return np.divide(over, under, out=np.full_like(under, math.inf), where=under != 0)


def ratio(
    numerator: Sequence[float], denominator: Sequence[float], clusters: Sequence | None = None, seed: int = 0
) -> Estimate:
    """Return the mean of `numerator` over that of `denominator`, with a bootstrap interval (percentile; pairs or
    clusters of pairs are resampled).

    The interval is the whole line where that of the denominator's mean reaches 0. Raises ValueError if that mean is 0.
    """
    top, bottom = _pair(numerator, denominator, clusters)
    if not bottom.mean():
        raise ValueError("the denominator's mean is 0, so there is no ratio; compare differences")

    def below(a, b, axis=-1):
        return np.mean(b, axis=axis)

    low, high = _bootstrap((top, bottom), below, seed, jointly=True)
    near_zero = low <= 0 <= high
    limits = (-math.inf, math.inf) if near_zero else _bootstrap((top, bottom), _over, seed, jointly=True)
    return Estimate(_over(top, bottom), *limits, len(top), _jackknife((top, bottom), _over, jointly=True))


def relative_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Estimate:
    """Return the mean of `first` over that of `second`, minus 1, of independent groups (bootstrap, percentile).

    n is the smaller group. Where the mean of `second` may be 0 the interval is the whole line; ValueError if it is.
    """
    a, b = cluster_means(first), cluster_means(second)
    base = mean(second, seed=seed)
    if not base.value:
        raise ValueError("the mean of the second group is 0, so nothing is relative to it; compare differences")

    def excess(a, b, axis=-1):
        return _over(a, b, axis) - 1

    near_zero = base.low <= 0 <= base.high
    limits = (-math.inf, math.inf) if near_zero else _bootstrap((a, b), excess, seed)
    return Estimate(excess(a, b), *limits, min(len(a), len(b)), _jackknife((a, b), excess))


def separation(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Estimate:
    """Return how often a value of `first` exceeds one of `second` (ties count half); bootstrap interval (percentile).

    The area under the ROC curve, U / (n₁ n₂) of Mann and Whitney: 0.5 if the groups are alike, 1 if `first` is always
    larger. n is the smaller group.
    """
    a, b = cluster_means(first), cluster_means(second)

    def area(a, b, axis=-1):
        gaps = np.sign(a[..., :, None] - b[..., None, :])
        return (gaps.mean(axis=(-2, -1)) + 1) / 2

    limits = _bootstrap((a, b), area, seed)
    return Estimate(float(area(a, b)), *limits, min(len(a), len(b)), _jackknife((a, b), area))


def rank_correlation(
    first: Sequence[float], second: Sequence[float], clusters: Sequence | None = None, seed: int = 0
) -> Estimate:
    """Spearman's rank correlation of pairs, with a bootstrap interval (percentile; pairs are resampled).

    With clusters, of their means. A resample in which one side is the same throughout counts as 0. Raises ValueError
    where that is so of all pairs.
    """
    a, b = _pair(first, second, clusters)
    for name, units in (("first", a), ("second", b)):
        if not np.ptp(units):
            raise ValueError(f"the {name} values are all {units[0]:g}, so they have no ranks to correlate")

    def spearman(a, b, axis=-1):
        x, y = (stats.rankdata(units, axis=axis) - (units.shape[axis] + 1) / 2 for units in (a, b))
        size = np.sqrt((x**2).sum(axis) * (y**2).sum(axis))
        return np.divide((x * y).sum(axis), size, out=np.zeros_like(size), where=size > 0)

    limits = _bootstrap((a, b), spearman, seed, jointly=True)
    return Estimate(spearman(a, b), *limits, len(a), _jackknife((a, b), spearman, jointly=True))


def regression(
    outcome: Sequence[float],
    predictors: Mapping[str, Sequence[float]],
    standardise: bool = True,
    clusters: Sequence | None = None,
) -> dict[str, Estimate]:
    """Slopes of a least-squares fit with intercept; n is the number of rows, or of clusters.

    Intervals are Student's t with HC3 standard errors, or with cluster-robust ones (df: clusters − 1). With
    `standardise`, the outcome and every predictor but those of 0 and 1 only are z-scored (ddof 1): a slope is in
    standard deviations of the outcome per standard deviation, or from 0 to 1.

    Raises ValueError for columns of different length, values that are not finite, constant or collinear columns, fewer
    units than predictors + 2, and a slope that no unit but one tells anything about.
    """
    if not isinstance(predictors, Mapping):
        raise ValueError(f"predictors are columns by name, a mapping; got {type(predictors).__name__}")
    outcome, labels = checks.reals(outcome), _labels(clusters)
    units = len(_means(outcome, labels))
    if not predictors or units < len(predictors) + 2:
        least = f"at least one predictor and {len(predictors) + 2} rows (clusters, where given)"
        raise ValueError(f"{units} rows (clusters) for {len(predictors)} predictors; expected {least}")
    columns = {"the outcome": outcome, **{f"predictor {name!r}": values for name, values in predictors.items()}}
    for label, values in columns.items():
        columns[label] = values = checks.reals(values, label)
        if len(values) != len(outcome):
            raise ValueError(f"{label} has {len(values)} values, but the outcome {len(outcome)}")
        if not np.isfinite(values).all():
            raise ValueError(f"{label}: {(~np.isfinite(values)).sum()} values are not finite; drop or explain them")
        if not np.ptp(values):
            raise ValueError(f"{label} is constant ({values[0]:g}), so it has no slope; leave it out")
        _spread(values)

    scores = np.column_stack([stats.zscore(values, ddof=1) for values in columns.values()])
    if np.linalg.matrix_rank(scores[:, 1:]) < len(predictors):
        raise ValueError(f"predictors {', '.join(predictors)} are collinear, so slopes are not unique; leave one out")
    ones = np.ones(len(scores))
    _, groups = np.unique(range(len(scores)) if labels is None else labels, return_inverse=True)
    # A unit with leverage 1 is fitted exactly: its residual, and with it the standard error, says nothing.
    basis = np.linalg.qr(np.column_stack([ones, scores[:, 1:]])).Q
    leverage = np.zeros((units, basis.shape[1], basis.shape[1]))
    np.add.at(leverage, groups, basis[:, :, None] * basis[:, None, :])
    if (np.linalg.eigvalsh(leverage) > 1 - 1e-9).any():
        raise ValueError("a slope rests on one row (cluster) alone, so its spread is unknown; leave that predictor out")

    values = np.column_stack(list(columns.values()))
    if standardise:
        binary = ((values == 0) | (values == 1)).all(axis=0)
        binary[0] = False
        values = np.where(binary, values, scores)
    robust = {"cov_type": "HC3"} if clusters is None else {"cov_type": "cluster", "cov_kwds": {"groups": groups}}
    fit = OLS(values[:, 0], np.column_stack([ones, values[:, 1:]])).fit(use_t=True, **robust)
    slopes = np.column_stack([fit.params, fit.conf_int()])[1:].tolist()
    fixed = np.column_stack([ones, values[:, 1:]])
    left = [np.linalg.lstsq(fixed[groups != unit], values[groups != unit, 0])[0] for unit in range(units)]
    pseudo = (units * fit.params - (units - 1) * np.array(left))[:, 1:].T
    return {
        name: Estimate(*slope, units, Sample("mean", (each,)))
        for name, slope, each in zip(predictors, slopes, pseudo, strict=True)
    }


def repeats(sample: Sample, truth: float, count: int = 400, seed: int = 0) -> list[Estimate]:
    """Return what `count` repeats of a study would estimate if the true value were `truth`.

    Their units are drawn from those of the sample, with its spread about the truth; where a group has fewer than ten,
    which tell little of their distribution, from a normal one of the same spread; the outcomes of a share true or
    false, which is the widest that a share can spread. Intervals are as in `mean`, `difference` and `share`,
    but where these take a bootstrap (BCa) this one is by percentiles of 400 resamples. Empty where a group has fewer
    than two units.
    """
    rng = np.random.default_rng(checks.whole(seed, "seed", 0))
    if any(len(group) < 2 for group in sample.groups):
        return []
    n = min(map(len, sample.groups))
    if sample.kind == "share":
        drawn = rng.binomial(n, min(max(truth, 0.0), 1.0), count)
        limits = proportion_confint(drawn, np.full(count, n), method="wilson")
        return [Estimate(*row, n) for row in zip(drawn / n, *limits, strict=True)]
    drawn, resampled = [], []
    for group in sample.groups:
        size = len(group)
        if n < FEW:
            drawn.append(rng.normal(0, group.std(ddof=1), (count, size)))
            continue
        centred = (group - group.mean()) * math.sqrt(size / (size - 1))
        drawn.append(rng.choice(centred, (count, size)))
        resampled.append(drawn[-1] @ rng.multinomial(size, np.full(size, 1 / size), 400).T / size)
    sign = (1, -1)
    values = truth + sum(s * units.mean(1) for s, units in zip(sign, drawn, strict=False))
    if n < FEW:
        rows = zip(values, *drawn, strict=True)
        return [Estimate(value, *_student(value, units), n) for value, *units in rows]
    spread = truth + sum(s * means for s, means in zip(sign, resampled, strict=False))
    return [Estimate(*row, n) for row in zip(values, *np.percentile(spread, [2.5, 97.5], axis=1), strict=True)]


def jackknife(estimate: Estimate) -> Estimate:
    """Return an estimate with Student's interval of its units in the place of its own.

    Of a statistic that is no mean these are the jackknife's pseudo-values. No random number takes part, so that an
    interval that ends near a threshold is on the same side of it for every seed. Raises ValueError where the units are
    not known, or are of two groups.
    """
    if estimate.sample is None or len(estimate.sample.groups) != 1:
        raise ValueError(f"the units behind {estimate} are not known, or are two groups; there is nothing to leave out")
    low, high = _student(estimate.value, estimate.sample.groups)
    return Estimate(estimate.value, low, high, estimate.n, estimate.sample)


def _jackknife(groups: tuple[np.ndarray, ...], statistic, jointly: bool = False) -> Sample | None:
    """Return the pseudo-values of a statistic of two groups, or of pairs; None where one is not finite."""
    value = float(statistic(*groups))
    if jointly:
        n = len(groups[0])
        left = [float(statistic(*(np.delete(group, i) for group in groups))) for i in range(n)] if n > 2 else []
        pseudo = [n * value - (n - 1) * np.array(left)]
    else:
        pseudo = []
        for which, group in enumerate(groups):
            n, pair = len(group), list(groups)
            left = []
            for i in range(n if n > 1 else 0):
                pair[which] = np.delete(group, i)
                left.append(float(statistic(*pair)))
            pseudo.append(n * value - (n - 1) * np.array(left))
        pseudo[1] = value - pseudo[1]
    if not all(len(units) and np.isfinite(units).all() for units in pseudo):
        return None
    return Sample("mean" if jointly else "difference", tuple(pseudo))


def _interval(groups: tuple[np.ndarray, ...], statistic, seed: int) -> tuple[float, float]:
    """Return Student's interval of a mean or a difference where a group is small, else the bootstrap's."""
    if min(map(len, groups)) >= FEW:
        return _bootstrap(groups, statistic, seed)
    checks.whole(seed, "seed", 0)
    return _student(float(statistic(*groups)), groups)


def _student(value: float, groups: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return Student's interval of a mean, or Welch's of a difference of two; endless where a group has one unit."""
    if any(len(group) < 2 for group in groups):
        return -math.inf, math.inf
    parts = np.array([group.var(ddof=1) / len(group) for group in groups])
    if not parts.sum():
        return float(value), float(value)
    degrees = parts.sum() ** 2 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, groups, strict=True))
    half = float(stats.t.ppf(0.975, degrees) * math.sqrt(parts.sum()))
    return value - half, value + half


def _pair(first: Sequence[float], second: Sequence[float], clusters: Sequence | None) -> tuple[np.ndarray, np.ndarray]:
    a, b, labels = checks.reals(first), checks.reals(second), _labels(clusters)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values cannot be paired with {len(b)}; expected two of every item")
    return _means(a, labels), _means(b, labels)


def _signed(estimate: Estimate) -> str:
    """Return two decimals, and more where the whole interval is so near to 0 that they would show none of it."""
    size = max((abs(x) for x in estimate[:3] if x and math.isfinite(x)), default=1)
    digits = max(2, 1 - math.floor(math.log10(size)))
    return f"{estimate.value:+.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _bootstrap(groups: tuple[np.ndarray, ...], statistic, seed: int, jointly: bool = False) -> tuple[float, float]:
    """Limits of the 95 % interval; groups are resampled each on its own, or `jointly` where their rows are pairs."""
    seed = checks.whole(seed, "seed", 0)
    if any(len(group) < 2 for group in groups):
        return float("-inf"), float("inf")  # one unit says nothing about the spread
    if all(np.ptp(group) == 0 for group in groups):
        only = float(statistic(*groups))
        return only, only
    method = "BCa" if len(groups) == 1 else "percentile"
    rng = np.random.default_rng(seed)
    settings = {"n_resamples": RESAMPLES, "method": method, "paired": jointly, "vectorized": True, "batch": 500}
    with np.errstate(invalid="ignore"):  # scipy's standard error, unused here, is nan where a resample is infinite
        found = stats.bootstrap(groups, statistic, rng=rng, **settings)
    return tuple(map(float, found.confidence_interval))
