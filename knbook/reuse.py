"""What the runs of a book gave, kept for the next book: a chapter whose inputs are what they were is not run again.

A run is kept under the name of all that decides its notebook and its records: the cells, the files of the three
packages, every installed package, the models, and the settings in the environment. It can be told that nothing has
changed; where that cannot be told, as with a folder of data, a chapter is run.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from knbook.checkout import Chapter, Scalar
from kncore import models
from kncore.store import cache, disk, fingerprint
from knpaper import stored

PACKAGES = ("kncore", "knpaper", "knbook")
PINNED = ("own", "public")  # sources of data whose content is part of the package, or known by a checksum
PLACES = ("KNCORE_SCORES", "KNCORE_RESULTS", "KNCORE_CACHE")  # of what is kept: they decide no number


def place(chapter: Chapter, parameters: Mapping[str, Scalar]) -> Path | None:
    """Return the file in which a run of a chapter with parameters other than its defaults is kept; None for a run that
    reads a folder of data, whose content may change, and for a model that cannot be told."""
    values = {**chapter.defaults, **parameters}
    names = str(values.get("models", values.get("model", "")))
    try:
        known = [models.identity(name) for name in names.split(",") if name]
    except (ValueError, OSError):  # the run says what is wrong with it
        return None
    if values.get("source", "own") not in PINNED or values.get("corpus"):
        return None
    cells = [[cell.cell_type, cell.source, cell.metadata.get("tags", [])] for cell in stored.read(chapter.path).cells]
    settings = {name: value for name, value in os.environ.items() if name.startswith("KNCORE_") and name not in PLACES}
    name = fingerprint.digest(chapter.path.name, cells, dict(parameters), known, settings, _installed())
    return cache.scores_folder() / name[:2] / f"{name}.safetensors"


@functools.cache
def _installed() -> list:
    """Return the files of the three packages by their checksums, the versions of all others, and the machine."""
    roots = [Path(find_spec(name).origin).parent for name in PACKAGES]
    files = [path for root in roots for path in sorted(root.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    versions = sorted(f"{found.name}=={found.version}" for found in distributions())
    return [[f"{path.parent.name}/{path.name}", disk.digest(path)] for path in files] + [versions, platform.platform()]


def keep(place: Path, folder: Path) -> None:
    """Keep the files of a run; where that cannot be, say so once and go on."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    tensors = {name: torch.from_numpy(np.frombuffer(content, np.uint8).copy()) for name, content in files.items()}
    disk.keep(place, tensors)


def restore(place: Path, folder: Path) -> bool:
    """Write the files of a run that was kept into a folder; return whether there was one, whole."""
    found = disk.kept(place)
    for name, content in (found or {}).items():
        disk.write(folder / name, content.numpy().tobytes(), sync=False)
    return found is not None
