"""Fixtures for all tests: the checkout, the optional sample data, and a user cache that tests do not touch."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nbformat
import pytest
from hypothesis import HealthCheck, settings
from nbformat.v4 import new_output
from toy import COMPUTE, make_checkout, notebook

from knbook import kernel
from kncore import models
from kncore.store import disk
from knpaper import stored

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A busy machine is slow, not wrong: no profile has a limit of time, and those that Hypothesis brings lose theirs.
# A commit is judged by the same examples each time; HYPOTHESIS_PROFILE=default draws new ones.
for profile, changes in {"default": {}, "ci": {}, "repeatable": {"derandomize": True}}.items():
    parent = settings.get_profile("default" if profile == "repeatable" else profile)
    patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile(profile, parent, **patient, **changes)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


# Files that take longest, most of it in other processes, longest first. Each test of the first two is shared out alone.
LONG = ("test_faults", "test_workflow", "test_pages", "test_runner", "test_kinds", "test_stats", "test_project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where processes share the tests, a file is one's; what takes long comes first (with --no-loadscope-reorder)."""
    for item in items:
        alone = item.path.stem in LONG[:2]
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid if alone else item.path.stem))
    places = {stem: place for place, stem in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The top folder of the repository."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Samples of the public data sets in their own formats; the test is skipped where KNCORE_DATA names none."""
    folder = Path(os.environ.get("KNCORE_DATA") or "")
    if not os.environ.get("KNCORE_DATA") or not folder.is_dir():
        pytest.skip("KNCORE_DATA names no folder with sample data")
    return folder


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attribution scores and records of a test go to a folder of its own."""
    folder = tmp_path_factory.mktemp("kncore")
    monkeypatch.setenv("KNCORE_SCORES", str(folder / "scores"))
    monkeypatch.setenv("KNCORE_RESULTS", str(folder / "results"))


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A checkout with one notebook that needs no model."""
    return make_checkout(tmp_path / "toy", n01_toy=notebook(COMPUTE))


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which records go."""
    monkeypatch.setenv("KNCORE_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture
def pretended(monkeypatch):
    """Runs that need no kernel: the notebook's last cell prints n, and its record holds n; then `steps` are taken."""
    steps = []

    def execute(path, parameters, scratch, *_):
        for folder in ("results", "before", "notebooks"):
            (scratch / folder).mkdir(exist_ok=True)
        shutil.copy(path, scratch / "notebooks")
        nb = nbformat.read(path, as_version=4)
        values = {**stored.parameters(nb), **parameters}
        model, n = values["model"], values["n"]
        name = model if models.local(model) is None else models.identity(model)[0]
        if n:
            disk.write(scratch / "results" / name.replace("/", "--") / "claim.json", json.dumps({"n": n}))
        nb.cells[-1].outputs = [new_output("stream", name="stdout", text=f"{n}\n")]
        nb.metadata.papermill = {"duration": 1.0}
        for step in steps:
            step(scratch)
        return nb

    monkeypatch.setattr(kernel, "execute", execute)
    return steps


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing has been said yet, and the user cache is a folder of the test."""
    monkeypatch.setattr(disk, "_said", set())
    monkeypatch.setattr(disk, "_elsewhere", {})
    monkeypatch.setenv("KNCORE_CACHE", str(tmp_path / "cache"))
