"""Run notebooks: in a scratch folder, with parameters checked before anything starts; what succeeded is stored.

A checkout holds `notebooks/NN-*.ipynb` (one chapter each), results/ (one record per claim and model), book/ (prose).
Nothing here writes into a tracked folder before a run has succeeded.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
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
from importlib.util import find_spec
from pathlib import Path

import nbformat
import yaml
from filelock import FileLock, Timeout

from kncore import attribution, cases, models, runs, stored
from kncore.disk import full, warn, write

EPOCH = "1714694400"  # the day the paper appeared; figures and pages carry it instead of the time of the run
TIMEOUT = 3600
START = 600  # seconds in which a kernel must answer, on a busy machine, too
BESIDE = (
    "controlled-gpt2",
    "controlled-llama",
    "controlled-bert",
    "minilm-mlm",
)  # models that `book` runs beside the notebooks' own
ROOM = 2**20  # bytes
LONG_AGO = 10**9  # in 2001: the time of change of a record that a run was given and has not used
KNOWN = {  # the texts that a parameter of this name may have
    "subject": lambda: {case.request.subject for case in cases.bijective("capital")},
    "new": lambda: {case.request.target for case in cases.bijective("capital")},
    "scholar": cases.scholars,
    "field": cases.synonyms,
}
WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?P<rest>(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)")
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
    """`name=value` pairs, each value a number, true, false, null or text, as it was typed.

    A number is decimal and written as in Python: 5, -0.25, 1e-3, without a plus sign, a leading zero or underscores.
    true, false and null may be written True, False and None. Everything else is text; so is what stands in quotes.

    Raises UsageError for what looks like a number and is written in another way: systems read 010 and 1:30 differently.
    """
    parameters: dict[str, Scalar] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"-p {pair[:200]}: expected name=value")
        value = _value(text, f"-p {pair[:200]}")
        if name in parameters and (type(value), value) != (type(parameters[name]), parameters[name]):
            raise UsageError(f"-p {name} is given twice, as {parameters[name]!r} and as {value!r}; give it once")
        parameters[name] = value
    return parameters


def _value(text: str, pair: str) -> Scalar:
    if text in WORDS:
        return WORDS[text]
    if quoted := re.fullmatch(r"""(["'])((?:(?!\1)[^\\])*)\1""", text, re.DOTALL):
        return quoted[2]
    if text[:1] in ('"', "'"):
        raise UsageError(f"{pair}: expected the same quote at both ends, and neither it nor a backslash between them")
    if text[:1] in ("[", "{"):
        raise UsageError(f"{pair}: expected one value, not several; put text that begins with {text[0]} in quotes")
    if text != text.strip():
        raise UsageError(f"{pair}: expected no white space around the value; put text that has it in quotes")
    if found := NUMBER.fullmatch(text):
        value = float(text) if found["rest"] else int(text) if len(text) < 100 else math.inf
        if math.isfinite(value) and (value or not re.search("[1-9]", re.split("[eE]", text)[0])):
            return value
    elif not _number_elsewhere(text):
        return text
    raise UsageError(
        f"{pair}: expected a finite value written as 5, -0.25 or 1e-3, or text in quotes; got {text[:60]!r}, which "
        "looks like a number"
    )


def _number_elsewhere(text: str) -> bool:
    """Whether Python or YAML has a notation in which a text is a number."""
    text = text.translate({0x2212: "-", 0xFF0B: "+"})
    for read in (functools.partial(int, base=0), int, float):
        with contextlib.suppress(ValueError):
            read(text)
            return True
    kind = yaml.resolver.Resolver().resolve(yaml.ScalarNode, text, (True, False))
    return kind.endswith((":int", ":float"))


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
    """A model's name as a folder name: `folder@<digits>` for a local one (`models.identity`), `owner--name` of a hub.

    Raises UsageError for a folder that holds no model.
    """
    try:
        name = models.identity(model)[0] if models.local(model) else model.strip("/").replace("/", "--")
    except (ValueError, OSError) as error:
        raise UsageError(f"the model {model!r} has no name to put its runs under ({error})") from error
    if name in ("", ".", ".."):
        raise UsageError(f"the model {model!r} has no name to put its runs under; give a folder that has one")
    return name


def make_folder(out: Path) -> None:
    """Make a folder where there is none; UsageError where there can be none, or nothing can be written to it."""
    with _written_to(out):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()


def check_folder(folder: Path) -> None:
    """UsageError where nothing could be written to a folder, which is not made."""
    with _written_to(folder):
        there = next(one for one in (folder, *folder.parents) if one.exists())
        tempfile.TemporaryFile(dir=there).close()


@contextlib.contextmanager
def _written_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"nothing can be written to {str(folder)!r} ({why}); make it writable, or give a folder where it can"
        ) from error


