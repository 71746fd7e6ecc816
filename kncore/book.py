"""Render the book: a staging folder with all that it is made of, Jupyter Book run over it, pages in _build/html.

The tracked files are only read.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import nbformat
import yaml

from kncore import bound, door, looking, pages, runs, stored
from kncore.disk import warn
from kncore.figures import plain
from kncore.pipeline import (
    BESIDE,
    EPOCH,
    TIMEOUT,
    RunError,
    UsageError,
    chapters,
    compares,
    keep_times,
    move,
    slug,
    write,
)

_NAME = re.compile(r"\w([\w .@+=,()~-]*[\w@+=)~-])?")
ATTEMPTS = 100  # to copy notebooks and records as they belong together


@runs.stoppable()
def book(root: Path, *, execute: bool = True, timeout: int = TIMEOUT) -> Path:
    """Render the book into _build/html from a staging folder; with `execute` the notebooks are run there first.

    So are those of the models that are trained here (`BESIDE`), several at once. The tracked files are only read. A
    record that says what the tracked one says keeps that one's date; one of these models that no notebook makes any
    more is left out.

    Raises UsageError where the book is made of something that cannot be read, and nothing has run then; RunError where
    a notebook fails or the build warns: the log is in _build/book.log and the pages that stood in _build/html stay.
    """
    target = root / "_build" / "html"
    runs.restore(target)
    with runs.scratch(root / "_build", "book") as own:
        try:
            staging = stage(root, folder=own / "staging")
            built = _book(root, staging, execute, timeout)
            runs.exchange(built, target)
        finally:
            _leave(own, root / "_build")
    return target / "index.html"


def _book(root: Path, staging: Path, execute: bool, timeout: int) -> Path:
    """The folder with the pages of a book that is staged."""
    from kncore import claims

    if execute:
        for name in {*BESIDE, *(str(chapter.defaults.get("model")) for chapter in chapters(root))}:
            shutil.rmtree(staging / "results" / slug(name), ignore_errors=True)
    try:
        claims.read(staging / "results")
        door.check_notes(root / "results")
    except ValueError as error:
        raise UsageError(str(error).replace(str(staging), str(root))) from error
    if execute:
        _run_all(root, staging, timeout)
        claims.keep_dates(staging / "results", root / "results")
        keep_times(staging / "results", root / "results")
    pages.generate(staging)
    whole = {path: path.read_bytes() for path in staging.rglob("[0-9][0-9]-*.ipynb")}
    site = door.take_away(root, staging)
    _set_beside(staging)
    look_closer(staging)
    door.close(root, staging)

    built = _render(root, staging)
    for path, notebook in whole.items():  # for download: as it was run, with the outputs that the page shows otherwise
        if (source := built / "_sources" / path.relative_to(staging)).exists():
            source.write_bytes(notebook)
    shutil.copytree(site, built, dirs_exist_ok=True)
    finish(built)
    return built


def _leave(own: Path, build: Path) -> None:
    """Put what the book was made of, and the logs of that, where they can be looked at: the last book's are there."""
    for log in own.glob("*.log"):
        os.replace(log, build / log.name)
    if (own / "staging").is_dir():
        runs.exchange(own / "staging", build / "staging")


@runs.stoppable()
def pdf(root: Path) -> Path:
    """Print the book into _build/book.pdf, from the stored notebooks, without the runs on other models.

    Raises UsageError where there is no Chromium to print with, RunError where nothing came of it.
    """
    own = os.environ.get("KNCORE_CHROMIUM")
    names = (own,) if own else ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        raise UsageError(f"the PDF is printed by a browser, and none of {', '.join(names)} is installed")
    target = root / "_build" / "book.pdf"
    with runs.scratch(root / "_build", "book") as own:
        staging = stage(root, with_runs=False, folder=own / "staging")
        pages.generate(staging)
        door.close(root, staging)
        built = _render(root, staging, "singlehtml")
        # Sphinx writes the page below book/, with pictures as from the top. A link to what is not on the page would
        # lead to this machine.
        text = (built / "book" / "index.html").read_text(encoding="utf-8")
        text = re.sub(r'(<a [^>]*)href="(?!https?:|mailto:|#)[^"#]*(#[^"]*)?"', r'\1href="\2"', text)
        page = write(built / "book.html", re.sub(r'(<a [^>]*)href=""', r"\1", text))
        printed = built / "book.pdf"
        command = [browser, "--headless", "--disable-gpu", "--no-sandbox", "--no-first-run", "--no-pdf-header-footer"]
        command += [f"--user-data-dir={own / 'profile'}", "--virtual-time-budget=60000", f"--print-to-pdf={printed}"]
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, check=False)
        if done.returncode or not printed.is_file():
            raise RunError(f"{browser} printed nothing: {done.stderr.strip()[-500:]}")
        os.replace(printed, target)
        _leave(own, root / "_build")
    return target


