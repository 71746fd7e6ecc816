"""Run notebooks: in a scratch folder, with parameters checked before anything starts; what succeeded is stored.

A checkout holds `notebooks/NN-*.ipynb` (one chapter each), results/ (one record per claim and model), book/ (prose).
Nothing here writes into a tracked folder before a run has succeeded.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import nbformat
import yaml
from filelock import FileLock, Timeout

from kncore import attribution, cases, models, stored
from kncore.disk import write

EPOCH = "1714694400"  # the day the paper appeared; figures and pages carry it instead of the time of the run
TIMEOUT = 3600
BESIDE = (
    "controlled-gpt2",
    "controlled-llama",
    "controlled-bert",
    "minilm-mlm",
)  # models that `book` runs beside the notebooks' own
ALIVE = ".alive"  # locked as long as the run lives that a scratch folder belongs to
KNOWN = {  # the texts that a parameter of this name may have
    "subject": lambda: {case.request.subject for case in cases.bijective("capital")},
    "new": lambda: {case.request.target for case in cases.bijective("capital")},
    "scholar": cases.scholars,
    "field": cases.synonyms,
}
Scalar = str | int | float | bool | None


class UsageError(Exception):
    """What was asked for cannot be done."""

    exit_code = 2


class RunError(Exception):
    """A notebook or the book did not come through."""

    exit_code = 1


@dataclass(frozen=True)
class Chapter:
    """A notebook of the checkout: its path, its number ("01") and the defaults of its parameters."""

    path: Path
    number: str
    defaults: Mapping[str, Scalar]


# ---------------------------------------------------------------------------------------------- the checkout


def find_root(start: Path | None = None) -> Path:
    """The checkout: the first folder from `start` upwards with notebooks/ and _toc.yml, else the installed one's."""
    start = Path.cwd() if start is None else Path(start).resolve()
    for folder in (start, *start.parents, Path(__file__).resolve().parent.parent):
        if (folder / "notebooks").is_dir() and (folder / "_toc.yml").is_file():
            return folder
    raise UsageError(f"{start} is in no checkout of the book: expected notebooks/ and _toc.yml; change into a clone")


def chapters(root: Path, only: Sequence[str] = ()) -> list[Chapter]:
    """The notebooks `notebooks/NN-*.ipynb` in order, or those named by number, name or file name in `only`.

    Raises:
        UsageError: there is no notebook, or one of `only` names none.
    """
    paths = sorted((root / "notebooks").glob("[0-9][0-9]-*.ipynb"))
    if not paths:
        raise UsageError(f"{root / 'notebooks'} holds no notebook called NN-*.ipynb")
    wanted = []
    for name in only:
        number = name.zfill(2) if name.isdigit() else name
        matches = [p for p in paths if number in (p.name[:2], p.stem, p.name)]
        if not matches:
            raise UsageError(f"no chapter {name!r}; there are {', '.join(p.stem for p in paths)}")
        wanted += matches
    return [_chapter(path) for path in paths if not only or path in wanted]


def _chapter(path: Path) -> Chapter:
    cells = stored.read(path).cells
    source = next((cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])), "")
    defaults = {}
    try:
        for line in ast.parse(source).body:
            target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
            if isinstance(target, ast.Name):
                defaults[target.id] = ast.literal_eval(line.value)
    except (ValueError, SyntaxError) as error:
        raise UsageError(f"{path.name}: the cell tagged 'parameters' must be name = literal: {error}") from error
    return Chapter(path, path.name[:2], defaults)


def parse_parameters(pairs: Sequence[str]) -> dict[str, Scalar]:
    """`name=value` pairs with the values read as YAML scalars: 5, 0.2, true, null, text."""
    parameters: dict[str, Scalar] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"-p {pair}: expected name=value")
        try:
            value = yaml.safe_load(text) if text else ""
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date with 13 months is a ValueError
            raise UsageError(
                f"-p {pair[:200]}: expected name=value with a number, true, false, null or text"
            ) from error
        if isinstance(value, dict | list):
            raise UsageError(f"-p {pair}: expected one value, got a {type(value).__name__}")
        parameters[name] = value if isinstance(value, str | int | float | bool | None) else text
    return parameters