# ------------------------------------------------------------------------------------------------- running


@runs.stoppable()
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
        UsageError: an unknown chapter or parameter, a folder that cannot be written to; nothing has run then.
        ValueError: a device or dtype of the environment that there is not; nothing has run then.
        RunError: a cell failed or took longer than `timeout` seconds, a record was left for another model, or the
            chapter was edited meanwhile; a notebook and its records are stored together or not at all.
    """
    selected = chapters(root, only)
    given = dict(parameters or {})
    if model is not None:
        if given.get("model", model) != model:
            raise UsageError(f"--model {model} and -p model={given['model']} disagree")
        given["model"] = model
    if model is not None and out is None:
        selected = [chapter for chapter in selected if not compares(chapter)]
    for chapter in selected:
        check_parameters(chapter, _given(chapter, given))
    names = _resolve(given)
    models.place()
    check_folder(root / "_build")
    if out is not None:
        make_folder(out)
    planned = []
    for chapter in selected:
        mine = _given(chapter, given)
        changed = {name: value for name, value in mine.items() if value != chapter.defaults[name]}
        models_of = [names.get(one) or slug(one) for one in _models(chapter, mine)]
        folder, records = _destination(root, chapter, changed, models_of, out, results)
        _check_places(folder / chapter.path.name, records, models_of)
        planned.append((chapter, changed, models_of, folder / chapter.path.name, records))

    written = []
    home = Path(os.path.expanduser("~"))
    places = {str(root): ".", str(root.resolve()): ".", str(home): "~", str(home.resolve()): "~", **names}
    for chapter, changed, models_of, target, records in planned:
        with _room(root / "_build"), runs.scratch(root / "_build", "run") as scratch:
            _check_room(root / "_build")
            journal = runs.journal_of(records, chapter.path.stem)
            runs.settle(journal)
            lent = _lend(records, scratch / "results")
            executed = _execute(chapter, changed, scratch, timeout)
            own = {str(scratch): ".", str(scratch.resolve()): "."}
            notebook = stored.finalise(executed, {**own, **places})
            made = _made(scratch / "results", lent)
            _check_records(chapter, made, models_of)
            files = {records / path: (scratch / "results" / path).read_bytes() for path in made}
            note = took(records, chapter, {"model": models_of[0]} if models_of else None)
            files[note] = _note(note, executed, target, stored.dumps(notebook))
            files[target] = stored.dumps(notebook).encode()
            if target == chapter.path:
                _check_unedited(chapter, scratch / "notebooks" / chapter.path.name)
            runs.publish(files, journal)
            written.append(target)
        for problem in stored.problems(notebook):
            print(f"  note: {chapter.path.name}: {problem}", file=sys.stderr)
    return written


def _resolve(given: dict[str, Scalar]) -> dict[str, str]:
    """Make the folders among the parameters absolute, for a notebook runs in a folder of its own; their names.

    Of a model that is the name by which it is known, of other folders the last part.
    """
    names = {}

    def whole(text: str, name: Callable[[str], str]) -> str:
        folder = models.local(text)
        if folder is None:
            return text
        names[str(folder.resolve())] = name(text)
        return str(folder.resolve())

    for name, called in (("model", slug), ("models", slug), ("source", _last), ("corpus", _last)):
        if isinstance(given.get(name), str):
            listed = given[name].split(",") if name == "models" else [given[name]]
            given[name] = ",".join(whole(one, called) for one in listed)
    return names


def _last(folder: str) -> str:
    name = Path(folder).expanduser().resolve().name
    if not name:
        raise UsageError(f"{folder!r} is the root of all folders; give a folder with what is wanted")
    return name


@contextlib.contextmanager
def _room(build: Path) -> Iterator[None]:
    """Context that says where there is no room, or nothing may be written, in words."""
    try:
        yield
    except OSError as error:
        if not full(error):
            raise
        where = f"{build} or {error.filename}" if error.filename else build
        why = error.strerror or "No space left on device"
        raise RunError(
            f"{where} cannot be written ({why}): free some space there; what was stored is as it was"
        ) from error


def _check_room(folder: Path) -> None:
    """RunError where a kernel would not even start for want of room; some file systems do not say how much there is."""
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < ROOM:
        raise RunError(
            f"{folder} has {usage.free:,} bytes left, and a run needs at least {ROOM:,}: free some space there"
        )


def _check_places(target: Path, records: Path, names: Sequence[str]) -> None:
    """UsageError where a notebook or its records could not be stored; nothing is made."""
    for folder in (target.parent, records, *(records / name for name in names)):
        check_folder(folder)
    if target.is_dir():
        raise UsageError(f"{str(target)!r} is a folder, and a notebook is to be stored there; move it away")


def _lend(records: Path, folder: Path) -> dict[Path, int]:
    """Copy records to where a run finds and writes them; their names, with the time that marks them as not used."""
    if records.is_dir():
        shutil.copytree(records, folder, ignore=shutil.ignore_patterns(".*"))
    folder.mkdir(exist_ok=True)
    lent = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        os.utime(path, (LONG_AGO, LONG_AGO))
        lent[path.relative_to(folder)] = path.stat().st_mtime_ns
    return lent


def _made(folder: Path, lent: Mapping[Path, int]) -> list[Path]:
    """What a run wrote into the folder, or found to be what it would write: `claims.record` marks that as used.

    Other records that it was given stay out: another run may have made them anew in the meantime.
    """
    found = {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    return sorted(path for path, changed in found.items() if lent.get(path) != changed)


def _check_records(chapter: Chapter, made: Sequence[Path], names: Sequence[str]) -> None:
    """RunError where a run left a record for a model that it did not run on."""
    for path in made:
        if names and path.suffix == ".json" and path.parts[0] not in names:
            raise RunError(
                f"{chapter.path.name} recorded {path.as_posix()}, and its model's place is {' or '.join(names)}: the "
                "notebook, or the model's folder, was changed while it ran; nothing was stored, run it again"
            )


def _check_unedited(chapter: Chapter, copy: Path) -> None:
    """RunError where a chapter was edited while it ran: it may be stored in the place of what was edited."""
    then, now = ([cell.source for cell in stored.read(path).cells] for path in (copy, chapter.path))
    if then != now:
        raise RunError(f"{chapter.path.name} was edited while it ran; nothing was stored, run it again")


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Context in which no other process renders the book of this checkout; UsageError where one does.

    Where the file system has no locks it goes without: books in the making have folders of their own.
    """
    check_folder(root / "_build")
    (root / "_build").mkdir(exist_ok=True)
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


