"""Write what archives read of a version: `codemeta.json`, `.zenodo.json`, and `ro-crate-metadata.json` with all runs.

.venv/bin/python .ci/archive.py [--out FOLDER] [--version TAG] [--date YYYY-MM-DD]

The crate follows RO-Crate 1.1 and its profile Process Run Crate 0.5. Each run of a chapter is an action: its instrument
is the chapter's notebook, its objects are models, data and settings, its results the records, the note of the run and
the notebook as it ran. Paths are those of the checkout: the files belong into the top folder of a copy of it. The same
checkout gives the same bytes, with the address of the repository where `$KNCORE_REPOSITORY` names it.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from urllib.parse import quote

import yaml
from packaging.requirements import Requirement

from knbook import checkout, provenance
from knbook.errors import UsageError
from kncore import zoo
from kncore.store import disk
from knpaper import records, resources
from knpaper.datasets import files

ROOT = Path(__file__).resolve().parent.parent
CRATE, PROFILE = "https://w3id.org/ro/crate/1.1", "https://w3id.org/ro/wfrun/process/0.5"
CONTEXT = [f"{CRATE}/context", "https://w3id.org/ro/terms/workflow-run/context"]  # the second one defines sha256
DESCRIPTOR = "ro-crate-metadata.json"
LICENSES, LANGUAGE, HUB = "https://spdx.org/licenses/", "https://www.python.org/", "https://huggingface.co"
WORKFLOW = ["File", "SoftwareSourceCode", "ComputationalWorkflow"]
FORMATS = {".ipynb": "application/x-ipynb+json", ".json": "application/json", ".toml": "application/toml"}
FORMATS |= {".tsv": "text/tab-separated-values", ".md": "text/markdown", ".safetensors": "application/octet-stream"}

revision_of = functools.cache(zoo.revision)
Graph = dict[str, dict]  # the entities of a crate by their identifiers
Reference = dict[str, str]


@dataclass(frozen=True)
class Project:
    """What CITATION.cff and pyproject.toml say, the version with its day, and the repository ("" if unknown)."""

    citation: Mapping
    package: Mapping
    version: str
    day: str
    repository: str


@dataclass
class Run:
    """A run of a chapter: its models by name and revision, and by path the records, notes and files that it left."""

    chapter: checkout.Chapter
    models: set[tuple[str, str]] = field(default_factory=set)
    records: dict[Path, Mapping] = field(default_factory=dict)
    notes: dict[Path, Mapping] = field(default_factory=dict)
    left: list[Path] = field(default_factory=list)

    def days(self) -> set[str]:
        """Return the days that records and notes name."""
        return {said["date"] for said in (*self.records.values(), *self.notes.values()) if "date" in said}

    def packages(self) -> set[tuple[str, str]]:
        """Return the packages that the run was computed with, each with its version."""
        named = ("kncore", *records.DECIDING)
        found = [{name: note[name] for name in named if name in note} for note in self.notes.values()]
        found += [record["versions"] for record in self.records.values()]
        return {package for versions in found for package in versions.items()}


# ------------------------------------------------------------------------------------------- what is read


def read_project(root: Path, tag: str, day: str) -> Project:
    """Return what a checkout says of itself; ValueError where its files and the tag differ, or the day is none."""
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    package = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = package["version"]
    if citation["version"] != declared:
        raise ValueError(
            f"CITATION.cff is of version {citation['version']} and pyproject.toml of {declared}, expected the same; "
            "change one of them"
        )
    version = (tag or declared).removeprefix("v")
    if not re.fullmatch(rf"{re.escape(declared)}(-\d+-g[0-9a-f]+)?", version):
        raise ValueError(
            f"the tag {tag!r} is not of version {declared}, expected v{declared}; give that tag, or change the version "
            "in pyproject.toml and CITATION.cff"
        )
    if not is_day(day):
        raise ValueError(f"the day of publication is {day!r}, expected YYYY-MM-DD; give one as --date")
    return Project(citation, package, version, day, provenance.book_info(root).repository)


def is_day(text: str) -> bool:
    """Return whether a text is a day as YYYY-MM-DD."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def read_runs(root: Path) -> dict[str, Run]:
    """Return the runs that are stored, by what names them: "03-gpt2", or "09" where one run compares models.

    Raises ValueError for a record that is none or was edited, and for a file of a chapter that is not there.
    """
    chapters = {chapter.number: chapter for chapter in checkout.chapters(root)}
    results, found = root / "results", {}
    models: dict[str, set[tuple[str, str]]] = {}  # of each folder of records

    def run_of(path: Path, number: str) -> Run:
        if number not in chapters:
            raise ValueError(f"{path} belongs to no chapter in notebooks/; restore its notebook, or delete the file")
        compares = checkout.is_comparison(chapters[number]) or path.parent == results
        return found.setdefault(number if compares else f"{number}-{path.parent.name}", Run(chapters[number]))

    for record in records.read_records(results):
        path = results / records.place_of(record)
        if record.get("checksum") != records.checksum(record):
            raise ValueError(
                f"{path} was edited after it was recorded: its checksum is not that of its fields; make it anew"
            )
        run = run_of(path, record["chapter"])
        run.records[path] = record
        run.models.add((record["model"], record["revision"]))
        models.setdefault(path.parent.name, set()).add((record["model"], record["revision"]))
    for path in sorted([*results.glob("[0-9][0-9].toml"), *results.glob("*/[0-9][0-9].toml")]):
        run = run_of(path, path.stem)
        run.notes[path] = checkout.timing(path)
        # A chapter without claims has no record: those of its model say what the model was.
        run.models = run.models or models.get(path.parent.name, set())
    for path in sorted((root / "book" / "runs").glob("*/[0-9][0-9]-*.ipynb")):
        run_of(path, path.name[:2]).left.append(path)
    for path in sorted(results.glob("*/*.tsv")):
        run_of(path, keeper(path, chapters.values())).left.append(path)
    return dict(sorted(found.items()))


