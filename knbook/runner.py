"""Run notebooks: in a scratch folder, with parameters checked before anything starts; what succeeded is stored."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import nbformat

from knbook import jobs, kernel, runs
from knbook.checkout import Chapter, Scalar, chapters, check_folder, is_comparison, slug, timing_path
from knbook.errors import RunError, UsageError, refused
from knbook.parameters import check_parameters
from kncore import models, products, zoo
from kncore.store.disk import full
from kncore.store.fingerprint import versions
from knpaper import stored

TIMEOUT = 3600
ROOM = 2**20  # bytes


@dataclass(frozen=True)
class Job:
    """A run of a chapter: the parameters that differ from its defaults, the folder names of its models, its places."""

    chapter: Chapter
    parameters: Mapping[str, Scalar]
    models: Sequence[str]
    notebook: Path
    records: Path


@runs.stoppable()
def run(
    root: Path,
    *,
    model: str | None = None,
    only: Sequence[str] = (),
    parameters: Mapping[str, Scalar] | None = None,
    out: Path | None = None,
    timeout: int = TIMEOUT,
    at_once: int = 1,
) -> list[Path]:
    """Run chapters and store each that succeeds, with its records or not at all; return the notebooks' paths.

    One after the other, or `at_once` side by side, each in a process of its own (see `knbook.jobs`).

    Where they go: with the default parameters notebooks/ and results/, which are tracked; for another model
    book/runs/<model>/ and results/; with other parameters _build/runs/<model>/, and with `out` there, with a results/
    of their own.

    Raises:
        UsageError: an unknown chapter, parameter, device or dtype, a folder that cannot be written to; nothing has run.
        RunError: a cell failed or took longer than `timeout` seconds, a record was left for another model, or the
            chapter was edited meanwhile.
    """
    selected = chapters(root, only)
    given = dict(parameters or {})
    if model is not None:
        if given.get("model", model) != model:
            raise UsageError(f"--model {model} and -p model={given['model']} disagree")
        given["model"] = model
        selected = [chapter for chapter in selected if out is not None or not is_comparison(chapter)]
    for chapter in selected:
        check_parameters(chapter, _renamed(chapter, given))
    given, names = _absolute(given)
    with refused():
        models.resolve_device()
        products.asked()
    check_folder(root / "_build")
    if out is not None:
        check_folder(out, make=True)
    planned = [_plan(root, chapter, given, names, out) for chapter in selected]
    if at_once == 1 or len(planned) == 1:
        return [_run(root, job, names, timeout) for job in planned]
    options = [f"-p{name}={_typed(value)}" for name, value in given.items()]
    options += ["--timeout", str(timeout), *(["--out", str(out)] if out else [])]
    own = str(given["model"]) if "model" in given else None
    with refused():
        queue = [jobs.job(root, chapter, options, names.get(own, own)) for chapter in selected]
    (root / "_build").mkdir(exist_ok=True)
    jobs.run_all(root, queue, at_once, root / "_build")
    return [job.notebook for job in planned]


def _typed(value: Scalar) -> str:
    """Return a parameter as it is typed: text in quotes where it can be, for it may look like a number."""
    if not isinstance(value, str):
        return json.dumps(value)
    quote = "" if "\\" in value else next((quote for quote in "\"'" if quote not in value), "")
    return f"{quote}{value}{quote}"


def _renamed(chapter: Chapter, given: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the parameters as the chapter names them: a comparison is given the only model."""
    return {"models" if name == "model" and is_comparison(chapter) else name: value for name, value in given.items()}


def _absolute(given: Mapping[str, Scalar]) -> tuple[dict[str, Scalar], dict[str, str]]:
    """Return the parameters with absolute folders, for a notebook runs in a folder of its own, and the folders' names.

    The name of a model's folder is that of the model, of another folder its last part.
    """
    found, names = dict(given), {}
    for parameter in {"model", "models", "source", "corpus"} & found.keys():
        value = found[parameter]
        texts = value.split(",") if parameter == "models" else [value]
        for i, text in enumerate(texts):
            if isinstance(text, str) and (folder := models.local(text)):
                texts[i] = str(folder.resolve())
                names[texts[i]] = slug(text) if parameter in ("model", "models") else folder.resolve().name
        found[parameter] = ",".join(texts) if parameter == "models" else texts[0]
    return found, names


def _plan(root: Path, chapter: Chapter, given: Mapping[str, Scalar], names: Mapping[str, str], out: Path | None) -> Job:
    """Return the run of a chapter; raise UsageError where its notebook or its records could not be stored."""
    values = {**chapter.defaults, **_renamed(chapter, given)}
    changed = {name: value for name, value in values.items() if value != chapter.defaults[name]}
    own = str(values["models"]).split(",") if is_comparison(chapter) else [values["model"]] if "model" in values else []
    folders = [names.get(model) or slug(model) for model in map(str, own)]
    main = folders[0] if folders and not is_comparison(chapter) else "default"
    if out is not None:
        target = out
    elif not changed:
        target = root / "notebooks"
    else:
        target = root / ("book" if set(changed) == {"model"} else "_build") / "runs" / main
    records = root / "results" if out is None and set(changed) <= {"model"} else target / "results"
    job = Job(chapter, changed, folders, target / chapter.path.name, records)
    for folder in (target, records, *(records / name for name in folders)):
        check_folder(folder)
    if job.notebook.is_dir():
        raise UsageError(f"{str(job.notebook)!r} is a folder, and a notebook is to be stored there; move it away")
    return job


