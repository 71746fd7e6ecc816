"""What the benchmarks share: options, seconds, memory, tables in Markdown, and the file that these are written to."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kncore.store.disk import write


def parser(description: str, **options: tuple) -> argparse.ArgumentParser:
    """Return a parser of `--out` and of options given as default and help; a default that is a list takes several."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, about) in options.items():
        several = isinstance(default, list)
        kind = type(default[0] if several else default)
        made.add_argument(f"--{name}", type=kind, nargs="+" if several else None, default=default, help=about)
    made.add_argument("--out", type=Path, help="file to write the table to; it is printed, too")
    return made


def timed(work: Callable, *arguments, **options) -> tuple:
    """Return the seconds that a call took, and what it returned."""
    begun = time.perf_counter()
    result = work(*arguments, **options)
    return time.perf_counter() - begun, result


def most_memory() -> float:
    """Return GiB, the most that this process held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def table(header: Sequence[str], rows: Iterable[Sequence], left: int = 1) -> str:
    """Return a table in Markdown, its first `left` columns set flush left and the others flush right."""
    rule = ["---"] * left + ["--:"] * (len(header) - left)
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in (header, rule, *rows))


def show(text: str, out: Path | None) -> None:
    """Print a text, and write it to a file where one is named."""
    print(text, end="")
    if out:
        write(out, text)