def check_parameters(chapter: Chapter, parameters: Mapping[str, Scalar]) -> None:
    """Raises UsageError where a parameter is unknown to the chapter or not of the kind of its default."""
    for name, value in parameters.items():
        if name not in chapter.defaults:
            close = difflib.get_close_matches(name, chapter.defaults, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            known = ", ".join(chapter.defaults) or "none: it has no cell tagged 'parameters'"
            raise UsageError(f"{chapter.path.name} has no parameter {name!r}; {hint}its parameters: {known}")
        default = chapter.defaults[name]
        kinds = (int, float) if type(default) is float else (type(default),)
        if default is not None and value is not None and type(value) not in kinds:
            raise UsageError(
                f"{chapter.path.name}: parameter {name} is {type(default).__name__} (default {default!r}), "
                f"got {type(value).__name__} {value!r}"
            )
        if value != default and (expected := _unfit(name, value)):
            raise UsageError(f"{chapter.path.name}: parameter {name}: expected {expected}, got {value!r}")


def _unfit(name: str, value: Scalar) -> str:
    """What is expected of a parameter of that name, in words, where the value is not it; "" where it is."""
    if type(value) is int:
        least = 0 if name == "seed" else 1
        return "" if least <= value < 2**32 else f"a whole number from {least} to 2**32 - 1"
    if not isinstance(value, str):
        return "" if isinstance(value, bool) or (value is not None and math.isfinite(value)) else "a finite value"
    if name == "model":
        return _refused("a model", models.check, value)
    if name == "models":
        return next(filter(None, (_refused("a model", models.check, one) for one in value.split(","))), "")
    if name == "source":
        return "" if value in ("own", "public") or models.local(value) else "own, public, or a folder that exists"
    if name == "corpus":
        return "" if not value or models.local(value) else "nothing, or a folder that exists, with .txt files"
    if name == "quadrature":
        return _refused("a quadrature", attribution.rule, value, 2)
    if name == "sweep":
        return "" if re.fullmatch(r"\d{1,4}(,\d{1,4})*", value) else "whole numbers with commas between, e.g. 0,1,3"
    if name in KNOWN:
        known = sorted(KNOWN[name]())
        close = difflib.get_close_matches(value, known, 3) or known[:3]
        return "" if value in known else f"one of {len(known)} that are known, such as {', '.join(close)}"
    return ""


def _refused(what: str, check: Callable[..., object], *given: object) -> str:
    try:
        check(*given)
    except ValueError as error:
        return f"{what} ({error})"
    return ""


def slug(model: str) -> str:
    """A model's name as a folder name: the last part of a local path, `owner--name` for a hub model."""
    folder = models.local(model)
    name = folder.resolve().name if folder else model.strip("/").replace("/", "--")
    if name in ("", ".", ".."):
        raise UsageError(f"the model {model!r} has no name to put its runs under; give a folder that has one")
    return name


def make_folder(out: Path) -> None:
    """Make a folder where there is none; UsageError where there can be none, or nothing can be written to it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"nothing can be written to {str(out)!r} ({why}); give a folder where it can") from error


# ------------------------------------------------------------------------------------------------- running


def run(
    root: Path,
    *,
    model: str | None = None,
    only: Sequence[str] = (),
    parameters: Mapping[str, Scalar] | None = None,
    out: Path | None = None,
    results: Path | None = None,
    timeout: int = TIMEOUT,
) -> list[Path]:
    """Run chapters and store each one that succeeds; the stored notebooks' paths.

    Where they go: with the default parameters notebooks/ and results/, which are tracked; for another model
    book/runs/<model>/ and results/; with other parameters _build/runs/<model>/ with a results/ of its own; with `out`
    there, with a results/ of its own unless `results` names one.

    Raises:
        UsageError: an unknown chapter or parameter, an `out` that is no folder; nothing has run then.
        ValueError: a device or dtype of the environment that there is not; nothing has run then.
        RunError: a cell failed or took longer than `timeout` seconds; what was stored before stays as it was.
    """
    selected = chapters(root, only)
    given = dict(parameters or {})
    if model is not None:
        if given.get("model", model) != model:
            raise UsageError(f"--model {model} and -p model={given['model']} disagree")
        given["model"] = model
    names = {}
    for name in ("model", "source", "corpus"):
        value = given.get(name)
        if isinstance(value, str) and (folder := models.local(value)):  # a notebook runs in a folder of its own
            given[name] = str(folder.resolve())
            names[given[name]] = slug(value)
    if model is not None and out is None:
        selected = [chapter for chapter in selected if not compares(chapter)]
    for chapter in selected:
        check_parameters(chapter, _given(chapter, given))
    models.place()
    if out is not None:
        make_folder(out)

    written = []
    for chapter in selected:
        mine = _given(chapter, given)
        changed = {name: value for name, value in mine.items() if value != chapter.defaults[name]}
        folder, records = _destination(root, chapter, changed, out, results)
        with _scratch(root / "_build") as scratch:
            executed = _execute(chapter, changed, Path(scratch), records, timeout)
            _drop_copies(Path(scratch) / "results", Path(scratch) / "before")
            places = {scratch: ".", str(root): ".", str(Path.home()): "~", **names}
            notebook = stored.finalise(executed, places)
            move(Path(scratch) / "results", records)
            _note(took(records, chapter, mine), executed, folder / chapter.path.name, stored.dumps(notebook))
            written.append(write(folder / chapter.path.name, stored.dumps(notebook)))
        for problem in stored.problems(notebook):
            print(f"  note: {chapter.path.name}: {problem}", file=sys.stderr)
    return written


@contextlib.contextmanager
def _scratch(build: Path) -> Iterator[str]:
    """A folder for one run; those that killed runs left are removed first."""
    build.mkdir(exist_ok=True)
    for left in build.glob("run-*"):
        with contextlib.suppress(OSError):  # a timeout of the lock too: that run is alive
            if time.time() - left.stat().st_mtime > 60:
                with FileLock(left / ALIVE, timeout=0):
                    shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix="run-", dir=build, ignore_cleanup_errors=True) as scratch:
        with FileLock(Path(scratch) / ALIVE):
            yield scratch


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Context in which no other process renders the book of this checkout; UsageError where one does."""
    (root / "_build").mkdir(exist_ok=True)
    try:
        with FileLock(root / "_build" / "book.lock", timeout=0):
            yield
    except Timeout as error:
        raise UsageError(f"another process renders the book in {root / '_build'}; wait until it is done") from error


def took(records: Path, chapter: Chapter, parameters: Mapping[str, Scalar] | None = None) -> Path:
    """Where a run leaves how long it took, on how many threads, when, and with which packages: a TOML file.

    It stands beside the records of the model, or in their folder for a chapter that compares models.
    """
    told = {**chapter.defaults, **(parameters or {})}
    folder = records if compares(chapter) else records / slug(str(told.get("model", "default")))
    return folder / f"{chapter.number}.toml"


def _note(place: Path, executed: nbformat.NotebookNode, target: Path, text: str) -> None:
    """Write how long a run took, unless the notebook came out as it was: then what is noted there still holds."""
    if place.is_file() and target.is_file() and target.read_text(encoding="utf-8") == text:
        return
    said = {"seconds": round(executed.metadata.papermill.duration), "date": datetime.now(UTC).date().isoformat()}
    said["threads"] = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
    said |= {name: metadata.version(name).partition("+")[0] for name in ("kncore", "torch", "transformers")}
    write(place, "".join(f"{name} = {json.dumps(value)}\n" for name, value in said.items()))


def keep_times(results: Path, earlier: Path) -> None:
    """Put what is noted of runs below `earlier` in place of that below `results`, so that pages stay the same."""
    for path in results.rglob("*.toml"):
        old = earlier / path.relative_to(results)
        if old.is_file():
            shutil.copyfile(old, path)


def compares(chapter: Chapter) -> bool:
    """Whether a chapter sets models side by side (its parameter is `models`), and so has no run of its own for each."""
    return "models" in chapter.defaults and "model" not in chapter.defaults


def _given(chapter: Chapter, given: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The parameters as the chapter names them: one that compares models is given the only one."""
    return {"models" if name == "model" and compares(chapter) else name: value for name, value in given.items()}


def _destination(
    root: Path, chapter: Chapter, changed: Mapping[str, Scalar], out: Path | None, results: Path | None
) -> tuple[Path, Path]:
    if out is not None:
        return out, results or out / "results"
    if not changed:
        return root / "notebooks", results or root / "results"
    name = slug(str(changed.get("model", chapter.defaults.get("model", "default"))))
    if set(changed) == {"model"}:
        return root / "book" / "runs" / name, results or root / "results"
    return root / "_build" / "runs" / name, results or root / "_build" / "runs" / name / "results"


def _execute(
    chapter: Chapter, parameters: Mapping[str, Scalar], scratch: Path, records: Path, timeout: int
) -> nbformat.NotebookNode:
    """The executed notebook; it ran as scratch/notebooks/NN-....ipynb and its records are in scratch/results/."""
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    source, target = scratch / "notebooks" / chapter.path.name, scratch / chapter.path.name
    source.parent.mkdir()
    shutil.copy(chapter.path, source)
    for copy in ("results", "before"):
        if records.is_dir():
            shutil.copytree(records, scratch / copy, ignore=shutil.ignore_patterns(".*"))
        else:
            (scratch / copy).mkdir()
    environment = kernel_environment(scratch, scratch / "results")
    if "model" not in parameters:
        environment["HF_HUB_OFFLINE"] = "1"
    terminal = sys.stderr.isatty()
    print(f"{chapter.path.stem} ...", end="\n" if terminal else " ", flush=True)
    begun = time.monotonic()
    try:
        with _quiet_papermill(), _environment(environment):
            papermill.execute_notebook(
                str(source),
                str(target),
                parameters=dict(parameters),
                kernel_name="python3",
                language="python",
                progress_bar=terminal,
                cwd=str(source.parent),
                execution_timeout=timeout,
                extra_arguments=["--log-level=CRITICAL"],
            )
    except PapermillExecutionError as error:
        last = (str(error.evalue).strip().splitlines() or [""])[-1]
        what = f"cell {error.cell_index + 1} (In [{error.exec_count}]): {error.ename}: {last}"
        raise _failed(chapter, what) from error
    except CellTimeoutError as error:
        what = f"cell {_running(target)} took longer than {timeout} s; allow more with --timeout"
        raise _failed(chapter, what) from error
    except DeadKernelError as error:
        what = f"cell {_running(target)} ended the kernel: most often memory ran out; take a smaller n or model"
        raise _failed(chapter, what) from error
    except NoSuchKernel as error:
        raise _failed(chapter, "there is no Jupyter kernel 'python3': install ipykernel beside kncore") from error
    print(f"{time.monotonic() - begun:.0f} s", flush=True)
    return nbformat.read(target, as_version=4)


def _failed(chapter: Chapter, what: str) -> RunError:
    print("failed", flush=True)
    return RunError(f"{chapter.path.name}, {what}\nThe stored notebook is as it was.")


def kernel_environment(scratch: Path, results: Path) -> dict[str, str]:
    """What a notebook's process gets on top of the caller's environment.

    A stored notebook must not depend on sample data that only some machines have, nor on the caller's settings of
    Matplotlib and IPython. The number of threads is the caller's to choose.
    """
    settings = scratch / "matplotlibrc"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text("svg.hashsalt: kncore\n", encoding="utf-8")
    fixed = {
        "KNCORE_DATA": "",
        "KNCORE_RESULTS": str(results),
        "MATPLOTLIBRC": str(settings),
        "IPYTHONDIR": str(scratch / "ipython"),
        "JUPYTER_PLATFORM_DIRS": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "PYTHONHASHSEED": "0",
        "SOURCE_DATE_EPOCH": EPOCH,
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    chosen = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    return fixed | {name: os.environ.get(name, value) for name, value in chosen.items()}


def _running(notebook: Path) -> int:
    cells = nbformat.read(notebook, as_version=4).cells if notebook.exists() else []
    return max(
        (i for i, cell in enumerate(cells, 1) if cell.metadata.get("papermill", {}).get("start_time")), default=0
    )


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet_papermill() -> Iterator[None]:
    import logging

    logger = logging.getLogger("papermill")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _drop_copies(results: Path, before: Path) -> None:
    """Leave only what a run wrote: what it was given would overwrite records that another run made in the meantime."""
    for path in [path for path in results.rglob("*") if path.is_file()]:
        old = before / path.relative_to(results)
        if old.is_file() and old.read_bytes() == path.read_bytes():
            path.unlink()


def move(source: Path, target: Path) -> None:
    """Every file below `source` into its place below `target`, each whole or not at all, across file systems too."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        place = target / path.relative_to(source)
        if place.is_file() and place.read_bytes() == path.read_bytes():
            continue
        write(place, path.read_bytes())
