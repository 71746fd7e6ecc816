"""Values of training seeds that do not come with the package: computed once, stored, joined or refused."""

import shutil

import pandas as pd
import pytest

from kncore import zoo
from knpaper import causes, replicas
from knpaper.stats import Estimate

SETTINGS = dict(n=40, every=2, seed=0)


@pytest.fixture
def seeds(tmp_path, monkeypatch):
    """A trained model under another number, an empty folder of results, and values that cost nothing."""
    monkeypatch.setenv("KNCORE_RESULTS", str(tmp_path / "results"))
    folder = tmp_path / "controlled-gpt2-7"
    shutil.copytree(zoo.SHIPPED / "controlled-gpt2-1", folder)
    calls = []
    monkeypatch.setattr(causes, "losses", lambda lms, every, seed: calls.append((list(lms), every, seed)))
    monkeypatch.setattr(causes, "rewritten", lambda lms, relation, n, seed: n)
    found = {"count-moves": Estimate(0.123456789, -0.1, 0.3, 40), "linked-synonymy-rome": None}
    monkeypatch.setattr(causes, "claim_values", lambda lost, edits, seed: found)
    monkeypatch.setattr(replicas, "code", lambda: "abc")
    return folder, calls


def test_values_are_stored_once_with_what_made_them(seeds):
    folder, calls = seeds
    assert replicas.read().empty
    assert replicas.add(folder) == "controlled-gpt2-7: 1 values stored"
    assert replicas.add(folder) == "controlled-gpt2-7: stored already"
    assert calls == [(["controlled-gpt2"], 2, 0)]
    (row,) = replicas.read().itertuples()
    assert (row.claim, row.architecture, row.seed, row.value, row.n) == (
        "count-moves",
        "controlled-gpt2",
        7,
        0.123457,
        40,
    )
    assert row.code == "abc" and row.command == "python training/controlled.py gpt2 --seed 7"


def test_a_changed_code_has_values_computed_anew_in_the_place_of_the_old(seeds, monkeypatch):
    folder, calls = seeds
    replicas.add(folder)
    monkeypatch.setattr(replicas, "code", lambda: "def")
    replicas.add(folder)
    assert len(calls) == 2 and replicas.read().code.tolist() == ["def"]


def test_stored_values_join_those_of_the_same_settings_and_code(seeds, monkeypatch):
    folder, _ = seeds
    replicas.add(folder)
    table = replicas.read()
    other = table.assign(sha256="0" * 64)
    other.to_csv(replicas.table_file(), sep="\t", index=False)
    rows, refused = replicas.joined(["controlled-gpt2"], **SETTINGS)
    assert rows.value.tolist() == [0.123457] and not refused
    assert replicas.joined(["controlled-llama"], **SETTINGS)[0].empty
    assert replicas.joined(["controlled-gpt2"], **SETTINGS | {"n": 5})[0].empty
    monkeypatch.setattr(replicas, "code", lambda: "def")
    rows, refused = replicas.joined(["controlled-gpt2"], **SETTINGS)
    assert rows.empty
    assert refused == ["The stored values of controlled-gpt2-7 are left out: the code has changed since."]


def test_weights_that_are_computed_anyway_do_not_count_twice(seeds):
    folder, _ = seeds
    replicas.add(folder)
    rows, refused = replicas.joined(["controlled-gpt2"], **SETTINGS)
    assert rows.empty and "come with this book" in refused[0]


def test_without_a_table_nothing_is_joined(seeds):
    rows, refused = replicas.joined(["controlled-gpt2"], **SETTINGS)
    assert isinstance(rows, pd.DataFrame) and rows.empty and not refused


def test_a_folder_that_does_not_say_its_seed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="controlled-gpt2-3, by architecture and seed"):
        replicas.add(tmp_path / "my-model")


def test_the_code_of_the_values_is_that_of_the_functions_that_make_them(monkeypatch):
    before = replicas.code()
    monkeypatch.setattr(causes, "LEAST", causes.LEAST + 1)
    assert replicas.code() != before
