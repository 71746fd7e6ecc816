"""Write the index of the house into CONTRIBUTING.md: one line a file, the first line of its docstring.

python .ci/index.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kncore", "knpaper", "knbook", "training", "benchmarks", ".ci")
BEGIN, END = "<!-- index:begin -->", "<!-- index:end -->"


def index(root: Path = ROOT) -> str:
    """Return the index as Markdown: a table for each room, its modules in the order of the alphabet."""
    lines = []
    for room in ROOMS:
        lines += [f"**{room}/**", "", "| file | what it holds |", "| --- | --- |"]
        for path in sorted((root / room).rglob("*.py")):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            if docstring:
                first = docstring.splitlines()[0].replace("|", r"\|")
                lines.append(f"| `{path.relative_to(root / room).as_posix()}` | {first} |")
        lines.append("")
    return "\n".join(lines)


def written(root: Path = ROOT) -> str:
    """Return CONTRIBUTING.md with the index as it is now."""
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{index(root)}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    (ROOT / "CONTRIBUTING.md").write_text(written(), encoding="utf-8")
