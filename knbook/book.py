"""Render the book: a copy of all that it is made of, `jupyter-book build` run over it, pages in _build/html.

What the pages add to the stored notebooks is made by the Sphinx extension `knbook.sphinxext`, so that the plain tool
renders the same in a checkout. A copy can be computed anew, and belongs together. The tracked files are only read.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from bs4 import BeautifulSoup

from knbook import bound, provenance, runs, sphinxext
from knbook.checkout import COMPANION_MODELS, chapters, slug
from knbook.errors import RunError, UsageError
from knbook.kernel import EPOCH
from knbook.runner import TIMEOUT, keep_times
from kncore.store.disk import warn, write
from knpaper import stored
from knpaper.records import keep_dates, read_records

_NAME = re.compile(r"\w([\w .@+=,()~-]*[\w@+=)~-])?")
ATTEMPTS = 100  # to copy notebooks and records as they belong together


@runs.stoppable()
def book(root: Path, *, execute: bool = True, timeout: int = TIMEOUT) -> Path:
    """Render the book into _build/html and return its first page; with `execute` all notebooks are run before.

    A record that says what the tracked one says keeps that one's date; one that no notebook makes any more is left out.

    Raises UsageError where the book is made of something that cannot be read, and nothing has run then; RunError where
    a notebook fails or the build warns: the log is in _build/book.log and the pages that stood in _build/html stay.
    """
    target = root / "_build" / "html"
    runs.restore(target)
    with runs.scratch(root / "_build", "book") as own:
        try:
            staging = stage(root, folder=own / "staging")
            if execute:
                for name in {*COMPANION_MODELS, *(str(chapter.defaults.get("model")) for chapter in chapters(root))}:
                    shutil.rmtree(staging / "results" / slug(name), ignore_errors=True)
            try:
                read_records(staging / "results")
                provenance.check_notes(root / "results")
            except ValueError as error:
                raise UsageError(str(error).replace(str(staging), str(root))) from error
            if execute:
                _run_all(root, staging, timeout)
                keep_dates(staging / "results", root / "results")
                keep_times(staging / "results", root / "results")
            runs.exchange(_render(root, staging), target)
        finally:
            _leave(own, root / "_build")
    return target / "index.html"


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
        built = _render(root, stage(root, with_runs=False, folder=own / "staging"), "singlehtml")
        # Sphinx writes the page below book/, with pictures as from the top.
        page = write(built / "book.html", _on_paper((built / "book" / "index.html").read_text(encoding="utf-8")))
        printed = built / "book.pdf"
        command = [browser, "--headless", "--disable-gpu", "--no-sandbox", "--no-first-run", "--no-pdf-header-footer"]
        command += [f"--user-data-dir={own / 'profile'}", "--virtual-time-budget=60000", f"--print-to-pdf={printed}"]
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, check=False)
        if done.returncode or not printed.is_file():
            raise RunError(f"{browser} printed nothing: {done.stderr.strip()[-500:]}")
        os.replace(printed, target)
        _leave(own, root / "_build")
    return target


def _on_paper(page: str) -> str:
    """Return a page without links to what is not on it: they would lead to this machine."""
    soup = BeautifulSoup(page, "html.parser")
    for link in soup.find_all("a", href=True):
        address = urlsplit(link["href"])
        if address.scheme not in ("http", "https", "mailto"):
            link["href"] = f"#{address.fragment}"
            if not address.fragment:
                del link["href"]
    return str(soup)


def _render(root: Path, staging: Path, builder: str = "html") -> Path:
    """Return the folder with what Jupyter Book made of a staging folder; RunError holds the warnings."""
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


def _jobs(root: Path, staging: Path) -> dict[str, tuple[list[str], Path, int]]:
    """Return what is run to make the book: name: (arguments of `kncore run`, the folder of its notebooks, threads).

    The chapters on their own model in two jobs, those that attribute, which share scores, and the others; then a job
    for each model of `COMPANION_MODELS` that the book has runs of, with one thread.
    """
    cores = os.cpu_count() or 1
    halves = {"chapters that attribute": [], "the other chapters": []}
    for chapter in chapters(root):
        half = "chapters that attribute" if "quadrature" in chapter.defaults else "the other chapters"
        halves[half].append(chapter.number)
    jobs = {
        name: (["--only", ",".join(numbers)], staging / "notebooks", max(1, cores // 4))
        for name, numbers in halves.items()
        if numbers
    }
    for model in COMPANION_MODELS:
        folder = staging / "book" / "runs" / model
        if folder.is_dir():
            numbers = ",".join(sorted(path.name[:2] for path in folder.glob("*.ipynb")))
            jobs[model] = (["--model", model, "--only", numbers], folder, 1)
    return jobs


def _run_all(root: Path, staging: Path, timeout: int) -> None:
    """Run the jobs of the book, as many at once as there are cores, into the staging folder.

    Raises RunError where one fails; the others are stopped.
    """
    scratch = Path(tempfile.mkdtemp(dir=staging.parent, prefix="ran-"))
    running: list[subprocess.Popen] = []
    stopped = threading.Event()
    pool = ThreadPoolExecutor(os.cpu_count())

    def run(name: str, arguments: list[str], folder: Path, threads: int) -> tuple[str, Path, Path, int, list[str]]:
        out, said = scratch / name.replace(" ", "-"), []
        command = runs.bound("kncore", "run", *arguments, "--out", str(out), "--timeout", str(timeout))
        settings = {"OMP_NUM_THREADS": str(threads)} | os.environ | {"PYTHONPATH": runs.python_path()}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
        with (
            subprocess.Popen(command, cwd=root, env=settings, **streams) as process,
            Path(f"{out}.log").open("w", encoding="utf-8") as log,
        ):
            running.append(process)
            if stopped.is_set():
                process.terminate()
            for line in process.stdout:
                print(line, end="", file=log, flush=True)
                said.append(line.rstrip("\n"))
                if re.search(r" \d+ s$", said[-1]):
                    print(f"{name}: {said[-1]}", flush=True)
        return name, out, folder, process.returncode, said

    try:
        for done in as_completed([pool.submit(run, name, *job) for name, job in _jobs(root, staging).items()]):
            name, out, folder, code, said = done.result()
            for line in said[: -4 if code else None]:
                if line.startswith("kncore: "):
                    warn(line.removeprefix("kncore: "))
            if code:
                raise RunError("\n".join([f"{name}:", *said[-4:]]))
            shutil.copytree(out / "results", staging / "results", dirs_exist_ok=True)
            shutil.copytree(out, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("results"))
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        _end(running)
        pool.shutdown()
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
    """Return a copy of all that the book is made of, in `folder` (default: _build/staging, anew).

    That is configuration, contents, prose, notebooks and records, and those of runs on other models unless they are to
    be left out. Raises UsageError or ValueError for a file that cannot be read.
    """
    for path in [*root.glob("notebooks/*.ipynb"), *root.glob("book/runs/*/*.ipynb")]:
        stored.read(path)
        for name in (path.stem, path.parent.name):
            if not name.startswith(".") and (not _NAME.fullmatch(name) or "  " in name):
                raise UsageError(
                    f"{str(path)!r} cannot be a page of the book: {name!r} is no plain name; rename it (letters, "
                    "digits, single blanks and .@+=,()~-_ are plain), or delete it"
                )
    for path in [root / "_config.yml", *root.glob("book/*.md"), *root.glob("book/*.bib")]:
        _check_text(root, path)
    for page in sphinxext.pages_of(sphinxext.contents(root)):
        if not any((root / f"{page}{kind}").is_file() for kind in (".md", ".ipynb")):
            raise UsageError(f"_toc.yml names {page}, and there is no such .md or .ipynb; restore it, or take it out")
    staging = folder or root / "_build" / "staging"
    _copy(root, staging)
    if not with_runs:
        shutil.rmtree(staging / "book" / "runs", ignore_errors=True)
    return staging


def _check_text(root: Path, path: Path) -> None:
    """Raise UsageError where a file of the checkout is no text, or a configuration without names and values."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".yml" and not isinstance(yaml.safe_load(text), dict):
            raise ValueError("names with values are expected")
    except (OSError, ValueError, yaml.YAMLError) as error:
        why, name = " ".join(str(error).split()), path.relative_to(root).as_posix()
        raise UsageError(f"{path} cannot be read ({why}); restore it (git checkout -- {name})") from error


def _copy(root: Path, staging: Path) -> None:
    """Copy what is tracked; once more where a run was storing a notebook and its records at the same time."""
    hidden = shutil.ignore_patterns(".*", "*.tmp")
    for _ in range(ATTEMPTS):
        for journal in runs.journals(root / "results"):
            runs.settle(journal)
        before = _state(root)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for name in ("_config.yml", "_toc.yml", "LICENSE"):
            if (root / name).is_file():
                shutil.copy(root / name, staging)
        for folder in ("book", "notebooks", "results"):
            if (root / folder).is_dir():
                shutil.copytree(root / folder, staging / folder, ignore=hidden)
        if not runs.journals(root / "results") and _state(root) == before:
            return
    raise UsageError(f"the notebooks and records in {root} are being changed all the time; wait until that is done")


def _state(root: Path) -> dict[Path, tuple[int, int]]:
    """Return the size and time of change of all notebooks and records."""
    found = {}
    for top in ("notebooks", "book/runs", "results"):
        for path in (root / name for name in glob.glob(f"{top}/**", root_dir=root, recursive=True)):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                found[path] = (stat.st_size, stat.st_mtime_ns) if path.is_file() else (0, 0)
    return found
