"""From notebooks to pages: run them in a scratch folder, store what succeeded, render the book from a staging folder.

A checkout holds notebooks/NN-*.ipynb (one chapter each), results/ (one record per claim and model) and book/ (prose).
Nothing here writes into a tracked folder before a run has succeeded.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat
import yaml

from kncore import stored

EPOCH = "1714694400"  # the day the paper appeared; figures and pages carry it instead of the time of the run
TIMEOUT = 3600
BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"
BESIDE = (
    "controlled-gpt2",
    "controlled-llama",
    "controlled-bert",
    "minilm-mlm",
)  # models that `book` runs beside the notebooks' own
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
    """The notebooks notebooks/NN-*.ipynb in order, or those named by number, name or file name in `only`.

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
    cells = nbformat.read(path, as_version=4).cells
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
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"-p {pair}: {text!r} is no YAML scalar") from error
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


def slug(model: str) -> str:
    """A model's name as a folder name: the last part of a local path, `owner--name` for a hub model."""
    return Path(model).resolve().name if Path(model).is_dir() else model.strip("/").replace("/", "--")


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
        UsageError: an unknown chapter or parameter; nothing has run then.
        RunError: a cell failed or took longer than `timeout` seconds; what was stored before stays as it was.
    """
    selected = chapters(root, only)
    given = dict(parameters or {})
    if model is not None:
        if given.get("model", model) != model:
            raise UsageError(f"--model {model} and -p model={given['model']} disagree")
        given["model"] = model
    names = {}
    if isinstance(given.get("model"), str) and Path(given["model"]).is_dir():
        names[str(Path(given["model"]).resolve())] = slug(given["model"])
        given["model"] = str(Path(given["model"]).resolve())
    if model is not None and out is None:
        selected = [chapter for chapter in selected if not _compares(chapter)]
    for chapter in selected:
        check_parameters(chapter, _given(chapter, given))

    written = []
    for chapter in selected:
        mine = _given(chapter, given)
        changed = {name: value for name, value in mine.items() if value != chapter.defaults[name]}
        folder, records = _destination(root, chapter, changed, out, results)
        (root / "_build").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="run-", dir=root / "_build") as scratch:
            executed = _execute(chapter, changed, Path(scratch), records, timeout)
            _drop_copies(Path(scratch) / "results", Path(scratch) / "before")
            places = {scratch: ".", str(root): ".", str(Path.home()): "~", **names}
            notebook = stored.finalise(executed, places)
            _move(Path(scratch) / "results", records)
            written.append(write(folder / chapter.path.name, stored.dumps(notebook)))
        for problem in stored.problems(notebook):
            print(f"  note: {chapter.path.name}: {problem}", file=sys.stderr)
    return written


def _compares(chapter: Chapter) -> bool:
    """Whether a chapter sets models side by side (its parameter is `models`), and so has no run of its own for each."""
    return "models" in chapter.defaults and "model" not in chapter.defaults


def _given(chapter: Chapter, given: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The parameters as the chapter names them: one that compares models is given the only one."""
    return {"models" if name == "model" and _compares(chapter) else name: value for name, value in given.items()}


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
            shutil.copytree(records, scratch / copy)
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
                extra_arguments=["--log-level=ERROR"],
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


def write(path: Path, text: str) -> Path:
    """Write text whole or not at all; the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _drop_copies(results: Path, before: Path) -> None:
    """Leave only what a run wrote: what it was given would overwrite records that another run made in the meantime."""
    for path in [path for path in results.rglob("*") if path.is_file()]:
        old = before / path.relative_to(results)
        if old.is_file() and old.read_bytes() == path.read_bytes():
            path.unlink()


def _move(source: Path, target: Path) -> None:
    """Every file below `source` into its place below `target`, each whole or not at all, across file systems too."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        place = target / path.relative_to(source)
        if place.is_file() and place.read_bytes() == path.read_bytes():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = place.with_name(f".{place.name}.tmp")
        shutil.copyfile(path, beside)
        os.replace(beside, place)


# ------------------------------------------------------------------------------------------------ the book


