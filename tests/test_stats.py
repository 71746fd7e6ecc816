"""Estimates against closed forms, and intervals against what they promise: coverage in simulations."""

import gc
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, mannwhitneyu, norm, spearmanr, t, ttest_rel, wilcoxon
from statsmodels.stats.weightstats import DescrStatsW

from knpaper import stats
from knpaper.stats import Estimate

NUMBERS = st.lists(st.floats(-1e3, 1e3).map(lambda x: round(x, 3)), min_size=2, max_size=30)
PAIR = st.tuples(st.integers(-999, 999), st.integers(-999, 999))
PAIRS = st.lists(PAIR, min_size=2, max_size=8) | st.lists(PAIR, min_size=14, max_size=20)
PROBABILITIES = st.lists(st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1)), min_size=2, max_size=20)


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """statsmodels collects garbage at every correction: 0.1 s each, unless what is loaded is left out."""
    gc.freeze()
    yield
    gc.unfreeze()


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
    if len(values) >= stats.FEW:
        assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    elif len(values) > 1:
        half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
        assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=1e-9)
    else:
        assert (found.low, found.high) == (-np.inf, np.inf)


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


# Paired tests


def test_a_paired_comparison_by_hand():
    """Differences 1, −2, 3, 4, 4: mean 2, variance (1 + 16 + 1 + 4 + 4)/4 = 6.5; the ranks of −2 are 2 of 15."""
    found = stats.paired([0, 2, 1, 1, 0], [1, 0, 4, 5, 4])
    assert (found.difference.value, found.difference.n) == (2, 5)
    assert found.effect == pytest.approx(2 / math.sqrt(6.5))
    assert found.p_t == pytest.approx(2 * t.sf(2 / math.sqrt(6.5 / 5), 4))
    untied = stats.paired([0] * 5, [1, -2, 3, 4, 5])
    assert untied.p_wilcoxon == pytest.approx(6 / 32)  # rank sums 0, 1 and 2 have one way each, on either side


def test_paired_tests_are_those_of_scipy_over_cluster_means():
    rng = np.random.default_rng(10)
    before, after = rng.normal(size=(2, 60))
    clusters = np.repeat(range(10, 30), 3)
    for found, (one, two) in (
        (stats.paired(before, after), (before, after)),
        (stats.paired(before, after, clusters), (before.reshape(20, 3).mean(1), after.reshape(20, 3).mean(1))),
    ):
        assert found.p_t == pytest.approx(ttest_rel(two, one).pvalue)
        assert found.p_wilcoxon == pytest.approx(wilcoxon(two, one).pvalue)
        assert found.effect == pytest.approx(np.mean(two - one) / np.std(two - one, ddof=1))
        assert tuple(found.difference) == pytest.approx(tuple(stats.mean(two - one)))


@settings(deadline=None, max_examples=40)
@given(PAIRS)
def test_swapping_before_and_after_turns_the_sign_and_keeps_the_p_values(pairs):
    before, after = np.transpose(pairs)
    there, back = stats.paired(before, after), stats.paired(after, before)
    value, low, high, n = there.difference
    assert tuple(back.difference) == pytest.approx((-value, -high, -low, n), rel=1e-6, abs=1e-6)
    assert back.effect == pytest.approx(-there.effect)
    assert (back.p_t, back.p_wilcoxon) == pytest.approx((there.p_t, there.p_wilcoxon), abs=1e-12)
    assert 0 <= there.p_t <= 1 and 0 <= there.p_wilcoxon <= 1


def test_pairs_without_spread():
    nothing = stats.paired([0.1, 0.2, 0.7], [0.1, 0.2, 0.7])
    assert nothing == ((0, 0, 0, 3), 0, 1, 1)
    one = stats.paired([1.0, 3.0], [2.0, 6.0], ["a", "a"])
    assert one.difference == (2, -math.inf, math.inf, 1)
    assert math.isnan(one.effect) and (one.p_t, one.p_wilcoxon) == (1, 1)


@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_errors_are_no_spread(sign):
    before = np.array([0.1, 0.2, 0.3, 0.7])
    after = before + sign * 0.1
    assert np.ptp(after - before) > 0
    found = stats.paired(before, after)
    assert found.difference == pytest.approx((sign * 0.1, sign * 0.1, sign * 0.1, 4))
    assert (found.effect, found.p_t, found.p_wilcoxon) == (sign * math.inf, 0, 2 / 2**4)
    assert stats.paired(before, after - sign * 0.1).effect == 0


