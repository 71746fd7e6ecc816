"""The files around the code: kept in step with each other, free of machine names, and true to what they promise."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import yaml
from commands import parsed
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from knbook import checkout, pages
from kncore import rome
from knpaper import stored

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOTEBOOKS = sorted([*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "book" / "runs").glob("*/*.ipynb")])


def locked(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), f"{name} must hold name==version and nothing else"
    return {canonicalize_name(package): version for package, version in pairs}


def texts() -> list[Path]:
    """Text files of the repository, tracked or about to be."""
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        command = [git, "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        paths = [ROOT / line for line in listed]
    else:
        paths = [path for path in ROOT.rglob("*") if not {"_build", ".venv"} & set(path.relative_to(ROOT).parts)]
    own = [
        path
        for path in paths
        if not {"mathjax", "vega"} & set(path.parts) and path.suffix not in {".woff", ".png", ".gz", ".safetensors"}
    ]
    return [path for path in own if path.is_file() and path.stat().st_size < 5_000_000]


# --------------------------------------------------------------------------------- what is installed where


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-bench.lock", "requirements-cluster.lock"])
def test_a_lock_holds_plain_exact_versions_in_order(name):
    packages = locked(name)
    assert list(packages) == sorted(packages)
    for package, version in packages.items():
        assert re.fullmatch(r"\d+(\.\d+)*(\.post\d+)?", version), f"{package}=={version}"


def test_the_lock_satisfies_what_the_package_asks_for():
    packages = locked("requirements.lock")
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *extras["book"], *extras["test"]]
    bench = {**packages, **locked("requirements-bench.lock")}
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(packages[canonicalize_name(requirement.name)]), requirement
    for requirement in map(Requirement, extras["bench"]):
        assert requirement.specifier.contains(bench[canonicalize_name(requirement.name)]), requirement
    for requirement in map(Requirement, asked + extras["bench"]):
        operators = {clause.operator for clause in requirement.specifier}
        assert ">=" in operators and "<" in operators, f"{requirement} needs both bounds"


def test_conda_users_get_the_same_packages():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["dependencies"] == ["python=3.11", "pip", {"pip": ["-r requirements.lock", "-e ."]}]
    assert PROJECT["requires-python"] == ">=3.11"


def test_citation_and_package_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Niu", "Liu", "Zhu", "Penn"]
    assert any(identifier["value"] == "arXiv:2405.02421" for identifier in paper["identifiers"])


# -------------------------------------------------------------------------------------- what is written


def test_no_file_names_a_machine_or_a_registry():
    folders = "|".join(["work", "opt", "root", "home"])
    places = re.compile(rf"(?<![\w./~-])/(?:{folders})/\w", re.IGNORECASE)
    registries = re.compile(
        "|".join([r"py" r"pi\.org", r"python" r"hosted", r"registry\.npm" r"js", "--(extra-)?index-url"])
    )
    found = []
    for path in texts():
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.name not in {"test_stored.py"}:
            found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in places.finditer(text)]
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in registries.finditer(text)]
    assert not found


def test_the_readme_shows_commands_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):.*##", makefile, re.MULTILINE))
    assert targets == set("help install book pdf test smoke models notebooks lint audit bench clean".split())
    shown = set(re.findall(r"^make ([a-z]+)", readme, re.MULTILINE))
    assert {"book", "test"} <= shown <= targets
    lines = re.findall(r"^\.venv/bin/python -m kncore (.*?)(?:\s+#.*)?$", readme, re.MULTILINE)
    assert lines
    for page in sorted((ROOT / "book").glob("*.md")):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        lines += re.findall(r"^python -m kncore (.*?)(?:\s+#.*)?$", text, re.MULTILINE)
    for line in lines:
        parsed(line.split())
    for name in re.findall(r"(?:notebooks|book)/[\w./-]+\.(?:ipynb|png|md)", readme):
        assert (ROOT / name).is_file(), f"README.md names {name}"
    assert "papermill notebooks/" in readme


@pytest.mark.model
def test_the_example_of_the_readme_runs(capsys, monkeypatch):
    settings = rome.HPARAMS["smollm2-135m"]  # the covariance of a text at hand, which need not be written first
    monkeypatch.setitem(rome.HPARAMS, "smollm2-135m", replace(settings, covariance="text"))
    (example,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.M
    )
    exec(compile(example, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "prefers" in said and "reliability" in said and "symmetry" in said


def test_the_readme_holds_the_verdicts_of_the_records():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == pages.readme(ROOT), "run `python -m kncore readme`"


# -------------------------------------------------------------------------------------- what is stored


def test_the_contents_name_the_notebooks_and_pages_there_are():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]
    for name in files:
        assert (ROOT / f"{name}.md").is_file() or (ROOT / f"{name}.ipynb").is_file(), name
    chapters = [chapter.path for chapter in checkout.chapters(ROOT)]
    listed = [name for name in files if name.startswith("notebooks/")]  # the appendix, 10, stands behind 11
    assert [f"notebooks/{path.stem}" for path in chapters] == sorted(listed)
    pages = list((ROOT / "book").glob("*.md"))
    included = {name for page in pages for name in re.findall(r"\{include\} (\S+)", page.read_text(encoding="utf-8"))}
    for page in pages:
        assert f"book/{page.stem}" in files or page.name in included, f"{page.name} is on no page of the book"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stored_notebook_is_sound_and_finalised(path):
    nb = nbformat.read(path, as_version=4)
    assert stored.problems(nb) == []
    assert path.read_text(encoding="utf-8") == stored.dumps(stored.finalise(nb)), "run `make notebooks`"


def test_every_chapter_can_be_run_on_another_model():
    for chapter in checkout.chapters(ROOT):
        assert {"n", "seed"} <= chapter.defaults.keys(), chapter.path.name
        assert ("model" in chapter.defaults) != ("models" in chapter.defaults), chapter.path.name
        source = chapter.path.read_text(encoding="utf-8")
        if "kncore.attribute(" in source and "model" in chapter.defaults:
            assert {"source", "quadrature"} <= chapter.defaults.keys(), chapter.path.name
        assert ("quadrature=quadrature" in source) == ("quadrature" in chapter.defaults), chapter.path.name


def test_the_index_in_contributing_is_that_of_the_files():
    made = runpy.run_path(str(ROOT / ".ci" / "index.py"))
    assert (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8") == made["written"](), "python .ci/index.py"
    for room in ("kncore", "knpaper", "knbook"):
        for path in (ROOT / room).rglob("*.py"):
            assert f"| `{path.relative_to(ROOT / room).as_posix()}` |" in made["index"](), f"{path} has no docstring"


# ------------------------------------------------------------------------------------------------ workflows


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_pins_its_actions_and_may_only_what_it_needs(path):
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] in ({}, {"contents": "read"})
    granted = {"pages:deploy": {"pages": "write", "id-token": "write"}}
    granted |= dict.fromkeys(("pages:colab", "pages:archive", "release:attach"), {"contents": "write"})
    granted["pages:build"] = {"contents": "read", "pages": "read"}
    for name, job in workflow["jobs"].items():
        allowed = granted.get(f"{path.stem}:{name}", {"contents": "read"})
        assert job.get("permissions", workflow["permissions"]) == allowed, name
        assert job["timeout-minutes"] <= 120 and job["runs-on"] == "ubuntu-latest"
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
            assert "${{" not in step.get("run", ""), "a script gets what GitHub knows from its environment"
    pinned = re.findall(r"uses: (\S+)(.*)", text)
    assert pinned
    for action, comment in pinned:
        assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+(\.\d+)*", comment), f"{action} says no version"


def test_workflows_agree_on_the_versions_of_actions():
    used = {use for path in WORKFLOWS for use in re.findall(r"uses: (\S+)@(\w+) # (\S+)", path.read_text("utf-8"))}
    assert len(used) == len({name for name, *_ in used})


def test_the_publishing_workflow_builds_checks_and_then_deploys():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "pages.yml").read_text(encoding="utf-8"))
    steps = [step.get("run", step.get("uses", "")) for step in workflow["jobs"]["build"]["steps"]]
    order = ["make install", "-m kncore render", "pytest tests/test_book.py", "actions/upload-pages-artifact@"]
    at = [next(i for i, step in enumerate(steps) if what in step) for what in order]
    assert at == sorted(at)
    for step in steps:
        if "-m kncore" in step:
            parsed(step.split("-m kncore ")[1].split())
    assert workflow["jobs"]["deploy"]["needs"] == "build" and workflow["jobs"]["colab"]["needs"] == "deploy"
    assert workflow["jobs"]["deploy"]["if"] == "github.ref == 'refs/heads/main'"
