"""Code is known by its definitions: what changes its hash, and what does not."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kncore
from kncore import attribution, quadrature, rome, tracing
from kncore.store import fingerprint

SOURCE = Path(kncore.__file__).parent
ROOTS = [f"kncore.{name}" for name in ("attribution.attribute", "rome.search", "tracing.trace")]
ROOTS += ["kncore.covariance.covariance", "kncore.finetune.finetune", "knpaper.criteria.measure"]
PROGRAM = """
import importlib, sys
from kncore.store import fingerprint
for root in sys.argv[1:]:
    module, _, name = root.rpartition(".")
    print(fingerprint.code(getattr(importlib.import_module(module), name)))
"""


def hashes(folder: Path, *roots: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *roots], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package's code, where it can be changed."""
    hidden = shutil.ignore_patterns("weights", "__pycache__")
    for name in fingerprint.PACKAGES:
        shutil.copytree(SOURCE.parent / name, tmp_path / name, ignore=hidden)
    return tmp_path


def edit(package: Path, module: str, old: str, new: str) -> None:
    path = package / f"{module}.py"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


# What decides a number: (module, old text, new text, a function that must notice).
DECIDES = [
    ("kncore/quadrature", "NEAREST = 8", "NEAREST = 6", "kncore.attribution.attribute"),
    ("kncore/attribution", "torch.float16: 16", "torch.float16: 17", "kncore.attribution.attribute"),
    ("kncore/quadrature", "weights / 2", "weights / 3", "kncore.attribution.attribute"),
    ("kncore/arch", "new = see(args[0])", "new = see(args[0] * 1)", "kncore.attribution.attribute"),
    (
        "kncore/models",
        "self.spec.norm is not None and not normed",
        "self.spec.norm is not None",
        "kncore.attribution.attribute",
    ),
    ("kncore/tokens", "len(ids) - 1", "len(ids) - 2", "kncore.tracing.trace"),
    ("kncore/replay", "prefix // 16", "prefix // 8", "kncore.rome.search"),
    ("kncore/rome", "lr: float = 0.5", "lr: float = 0.4", "kncore.rome.search"),
    ("kncore/covariance", "dtype=torch.float64", "dtype=torch.float32", "kncore.covariance.covariance"),
]
# What does not.
IDLE = {
    "a docstring": lambda p: edit(p, "kncore/replay", '"""The engine:', '"""The motor:'),
    "a comment": lambda p: edit(p, "kncore/attribution", "# Rounding noise", "# The rounding noise"),
    "a line before all": lambda p: edit(p, "kncore/attribution", '"""', '# here\n"""'),
    "an import that is not used": lambda p: edit(
        p, "kncore/replay", "import contextlib\n", "import contextlib\nimport csv  # noqa\n"
    ),
    "an annotation of a shape": lambda p: edit(
        p, "kncore/attribution", '"query block neuron"', '"prompt block neuron"'
    ),
    "figures": lambda p: edit(p, "knpaper/figures", "def setup(", "SIZE = 3\n\n\ndef setup("),
    "claims": lambda p: edit(p, "knpaper/records", "def effect(", "EXTRA = 3\n\n\ndef effect("),
    "a function that is not reached": lambda p: edit(
        p, "knpaper/stats", "def share(", "def unused():\n    return 3\n\n\ndef share("
    ),
}


@pytest.mark.kind("identity")
def test_what_decides_a_number_changes_the_code_and_what_does_not_leaves_it(package):
    before = dict(zip(ROOTS, hashes(package, *ROOTS), strict=True))
    assert len(set(before.values())) == len(ROOTS)
    for name, change in IDLE.items():
        change(package)
        assert dict(zip(ROOTS, hashes(package, *ROOTS), strict=True)) == before, name
    for module, old, new, root in DECIDES:
        text = (package / f"{module}.py").read_text(encoding="utf-8")
        edit(package, module, old, new)
        assert hashes(package, root) != [before[root]], (module, new)
        (package / f"{module}.py").write_text(text, encoding="utf-8")


