"""What may stand in a stored notebook: the finaliser, the check of it, and the comparison of two outputs.

A notebook is stored with its outputs, so that it can be read without being run and so that a later run can be
compared with it. Whatever differs between two runs on one machine for no reason of the science is taken out here.
"""

from __future__ import annotations

import ast
import copy
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbformat import NotebookNode

UNREADABLE = (OSError, ValueError, TypeError, RecursionError)  # what reading a damaged file may raise
RELATIVE = 1e-3
ABSOLUTE = 1e-6
SHORTEST = 3  # letters of a folder that is replaced in outputs

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
_DROPPED_NOTEBOOK = ("papermill", "widgets", "signature", "vscode", "toc")
_DROPPED_CELL = ("execution", "papermill", "ExecuteTime", "collapsed", "scrolled", "vscode", "widgets")
_WIDGET = "application/vnd.jupyter.widget-view+json"

_OVERWRITTEN = re.compile(r"^.*\r(?=[^\n])", re.MULTILINE)
_STYLER = re.compile(r"\bT_[0-9a-f]{5}(?=\b|_)")
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}\b")
_PATH = re.compile(r"""(?<![\w/.:~<>*-])/(?:[\w.+@-]+/)+[\w.+@-]*|\b[A-Z]:\\\w""")
_NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?!\w)")
_TAG = re.compile(r"(?<!\\)((?:\\\\)*)<(?=[a-zA-Z/!?])(?!/?(?:sup|sub)>)")  # Markdown would pass it on as HTML
_BLANKS = re.compile(r"[ \t]+")
_UNSEEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def read(path: Path) -> NotebookNode:
    """Return a notebook at rest; ValueError names the file that is none."""
    try:
        return nbformat.read(path, as_version=4)
    except (*UNREADABLE, AttributeError, LookupError, nbformat.ValidationError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{path} is no notebook ({reason}); restore it (git checkout) or run it anew") from error


def parameters(nb: NotebookNode) -> dict[str, object]:
    """Return the parameters of a notebook and their defaults; ValueError where they are not name = literal."""
    source = next((cell.source for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])), "")
    found = {}
    try:
        for line in ast.parse(source).body:
            target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
            if isinstance(target, ast.Name):
                found[target.id] = ast.literal_eval(line.value)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"the cell tagged 'parameters' must be name = literal: {error}") from error
    return found


def finalise(nb: NotebookNode, replace: Mapping[str, str] | None = None) -> NotebookNode:
    """Return a copy of an executed notebook as it is stored: two runs that computed the same give the same bytes.

    Timings, kernel and runner metadata, random cell ids, stderr, widget state and the name of the machine's folders
    (`replace`, see `stable`, e.g. {"<home folder>": "~"}) go; execution counts and outputs stay. Pieces of one stream
    that follow each other become one output. HTML in a Markdown output is shown as text.
    """
    nb = copy.deepcopy(nb)
    nb.nbformat, nb.nbformat_minor = 4, 5
    for key in _DROPPED_NOTEBOOK:
        nb.metadata.pop(key, None)
    nb.metadata.kernelspec = copy.deepcopy(KERNEL)
    nb.metadata.language_info = copy.deepcopy(LANGUAGE)
    for number, cell in enumerate(nb.cells, 1):
        cell.id = f"cell-{number:02d}"
        for key in _DROPPED_CELL:
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if cell.cell_type != "code":
            continue
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.source = _replaced(cell.source, replace)
        cell.outputs = _outputs(cell.outputs, replace)
    return nbformat.from_dict(nb)


def dumps(nb: NotebookNode) -> str:
    """Return the notebook as text, keys sorted, with a newline at its end."""
    return nbformat.writes(nb, version=nbformat.NO_CONVERT).rstrip("\n") + "\n"


