"""The files of a sweep: records of its shards, each a line of JSON with a checksum, and their merge.

A shard's file is named by the sweep, `attribution-<sweep>-1-of-8.jsonl`: sweeps of other prompts, models, settings or
code stand side by side in one folder, and none touches the files of another.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from knbook.checkout import is_checkout
from knbook.errors import RunError, UsageError
from kncore import zoo
from kncore.store import cache, fingerprint
from kncore.store.disk import write
from knpaper.records import results_folder

NAME = re.compile(r"(attribution|edits)-([0-9a-f]{16}-)?[0-9]+-of-([0-9]+)\.jsonl")  # earlier: without the sweep
COMMON = ("kind", "model", "revision", "dtype", "hyperparameters", "text", "code", "versions", "settings")
TRACKED = (".ci", ".git", "benchmarks", "book", "knbook", "kncore", "knpaper", "notebooks", "results", "tests")
TRACKED += ("training", "workflow")


def check_folder(out: Path) -> None:
    """Raise UsageError where records of sweeps would land among what a checkout tracks, or what a cache may remove."""
    real = Path(os.path.realpath(out))
    for folder in real.parents:
        top = real.relative_to(folder).parts[0]
        if top in TRACKED and is_checkout(folder):
            raise UsageError(f"{str(out)!r} is in {top}/ of a checkout, which is tracked; give a folder of its own")
    taken = [cache.scores_folder(), *(zoo.cache_folder() / kind for kind in ("models", "public", "offload"))]
    if os.environ.get("KNCORE_RESULTS"):
        taken.append(results_folder())
    for folder in map(os.path.realpath, taken):
        if real.is_relative_to(folder):
            raise UsageError(f"{str(out)!r} is in {folder}, which is for other things; give a folder of its own")


def digest(*parts: object) -> str:
    """Return 16 digits that stand for what JSON can hold."""
    return fingerprint.digest(*parts)[:16]


def dumps(record: dict) -> str:
    """Return a record as a line of JSON with its checksum."""
    body = {name: value for name, value in record.items() if name != "checksum"}
    return json.dumps({**body, "checksum": digest(body)}) + "\n"


def append(path: Path, records: Iterable[dict]) -> None:
    """Write records at the end of a file, and wait until the disk has them; OSError names the file."""
    try:
        with path.open("ab") as stream:
            stream.write("".join(map(dumps, records)).encode())
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        error.filename = str(path)
        raise


def read(path: Path) -> Iterator[dict | None]:
    """Yield the records of a file; None for a line that is torn, was changed, or is no record."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # another process has just finished its shard
        return
    for line in text.splitlines():
        try:
            record = json.loads(line)
            sound = dumps(record) == line + "\n" and isinstance(record["query"]["prompt"], str)
            sound &= all(isinstance(record[name], str) for name in ("id", "sweep", "kind"))
            sound &= all(type(record[name]) is int for name in ("place", "of")) and 1 <= record["place"] <= record["of"]
            yield record if sound else None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            yield None


def fitting(paths: Iterable[Path], heads: Mapping[str, dict]) -> dict[str, dict]:
    """Return the sound records in files that are what `heads` say, the first of each name."""
    found: dict[str, dict] = {}
    for record in (record for path in paths for record in read(path) if record):
        head = heads.get(record["id"])
        if head and all(record.get(name) == value for name, value in head.items()):
            found.setdefault(record["id"], record)
    return found