def test_values_repeated_within_clusters_add_no_evidence():
    rng = np.random.default_rng(11)
    before, clusters = rng.uniform(0.2, 0.8, 15), np.arange(15)
    after = before + rng.normal(0.1, 0.12, 15)
    many = [np.repeat(values, 10) for values in (before, after)]
    once, again = (stats.paired(before, after, clusters), stats.paired(*many, np.repeat(clusters, 10)))
    assert tuple(again.difference) == pytest.approx(tuple(once.difference))
    assert again[1:] == pytest.approx(once[1:])
    pretended = stats.paired(*many)
    assert pretended.p_t < 0.1 * once.p_t and pretended.p_wilcoxon < 0.1 * once.p_wilcoxon
    for function in (stats.relative_change, stats.ratio):
        once, again = function(before, after, clusters), function(*many, np.repeat(clusters, 10))
        assert tuple(again) == pytest.approx(tuple(once))
        pretended = function(*many)
        assert pretended.high - pretended.low < 0.5 * (once.high - once.low)


# Families of tests


def test_holm_by_hand():
    """Sorted p times 4, 3, 2, 1, never falling, at most 1."""
    assert stats.holm([0.02, 0.01, 0.03, 0.5]) == pytest.approx([0.06, 0.04, 0.06, 0.5])
    assert stats.holm([0.6, 0.6]) == [1, 1]
    assert stats.holm([0.04]) == [0.04]
    assert stats.holm([]) == []


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_keeps_the_order_and_only_raises(p_values):
    found = stats.holm(p_values)
    assert all(p - 1e-12 <= corrected <= 1 for p, corrected in zip(p_values, found, strict=True))
    ordered = [corrected for _, corrected in sorted(zip(p_values, found, strict=True))]
    assert ordered == sorted(ordered)
    assert min(found) == pytest.approx(min(1, len(found) * min(p_values)))


def test_shuffled_labels_show_nothing_after_correction(monkeypatch):
    """Twenty comparisons that all differ: found as they are, by chance alone once before and after are swapped."""
    monkeypatch.setattr(
        stats, "mean", lambda units, seed: stats.Estimate(units.mean(), -9, 9, len(units))
    )  # no interval
    rng, rounds = np.random.default_rng(12), 100
    before = rng.normal(size=(20, 30))
    after = before + rng.normal(1.2, 1, before.shape)

    def p_values(first, second):
        tests = [stats.paired(one, two) for one, two in zip(first, second, strict=True)]
        return [[test.p_t for test in tests], [test.p_wilcoxon for test in tests]]

    assert all(max(stats.holm(family)) < 0.05 for family in p_values(before, after))
    shuffled = []
    for _ in range(rounds):
        swap = rng.random(before.shape) < 0.5
        shuffled.append(p_values(np.where(swap, after, before), np.where(swap, before, after)))
    for families in np.moveaxis(shuffled, 1, 0):
        corrected = sum(min(stats.holm(family)) <= 0.05 for family in families)
        plain = sum(min(family) <= 0.05 for family in families)
        assert corrected <= binom.ppf(0.99, rounds, 0.05) < rounds / 3 < plain, (corrected, plain)


def test_labels_shuffled_by_cluster_show_nothing_only_if_clusters_are_the_units(monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 50)
    rng, rounds = np.random.default_rng(13), 200
    clusters = np.repeat(range(12), 6)
    gaps = rng.normal(1, 0.5, 12)[clusters] + rng.normal(0, 0.2, len(clusters))
    signs = rng.choice([-1, 1], (rounds, 12))[:, clusters]
    kept = [stats.paired(np.zeros(len(gaps)), sign * gaps, clusters)[2:] for sign in signs]
    pretended = [stats.paired(np.zeros(len(gaps)), sign * gaps)[2:] for sign in signs]
    assert (np.mean(np.array(kept) <= 0.05, axis=0) <= binom.ppf(0.99, rounds, 0.05) / rounds).all()
    assert (np.mean(np.array(pretended) <= 0.05, axis=0) > 0.3).all()


def test_the_table_of_a_family():
    rng = np.random.default_rng(14)
    comparisons = {
        "clear": (np.zeros(30), rng.normal(3, 1, 30)),
        "by lemma": (np.zeros(30), rng.normal(-0.3, 1, 30), np.repeat(range(10), 3)),
        "unmoved": ([0.5, 0.5], [0.5, 0.5], None),
        "one": ([1.0], [0.5]),
    }
    frame = stats.family(comparisons, seed=3)
    tests = {name: stats.paired(*values, seed=3) for name, values in comparisons.items()}
    assert frame.equals(stats.table(tests))
    assert frame["comparison"].tolist() == list(comparisons)
    assert frame["n"].tolist() == [30, 10, 2, 1]
    clear, lemma, unmoved, one = frame.drop(columns=["comparison", "n"]).to_numpy().tolist()
    value, low, high, _ = tests["clear"].difference
    assert clear == [f"+{value:.2f} [{low:.2f}, {high:.2f}]", f"+{tests['clear'].effect:.2f}", *["< 0.001"] * 3]
    assert lemma[0].startswith("-0.") and lemma[1].startswith("-")
    p = tests["by lemma"].p_wilcoxon
    assert lemma[3:] == [f"{p:.3f}", f"{min(1, 3 * p):.3f}"]  # the second smallest of four
    assert unmoved == ["+0.00 [0.00, 0.00]", "+0.00", "1.000", "1.000", "1.000"]
    assert one == ["-0.50 [-inf, inf]", "–", "1.000", "1.000", "1.000"]
    assert stats.family({}).columns.tolist() == frame.columns.tolist()