def stable(text: str, replace: Mapping[str, str] | None = None) -> str:
    """Return an output without what differs between two runs: folders, overwritten lines, random style ids.

    `replace` maps absolute paths of folders to what stands for them; longer ones first, whole path components only,
    and none of fewer than three letters, such as /: that would be a sign of division, too.
    """
    ids: dict[str, str] = {}
    text = _OVERWRITTEN.sub("", _replaced(text, replace))
    return _STYLER.sub(lambda match: ids.setdefault(match[0], f"T_{len(ids):05d}"), text)


def visible(text: object) -> str:
    """Return text with escapes (`\\x1b`) for what nobody sees: control characters but line feeds, and others."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def problems(nb: NotebookNode) -> list[str]:
    """Return what keeps a notebook from being stored; empty for a sound one.

    Without an execution count a cell would be compared with nothing, an object's address or an absolute path would
    differ on the next machine, and without parameters nobody could run it on another model.
    """
    found = []
    if not any("parameters" in cell.metadata.get("tags", []) for cell in nb.cells):
        found.append("no cell is tagged 'parameters'")
    for number, cell in enumerate(nb.cells, 1):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        if cell.execution_count is None:
            found.append(f"cell {number} has no execution count: it was never run")
        if match := _PATH.search(cell.source):
            found.append(f"cell {number} names an absolute path: {match[0]}")
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"cell {number} holds an error: {output.ename}: {output.evalue}")
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"cell {number} holds stderr")
            for text in _texts(output):
                if match := _ADDRESS.search(text):
                    found.append(f"cell {number} prints an object's address: {match[0]}")
                if match := _PATH.search(text):
                    found.append(f"cell {number} prints an absolute path: {match[0]}")
    return found


def agree(one: str, other: str, relative: float = RELATIVE, absolute: float = ABSOLUTE) -> bool:
    """Return whether two texts say the same: text and whole numbers exactly, other numbers within the tolerance.

    Whole numbers are counts, blocks and neurons: there is no such thing as nearly neuron 1044. Runs of blanks count
    as one, for the width of a column follows the width of its numbers.
    """
    if one == other:
        return True
    first, second = ([_BLANKS.sub(" ", part) for part in _NUMBER.split(text)] for text in (one, other))
    if first != second:
        return False
    numbers = zip(_NUMBER.findall(one), _NUMBER.findall(other), strict=True)
    return all(_close(a, b, relative, absolute) for a, b in numbers)


def _close(one: str, other: str, relative: float, absolute: float) -> bool:
    one, other = one.replace("−", "-"), other.replace("−", "-")
    if one.lstrip("+-").isdigit() and other.lstrip("+-").isdigit():
        return int(one) == int(other)
    return math.isclose(float(one), float(other), rel_tol=relative, abs_tol=absolute)


def _outputs(outputs: list[NotebookNode], replace: Mapping[str, str] | None) -> list[NotebookNode]:
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            if kept and kept[-1].output_type == "stream" and kept[-1].name == output.name:
                kept[-1].text += output.text
            else:
                kept.append(output)
        elif _WIDGET not in output.get("data", {}):
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            output.text = stable(output.text, replace)
        for mime, value in output.get("data", {}).items():
            if isinstance(value, str) and not mime.startswith("image/"):
                output.data[mime] = stable(_TAG.sub(r"\1&lt;", value) if mime == "text/markdown" else value, replace)
    return kept


def _replaced(text: str, replace: Mapping[str, str] | None) -> str:
    # "/" and "/a" are other things than folders as well.
    folders = [old for old in replace or {} if os.path.isabs(old) and len(old.strip("/")) >= SHORTEST]
    for old in sorted(folders, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.]){re.escape(old)}(?![\w.-])", lambda _, new=replace[old]: new, text)
    return text


def _texts(output: NotebookNode) -> list[str]:
    if output.output_type == "stream":
        return [output.text]
    data = output.get("data", {})
    return [value for mime, value in data.items() if isinstance(value, str) and "image/" not in mime]
