"""The data files that come with this package, and which of them this process has read.

A record names what was read by its hash, so that it is stale where that data has changed, and only then.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files

DATA = files(__package__) / "data"
_noted: dict[str, str] = {}


def text(name: str) -> str:
    """Return the text of a data file, e.g. "text.txt", and note that it was read."""
    found = (DATA / name).read_text(encoding="utf-8")
    note(name, found)
    return found


def note(name: str, content: object) -> None:
    """Note that a part of the data was read: a file, or one relation of a file of many."""
    _noted[name] = digest(content)


def noted() -> dict[str, str]:
    """Return the hashes of what this process has read so far, by name."""
    return dict(sorted(_noted.items()))


def digest(content: object) -> str:
    """Return the hash of a text, or of what has a representation that says all."""
    shown = content if isinstance(content, str) else repr(content)
    return hashlib.sha256(shown.replace("\r\n", "\n").encode()).hexdigest()[:16]