@pytest.mark.kind("identity")
def test_a_definition_may_move_to_another_file_and_the_order_may_change(package):
    before = hashes(package, "kncore.tracing.trace")
    path = package / "kncore" / "tracing.py"
    text = path.read_text(encoding="utf-8")
    start = text.index("def _read(")
    end = text.index("\n\n\n", start) + 3
    moved = text[start:end]
    assert "softmax" in moved
    elsewhere = package / "kncore" / "elsewhere.py"
    elsewhere.write_text(
        "import torch\nfrom jaxtyping import Float\nfrom torch import Tensor\n\n\n" + moved, encoding="utf-8"
    )
    text = text[:start] + text[end:]
    path.write_text(
        text.replace("from kncore import arch", "from kncore.elsewhere import _read\nfrom kncore import arch", 1)
    )
    assert hashes(package, "kncore.tracing.trace") == before
    path.write_text(
        text.replace("from kncore import arch", "from kncore import elsewhere, arch", 1).replace(
            "_read(", "elsewhere._read("
        )
    )
    assert hashes(package, "kncore.tracing.trace") == before


@pytest.mark.kind("identity", own=True)
def test_an_edit_of_a_file_does_not_change_a_program_that_runs(package):
    program = PROGRAM.replace(
        "for root", "import pathlib; pathlib.Path('kncore/attribution.py').write_text('x = 1')\nfor root"
    )
    before = hashes(package, "kncore.attribution.attribute")
    done = subprocess.run(
        [sys.executable, "-c", program, "kncore.attribution.attribute"],
        cwd=package,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == before


@pytest.mark.kind("identity", own=True)
@pytest.mark.parametrize(
    "module, name, value",
    [
        (quadrature, "MOST", 3),
        (attribution, "_adapted", lambda path, tol: {}),
        (rome, "_unfit", lambda *x: ""),
        (tracing, "_noise", print),
    ],
)
def test_what_was_replaced_while_the_program_runs_is_other_code(module, name, value, monkeypatch):
    root = {rome: rome.search, tracing: tracing.trace}.get(module, attribution.attribute)
    before = fingerprint.code(root)
    monkeypatch.setattr(module, name, value)
    assert fingerprint.code(root) != before
    monkeypatch.undo()
    assert fingerprint.code(root) == before


@pytest.mark.kind("identity", own=True)
def test_a_method_that_was_replaced_is_other_code(monkeypatch):
    from kncore.models import LM

    before = fingerprint.code(attribution.attribute)
    monkeypatch.setattr(LM, "readout", lambda self, hidden, normed=False: hidden)
    assert fingerprint.code(attribution.attribute) != before


CELLS = [
    "from kncore import figures, rome\nimport kncore",
    "scores = kncore.attribute(lm, queries).scores",
    "figures.table(scores)",
]


def test_cells_count_by_what_they_compute():
    code = fingerprint.code_of(CELLS)
    assert fingerprint.code_of([*CELLS[:2], "# a remark", "figures.table(scores, 'x'); print(3)", "display(1)"]) == code
    assert fingerprint.code_of([*CELLS, "n = 3"]) != code
    assert fingerprint.code_of([CELLS[0], CELLS[1].replace("kncore.attribute", "kncore.predict"), CELLS[2]]) != code
    renamed = [
        CELLS[0].replace("import kncore", "from kncore import attribute"),
        CELLS[1].replace("kncore.attribute", "attribute"),
    ]
    assert fingerprint.code_of([*renamed, CELLS[2]]) == code


def test_no_definition_of_a_kernel_is_missed():
    """An independent look at the sources: every name that `attribute` uses, and those names use, is reached."""
    reached, todo = set(), [fingerprint.Definition("kncore.attribution", "attribute")]
    while todo:
        definition = todo.pop()
        if definition not in reached:
            reached.add(definition)
            todo += fingerprint._defined(definition)[1]
    names = {definition.name for definition in reached}
    text = (SOURCE / "attribution.py").read_text(encoding="utf-8")
    for name in re.findall(r"^(?:def|class) (\w+)|^([A-Z_]+) =", text, re.MULTILINE):
        assert "".join(name) in names, name
    assert {"capture", "states", "LM", "at_site", "Capture", "pad"} <= names
