"""What keeps runs apart: a scratch folder of their own, results that are published together, no process left behind.

No file lock is needed for any of this: there are file systems on which a lock always succeeds, or never does.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from kncore import disk

OWNER = ".owner"  # in a scratch folder: which process made it
WEEK = 7 * 24 * 3600
MOVES = ".moves"  # the end of the name of a list of moves
ATTEMPTS = 1000  # to publish, a hundredth of a second apart
OCCUPIED = {errno.ENOTEMPTY, errno.EEXIST}

# ---------------------------------------------------------------------------------------------- scratch folders


@contextlib.contextmanager
def scratch(build: Path, name: str) -> Iterator[Path]:
    """Context with a folder below `build` that no other process has or gets; it goes at the end.

    Those of the same `name` whose process was killed are removed first.
    """
    build.mkdir(parents=True, exist_ok=True)
    for left in build.glob(f"{name}-*"):
        if _abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=build, ignore_cleanup_errors=True) as folder:
        disk.write(Path(folder) / OWNER, f"{_machine()}\n{os.getpid()}\n", sync=False)
        yield Path(folder)


def _machine() -> str:
    """Where a process id means this process and no other: the host, and on Linux the namespace of process ids."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _abandoned(folder: Path) -> bool:
    """Whether the process that made a scratch folder is gone; of another machine's only its age is known."""
    try:
        machine, pid = (folder / OWNER).read_text(encoding="utf-8").split("\n")[:2]
        if machine == _machine():
            os.kill(int(pid), 0)
            return False
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, and is another user's
        return False
    except (OSError, ValueError, OverflowError):
        pass
    try:
        return time.time() - folder.stat().st_mtime > WEEK
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------- publishing


def publish(files: Mapping[Path, bytes], journal: Path) -> None:
    """Put several files in their places together: all, or none of them.

    All are written beside their places first. Then the list of moves becomes the folder `journal` (see `journal_of`),
    which only one process at a time can make, and the moves are made. Where that process is killed, or another one
    wants to publish with the same journal, whoever comes next makes the moves that are left (`settle`): each of them
    can be made once only, so that it does not matter by whom.

    Raises OSError, and then the files are what they were.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for target, content in files.items():
            place = target.parent.resolve() / target.name
            if place.is_dir():
                raise IsADirectoryError(errno.EISDIR, "there is a folder in the place of a file", str(target))
            staged.append((disk.beside(place, content), place))
        written, before = _commit(staged, journal)
    except BaseException:
        with contextlib.suppress(OSError):  # of moves that were agreed on just before the process was stopped
            settle(journal)
        for part, _ in staged:
            part.unlink(missing_ok=True)
        raise
    try:
        settle(journal)
    except OSError:
        for part, _ in staged:
            part.unlink(missing_ok=True)
        for place, content in before.items():
            _restore(place, content)
        written.unlink(missing_ok=True)
        settle(journal)
        raise
    except BaseException:  # the process was stopped between two moves
        settle(journal)
        raise


def _commit(staged: list[tuple[Path, Path]], journal: Path) -> tuple[Path, dict[Path, bytes | None]]:
    """Make the journal, as soon as there is no other; the list of moves in it, and what stood in their places before.

    A folder cannot be renamed to one that holds something: that keeps out a second process.
    """
    folder = journal.parent
    moves = [[os.path.relpath(place.parent, folder), part.name, place.name] for part, place in staged]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".part") as scratch:
        prepared = Path(scratch) / journal.name
        name = disk.write(prepared / f"{Path(scratch).name.strip('.')}{MOVES}", json.dumps(moves)).name
        for _ in range(ATTEMPTS):
            settle(journal)
            before = {place: place.read_bytes() if place.is_file() else None for _, place in staged}
            try:
                os.rename(prepared, journal)
                return journal / name, before
            except OSError as error:
                if error.errno not in OCCUPIED:
                    raise
            time.sleep(0.01)
    raise OSError(errno.EBUSY, "something in this folder hinders that results are published; delete it", str(journal))


def _restore(place: Path, content: bytes | None) -> None:
    if content is None:
        place.unlink(missing_ok=True)
    elif place.read_bytes() != content:
        disk.write(place, content)


def settle(journal: Path) -> None:
    """Make the moves of a journal that are left to be made, by whatever process it was written.

    Raises OSError where a file cannot be moved, ValueError for a journal that is none.
    """
    for written in _lists(journal):
        try:
            moves = json.loads(written.read_text(encoding="utf-8"))
            for _, part, name in moves:
                if Path(part).name != part or Path(name).name != name or not part.startswith("."):
                    raise ValueError(f"{part!r} is not beside {name!r}")
        except FileNotFoundError:  # another process has made them
            continue
        except (ValueError, TypeError) as error:
            raise ValueError(f"{written} is no list of moves ({error}); delete {journal}") from error
        for folder, part, name in moves:
            with contextlib.suppress(FileNotFoundError):
                os.replace(journal.parent / folder / part, journal.parent / folder / name)
        written.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there is none, or another process has made its own
        journal.rmdir()


def journal_of(folder: Path, name: str) -> Path:
    """Where publications of a name into a folder, which is made, keep their list of moves while they are under way."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve() / f".publishing-{name}.part"


