"""The command line: python -m kncore run | public | book | render | pdf | claims | sweep | merge | fetch | …"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from knbook.errors import RunError, UsageError, refused

PROGRAM = "python -m kncore"
# What says that a given path is wrong; other errors of the system happen later.
WRONG_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
REMEDIES = {
    **dict.fromkeys(WRONG_PATH, "; give another path"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "; make it writable, or give another path"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), f"; free some space ({PROGRAM} cache --prune)"),
}
MEMORY = "; take a smaller model or n; a sweep has --steps, --dtype bfloat16 and --device-map auto, too"

app = typer.Typer(add_completion=False, rich_markup_mode=None, help="Run the claims and render the book.")


def text(value: str) -> str:
    """Return a text that names something."""
    if not value.strip() or "\0" in value:
        raise typer.BadParameter(f"{value!r} names nothing; leave the option out, or name one")
    return value


def names(value: str) -> str:
    """Return names with commas between, of which there is at least one."""
    return text(value.strip(", "))


def path(value: str) -> Path:
    """Return a path."""
    return Path(text(value))


def number(value: object, least: int = 1) -> int:
    """Return a whole number of at most nine digits."""
    if not re.fullmatch(r"[0-9]{1,9}", str(value)) or int(value) < least:
        raise typer.BadParameter(f"{value!r} is not a whole number from {least} on, of at most nine digits")
    return int(value)


def seed(value: object) -> int:
    """Return a whole number, which may be 0."""
    return number(value, 0)


def shard(value: str) -> str:
    """Return K/N with K from 1 to N."""
    k, _, n = value.partition("/")
    if not (re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}", value) and 1 <= int(k) <= int(n)):
        raise typer.BadParameter(f"{value!r} is not a shard; expected K/N with K from 1 to N, e.g. 3/8")
    return value


def size(value: str) -> int:
    """Return a number of bytes."""
    found = re.fullmatch(r"(\d{1,12})\s*([kMGT]?)i?B?", value.strip(), re.IGNORECASE | re.ASCII)
    if not found:
        raise typer.BadParameter(f"{value!r} is not a size; expected a whole number with kB, MB, GB or TB")
    return int(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")


VALUE = "set a parameter: a decimal number (5, -0.25, 1e-3), true, false, null, or text; in quotes always text"
Map = Literal["auto", "balanced", "balanced_low_0", "sequential"]  # what accelerate can work out by itself
Model = Annotated[str | None, Option(parser=text, help="a known name, a hub name or a local folder")]
Timeout = Annotated[int, Option(parser=number, help="seconds a cell may take")]
Debug = Annotated[bool, Option("--debug", help="show the traceback of an error")]


@app.command()
def run(
    model: Model = None,
    only: Annotated[str | None, Option(parser=names, help="chapters by number or name, e.g. 01,03")] = None,
    parameters: Annotated[list[str] | None, Option("-p", metavar="NAME=VALUE", help=VALUE)] = None,
    out: Annotated[Path | None, Option(parser=path, help="folder for the notebooks and, below it, results/")] = None,
    timeout: Timeout = 3600,
    jobs: Annotated[int, Option(parser=number, help="how many run side by side, the longest first")] = 1,
    debug: Debug = False,
) -> None:
    """Run notebooks; each is stored only when it succeeded."""
    from knbook import checkout, runner
    from knbook.parameters import parse_parameters

    stored = runner.run(
        checkout.find_root(),
        model=model,
        only=[name.strip() for name in (only or "").split(",") if name.strip()],
        parameters=parse_parameters(parameters or []),
        out=out and out.resolve(),
        timeout=timeout,
        at_once=jobs,
    )
    for notebook in stored:
        _say(notebook)


@app.command()
def public(
    source: Annotated[str, Argument(parser=text, help='a folder with the public data sets, or "public": fetch them')],
    only: Annotated[str | None, Option(parser=names, help="chapters by number or name, e.g. 01,03")] = None,
    timeout: Timeout = 3600,
    debug: Debug = False,
) -> None:
    """Run chapters on public data; of each only the records are kept, and those that stand are not made again."""
    from knbook import checkout
    from knbook.public import run

    chosen = [name.strip() for name in (only or "").split(",") if name.strip()]
    for record in run(checkout.find_root(), source, chosen, timeout=timeout):
        _say(record)


@app.command()
def multiverse(debug: Debug = False) -> None:
    """Judge headline claims under all choices of how neurons are found, into results/multiverse.tsv."""
    from knbook import checkout
    from knpaper.multiverse import run

    path = checkout.find_root() / "results" / "multiverse.tsv"
    _say(f"{len(run(path)):,} rows in {path}")


@app.command()
def book(timeout: Timeout = 3600, debug: Debug = False) -> None:
    """Run all notebooks and render the book into _build/html."""
    _build("book", timeout=timeout)


@app.command()
def render(debug: Debug = False) -> None:
    """Render the book from the stored notebooks, running none."""
    _build("book", execute=False)


@app.command()
def pdf(debug: Debug = False) -> None:
    """Print the book from the stored notebooks into _build/book.pdf."""
    _build("pdf")


def _build(product: str, **options: bool | int) -> None:
    from knbook import book, checkout

    root = checkout.find_root()
    with checkout.book_lock(root), refused():
        _say(f"open {getattr(book, product)(root, **options)}")


@app.command()
def readme(debug: Debug = False) -> None:
    """Make the table of claims in README.md anew from results/."""
    from knbook import checkout, pages
    from kncore.store.disk import write

    root = checkout.find_root()
    with refused():
        table = pages.readme(root)
    write(root / "README.md", table)


@app.command()
def claims(
    audit: Annotated[bool, Option("--audit", help="say what each claim lacks; exit with 1 if one does")] = False,
    debug: Debug = False,
) -> None:
    """List the verdicts; with --audit say what each claim lacks, and what a run gives where its null holds."""
    from knbook import checkout, pages
    from knpaper.audit import audit as audited
    from knpaper.audit import multiplicity
    from knpaper.records import effect, read_records

    with refused():
        root = checkout.find_root()
        records = read_records(root / "results")
        rows = audited(records) if audit else None
    if rows is None:
        for record in records:
            shown = f"{record['claim']:32}{record['model']:24}{record['verdict']:14}{effect(record)}"
            _say(f"{shown}, n = {record['n']} {record['unit']}, speaks for {record['side']}")
        return
    for row in rows.itertuples(index=False):
        numbers = "" if row[3] != row[3] else f"n {row[2]:.0f}, if null {row[3]:.2f}, if expected {row[4]:.2f}"
        said = "; ".join([*(f"FAULT: {fault}" for fault in row.faults), *row.notes])
        _say(f"{row.claim:32}{row.model:24}{numbers:38}{said}".rstrip())
    found = multiplicity(list(pages.load(root).judged.values()))
    _say(
        f"{found['verdicts']:.0f} verdicts, further training seeds apart, {found['decided']:.0f} decided; "
        "if every value lay at its threshold, "
        f"{found['by chance']:.0f} would be decided by chance; {found['surviving']:.0f} of the decided ones survive "
        "Holm's correction over all of them"
    )
    if faulty := sum(bool(faults) for faults in rows.faults):
        raise RunError(f"{faulty} of {len(rows)} rows have a fault")


@app.command()
def sweep(
    kind: Literal["attribution", "edits"],
    out: Annotated[Path, Option(parser=path, help="folder for the records")],
    names: Annotated[list[str] | None, Argument(help="relations and phenomena (default: the chapters')")] = None,
    model: Model = None,
    device: Annotated[str | None, Option(help="e.g. cuda (default: $KNCORE_DEVICE, else PyTorch's)")] = None,
    dtype: Annotated[str | None, Option(help="e.g. bfloat16 (default: $KNCORE_DTYPE, else float32)")] = None,
    device_map: Annotated[Map | None, Option(help="e.g. auto: spread a model larger than memory")] = None,
    source: Annotated[
        str | None, Option(parser=text, help="own (default), public, or a folder with public data")
    ] = None,
    queries: Annotated[Path | None, Option(parser=path, help="your own prompts, JSON lines, instead of names")] = None,
    n: Annotated[int | None, Option("-n", parser=number, help="at most so many prompts of each name")] = None,
    seed: Annotated[int | None, Option(parser=seed, help="of the draw of each name (default 0)")] = None,
    editor: Annotated[str | None, Option(help="of edits (default rome)")] = None,
    quadrature: Annotated[str | None, Option(help="of attribution (default: adaptive Gauss-Legendre)")] = None,
    steps: Annotated[int | None, Option(parser=number, help="nodes of the quadrature")] = None,
    shard: Annotated[str, Option(parser=shard, metavar="K/N", help="the K-th of N ranges of the prompts")] = "1/1",
    debug: Debug = False,
) -> None:
    """Run attribution or edits over many prompts, or a shard of them."""
    from knbook import checkout, prompts, shards, sweep
    from kncore import models, zoo

    options = {"editor": editor, "quadrature": quadrature, "steps": steps}
    settings = {"editor": "rome"} if kind == "edits" else {}
    settings |= {name: value for name, value in options.items() if value is not None}
    sweep.check_settings(kind, settings)
    items = None
    if queries:
        unused = {"names": names, "-n": n, "--seed": seed, "--source": source}
        if surplus := [name for name, value in unused.items() if value is not None]:
            raise UsageError(f"--queries takes all prompts of its file; leave out {', '.join(surplus)}")
        items = prompts.read_queries(queries, kind)
    shards.check_folder(out)
    checkout.check_folder(out, make=True)
    with refused():
        lm = models.load(model or zoo.DEFAULT, device=device, dtype=dtype, device_map=device_map)
        items = items or prompts.named(lm, kind, names or (), source or "own", n, seed or 0)
    k, count = map(int, shard.split("/"))
    _say(sweep.sweep(lm, kind, items, settings, out, (k, count), progress=sys.stderr.isatty()))


@app.command()
def merge(
    files: Annotated[list[Path], Argument(parser=path, help="the .jsonl files of a sweep, or their folder")],
    out: Annotated[Path, Option(parser=path, help="the file to write")],
    debug: Debug = False,
) -> None:
    """Join the records of a sweep's shards in one file."""
    from knbook import shards

    _say(shards.merge(files, out))


