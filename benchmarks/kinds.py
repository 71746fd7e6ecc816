"""Count the tests of the kinds of input that once gave a silently wrong result or a raw error.

Prints a table in Markdown: the kinds of kinds.toml, each with the number of tests that are marked with it. Nothing is
run: the tests are collected, and one with several inputs counts once for each. As a plugin of pytest (`-p kinds`) this
module prints what was collected.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import report

ROOT = Path(__file__).resolve().parent.parent
KINDS = tomllib.loads(Path(__file__).with_name("kinds.toml").read_text(encoding="utf-8"))
BEGIN = "collected kinds: "


def kind(slug: str, own: bool = False) -> tuple[str, bool]:
    """What a marker says: the slug of its kind, and whether its inputs are of our own finding."""
    return slug, own


def pytest_collection_finish(session: pytest.Session) -> None:
    """Print, by the name of each test, its kinds and, of a generated one, whether a limit of time is set for it."""
    found = {}
    for item in session.items:
        settings = getattr(getattr(item, "obj", None), "_hypothesis_internal_use_settings", None)
        marked = [kind(*marker.args, **marker.kwargs) for marker in item.iter_markers("kind")]
        found[item.nodeid] = {"kinds": marked, "hurried": settings is not None and settings.deadline is not None}
    print(f"\n{BEGIN}{json.dumps(found)}")


def collect(tests: Path = ROOT / "tests") -> dict[str, dict]:
    """What `pytest_collection_finish` prints of a folder of tests; RuntimeError where they cannot be collected."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "kinds", "-p", "no:cacheprovider"]
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [*command, str(tests)], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    printed = [line for line in done.stdout.splitlines() if line.startswith(BEGIN)]
    if done.returncode or not printed:
        raise RuntimeError(f"the tests could not be collected: {(done.stdout + done.stderr).strip()[-2000:]}")
    return json.loads(printed[0].removeprefix(BEGIN))


def counts(collected: Iterable[Mapping]) -> dict[str, tuple[int, int]]:
    """The number of tests of each kind, and how many of them are on inputs of our own finding.

    Raises ValueError for a kind that kinds.toml does not have, and for one without a test.
    """
    marks = [{tuple(marked) for marked in test["kinds"]} for test in collected]
    tests = Counter(slug for marked in marks for slug in {slug for slug, _ in marked})
    owned = Counter(slug for marked in marks for slug, own in marked if own)
    if strange := tests.keys() - KINDS:
        raise ValueError(f"a test has the kind {min(strange)!r}, which is not in benchmarks/kinds.toml; add it there")
    if bare := [slug for slug in KINDS if not tests[slug]]:
        raise ValueError(f"no test is marked with {', '.join(bare)}: mark one, or take the kind out of kinds.toml")
    return {slug: (tests[slug], owned[slug]) for slug in KINDS}


def table(found: Mapping[str, tuple[int, int]]) -> str:
    """The counts as a table in Markdown, with their sums."""
    rows = [[words["kind"], words["seen"], words["now"], *found[slug]] for slug, words in KINDS.items()]
    text = report.table(["What is given", "seen in", "what happens", "tests", "of these, own inputs"], rows, left=3)
    tests, own = (sum(column) for column in zip(*found.values(), strict=True))
    return f"{text}| **{len(found)} kinds** | | | {tests} | {own} |\n"


def main() -> None:
    options = report.parser(__doc__).parse_args()
    report.show(table(counts(collect().values())), options.out)


if __name__ == "__main__":
    main()
