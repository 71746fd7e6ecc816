"""The store of results on disk: content-addressed, sealed, written in one step; and what all caches hold."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from kncore import disk, fingerprint, state
from kncore.models import LM, cache_folder


def scores_folder() -> Path:
    """`$KNCORE_SCORES`, or `scores` in the user cache."""
    return Path(os.environ.get("KNCORE_SCORES") or cache_folder() / "scores")


@dataclass(frozen=True)
class Store:
    """Results of one kind for one model as it is now; `decided` is the hash of all that they have in common.

    What a result depends on besides goes into its name as `settings`: the token ids that were read, and what was asked.
    """

    lm: LM
    folder: Path
    content: str
    decided: str

    def name(self, settings: dict) -> str:
        """The name of a result, the hash of everything that it depends on."""
        return fingerprint.digest(self.decided, settings)

    def read(self, name: str) -> dict[str, Tensor] | None:
        """The stored result, or None where there is none, or a damaged one."""
        return disk.kept(self.folder / name[:2] / f"{name}.safetensors")

    def write(self, results: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Store results by their names; a reader sees all of one or nothing of it.

        Where the folder cannot be written, that is said once. Raises RuntimeError where the model is no longer what it
        was when the store was opened: then nothing is stored, and what was computed is not to be used.
        """
        if state.content(self.lm.model) != self.content:
            raise RuntimeError(
                f"{self.lm.name} was changed while it computed (a weight, a module or a hook): the result mixes two "
                "models and is not stored; ask again, and leave the model alone meanwhile"
            )
        for name, result in results.items():
            disk.keep(self.folder / name[:2] / f"{name}.safetensors", result)


def store(lm: LM, *functions: Callable) -> Store | None:
    """The store of what `functions` give for a model; None where it cannot be said what the model computes.

    That is so where hooks hang on it or its modules were replaced: nothing is looked up and nothing stored then.
    """
    content = state.content(lm.model)
    if content is None:
        return None
    decided = [lm.revision, content, asdict(lm.spec), str(lm.dtype), lm.device.type]
    decided += [fingerprint.code(*functions), fingerprint.versions(), "sealed"]
    return Store(lm, scores_folder(), content, fingerprint.digest(*decided))


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
