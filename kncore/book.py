"""Render the book: a staging folder with all that it is made of, Jupyter Book run over it, pages in _build/html.

The tracked files are only read.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
import yaml

from kncore import looking, pages, stored
from kncore.pipeline import BESIDE, EPOCH, TIMEOUT, RunError, chapters, move, run, slug, write


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
    pages.generate(staging)
    whole = {path: path.read_bytes() for path in staging.rglob("[0-9][0-9]-*.ipynb")}
    look_closer(staging)

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
    for path, notebook in whole.items():  # for download: as it was run, with the outputs that the page shows otherwise
        if (source := built / "_sources" / path.relative_to(staging)).exists():
            source.write_bytes(notebook)
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
                move(here / "results", staging / "results")
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
        return f"# {model}\n\nThe chapters of this book, run on this model.\n"
    title, _, rest = card.read_text(encoding="utf-8").partition("\n")
    return f"{title}\n\nThe chapters of this book, run on a model of our own. Its card:\n{rest}"


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
