"""The way out of each page: where its numbers come from, how to cite it, where to run it, what to take away.

Nothing here is in a stored notebook: it is added to the copies in the staging folder, from the records, from what
runs have left beside them (`pipeline.took`), from the configuration and from git.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import tomllib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import yaml

from kncore import stored
from kncore.pages import _code, _line, _list_table, _text, files
from kncore.pipeline import Chapter, chapters, compares, slug, took, write

UNKNOWN = "not recorded"
NOTED = {"seconds": int, "threads": str, "date": str, "kncore": str, "torch": str, "transformers": str}
SOURCES = {"own": "written for this book", "corpus": "the corpus of this book, whose every count is known"}
COLAB = "https://colab.research.google.com/github"
_FORMULA = re.compile(r"[\t\r\n]|[\s\x00-\x1f\u200b\ufeff]*[=+\-@\uff1d\uff0b\uff0d\uff20]")
BRANCH = "colab"  # where the workflow `pages` puts what `install_cell` was added to


# --------------------------------------------------------------------------------------------- what is known


@dataclass(frozen=True)
class Origin:
    """What all pages of a book share: its title, author and year, where it is on the web, and the commit.

    `repository` and `site` are addresses without a slash at the end, `commit` is a full hash; each is "" where it is
    not known. `changed` says that the checkout differs from the commit.
    """

    title: str
    author: str
    year: str
    repository: str
    site: str
    commit: str
    changed: bool


def origin(root: Path) -> Origin:
    """The origin of the pages rendered from a checkout: what _config.yml, the environment and git say.

    The addresses are `$KNCORE_REPOSITORY` and `$KNCORE_SITE`, which the workflow that publishes the book sets, else
    `repository: url` and `html: baseurl` of _config.yml.
    """
    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8")) or {}
    repository = os.environ.get("KNCORE_REPOSITORY") or config.get("repository", {}).get("url") or ""
    site = os.environ.get("KNCORE_SITE") or config.get("html", {}).get("baseurl") or ""
    about = (str(config.get(name) or "") for name in ("title", "author", "copyright"))
    addresses = repository.removesuffix("/").removesuffix(".git"), site.removesuffix("/")
    return Origin(*about, *addresses, *commit(root))


def commit(root: Path) -> tuple[str, bool]:
    """The commit of a checkout and whether anything in it differs from that; ("", False) where git cannot say."""
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return "", False

    def said(*words: str) -> str:
        command = [git, "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return said("rev-parse", "HEAD"), bool(said("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return "", False


def colab(repository: str, notebook: str) -> str:
    """The address that opens a notebook of the branch `BRANCH` in Colab; "" unless the repository is on GitHub."""
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", repository)
    return f"{COLAB}/{found[1]}/blob/{BRANCH}/{notebook}" if found else ""


# --------------------------------------------------------------------------------------- what is taken away


def take_away(root: Path, staging: Path) -> Path:
    """Write into <staging>/site what readers can take away, in the places that it has on the rendered site; the folder.

    `_sources` has each notebook as it ran, without what staging adds; `records` the records of each chapter and of
    all, on every model, as JSON, exactly, and as CSV, in which no text is a formula (see `_csv`); `archives` for each
    notebook a ZIP file with it, the records of its chapter, the data of the package and the licence; `colab`, where the
    repository is known, each chapter with an install cell.
    """
    site = staging / "site"
    found = {chapter.number: chapter for chapter in chapters(staging)}
    runs = sorted((staging / "book" / "runs").glob("*/*.ipynb"))
    everything = records(staging)
    for number in ["", *found]:
        told = [record for record in everything if number in ("", _chapter(record))]
        if not told:
            continue
        write(site / "records" / f"{number or 'all'}.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        write(site / "records" / f"{number or 'all'}.csv", _csv(told))
    for path in [*(chapter.path for chapter in found.values()), *runs]:
        place = path.relative_to(staging)
        (site / "_sources" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, site / "_sources" / place)
        if path.name[:2] in found:
            _archive(root, site, place)
    known = origin(root)
    if colab(known.repository, ""):
        for chapter in found.values():
            nb = nbformat.read(chapter.path, as_version=4)
            nb.cells.insert(0, install_cell(known.repository, known.commit))
            write(site / "colab" / chapter.path.name, stored.dumps(nb))
    return site


def install_cell(repository: str, revision: str) -> nbformat.NotebookNode:
    """A cell that installs the package from a commit of the repository (its newest one for "") where it is missing."""
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
    """The chapter in which the claim of a record stands today."""
    from kncore import claims

    return claims.CLAIMS[record["claim"]].chapter


def records(staging: Path) -> list[dict]:
    """All records of the staged book, each with `stale`: why it no longer stands."""
    from kncore import claims

    return [{**told, "stale": claims.stale(told)} for told in claims.read(staging / "results")]


def _csv(records: Sequence[Mapping]) -> str:
    """Records as a table, numbers as they are; an apostrophe stands before text that a spreadsheet would compute."""
    import pandas as pd

    rows = [
        {**record, "parameters": json.dumps(record["parameters"]), "stale": "; ".join(record["stale"])}
        for record in records
    ]
    table = pd.json_normalize(rows).rename(columns=_no_formula).map(_no_formula)
    return table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)


def _no_formula(cell: object) -> object:
    """A cell of a table; text that begins as a formula does, blanks aside, begins with an apostrophe instead."""
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def _archive(root: Path, site: Path, place: Path) -> None:
    from kncore.resources import DATA

    number, source = place.name[:2], Path(str(DATA))
    inside = {place.name: site / "_sources" / place, "LICENSE": root / "LICENSE"}
    inside |= {f"records/{number}.{kind}": site / "records" / f"{number}.{kind}" for kind in ("csv", "json")}
    data = (path for path in source.rglob("*") if path.is_file() and not path.name.startswith("."))
    inside |= {f"data/{path.relative_to(source).as_posix()}": path for path in data}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(inside):
            if inside[name].is_file():
                # Without the time of a file, two renders give the same bytes.
                archive.writestr(zipfile.ZipInfo(name, (2024, 5, 3, 0, 0, 0)), inside[name].read_bytes(), 8)
    target = site / "archives" / _archive_name(place)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(packed.getvalue())


def _archive_name(place: Path) -> str:
    model = "" if place.parts[0] == "notebooks" else f"-{place.parent.name}"
    return f"{place.stem}{model}.zip"


# ----------------------------------------------------------------------------------------- the end of a page


def close(root: Path, staging: Path) -> None:
    """Add to each page of the staged contents how to cite it and, to a notebook, where it comes from."""
    contents = yaml.safe_load((staging / "_toc.yml").read_text(encoding="utf-8"))
    found = {chapter.number: chapter for chapter in chapters(staging)}
    known, told = origin(root), records(staging)
    for page in files(contents):
        notebook, prose = staging / f"{page}.ipynb", staging / f"{page}.md"
        if notebook.is_file():
            nb = nbformat.read(notebook, as_version=4)
            title = _title(cell.source for cell in nb.cells if cell.cell_type == "markdown")
            source = citation(known, staging, page, title)
            if chapter := found.get(notebook.name[:2]):
                source = provenance(known, staging, told, chapter, Path(f"{page}.ipynb")) + "\n" + source
            nb.cells.append(nbformat.v4.new_markdown_cell(source))
            write(notebook, stored.dumps(stored.finalise(nb)))
        elif prose.is_file():
            text = prose.read_text(encoding="utf-8")
            write(prose, f"{text.rstrip()}\n\n{citation(known, staging, page, _title([text]))}")


def provenance(known: Origin, staging: Path, everything: Sequence[Mapping], chapter: Chapter, place: Path) -> str:
    """Where the numbers of a chapter's page come from and what can be taken away, as Markdown.

    `everything` is what `records` says; `place` is the page's notebook below `staging`: in notebooks/, or in
    book/runs/<model>/ for a run on another model.
    """
    name = place.parent.name if place.parts[0] != "notebooks" else ""
    mine = name or ("" if compares(chapter) else slug(str(chapter.defaults.get("model", ""))))
    told = [r for r in everything if _chapter(r) == chapter.number and mine in ("", slug(r["model"]))]
    ran = note(took(staging / "results", chapter, {"model": name} if name else None))

    # A chapter without claims has no record; those of its model say what the model was.
    alike = told or [r for r in everything if slug(r["model"]) == mine]
    models = dict.fromkeys((r["model"], r["revision"], r["dtype"]) for r in alike)
    of = [f"{_code(model)}, revision {_code(revision)}, {_text(dtype)}" for model, revision, dtype in models]
    sources = dict.fromkeys(r["source"] for r in told) or [chapter.defaults.get("source", "own")]
    seeds = dict.fromkeys(r["seed"] for r in told) or [chapter.defaults.get("seed", UNKNOWN)]
    packages = [r["versions"] for r in told] or [ran]
    used = {p: sorted({v[p] for v in packages if p in v}) for p in ("kncore", "torch", "transformers")}
    rows = [["Model", of or _code(mine or UNKNOWN)]]
    rows += [["Data", " and ".join(SOURCES.get(s, _text(s)) for s in sources)]]
    rows += [["Seed", ", ".join(map(_text, seeds))]]
    rows += [["Packages", ", ".join(f"{p} {_text(' and '.join(v))}" for p, v in used.items() if v) or UNKNOWN]]
    if told:
        dates = sorted(r.get("date", UNKNOWN) for r in told)
        outdated = [r for r in told if r["stale"]]
        why = _text("; ".join(dict.fromkeys(reason for r in outdated for reason in r["stale"])))
        stale = f"; [{len(outdated)} of them stale: {why}]{{.stale}}" if outdated else ""
        rows += [["Records", f"{len(told)}, of {_text(' to '.join(dict.fromkeys((dates[0], dates[-1]))))}{stale}"]]
    rows += [["Run took", _ran(ran)], ["Rendered from", _commit(known)]]

    up, number = "../" * (len(place.parts) - 1), chapter.number
    away = [("notebook as it ran", f"_sources/{place.as_posix()}")]
    if any(_chapter(r) == number for r in everything):
        away += [("its records on every model", f"records/{number}.csv"), ("the same", f"records/{number}.json")]
    away += [("all of these with the data", f"archives/{_archive_name(place)}")]
    links = [f'<a href="{up}{quote(path)}" download>{what} ({Path(path).suffix})</a>' for what, path in away]
    rows += [["Take away", " · ".join(links)]]
    if not name and (address := colab(known.repository, chapter.path.name)):
        rows += [["Run it on Colab", f"[open the notebook]({address}); its first cell installs the package"]]
    return "## Where this page comes from\n\n" + _list_table(rows, "origin", stub=True, heads=0)


def note(path: Path) -> dict[str, Any]:
    """What a run left beside its records (`pipeline.took`), {} where there is no such file.

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


