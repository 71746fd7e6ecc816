"""The data files of the study, and which data files this process has read."""

from __future__ import annotations

import tomllib
from importlib.resources import files

from kncore.resources import DATA as KERNELS
from kncore.resources import digest, note, noted

__all__ = ["DATA", "current", "digest", "note", "noted", "text", "toml"]

DATA = files(__package__) / "data"


def current(name: str) -> str:
    """Return the text of a data file of the study or of the kernels as it is now; OSError where there is none."""
    found = DATA / name
    return (found if found.is_file() else KERNELS / name).read_text(encoding="utf-8")


def toml(name: str) -> dict:
    """Return a table of the study, e.g. "claims.toml", as a mapping."""
    return tomllib.loads((DATA / name).read_text(encoding="utf-8"))


def text(name: str) -> str:
    """Return the text of a data file, e.g. "nouns.tsv", and note that it was read."""
    found = (DATA / name).read_text(encoding="utf-8")
    note(name, found)
    return found
