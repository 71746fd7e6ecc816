"""Killed runs, full disks, damaged files: nothing half-written is seen, and a plain rerun finishes as if undisturbed.

The trials are those of benchmarks/faults.py, which puts their counts into the book; here fewer runs are killed.
"""

from __future__ import annotations

import faults
import pytest

KINDS = {
    faults.two_runs_of_unlike_results: pytest.mark.kind("record-with-notebook"),
    faults.ends_of_a_book_alone: pytest.mark.kind("orphans-and-scratch"),
    faults.a_run_beside_an_old_one: pytest.mark.kind("orphans-and-scratch"),
}


FEWER = {faults.toy: 6, faults.chapter: 2, faults.sweep: 3, faults.book: 2}


@pytest.mark.parametrize(
    "trial", [pytest.param(trial, marks=KINDS.get(trial, ()), id=trial.__name__) for trial in faults.TRIALS]
)
def test_nothing_is_lost(trial, tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "KILLS", FEWER)
    tally = trial(tmp_path)
    assert tally.sound, tally


def test_a_loss_would_be_told():
    assert faults.Tally(tried=2, said=2, again=2, same=2).sound
    for worse in ({"half": 1}, {"said": 1}, {"again": 1}, {"same": 1}, {"tried": 0}):
        assert not faults.Tally(**{"tried": 2, "said": 2, "again": 2, "same": 2, **worse}).sound


def test_the_benchmark_kills_runs_twenty_times_and_its_table_counts_all():
    tallies = {what: faults.Tally(i, 0, i, i, i) for i, what in enumerate(faults.TRIALS.values(), 1)}
    total = sum(tally.tried for tally in tallies.values())
    assert f"| **all** | {total} | 0 | {total} | {total} | {total} |" in faults.table(tallies)
    assert faults.KILLS[faults.toy] + faults.KILLS[faults.chapter] >= 20
