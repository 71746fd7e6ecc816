import math
import re

import pytest
from recording import ABOVE, WITHIN, files, put

from kncore.zoo import REGISTRY
from knpaper import claims
from knpaper.claims import CLAIMS
from knpaper.grammar import number_words
from knpaper.stats import Estimate

# Rules


@pytest.mark.parametrize(
    "low, high, above, within",
    [
        (0.6, 0.9, "supported", "contradicted"),
        (0.51, 0.52, "supported", "contradicted"),
        (0.5, 0.9, "inconclusive", "inconclusive"),  # an end on the border is on neither side
        (0.4, 0.6, "inconclusive", "inconclusive"),
        (0.1, 0.5, "inconclusive", "inconclusive"),
        (0.1, 0.49, "contradicted", "supported"),
        (-0.49, 0.49, "contradicted", "supported"),
        (-0.5, 0.3, "contradicted", "inconclusive"),
        (-0.6, 0.3, "contradicted", "inconclusive"),
        (-0.9, -0.5, "contradicted", "inconclusive"),
        (-0.9, -0.6, "contradicted", "contradicted"),
        (-0.9, 0.9, "inconclusive", "inconclusive"),
        (-math.inf, math.inf, "inconclusive", "inconclusive"),
        (0.6, math.inf, "supported", "contradicted"),
    ],
)
def test_verdicts_by_truth_table(low, high, above, within):
    estimate = Estimate(min(max(0.0, low), high), low, high, 30)
    assert (ABOVE.verdict(estimate), WITHIN.verdict(estimate)) == (above, within)
    few = estimate._replace(n=29)
    assert (ABOVE.verdict(few), WITHIN.verdict(few)) == ("inconclusive", "inconclusive")


def test_a_verdict_speaks_of_the_interval_not_of_the_value():
    assert ABOVE.verdict(Estimate(0.9, 0.4, 0.95, 99)) == "inconclusive"
    assert WITHIN.verdict(Estimate(0.0, -0.9, 0.9, 99)) == "inconclusive"


@pytest.mark.parametrize("place", range(3))
def test_no_verdict_on_what_is_not_a_number(place):
    values = [0.8, 0.6, 0.9]
    values[place] = float("nan")
    with pytest.raises(ValueError, match="not a number"):
        Estimate(*values, 1)
    for claim in (ABOVE, WITHIN):
        with pytest.raises(ValueError, match=f"claim '{claim.id}'.*not a number"):
            claim.verdict(Estimate(*[float("nan")] * 3, 0))


@pytest.mark.parametrize("end", [math.inf, -math.inf])
@pytest.mark.kind("not-a-number", own=True)
def test_no_verdict_on_an_interval_that_lies_beyond_all_numbers(end):
    for claim in (ABOVE, WITHIN):
        with pytest.raises(ValueError, match=f"claim '{claim.id}'.*not a number with its interval"):
            claim.verdict(Estimate(0.8, end, end, 99))


def test_rules_in_words_name_threshold_and_n():
    assert ABOVE.rule == (
        "supported if the whole 95 % interval lies above 0.5, contradicted if it lies below 0.5, "
        "otherwise (or with fewer than 30 units) inconclusive"
    )
    assert "within ±0.5" in WITHIN.rule and "outside ±0.5, on one side" in WITHIN.rule


@pytest.mark.parametrize("name", CLAIMS)
def test_declared_claims_are_whole(name):
    claim = CLAIMS[name]
    assert claim.id == name and re.fullmatch(r"[a-z]+(-[a-z]+)*", name)
    assert re.fullmatch(r"0[1-9]|[1-9][0-9]", claim.chapter)
    assert claim.kind in ("above", "within")
    assert math.isfinite(claim.threshold) and claim.min_n >= 3
    assert claim.threshold > 0 if claim.kind == "within" else claim.threshold >= 0
    assert claim.missing == [] and {claim.thesis, claim.paper} <= {"supported", "contradicted", ""}
    assert claim.verdict(Estimate(claim.expected, claim.expected, claim.expected, claim.min_n)) == "supported"
    assert claim.verdict(Estimate(claim.null, claim.null, claim.null, claim.min_n)) == "contradicted"
    assert claim.statement.endswith(".") and claim.metric and claim.section


def test_claims_are_in_the_order_of_the_chapters_and_say_different_things():
    chapters = [claim.chapter for claim in CLAIMS.values()]
    assert chapters == sorted(chapters)
    for told in ("statement", "metric"):
        assert len({getattr(claim, told) for claim in CLAIMS.values()}) == len(CLAIMS)


def test_undeclared_claims_and_estimates_that_are_not_numbers_are_not_recorded(results):
    with pytest.raises(KeyError, match="no-such-claim"):
        put("no-such-claim")
    with pytest.raises(ValueError, match="not a number"):
        put(estimate=Estimate(float("nan"), 0.0, 1.0, 40))
    assert files(results) == []


# What the authors published


def test_published_figures_are_changes_of_determiners_as_their_number_demands():
    told = claims.published("bert-base-cased")
    assert tuple(told["neuron"]) == (9, 1094)
    change, groups = told["change"], number_words("masked")
    assert (change["a"], change["this"], change["those"]) == (5.11, 4.83, -1.26)  # shares: +511 %, +483 %, −126 %
    assert set(change) <= {word for group in groups.values() for word in group} and len(change) == 18
    for group, sign in (("plural", -1), ("singular", 1), ("neutral", 0)):
        found = {(change[word] > 0) - (change[word] < 0) for word in groups[group] if word in change}
        assert found == {sign}
    assert {name for name in REGISTRY if claims.published(name)} == {"bert-base-cased"}
    assert claims.published("./some/model") is None
