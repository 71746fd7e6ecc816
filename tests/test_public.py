"""Claims on public data: what a folder of data is called, where its records go, how they are shown beside the own."""

import hashlib
import json
import re
from types import SimpleNamespace

import nbformat
import pytest
import toy
from recording import CLEAR, LM

from knbook import pages, runner
from knbook import public as stored_run
from knbook.errors import UsageError
from knpaper import public, stimuli
from knpaper.claims import record
from knpaper.datasets import files, pararel
from knpaper.records import column_of, read_records
from knpaper.rules import CLAIMS
from knpaper.staleness import stale
from knpaper.stats import Estimate

ID = next(claim.id for claim in CLAIMS.values() if claim.chapter == "01")


def put(source, estimate=CLEAR, **parameters):
    return record(ID, LM, estimate, seed=0, source=str(source), **parameters)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a file of CounterFact, whose content is pinned."""
    path = tmp_path / "own" / "counterfact" / "counterfact-train.json"
    path.parent.mkdir(parents=True)
    path.write_text("[]")
    pinned = dict(files.table()) | {
        "counterfact": files.table()["counterfact"] | {"sha256": hashlib.sha256(b"[]").hexdigest()}
    }
    monkeypatch.setattr(files, "table", lambda: pinned)
    return tmp_path / "own"


def test_a_folder_is_public_if_all_it_holds_is_pinned(folder):
    assert [files.named(name) for name in ("own", "public", str(folder))] == ["own", "public", "public"]
    (folder / "pararel").mkdir()
    (folder / "pararel" / "data_all_allbags.json").write_text("{}")
    other = files.named(str(folder))
    assert re.fullmatch("folder@[0-9a-f]{8}", other)
    (folder / "pararel" / "data_all_allbags.json").write_text("{} ")
    assert files.named(str(folder)) not in (other, "public")
    assert files.named(str(folder / "none")) != "public"


def test_records_of_public_data_stand_beside_the_own_and_name_no_folder(folder, results):
    put("own")
    put(folder, Estimate(0.2, 0.1, 0.3, 40))
    assert sorted(path.parent.name for path in results.glob("*/*.json")) == ["tiny-gpt2", "tiny-gpt2@public"]
    own, other = read_records(results)
    assert (own["value"], other["value"]) == (0.8, 0.2)
    assert [column_of(told) for told in (own, other)] == ["tiny-gpt2", "tiny-gpt2, public data"]
    assert str(folder) not in json.dumps(other) and other["source"] == "public"


def test_the_stored_run_has_parameters_of_its_own(results, tmp_path, monkeypatch):
    cells = [f'claims.record("{ID}", lm, estimate)']
    book = toy.make_checkout(tmp_path / "book", n01_toy=toy.notebook(*cells))
    nb = nbformat.read(book / "notebooks" / "01-toy.ipynb", 4)
    nb.cells[1].source += '\nsource = "own"'
    nbformat.write(nb, book / "notebooks" / "01-toy.ipynb")
    monkeypatch.chdir(book)
    monkeypatch.setattr(public, "PARAMETERS", {"01": {"n": 5}})
    put("public", n=5)
    assert stale(read_records(results)[0]) == []
    put("public", n=2)
    assert stale(read_records(results)[0]) == ["recorded with n = 2, it is 5 now"]


def test_the_run_keeps_records_only_and_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    root = toy.make_checkout(tmp_path / "book", n01_toy=toy.notebook("1"))
    monkeypatch.chdir(root)
    monkeypatch.setattr(public, "PARAMETERS", {"01": {"n": 3}})
    ran = []

    def run(root, *, model, only, parameters, out, timeout):
        ran.append((model, only, parameters))
        monkeypatch.setenv("KNCORE_RESULTS", str(out / "results"))
        put(parameters["source"], n=parameters["n"])
        (out / "results" / model).mkdir()
        (out / "results" / model / "01.toml").write_text("seconds = 1\n")
        (out / "01-toy.ipynb").write_text("sentences of the data set")

    monkeypatch.setattr(runner, "run", run)
    first = stored_run.run(root, str(folder), model="tiny-gpt2")
    assert first == stored_run.run(root, str(folder), model="tiny-gpt2")
    assert ran == [("tiny-gpt2", ["01"], {"source": str(folder), "n": 3})]
    kept = sorted(path.name for path in (root / "results" / "tiny-gpt2@public").iterdir())
    assert kept == ["01.toml", f"{ID}.json"]
    assert not [path for path in root.rglob("*.ipynb") if "data set" in path.read_text()]
    told = json.loads(first[0].read_text())
    first[0].write_text(json.dumps(told | {"value": 0.7}))  # edited: it is made anew
    stored_run.run(root, str(folder), model="tiny-gpt2")
    assert len(ran) == 2 and json.loads(first[0].read_text()) == told
    first[0].unlink()
    with monkeypatch.context() as patched:
        patched.setattr(public, "LEFT_OUT", {ID})
        assert stored_run.run(root, str(folder), model="tiny-gpt2") == [] and not first[0].exists()
    (folder / "counterfact" / "counterfact-train.json").write_text("[1]")
    with pytest.raises(UsageError, match="pinned"):
        stored_run.run(root, str(folder), model="tiny-gpt2")


def test_agreement_places_both_estimates_on_one_axis():
    claim = next(claim for claim in CLAIMS.values() if claim.kind == "above")
    limit = claim.threshold
    told = {"stale": [], "n": 9}
    own = told | {"verdict": "supported", "value": limit + 2, "low": limit + 1, "high": None}
    other = told | {"verdict": "contradicted", "value": limit - 1, "low": limit - 2, "high": limit - 0.5}
    records = {(claim.id, "m"): own, (claim.id, "m, public data"): other, ("else", "m"): own}
    book = SimpleNamespace(model="m", records=records, page=lambda chapter: "")
    found = pages.agreement(book)
    assert (len(found["rows"]), found["same"], found["opposite"]) == (1, 0, 1)
    row = found["rows"][0]
    # From the lowest end (limit − 2) to the highest value (limit + 2): 204 pixels from the eighth one on.
    assert row["borders"] == ["110.0"]
    assert [row["bars"][0][name] for name in ("low", "value", "high")] == ["161.0", "212.0", "212.0"]
    assert [row["bars"][1][name] for name in ("low", "value", "high")] == ["8.0", "59.0", "84.5"]
    assert "differs" in pages.fill("agreement.html", link=str, **found)


@pytest.mark.data
def test_the_relations_asked_are_those_with_five_causal_patterns(data_folder):
    counts = {}
    for relation in pararel.relations(data_folder):
        try:
            counts[relation] = len({query.template for query in pararel.read(relation, data_folder, "causal")})
        except ValueError:
            counts[relation] = 0
    assert {name for name, count in counts.items() if count >= 5} == set(stimuli.RELATIONS["public"])
    assert stimuli.relations(str(data_folder)) == stimuli.relations("public")
    assert stimuli.phenomena(str(data_folder)) == stimuli.phenomena("public")
    assert files.named(str(data_folder)) == "public"
