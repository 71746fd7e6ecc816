"""The checkout: its chapters `notebooks/NN-*.ipynb`, and where the runs of a chapter on a model have their place."""

from __future__ import annotations

import contextlib
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from knbook.errors import UsageError, refused
from kncore import models
from knpaper import stored

# The models beside the notebooks' own that `book` runs.
COMPANION_MODELS = ("controlled-gpt2", "controlled-llama", "controlled-bert", "minilm-mlm")
# What a run notes beside its records.
NOTED = {"seconds": int, "threads": str, "date": str, "kncore": str, "torch": str, "transformers": str}
Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Chapter:
    """A notebook of the checkout: its path, its number ("01") and the defaults of its parameters."""

    path: Path
    number: str
    defaults: Mapping[str, Scalar]


def is_checkout(folder: Path) -> bool:
    """Return whether a folder is the top of a checkout of the book, or of a copy of it."""
    return (folder / "notebooks").is_dir() and (folder / "_toc.yml").is_file()


def find_root(start: Path | None = None) -> Path:
    """Return the first checkout from `start` (default: here) upwards, else that of this package."""
    start = (start or Path.cwd()).resolve()
    for folder in filter(is_checkout, (start, *start.parents, Path(__file__).resolve().parent.parent)):
        return folder
    raise UsageError(f"{start} is in no checkout of the book: expected notebooks/ and _toc.yml; change into a clone")


def chapters(root: Path, only: Sequence[str] = ()) -> list[Chapter]:
    """Return the notebooks `notebooks/NN-*.ipynb` in order, or those named by number, name or file name in `only`.

    Raises UsageError where there is no notebook, one of `only` names none, or one cannot be read.
    """
    paths = sorted((root / "notebooks").glob("[0-9][0-9]-*.ipynb"))
    if not paths:
        raise UsageError(f"{root / 'notebooks'} holds no notebook called NN-*.ipynb")
    wanted = []
    for name in only:
        number = name.zfill(2) if name.isdigit() else name
        matches = [path for path in paths if number in (path.name[:2], path.stem, path.name)]
        if not matches:
            raise UsageError(f"no chapter {name!r}; there are {', '.join(path.stem for path in paths)}")
        wanted += matches
    with refused():
        return [_chapter(path) for path in paths if not only or path in wanted]


def _chapter(path: Path) -> Chapter:
    notebook = stored.read(path)
    with refused(f"{path.name}: "):
        return Chapter(path, path.name[:2], stored.parameters(notebook))


def is_comparison(chapter: Chapter) -> bool:
    """Return whether a chapter compares models: its parameter is `models`, and it has no run of its own for each."""
    return "models" in chapter.defaults and "model" not in chapter.defaults


def slug(model: str) -> str:
    """Return a model's name as a folder name: `folder@<digits>` for a local one, `owner--name` for one of the hub.

    Raises UsageError for a folder that holds no model.
    """
    try:
        name = models.identity(model)[0] if models.local(model) else model.strip("/").replace("/", "--")
    except (ValueError, OSError) as error:
        raise UsageError(f"the model {model!r} has no name to put its runs under ({error})") from error
    if name in ("", ".", ".."):
        raise UsageError(f"the model {model!r} has no name to put its runs under; give a folder that has one")
    return name


def timing_path(records: Path, chapter: Chapter, model: str | None = None) -> Path:
    """Return the TOML file that says how long a run took, on how many threads, when, and with which packages.

    It stands beside the records of the model (default: the chapter's own), or in their folder for a comparison.
    """
    if not is_comparison(chapter):
        records /= slug(str(model or chapter.defaults.get("model", "default")))
    return records / f"{chapter.number}.toml"


def timing(path: Path) -> dict[str, Any]:
    """Return what a run noted beside its records, {} where there is no such file.

    Raises ValueError for a file that a run has not left: it is no TOML, or a value is not of its kind.
    """
    if not path.exists():
        return {}
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        for name in {*found, "seconds", "threads", "date"} & NOTED.keys():
            if type(found.get(name)) is not NOTED[name]:
                raise ValueError(f"its {name} is {found.get(name)!r:.80}, expected {NOTED[name].__name__}")
        if not 0 <= found["seconds"] < 2**31:
            raise ValueError(f"its seconds are {found['seconds']}")
        date.fromisoformat(found["date"])
    except (OSError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not what a run notes ({why}); run its chapter anew, or delete it") from error
    return found


def check_folder(folder: Path, make: bool = False) -> None:
    """Raise UsageError where nothing could be written to a folder; with `make` it is made where there is none."""
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        tempfile.TemporaryFile(dir=existing).close()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"nothing can be written to {str(folder)!r} ({why}); make it writable, or give a folder where it can"
        ) from error


@contextlib.contextmanager
def book_lock(root: Path) -> Iterator[None]:
    """Hold the lock on rendering the book of a checkout; raise UsageError where another process holds it.

    Where the file system has no locks, do without: books under way have folders of their own.
    """
    check_folder(root / "_build", make=True)
    lock = FileLock(root / "_build" / "book.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"another process renders the book in {root / '_build'}; wait until it is done") from error
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        lock.release()
