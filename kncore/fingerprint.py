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
from pathlib import Path
from types import FunctionType
from typing import NamedTuple

PACKAGE = __name__.partition(".")[0]
FOLDER = Path(__file__).parent
# As they are when the package is imported: an edit of a file does not change a program that runs.
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")}
# These decide no number: what is shown, what is stored, and how a model gets here (a model is known by its identity).
OUTSIDE = ("cache", "claims", "disk", "figures", "fingerprint", "looking", "resources", "state")
LOADING = {("models", name) for name in ("load", "fetch", "identity", "REGISTRY")}
DOCUMENTED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Definition(NamedTuple):
    """A name at the top level of a module of this package."""

    module: str
    name: str


def code(*functions: Callable) -> str:
    """Hash of the code of functions of this package, with all that they reach."""
    ours, foreign = [], []
    for function in map(inspect.unwrap, functions):
        module = function.__module__.removeprefix(f"{PACKAGE}.")
        if module in SOURCES and function.__qualname__ in _table(module):
            ours.append(Definition(module, function.__qualname__))
        else:
            foreign.append(_replaced(function, module, ""))
    return _hash([*_closure(ours), *foreign])


def code_of(statements: Sequence[str]) -> str:
    """Hash of the code of a notebook, its cells' sources in order, with all that it reaches in this package.

    Imports, and calls that only show something (`figures`, `Markdown`, `display`), do not count.
    """
    written, reached = _cells(tuple(statements))
    return _hash([*written, *_closure(reached)])


@cache
def _cells(sources: tuple[str, ...]) -> tuple[list[str], set[Definition]]:
    tree = ast.Module([node for source in sources for node in ast.parse(source).body], [])
    writer = _Writer(_imports(tree))
    return [writer.write(node) for node in tree.body if not _shows(node)], writer.reached


def versions() -> dict[str, str]:
    """The versions of the packages that compute, without their local parts (2.13.0 for 2.13.0+cpu)."""
    return {name: version(name).partition("+")[0] for name in ("torch", "transformers")}


def digest(*parts: object) -> str:
    """Hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _hash(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------- what is reached


def _closure(roots: Iterable[Definition]) -> list[str]:
    """The definitions that are reached from some, as text, in an order that does not depend on where they stand."""
    found: dict[Definition, str] = {}
    todo = list(roots)
    while todo:
        definition = todo.pop()
        if definition in found:
            continue
        text, reached = _defined(definition)
        found[definition] = text + _live(definition)
        todo += reached
    return sorted(found.values())


@cache
def _defined(definition: Definition) -> tuple[str, tuple[Definition, ...]]:
    """The syntax of a definition, and the definitions that it names."""
    writer = _Writer(_module_imports(definition.module), definition.module)
    text = "".join(map(writer.write, _table(definition.module)[definition.name]))
    return text, tuple(sorted(writer.reached - {definition}))


def _live(definition: Definition) -> str:
    """What stands in the place of a definition now, where that is not what its source says: data, or other code."""
    module = importlib.import_module(f"{PACKAGE}.{definition.module}")  # the answer must not depend on what is loaded
    if not hasattr(module, definition.name):
        return ""
    node, value = _table(definition.module)[definition.name][-1], getattr(module, definition.name)
    if isinstance(node, ast.ClassDef):
        methods = [vars(value).get(part.name) for part in node.body if isinstance(part, ast.FunctionDef)]
        return "".join(_replaced(getattr(method, "fget", None) or method, definition.module) for method in methods)
    if isinstance(node, DOCUMENTED):
        return _replaced(value, definition.module, definition.name)
    written = _literal(definition)
    return "" if written is None or value == written[0] else f" = {value!r}"


@cache
def _literal(definition: Definition) -> tuple[object] | None:
    """The value of a constant, in a tuple; None for one that is worked out from others, which count themselves."""
    try:
        return (ast.literal_eval(_table(definition.module)[definition.name][-1].value),)
    except (ValueError, AttributeError):
        return None


def _replaced(value: object, module: str, name: str | None = None) -> str:
    """What a function is now, where it is not the one of its module; methods may have any name."""
    function = inspect.unwrap(getattr(value, "__func__", value))
    if not isinstance(function, FunctionType):
        return f" replaced by {function!r}"
    code = function.__code__
    if Path(code.co_filename).name == f"{module}.py" and name in (None, code.co_name):
        return ""
    return f" replaced by {code.co_code.hex()} {code.co_consts!r} {code.co_names!r}"


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module])


@cache
def _table(module: str) -> dict[str, list[ast.stmt]]:
    """The statements that define each name at the top level of a module."""
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
    """What each imported name of this package stands for: (module, name in it), the name empty for a module."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == PACKAGE:
                    found[alias.asname or PACKAGE] = (alias.name.partition(".")[2] if alias.asname else "__init__", "")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE and not node.level:
            module = node.module.partition(".")[2]
            for alias in node.names:
                inside = module or (alias.name if alias.name in SOURCES else "__init__")
                found[alias.asname or alias.name] = (inside, "" if inside == alias.name and not module else alias.name)
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
        shown = [
            f"{name}={self.write(value)}"
            for name, value in self._fields(node)
            if value not in (None, [])  # what is empty is not written: every version of Python then gives the same text
        ]
        return f"{type(node).__name__}({','.join(shown)})"

    def _fields(self, node: ast.AST) -> Iterator[tuple[str, object]]:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns"):
                # A class in an annotation is reached: its methods are what an argument of it computes with.
                self.write(value)
            elif name == "body" and isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                yield name, value[1:]
            else:
                yield name, value

    def _reference(self, node: ast.AST) -> str | None:
        """The name of the definition or the module that a name or an attribute stands for, if it is of this package."""
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
        return name or module


def _home(module: str, name: str) -> tuple[str, str]:
    """Where a name is defined that a module may only have imported; a module has no name in it."""
    while name and name not in _table(module) and name in _module_imports(module):
        module, name = _module_imports(module)[name]
    return (name, "") if module == "__init__" and name in SOURCES else (module, name)


def _shows(node: ast.stmt) -> bool:
    """Whether a statement of a notebook only shows something."""
    call = node.value if isinstance(node, ast.Expr) else None
    while isinstance(call, ast.Call | ast.Attribute):
        call = call.func if isinstance(call, ast.Call) else call.value
    return isinstance(call, ast.Name) and call.id in ("figures", "looking", "Markdown", "display", "print")
