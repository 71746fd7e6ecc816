"""Provenance of each page: where its numbers come from, how to cite it, where to run it, what to download.

Nothing here is in a stored notebook: the Sphinx extension adds it to the pages, from the records, from what runs have
noted beside them, from the configuration and from git.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import re
import subprocess
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import pandas as pd
import yaml
from pybtex.database import BibliographyData, Entry, Person, parse_file

from knbook.checkout import is_checkout, is_comparison, slug, timing, timing_path
from knbook.pages import Book
from kncore.store.disk import write
from knpaper import claims, stored
from knpaper.records import package_version
from knpaper.resources import DATA

UNKNOWN = "not recorded"
SOURCES = {"own": "written for this book", "corpus": "the corpus of this book, whose every count is known"}
SOURCES |= {"public": "ParaRel, BLiMP and CounterFact"}
COLAB = "https://colab.research.google.com/github"
BRANCH = "colab"  # where the workflow `pages` puts what `install_cell` was added to
PAPER = "niu2024"
_FORMULA = re.compile(r"[\t\r\n]|[\s\x00-\x1f\u200b\ufeff]*[=+\-@\uff1d\uff0b\uff0d\uff20]")


@dataclass(frozen=True)
class BookInfo:
    """What all pages of a book share; addresses (without a slash at the end) and commit are "" where not known.

    `changed` says that the checkout differs from the commit.
    """

    title: str
    author: str
    year: str
    repository: str
    site: str
    commit: str
    changed: bool


def book_info(root: Path) -> BookInfo:
    """Return what _config.yml, the environment and git say of the book in a folder.

    The addresses are `$KNCORE_REPOSITORY` and `$KNCORE_SITE`, which the workflow that publishes the book sets, else
    `repository: url` and `html: baseurl` of _config.yml.
    """
    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8")) or {}
    repository = os.environ.get("KNCORE_REPOSITORY") or config.get("repository", {}).get("url") or ""
    site = os.environ.get("KNCORE_SITE") or config.get("html", {}).get("baseurl") or ""
    about = (str(config.get(name) or "") for name in ("title", "author", "copyright"))
    return BookInfo(*about, repository.removesuffix("/").removesuffix(".git"), site.removesuffix("/"), *commit(root))


def commit(root: Path) -> tuple[str, bool]:
    """Return the commit of a checkout and whether anything in it differs from that; ("", False) where git cannot say.

    A copy in `_build`, from which the book is rendered, is of the commit of the checkout around it.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if is_checkout(Path(git("rev-parse", "--show-toplevel"))):  # and not of other things around it
            return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        pass
    return "", False


def colab(repository: str, notebook: str) -> str:
    """Return the address that opens a notebook of the branch `BRANCH` in Colab; "" unless it is on GitHub."""
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", repository)
    return f"{COLAB}/{found[1]}/blob/{BRANCH}/{notebook}" if found else ""


def write_downloads(book: Book, info: BookInfo, site: Path) -> None:
    """Write into the rendered site what readers can download.

    That is records/ (of each chapter and of all, as JSON, exactly, and as CSV, in which no text is a formula),
    archives/ (for each notebook a ZIP file with it, its records, the data and the licence) and, where the repository is
    known, colab/ (each chapter with an install cell).
    """
    for number in ["", *book.chapters]:
        records = [record for record in book.records.values() if number in ("", _chapter(record))]
        if records:
            text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
            write(site / "records" / f"{number or 'all'}.json", text)
            write(site / "records" / f"{number or 'all'}.csv", to_csv(records))
    notebooks = [chapter.path for chapter in book.chapters.values()]
    for path in [*notebooks, *sorted((book.root / "book" / "runs").glob("*/*.ipynb"))]:
        if path.name[:2] in book.chapters:
            _archive(book.root, path.relative_to(book.root), site)
    if colab(info.repository, ""):
        for path in notebooks:
            nb = nbformat.read(path, as_version=4)
            nb.cells.insert(0, install_cell(info.repository, info.commit))
            write(site / "colab" / path.name, stored.dumps(nb))


def install_cell(repository: str, revision: str) -> nbformat.NotebookNode:
    """Return a cell that installs the package from a commit (the newest one for "") where it is missing."""
    at = f"@{revision}" if revision else ""
    source = f"""\
# Installs the package of this book where it is missing, as on Colab, with the default model; elsewhere does nothing.
import importlib.util

if importlib.util.find_spec("kncore") is None:
    %pip install --quiet "kncore @ git+{repository}{at}"
    !python -m kncore fetch"""
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["install"]})
    return nbformat.from_dict(cell | {"id": "install"})


def _chapter(record: Mapping) -> str:
    """Return the chapter in which the claim of a record stands today."""
    return claims.CLAIMS[record["claim"]].chapter


def to_csv(records: Iterable[Mapping]) -> str:
    """Return records as a table; an apostrophe stands before text that a spreadsheet would compute."""
    flat = {"parameters": json.dumps, "stale": "; ".join}
    rows = [{**record, **{name: to_text(record[name]) for name, to_text in flat.items()}} for record in records]
    frame = pd.json_normalize(rows).rename(columns=_no_formula).map(_no_formula)
    return frame.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)


