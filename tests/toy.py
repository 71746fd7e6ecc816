"""A toy checkout: notebooks that need no model."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from knpaper import stored

PARAMETERS = 'model = "tiny"\nn = 2\nscale = 0.5'
COMPUTE = """\
import json, os, pathlib, sys
print("to be dropped", file=sys.stderr)
for i in range(n):
    print(model, i * scale, flush=True)
folder = pathlib.Path(os.environ["KNCORE_RESULTS"], model.replace("/", "--"))
folder.mkdir(parents=True, exist_ok=True)
_ = (folder / "claim.json").write_text(json.dumps({"n": n}))"""


def notebook(*sources: str) -> nbformat.NotebookNode:
    first = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell("# Toy"), first, *map(new_code_cell, sources)]
    return new_notebook(cells=cells, metadata={"language_info": dict(stored.LANGUAGE)})


def make_checkout(folder: Path, **notebooks: nbformat.NotebookNode) -> Path:
    (folder / "notebooks").mkdir(parents=True)
    (folder / "book").mkdir()
    (folder / "book" / "index.md").write_text("# Toy\n")
    (folder / "_config.yml").write_text("title: Toy\n")
    (folder / "_toc.yml").write_text("format: jb-book\nroot: book/index\n")
    for name, content in notebooks.items():
        nbformat.write(content, folder / "notebooks" / f"{name[1:].replace('_', '-')}.ipynb")
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
