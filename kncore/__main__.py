"""The command line: python -m kncore run | book | render | pdf | sweep | merge | fetch | cache | readme."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

MODEL = "a known name, a hub name or a local folder"
MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # what accelerate can work out by itself


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"kncore: {_line(message)}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = _Parser(prog="python -m kncore", description="Run the claims and render the book.")
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    run = commands.add_parser("run", parents=[debug], help="run notebooks; each is stored only when it succeeded")
    run.add_argument("--model", type=_given, help=f"{MODEL} (default: the notebooks' own)")
    run.add_argument("--only", type=_names, default=[], metavar="NAMES", help="chapters by number or name, e.g. 01,03")
    value = "a decimal number (5, -0.25, 1e-3), true, false, null, or text; in quotes it is text in any case"
    run.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help=f"set a parameter: {value}"
    )
    run.add_argument("--out", type=_path, help="folder for the notebooks and, below it, results/")
    run.add_argument("--timeout", type=_seconds, default=3600, help="seconds a cell may take (default 3600)")

    book = commands.add_parser("book", parents=[debug], help="run all notebooks and render the book into _build/html")
    book.add_argument("--timeout", type=_seconds, default=3600, help="seconds a cell may take (default 3600)")
    commands.add_parser("render", parents=[debug], help="render the book from the stored notebooks, running none")

    commands.add_parser("pdf", parents=[debug], help="print the book from the stored notebooks into _build/book.pdf")
    sweep = commands.add_parser(
        "sweep", parents=[debug], help="attribution or edits over many prompts, or a shard of it"
    )
    sweep.add_argument("kind", choices=("attribution", "edits"))
    sweep.add_argument("names", nargs="*", help="relations and phenomena (default: those of the chapters)")
    sweep.add_argument("--model", type=_given, help=f"{MODEL} (default: the default model)")
    sweep.add_argument("--device", help="e.g. cuda (default: $KNCORE_DEVICE, else PyTorch's)")
    sweep.add_argument("--dtype", help="e.g. bfloat16 (default: $KNCORE_DTYPE, else float32)")
    sweep.add_argument("--device-map", choices=MAPS, help="e.g. auto: spread a model larger than memory")
    sweep.add_argument("--source", type=_given, help="own, public, or a folder with the public data (default own)")
    sweep.add_argument("--queries", type=_path, help="prompts of one's own instead of names: JSON lines")
    sweep.add_argument("-n", type=_count, help="at most so many prompts (or cases) of each name")
    sweep.add_argument("--seed", type=_seed, help="of the draw of each name (default 0)")
    sweep.add_argument("--editor", help="of edits (default rome)")
    sweep.add_argument("--quadrature", help="of attribution (default: adaptive Gauss-Legendre)")
    sweep.add_argument("--steps", type=_count, help="nodes of the quadrature")
    sweep.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="K/N", help="the K-th of N ranges of the prompts"
    )
    sweep.add_argument("--out", type=_path, required=True, help="folder for the records")
    merge = commands.add_parser("merge", parents=[debug], help="the records of a sweep's shards in one file")
    merge.add_argument("files", nargs="+", type=_path, help="the .jsonl files of a sweep, or their folder")
    merge.add_argument("--out", type=_path, required=True, help="the file to write")

    fetch = commands.add_parser(
        "fetch", parents=[debug], help="download a model and convert it, so that later loads need no network"
    )
    fetch.add_argument("name", nargs="?", type=_given, help="a known name or a hub name (default: the default model)")
    cache = commands.add_parser("cache", parents=[debug], help="what the caches hold; --prune makes room")
    cache.add_argument("--prune", action="store_true", help="remove leftovers, and what was unused longest")
    cache.add_argument("--limit", type=_bytes, metavar="SIZE", help="what may stay, e.g. 500MB (default 2GB)")
    commands.add_parser("readme", parents=[debug], help="make the table of claims in README.md anew from results/")
    return top


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    top = parser()
    options, more = top.parse_known_args(arguments)
    if more and (options.command != "sweep" or any(text.startswith("-") for text in more)):
        top.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        options.names += more  # names may stand after the options, which argparse does not see
    return options


def _given(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is nothing that can be named; leave the option out, or name one")
    return text


def _path(text: str) -> Path:
    return Path(_given(text))


def _names(text: str) -> list[str]:
    return [name.strip() for name in _given(text.strip(", ")).split(",") if name.strip()]


def _seconds(text: str) -> int:
    return _whole(text, "number of seconds above 0")


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d{1,12})\s*([kMGT]?)i?B?", text.strip(), re.IGNORECASE | re.ASCII)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected a whole number with kB, MB, GB or TB")
    return int(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")


def _count(text: str) -> int:
    return _whole(text, "number above 0")


def _whole(text: str, what: str, least: int = 1) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole {what}, at most nine digits")
    return int(text)


def _seed(text: str) -> int:
    return _whole(text, "number from 0 on", 0)


def _shard(text: str) -> tuple[int, int]:
    k, _, n = text.partition("/")
    if not (re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}", text) and 1 <= int(k) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard; expected K/N with K from 1 to N, e.g. 3/8")
    return int(k), int(n)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 = done, 1 = it failed, 2 = it was not understood."""
    _open_streams()
    options = _parsed(arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not have the letters of a path
    try:
        code = _command(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who read what is printed, as `head` does, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if options.debug:
            raise
        print("\nstopped; nothing half-done was stored", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        if isinstance(error, OSError) and not error.filename and _last(error).filename == __file__:
            error.filename = "standard output"  # to print is all that this file does with files
        told = str(error) or type(error).__name__
        if hasattr(error, "exit_code"):
            print(f"kncore: {_line(told) if error.exit_code == 2 else told}", file=sys.stderr)
            return error.exit_code
        if isinstance(error, OSError) or _meant(error):
            remedy = REMEDIES.get(error.errno if isinstance(error, OSError) and error.filename else None, "")
            print(f"kncore: {_line(told)}{remedy}", file=sys.stderr)
            return 2 if isinstance(error, ValueError | TypeError) or getattr(error, "errno", None) in PATH else 1
        if isinstance(error, RuntimeError) and "home directory" in told:
            print(f"kncore: {HOMELESS}", file=sys.stderr)
            return 2
        from kncore import models

        if models.ran_out(error):
            print(f"kncore: memory ran out ({_line(told)}){MEMORY}", file=sys.stderr)
            return 1
        fault = "not foreseen: most likely a fault of kncore; --debug shows where"
        print(f"kncore: {type(error).__name__}: {_line(told)} ({fault})", file=sys.stderr)
        return 1


# What says that a path that was given is none; other errors of the system come up on the way.
PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
REMEDIES = {
    **dict.fromkeys(PATH, "; give another path"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "; make it writable, or give another path"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "; free some space (python -m kncore cache --prune)"),
}
MEMORY = "; take a smaller model or n; a sweep has --steps, --dtype bfloat16 and --device-map auto, too"
HOMELESS = "this user has no home folder; set HOME to a folder that can be written"


def _open_streams() -> None:
    """Put the null device where a standard stream is closed: the next file that is opened would take its place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))


def _last(error: Exception) -> traceback.FrameSummary:
    return traceback.extract_tb(error.__traceback__)[-1]


def _meant(error: Exception) -> bool:
    """Whether it is an answer: an error of these kinds that a line of this package raises, and not one on the way."""
    where = _last(error)
    ours = Path(where.filename).parent == Path(__file__).parent and (where.line or "").startswith("raise ")
    return ours and isinstance(error, ValueError | TypeError | RuntimeError)


def _line(text: str) -> str:
    return " ".join(word if len(word) <= 300 else f"{word[:100]}…{word[-50:]}" for word in text.split())[:1900]


def _command(options: argparse.Namespace) -> int:
    if options.command == "fetch":
        from kncore import models

        print(models.fetch(options.name) if options.name else models.fetch())
        return 0

    if options.command in ("sweep", "merge"):
        from kncore import sweep

        print(sweep.merge(options.files, options.out) if options.command == "merge" else _sweep(options))
        return 0

    if options.command == "cache":
        return _cache(options)

    from kncore import pipeline

    root = pipeline.find_root()
    if options.command == "run":
        written = pipeline.run(
            root,
            model=options.model,
            only=options.only,
            parameters=pipeline.parse_parameters(options.parameters),
            out=options.out and options.out.resolve(),
            timeout=options.timeout,
        )
        for path in written:
            print(path)
        return 0

    from kncore import book, pages  # a second more, which a run does without

    if options.command in ("book", "render"):
        execute = options.command == "book"
        with pipeline.alone(root):
            page = book.book(root, execute=execute, **({"timeout": options.timeout} if execute else {}))
        print(f"open {page}")
    elif options.command == "pdf":
        with pipeline.alone(root):
            print(f"open {book.pdf(root)}")
    elif options.command == "readme":
        pipeline.write(root / "README.md", pages.readme(root))
    return 0


def _sweep(options: argparse.Namespace) -> Path:
    from kncore import models, pipeline, sweep

    chosen = {name: getattr(options, name) for name in ("editor", "quadrature", "steps")}
    settings = {name: value for name, value in chosen.items() if value is not None}
    if options.kind == "edits":
        settings.setdefault("editor", "rome")
    sweep.check_settings(options.kind, settings)
    items = None
    if options.queries:
        unused = {"names": options.names, "-n": options.n, "--seed": options.seed, "--source": options.source}
        if more := [name for name, value in unused.items() if value not in (None, [])]:
            raise pipeline.UsageError(f"--queries takes all prompts of its file; leave out {', '.join(more)}")
        items = sweep.read_queries(options.queries, options.kind)
    sweep.check_folder(options.out)
    pipeline.make_folder(options.out)
    where = {"device": options.device, "dtype": options.dtype, "device_map": options.device_map}
    lm = models.load(options.model or models.DEFAULT, **where)
    if items is None:
        drawn = options.source or "own", options.n, options.seed or 0
        items = sweep.asked(lm, options.kind, options.names, *drawn)
    return sweep.sweep(lm, options.kind, items, settings, options.out, options.shard, progress=sys.stderr.isatty())


def _cache(options: argparse.Namespace) -> int:
    from kncore import cache, models

    if options.prune:
        removed = cache.prune(2 * 10**9 if options.limit is None else options.limit)
        print(f"removed {len(removed)} of them, {sum(entry.bytes for entry in removed) / 1e6:,.1f} MB")
    elif options.limit is not None:
        raise ValueError("--limit says what --prune may leave; give both")
    told = cache.entries()
    for kind in dict.fromkeys(["scores", "models", "public", *(entry.kind for entry in told)]):
        mine = [entry.bytes for entry in told if entry.kind == kind]
        print(f"{kind:10}{len(mine):9,}{sum(mine) / 1e6:12,.1f} MB")
    print(f"in {models.cache_folder()}, scores in {cache.scores_folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
