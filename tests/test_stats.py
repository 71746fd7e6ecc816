"""Estimates against closed forms, and intervals against what they promise: coverage in simulations."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kncore import stats
from kncore.stats import Estimate

NUMBERS = st.lists(st.floats(-1e3, 1e3).map(lambda x: round(x, 3)), min_size=2, max_size=30)


@pytest.fixture
def quick(monkeypatch):
    """Fewer resamples: simulations repeat the bootstrap hundreds of times."""
    monkeypatch.setattr(stats, "RESAMPLES", 600)


# Values


@settings(deadline=None)
@given(NUMBERS)
def test_the_mean_is_the_mean_inside_its_interval(values):
    found = stats.mean(values)
    assert found.value == pytest.approx(sum(values) / len(values), abs=1e-9)
    assert found.n == len(values)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9


@settings(deadline=None)
@given(NUMBERS, NUMBERS)
def test_the_difference_is_that_of_the_means(one, two):
    found = stats.difference(one, two)
    assert found.value == pytest.approx(sum(one) / len(one) - sum(two) / len(two), abs=1e-9)
    assert found.n == min(len(one), len(two))
    assert found.low - 1e-9 <= found.value <= found.high + 1e-9


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-9, 9), st.sampled_from("abcd")), min_size=2, max_size=20))
def test_cluster_means_weigh_every_cluster_alike(pairs):
    values, clusters = zip(*pairs, strict=True)
    groups = {c: [v for v, other in pairs if other == c] for c in clusters}
    want = [math.fsum(group) / len(group) for _, group in sorted(groups.items())]
    assert stats.cluster_means(values, clusters).tolist() == pytest.approx(want, abs=1e-9)
    found = stats.mean(values, clusters)
    assert (found.value, found.n) == (pytest.approx(np.mean(want), abs=1e-9), len(groups))


def test_the_same_seed_gives_the_same_interval_and_another_one_a_close_one():
    values = np.random.default_rng(0).normal(size=40)
    first, again, other = stats.mean(values), stats.mean(values), stats.mean(values, seed=1)
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)
    assert (other.low, other.high) == pytest.approx((first.low, first.high), abs=0.05)


def test_an_estimate_in_words():
    assert str(Estimate(0.256, -0.1, 1.0, 12)) == "0.26 [-0.10, 1.00], n = 12"


# Intervals


def test_the_interval_of_a_mean_is_as_wide_as_theory_says():
    values = np.random.default_rng(3).normal(5, 2, 400)
    found, half = stats.mean(values), 1.96 * values.std() / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_the_interval_of_a_difference_is_as_wide_as_theory_says():
    rng = np.random.default_rng(4)
    one, two = rng.normal(5, 2, 300), rng.normal(1, 1, 100)
    gap = one.mean() - two.mean()
    half = 1.96 * math.sqrt(one.var() / 300 + two.var() / 100)
    found = stats.difference(one, two)
    assert (found.low, found.high) == pytest.approx((gap - half, gap + half), abs=0.1 * half)


def test_the_interval_of_a_mean_covers_the_truth_in_about_95_percent(quick):
    rng = np.random.default_rng(1)
    found = [stats.mean(rng.normal(3, 2, 40), seed=i) for i in range(300)]
    covered = np.mean([one.low <= 3 <= one.high for one in found])
    assert 0.90 <= covered <= 0.99, covered


def test_the_interval_of_a_difference_excludes_zero_in_about_5_percent_under_the_null(quick):
    rng = np.random.default_rng(2)
    found = [stats.difference(rng.normal(1, 1, 40), rng.normal(1, 1, 40), seed=i) for i in range(300)]
    wrong = np.mean([not one.low <= 0 <= one.high for one in found])
    assert 0.01 <= wrong <= 0.11, wrong
    shifted = [stats.difference(rng.normal(2, 1, 40), rng.normal(1, 1, 40), seed=i) for i in range(50)]
    assert np.mean([one.low > 0 for one in shifted]) > 0.9


def test_values_within_a_cluster_are_not_independent():
    rng = np.random.default_rng(5)
    values, clusters = rng.normal(size=20), np.arange(20)
    once = stats.mean(values, clusters)
    repeated = stats.mean(np.repeat(values, 10), np.repeat(clusters, 10))
    assert tuple(repeated) == pytest.approx(tuple(once), abs=1e-9)
    pretended = stats.mean(np.repeat(values, 10))
    assert pretended.high - pretended.low < 0.5 * (once.high - once.low)
    two = rng.normal(size=20)
    first = stats.difference(values, two, (clusters, clusters))
    again = stats.difference(np.repeat(values, 3), two, (np.repeat(clusters, 3), clusters))
    assert tuple(again) == pytest.approx(tuple(first), abs=1e-9)


def test_clusters_keep_the_coverage_where_values_of_a_cluster_agree(quick):
    rng = np.random.default_rng(6)
    clusters = np.repeat(np.arange(25), 8)
    covered, pretended = [], []
    for i in range(150):
        values = rng.normal(0, 1, 25)[clusters] + rng.normal(0, 0.3, len(clusters))
        found, wrong = stats.mean(values, clusters, seed=i), stats.mean(values, seed=i)
        covered.append(found.low <= 0 <= found.high)
        pretended.append(wrong.low <= 0 <= wrong.high)
    assert np.mean(covered) > 0.86
    assert np.mean(pretended) < 0.7


def test_constants_have_no_spread_and_one_unit_says_nothing_about_it():
    assert stats.mean([0.25] * 9) == (0.25, 0.25, 0.25, 9)
    assert stats.difference([1.0] * 3, [0.5] * 4) == (0.5, 0.5, 0.5, 3)
    assert stats.mean([2.0]) == (2.0, -math.inf, math.inf, 1)
    assert stats.mean([2.0, 4.0], ["a", "a"]) == (3.0, -math.inf, math.inf, 1)
    assert stats.difference([1.0, 2.0], [1.0]) == (0.5, -math.inf, math.inf, 1)


def test_one_constant_group_leaves_the_spread_of_the_other():
    rng = np.random.default_rng(7)
    values = rng.normal(size=200)
    found = stats.difference(values, [1.0] * 5)
    half = 1.96 * values.std() / math.sqrt(200)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


# Shares


def test_wilsons_interval_by_hand():
    """(p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n) with z = 1.959964."""
    assert stats.share([True] * 8 + [False] * 2) == pytest.approx((0.8, 0.490162, 0.943318, 10), abs=1e-5)
    z = 1.959964
    assert stats.share([False] * 20) == pytest.approx((0, 0, z**2 / (20 + z**2), 20), abs=1e-6)
    assert stats.share([True]) == pytest.approx((1, 1 / (1 + z**2), 1, 1), abs=1e-6)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_shares_of_yes_and_no_mirror_each_other(flags):
    yes, no = stats.share(flags), stats.share([not flag for flag in flags])
    assert yes.value == pytest.approx(sum(flags) / len(flags))
    assert (yes.low, yes.high) == pytest.approx((1 - no.high, 1 - no.low), abs=1e-9)
    assert -1e-12 <= yes.low <= yes.value + 1e-12 and yes.value - 1e-12 <= yes.high <= 1 + 1e-12


# Refusals


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_and_counted(bad):
    with pytest.raises(ValueError, match="2 of 3 values are not finite"):
        stats.mean([bad, 1.0, bad])
    with pytest.raises(ValueError, match="1 of 2 values are not finite"):
        stats.difference([1.0, 2.0], [1.0, bad])


def test_empty_lists_tables_and_clusters_of_another_length_are_refused():
    for empty in (stats.mean, stats.share):
        with pytest.raises(ValueError):
            empty([])
    with pytest.raises(ValueError, match=r"list of numbers, got shape \(2, 2\)"):
        stats.mean([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(ValueError, match="3 values but 2 clusters"):
        stats.mean([1.0, 2.0, 3.0], ["a", "b"])