def _run(root: Path, job: Job, names: Mapping[str, str], timeout: int) -> Path:
    """Execute a notebook and store it with its records; return its path."""
    home = Path(os.path.expanduser("~"))
    folders = {str(root): ".", str(root.resolve()): ".", str(home): "~", str(home.resolve()): "~", **names}
    chapter = job.chapter
    with _room(root / "_build"), runs.scratch(root / "_build", "run") as scratch:
        journal = runs.journal_of(job.records, chapter.path.stem)
        runs.settle(journal)
        if job.records.is_dir():
            shutil.copytree(job.records, scratch / "results", ignore=shutil.ignore_patterns(".*"))
        (scratch / "results").mkdir(exist_ok=True)
        given = _times(scratch / "results")
        executed = kernel.execute(chapter.path, job.parameters, scratch, timeout)
        notebook = stored.finalise(executed, {str(scratch): ".", str(scratch.resolve()): ".", **folders})
        # What the run wrote, or found to be what it would write: `claims.record` marks that as used. Other records stay
        # out, for another run may have made them anew in the meantime.
        made = sorted(path for path, changed in _times(scratch / "results").items() if given.get(path) != changed)
        _check_records(job, made)
        files = {job.records / path: (scratch / "results" / path).read_bytes() for path in made}
        timing = timing_path(job.records, chapter, job.models[0] if job.models else None)
        files[timing] = _timing(timing, executed, job.notebook, stored.dumps(notebook))
        files[job.notebook] = stored.dumps(notebook).encode()
        if job.notebook == chapter.path:
            _check_unedited(chapter, scratch / "notebooks" / chapter.path.name)
        runs.publish(files, journal)
    for problem in stored.problems(notebook):
        print(f"  note: {chapter.path.name}: {problem}", file=sys.stderr)
    return job.notebook


@contextlib.contextmanager
def _room(build: Path) -> Iterator[None]:
    """Raise RunError where a disk has no room or cannot be written, before a kernel starts where that is known."""
    try:
        build.mkdir(parents=True, exist_ok=True)
        usage = shutil.disk_usage(build)
        if usage.total and usage.free < ROOM:  # some file systems do not say
            raise OSError(errno.ENOSPC, f"{usage.free:,} bytes are left, and a run needs at least {ROOM:,}")
        yield
    except OSError as error:
        if not full(error):
            raise
        where = f"{build} or {error.filename}" if error.filename else build
        why = error.strerror or "No space left on device"
        raise RunError(
            f"{where} cannot be written ({why}): free some space there; what was stored is as it was"
        ) from error


def _times(folder: Path) -> dict[Path, int]:
    """Return the times of change of the files below a folder."""
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def _check_records(job: Job, made: Sequence[Path]) -> None:
    """Raise RunError where a run left a record for a model that it did not run on; one that compares models
    may speak of their training seeds as well."""
    models = {*job.models}
    if is_comparison(job.chapter):
        models |= {seed for model in job.models for seed in zoo.replicas(model)}
    for path in made:
        folder = {path.parts[0], path.parts[0].rpartition("@")[0]}  # with and without the source of its data
        if models and path.suffix == ".json" and not folder & models:
            raise RunError(
                f"{job.chapter.path.name} recorded {path.as_posix()}, and the name of its model is "
                f"{' or '.join(job.models)}: the notebook, or the model's folder, was changed while it ran; nothing "
                "was stored, run it again"
            )


def _check_unedited(chapter: Chapter, copy: Path) -> None:
    """Raise RunError where a chapter was edited while it ran: the edit would be overwritten."""
    before, now = ([cell.source for cell in stored.read(path).cells] for path in (copy, chapter.path))
    if before != now:
        raise RunError(f"{chapter.path.name} was edited while it ran; nothing was stored, run it again")


def _timing(path: Path, executed: nbformat.NotebookNode, notebook: Path, text: str) -> bytes:
    """Return what is noted of a run: what was noted before where the notebook came out as it was, for that holds."""
    if path.is_file() and notebook.is_file() and notebook.read_text(encoding="utf-8") == text:
        return path.read_bytes()
    notes = {
        "seconds": round(executed.metadata.papermill.duration),
        "date": datetime.now(UTC).date().isoformat(),
        "threads": os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1),
    }
    notes |= {"kncore": version("kncore")} | versions()
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in notes.items()).encode()


def keep_times(results: Path, earlier: Path) -> None:
    """Put what is noted of runs below `earlier` in place of that below `results`, so that pages stay the same."""
    for path in results.rglob("*.toml"):
        old = earlier / path.relative_to(results)
        if old.is_file():
            shutil.copyfile(old, path)
