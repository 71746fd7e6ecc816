"""Plain English prose, and text from a folder: for covariances, prefixes of requests, and perplexity."""

from __future__ import annotations

from pathlib import Path

from kncore import resources


def passages() -> list[str]:
    """Return 100 passages of plain English prose, 25 to 45 words each."""
    return resources.text("text.txt").splitlines()[1:]


def texts(folder: str | Path, instead: str) -> list[str]:
    """Return the texts of a folder's .txt files (UTF-8, subfolders too), in the order of their names.

    Raises FileNotFoundError where there is none, which says what else could be named `instead`; ValueError for a file
    that is not UTF-8.
    """
    paths = sorted(Path(folder).rglob("*.txt"))
    if not paths:
        raise FileNotFoundError(f"no .txt file in {str(folder)!r}; name a folder of plain text files, or {instead}")
    contents = []
    for path in paths:
        try:
            contents.append(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason}); convert it first") from error
    return contents
