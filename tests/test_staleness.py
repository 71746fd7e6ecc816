import json
import math
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import nbformat
import pytest
import toy
from recording import CLEAR, LM, put

from kncore.zoo import REGISTRY
from knpaper import grammar, resources, staleness, stats, tasks
from knpaper.claims import CLAIMS, record
from knpaper.records import checksum, package_version, read_records
from knpaper.staleness import stale
from knpaper.stats import Estimate

VERSIONS = {name: package_version(name) for name in ("kncore", "torch", "transformers")}


# Staleness


def test_a_fresh_record_is_not_stale(results):
    put()
    put("equally-few", Estimate(0.8, -math.inf, math.inf, 1), n=7, layers=(1, 2), share=1 / 3)
    put("number-separates", Estimate(1e-9, 2e-10, 0.123456789, 40))
    assert [stale(told) for told in read_records(results)] == [[], [], []]


def test_a_record_edited_by_hand_is_stale_whatever_was_edited(results):
    put(n=7)
    (told,) = read_records(results)
    for name, value in told.items():
        other = {"no": "such"} if isinstance(value, dict) else value + 1 if isinstance(value, float | int) else "edited"
        assert stale(told | {name: other}) == ["edited after it was recorded"], name
        less = {key: value for key, value in told.items() if key != name}
        assert stale(less) == ["it has no checksum" if name == "checksum" else "edited after it was recorded"]
    assert stale(told) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"code": "0" * 16}, "the code has changed since"),
        ({"rule": "supported if it looks good"}, "the rule has changed since"),
        ({"metric": "another"}, "the metric has changed since"),
        ({"verdict": "contradicted"}, "the rule now gives another verdict"),
        ({"statement": "Another."}, "the statement has changed since"),
        ({"dtype": "bfloat16"}, "recorded with dtype bfloat16, it is float32 now"),
        *(
            ({"versions": {**VERSIONS, name: "0.0.1"}}, f"recorded with {name} 0.0.1, this is {VERSIONS[name]}")
            for name in VERSIONS
        ),
        (
            {"model": "gpt2", "revision": "0" * 40},
            f"recorded with revision {'0' * 40}, it is {REGISTRY['gpt2'].revision} now",
        ),
    ],
)
def test_a_record_of_another_state_of_the_package_is_stale(change, reason, results):
    put()
    told = read_records(results)[0] | change
    assert stale(told | {"checksum": checksum(told)}) == [reason]


def test_a_claim_that_changed_makes_its_records_stale(results, monkeypatch):
    put()
    put("fact-owner")
    monkeypatch.setitem(CLAIMS, "fact-search", replace(CLAIMS["fact-search"], threshold=0.7))
    reasons = ["the rule has changed since", "the rule now gives another verdict"]
    assert [stale(told) for told in read_records(results)] == [reasons, []]


def test_a_record_of_other_code_is_stale(results, monkeypatch):
    put()
    monkeypatch.setattr(stats, "difference", lambda *x, **y: None)
    assert list(map(stale, read_records(results))) == [["the code has changed since"]]
    put()
    assert list(map(stale, read_records(results))) == [[]]


def checkout(folder, *cells):
    """A checkout with one chapter of these cells after its parameters, and the notebook's path."""
    path = toy.make_checkout(folder, n01_toy=toy.notebook(*cells)) / "notebooks" / "01-toy.ipynb"
    nb = nbformat.read(path, as_version=4)
    nb.cells[1].source = "model = 'tiny'\nn = 7\nseed = 0\nsource = 'own'"
    nbformat.write(nb, path)
    return path


CELLS = (
    "from kncore import claims, figures, stats",
    "shown = stats.share([True] * 40)",
    "figures.table([])",
    "claims.record('fact-search', lm, shown, seed=seed, source=source, n=n)",
    "claims.record('fact-owner', lm, stats.mean([1, 2]), seed=seed, source=source, n=n)",
)