def _render(root: Path, staging: Path, builder: str = "html") -> Path:
    """The folder with what Jupyter Book made of a staging folder; RunError holds the warnings."""
    print("rendering ...", end=" ", flush=True)
    begun = time.monotonic()
    log = staging.parent / "book.log"
    command = runs.bound("jupyter_book.cli.main:main", "build")
    # Pages of the site have links to runs that the printed book leaves out.
    strict = ["-n", "-W", "--keep-going"] if builder == "html" else []
    command += [*strict, "--all", "--builder", builder, str(staging)]
    environment = os.environ | {"SOURCE_DATE_EPOCH": EPOCH, "PYTHONHASHSEED": "0", "PYTHONPATH": runs.python_path()}
    with log.open("w", encoding="utf-8") as stream:
        code = subprocess.run(command, stdout=stream, stderr=stream, env=environment, check=False).returncode
    built = staging / "_build" / builder
    if code or not (built / "index.html").exists():
        print("failed", flush=True)
        lines = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace")).splitlines()
        marked = [line for line in lines if "WARNING" in line or "ERROR" in line] or lines[-20:]
        raise RunError("\n".join([*marked, f"The book did not build; the whole log is {root / '_build' / log.name}"]))
    print(f"{time.monotonic() - begun:.0f} s", flush=True)
    return built


def finish(html: Path) -> None:
    """Put into the pages below `html` what Sphinx and the theme leave out.

    The size of every SVG picture, so that a browser keeps its place free; a name for every toggle of the contents;
    the role that entries of a list of references have today; no header cell without a header, no list of definitions
    without a term, which is how Sphinx parts the lines of a signature.
    """
    sizes: dict[Path, str] = {}

    def sized(match: re.Match, page: Path) -> str:
        picture = page.parent / match[1]
        if " width=" in match[0] or " height=" in match[0] or not picture.is_file():
            return match[0]
        if picture not in sizes:
            head = picture.read_text(encoding="utf-8").partition("<svg")[2].partition(">")[0]
            told = [re.search(rf'\b{name}="([\d.]+)(pt|px|)"', head) for name in ("width", "height")]
            if None in told:
                raise RunError(f'{picture} has no width="…" and height="…" in pt or px on its <svg>: give it both')
            pixels = [round(float(size[1]) * (4 / 3 if size[2] == "pt" else 1)) for size in told]
            sizes[picture] = 'width="{}" height="{}" '.format(*pixels)
        return match[0].replace("<img ", f"<img {sizes[picture]}", 1)

    for page in html.rglob("*.html"):
        if "_static" in page.relative_to(html).parts:
            continue
        text = page.read_text(encoding="utf-8")
        text = re.sub(r'<img [^>]*src="([^":]+\.svg)"[^>]*>', functools.partial(sized, page=page), text)
        text = re.sub(
            r">([^<]+)</a><details([^>]*)><summary>", r'>\1</a><details\2><summary aria-label="Chapters: \1">', text
        )
        text = re.sub(r"<dl>\n((?:<dd>.*?</dd>\n?)+)</dl>", _lines, text, flags=re.DOTALL)
        text = text.replace('role="doc-biblioentry"', 'role="listitem"').replace("<th></th>", "<td></td>")
        page.write_text(text, encoding="utf-8")


def _lines(signature: re.Match) -> str:
    return f'<span class="sig-lines">{signature[1].replace("<dd>", "<span>").replace("</dd>", "</span>")}</span>'


