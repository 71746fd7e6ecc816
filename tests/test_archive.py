"""What archives read of a version: the crate refers to what is there, and each file says what the checkout says."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
PACKAGE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CRATE = "https://w3id.org/ro/crate/1.1"  # the one thing that is named and not described
NAMES = {"codemeta.json", ".zenodo.json", "ro-crate-metadata.json"}
RECORDS = {path.relative_to(ROOT).as_posix(): path for path in ROOT.glob("results/*/*.json")}
COMPARE = ("09", "11")  # chapters whose one run is on several models


@pytest.fixture(scope="module")
def archive():
    spec = importlib.util.spec_from_file_location("ci_archive", ROOT / ".ci" / "archive.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(archive, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KNCORE_REPOSITORY", raising=False)
        folder = tmp_path_factory.mktemp("archive")
        archive.main(["--out", str(folder)])
    return folder


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def graph(written) -> dict[str, dict]:
    """The entities of the crate, by identifier, each of which is there once."""
    entities = read(written, "ro-crate-metadata.json")["@graph"]
    found = {entity["@id"]: entity for entity in entities}
    assert len(found) == len(entities)
    return found


def many(value: object) -> list:
    """What a property holds, as a list: JSON-LD writes a single value without one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def named(entity: dict, name: str) -> list[str]:
    return [reference["@id"] for reference in many(entity.get(name))]


def of_type(graph: dict[str, dict], kind: str) -> list[dict]:
    return [entity for entity in graph.values() if kind in many(entity["@type"])]


# ------------------------------------------------------------------------------------------- the crate


def test_the_descriptor_and_the_root_are_those_of_the_specification(graph):
    descriptor, root = graph["ro-crate-metadata.json"], graph["./"]
    assert descriptor["@type"] == "CreativeWork" and named(descriptor, "about") == ["./"]
    assert named(descriptor, "conformsTo") == [CRATE]
    assert root["@type"] == "Dataset" and root["name"] == CITATION["title"] and root["description"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", root["datePublished"])
    assert named(root, "license") == [f"https://spdx.org/licenses/{CITATION['license']}"]
    (profile,) = named(root, "conformsTo")
    assert re.fullmatch(r"https://w3id\.org/ro/wfrun/process/\d\.\d", profile)
    assert graph[profile]["@type"] == "CreativeWork" and profile.endswith(graph[profile]["version"])


def test_the_context_defines_what_the_specification_does_not(written):
    context = read(written, "ro-crate-metadata.json")["@context"]
    assert context == [f"{CRATE}/context", "https://w3id.org/ro/terms/workflow-run/context"]


def test_all_that_is_referred_to_is_there_and_entities_are_not_nested(graph):
    for entity in graph.values():
        for name, value in entity.items():
            for item in many(value):
                if isinstance(item, dict):
                    assert item.keys() == {"@id"}, f"{entity['@id']}: {name} holds an entity"
                    assert item["@id"] in {*graph, CRATE}, f"{entity['@id']}: {name} names {item['@id']}"
            assert value not in ([], None) and not (isinstance(value, list) and len(value) == 1), name


def test_each_entity_is_reached_from_the_root(graph):
    reached, ahead = {CRATE}, ["ro-crate-metadata.json"]
    while ahead:
        name = ahead.pop()
        if name not in reached:
            reached.add(name)
            values = [item for value in graph[name].values() for item in many(value)]
            ahead += [item["@id"] for item in values if isinstance(item, dict)]
    assert graph.keys() - reached == set()


def test_each_file_is_there_as_it_is_listed_and_is_part_of_the_root_or_of_a_folder_of_it(graph):
    for entity in of_type(graph, "File"):
        content = (ROOT / unquote(entity["@id"])).read_bytes()
        assert entity["sha256"] == hashlib.sha256(content).hexdigest(), entity["@id"]
        assert entity["contentSize"] == str(len(content)), entity["@id"]
    parts = named(graph["./"], "hasPart")
    folders = [name for name in parts if graph[name]["@type"] == "Dataset"]
    inside = [part for folder in folders for part in named(graph[folder], "hasPart")]
    files = [entity["@id"] for entity in of_type(graph, "File")]
    assert sorted(parts + inside) == sorted(files + folders)
    for folder in folders:
        assert sorted(named(graph[folder], "hasPart")) == sorted(
            path.relative_to(ROOT).as_posix() for path in (ROOT / folder).iterdir() if path.is_file()
        )


def test_all_records_notebooks_and_locks_are_listed(graph):
    patterns = ["notebooks/*.ipynb", "book/runs/*/*.ipynb", "results/*.t*", "results/*/*.*", "requirements*.lock"]
    expected = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}
    assert expected and expected <= {unquote(name) for name in graph}