def keeper(table: Path, chapters: Iterable[checkout.Chapter]) -> str:
    """Return the number of the chapter whose notebook keeps a table beside its records; "" where none does."""
    call = f'keep_table(\\"{table.stem}\\"'  # as a notebook, which is JSON, has it
    return next((c.number for c in chapters if call in c.path.read_text(encoding="utf-8")), "")


# ------------------------------------------------------------------------------ codemeta.json, .zenodo.json


def agent(author: Mapping) -> dict[str, str]:
    """Return an author of CITATION.cff: a person, or an organisation where it has one name only."""
    if "name" in author:
        return {"@type": "Organization", "name": author["name"]}
    return {"@type": "Person", "familyName": author["family-names"], "givenName": author["given-names"]}


def codemeta(project: Project) -> dict:
    """Return the description of the software in CodeMeta 3.0."""
    citation, package, paper = project.citation, project.package, project.citation["preferred-citation"]
    needed = [Requirement(text) for text in package["dependencies"]]
    language = re.compile(r"Programming Language :: (\w+)")
    about = {
        "@context": "https://w3id.org/codemeta/3.0",
        "@type": "SoftwareSourceCode",
        "name": citation["title"],
        "description": citation["abstract"].strip(),
        "version": project.version,
        "datePublished": project.day,
        "license": LICENSES + citation["license"],
        "author": [agent(author) for author in citation["authors"]],
        "keywords": package["keywords"],
        "codeRepository": project.repository,
        "programmingLanguage": sorted({found[1] for text in package["classifiers"] if (found := language.match(text))}),
        "runtimePlatform": f"Python {package['requires-python']}",
        "softwareRequirements": [
            {"@type": "SoftwareApplication", "name": need.name, "version": str(need.specifier)} for need in needed
        ],
        "referencePublication": {
            "@id": paper["url"],
            "@type": "schema:ScholarlyArticle",
            "name": paper["title"],
            "author": [agent(author) for author in paper["authors"]],
            "datePublished": str(paper["year"]),
        },
    }
    return {name: value for name, value in about.items() if value}


def zenodo(project: Project) -> dict:
    """Return the metadata of a deposit at Zenodo."""
    citation = project.citation
    authors = [agent(author) for author in citation["authors"]]
    cited = citation["preferred-citation"]["identifiers"]
    return {
        "title": citation["title"],
        "description": citation["abstract"].strip(),
        "upload_type": citation["type"],
        "version": project.version,
        "license": citation["license"],
        "creators": [{"name": a.get("name") or f"{a['familyName']}, {a['givenName']}"} for a in authors],
        "keywords": project.package["keywords"],
        "related_identifiers": [{"identifier": each["value"], "relation": "cites"} for each in cited],
    }


# ------------------------------------------------------------------------------------------- the crate


def add(graph: Graph, identifier: str, kind: str | list[str], **fields: object) -> Reference:
    """Add an entity with the fields that are known, unless it is there, and return the reference to it."""
    said = {}
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == 1:
            value = value[0]  # RO-Crate asks for this in the place of a list of one
        if value not in (None, []):
            said[name] = value
    graph.setdefault(identifier, {"@id": identifier, "@type": kind, **said})
    return {"@id": identifier}