def took(records: Path, chapter: Chapter, parameters: Mapping[str, Scalar] | None = None) -> Path:
    """Where a run leaves how long it took, on how many threads, when, and with which packages: a TOML file.

    It stands beside the records of the model, or in their folder for a chapter that compares models.
    """
    told = {**chapter.defaults, **(parameters or {})}
    folder = records if compares(chapter) else records / slug(str(told.get("model", "default")))
    return folder / f"{chapter.number}.toml"


def _note(place: Path, executed: nbformat.NotebookNode, target: Path, text: str) -> bytes:
    """What is noted of a run: what was noted before where the notebook came out as it was, for that still holds."""
    if place.is_file() and target.is_file() and target.read_text(encoding="utf-8") == text:
        return place.read_bytes()
    said = {"seconds": round(executed.metadata.papermill.duration), "date": datetime.now(UTC).date().isoformat()}
    said["threads"] = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
    said |= {name: metadata.version(name).partition("+")[0] for name in ("kncore", "torch", "transformers")}
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in said.items()).encode()


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


def _models(chapter: Chapter, parameters: Mapping[str, Scalar]) -> list[str]:
    """The models that a chapter runs on; empty where it has no such parameter."""
    told = {**chapter.defaults, **parameters}
    return str(told["models"]).split(",") if compares(chapter) else [str(told["model"])] if "model" in told else []


def _destination(
    root: Path,
    chapter: Chapter,
    changed: Mapping[str, Scalar],
    names: Sequence[str],
    out: Path | None,
    results: Path | None,
) -> tuple[Path, Path]:
    if out is not None:
        return out, results or out / "results"
    if not changed:
        return root / "notebooks", results or root / "results"
    name = names[0] if names and not compares(chapter) else "default"
    if set(changed) == {"model"}:
        return root / "book" / "runs" / name, results or root / "results"
    return root / "_build" / "runs" / name, results or root / "_build" / "runs" / name / "results"


