"""The kinds of input that once went wrong: each has tests, and the table in the book counts them. No test hurries."""

from __future__ import annotations

import os
import subprocess
import sys

import kinds
import pytest
from hypothesis import HealthCheck, settings

PROFILES = ("default", "ci", "repeatable")


@pytest.fixture(scope="module")
def collected() -> dict[str, dict]:
    return kinds.collect()


def test_every_kind_has_tests_and_a_third_of_them_tests_on_inputs_of_our_own(collected):
    found = kinds.counts(collected.values())
    assert 3 * sum(own > 0 for _, own in found.values()) >= len(found)


def test_the_table_in_the_book_is_what_is_collected(collected, checkout):
    stored = (checkout / "book" / "benchmark-kinds.md").read_text(encoding="utf-8")
    again = "python benchmarks/kinds.py --out book/benchmark-kinds.md"
    assert stored == kinds.table(kinds.counts(collected.values())), again


def test_a_test_counts_once_for_a_kind_and_a_wrong_slug_or_a_kind_without_tests_is_named(monkeypatch):
    monkeypatch.setattr(kinds, "KINDS", {"a": {"kind": "A", "seen": "x #1", "now": "right"}})
    both = {"kinds": [["a", True], ["a", False]]}
    assert kinds.counts([both, {"kinds": [["a", False]]}, {"kinds": []}]) == {"a": (2, 1)}
    assert kinds.table({"a": (2, 1)}).splitlines()[2:] == [
        "| A | x #1 | right | 2 | 1 |",
        "| **1 kinds** | | | 2 | 1 |",
    ]
    with pytest.raises(ValueError, match="'b', which is not in"):
        kinds.counts([{"kinds": [["b", False]]}])
    with pytest.raises(ValueError, match="no test is marked with a"):
        kinds.counts([])


@pytest.mark.kind("clock")
def test_no_generated_test_has_a_deadline(collected):
    """A `settings` of its own cannot bring back what the profiles leave out."""
    assert sum("test_text_in_a_template_is_shown_as_it_is" in name for name in collected)
    assert not [name for name, test in collected.items() if test["hurried"]]


@pytest.mark.kind("clock", own=True)
@pytest.mark.parametrize("name", PROFILES)
def test_no_profile_limits_the_time_of_a_test(name):
    profile = settings.get_profile(name)
    assert profile.deadline is None and HealthCheck.too_slow in profile.suppress_health_check


@pytest.fixture(scope="module")
def loaded(checkout) -> dict[str, str]:
    """The deadline under each profile, in a process that has no pytest, and where a CI service would choose one."""
    program = "import os, sys, runpy, hypothesis\nfor name in sys.argv[2:]:\n os.environ['HYPOTHESIS_PROFILE'] = name\n"
    program += " runpy.run_path(sys.argv[1])\n print(name, hypothesis.settings().deadline)"
    paths = {"PYTHONPATH": os.pathsep.join([str(checkout), str(checkout / "tests")]), "CI": "true"}
    command = [sys.executable, "-c", program, str(checkout / "tests" / "conftest.py"), *PROFILES]
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.kind("clock", own=True)
@pytest.mark.parametrize("name", PROFILES)
def test_the_profile_that_is_asked_for_is_loaded_without_a_deadline(name, loaded):
    """By its name in the environment."""
    assert loaded[name] == "None"