def test_small_differences_keep_digits_that_say_something():
    def text(*numbers):
        return stats.table({"a": stats.Paired(Estimate(*numbers, 9), 1.0, 0.0004, 0.0126)}).iloc[0].tolist()[2:]

    assert text(0.12, 0.03, 0.2) == ["+0.12 [0.03, 0.20]", "+1.00", "< 0.001", "0.013", "0.013"]
    assert text(-0.0023, -0.004, 0.0001)[0] == "-0.0023 [-0.0040, 0.0001]"
    assert text(0.5, -math.inf, math.inf)[0] == "+0.50 [-inf, inf]"


# Relative changes and ratios


def test_relative_changes_by_hand():
    assert stats.relative_change([0.1, 0.3], [0.2, 1.0]).value == pytest.approx(2)  # 0.2 to 0.6
    assert stats.relative_change([0.2, 1.0], [0.1, 0.3]).value == pytest.approx(-2)
    assert stats.relative_change([0.4], [0.6]) == (pytest.approx(0.5), -math.inf, math.inf, 1)
    assert stats.relative_change([0.1, 0.1, 0.4], [0.2, 0.2, 0.4], ["a", "a", "b"]).value == pytest.approx(0.05 / 0.25)
    assert stats.relative_change([0.2, 0.4], [0.3, 0.6]) == pytest.approx((0.5, 0.5, 0.5, 2))


@settings(deadline=None, max_examples=40)
@given(PROBABILITIES)
def test_relative_changes_turn_their_sign_when_before_and_after_are_swapped(pairs):
    before, after = np.transpose(pairs)
    there, back = stats.relative_change(before, after), stats.relative_change(after, before)
    one, two = sum(before), sum(after)
    assert there.value == pytest.approx((two - one) / min(one, two), rel=1e-9, abs=1e-9)
    assert tuple(back) == pytest.approx((-there.value, -there.high, -there.low, there.n), rel=1e-6, abs=1e-9)
    rounding = 1e-9 * (1 + abs(there.value))
    assert there.low - rounding <= there.value <= there.high + rounding


def resampled(first, second, statistic):
    """The percentile bootstrap of pairs, written out."""
    rng = np.random.default_rng(99)
    drawn = (rng.integers(len(first), size=len(first)) for _ in range(4000))
    return np.quantile([statistic(first[i].mean(), second[i].mean()) for i in drawn], [0.025, 0.975])


@pytest.mark.parametrize("shift", [-0.3, 0.0, 0.6])
def test_intervals_of_relative_changes_and_ratios_are_the_bootstraps_of_pairs(shift):
    rng = np.random.default_rng(15)
    before = rng.lognormal(-2, 0.6, 50)
    after = before * rng.lognormal(shift, 0.4, 50)
    found = stats.relative_change(before, after)
    want = resampled(before, after, lambda a, b: (b - a) / min(a, b))
    assert (found.low, found.high) == pytest.approx(tuple(want), abs=0.15 * (found.high - found.low))
    found = stats.ratio(after, before)
    want = resampled(after, before, lambda a, b: a / b)
    assert found.value == pytest.approx(after.sum() / before.sum())
    assert (found.low, found.high) == pytest.approx(tuple(want), abs=0.15 * (found.high - found.low))


def test_pairs_are_resampled_together():
    """Items differ a thousandfold and their changes hardly: joint resampling sees a narrow interval."""
    rng = np.random.default_rng(16)
    before = 10 ** rng.uniform(-3, 0, 40)
    after = before * rng.normal(2, 0.1, 40)
    for found, truth in ((stats.relative_change(before, after), 1), (stats.ratio(after, before), 2)):
        assert truth - 0.15 < found.low < found.high < truth + 0.15


def test_intervals_of_relative_changes_cover_the_truth_and_clusters_keep_it_so(quick):
    """E(after)/E(before) is e^0.5 for lognormal pairs whose logarithms have means 0 and 0.5 and equal spread."""
    rng, truth = np.random.default_rng(17), math.exp(0.5) - 1
    clusters = np.repeat(range(40), 5)
    covered, pretended = [], []
    for i in range(200):
        shared = rng.normal(0, 0.3, 40)
        before = np.exp(shared + rng.normal(0, 0.3, 40))[clusters] * rng.lognormal(0, 0.1, 200)
        after = np.exp(0.5 + shared + rng.normal(0, 0.3, 40))[clusters] * rng.lognormal(0, 0.1, 200)
        found = stats.relative_change(before, after, clusters, seed=i)
        wrong = stats.relative_change(before, after, seed=i)
        covered.append(found.low <= truth <= found.high)
        pretended.append(wrong.low <= truth <= wrong.high)
    assert 0.89 <= np.mean(covered) <= 0.99, np.mean(covered)
    assert np.mean(pretended) < 0.75


