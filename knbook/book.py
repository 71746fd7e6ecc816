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
import time
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from bs4 import BeautifulSoup

from knbook import jobs, provenance, reuse, runs, sphinxext
from knbook.checkout import COMPANION_MODELS, chapters, slug
from knbook.errors import RunError, UsageError
from knbook.kernel import EPOCH
from knbook.runner import TIMEOUT, keep_times
from kncore.store.disk import write
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


def _jobs(root: Path, staging: Path, scratch: Path, timeout: int) -> dict[jobs.Job, tuple[Path, Path, Path | None]]:
    """Return what is run to make the book: each job with the folder it runs into, that of its notebook then, and the
    file in which such a run is kept, if it can be.

    That is each chapter on its own model, and each of which the book has a run on a model of `COMPANION_MODELS`.
    """
    found = {}
    for model in (None, *COMPANION_MODELS):
        folder = staging / "book" / "runs" / model if model else staging / "notebooks"
        for chapter in chapters(root):
            if (folder / chapter.path.name).is_file():
                out = scratch / str(len(found))
                options = ["--out", str(out), "--timeout", str(timeout), *(["--model", model] if model else [])]
                kept = reuse.place(chapter, {"model": model} if model else {})
                found[jobs.job(root, chapter, options, model)] = (out, folder, kept)
    return found


def _run_all(root: Path, staging: Path, timeout: int) -> None:
    """Run the jobs of the book, as many at once as there are cores, into the staging folder; a run that an earlier book
    has kept, of the same chapter with the same inputs, is taken instead.

    Raises RunError where one fails; the others are stopped.
    """
    scratch = Path(tempfile.mkdtemp(dir=staging.parent, prefix="ran-"))
    places = _jobs(root, staging, scratch, timeout)

    def publish(job: jobs.Job) -> None:
        out, folder, _ = places[job]
        if (out / "results").is_dir():
            shutil.copytree(out / "results", staging / "results", dirs_exist_ok=True)
        shutil.copytree(out, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("results"))

    def keep(job: jobs.Job) -> None:
        if kept := places[job][2]:
            reuse.keep(kept, places[job][0])
        publish(job)

    try:
        found = [job for job, (out, _, kept) in places.items() if kept and reuse.restore(kept, out)]
        for job in found:
            publish(job)
            print(f"{job.name}: kept from an earlier book", flush=True)
        left = [job for job in places if job not in found]
        if left:
            jobs.run_all(root, left, os.cpu_count() or 1, scratch, keep)
    finally:
        for log in scratch.glob("*.log"):
            os.replace(log, root / "_build" / log.name)
        shutil.rmtree(scratch, ignore_errors=True)


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