@app.command()
def fetch(
    name: Annotated[str | None, Argument(parser=text, help="a known name or a hub name")] = None, debug: Debug = False
) -> None:
    """Download a model and convert it, so that later loads need no network (default: the default model)."""
    from kncore import zoo

    with refused():
        _say(zoo.fetch(name or zoo.DEFAULT))


@app.command()
def cache(
    prune: Annotated[bool, Option("--prune", help="remove leftovers, and what was unused longest")] = False,
    limit: Annotated[int | None, Option(parser=size, help="what may stay, e.g. 500MB (default 2GB)")] = None,
    debug: Debug = False,
) -> None:
    """Say what the caches hold; with --prune make room."""
    from kncore import zoo
    from kncore.store import cache

    if prune:
        removed = cache.prune(2 * 10**9 if limit is None else limit)
        _say(f"removed {len(removed)} of them, {sum(entry.bytes for entry in removed) / 1e6:,.1f} MB")
    elif limit is not None:
        raise UsageError("--limit says what --prune may leave; give both")
    entries = cache.entries()
    for kind in dict.fromkeys(["scores", "models", "public", *(entry.kind for entry in entries)]):
        sizes = [entry.bytes for entry in entries if entry.kind == kind]
        _say(f"{kind:10}{len(sizes):9,}{sum(sizes) / 1e6:12,.1f} MB")
    _say(f"in {zoo.cache_folder()}, scores in {cache.scores_folder()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 where it is done, 1 where it failed, 2 where it was refused, 130 where it was stopped."""
    _open_streams()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not have the letters of a path
    try:
        code = typer.main.get_command(app)(arguments, prog_name=PROGRAM, standalone_mode=False) or 0
    except Exception as error:
        if "--debug" in arguments:
            raise
        message, code = _answer(error)
        print(f"kncore: {message}", file=sys.stderr)
    if code == 130:
        print("\nstopped; nothing half-done was stored", file=sys.stderr)
    return code


def _answer(error: Exception) -> tuple[str, int]:
    """Return what to say of an error, and the exit code."""
    said = str(error) or type(error).__name__
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else PROGRAM
        return f"{_line(error.format_message()).rstrip('.')}; see {command} --help", 2
    if isinstance(error, RunError | UsageError):
        return said if isinstance(error, RunError) else _line(said), error.exit_code
    if isinstance(error, OSError):
        remedy = REMEDIES.get(error.errno, "") if error.filename else ""
        return _line(said) + remedy, 2 if error.errno in WRONG_PATH else 1
    if isinstance(error, RuntimeError) and "home directory" in said:
        return "this user has no home folder; set HOME to a folder that can be written", 2
    from kncore import models  # which takes seconds

    if models.ran_out(error):
        return f"memory ran out ({_line(said)}){MEMORY}", 1
    fault = "not foreseen: most likely a fault of kncore; --debug shows where"
    return f"{type(error).__name__}: {_line(said)} ({fault})", 1


def _line(text: str) -> str:
    """Return a text as one line of at most 1,900 characters, long words shortened."""
    return " ".join(word if len(word) <= 300 else f"{word[:100]}…{word[-50:]}" for word in text.split())[:1900]


def _say(line: object) -> None:
    """Print a line; an OSError names standard output."""
    try:
        print(line, flush=True)
    except OSError as error:
        error.filename = "standard output"
        raise


def _open_streams() -> None:
    """Put the null device where a standard stream is closed: the next file that is opened would take its place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))