def _no_formula(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def _archive(root: Path, notebook: Path, site: Path) -> None:
    number, data = notebook.name[:2], Path(str(DATA))
    files = {notebook.name: root / notebook, "LICENSE": root / "LICENSE"}
    files |= {f"records/{number}.{kind}": site / "records" / f"{number}.{kind}" for kind in ("csv", "json")}
    shipped = (path for path in data.rglob("*") if path.is_file() and not path.name.startswith("."))
    files |= {f"data/{path.relative_to(data).as_posix()}": path for path in shipped}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(files.items()):
            if path.is_file():
                # Without the time of a file, two renders give the same bytes.
                archive.writestr(zipfile.ZipInfo(name, (2024, 5, 3, 0, 0, 0)), path.read_bytes(), 8)
    write(site / "archives" / _archive_name(notebook), packed.getvalue())


def _archive_name(notebook: Path) -> str:
    model = "" if notebook.parts[0] == "notebooks" else f"-{notebook.parent.name}"
    return f"{notebook.stem}{model}.zip"


def origin(book: Book, info: BookInfo, page: str) -> dict[str, Any]:
    """Return what the template `origin.html` says of a chapter's page, or of a run of it on another model."""
    notebook = Path(f"{page}.ipynb")
    chapter = book.chapters[notebook.name[:2]]
    name = notebook.parent.name if notebook.parts[0] != "notebooks" else ""
    model = name or ("" if is_comparison(chapter) else slug(str(chapter.defaults.get("model", ""))))
    named = [(slug(column), r) for (_, column), r in book.records.items()]
    here = [r for column, r in named if _chapter(r) == chapter.number and model in ("", column)]
    ran = timing(timing_path(book.root / "results", chapter, name or None))

    # A chapter without claims has no record; those of its model say what the model was.
    alike = here or [r for column, r in named if column == model]
    sources = [r["source"] for r in here] or [chapter.defaults.get("source", "own")]
    seeds = [r["seed"] for r in here] or [chapter.defaults.get("seed", UNKNOWN)]
    versions = [r["versions"] for r in here] or [ran]
    packages = {p: sorted({v[p] for v in versions if p in v}) for p in ("kncore", "torch", "transformers")}
    dates = sorted(r.get("date", UNKNOWN) for r in here)
    stale = [r["stale"] for r in here if r["stale"]]

    downloads = [("notebook as it ran (.ipynb)", f"_sources/{notebook.as_posix()}")]
    if any(_chapter(r) == chapter.number for r in book.records.values()):
        downloads += [("its records on every model (.csv)", f"records/{chapter.number}.csv")]
        downloads += [("the same (.json)", f"records/{chapter.number}.json")]
    downloads += [("all of these with the data (.zip)", f"archives/{_archive_name(notebook)}")]
    return {
        "unknown": UNKNOWN,
        "info": info,
        "model": model,
        "models": list(dict.fromkeys((r["model"], r["revision"], r["dtype"]) for r in alike)),
        "sources": list(dict.fromkeys(SOURCES.get(source, source) for source in sources)),
        "seeds": list(dict.fromkeys(seeds)),
        "packages": [f"{package} {' and '.join(found)}" for package, found in packages.items() if found],
        "count": len(here),
        "dates": list(dict.fromkeys([*dates[:1], *dates[-1:]])),
        "stale": len(stale),
        "reasons": list(dict.fromkeys(reason for reasons in stale for reason in reasons)),
        "ran": ran,
        "up": "../" * (len(notebook.parts) - 1),
        "downloads": downloads,
        "colab": "" if name else colab(info.repository, notebook.name),
    }


def check_notes(results: Path) -> None:
    """Raise ValueError for the first note of a run below a folder of records that is none."""
    for path in sorted([*results.glob("[0-9][0-9].toml"), *results.glob("*/[0-9][0-9].toml")]):
        timing(path)


def bibtex(info: BookInfo, page: str, title: str) -> str:
    """Return the BibTeX entry of a page, or of the whole book for its first page."""
    parts, whole = Path(page).parts, page == "book/index"
    model = parts[2] if parts[:2] == ("book", "runs") else ""
    number = re.match(r"\d\d", parts[-1])
    key = ["kncore", *filter(None, [model]), *([] if whole else [number[0] if number else parts[-1]])]
    fields = {
        "title": f"{{{_tex(info.title if whole else title + f', run on {model}' * bool(model and number))}}}",
        "howpublished": "" if whole else f"In: {_tex(info.title)}",
        "year": info.year,
        "note": f"kncore {package_version()}" + f", commit {info.commit[:12]}" * bool(info.commit),
        "url": f"{info.site}/{quote(page)}.html" if info.site else info.repository,
    }
    fields = [(name, value) for name, value in fields.items() if value]
    entry = Entry("misc", fields, {"author": [Person(f"{{{_tex(info.author)}}}")]})
    return _entry(re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(key)), entry)


@functools.cache
def paper(references: Path) -> str:
    """Return the entry of the paper in the book's bibliography; "" where there is none."""
    entries = parse_file(references, "bibtex").entries if references.is_file() else {}
    return _entry(PAPER, entries[PAPER]) if PAPER in entries else ""


def _entry(key: str, entry: Entry) -> str:
    return BibliographyData({key: entry}).to_string("bibtex").strip()


def _tex(text: str) -> str:
    """Return text for a field of BibTeX, where braces have to pair off even when escaped: it goes without them."""
    return " ".join(re.sub(r"[{}\\]", "", stored.visible(text)).split())
