"""Killed runs, full disks, damaged files: nothing half-written is seen, and a plain rerun finishes as if undisturbed.

The trials are those of benchmarks/faults.py, which puts their counts into the book.
"""

from __future__ import annotations

import faults
import pytest

KINDS = {
    faults.two_runs_of_unlike_results: pytest.mark.kind("record-with-notebook"),
    faults.ends_of_a_book_alone: pytest.mark.kind("orphans-and-scratch"),
    faults.a_run_beside_an_old_one: pytest.mark.kind("orphans-and-scratch"),
}


@pytest.mark.parametrize(
    "trial", [pytest.param(trial, marks=KINDS.get(trial, ()), id=trial.__name__) for trial in faults.TRIALS]
)
def test_nothing_is_lost(trial, tmp_path):
    told = trial(tmp_path)
    assert told.sound, told


def test_a_loss_would_be_told():
    assert faults.Told(tried=2, said=2, again=2, same=2).sound
    for worse in ({"half": 1}, {"said": 1}, {"again": 1}, {"same": 1}, {"tried": 0}):
        assert not faults.Told(**{"tried": 2, "said": 2, "again": 2, "same": 2, **worse}).sound


def test_runs_are_killed_twenty_times_and_the_table_counts_all():
    told = {what: faults.Told(i, 0, i, i, i) for i, what in enumerate(faults.TRIALS.values(), 1)}
    total = sum(one.tried for one in told.values())
    assert f"| **all** | {total} | 0 | {total} | {total} | {total} |" in faults.table(told)
    assert faults.KILLS[faults.kills_of_a_toy] + faults.KILLS[faults.kills_of_a_chapter] >= 20