def test_each_record_is_the_result_of_one_action_which_ran_its_chapter_on_its_model(graph):
    actions = of_type(graph, "CreateAction")
    makers: dict[str, list[dict]] = {}
    for action in actions:
        for result in named(action, "result"):
            makers.setdefault(unquote(result), []).append(action)
    assert all(len(found) == 1 for found in makers.values())
    assert RECORDS and RECORDS.keys() <= makers.keys()
    for place, path in RECORDS.items():
        record, (action,) = json.loads(path.read_text(encoding="utf-8")), makers[place]
        (instrument,) = named(action, "instrument")
        assert instrument.startswith(f"notebooks/{record['chapter']}-")
        given = [graph[name] for name in named(action, "object")]
        assert (record["model"], record["revision"]) in {(g.get("name"), g.get("version")) for g in given}
        values = [(g["name"], g["value"]) for g in given if g["@type"] == "PropertyValue"]
        for name, value in {"seed": record["seed"], "source": record["source"], **record["parameters"]}.items():
            assert (name, value if isinstance(value, int | float | str) else json.dumps(value)) in values
        for name, version in record["versions"].items():
            assert f"{name} {version}" in action["description"]
        assert graph[named(graph[place], "additionalProperty")[0]]["value"] == record["code"]


def test_an_action_is_one_run_of_a_chapter(graph):
    runs = {(path.parent.name, json.loads(path.read_text(encoding="utf-8"))["chapter"]) for path in RECORDS.values()}
    runs |= {(path.parent.name, path.stem) for path in ROOT.glob("results/*/[0-9][0-9].toml")}
    alone = {run for run in runs if run[1] not in COMPARE}
    actions = of_type(graph, "CreateAction")
    assert len(actions) == len(alone) + len({number for _, number in runs} & set(COMPARE))
    assert sorted(named(graph["./"], "mentions")) == sorted(action["@id"] for action in actions)
    for action in actions:
        (instrument,), (agent,) = named(action, "instrument"), named(action, "agent")
        assert set(graph[instrument]["@type"]) == {"File", "SoftwareSourceCode", "ComputationalWorkflow"}
        assert graph[agent]["name"] == CITATION["authors"][0]["name"]
        noted = [ROOT / unquote(name) for name in named(action, "result")]
        said = [json.loads(path.read_text("utf-8")).get("date") for path in noted if path.suffix == ".json"]
        said += [tomllib.loads(path.read_text("utf-8"))["date"] for path in noted if path.suffix == ".toml"]
        assert action["endTime"] == max(filter(None, said))


def test_a_notebook_that_ran_on_another_model_is_a_result_beside_the_records_of_that_model(graph):
    made = {name: action for action in of_type(graph, "CreateAction") for name in named(action, "result")}
    stored = sorted(ROOT.glob("book/runs/*/*.ipynb"))
    assert stored
    for path in stored:
        action = made[path.relative_to(ROOT).as_posix()]
        assert named(action, "instrument") == [f"notebooks/{path.name}"]
        assert f"results/{path.parent.name}/{path.name[:2]}.toml" in named(action, "result")


