"""What decided a result, as text that can be hashed: the code that was run, by definition and not by file.

The code of a function is the syntax of its definition and of every definition of this package that it reaches, without
docstrings, comments, annotations and imports. To move a definition to another file or to reword it changes nothing; a
changed constant does. A definition that was replaced while the program runs counts as what replaced it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import NamedTuple

import kncore

PACKAGES = ("kncore", "knpaper")  # the second may be absent
# As they are when the package is imported: an edit of a file does not change a program that runs.
SOURCES = {
    ".".join(path.relative_to(root).with_suffix("").parts): path.read_text(encoding="utf-8")
    for spec in filter(None, map(find_spec, PACKAGES))
    for root in [Path(spec.origin).parent.parent]
    for path in Path(spec.origin).parent.rglob("*.py")
}
# These decide no number: what is shown, what is stored, and how a model gets here (a model is known by its identity).
OUTSIDE = {f"kncore.store.{name}" for name in "cache disk fingerprint results state".split()}
OUTSIDE |= {"kncore.resources", "kncore.zoo"}
OUTSIDE |= {f"knpaper.{name}" for name in "claims figures looking records resources rules staleness".split()}
LOADING = {("kncore.models", name) for name in ("load", "identity")}
DOCUMENTED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Definition(NamedTuple):
    """A name at the top level of a module, e.g. "kncore.neurons"."""

    module: str
    name: str


def code(*functions: Callable) -> str:
    """Return the hash of the code of functions of this package, with all that they reach."""
    ours, foreign = [], []
    for function in map(inspect.unwrap, functions):
        module = function.__module__
        if module in SOURCES and function.__qualname__ in _table(module):
            ours.append(Definition(module, function.__qualname__))
        else:
            foreign.append(_replaced(function, module, ""))
    return _hash([*_closure(ours), *foreign])


def code_of(statements: Sequence[str]) -> str:
    """Return the hash of the code of a notebook, its cells' sources in order, with all that it reaches in this package.

    Imports, and calls that only show something (`figures`, `Markdown`, `display`), do not count.
    """
    written, reached = _cells(tuple(statements))
    return _hash([*written, *_closure(reached)])


@cache
def _cells(sources: tuple[str, ...]) -> tuple[list[str], set[Definition]]:
    tree = ast.Module([node for source in sources for node in ast.parse(source).body], [])
    writer = _Writer(_imports(tree))
    return [text for node in tree.body if not _shows(node) and (text := writer.write(node))], writer.reached


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute, without their local parts (2.13.0 for 2.13.0+cpu)."""
    return {name: version(name).partition("+")[0] for name in ("torch", "transformers")}


def digest(*parts: object) -> str:
    """Return the hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _hash(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _closure(roots: Iterable[Definition]) -> list[str]:
    """Return the definitions that are reached from some, as text, in an order that is not that of their files."""
    found: dict[Definition, str] = {}
    todo = list(roots)
    while todo:
        if (definition := todo.pop()) not in found:
            text, reached = _defined(definition)
            found[definition] = text + _live(definition)
            todo += reached
    return sorted(found.values())


@cache
def _defined(definition: Definition) -> tuple[str, tuple[Definition, ...]]:
    """Return the syntax of a definition, and the definitions that it names."""
    writer = _Writer(_module_imports(definition.module), definition.module)
    text = "".join(map(writer.write, _table(definition.module)[definition.name]))
    return text, tuple(sorted(writer.reached - {definition}))


def _live(definition: Definition) -> str:
    """Return what stands in the place of a definition now, where that is not what its source says."""
    module = importlib.import_module(definition.module)  # the answer must not depend on what is loaded
    if not hasattr(module, definition.name):
        return ""
    node, value = _table(definition.module)[definition.name][-1], getattr(module, definition.name)
    if isinstance(node, ast.ClassDef):
        methods = [vars(value).get(part.name) for part in node.body if isinstance(part, ast.FunctionDef)]
        return "".join(_replaced(getattr(method, "fget", None) or method, definition.module) for method in methods)
    if isinstance(node, DOCUMENTED):
        return _replaced(value, definition.module, definition.name)
    try:
        written = ast.literal_eval(node.value)
    except (ValueError, AttributeError):  # it is worked out from others, which count themselves
        return ""
    return "" if value == written else f" = {value!r}"


def _replaced(value: object, module: str, name: str | None = None) -> str:
    """Return what a function is now, where it is not the one of its module; methods may have any name."""
    function = inspect.unwrap(getattr(value, "__func__", value))
    if not isinstance(function, FunctionType):
        return f" replaced by {function!r}"
    code = function.__code__
    if Path(code.co_filename).name == f"{module.rpartition('.')[2]}.py" and name in (None, code.co_name):
        return ""
    return f" replaced by {code.co_code.hex()} {code.co_consts!r} {code.co_names!r}"


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module])


@cache
def _table(module: str) -> dict[str, list[ast.stmt]]:
    """Return the statements that define each name at the top level of a module."""
    table: dict[str, list[ast.stmt]] = {}
    for node in _tree(module).body:
        for name in _bound(node):
            table.setdefault(name, []).append(node)
    return table


def _bound(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, DOCUMENTED):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        return
    elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))
    else:
        names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
        yield from (name.id for name in names if isinstance(name.ctx, ast.Store))


def _imports(tree: ast.AST) -> dict[str, tuple[str, str]]:
    """Return what each imported name of these packages stands for: a module, and the name in it ("" for itself)."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package = alias.name.partition(".")[0]
                if package in PACKAGES:
                    found[alias.asname or package] = (alias.name if alias.asname else f"{package}.__init__", "")
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] in PACKAGES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                whole = node.module if "." in node.module else f"{node.module}.__init__"
                found[alias.asname or alias.name] = (inner, "") if inner in SOURCES else (whole, alias.name)
    return found


