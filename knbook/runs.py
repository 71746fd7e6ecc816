"""What keeps runs apart: a scratch folder of their own, results that are published together, no process left behind.

No file lock is needed for any of this: there are file systems on which a lock always succeeds, or never does.
"""

from __future__ import annotations

import contextlib
import errno
import glob
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

import psutil

from knbook.errors import UsageError
from kncore.store import disk

OWNER = ".owner"  # in a scratch folder: which process made it
WEEK = 7 * 24 * 3600
MOVES = ".moves"  # the end of the name of a list of moves
ATTEMPTS = 1000  # to publish, a hundredth of a second apart
OCCUPIED = {errno.ENOTEMPTY, errno.EEXIST}


@contextlib.contextmanager
def scratch(build: Path, name: str) -> Iterator[Path]:
    """Give a folder below `build` that no other process has or gets, and remove it at the end.

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
    """Return where a process id means this process only: the host, and on Linux the namespace of process ids."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _abandoned(folder: Path) -> bool:
    """Return whether the process that made a scratch folder is gone; of another machine's only its age is known."""
    with contextlib.suppress(OSError, ValueError, OverflowError):
        machine, pid = (folder / OWNER).read_text(encoding="utf-8").split("\n")[:2]
        if machine == _machine():
            return not psutil.pid_exists(int(pid))
    with contextlib.suppress(OSError):
        return time.time() - folder.stat().st_mtime > WEEK
    return False


def publish(files: Mapping[Path, bytes], journal: Path) -> None:
    """Put several files in their places together: all, or none of them.

    All are written beside their places first. Then the list of moves becomes the folder `journal` (see `journal_of`),
    which only one process at a time can make, and the moves are made. Where that process is killed, or another one
    wants to publish with the same journal, whoever comes next makes the moves that are left (`settle`): each of them
    can be made once only, so that it does not matter by whom.

    Raises OSError, and then the files are what they were.
    """
    staged: list[tuple[Path, Path]] = []
    before: dict[Path, bytes | None] = {}
    try:
        for path, content in files.items():
            target = path.parent.resolve() / path.name
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, "there is a folder in the place of a file", str(path))
            staged.append((disk.beside(target, content), target))
        before = _commit(staged, journal)
        settle(journal)
    except BaseException as error:
        with contextlib.suppress(Exception):
            if not isinstance(error, Exception):  # the process is stopped: moves that were agreed on are made
                settle(journal)
        for part, _ in staged:
            part.unlink(missing_ok=True)
        for target, content in before.items() if isinstance(error, Exception) else ():
            if content is None:
                target.unlink(missing_ok=True)
            elif target.read_bytes() != content:
                disk.write(target, content)
        with contextlib.suppress(Exception):
            settle(journal)
        raise


def _commit(staged: list[tuple[Path, Path]], journal: Path) -> dict[Path, bytes | None]:
    """Make the journal, as soon as there is no other; return what stood in the places of the files before.

    A folder cannot be renamed to one that holds something: that keeps out a second process.
    """
    folder = journal.parent
    moves = [[os.path.relpath(target.parent, folder), part.name, target.name] for part, target in staged]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".part") as scratch:
        prepared = Path(scratch) / journal.name
        disk.write(prepared / f"{Path(scratch).name.strip('.')}{MOVES}", json.dumps(moves))
        for _ in range(ATTEMPTS):
            settle(journal)
            before = {target: target.read_bytes() if target.is_file() else None for _, target in staged}
            try:
                os.rename(prepared, journal)
                return before
            except OSError as error:
                if error.errno not in OCCUPIED:
                    raise
            time.sleep(0.01)
    raise OSError(errno.EBUSY, "something in this folder hinders that results are published; delete it", str(journal))


def settle(journal: Path) -> None:
    """Make the moves of a journal that are left to be made, by whatever process it was written.

    Raises OSError where a file cannot be moved, UsageError for a journal that is none.
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
            raise UsageError(f"{written} is no list of moves ({error}); delete {journal}") from error
        for folder, part, name in moves:
            with contextlib.suppress(FileNotFoundError):
                os.replace(journal.parent / folder / part, journal.parent / folder / name)
        written.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there is none, or another process has made its own
        journal.rmdir()


def journal_of(folder: Path, name: str) -> Path:
    """Return where publications of a name into a folder, which is made, keep their lists of moves while under way."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve() / f".publishing-{name}.part"


def journals(folder: Path) -> list[Path]:
    """Return the journals of publications into a folder that are under way, or were broken off."""
    found = glob.glob(".publishing-*", root_dir=folder)
    return [journal for name in sorted(found) if _lists(journal := folder.resolve() / name)]


def _lists(journal: Path) -> list[Path]:
    return [journal / name for name in sorted(glob.glob(f"*{MOVES}", root_dir=journal))]


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


def bound(module: str, *arguments: str) -> list[str]:
    """Return the command line of a process of this interpreter that ends when this process does, see `knbook.bound`."""
    program = str(Path(__file__).with_name("bound.py"))
    return [sys.executable, "-P", program, str(os.getpid()), module, *arguments]


def python_path() -> str:
    """Return PYTHONPATH for a process that must import this package, and not another copy of it."""
    parent = Path(__file__).resolve().parent.parent
    own = [] if {"site-packages", "dist-packages"} & set(parent.parts) else [str(parent)]
    return os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH")])])


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this process in order: what it started ends, and its scratch folder is removed.

    A handler of the caller stays, and so does a signal that is ignored, as by nohup. Ctrl-C does the same anyway.
    """
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        numbers = []

    def stop(number: int, _) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        said = f"\nkncore: stopped by {signal.Signals(number).name}; nothing half-done was stored\n"
        os.write(2, said.encode())  # what is printed might be in the middle of a line that is printed
        raise SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