def book(root: Path, *, execute: bool = True, timeout: int = TIMEOUT) -> Path:
    """Render the book into _build/html from a staging folder; with `execute` the notebooks are run there first.

    So are, several at once, those of the models that are trained here (`BESIDE`). The tracked files are only read. A
    record that says what the tracked one says keeps that one's date; one of these models that no notebook makes any
    more is left out. Raises RunError where a notebook fails or the build warns; the log is in _build/book.log and the
    pages that stood in _build/html before stay.
    """
    staging = stage(root)
    if execute:
        from kncore import claims

        for name in {*BESIDE, *(str(chapter.defaults.get("model")) for chapter in chapters(root))}:
            shutil.rmtree(staging / "results" / slug(name), ignore_errors=True)
        run(root, out=staging / "notebooks", results=staging / "results", timeout=timeout)
        _run_beside(root, staging, timeout)
        claims.keep_dates(staging / "results", root / "results")
    generate(staging)

    print("rendering ...", end=" ", flush=True)
    begun = time.monotonic()
    log = root / "_build" / "book.log"
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build"]
    command += ["-n", "-W", "--keep-going", "--all", str(staging)]
    environment = os.environ | {"SOURCE_DATE_EPOCH": EPOCH, "PYTHONHASHSEED": "0"}
    with log.open("w", encoding="utf-8") as stream:
        code = subprocess.run(command, stdout=stream, stderr=stream, env=environment, check=False).returncode
    built = staging / "_build" / "html"
    if code or not (built / "index.html").exists():
        print("failed", flush=True)
        lines = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace")).splitlines()
        marked = [line for line in lines if "WARNING" in line or "ERROR" in line] or lines[-20:]
        raise RunError("\n".join([*marked, f"The book did not build; the whole log is {log}"]))
    target, old = root / "_build" / "html", root / "_build" / "html.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(built, target)
    shutil.rmtree(old, ignore_errors=True)
    print(f"{time.monotonic() - begun:.0f} s", flush=True)
    return target / "index.html"


def _run_beside(root: Path, staging: Path, timeout: int) -> None:
    """Run again those chapters on the models of `BESIDE` that the book has, one process for each, with one thread.

    Raises RunError where one fails; the others are stopped.
    """
    waiting = [name for name in BESIDE if (staging / "book" / "runs" / name).is_dir()]
    running: dict[str, subprocess.Popen] = {}
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                name = waiting.pop(0)
                numbers = ",".join(sorted(path.name[:2] for path in (staging / "book" / "runs" / name).glob("*.ipynb")))
                print(f"{name}, chapters {numbers} ...", flush=True)
                command = [sys.executable, "-m", "kncore", "run", "--model", name, "--only", numbers]
                command += ["--out", str(staging / "book" / "runs" / name), "--timeout", str(timeout)]
                with (root / "_build" / f"{name}.log").open("w", encoding="utf-8") as log:
                    running[name] = subprocess.Popen(
                        command, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
                    )
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if running.pop(name).returncode:
                    said = (root / "_build" / f"{name}.log").read_text(encoding="utf-8").strip().splitlines()
                    raise RunError("\n".join([f"{name}:", *said[-4:]]))
                here = staging / "book" / "runs" / name
                _move(here / "results", staging / "results")
                shutil.rmtree(here / "results")
                for path in here.glob("*.ipynb"):
                    _relink(path, staging / "notebooks")
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.kill()


def stage(root: Path) -> Path:
    """A fresh _build/staging with a copy of all that the book is made of: configuration, prose, notebooks, records.

    Runs on other models in book/runs/ join the contents as a part of their own.
    """
    staging = root / "_build" / "staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    shutil.copy(root / "_config.yml", staging)
    hidden = shutil.ignore_patterns(".*", "*.tmp")
    for folder in ("book", "notebooks", "results"):
        if (root / folder).is_dir():
            shutil.copytree(root / folder, staging / folder, ignore=hidden)
    contents = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    runs = sorted((staging / "book" / "runs").glob("*/*.ipynb"))
    for path in runs:
        _relink(path, staging / "notebooks")
    parts = []
    for folder in dict.fromkeys(path.parent for path in runs):
        write(folder / "index.md", _card(folder.name))
        files = [{"file": path.relative_to(staging).with_suffix("").as_posix()} for path in [*folder.glob("*.ipynb")]]
        files.sort(key=lambda entry: entry["file"])
        parts.append({"file": (folder / "index").relative_to(staging).as_posix(), "sections": files})
    if parts:
        contents["parts"].append({"caption": "The same on other models", "chapters": parts})
    write(staging / "_toc.yml", yaml.safe_dump(contents, sort_keys=False))
    return staging