def check_notes(results: Path) -> None:
    """Raises ValueError for the first note of a run below a folder of records that is none."""
    for path in sorted([*results.glob("[0-9][0-9].toml"), *results.glob("*/[0-9][0-9].toml")]):
        note(path)


def _ran(ran: Mapping) -> str:
    if not ran:
        return UNKNOWN
    threads = "one thread" if ran["threads"] == "1" else f"{_text(ran['threads'])} threads"
    return (
        f"{ran['seconds']} s on {threads}, on {_text(ran['date'])}; what earlier runs had stored was not computed again"
    )


def _commit(known: Origin) -> str:
    if not known.commit:
        return "an unknown commit"
    short = _code(known.commit[:12])
    linked = f"[{short}]({known.repository}/tree/{known.commit})" if known.repository else short
    return f"commit {linked}" + ", with changes that are not in it" * known.changed


def _title(texts: Iterable[str]) -> str:
    """The title of a page without its number and markup."""
    heading = next((found[1] for text in texts if (found := re.search(r"^# (.+)$", text, re.MULTILINE))), "")
    return re.sub(r"[`*]", "", re.sub(r"^\d+ · ", "", heading)).strip()


def citation(known: Origin, staging: Path, page: str, title: str) -> str:
    """A closed box with the BibTeX entries of a page and of the paper, as Markdown."""
    entries = bibtex(known, page, title), paper(staging / "book" / "references.bib")
    blocks = [line for entry in entries if entry for line in ("```bibtex", *entry.splitlines(), "```", "")]
    return "\n".join(["````{dropdown} Cite this page", ":class-container: cite", "", *blocks[:-1], "````"]) + "\n"


