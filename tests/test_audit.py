"""The audit of claims: what is missing, simulated power against closed forms, and the family of verdicts."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from recording import put
from scipy.stats import binom, norm
from statsmodels.stats.proportion import proportion_confint

from knpaper import audit, claims, rules, stats
from knpaper.records import read_records
from knpaper.rules import Claim

WHOLE = Claim(
    "whole", "01", "A.", "2", "m", "above", 0.2, 10, "fact", "nothing", 0.0, 0.5, "a fifth", "supported", "", "abc"
)


def test_a_declaration_says_what_it_lacks():
    assert WHOLE.missing == []
    assert replace(WHOLE, unit="", null=None).missing == ["unit", "null"]
    assert replace(WHOLE, exploratory="seen before").missing == ["fixed or exploratory"]
    assert replace(WHOLE, thesis="").missing == ["thesis or paper"]
    assert replace(WHOLE, thesis="", check=True).missing == []


@pytest.mark.parametrize(
    ("thesis", "paper", "verdict", "side"),
    [
        ("supported", "contradicted", "supported", "the thesis"),
        ("supported", "contradicted", "contradicted", "the paper"),
        ("supported", "contradicted", "inconclusive", "neither"),
        ("supported", "supported", "supported", "neither"),
        ("supported", "", "contradicted", "neither"),
        ("", "supported", "supported", "the paper"),
    ],
)
def test_a_verdict_speaks_for_whoever_alone_expected_it(thesis, paper, verdict, side):
    assert replace(WHOLE, thesis=thesis, paper=paper).side(verdict) == side
    assert replace(WHOLE, thesis=thesis, paper=paper, check=True).side(verdict) == "neither"


def test_the_power_of_a_mean_is_that_of_the_normal_distribution():
    units = np.random.default_rng(0).normal(0.3, 0.4, 60)
    found = claims.power(WHOLE, stats.mean(units))
    error = units.std(ddof=1) / math.sqrt(60)
    for name, truth in (("null", 0.0), ("threshold", 0.2), ("expected", 0.5)):
        want = norm.sf((0.2 + 1.96 * error - truth) / error)
        assert found[name][0] == pytest.approx(want, abs=0.06)


def test_the_power_of_a_share_is_that_of_the_binomial_distribution():
    claim = replace(WHOLE, threshold=0.5, null=0.2, expected=0.8)
    found = claims.power(claim, stats.share([1, 0] * 10))
    least = next(k for k in range(21) if proportion_confint(k, 20, method="wilson")[0] > 0.5)
    assert found["expected"][0] == pytest.approx(binom.sf(least - 1, 20, 0.8), abs=0.06)


def test_too_few_units_have_no_power():
    found = claims.power(replace(WHOLE, min_n=30), stats.mean(np.linspace(0, 1, 20)))
    assert set(map(tuple, found.values())) == {(0.0, 0.0)}


def test_units_that_are_all_alike_tell_no_power_and_survive_by_a_sign_test():
    alike = stats.mean([1.0, 1.0, 1.0])
    assert claims.power(replace(WHOLE, min_n=3), alike) == {}
    assert "not known" in claims.Verdict(WHOLE, alike, "m")._repr_html_()
    assert set(claims.power(WHOLE, stats.share([1] * 20))) == {"null", "threshold", "expected"}
    assert audit._p_value(WHOLE, alike) == 0.25 and audit._p_value(WHOLE, stats.mean([1.0] * 12)) == 2.0**-11


def test_the_audit_names_what_is_missing_and_what_a_run_could_not_decide(results, monkeypatch):
    monkeypatch.setattr(audit, "CLAIMS", {"fact-search": replace(WHOLE, id="fact-search", unit="")})
    monkeypatch.setattr(rules, "CLAIMS", audit.CLAIMS)
    (row,) = audit.audit([]).itertuples()
    assert row.faults == ["not declared: unit"] and row.notes == ["not run"]
    record = {"claim": "fact-search", "model": "m", "value": 0.3, "low": 0.0, "high": 0.6, "n": 12}
    units = {"kind": "mean", "values": [[*np.linspace(-1, 1.6, 12)]]}
    (row,) = audit.audit([record | {"units": units}]).itertuples()
    assert row.n == 12 and any("would miss an effect of 0.5" in note for note in row.notes)
    (row,) = audit.audit([record | {"units": {}}]).itertuples()
    assert "no units are recorded" in row.faults


def test_the_family_of_verdicts_counts_what_chance_makes_and_what_survives(monkeypatch):
    monkeypatch.setattr(audit, "CLAIMS", {"whole": WHOLE, "check": replace(WHOLE, id="check", check=True)})
    near = {"claim": "whole", "model": "m", "verdict": "supported", "value": 0.31, "low": 0.205, "high": 0.41, "n": 40}
    far = near | {"value": 0.9, "low": 0.8, "high": 1.0}
    open_ = near | {"verdict": "inconclusive", "value": 0.25, "low": 0.1, "high": 0.4}
    found = audit.multiplicity([near, far, *[open_] * 18, near | {"claim": "check"}])
    assert found == {"verdicts": 20, "decided": 2, "by chance": pytest.approx(1.0), "surviving": 2}
    p_value = 2 * norm.sf(0.11 / (0.205 / 3.92))
    assert audit.multiplicity([near, *[near] * 3])["surviving"] == 4 * (4 * p_value < 0.05)


def test_a_record_keeps_its_units_and_its_power(results):
    estimate = stats.mean(np.linspace(0.1, 0.9, 40))
    put(estimate=estimate)
    (record,) = read_records(results)
    assert record["units"]["values"][0] == pytest.approx(np.linspace(0.1, 0.9, 40).tolist(), rel=1e-5)
    claim = rules.CLAIMS[record["claim"]]
    assert record["power"] == claims.power(claim, estimate) or claim.missing


def test_the_audit_of_the_stored_records_finds_no_fault():
    records = read_records(Path(__file__).resolve().parent.parent / "results")
    rows = audit.audit(records)
    assert len(records) > 200 and {row.claim: row.faults for row in rows.itertuples() if row.faults} == {}
