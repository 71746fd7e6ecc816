"""The reference of the package: a page made from the docstrings, and the Sphinx extension that reads them.

Docstrings are written to be read in a terminal, with names and what they stand for in columns. Sphinx would take a
column for a quotation: here it becomes a list of definitions, and what is set by hand stays as it was set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import kncore

_ENTRY = re.compile(r'([\w"][\w", ]*?)(?: {2,}|: )(\S.*)')
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")


def floors() -> list[list[str]]:
    """The names of the modules, floor by floor, as the docstring of the package has them."""
    told = re.findall(r"^\d+\. (.+(?:\n {3}.+)*)", kncore.__doc__, re.MULTILINE)
    return [re.findall(r"`(\w+)`", text) for text in told]


def page() -> str:
    """The reference as Markdown for Sphinx: each module with its public functions and classes, in the floors' order."""
    lines = []
    for floor, names in enumerate(floors(), 1):
        lines += [f"## Floor {floor}", ""]
        for name in names:
            lines += [f"### {name}", "", "```{eval-rst}", f".. automodule:: kncore.{name}", "   :members:", "```", ""]
    return "\n".join(lines)


def plain(lines: Sequence[str]) -> list[str]:
    """The lines of a docstring as reStructuredText: columns as lists of definitions, what is set by hand literally."""
    told: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        some = list(_paragraph(paragraph.splitlines()))
        if some[:1] != ["::"]:
            # A bar is a norm or a condition in these texts, never the substitution that Sphinx would look for.
            some = [re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or r"\|", line) for line in some]
        told += [*some, ""]
    return told


def _paragraph(lines: list[str]) -> Iterator[str]:
    indents = [len(line) - len(line.lstrip()) for line in lines]
    base = min(indents, default=0)
    hanging = len(set(indents)) > 1
    columns = any(re.search(r"\S {2,}\S", line) for line in lines)
    entries = [_ENTRY.fullmatch(line.strip()) for line, indent in zip(lines, indents, strict=True) if indent == base]
    if not lines or _SECTION.match(lines[0].strip()) or not (hanging or columns) or re.match(r"\s*(>>>|- )", lines[0]):
        yield from lines
    elif all(entries) and (hanging or len(entries) > 1) and not any("->" in line for line in lines):
        for line, indent in zip(lines, indents, strict=True):
            entry = _ENTRY.fullmatch(line.strip())
            yield from [f"``{entry[1]}``", f"    {entry[2]}"] if indent == base else [f"    {line.strip()}"]
    elif columns:
        yield from ["::", "", *(f"    {line[base:]}" for line in lines)]
    else:
        yield from lines


def setup(app: object) -> dict:
    """Sphinx calls this: docstrings go through `plain` before Napoleon reads their sections.

    Fields of named tuples that say nothing but their number are left out.
    """

    def process(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
        lines[:] = plain(lines)

    def skip(app: object, what: str, name: str, obj: object, skipped: bool, options: object) -> bool | None:
        return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None

    app.connect("autodoc-process-docstring", process, priority=100)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