def test_data_of_a_record_are_objects_of_its_run(graph):
    given = set(named(graph["#run-01-smollm2-135m"], "object"))
    assert {"knpaper/data/facts/capital.tsv", "knpaper/data/relations.toml"} <= given
    public = set(named(graph["#run-01-smollm2-135m@public"], "object"))
    pins = tomllib.loads((ROOT / "knpaper" / "data" / "public.toml").read_text(encoding="utf-8"))
    versions = {graph[name].get("version") for name in public}
    assert {pins[name]["commit"] for name in ("pararel", "blimp", "counterfact")} <= versions
    assert "knpaper/data/public.toml" in public - given


# --------------------------------------------------------------------------- codemeta.json and .zenodo.json


def test_the_descriptions_say_what_the_citation_file_and_the_package_say(written):
    software, deposit = read(written, "codemeta.json"), read(written, ".zenodo.json")
    assert software["@context"] == "https://w3id.org/codemeta/3.0" and software["@type"] == "SoftwareSourceCode"
    assert software["name"] == deposit["title"] == CITATION["title"]
    assert software["version"] == deposit["version"] == CITATION["version"]
    assert software["license"].rpartition("/")[2] == deposit["license"] == CITATION["license"]
    assert software["description"] == deposit["description"] == CITATION["abstract"].strip()
    assert software["keywords"] == deposit["keywords"] == PACKAGE["keywords"]
    assert [author["name"] for author in software["author"]] == [a["name"] for a in CITATION["authors"]]
    assert [author["name"] for author in deposit["creators"]] == [a["name"] for a in CITATION["authors"]]
    needs = {need["name"] for need in software["softwareRequirements"]}
    assert needs == {re.match(r"[\w-]+", text)[0] for text in PACKAGE["dependencies"]}
    paper, cited = software["referencePublication"], CITATION["preferred-citation"]
    assert paper["name"] == cited["title"] and paper["@id"] == cited["url"]
    assert [author["familyName"] for author in paper["author"]] == [a["family-names"] for a in cited["authors"]]
    assert deposit["upload_type"] == "software" and "codeRepository" not in software
    assert deposit["related_identifiers"][0]["identifier"] == "arXiv:2405.02421"


def test_authors_with_two_names_are_persons(archive):
    author = {"family-names": "Niu", "given-names": "Jingcheng"}
    assert archive.agent(author) == {"@type": "Person", "familyName": "Niu", "givenName": "Jingcheng"}
    project = archive.Project({**CITATION, "authors": [author]}, PACKAGE, "0", "2026-01-01", "")
    assert archive.zenodo(project)["creators"] == [{"name": "Niu, Jingcheng"}]
    entities = {entity["@id"]: entity for entity in archive.crate(ROOT, project, {})["@graph"]}
    assert named(entities["./"], "author") == ["#Jingcheng%20Niu"]
    assert entities["#Jingcheng%20Niu"] == {
        "@id": "#Jingcheng%20Niu",
        "@type": "Person",
        "name": "Jingcheng Niu",
        "familyName": "Niu",
        "givenName": "Jingcheng",
    }


# ------------------------------------------------------------------------------------------ how it is made


