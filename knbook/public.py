"""The stored run on public data: chapters run on them, chapter after chapter, of which only the records are kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from knbook import runner, runs
from knbook.checkout import chapters, slug
from knbook.errors import UsageError, refused
from kncore.store import disk
from knpaper import public
from knpaper.datasets import files
from knpaper.rules import CLAIMS
from knpaper.staleness import stale


def run(
    root: Path, source: str, only: Sequence[str] = (), model: str = public.MODEL, timeout: int = runner.TIMEOUT
) -> list[Path]:
    """Run the chapters of `public.PARAMETERS`, or `only` these, on public data; return the records, old and new.

    They are put into results/<model>@public, with what is noted of the run; the notebooks, which show what was asked,
    are not kept. A chapter whose records stand is not run again, so that a run that was stopped goes on where it was.
    Raises UsageError for a source that is not the pinned data, and what `runner.run` raises.
    """
    with refused():
        if files.named(source) != "public":
            raise UsageError(f"{source} does not hold the pinned files of public.toml, or holds others in their place")
    target, found = root / "results" / f"{slug(model)}@public", []
    for chapter in chapters(root, only or list(public.PARAMETERS)):
        if not _stands(target, chapter.number):
            with runs.scratch(root / "_build", "public") as scratch:
                given = {"source": source, **public.PARAMETERS.get(chapter.number, {})}
                runner.run(root, model=model, only=[chapter.number], parameters=given, out=scratch, timeout=timeout)
                written = (scratch / "results" / target.name).glob("*")
                made = {path.name: path for path in written if path.stem not in public.LEFT_OUT}
                made[f"{chapter.number}.toml"] = scratch / "results" / slug(model) / f"{chapter.number}.toml"
                for path in _records(target, chapter.number):
                    if path.name not in made:
                        path.unlink()
                for name, path in made.items():
                    disk.write(target / name, path.read_text(encoding="utf-8"))
        found += _records(target, chapter.number)
    return found


def _records(target: Path, number: str) -> list[Path]:
    """Return the files of a chapter's records in a folder, those of claims that are no more among them."""
    read = ((path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(target.glob("*.json")))
    return [path for path, record in read if record["chapter"] == number]


def _stands(target: Path, number: str) -> bool:
    """Return whether a chapter has records in a folder, all of which its code would write again."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in _records(target, number)]
    current = all(record["claim"] in CLAIMS and not stale(record) for record in records)
    return bool(records) and current and (target / f"{number}.toml").is_file()