def _execute(chapter: Chapter, parameters: Mapping[str, Scalar], scratch: Path, timeout: int) -> nbformat.NotebookNode:
    """The executed notebook; it ran as scratch/notebooks/NN-....ipynb and its records are in scratch/results/."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    source, target = scratch / "notebooks" / chapter.path.name, scratch / chapter.path.name
    source.parent.mkdir()
    shutil.copy(chapter.path, source)
    if find_spec("ipykernel_launcher") is None:
        raise _failed(chapter, "there is no Jupyter kernel 'python3': install ipykernel beside kncore")
    environment = kernel_environment(scratch, scratch / "results") | _own_kernel(scratch)
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
                start_timeout=START,
                execution_timeout=timeout,
                extra_arguments=["--log-level=CRITICAL"],
            )
        seconds = time.monotonic() - begun  # papermill's own number follows the clock of the day, which may be set
        print(f"{seconds:.0f} s", flush=True)
    except PapermillExecutionError as error:
        last = (str(error.evalue).strip().splitlines() or [""])[-1]
        what = f"cell {error.cell_index + 1} (In [{error.exec_count}]): {error.ename}: {last}"
        if full(OSError(last)):
            what += f" (in {scratch.parent}, or where the cell writes: free some space there)"
        raise _failed(chapter, what) from error
    except CellTimeoutError as error:
        what = f"cell {_running(target)} took longer than {timeout} s; allow more with --timeout"
        raise _failed(chapter, what) from error
    except DeadKernelError as error:
        what = f"cell {_running(target)} ended the kernel: most often memory ran out; take a smaller n or model"
        raise _failed(chapter, what) from error
    except RuntimeError as error:
        if not str(error).startswith("Kernel di"):  # it died, or it did not respond
            raise
        what = f"its kernel did not start ({error}): {sys.executable} -m ipykernel_launcher says why"
        raise _failed(chapter, what) from error
    finally:
        with contextlib.suppress(ValueError):  # there may be nothing yet
            for line in _warnings(stored.read(target)):
                warn(line)
    executed = nbformat.read(target, as_version=4)
    executed.metadata.papermill.duration = seconds
    return executed


def _own_kernel(scratch: Path) -> dict[str, str]:
    """Settings by which 'python3' is a kernel of this interpreter, whatever is installed under that name elsewhere.

    It ends with this process, and imports the package that this process has.
    """
    command = runs.bound("ipykernel_launcher", "-f", "{connection_file}")
    spec = {"argv": command, "display_name": "Python 3", "language": "python"}
    write(scratch / "jupyter" / "kernels" / "python3" / "kernel.json", json.dumps(spec), sync=False)
    path = os.pathsep.join([str(scratch / "jupyter"), *filter(None, [os.environ.get("JUPYTER_PATH")])])
    return {
        "JUPYTER_PATH": path,
        "JUPYTER_RUNTIME_DIR": str(scratch / "jupyter" / "runtime"),
        "PYTHONPATH": runs.python_path(),
    }


def _warnings(executed: nbformat.NotebookNode) -> list[str]:
    """What the package said on stderr in a notebook (`disk.warn`), which a stored notebook does not show."""
    said = []
    for cell in executed.cells:
        outputs = [output for output in cell.get("outputs", []) if output.output_type == "stream"]
        text = "".join(output.text for output in outputs if output.name == "stderr")
        said += re.findall(r"(?:^|[\r\n])kncore: ([^\r\n]+)", text)
    return said


def _failed(chapter: Chapter, what: str) -> RunError:
    print("failed", flush=True)
    return RunError(f"{chapter.path.name}, {what}\nThe stored notebook is as it was.")


def kernel_environment(scratch: Path, results: Path) -> dict[str, str]:
    """What a notebook's process gets on top of the caller's environment.

    A stored notebook must not depend on sample data that only some machines have, nor on the caller's settings of
    Matplotlib and IPython, whose kernels run a PYTHONSTARTUP file too. The number of threads is the caller's to choose.
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
        "PYTHONSTARTUP": "",
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


def move(source: Path, target: Path) -> None:
    """Every file below `source` into its place below `target`, each whole or not at all, across file systems too."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        place = target / path.relative_to(source)
        if place.is_file() and place.read_bytes() == path.read_bytes():
            continue
        write(place, path.read_bytes())