def _jobs(root: Path, staging: Path) -> dict[str, tuple[list[str], Path, int]]:
    """What is run to make the book: name: (arguments of `kncore run`, the folder of its notebooks, threads).

    The chapters on their own model in two jobs, those that attribute, which share scores, and the others; then a job
    for each model of `BESIDE` that the book has runs of, with one thread.
    """
    cores = os.cpu_count() or 1
    halves = {"chapters that attribute": [], "the other chapters": []}
    for chapter in chapters(root):
        attributes = "kncore.attribute(" in chapter.path.read_text(encoding="utf-8")
        halves["chapters that attribute" if attributes and not compares(chapter) else "the other chapters"] += [chapter]
    jobs = {
        name: (["--only", ",".join(c.number for c in some)], staging / "notebooks", max(1, cores // 4))
        for name, some in halves.items()
        if some
    }
    for model in BESIDE:
        folder = staging / "book" / "runs" / model
        if folder.is_dir():
            numbers = ",".join(sorted(path.name[:2] for path in folder.glob("*.ipynb")))
            jobs[model] = (["--model", model, "--only", numbers], folder, 1)
    return jobs


def _run_all(root: Path, staging: Path, timeout: int) -> None:
    """Run the jobs of the book, as many at once as there are cores, into the staging folder.

    Raises RunError where one fails; the others are stopped.
    """
    waiting, running = _jobs(root, staging), {}
    jobs, told = dict(waiting), dict.fromkeys(waiting, 0)
    scratch = Path(tempfile.mkdtemp(dir=staging.parent, prefix="ran-"))
    out = {name: scratch / name.replace(" ", "-") for name in jobs}
    logs = {name: scratch / f"{out[name].name}.log" for name in jobs}
    environment = os.environ | {"PYTHONPATH": runs.python_path()}
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                name = next(iter(waiting))
                arguments, _, threads = waiting.pop(name)
                command = runs.bound("kncore", "run", *arguments, "--out", str(out[name]), "--timeout", str(timeout))
                with logs[name].open("w", encoding="utf-8") as log:
                    running[name] = subprocess.Popen(
                        command, cwd=root, env={"OMP_NUM_THREADS": str(threads)} | environment, stdout=log, stderr=log
                    )
            time.sleep(0.2)
            for name, process in list(running.items()):
                ended = process.poll()
                said = logs[name].read_text(encoding="utf-8", errors="replace")
                lines = said[: said.rfind("\n") + 1].splitlines()
                for line in lines[told[name] :]:
                    if re.search(r" \d+ s$", line):
                        print(f"{name}: {line}", flush=True)
                told[name] = len(lines)
                if ended is None:
                    continue
                del running[name]
                last = len(lines) - 4 if ended else len(lines)
                for line in lines[: max(0, last)]:
                    if line.startswith("kncore: "):
                        warn(line.removeprefix("kncore: "))
                if ended:
                    raise RunError("\n".join([f"{name}:", *said.strip().splitlines()[-4:]]))
                move(out[name] / "results", staging / "results")
                shutil.rmtree(out[name] / "results", ignore_errors=True)
                move(out[name], jobs[name][1])
                if jobs[name][1] != staging / "notebooks":
                    for path in jobs[name][1].glob("*.ipynb"):
                        _relink(path, staging / "notebooks")
    finally:
        _end(running.values())
        for log in scratch.glob("*.log"):
            os.replace(log, root / "_build" / log.name)
        shutil.rmtree(scratch, ignore_errors=True)


def _end(processes: Iterable[subprocess.Popen]) -> None:
    """End processes, which may end what they started; those that take too long for that are killed."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(bound.GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def stage(root: Path, *, with_runs: bool = True, folder: Path | None = None) -> Path:
    """A copy of all that the book is made of, in `folder` (default: _build/staging, anew), with a table of contents.

    That is configuration, prose, notebooks and records. Runs on other models in book/runs/ join the contents as a part
    of their own, or are left out.

    Raises UsageError or ValueError for a file that cannot be read.
    """
    for path in [*root.glob("notebooks/*.ipynb"), *root.glob("book/runs/*/*.ipynb")]:
        stored.read(path)
        _check_name(path)
    contents = _contents(root)
    staging = folder or root / "_build" / "staging"
    _copy(root, staging)
    if not with_runs:
        shutil.rmtree(staging / "book" / "runs", ignore_errors=True)
    found = sorted((staging / "book" / "runs").glob("*/*.ipynb"))
    for path in found:
        _relink(path, staging / "notebooks")
    parts = []
    for folder in dict.fromkeys(path.parent for path in found):
        write(folder / "index.md", _card(folder.name))
        files = [{"file": path.relative_to(staging).with_suffix("").as_posix()} for path in [*folder.glob("*.ipynb")]]
        files.sort(key=lambda entry: entry["file"])
        parts.append({"file": (folder / "index").relative_to(staging).as_posix(), "sections": files})
    if parts:
        contents["parts"].append({"caption": "The same on other models", "chapters": parts})
    write(staging / "_toc.yml", yaml.safe_dump(contents, sort_keys=False))
    return staging


def _check_name(path: Path) -> None:
    """Raises UsageError where the name of a notebook or of its folder cannot be that of a page, in links and files."""
    for name in (path.stem, path.parent.name):
        if not name.startswith(".") and (not _NAME.fullmatch(name) or "  " in name):
            raise UsageError(
                f"{str(path)!r} cannot be a page of the book: {name!r} is no plain name; rename it (letters, digits, "
                "single blanks and .@+=,()~-_ are plain), or delete it"
            )


def _copy(root: Path, staging: Path) -> None:
    """Copy what is tracked; once more where a run was storing a notebook and its records at the same time."""
    hidden = shutil.ignore_patterns(".*", "*.tmp")
    for _ in range(ATTEMPTS):
        for journal in runs.journals(root / "results"):
            runs.settle(journal)
        before = _state(root)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        shutil.copy(root / "_config.yml", staging)
        for folder in ("book", "notebooks", "results"):
            if (root / folder).is_dir():
                shutil.copytree(root / folder, staging / folder, ignore=hidden)
        if not runs.journals(root / "results") and _state(root) == before:
            return
    raise UsageError(f"the notebooks and records in {root} are being changed all the time; wait until that is done")


def _state(root: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of change of all notebooks and records."""
    found = {}
    for top in ("notebooks", "book/runs", "results"):
        for folder, folders, files in os.walk(root / top):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(folder, name) for name in files if not name.startswith(".")):
                with contextlib.suppress(FileNotFoundError):
                    told = path.stat()
                    found[path] = told.st_size, told.st_mtime_ns
    return found


def _read(root: Path, path: Path, parse: Callable[[str], object] = str) -> object:
    """What a file of the checkout says; UsageError where it cannot be read, or is no mapping where it is parsed."""
    restore = f"restore it (git checkout -- {path.relative_to(root).as_posix()})"
    try:
        told = parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read ({' '.join(str(error).split())}); {restore}") from error
    if parse is not str and not isinstance(told, dict):
        raise UsageError(f"{path} cannot be read (names with values are expected); {restore}")
    return told


def _contents(root: Path) -> dict:
    """What _toc.yml says; UsageError where it, the configuration, or a page cannot be read or is not there."""
    for path in [*root.glob("book/*.md"), *root.glob("book/*.bib")]:
        _read(root, path)
    _read(root, root / "_config.yml", yaml.safe_load)
    contents = _read(root, root / "_toc.yml", yaml.safe_load)
    try:
        named = list(pages.files(contents))
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{root / '_toc.yml'} has no root, or no parts with chapters, each with a file; restore it "
            "(git checkout -- _toc.yml)"
        ) from error
    for page in named:
        if not any((root / f"{page}{kind}").is_file() for kind in (".md", ".ipynb")):
            raise UsageError(f"_toc.yml names {page}, and there is no such .md or .ipynb; restore it, or take it out")
    return contents


