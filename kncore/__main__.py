"""The command line: python -m kncore run | book | render | pdf | fetch | readme."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="python -m kncore", description="Run the claims and render the book.")
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    run = commands.add_parser("run", parents=[debug], help="run notebooks; each is stored only when it succeeded")
    run.add_argument("--model", help="a known name, a hub name or a local folder (default: the notebooks' own)")
    run.add_argument("--only", default="", help="chapters by number or name, e.g. 01,03")
    run.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="set a parameter")
    run.add_argument("--out", type=Path, help="folder for the notebooks and, below it, results/")
    run.add_argument("--timeout", type=_seconds, default=3600, help="seconds a cell may take (default 3600)")

    book = commands.add_parser("book", parents=[debug], help="run all notebooks and render the book into _build/html")
    book.add_argument("--timeout", type=_seconds, default=3600, help="seconds a cell may take (default 3600)")
    commands.add_parser("render", parents=[debug], help="render the book from the stored notebooks, running none")

    commands.add_parser("pdf", parents=[debug], help="print the book from the stored notebooks into _build/book.pdf")

    fetch = commands.add_parser(
        "fetch", parents=[debug], help="download a model and convert it, so that later loads need no network"
    )
    fetch.add_argument("name", nargs="?", help="a known name or a hub name (default: the default model)")
    commands.add_parser("readme", parents=[debug], help="make the table of claims in README.md anew from results/")
    return top


def _seconds(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of seconds above 0")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 = done, 1 = it failed, 2 = it was not understood."""
    options = parser().parse_args(arguments)
    try:
        return _command(options)
    except KeyboardInterrupt:
        if options.debug:
            raise
        print("\nstopped; nothing half-done was stored", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        print(f"kncore: {str(error) or type(error).__name__}", file=sys.stderr)
        return getattr(error, "exit_code", 1)


def _command(options: argparse.Namespace) -> int:
    if options.command == "fetch":
        from kncore import models

        print(models.fetch(options.name) if options.name else models.fetch())
        return 0

    from kncore import book, pages, pipeline

    root = pipeline.find_root()
    if options.command == "run":
        only = [name.strip() for name in options.only.split(",") if name.strip()]
        written = pipeline.run(
            root,
            model=options.model,
            only=only,
            parameters=pipeline.parse_parameters(options.parameters),
            out=options.out and options.out.resolve(),
            timeout=options.timeout,
        )
        for path in written:
            print(path)
    elif options.command in ("book", "render"):
        execute = options.command == "book"
        page = book.book(root, execute=execute, **({"timeout": options.timeout} if execute else {}))
        print(f"open {page}")
    elif options.command == "pdf":
        print(f"open {book.pdf(root)}")
    elif options.command == "readme":
        pipeline.write(root / "README.md", pages.readme(root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
