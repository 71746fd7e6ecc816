"""Files on disk: written whole or not at all, sealed by a checksum, found damaged, and never in the way.

A file is written beside its place and moved there in one step, so that other processes see all of it or nothing, and a
process that is killed leaves a hidden file at most. A store that cannot be written is said once and then done without:
what was to be kept is computed all the same.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
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
    """One line on stderr, once in a process."""
    if text not in _said:
        _said.add(text)
        print(f"kncore: {' '.join(text.split())}", file=sys.stderr)


def write(path: Path, content: bytes | str, sync: bool = True) -> Path:
    """Write a file whole or not at all, several processes at once included; the path.

    `sync` waits until the disk has it, for what cannot be computed anew. Raises OSError, and then nothing has changed.
    """
    path = Path(path)
    part = beside(path, content, sync)
    try:
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


def beside(path: Path, content: bytes | str, sync: bool = True) -> Path:
    """Write a hidden file beside a path, in whose place it can be moved in one step; its path.

    Raises OSError, which names `path` where the system names nothing, and then nothing is left.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
                if sync:
                    stream.flush()
                    os.fsync(stream.fileno())
            os.chmod(part, 0o644)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    return Path(part)


def keep(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Store tensors, sealed; where that cannot be, say so once and go on."""
    try:
        write(path, pack(tensors), sync=False)
    except OSError as error:
        _unwritable(path.parent.parent, error)


def kept(path: Path) -> dict[str, Tensor] | None:
    """The tensors stored there; None where there are none, or damaged ones, which is said."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    try:
        found = unpack(raw)
    except ValueError as error:
        warn(f"{path} is damaged ({error}); it is computed anew")
        return None
    touch(path)
    return found


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file that holds the checksum of itself, taken with zeros in the place of the checksum."""
    raw = save({name: value.contiguous() for name, value in tensors.items()}, {"sha256": BLANK.decode()})
    return raw.replace(BLANK, hashlib.sha256(raw).hexdigest().encode(), 1)


def unpack(raw: bytes) -> dict[str, Tensor]:
    """The tensors of a sealed file. Raises ValueError where any bit of it is not as it was written."""
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
    """The sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Write the checksums of a folder's files into it."""
    found = {p.relative_to(folder).as_posix(): digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    write(folder / SEAL, json.dumps({name: one for name, one in found.items() if name != SEAL}, indent=1) + "\n")


def damage(folder: Path) -> str:
    """What in a folder is not as it was sealed; "" for nothing. A folder without a seal is sealed as it stands."""
    try:
        told = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        for name, one in told.items():
            if digest(folder / name) != one:
                return f"{name} has another checksum"
    except FileNotFoundError as error:
        if Path(error.filename).name != SEAL:
            return f"{Path(error.filename).name} is missing"
        try:
            seal(folder)
        except OSError:
            pass
    except (ValueError, AttributeError, TypeError, RecursionError):
        return f"{SEAL} cannot be read"
    return ""


def folder(target: Path, make: Callable[[Path], None]) -> Path:
    """The folder, whole; where it is absent or damaged, what `make(staged)` writes, sealed and moved there in one step.

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
    """Whether an error says that a disk is full, or may not be written."""
    return getattr(error, "errno", None) in FULL or bool(re.search(r"[Nn]o space left|os error 28\b", str(error)))


def elsewhere(folder: Path, error: BaseException) -> Path:
    """A folder of this process, which goes at its end, in place of one that cannot be written."""
    if folder not in _elsewhere:
        _unwritable(folder, error)
        _elsewhere[folder] = Path(tempfile.mkdtemp(prefix="kncore-"))
        atexit.register(shutil.rmtree, _elsewhere[folder], ignore_errors=True)
    return _elsewhere[folder]


def _unwritable(folder: Path, error: BaseException) -> None:
    why = getattr(error, "strerror", None) or str(error)
    warn(
        f"{folder} cannot be written ({why}): results are computed and not kept. Free space (`python -m kncore cache "
        "--prune`), or name another folder in KNCORE_CACHE (of scores: KNCORE_SCORES)"
    )


def touch(place: Path) -> None:
    """Mark a file or folder as used now, where that can be: what was used last is pruned last."""
    try:
        os.utime(place)
    except OSError:
        pass