def _card(model: str) -> str:
    """The page of a model that the chapters were run on: its card, where it comes with the package."""
    from kncore.models import SHIPPED

    card = SHIPPED / model / "README.md"
    if not card.is_file():
        return f"# {model}\n\nThe chapters of this book, run on this model.\n"
    title, _, rest = card.read_text(encoding="utf-8").partition("\n")
    return f"{title}\n\nThe chapters of this book, run on a model of our own. Its card:\n{rest}"


def _files(entries: Sequence[Mapping]) -> Iterator[str]:
    """The pages of a part of the contents, with those below them."""
    for entry in entries:
        yield entry["file"]
        yield from _files(entry.get("sections", ()))


def _relink(run: Path, notebooks: Path) -> None:
    """Make the relative links of a run, which were written in notebooks/, lead where they lead from there.

    Labels are left to the chapter: two pages cannot have the same one.
    """

    def target(match: re.Match) -> str:
        here, there = run.parent / match[0], notebooks / match[0]
        moved = not here.exists() and there.exists()
        return Path(os.path.relpath(there, run.parent)).as_posix() if moved else match[0]

    nb = nbformat.read(run, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"(?<=\]\()[^)\s:#]+", target, cell.source)
            cell.source = re.sub(r"^\([\w-]+\)=\n", "", cell.source, flags=re.MULTILINE)
    write(run, stored.dumps(nb))


# -------------------------------------------------------------------------------------------------- claims


def generate(staging: Path) -> None:
    """Write what the pages of book/ include from book/generated/."""
    folder = staging / "book" / "generated"
    write(folder / "claims.md", claims_table(staging / "results", beside=False))
    write(folder / "matrix.md", claims_matrix(staging))
    write(folder / "provenance.md", provenance(staging / "results"))
    write(folder / "hub.md", not_run(staging / "results"))
    write(folder / "corpus.md", corpus_table())