def test_a_resample_of_zeros_makes_a_limit_infinite_and_no_number_else():
    found = stats.relative_change([0.0, 0.0, 0.5], [0.5, 0.0, 0.0])
    assert found == (0, -math.inf, math.inf, 3)
    found = stats.relative_change([0.0, 0.0, 0.5], [0.5, 0.5, 0.5])
    assert found.value == pytest.approx(2) and found.low == pytest.approx(0) and found.high == math.inf
    found = stats.relative_change([0.0, 0.2, 0.4], [0.0, 0.4, 0.4])
    assert found == pytest.approx((1 / 3, 0, 1, 3))


def test_a_denominator_that_may_be_zero_leaves_the_ratio_open():
    rng = np.random.default_rng(18)
    top = rng.normal(1, 0.1, 30)
    assert stats.ratio(top, rng.normal(0.05, 1, 30))[1:3] == (-math.inf, math.inf)
    assert stats.ratio([1.0], [4.0]) == (0.25, -math.inf, math.inf, 1)
    few = [1.0] * 3 + [0.0] * 37  # one resample in twenty has none of them
    assert stats.mean(few).low > 0
    assert stats.ratio(few[::-1], few) == (1, -math.inf, math.inf, 40)
    ample = [1.0] * 4 + [0.0] * 36  # one in seventy: less than the interval leaves out
    found = stats.ratio(ample[::-1], ample)
    assert 0.1 < found.low < found.value == 1 < found.high < 10
    negative = stats.ratio(top, -2 * top + rng.normal(0, 0.1, 30))
    assert -0.6 < negative.low < negative.value < negative.high < -0.4
    assert stats.ratio([1, 2], [2, 4]) == (0.5, 0.5, 0.5, 2)


# Two independent groups: relative differences and separation


def test_relative_differences_by_hand():
    """The means of resampled pairs are the lower, the middle and the upper one with odds 1 : 2 : 1."""
    assert stats.relative_difference([2, 4], [1, 1]) == pytest.approx((2, 1, 3, 2))
    assert stats.relative_difference([3, 3, 3], [1, 2]) == (1, -math.inf, math.inf, 2)  # the base may be 0
    assert stats.relative_difference([1, 2, 3], [1, 1, 2]).value == pytest.approx(0.5)
    assert stats.relative_difference([0.0, 0.0], [3.0, 3.0]) == (-1, -1, -1, 2)


@settings(deadline=None, max_examples=30)
@given(
    NUMBERS, st.lists(st.floats(0.5, 9).map(lambda x: round(x, 3)), min_size=2, max_size=30), st.sampled_from([1, -1])
)
def test_a_relative_difference_is_the_ratio_of_the_means_minus_1(first, second, sign):
    found = stats.relative_difference(first, [sign * x for x in second])
    want = sign * (math.fsum(first) / len(first)) / (math.fsum(second) / len(second)) - 1
    assert found.value == pytest.approx(want, abs=1e-9)
    assert found.n == min(len(first), len(second))
    assert found.low - 1e-9 <= found.value <= found.high + 1e-9


def test_the_interval_of_a_relative_difference_is_as_wide_as_theory_says():
    """The delta method: relative variances add. Groups are resampled apart, even where they hold the same values."""
    rng = np.random.default_rng(22)
    one, two = rng.normal(6, 2, 400), rng.normal(4, 1, 300)
    for first, second in ((one, two), (two, two)):
        value = first.mean() / second.mean() - 1
        parts = (group.var() / len(group) / group.mean() ** 2 for group in (first, second))
        half = 1.96 * (value + 1) * math.sqrt(sum(parts))
        found = stats.relative_difference(first, second)
        assert (found.low, found.high) == pytest.approx((value - half, value + half), abs=0.1 * half)


def test_a_base_that_may_be_zero_leaves_the_relative_difference_open():
    rng = np.random.default_rng(23)
    first, second = rng.normal(1, 0.1, 30), rng.normal(0.05, 1, 30)
    assert stats.mean(second).low < 0 < stats.mean(second).high
    found = stats.relative_difference(first, second)
    assert found == (pytest.approx(first.mean() / second.mean() - 1), -math.inf, math.inf, 30)
    assert stats.relative_difference([1.0, 3.0], [4.0]) == (-0.5, -math.inf, math.inf, 1)
    assert stats.relative_difference([2.0], [4.0, 4.0]) == (-0.5, -math.inf, math.inf, 1)


def test_intervals_of_relative_differences_cover_the_truth(quick):
    rng, covered = np.random.default_rng(24), []
    for i in range(200):
        found = stats.relative_difference(rng.normal(3, 1, 30), rng.exponential(2, 60), seed=i)
        covered.append(found.low <= 0.5 <= found.high)
    assert 0.89 <= np.mean(covered) <= 0.99, np.mean(covered)


SCORES = st.lists(st.integers(-4, 4), min_size=2, max_size=12)


