"""Fixtures for all tests: the checkout, the optional sample data, and a user cache that tests do not touch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from toy import COMPUTE, make_checkout, notebook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A busy machine is slow, not wrong: no profile has a limit of time, and those that Hypothesis brings lose theirs.
# A commit is judged by the same examples each time; HYPOTHESIS_PROFILE=default draws new ones.
for profile, changes in {"default": {}, "ci": {}, "repeatable": {"derandomize": True}}.items():
    parent = settings.get_profile("default" if profile == "repeatable" else profile)
    patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile(profile, parent, **patient, **changes)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where processes share the tests, a file is one's; trials that wait long for other processes come first."""
    for item in items:
        alone = item.path.stem in ("test_faults", "test_workflow")
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid if alone else item.path.stem))
    items.sort(key=lambda item: item.path.stem not in ("test_faults", "test_workflow"))


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