def journals(folder: Path) -> list[Path]:
    """The journals of publications into a folder that are under way, or were broken off."""
    found = [folder.resolve() / name for name in _listed(folder) if name.startswith(".publishing-")]
    return [journal for journal in found if _lists(journal)]


def _lists(journal: Path) -> list[Path]:
    return [journal / name for name in _listed(journal) if name.endswith(MOVES)]


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def exchange(folder: Path, target: Path) -> None:
    """Put a folder in the place of another one, which goes; several processes at once included."""
    while True:
        try:
            os.replace(folder, target)
            break
        except OSError as error:
            if error.errno not in OCCUPIED:
                raise
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.old-"))
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.replace(target, old / "was")
    for left in target.parent.glob(f"{target.name}.old-*"):
        shutil.rmtree(left, ignore_errors=True)


def restore(target: Path) -> None:
    """Bring back the folder that a process which was killed in `exchange` had taken away."""
    for old in target.parent.glob(f"{target.name}.old-*/was"):
        if not target.exists():
            with contextlib.suppress(OSError):
                os.replace(old, target)


# ---------------------------------------------------------------------------------------------- processes


def bound(module: str, *arguments: str) -> list[str]:
    """The command line of a process of this interpreter that ends when this process does, see `kncore.bound`."""
    program = str(Path(__file__).with_name("bound.py"))
    return [sys.executable, "-P", program, str(os.getpid()), module, *arguments]


def python_path() -> str:
    """PYTHONPATH for a process that must import this package, and not one that is installed elsewhere."""
    parent = Path(__file__).resolve().parent.parent
    mine = [] if {"site-packages", "dist-packages"} & set(parent.parts) else [str(parent)]
    return os.pathsep.join([*mine, *filter(None, [os.environ.get("PYTHONPATH")])])


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Context in which SIGTERM and SIGHUP end this process in order: what it started ends, and its scratch goes.

    A handler of the caller stays, and so does a signal that is ignored, as by nohup. Ctrl-C does the same anyway.
    """
    wanted = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    if threading.current_thread() is not threading.main_thread():
        wanted = []
    heard = [number for number in wanted if signal.getsignal(number) is signal.SIG_DFL]

    def stop(number: int, _) -> None:
        for one in heard:
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in heard:
        signal.signal(number, stop)
    try:
        yield
    except SystemExit as end:
        if heard and isinstance(end.code, int) and end.code - 128 in heard:
            name = signal.Signals(end.code - 128).name
            print(f"\nkncore: stopped by {name}; nothing half-done was stored", file=sys.stderr, flush=True)
        raise
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)