@settings(deadline=None, max_examples=40)
@given(SCORES, SCORES)
def test_separation_is_mann_and_whitneys_u_over_the_number_of_pairs(first, second):
    found, swapped = stats.separation(first, second), stats.separation(second, first)
    u = mannwhitneyu(first, second, method="asymptotic").statistic
    assert found.value == pytest.approx(u / (len(first) * len(second)))
    assert swapped.value == pytest.approx(1 - found.value)
    assert found.n == swapped.n == min(len(first), len(second))
    assert 0 <= found.low <= found.value + 1e-9 and found.value - 1e-9 <= found.high <= 1


def test_separation_by_hand():
    assert stats.separation([1, 3], [2, 2, 3]).value == pytest.approx(2.5 / 6)  # 3 beats both 2, and ties with 3
    assert stats.separation([5.0, 5.0], [5.0] * 3) == (0.5, 0.5, 0.5, 2)
    assert stats.separation([2.0], [1.0, 0.0]) == (1, -math.inf, math.inf, 1)


def test_groups_that_do_not_overlap_are_separated_without_doubt():
    rng = np.random.default_rng(25)
    low, high = rng.uniform(0, 1, 9), rng.uniform(2, 3, 7)
    assert stats.separation(high, low) == (1, 1, 1, 7)
    assert stats.separation(low, high) == (0, 0, 0, 7)


def test_intervals_of_separation_cover_the_truth(quick):
    """For normal groups of spread 1 whose means differ by 1, a value of the upper is larger with P = Φ(1/√2)."""
    rng, truth = np.random.default_rng(26), norm.cdf(1 / math.sqrt(2))
    found = [stats.separation(rng.normal(1, 1, 25), rng.normal(0, 1, 30), seed=i) for i in range(150)]
    covered = np.mean([one.low <= truth <= one.high for one in found])
    assert 0.88 <= covered <= 0.99, covered


# Regression


def sandwich(design, outcome, groups=None):
    """Slopes and 95 % limits of HC3, or of clusters with the usual small-sample factor, from the textbook formulas."""
    n, k = design.shape
    bread = np.linalg.inv(design.T @ design)
    slopes = bread @ design.T @ outcome
    errors = outcome - design @ slopes
    if groups is None:
        leverage = np.diag(design @ bread @ design.T)
        scores, factor, df = design * (errors / (1 - leverage))[:, None], 1, n - k
    else:
        scores = np.array([(design * errors[:, None])[groups == g].sum(0) for g in np.unique(groups)])
        factor, df = len(scores) / (len(scores) - 1) * (n - 1) / (n - k), len(scores) - 1
    half = t.ppf(0.975, df) * np.sqrt(factor * np.diag(bread @ scores.T @ scores @ bread))
    return np.column_stack([slopes, slopes - half, slopes + half])[1:]


@pytest.fixture
def words():
    """Effect, log frequency, PMI and regularity of 48 made-up nouns of 12 lemmas."""
    rng = np.random.default_rng(19)
    lemma = np.repeat(range(12), 4)
    frequency, pmi = rng.normal(4, 1.5, 48), rng.normal(0, 3, 48)
    regular = rng.integers(0, 2, 48)
    effect = 0.5 * frequency - 0.1 * pmi + regular + rng.normal(0, 1, 12)[lemma] + rng.normal(0, 0.2, 48) * frequency
    return effect, {"frequency": frequency, "PMI": pmi, "regular": regular}, lemma


@pytest.mark.parametrize("clustered", [False, True])
def test_slopes_and_intervals_follow_from_the_formulas(words, clustered):
    effect, predictors, lemma = words
    groups = lemma if clustered else None
    n = 12 if clustered else 48
    found = stats.regression(effect, predictors, standardise=False, clusters=groups)
    assert list(found) == list(predictors)
    design = np.column_stack([np.ones(48), *predictors.values()])
    want = sandwich(design, effect, groups)
    assert np.array(list(found.values())) == pytest.approx(np.column_stack([want, np.full(3, n)]))
    spread = np.array([predictors["frequency"].std(ddof=1), predictors["PMI"].std(ddof=1), 1])
    standard = stats.regression(effect, predictors, clusters=groups)
    scaled = want * spread[:, None] / effect.std(ddof=1)
    assert np.array(list(standard.values()))[:, :3] == pytest.approx(scaled)


def test_a_standardised_slope_on_one_predictor_is_the_correlation(words):
    effect, predictors, _ = words
    found = stats.regression(effect, {"frequency": predictors["frequency"]})["frequency"]
    assert found.value == pytest.approx(np.corrcoef(effect, predictors["frequency"])[0, 1])
    units = stats.regression(1e6 * effect - 3, {"frequency": predictors["frequency"] / 1e6 + 7})["frequency"]
    assert tuple(units) == pytest.approx(tuple(found), rel=1e-5)


