"""Files of the public data sets: fetched at a pinned commit or found in a folder, read, and checked field by field.

A file that is not what it should be raises ValueError with the file and the line or index.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pooch

from kncore.query import Query, locate
from kncore.store import disk
from knpaper import resources

PUNCTUATION = ".,;:!?"
SETS = ("pararel", "blimp", "counterfact")  # what chapters ask


@dataclass(frozen=True)
class Source:
    """A pinned file: its place in a local folder and in the cache, its address, its sha256."""

    file: str
    url: str
    sha256: str


def fetch(source: Source) -> Path:
    """Return the cached copy of a pinned file, downloaded where it is not there yet.

    Raises ConnectionError where it cannot be had and ValueError where it is not the pinned file; both leave no file
    behind.
    """
    cached = Path(os.environ.get("KNCORE_CACHE") or pooch.os_cache("kncore")) / "public" / source.file
    remedy = (
        f"Pass path=... of a local copy, or fetch {source.url} on a machine with access and copy it to {cached} "
        f"(sha256 {source.sha256})."
    )
    if cached.is_file() and disk.digest(cached) != source.sha256:
        disk.warn(f"{cached} is damaged (its checksum is another); it is fetched anew")
    try:
        try:
            return _retrieve(source, cached)
        except OSError as error:
            if not disk.full(error):
                raise
            return _retrieve(source, disk.elsewhere(cached.parent, error) / cached.name)
    except OSError as error:
        raise ConnectionError(f"could not fetch {source.file} from {source.url}: {error}. {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{source.url} is not the pinned {source.file}: {error}. {remedy}") from error


def _retrieve(source: Source, place: Path) -> Path:
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=60)
    known = f"sha256:{source.sha256}"
    return Path(
        pooch.retrieve(source.url, known_hash=known, fname=place.name, path=place.parent, downloader=downloader)
    )


@cache
def table() -> dict[str, Any]:
    """Return what data/public.toml says of each data set."""
    return resources.toml("public.toml")


def source(name: str, paradigm: str = "") -> Source:
    """Return the pinned file of a data set, of BLiMP that of a paradigm."""
    entry = table()[name]
    path, file = (entry[key].format(paradigm=paradigm) for key in ("path", "file"))
    url = table()["address"].format(repository=entry["repository"], commit=entry["commit"], path=path)
    return Source(file, url, entry["sha256"][paradigm] if paradigm else entry["sha256"])


def find(source: Source, path: str | Path | None) -> Path:
    """Return the path of a file: the given one, in the given folder, or fetched."""
    if path is None:
        return fetch(source)
    places = _places(source, Path(path))
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"no such file: {' or '.join(map(str, places))}. Pass the file or the folder it lies in.")


def _places(source: Source, path: Path) -> list[Path]:
    return [path / source.file, path / Path(source.file).name] if path.is_dir() else [path]


def holds(source: Source, path: str | Path) -> bool:
    """Return whether a folder holds a file, pinned or not; of a file, whether it is there."""
    return any(place.is_file() for place in _places(source, Path(path)))


def named(source: str) -> str:
    """Return what records call the data that chapters take as `source`: "own", "public", or a folder by its content.

    What is no folder ("corpus") is a name. A folder is "public" where it holds files of `SETS`, all of them the pinned
    ones, and else "folder@<digits>" with digits of what it holds: no record names the place of a folder.
    """
    if source in ("own", "public", "corpus") or not Path(source).exists():
        return source
    pinned = [each for name in SETS for each in _pinned(name)]
    found = [(disk.digest(place), each) for each in pinned for place in _places(each, Path(source)) if place.is_file()]
    if found and all(digest == each.sha256 for digest, each in found):
        return "public"
    return f"folder@{resources.digest([(each.file, digest) for digest, each in found])[:8]}"


def _pinned(name: str) -> list[Source]:
    hashes = table()[name]["sha256"]
    return [source(name, paradigm) for paradigm in hashes] if isinstance(hashes, dict) else [source(name)]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error}); get an intact copy") from error


def _parse(text: str, file: Path, number: int | None = None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of too many digits is no JSONDecodeError
        line = number or getattr(error, "lineno", "?")
        raise ValueError(f"{file}, line {line}: not JSON ({error}); get an intact copy") from error


def read_json(file: Path, kind: type) -> Any:
    """Return what a JSON file holds; ValueError where it is no JSON, or another kind of value."""
    data = _parse(_text(file), file)
    if not isinstance(data, kind):
        raise ValueError(f"{file}: expected a JSON {kind.__name__}, found {type(data).__name__}")
    return data


def read_lines(file: Path, fields: dict[str, type]) -> Iterator[tuple[str, dict]]:
    """Yield each line of a file of JSON lines with where it stands, its fields checked."""
    lines = list(io.StringIO(_text(file)))  # other ends of lines may stand within a text
    if not lines:
        raise ValueError(f"{file}: the file is empty; get an intact copy")
    for number, line in enumerate(lines, 1):
        where, row = f"{file}, line {number}", _parse(line, file, number)
        check_fields(where, row, fields)
        yield where, row


def check_fields(where: str, record: Any, fields: dict[str, type]) -> None:
    """Raise ValueError unless a record has the fields, each of its kind."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
    for name, kind in fields.items():
        if name not in record:
            raise ValueError(f"{where}: the field {name!r} is missing; found {', '.join(map(str, record))}")
        if not isinstance(record[name], kind):
            found = type(record[name]).__name__
            raise ValueError(f"{where}: the field {name!r} must be {kind.__name__}, it is {found}")


def query(where: str, **fields: str) -> Query:
    """Return a query of these fields; ValueError says where the record stands."""
    try:
        return Query(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def template(prompt: str, subject: str) -> str:
    """Return the prompt with {} in place of the subject; "" where it does not occur or is empty."""
    start = locate(prompt, subject) if subject else -1
    return "" if start < 0 else f"{prompt[:start]}{{}}{prompt[start + len(subject) :]}"
