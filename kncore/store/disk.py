"""Files on disk: written whole or not at all, sealed by a checksum, found damaged, and never in the way.

A file is written beside its place and moved there in one step, so that other processes see all of it or nothing, and a
process that is killed leaves a hidden file at most. A store that cannot be written is said once and then done without:
what was to be kept is computed all the same.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

SEAL = "sha256.json"  # in a folder: the checksums of its files
BLANK = b"0" * 64
SEALED = re.compile(rb'.{8}\{"__metadata__":\{"sha256":"([0-9a-f]{64})"\}', re.DOTALL)
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}

_said: set[str] = set()
_elsewhere: dict[Path, Path] = {}


def warn(text: str) -> None:
    """Print one line on stderr, once in a process."""
    if text not in _said:
        _said.add(text)
        print(f"kncore: {' '.join(text.split())}", file=sys.stderr)


def write(path: Path, content: bytes | str, sync: bool = True) -> Path:
    """Write a file whole or not at all, several processes at once included; the path.

    `sync` waits until the disk has it, for what cannot be computed anew. Raises OSError, and then nothing has changed.
    """
    part = beside(path, content, sync)
    with _removed(part):
        os.replace(part, path)
    return path


@contextlib.contextmanager
def _removed(part: Path) -> Iterator[None]:
    """Open a context that removes a file where it fails."""
    try:
        yield
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def beside(path: Path, content: bytes | str, sync: bool = True) -> Path:
    """Write a hidden file beside a path, in whose place it can be moved in one step; its path.

    Raises OSError, which names `path` where the system names nothing, and then nothing is left.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.", suffix=".part")
        with _removed(Path(part)), os.fdopen(descriptor, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(part, 0o644)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    return Path(part)


def keep(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Store tensors, sealed; where that cannot be, say so once and go on."""
    try:
        write(path, pack(tensors), sync=False)
    except OSError as error:
        _warn_unwritable(path.parent.parent, error)


def kept(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors stored there; None where there are none, or damaged ones, which is said."""
    try:
        found = unpack(path.read_bytes())
    except OSError:
        return None
    except ValueError as error:
        warn(f"{path} is damaged ({error}); it is computed anew")
        return None
    touch(path)
    return found


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Return a safetensors file that holds the checksum of itself, taken with zeros in the place of the checksum."""
    raw = save({name: value.contiguous() for name, value in tensors.items()}, {"sha256": BLANK.decode()})
    return raw.replace(BLANK, hashlib.sha256(raw).hexdigest().encode(), 1)


def unpack(raw: bytes) -> dict[str, Tensor]:
    """Return the tensors of a sealed file. Raises ValueError where any bit of it is not as it was written."""
    seal = SEALED.match(raw)
    if seal is None:
        raise ValueError("it has no checksum")
    blank = raw[: seal.start(1)] + BLANK + raw[seal.end(1) :]
    if hashlib.sha256(blank).hexdigest() != seal[1].decode():
        raise ValueError("its checksum is another")
    try:
        return load(raw)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Write the checksums of a folder's files into it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / SEAL]
    found = {path.relative_to(folder).as_posix(): digest(path) for path in files}
    write(folder / SEAL, json.dumps(found, indent=1) + "\n")


def damage(folder: Path) -> str:
    """Return what in a folder is not as it was sealed ("" for nothing); one without a seal is sealed as it stands."""
    try:
        for name, checksum in json.loads((folder / SEAL).read_text(encoding="utf-8")).items():
            if digest(folder / name) != checksum:
                return f"{name} has another checksum"
    except FileNotFoundError as error:
        if Path(error.filename).name != SEAL:
            return f"{Path(error.filename).name} is missing"
        with contextlib.suppress(OSError):
            seal(folder)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return f"{SEAL} cannot be read"
    return ""


def folder(target: Path, make: Callable[[Path], None]) -> Path:
    """Return the folder, whole; where it is absent or damaged, what `make(staged)` writes, sealed and moved there in
    one step.

    Where it cannot be written there, it is made in a folder of this process, which goes at its end. `make` may write
    into the folder around `staged`, too. Raises what `make` raises, and then there is nothing left of it.
    """
    place = _elsewhere.get(target.parent, target.parent) / target.name
    if place.is_dir():
        if not (why := damage(place)):
            touch(place)
            return place
        warn(f"{place} is damaged ({why}); it is made anew")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        return _make(place, make)
    except (OSError, SafetensorError) as error:
        if place.parent in _elsewhere.values() or not full(error):
            raise
        return _make(elsewhere(target.parent, error) / target.name, make)


def _make(place: Path, make: Callable[[Path], None]) -> Path:
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-", suffix=".part") as scratch:
        staged = Path(scratch) / "made"
        make(staged)
        seal(staged)
        try:
            if place.is_dir() and damage(place):
                os.replace(place, Path(scratch) / "damaged")
            os.replace(staged, place)
        except OSError:  # another process was faster: its folder is as good as ours
            if not place.is_dir() or damage(place):
                raise
    return place


def full(error: BaseException) -> bool:
    """Return whether an error says that a disk is full, or may not be written."""
    return getattr(error, "errno", None) in FULL or bool(re.search(r"[Nn]o space left|os error 28\b", str(error)))


def elsewhere(folder: Path, error: BaseException) -> Path:
    """Return a folder of this process, which goes at its end, in place of one that cannot be written."""
    if folder not in _elsewhere:
        _warn_unwritable(folder, error)
        _elsewhere[folder] = Path(tempfile.mkdtemp(prefix="kncore-"))
        atexit.register(shutil.rmtree, _elsewhere[folder], ignore_errors=True)
    return _elsewhere[folder]


def _warn_unwritable(folder: Path, error: BaseException) -> None:
    why = getattr(error, "strerror", None) or str(error)
    warn(
        f"{folder} cannot be written ({why}): results are computed and not kept. Free space (`python -m kncore cache "
        "--prune`), or name another folder in KNCORE_CACHE (of scores: KNCORE_SCORES)"
    )


def touch(place: Path) -> None:
    """Mark a file or folder as used now, where that can be: what was used last is pruned last."""
    with contextlib.suppress(OSError):
        os.utime(place)