@cache
def _module_imports(module: str) -> dict[str, tuple[str, str]]:
    return _imports(_tree(module))


class _Writer:
    """Writes the syntax of definitions as text, and notes in `reached` which definitions of this package they name.

    A reference is written as the plain name of the definition, wherever it was imported from.
    """

    def __init__(self, imports: dict[str, tuple[str, str]], module: str = ""):
        self.imports, self.module, self.reached = imports, module, set()

    def write(self, node: object) -> str:
        if isinstance(node, list):
            return "[" + ",".join(map(self.write, node)) + "]"
        if not isinstance(node, ast.AST):
            return repr(node)
        if isinstance(node, ast.Import | ast.ImportFrom):
            return ""
        if (reference := self._reference(node)) is not None:
            return f"Name({reference})"
        shown = []
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                value = value[1:]
            if value in (None, []):  # what is empty is not written: every version of Python then gives the same text
                continue
            text = self.write(value)
            # A class in an annotation is only reached: its methods are what an argument of it computes with.
            if name not in ("annotation", "returns"):
                shown.append(f"{name}={text}")
        return f"{type(node).__name__}({','.join(shown)})"

    def _reference(self, node: ast.AST) -> str | None:
        """Return the name of what a name or an attribute stands for: a definition or a module of this package."""
        if isinstance(node, ast.Name) and node.id in self.imports:
            module, name = _home(*self.imports[node.id])
        elif isinstance(node, ast.Name) and self.module and node.id in _table(self.module):
            module, name = self.module, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, name = _home(*self.imports.get(node.value.id, ("", "")))
            if not module or name:
                return None
            module, name = _home(module, node.attr)
        else:
            return None
        if module not in OUTSIDE and (module, name) not in LOADING:
            names = [name] if name else _table(module)  # of a module as a value, anything may be used
            self.reached |= {Definition(module, each) for each in names if each in _table(module)}
        return name or module.rpartition(".")[2]


def _home(module: str, name: str) -> tuple[str, str]:
    """Return where a name is defined that a module may only have imported; a module has no name in it."""
    while name and name not in _table(module) and name in _module_imports(module):
        module, name = _module_imports(module)[name]
    package, _, file = module.partition(".")
    if file == "__init__" and name not in _table(module):
        moved = kncore.STUDY.get(name, "") if package == "kncore" else ""
        if moved:
            return (moved, "") if moved in SOURCES else _home(*moved.rsplit(".", 1))
        if f"{package}.{name}" in SOURCES:
            return f"{package}.{name}", ""
    return module, name


def _shows(node: ast.stmt) -> bool:
    """Return whether a statement of a notebook only shows something."""
    call = node.value if isinstance(node, ast.Expr) else None
    while isinstance(call, ast.Call | ast.Attribute):
        call = call.func if isinstance(call, ast.Call) else call.value
    return isinstance(call, ast.Name) and call.id in ("figures", "looking", "Markdown", "display", "print")