def add_file(graph: Graph, root: Path, path: Path, kind: str | list[str] = "File", **fields: object) -> Reference:
    """Add a file of the checkout with its size and sha256."""
    place = path.relative_to(root).as_posix()
    identifier = quote(place, safe="/@")
    if identifier in graph:
        return {"@id": identifier}
    content = path.read_bytes()
    about = {"name": place, "encodingFormat": FORMATS.get(path.suffix, "text/plain"), **fields}
    size, digest = str(len(content)), hashlib.sha256(content).hexdigest()
    return add(graph, identifier, kind, **about, contentSize=size, sha256=digest)


def add_model(graph: Graph, root: Path, name: str, revision: str) -> Reference:
    """Add a model with what it was made from: its folder in the package, where the files in it are of that revision."""
    entry = zoo.REGISTRY.get(name)
    if isinstance(entry, zoo.Shipped) and revision_of(name) == revision:
        paths = sorted(path for path in (root / "kncore" / "weights" / name).iterdir() if path.name[0] != ".")
        about = {"isBasedOn": add_origin(graph, entry.base), "hasPart": [add_file(graph, root, path) for path in paths]}
        return add(graph, f"kncore/weights/{name}/", "Dataset", name=name, version=revision, **about)
    identifier = f"#model-{quote(f'{name}-{revision}', safe='@')}"
    return add(graph, identifier, "CreativeWork", name=name, version=revision, isBasedOn=add_origin(graph, entry))


def add_origin(graph: Graph, entry: object) -> Reference | None:
    """Add what the registry takes a model from, a wheel, a GGUF file or a repository; return None for others."""
    if isinstance(entry, zoo.Wheel):
        package = f"pkg:pypi/{entry.requirement.replace('==', '@')}"
        return add(graph, package, "CreativeWork", name=entry.requirement, sha256=entry.sha256)
    if isinstance(entry, zoo.Gguf):
        address = f"{HUB}/{entry.repo}/blob/{entry.revision}/{entry.file}"
        return add(graph, address, "CreativeWork", name=entry.file, version=entry.revision, sha256=entry.sha256)
    if isinstance(entry, zoo.Hub):
        address = f"{HUB}/{entry.repo}/tree/{entry.revision}"
        return add(graph, address, "CreativeWork", name=entry.repo, version=entry.revision)
    return None


def add_data(graph: Graph, root: Path, run: Run) -> list[Reference]:
    """Add the data that records of a run name, and of public data their repositories and the file that pins them."""
    found, places = [], {}
    # Which of the public sets a chapter read, its records do not say.
    if any(record["source"] == "public" for record in run.records.values()):
        pins = resources.toml("public.toml")
        for name in files.SETS:
            address = f"https://github.com/{pins[name]['repository']}/tree/{pins[name]['commit']}"
            found.append(add(graph, address, "CreativeWork", name=name, version=pins[name]["commit"]))
        found.append(add_file(graph, root, root / "knpaper" / "data" / "public.toml"))
    for path, record in run.records.items():
        for name in record["data"]:
            relation = name.removeprefix("relation ")
            places |= dict.fromkeys([name] if relation == name else ["relations.toml", f"facts/{relation}.tsv"], path)
    for place, path in places.items():
        there = [root / room / "data" / place for room in ("knpaper", "kncore")]
        there = [file for file in there if file.is_file()]
        if not there:
            raise ValueError(f"{path} names the data {place!r}, expected a file of the packages; make the record anew")
        found.append(add_file(graph, root, there[0]))
    return found


def add_setting(graph: Graph, name: str, value: object) -> Reference:
    """Add a value that something was computed with."""
    plain = value if isinstance(value, str | int | float) else json.dumps(value)
    return add(graph, f"#{name}={quote(str(plain), safe='')}", "PropertyValue", name=name, value=plain)