def look_closer(staging: Path) -> None:
    """Move the specifications of interactive figures out of the staged outputs, below their cells, as HTML.

    Jupyter Book shows one form of an output, and that stays the picture. In a chapter the curves are those of all
    models that it was run on, in a run of its own model.
    """
    for path in sorted((staging / "notebooks").glob("*.ipynb")):
        runs = sorted((staging / "book" / "runs").glob(f"*/{path.name}"))
        found = [_take_specs(run) for run in runs]
        _take_specs(path, found)


def _take_specs(path: Path, runs: Sequence[Sequence[dict]] = ()) -> list[dict]:
    """The specifications of a notebook's figures, which are moved below their cells; curves joined with those of runs.

    The same figure has the same place among them: the cells of a chapter and of its runs are the same.
    """
    nb, cells, specs = nbformat.read(path, as_version=4), [], []
    for cell in nb.cells:
        cells.append(cell)
        pictures = [output for output in cell.get("outputs", []) if "image/svg+xml" in output.get("data", {})]
        for place, output in enumerate(pictures):
            if looking.MIME not in output.data:
                continue
            spec = output.data.pop(looking.MIME)
            others = [run[len(specs)] for run in runs if len(run) > len(specs)]
            specs.append(spec)
            html = looking.markup(looking.combine(spec, others), place)
            cells.append(nbformat.v4.new_markdown_cell(f"```{{raw}} html\n{html}\n```", id=f"{cell.id}-look-{place}"))
    if specs:
        nb.cells = cells
        write(path, stored.dumps(nb))
    return specs


