"""Verdicts over training seeds, against numbers worked out by hand."""

import math

import pytest

from knpaper import rules
from knpaper.seeds import stability

CLAIM = next(claim for claim in rules.CLAIMS.values() if claim.kind == "above" and claim.unit != "training seed")


def records(values, verdict="supported", claim=CLAIM.id, n=40):
    names = ["controlled-gpt2", "controlled-gpt2-1", "controlled-gpt2-2"]
    return [
        {"claim": claim, "model": name, "value": value, "verdict": verdict, "n": n, "source": "own"}
        for name, value in zip(names, values, strict=False)
    ]


def above(*steps):
    return [CLAIM.threshold + step for step in steps]


def test_a_verdict_is_stable_if_the_mean_over_seeds_with_its_interval_says_the_same():
    found = stability(records(above(0.3, 0.4, 0.5)))[CLAIM.id, "controlled-gpt2"]
    half = 4.302653 * 0.1 / math.sqrt(3)  # Student's t of 2 degrees of freedom
    assert found.mean.value == pytest.approx(CLAIM.threshold + 0.4)
    assert found.mean.low == pytest.approx(CLAIM.threshold + 0.4 - half, abs=1e-6) and found.mean.n == 3
    assert (found.verdict, found.word) == ("supported", "stable")
    assert list(found.values) == ["controlled-gpt2", "controlled-gpt2-1", "controlled-gpt2-2"]


def test_a_verdict_is_unstable_if_seeds_scatter_over_the_threshold_or_say_the_reverse():
    for steps, verdict in (((0.3, -0.2, 0.1), "inconclusive"), ((-0.3, -0.31, -0.32), "contradicted")):
        found = stability(records(above(*steps)))[CLAIM.id, "controlled-gpt2"]
        assert (found.verdict, found.word) == (verdict, "unstable over seeds")


def test_nothing_is_said_of_fewer_than_three_seeds_of_other_models_and_of_claims_that_count_seeds():
    some = records(above(0.3, 0.4, 0.5))
    assert stability(some[:2]) == {} == stability(some[1:]) == stability(records(above(0.3, 0.4, 0.5), n=0))
    assert stability([record | {"model": f"smollm2-135m{i}"} for i, record in enumerate(some)]) == {}
    seeds = next(claim.id for claim in rules.CLAIMS.values() if claim.unit == "training seed")
    assert stability(records(above(0.3, 0.4, 0.5), claim=seeds)) == {}


def test_seeds_on_which_the_edit_was_not_made_are_left_out():
    claim = next(claim for claim in rules.CLAIMS.values() if claim.needs and claim.unit != "training seed")
    some = records([claim.threshold + step for step in (0.1, 0.2, 0.3)], claim=claim.id)
    check = records([1.0, 0.0, 1.0], claim=claim.needs)
    check[1]["verdict"] = "contradicted"
    found = stability([*some, *check])[claim.id, "controlled-gpt2"]
    assert (found.mean, found.verdict, found.word) == (None, "inconclusive", "not known over seeds")
    assert found.left_out == ["controlled-gpt2-1"] and len(found.values) == 3
    check[1]["verdict"] = "inconclusive"  # some edits were made, and those are asked
    assert stability([*some, *check])[claim.id, "controlled-gpt2"].left_out == []


def test_a_claim_is_void_where_its_check_failed_on_the_same_model_and_data():
    needing = [(claim.id, check) for claim in rules.CLAIMS.values() for check in claim.needs.split()]
    assert len(dict(needing)) < len(needing) and all(rules.CLAIMS[check].check for _, check in needing)
    twice = next(claim for claim, _ in needing if sum(claim == other for other, _ in needing) > 1)
    for claim, check in {needing[0], *(pair for pair in needing if pair[0] == twice)}:
        expect_void(claim, check)


def expect_void(claim: str, check: str) -> None:
    some = records([0.0], "contradicted", claim) + records([0.0], "contradicted", check)
    assert rules.void(some) == {(claim, "controlled-gpt2", "own")}
    for change in ({"verdict": "supported"}, {"model": "other"}, {"source": "public"}):
        assert rules.void([some[0], some[1] | change]) == set()