def claims_table(results: Path, beside: bool = True) -> str:
    """The claims and their verdicts as a Markdown table, made from the records below `results`.

    Without `beside`, the models of `BESIDE` are left out wherever another model has a record of the claim.
    """
    from kncore import claims

    frame = claims.table(results)
    if not beside:
        frame = frame[
            ~frame.model.isin(BESIDE) | frame.groupby("claim").model.transform(lambda m: m.isin(BESIDE).all())
        ]
    rows = [[str(column) for column in frame.columns], ["---"] * len(frame.columns)]
    rows += [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def claims_matrix(staging: Path) -> str:
    """All declared claims × the notebooks' own model and all others with a record, as Markdown for a page in book/.

    A cell holds the verdict, linked to the page of the chapter on that model where the book has one, the effect with
    its interval, n, and what makes the record stale.
    """
    from kncore import claims

    records = {(told["claim"], told["model"]): told for told in claims.read(staging / "results")}
    found = {chapter.number: chapter for chapter in chapters(staging)}
    contents = yaml.safe_load((staging / "_toc.yml").read_text(encoding="utf-8"))
    pages = {page for part in contents["parts"] for page in _files(part["chapters"])}
    own = {str(chapter.defaults["model"]) for chapter in found.values() if "model" in chapter.defaults}
    models = [*sorted(own), *sorted({model for _, model in records} - own)]

    def linked(word: str, number: str, model: str | None = None) -> str:
        if number not in found:
            return word
        name, default = found[number].path.stem, found[number].defaults.get("model")
        here = model in (None, default) or _compares(found[number])
        page = f"notebooks/{name}" if here else f"book/runs/{slug(model)}/{name}"
        return f"[{word}]({Path(os.path.relpath(page, 'book')).as_posix()}.ipynb)" if page in pages else word

    def cell(claim: claims.Claim, model: str) -> list[str]:
        told = records.get((claim.id, model))
        if told is None:
            return ["[not run]{.not-run}"]
        verdict, reasons = told["verdict"], claims.stale(told)
        said = [f"[{linked(verdict, claim.chapter, model)}]{{.{verdict}{' .outdated' * bool(reasons)}}}"]
        said += [f"[{_text(claims.effect(told))}]{{.effect}}", f"n = {told['n']}"]
        return said + [f"[stale: {_text('; '.join(reasons))}]{{.stale}}"] * bool(reasons)

    rows = [["Claim", *map(_code, models)]]
    for claim in claims.CLAIMS.values():
        chapter = linked(f"Chapter {claim.chapter}", claim.chapter)
        told = [_text(claim.statement), f"[{chapter}, {_code(claim.id)}: {_text(claim.metric)}]{{.metric}}"]
        rows.append([told, *(cell(claim, model) for model in models)])
    return _list_table(rows, "matrix", stub=True)


def not_run(results: Path) -> str:
    """The hub models of the registry that have no record, as Markdown: each with the command that runs the chapters."""
    from kncore import claims, models

    ran = {told["model"] for told in claims.read(results)}
    rows = [["Model", "Revision", "Not run here; this runs it"]]
    for name, entry in models.REGISTRY.items():
        if isinstance(entry, models.Hub) and name not in ran:
            command = f"python -m kncore run --model {name}"
            rows.append([_code(name), _code(entry.revision[:8]), _code(command)])
    return _list_table(rows, "hub") if rows[1:] else "All have been run.\n"


@functools.cache
def corpus_table() -> str:
    """What the controlled corpus holds, counted, as Markdown."""
    from kncore import corpus

    words = [corpus.split(text) for text, _ in corpus.sentences()]
    pairs, world = corpus.pairs(), corpus.world()
    groups = [(f"capitals, {group}", told) for group, told in world.capital.items()]
    groups += [(f"fields, {group}", told) for group, told in world.field.items()]
    rows = [["Of", "How many"], ["sentences", len(words)], ["words and marks", sum(map(len, words))]]
    rows += [["different ones", len({word for some in words for word in some})]]
    rows += [["pairs of demonstrative and noun", len(pairs)], ["occurrences of them", sum(p.count for p in pairs)]]
    rows += [["pairs held out, of real nouns", sum(p.held_out for p in pairs if p.kind != "invented")]]
    rows += [[f"invented facts: {name.replace('_', ' ')}", len(told.pairs)] for name, told in groups]
    rows += [["times that each of them is stated from a side", corpus.TIMES]]
    return _list_table([[name, n if isinstance(n, str) else f"{n:,}"] for name, n in rows], "corpus")


def provenance(results: Path) -> str:
    """What each record was made from, as Markdown: one row per record."""
    from kncore import claims

    rows = [["Claim", "Model", "Revision", "Source", "Seed", "n", "Code", "kncore", "Date"]]
    for told in claims.read(results):
        kncore = told.get("versions", {}).get("kncore", "")
        short = (str(told.get(name, ""))[:8] for name in ("revision", "code"))
        revision, code = (_code(text) if text else "" for text in short)
        plain = (told.get("source", ""), told.get("seed", ""), told["n"])
        rows.append([_code(told["claim"]), _code(told["model"]), revision, *map(_text, plain), code])
        rows[-1] += [_text(kncore), _text(told.get("date", "not recorded"))]
    return _list_table(rows, "provenance") if rows[1:] else "No claim has a record yet.\n"


def _list_table(rows: Sequence[Sequence[str | Sequence[str]]], kind: str, stub: bool = False) -> str:
    lines = ["```{list-table}", ":header-rows: 1", f":class: {kind}", *([":stub-columns: 1"] if stub else []), ""]
    for row in rows:
        for bullet, cell in zip(["* -", *["  -"] * (len(row) - 1)], row, strict=True):
            first, *rest = [cell] if isinstance(cell, str) else cell
            lines += [f"{bullet} {first}".rstrip(), *(line for text in rest for line in ("", f"    {text}"))]
    return "\n".join([*lines, "```"]) + "\n"


def readme(root: Path) -> str:
    """README.md with the table between its markers made anew from results/."""
    path = root / "README.md"
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UsageError(f"{path} must hold {BEGIN} and {END} once each, in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{claims_table(root / 'results', beside=False)}{END}{rest.split(END)[1]}"


def _cell(value: object) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _text(value: object) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(str(value).split()))


def _code(value: str) -> str:
    fence = "`" * (max(map(len, re.findall("`+", value)), default=0) + 1)
    return f"{fence} {' '.join(value.split())} {fence}"