def load_records(paths: Sequence[Path]) -> list[dict]:
    """Return the records of a whole sweep from the files of its shards (or folders of them), each once, in order.

    Of a folder only the files that are named as shards are read. Raises UsageError for files without records and for
    shards of different sweeps, which it names; RunError for damaged lines, two records of one prompt that differ, and
    prompts without a record, with the shards to run again.
    """
    files = [file for path in paths for file in (_shards(path) if path.is_dir() else [path])]
    absent = [str(file) for file in files if not file.is_file()]
    if absent or not files:
        raise UsageError(
            f"no records in {', '.join(absent or map(str, paths))}; expected the .jsonl files of a sweep, such as "
            "attribution-0123456789abcdef-1-of-8.jsonl"
        )
    everything = [(record, file) for file in dict.fromkeys(files) for record in _sound(file)]
    if not everything:
        raise UsageError(f"no records in {', '.join(map(str, files))}: the files are empty; run their shards again")
    _check_same_sweep(everything)
    found: dict[str, tuple[dict, Path]] = {}
    for record, file in everything:
        before, where = found.setdefault(record["id"], (record, file))
        if before != record:
            raise RunError(
                f"{where} and {file} differ on {record['query']['prompt']!r} (record {record['id']}); they come "
                "from other batches or another machine: keep one of the two files"
            )
    records = sorted((record for record, _ in found.values()), key=lambda record: record["place"])
    _check_complete(records, files)
    return records


def _shards(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.jsonl")) if NAME.fullmatch(path.name)]


def _sound(file: Path) -> list[dict]:
    """Return the records of a file; raise RunError for a line that is none."""
    records = list(read(file))
    if None in records:
        shard = "damaged; delete the file and run its shard again"
        other = "no record of a sweep, or damaged; give the .jsonl files that `sweep` wrote"
        why = shard if NAME.fullmatch(file.name) else other
        raise RunError(f"{file}, line {records.index(None) + 1}: {why}")
    return records


def _check_same_sweep(everything: Sequence[tuple[dict, Path]]) -> None:
    """Raise UsageError where records are of different sweeps: in what these differ, and how their files are named."""
    sweeps: dict[str, dict[str, tuple[dict, Path]]] = {}
    for record, file in everything:
        sweeps.setdefault(record["sweep"], {}).setdefault(record["id"], (record, file))
    if len(sweeps) == 1:
        return
    firsts = [next(iter(records.values())) for records in sweeps.values()]
    differ = [name for name in COMMON if len({json.dumps(record.get(name)) for record, _ in firsts}) > 1]
    shown = []
    for record, file in firsts[:5]:
        named = file.with_name(f"{record['kind']}-{record['sweep']}-*.jsonl") if NAME.fullmatch(file.name) else file
        values = [f"{name} {json.dumps(record.get(name)):.60}" for name in differ]
        count = f"{len(sweeps[record['sweep']])} of {record['of']} records"
        shown.append(f"{named} ({'; '.join([count, *values])})")
    more = f" and {len(sweeps) - 5} more" if len(sweeps) > 5 else ""
    raise UsageError(
        f"the records belong to different sweeps, of other {', '.join(differ) or 'prompts'}: name the files of one, "
        f"{' or '.join(shown)}{more}"
    )


def _check_complete(records: Sequence[dict], files: Sequence[Path]) -> None:
    """Raise RunError where prompts have no record; it names the shards to run again."""
    whole = records[0]["of"]
    missing = sorted(set(range(1, whole + 1)) - {record["place"] for record in records})
    if not missing:
        return
    counts = {int(found[3]) for file in files if (found := NAME.fullmatch(file.name))}
    again = {-(-number * n // whole): n for n in sorted(counts)[:1] for number in missing}
    remedy = f"; run shard {', '.join(f'{k}/{n}' for k, n in sorted(again.items()))} again" if again else ""
    raise RunError(f"{len(missing)} of {whole} records are missing, number {missing[0]} is the first{remedy}")


def merge(paths: Sequence[Path], out: Path) -> Path:
    """Write the records of a whole sweep to one file; errors as in `load_records`, and then nothing is written."""
    if out.is_dir():
        raise UsageError(f"{out} is a folder; give the file to write")
    check_folder(out.parent)
    records = load_records(paths)
    if NAME.fullmatch(out.name) and out.is_file():
        raise UsageError(f"{out} is the file of a shard, which a merge does not replace; give another name")
    return write(out, "".join(map(dumps, records)))