def test_another_run_elsewhere_writes_the_same_bytes_and_names_no_place(archive, written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    monkeypatch.setenv("KNCORE_REPOSITORY", "")
    archive.main(["--out", str(tmp_path / "again" / "deep")])
    assert {path.name for path in written.iterdir()} == NAMES
    for name in NAMES:
        text = (written / name).read_bytes()
        assert text == (tmp_path / "again" / "deep" / name).read_bytes(), name
        assert str(ROOT).encode() not in text


def test_a_tag_a_day_and_a_repository_are_what_is_given(archive, tmp_path, monkeypatch):
    monkeypatch.setenv("KNCORE_REPOSITORY", "https://github.com/owner/name.git")
    monkeypatch.setattr(archive, "read_runs", lambda root: {})
    tag = f"v{PACKAGE['version']}-3-gabc1234"
    archive.main(["--out", str(tmp_path), "--version", tag, "--date", "2031-02-03"])
    software, root = read(tmp_path, "codemeta.json"), read(tmp_path, "ro-crate-metadata.json")["@graph"][1]
    assert software["codeRepository"] == root["url"] == "https://github.com/owner/name"
    assert software["version"] == root["version"] == tag[1:]
    assert software["datePublished"] == root["datePublished"] == "2031-02-03"


def refusal(archive, *arguments: object, **named: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        archive.main([str(argument) for argument in arguments], **named)
    assert "\n" not in stopped.value.code
    return stopped.value.code


@pytest.mark.parametrize("tag", ["v9.9.9", "main", PACKAGE["version"] + ".1", "v" + PACKAGE["version"] + "-x"])
def test_a_tag_of_another_version_is_refused(archive, tmp_path, monkeypatch, tag):
    monkeypatch.setattr(archive, "read_runs", lambda root: {})
    said = refusal(archive, "--out", tmp_path, "--version", tag, "--date", "2031-02-03")
    assert repr(tag) in said and f"expected v{PACKAGE['version']}" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("day", ["", "3 February 2031", "2031-02-30", "2031-02-03T00:00"])
def test_a_day_that_is_none_is_refused(archive, tmp_path, monkeypatch, day):
    monkeypatch.setattr(archive, "read_runs", lambda root: {})
    assert f"{day!r}, expected YYYY-MM-DD" in refusal(archive, "--out", tmp_path, "--date", day)


@pytest.fixture
def small(tmp_path) -> Path:
    """A checkout with the notebooks, one record and the files that say what the project is."""
    root = tmp_path / "checkout"
    for name in ("notebooks", "knpaper/data", "kncore/data"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(ROOT / name)
    for name in (
        "_toc.yml",
        "_config.yml",
        "CITATION.cff",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "requirements.lock",
    ):
        shutil.copy(ROOT / name, root / name)
    (root / "results" / "smollm2-135m").mkdir(parents=True)
    shutil.copy(ROOT / "results" / "smollm2-135m" / "as-similar.json", root / "results" / "smollm2-135m")
    return root


def test_a_record_that_was_edited_is_refused_and_nothing_is_written(archive, small, tmp_path):
    archive.main(["--out", str(tmp_path / "good")], root=small)
    assert {path.name for path in (tmp_path / "good").iterdir()} == NAMES
    path = small / "results" / "smollm2-135m" / "as-similar.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**record, "n": record["n"] + 1}), encoding="utf-8")
    assert "as-similar.json was edited" in refusal(archive, "--out", tmp_path / "bad", root=small)
    assert not (tmp_path / "bad").exists()


def test_what_belongs_to_no_chapter_and_versions_that_differ_are_refused(archive, small, tmp_path):
    table = small / "results" / "smollm2-135m" / "left-over.tsv"
    table.write_text("a\n")
    assert "left-over.tsv belongs to no chapter" in refusal(archive, "--out", tmp_path / "bad", root=small)
    table.unlink()
    citation = (small / "CITATION.cff").read_text(encoding="utf-8")
    (small / "CITATION.cff").write_text(re.sub(r"(?m)^version: .*$", "version: 7.0.0", citation), encoding="utf-8")
    assert "CITATION.cff is of version 7.0.0" in refusal(archive, "--out", tmp_path / "bad", root=small)


# -------------------------------------------------------------------------------------------- the workflow


def test_the_workflow_of_a_tag_writes_the_files_packs_them_and_attaches_them():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads `on` as a truth value
    assert workflow["jobs"]["attach"]["needs"] == "describe"
    steps = [step.get("run", step.get("uses", "")) for step in workflow["jobs"]["describe"]["steps"]]
    order = ["make install", ".ci/archive.py --version", "git archive", "actions/upload-artifact@"]
    at = [next(i for i, step in enumerate(steps) if what in step) for what in order]
    assert at == sorted(at)
    packed = next(step for step in steps if "git archive" in step)
    assert all(f"--add-file _build/archive/{name}" in packed for name in NAMES)