def test_rows_repeated_within_clusters_hardly_narrow_the_slope(words):
    effect, predictors, _ = words
    once = stats.regression(effect, predictors)
    many = {name: np.repeat(values, 10) for name, values in predictors.items()}
    again = stats.regression(np.repeat(effect, 10), many, clusters=np.repeat(range(48), 10))
    pretended = stats.regression(np.repeat(effect, 10), many)
    for name in predictors:
        width, kept, wrong = (found[name].high - found[name].low for found in (once, again, pretended))
        assert again[name].n == 48
        assert kept > 0.85 * width  # HC3 is wider than the clusters' formula by 1/(1 − leverage)
        assert wrong < 0.4 * width


def test_intervals_of_slopes_cover_the_truth_only_if_clusters_are_known():
    rng = np.random.default_rng(20)
    lemma = np.repeat(range(30), 5)
    covered, pretended = [], []
    for _ in range(300):
        x = rng.normal(size=30)[lemma]
        y = 2 * x + rng.normal(size=30)[lemma] + rng.normal(0, 0.3, 150)
        for found, groups in ((covered, lemma), (pretended, None)):
            slope = stats.regression(y, {"x": x}, standardise=False, clusters=groups)["x"]
            found.append(slope.low <= 2 <= slope.high)
    assert 0.88 <= np.mean(covered) <= 0.99, np.mean(covered)
    assert np.mean(pretended) < 0.75


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


OUTCOMES = st.lists(st.tuples(st.booleans(), st.sampled_from("abcde")), min_size=1, max_size=30)


@settings(deadline=None)
@given(OUTCOMES)
def test_wilsons_interval_of_clusters_takes_each_as_one_outcome(pairs):
    flags, clusters = zip(*pairs, strict=True)
    groups = [[flag for flag, other in pairs if other == c] for c in sorted(set(clusters))]
    n, z = len(groups), 1.959964
    p = math.fsum(sum(group) / len(group) for group in groups) / n
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    found = stats.share(flags, clusters)
    want = [(centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)]
    assert tuple(found) == pytest.approx((p, *want, n), abs=1e-6)
    assert found.low <= found.value + 1e-12 and found.value - 1e-12 <= found.high and found.high - found.low > 0.1
    assert stats.share(flags, range(len(flags))) == stats.share(flags)


def test_one_cluster_is_one_outcome_however_often_it_is_asked():
    many, one = stats.share([True] * 500, ["Paris"] * 500), stats.share([True])
    assert many == one and one.low < 0.25
    mixed = stats.share([True, False] * 250, ["Paris"] * 500)
    assert tuple(mixed) == pytest.approx((0.5, 0.0546, 0.9454, 1), abs=1e-4)


@pytest.mark.parametrize("alike", [True, False])
def test_the_interval_of_a_clustered_share_covers_the_truth_in_at_least_about_95_percent(alike):
    """20 facts with 5 prompts each, all right or wrong together (`alike`), or each on its own; the truth is 0.7."""
    rng = np.random.default_rng(21)
    fact = np.repeat(range(20), 5)
    covered, pretended = [], []
    for _ in range(400):
        flags = rng.random(20)[fact] < 0.7 if alike else rng.random(100) < 0.7
        for found, clusters in ((covered, fact), (pretended, None)):
            estimate = stats.share(flags, clusters)
            found.append(estimate.low <= 0.7 <= estimate.high)
    assert 0.91 <= np.mean(covered) <= (0.99 if alike else 1), np.mean(covered)
    assert np.mean(pretended) < 0.75 or not alike, np.mean(pretended)


# Refusals


@pytest.mark.parametrize("bad", [float("nan"), 0.5, 2])
def test_outcomes_that_are_neither_true_nor_false_are_refused(bad):
    with pytest.raises(ValueError, match=f"expected outcomes that are true or false, got {float(bad)}"):
        stats.share([True, bad, False])
    assert stats.share([1, 0.0, True]) == stats.share([True, False, True])


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
    for estimate in (stats.mean, stats.share):
        with pytest.raises(ValueError, match="3 values but 2 clusters"):
            estimate([1.0, 0.0, 1.0], ["a", "b"])


def test_pairs_of_different_number_are_refused():
    for function in (stats.paired, stats.relative_change, stats.ratio):
        with pytest.raises(ValueError, match="3 values cannot be paired with 2"):
            function([1.0, 2.0, 3.0], [1.0, 2.0])
        with pytest.raises(ValueError, match="1 of 2 values are not finite"):
            function([1.0, 2.0], [1.0, float("nan")])
        with pytest.raises(ValueError, match="2 values but 1 clusters"):
            function([1.0, 2.0], [1.0, 2.0], ["a"])


def test_relative_changes_and_ratios_that_are_none_are_refused():
    with pytest.raises(ValueError, match="values after reach down to -0.1"):
        stats.relative_change([0.1, 0.2], [-0.1, 0.9])
    with pytest.raises(ValueError, match="values before reach down to -1"):
        stats.relative_change([-1, 2], [1, 2], ["a", "a"])
    with pytest.raises(ValueError, match="all values before are 0"):
        stats.relative_change([0.0, 0.0], [0.1, 0.2])
    with pytest.raises(ValueError, match="denominator's mean is 0"):
        stats.ratio([1.0, 2.0], [1.0, -1.0])
    with pytest.raises(ValueError, match="mean of the second group is 0"):
        stats.relative_difference([1.0, 2.0], [1.0, -1.0])