@pytest.mark.kind("identity")
def test_a_record_carries_the_closure_of_its_notebook_up_to_its_cell(results, tmp_path, monkeypatch):
    path = checkout(tmp_path / "book", *CELLS)
    monkeypatch.chdir(path.parent.parent)
    put(n=7)
    put("fact-owner", n=7)

    def after(*cells):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        monkeypatch.chdir(checkout(tmp_path / "other", *cells).parent.parent)
        return [stale(record) for record in read_records(results)]

    changed = ["the code has changed since"]
    assert after(*CELLS) == [[], []]
    assert after("# a remark", *CELLS[:2], "figures.table([1]); print(shown)", *CELLS[3:]) == [[], []]
    assert after(*CELLS[:3], CELLS[3], CELLS[4].replace("[1, 2]", "[1, 3]")) == [[], changed]
    assert after(CELLS[0], CELLS[1].replace("40", "41"), *CELLS[2:]) == [changed, changed]
    monkeypatch.setattr(stats, "mean", lambda *x: None)
    assert after(*CELLS) == [[], changed]


@pytest.mark.kind("identity", own=True)
def test_a_shell_that_has_run_nothing_is_no_notebook(results, monkeypatch):
    """As figures leave one behind in a script."""
    shell = SimpleNamespace(user_ns={"In": [""]})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    put()
    assert [stale(record) for record in read_records(results)] == [[]]
    shell.user_ns["In"].append("x = 1")
    put()
    assert [stale(record) for record in read_records(results)] == [["the code has changed since"]]


@pytest.mark.kind("identity")
def test_a_record_with_other_settings_than_its_chapter_has_is_stale(results, tmp_path, monkeypatch):
    monkeypatch.chdir(checkout(tmp_path / "book", *CELLS).parent.parent)
    record("fact-search", LM, CLEAR, seed=1, source="own", n=5)
    assert sorted(stale(read_records(results)[0])) == [
        "recorded with n = 5, it is 7 now",
        "recorded with seed = 1, it is 0 now",
    ]


@pytest.mark.kind("identity")
def test_a_record_names_the_data_that_was_read_and_is_stale_where_that_changed(results, monkeypatch):
    grammar.lexicon()
    tasks.describe("capital")
    put()
    (found,) = read_records(results)
    assert {"lexicon.toml", "relation capital"} <= found["data"].keys()
    assert stale(found) == []
    now = staleness._data
    monkeypatch.setattr(staleness, "_data", lambda name: "other" if name == "relation capital" else now(name))
    assert stale(found) == ["the data of relation capital have changed since"]


def test_a_record_of_an_earlier_version_is_read_and_stale(results):
    put()
    path = next(results.glob("*/*.json"))
    earlier = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("family", "data")}
    path.write_text(json.dumps(earlier | {"checksum": checksum(earlier)}))
    assert stale(read_records(results)[0]) == [
        "recorded by an earlier kncore, which did not say all that is known of a record now"
    ]


@pytest.mark.kind("identity", own=True)
def test_an_unrelated_relation_makes_no_record_stale(results, tmp_path, monkeypatch):
    put()
    (found,) = read_records(results)
    assert staleness._data("relation capital") == found["data"].get(
        "relation capital", staleness._data("relation capital")
    )
    changed = shutil.copytree(resources.DATA, tmp_path / "data")
    (changed / "facts" / "new.tsv").write_text("subject\tobject\na\tb\n", encoding="utf-8")
    with (changed / "relations.toml").open("a", encoding="utf-8") as stream:
        stream.write('\n[new]\ndescription = "new"\nwikidata = ""\ntemplates = ["{} is"]\n')
    for module in (resources, tasks):
        monkeypatch.setattr(module, "DATA", changed)
    for function in (staleness._data, tasks._tables, tasks.describe):
        function.cache_clear()
    try:
        assert "new" in tasks.relations() and stale(found) == []
    finally:
        for function in (staleness._data, tasks._tables, tasks.describe):
            function.cache_clear()