def add_run(graph: Graph, root: Path, name: str, run: Run, notebook: Reference, author: Reference) -> Reference:
    """Add a run as an action of its notebook, with what it was given and what it left."""
    given = [add_model(graph, root, *model) for model in run.models] + add_data(graph, root, run)
    left = [add_file(graph, root, path) for path in (*run.notes, *run.left)]
    for path, record in run.records.items():
        settings = {name: record[name] for name in ("dtype", "seed", "source")} | record["parameters"]
        given += [add_setting(graph, *setting) for setting in settings.items()]
        said = f"{record['statement']} {records.effect(record)}, {record['verdict']}"
        code = add_setting(graph, "code", record["code"])
        left.append(add_file(graph, root, path, description=said, additionalProperty=code))
    columns = {records.column_of(record) for record in run.records.values()} or {model for model, _ in run.models}
    packages = ", ".join(f"{package} {version}" for package, version in sorted(run.packages()))
    return add(
        graph,
        f"#run-{quote(name, safe='@')}",
        "CreateAction",
        name=f"Chapter {run.chapter.number} on {', '.join(sorted(columns))}",
        description=f"{run.chapter.path.name}, run with {packages}",
        endTime=max(run.days(), default=None),
        agent=author,
        instrument=notebook,
        object=ordered(given),
        result=ordered(left),
    )


def ordered(references: Iterable[Reference]) -> list[Reference]:
    """Return references in the order of their identifiers, each once."""
    return [{"@id": identifier} for identifier in sorted({reference["@id"] for reference in references})]


def crate(root: Path, project: Project, runs: Mapping[str, Run]) -> dict:
    """Return the metadata of the crate: its descriptor, its root, and all that these refer to, in order."""
    graph: Graph = {}
    citation, paper = project.citation, project.citation["preferred-citation"]
    license = add(graph, LICENSES + citation["license"], "CreativeWork", name=citation["license"])
    cited = add(graph, paper["url"], "ScholarlyArticle", name=paper["title"], url=paper["url"])
    profile = add(graph, PROFILE, "CreativeWork", name="Process Run Crate", version=PROFILE.rpartition("/")[2])
    language = add(graph, LANGUAGE, "ComputerLanguage", name="Python", url=LANGUAGE)
    authors = []
    for about in map(agent, citation["authors"]):
        kind = about.pop("@type")
        about.setdefault("name", " ".join(reversed(about.values())))
        authors.append(add(graph, f"#{quote(about['name'])}", kind, **about))
    for pattern in ("CITATION.cff", "LICENSE", "README.md", "pyproject.toml", "requirements*.lock", "results/*.tsv"):
        for path in sorted(root.glob(pattern)):
            add_file(graph, root, path)

    actions = []
    for chapter in checkout.chapters(root):
        own = {name: run for name, run in runs.items() if run.chapter.number == chapter.number}
        packages = {package for run in own.values() for package in run.packages()}
        needed = [add(graph, f"#{n}-{v}", "SoftwareApplication", name=n, softwareVersion=v) for n, v in packages]
        about = {"version": project.version, "programmingLanguage": language}
        about["codeRepository"] = project.repository or None
        about["softwareRequirements"] = ordered([*needed, {"@id": "requirements.lock"}])
        notebook = add_file(graph, root, chapter.path, WORKFLOW, **about)
        actions += [add_run(graph, root, name, run, notebook, authors[0]) for name, run in own.items()]

    data = [name for name, entity in sorted(graph.items()) if entity["@type"] in ("File", "Dataset", WORKFLOW)]
    folders = tuple(name for name in data if name.endswith("/"))
    rest = [graph[name] for name in sorted(graph)]
    add(graph, DESCRIPTOR, "CreativeWork", about={"@id": "./"}, conformsTo={"@id": CRATE})
    add(
        graph,
        "./",
        "Dataset",
        conformsTo=profile,
        name=citation["title"],
        description=citation["abstract"].strip(),
        version=project.version,
        datePublished=project.day,
        license=license,
        author=authors,
        citation=cited,
        keywords=project.package["keywords"],
        url=project.repository or None,
        mentions=ordered(actions),
        hasPart=[{"@id": name} for name in data if name in folders or not name.startswith(folders)],
    )
    return {"@context": CONTEXT, "@graph": [graph[DESCRIPTOR], graph["./"], *rest]}


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    """Write the three files; end with one line that says why, where the checkout or an argument does not allow it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=root / "_build" / "archive", help="a folder (_build/archive)")
    parser.add_argument("--version", default="", metavar="TAG", help="a tag, or what `git describe` says (none)")
    parser.add_argument("--date", default="", help="the day of publication (the newest day of a run)")
    given = parser.parse_args(arguments)
    try:
        runs = read_runs(root)
        day = given.date or max((day for run in runs.values() for day in run.days()), default="")
        project = read_project(root, given.version, day)
        written = {"codemeta.json": codemeta(project), ".zenodo.json": zenodo(project)}
        written[DESCRIPTOR] = crate(root, project, runs)
        for name, content in written.items():
            disk.write(given.out / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except (OSError, ValueError, UsageError) as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