@pytest.mark.parametrize("function", [stats.relative_difference, stats.separation])
def test_groups_without_values_and_values_that_are_none_are_refused(function):
    for first, second in (([], [1.0]), ([1.0], [])):
        with pytest.raises(ValueError, match="expected a list of numbers"):
            function(first, second)
    with pytest.raises(ValueError, match="1 of 2 values are not finite"):
        function([1.0, 2.0], [1.0, float("nan")])


@pytest.mark.parametrize("bad", [[0.1, 1.2], [-0.1], [float("nan"), 0.5]])
def test_p_values_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="expected p values from 0 to 1"):
        stats.holm(bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"PMI": [1.0] * 47}, "predictor 'PMI' has 47 values, but the outcome 48"),
        ({"PMI": [0.1] * 48}, r"predictor 'PMI' is constant \(0.1\)"),
        ({"PMI": [float("nan")] * 2 + list(range(46))}, "predictor 'PMI': 2 values are not finite"),
        ({"irregular": "1 - regular"}, "frequency, PMI, regular, irregular are collinear"),
        ({"single": [1] + [0] * 47}, "rests on one row"),
    ],
)
def test_predictors_that_have_no_slope_are_refused(words, change, message):
    effect, predictors, _ = words
    change = {name: 1 - predictors["regular"] if isinstance(v, str) else v for name, v in change.items()}
    with pytest.raises(ValueError, match=message):
        stats.regression(effect, predictors | change)


def test_regressions_with_too_little_to_go_by_are_refused(words):
    effect, predictors, lemma = words
    with pytest.raises(ValueError, match=r"4 rows \(clusters\) for 3 predictors; expected at least .* 5 rows"):
        stats.regression(effect[:4], {name: values[:4] for name, values in predictors.items()})
    with pytest.raises(ValueError, match=r"4 rows \(clusters\) for 3 predictors"):
        stats.regression(effect, predictors, clusters=lemma % 4)
    with pytest.raises(ValueError, match="for 0 predictors; expected at least one"):
        stats.regression(effect, {})
    with pytest.raises(ValueError, match="the outcome is constant"):
        stats.regression([1.0] * 48, predictors)
    with pytest.raises(ValueError, match="1 of 48 values are not finite"):
        stats.regression([float("inf"), *effect[1:]], predictors)
    with pytest.raises(ValueError, match="rests on one row"):
        stats.regression(effect, {"x": (lemma == 3) * effect}, clusters=lemma)


# Rank correlation


@settings(deadline=None, max_examples=50)
@given(PAIRS)
def test_the_rank_correlation_is_that_of_scipy(pairs):
    first, second = zip(*pairs, strict=True)
    if len(set(first)) == 1 or len(set(second)) == 1:
        with pytest.raises(ValueError, match="no ranks to correlate"):
            stats.rank_correlation(first, second)
        return
    found = stats.rank_correlation(first, second)
    assert found.value == pytest.approx(spearmanr(first, second).statistic, abs=1e-9) and found.n == len(pairs)
    assert -1 - 1e-9 <= found.low <= found.high <= 1 + 1e-9
    assert stats.rank_correlation(first, second, seed=0) == found


