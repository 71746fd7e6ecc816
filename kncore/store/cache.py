"""What the caches hold: results of kernels, named by all that decides them, models and public files; and pruning."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from kncore import products
from kncore.models import LM
from kncore.store import disk, fingerprint
from kncore.zoo import cache_folder


def scores_folder() -> Path:
    """`$KNCORE_SCORES`, or `scores` in the user cache."""
    return Path(os.environ.get("KNCORE_SCORES") or cache_folder() / "scores")


def files(lm: LM, content: str, functions: Sequence[Callable], settings: Sequence[dict]) -> list[Path]:
    """Return the file of each result in the store, named by the hash of everything that the result depends on: the
    model and its `content` now, the code of `functions`, versions, and its own settings."""
    decided = [lm.revision, content, asdict(lm.spec), str(lm.dtype), lm.device.type]
    decided += [fingerprint.code(*functions), fingerprint.versions(), "sealed"]
    decided += products.noted(lm).values()
    common = fingerprint.digest(*decided)
    names = [fingerprint.digest(common, each) for each in settings]
    return [scores_folder() / name[:2] / f"{name}.safetensors" for name in names]


class Entry(NamedTuple):
    """A thing in a store that can be computed or fetched again: a result, a model, a public file, or a `leftover` of a
    process that was killed. `used` is when it was last used, in seconds since 1970."""

    kind: str
    path: Path
    bytes: int
    used: float


def entries() -> list[Entry]:
    """Return all that the caches hold, the longest unused first."""
    root, found = cache_folder(), set()
    for kind, folder in {"scores": scores_folder(), **{n: root / n for n in ("models", "public", "offload")}}.items():
        whole = kind in ("models", "offload")  # a folder each
        for path in [*folder.glob(".*"), *(folder.glob("*") if whole else folder.rglob("*"))]:
            hidden = path.name.startswith(".")
            if hidden or whole or path.is_file():
                try:
                    used = path.stat().st_mtime
                    size = sum(p.lstat().st_size for p in (path, *path.rglob("*")) if not p.is_dir())
                except FileNotFoundError:  # another process has just moved it into its place, or removed it
                    continue
                found.add(Entry("leftover" if hidden else kind, path, size, used))
    return sorted(found, key=lambda entry: entry.used)


def prune(limit: int) -> list[Entry]:
    """Remove leftovers older than an hour, then what was unused longest until all that is left is within `limit` bytes.

    What is removed goes in one step, and can be computed or fetched again. Returns what was removed.
    """
    found, removed = entries(), []
    total = sum(entry.bytes for entry in found)
    for entry in sorted(found, key=lambda entry: (entry.kind != "leftover", entry.used)):
        if time.time() - entry.used <= 3600 if entry.kind == "leftover" else total <= limit:
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