def _card(model: str) -> str:
    """The page of a model that the chapters were run on: its card, where it comes with the package."""
    from kncore.models import SHIPPED

    card = SHIPPED / model / "README.md"
    if not card.is_file():
        return f"# {plain(model)}\n\nThe chapters of this book, run on this model.\n"
    title, _, rest = card.read_text(encoding="utf-8").partition("\n")
    return f"{title}\n\nThe chapters of this book, run on a model of our own. Its card:\n{rest}"


def _set_beside(staging: Path) -> None:
    """Below each figure of a chapter put the same figure of the runs on other models, a closed box with a tab for each.

    Two figures are the same if their captions are.
    """
    for chapter in sorted((staging / "notebooks").glob("*.ipynb")):
        found = (staging / "book" / "runs").glob("*/*.ipynb")
        runs = sorted((p for p in found if p.name == chapter.name), key=lambda run: _place(run.parent.name))
        others = {run.parent: _figures(stored.read(run)) for run in runs}
        nb = nbformat.read(chapter, as_version=4)
        cells = []
        for cell in nb.cells:
            cells.append(cell)
            told = _caption(cell)
            tabs = []
            for number, (folder, figures) in enumerate(others.items()):
                if told in figures:
                    # Without blanks, which the name of a folder may have and that of a picture may not.
                    name = re.sub(r"[^\w.@+-]+", "-", f"{folder.name}-{chapter.name[:2]}-{len(cells):02d}.svg")
                    picture = write(staging / "book" / "beside" / str(number) / name, figures[told])
                    alt = " ".join(cell.metadata.mystnb.get("image", {}).get("alt", "").split())
                    tabs += [
                        f"````{{tab-item}} {plain(folder.name)}",
                        f":sync: {folder.name}",
                        "",
                        f"```{{image}} {os.path.relpath(picture, chapter.parent)}",
                    ]
                    tabs += [f":alt: {alt or told} On {folder.name}.", ":width: 100%", ":loading: lazy", "```"]
                    page = pages.link(os.path.relpath(folder / chapter.name, chapter.parent))
                    tabs += [f"[The whole chapter on {plain(folder.name)}]({page})", "````"]
            if tabs:
                opened = ["``````{dropdown} This figure on other models", ":class-container: beside", "`````{tab-set}"]
                cells.append(nbformat.v4.new_markdown_cell("\n".join([*opened, *tabs, "`````", "``````"])))
        nb.cells = cells
        write(chapter, stored.dumps(stored.finalise(nb)))


def _place(model: str) -> tuple[int, str]:
    return (BESIDE.index(model) if model in BESIDE else len(BESIDE), model)


def _caption(cell: nbformat.NotebookNode) -> str | None:
    return cell.metadata.get("mystnb", {}).get("figure", {}).get("caption")


def _figures(nb: nbformat.NotebookNode) -> dict[str, str]:
    """The captioned vector graphics of a notebook."""
    drawn = {}
    for cell in nb.cells:
        for output in cell.get("outputs", ()):
            if _caption(cell) and "image/svg+xml" in output.get("data", {}):
                drawn[_caption(cell)] = output.data["image/svg+xml"]
    return drawn


def _relink(run: Path, notebooks: Path) -> None:
    """Make the relative links of a run, which were written in notebooks/, lead where they lead from there.

    Labels are left to the chapter: two pages cannot have the same one.
    """

    def target(match: re.Match) -> str:
        here, there = run.parent / match[0], notebooks / match[0]
        moved = not here.exists() and there.exists()
        return Path(os.path.relpath(there, run.parent)).as_posix() if moved else match[0]

    nb = stored.read(run)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"(?<=\]\()[^)\s:#]+", target, cell.source)
            cell.source = re.sub(r"^\([\w-]+\)=\n", "", cell.source, flags=re.MULTILINE)
    write(run, stored.dumps(nb))