def bibtex(known: Origin, page: str, title: str) -> str:
    """The BibTeX entry of a page (its name in the contents), or of the whole book for its first page."""
    from kncore.claims import package_version

    parts, whole = Path(page).parts, page == "book/index"
    model = parts[2] if parts[:2] == ("book", "runs") else ""
    number = re.match(r"\d\d", parts[-1])
    key = ["kncore"] + [model] * bool(model) + [number[0] if number else parts[-1]] * (not whole)
    on = f", run on {_line(model)}" if model and number else ""
    fields = {
        "author": f"{{{_tex(known.author)}}}",
        "title": f"{{{_tex(known.title if whole else title + on)}}}",
        "howpublished": "" if whole else f"In: {_tex(known.title)}",
        "year": known.year,
        "note": f"kncore {package_version()}" + f", commit {known.commit[:12]}" * bool(known.commit),
        "url": f"{known.site}/{quote(page)}.html" if known.site else known.repository,
    }
    lines = [f"  {name} = {{{value}}}" for name, value in fields.items() if value.strip("{}")]
    return f"@misc{{{re.sub(r'[^A-Za-z0-9_.-]+', '-', '-'.join(key))},\n" + ",\n".join(lines) + "\n}"


def _tex(text: str) -> str:
    """Text for a field of BibTeX, where braces have to pair off even when escaped: it goes without them."""
    return re.sub(r"([&%$#_])", r"\\\1", re.sub(r"[{}\\]", "", text))


def paper(references: Path) -> str:
    """The entry of the paper in the book's bibliography, as it stands there; "" where there is none."""
    text = references.read_text(encoding="utf-8") if references.is_file() else ""
    found = re.search(r"^@\w+\{niu2024,.*?^\}", text, re.MULTILINE | re.DOTALL)
    return found[0] if found else ""
