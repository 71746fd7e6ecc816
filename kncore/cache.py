"""The store of results on disk: content-addressed, sealed, written in one step; and what all caches hold."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from kncore import disk
from kncore.models import LM, cache_folder
from kncore.tokens import Encoded

CODE = ("arch", "attribution", "replay")  # the modules whose text decides a score


def scores_folder() -> Path:
    """`$KNCORE_SCORES`, or `scores` in the user cache."""
    return Path(os.environ.get("KNCORE_SCORES") or cache_folder() / "scores")


@cache
def code_version(modules: tuple[str, ...] = CODE) -> str:
    """Hash of the text of some modules; by default of the code that computes scores."""
    texts = [Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8") for module in modules]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def key(lm: LM, encoded: Encoded, settings: dict) -> str:
    """Name of the scores of one query."""
    return name(lm, {**settings, "query": [encoded.ids, encoded.position, encoded.target]}, CODE)


def name(lm: LM, settings: dict, modules: tuple[str, ...]) -> str:
    """Name of a result: everything it depends on, hashed; `modules` are those whose text decides it."""
    told = [lm.revision, lm.spec.family, str(lm.dtype), str(lm.device.type), code_version(modules), settings]
    told += [version("torch"), version("transformers"), "sealed"]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def read(folder: Path, name: str) -> dict[str, Tensor] | None:
    """The stored result, or None where there is none, or a damaged one."""
    return disk.kept(_place(folder, name))


def write(folder: Path, name: str, result: dict[str, Tensor]) -> None:
    """Store a result; a reader sees all of it or nothing. Where the folder cannot be written, that is said once."""
    disk.keep(_place(folder, name), result)


def _place(folder: Path, name: str) -> Path:
    return folder / name[:2] / f"{name}.safetensors"


class Entry(NamedTuple):
    """A thing in a store that can be computed or fetched again: a result, a model, a public file, or a `leftover` of a
    process that was killed. `used` is when it was last used, in seconds since 1970."""

    kind: str
    path: Path
    bytes: int
    used: float


def entries() -> list[Entry]:
    """All that the caches hold, the longest unused first."""
    root = cache_folder()
    places = {"scores": scores_folder(), **{kind: root / kind for kind in ("models", "public", "offload")}}
    found = []
    for kind, place in places.items():
        whole = kind in ("models", "offload")  # a folder each
        for path in [*place.glob(".*"), *(place.glob("*") if whole else place.rglob("*"))]:
            hidden = path.name.startswith(".")
            if hidden or whole or path.is_file():
                found += _entry("leftover" if hidden else kind, path)
    return sorted(set(found), key=lambda entry: entry.used)


def _entry(kind: str, path: Path) -> list[Entry]:
    try:
        used = path.stat().st_mtime
        return [Entry(kind, path, sum(p.lstat().st_size for p in (path, *path.rglob("*")) if not p.is_dir()), used)]
    except FileNotFoundError:  # another process has just moved it into its place, or removed it
        return []


def prune(limit: int) -> list[Entry]:
    """Remove leftovers older than an hour, then what was unused longest until all that is left is within `limit` bytes.

    What is removed goes in one step, and can be computed or fetched again. Gives what was removed.
    """
    told = entries()
    total = sum(entry.bytes for entry in told)
    removed = []
    for entry in sorted(told, key=lambda entry: (entry.kind != "leftover", entry.used)):
        old = entry.kind == "leftover" and time.time() - entry.used > 3600
        if not old and (entry.kind == "leftover" or total <= limit):
            continue
        try:
            gone = entry.path.with_name(f".{entry.path.name[:80]}.{os.getpid()}.part")
            os.replace(entry.path, gone)
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        except OSError as error:
            disk.warn(f"{entry.path} cannot be removed: {error.strerror}")
            continue
        total -= entry.bytes
        removed.append(entry)
    return removed