def test_the_interval_of_a_rank_correlation_is_that_of_resampled_pairs(quick):
    rng = np.random.default_rng(5)
    first = rng.normal(size=25)
    second = first + rng.normal(size=25)
    found = stats.rank_correlation(first, second)
    draws = rng.integers(25, size=(4000, 25))
    low, high = np.quantile([spearmanr(first[d], second[d]).statistic for d in draws], [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06)
    assert found.high - found.low < 0.9
    flags = second > 0  # with ties, as successes have them
    assert stats.rank_correlation(first, flags).value == pytest.approx(spearmanr(first, flags).statistic)


def test_the_rank_correlation_of_clusters_is_that_of_their_means():
    first, second, items = [1, 3, 5, 5, 0, 0], [0, 1, 4, 6, 9, 9], list("aabbcc")
    assert stats.rank_correlation(first, second, items) == stats.rank_correlation([2, 5, 0], [0.5, 5, 9])


def test_a_resample_of_equal_values_counts_as_no_correlation():
    found = stats.rank_correlation([0, 0, 0, 0, 1], [0, 0, 0, 0, 1])
    assert found.value == pytest.approx(1) and (found.low, found.high) == (0, pytest.approx(1))


def test_rank_correlations_that_are_none_are_refused():
    with pytest.raises(ValueError, match="the second values are all 2, so they have no ranks"):
        stats.rank_correlation([1, 2, 3], [2, 2, 2])
    with pytest.raises(ValueError, match="3 values cannot be paired with 2"):
        stats.rank_correlation([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="1 of 3 values are not finite"):
        stats.rank_correlation([1, 2, math.nan], [1, 2, 3])


def test_the_interval_over_runs_is_students():
    values = [0.2, 0.5, 0.6]
    found = stats.runs(values)
    low, high = DescrStatsW(values).tconfint_mean()
    assert found == pytest.approx((np.mean(values), low, high, 3))
    assert stats.runs([0.3, 0.3]) == (0.3, 0.3, 0.3, 2)
    with pytest.raises(ValueError, match="two or more"):
        stats.runs([0.3])


# Units behind an estimate, and repeats of a study


def test_pseudo_values_of_a_mean_are_its_values_and_of_a_ratio_those_left_out_by_hand():
    assert stats.mean([1, 2, 6]).sample.groups[0].tolist() == [1, 2, 6]
    found = stats.ratio([1.0, 2, 6], [1.0, 1, 2]).sample
    left_out = [8 / 3, 7 / 3, 3 / 2]  # the ratio without the first, the second, the third pair
    assert found.kind == "mean" and found.groups[0] == pytest.approx([3 * 9 / 4 - 2 * x for x in left_out])


def test_pseudo_values_of_two_groups_have_the_variance_of_the_delta_method():
    rng = np.random.default_rng(5)
    a, b = rng.normal(2, 0.5, 60), rng.normal(4, 0.5, 50)
    found = stats.relative_difference(a, b)
    first, second = found.sample.groups
    assert first.mean() - second.mean() == pytest.approx(found.value, abs=0.01)
    spread = first.var(ddof=1) / 60 + second.var(ddof=1) / 50
    delta = (a.mean() / b.mean()) ** 2 * (a.var(ddof=1) / 60 / a.mean() ** 2 + b.var(ddof=1) / 50 / b.mean() ** 2)
    assert spread == pytest.approx(delta, rel=0.05)


def test_pseudo_values_of_a_slope_average_to_it():
    rng = np.random.default_rng(6)
    x = rng.normal(size=80)
    found = stats.regression(2 * x + rng.normal(size=80), {"x": x}, standardise=False, clusters=np.arange(80) // 2)["x"]
    assert len(found.sample.groups[0]) == found.n == 40
    assert found.sample.groups[0].mean() == pytest.approx(found.value, abs=0.02)


@pytest.mark.parametrize("n", [6, 14, 40])
@pytest.mark.parametrize("kind", ["mean", "difference", "share"])
def test_repeats_of_a_study_miss_a_border_at_most_as_often_as_the_interval_says(n, kind):
    """At the border itself 2.5 % of the intervals lie above it, and with so few units hardly more."""
    rng = np.random.default_rng(n)
    groups = {
        "mean": (rng.normal(size=n),),
        "difference": (rng.normal(size=n), rng.normal(size=n)),
        "share": (np.arange(n) % 2.0,),
    }[kind]
    found = stats.repeats(stats.Sample(kind, groups), 0.5, 2000)
    assert len(found) == 2000 and {estimate.n for estimate in found} == {n}
    assert np.mean([estimate.value for estimate in found]) == pytest.approx(0.5, abs=0.05)
    above = np.mean([estimate.low > 0.5 for estimate in found])
    assert above < 0.05
    far = stats.repeats(stats.Sample(kind, groups), 0.999 if kind == "share" else 5.0, 200)
    assert np.mean([estimate.low > 0.5 for estimate in far]) > 0.9


def test_an_estimate_keeps_its_units_when_a_field_is_replaced_and_compares_without_them():
    found = stats.mean([1.0, 2, 3])
    assert found._replace(n=2).sample is found.sample
    assert found == Estimate(*found) and Estimate(*found).sample is None
    assert stats.repeats(stats.mean([1.0]).sample, 0.0) == []


def test_a_jackknife_leaves_out_one_unit_after_the_other_and_knows_no_seed():
    a, b = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.3], [2.0, 7.0, 1.0, 8.0, 2.5, 8.5, 1.2]
    found = stats.jackknife(stats.rank_correlation(a, b, seed=1))
    whole, n = spearmanr(a, b).statistic, len(a)
    left = [spearmanr(a[:i] + a[i + 1 :], b[:i] + b[i + 1 :]).statistic for i in range(n)]
    # The textbook's standard error of a jackknife, from what is left when a unit is not there.
    error = math.sqrt((n - 1) / n * sum((x - np.mean(left)) ** 2 for x in left))
    half = t.ppf(0.975, n - 1) * error
    assert found == pytest.approx(Estimate(whole, whole - half, whole + half, n))
    assert found == stats.jackknife(stats.rank_correlation(a, b, seed=2))
    units = [0.5, 1.0, 3.0]
    assert stats.jackknife(stats.mean(units)) == stats.runs(units)
    for unknown in (Estimate(0.5, 0.0, 1.0, 9), stats.difference([1.0, 2.0], [3.0, 5.0])):
        with pytest.raises(ValueError, match="not known, or are two groups"):
            stats.jackknife(unknown)
