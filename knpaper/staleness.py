"""Why a record no longer stands: code, rule, parameters, data, model or versions have changed since it was written."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from kncore import arch, models, zoo
from kncore.store import fingerprint
from knpaper import public, resources, stored, tasks
from knpaper.records import DECIDING, EARLIER, checksum, estimate_of, package_version
from knpaper.rules import CLAIMS, Claim

PARTS = ("statement", "rule", "metric", "unit", "control", "exploratory")  # of a claim


def find_notebook(chapter: str) -> Path | None:
    """Return a chapter's notebook in the first folder upwards that has it, else in the checkout of this package."""
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parent.parent):
        if found := sorted((folder / "notebooks").glob(f"{chapter}-*.ipynb")):
            return found[0]
    return None


def code(claim: Claim, family: str, notebook: Path | None = None) -> str:
    """Return the hash of the code that decides a record: of its notebook's cells up to the one that records it, with
    all that they reach in this package but figures and claims, and of where the model's family has its parts.

    Without a notebook, the cells are those that ran in this kernel, or else those of the chapter's notebook.
    """
    cells = None if notebook else _ran()
    if cells is None:
        found = notebook or find_notebook(claim.chapter)
        cells = _cells(found, found.stat().st_mtime_ns, claim.id) if found else ()
    return fingerprint.digest(fingerprint.code_of(cells), asdict(arch.SPECS[family]))[:16]


def _ran() -> tuple[str, ...] | None:
    """Return the cells that ran in this kernel, each once, without papermill's parameters; None outside a kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None:
        return None
    cells = tuple(dict.fromkeys(cell for cell in shell.user_ns["In"] if not cell.startswith("# Parameters")))
    return cells if any(cells) else None  # matplotlib makes a shell of its own where there is no notebook


@functools.lru_cache(maxsize=256)
def _cells(notebook: Path, changed: int, claim_id: str) -> tuple[str, ...]:
    """Return the code cells of a notebook as it was last `changed`, up to the first that records the claim."""
    cells = [cell.source for cell in stored.read(notebook).cells if cell.cell_type == "code"]
    records = re.compile(rf"""claims\.record\(\s*(["']{re.escape(claim_id)}["']|[^"'\s])""")
    last = next((i for i, cell in enumerate(cells) if records.search(cell)), len(cells) - 1)
    return tuple(cells[: last + 1])


def stale(record: Mapping) -> list[str]:
    """Return why a record no longer stands, in plain words; empty for a record that this code would write again.

    Of a record that was edited nothing else is believed, and so nothing else is compared.
    """
    if "checksum" not in record:
        return ["it has no checksum"]
    if record["checksum"] != checksum(record):
        return ["edited after it was recorded"]
    if not EARLIER.keys() <= record.keys():
        return ["recorded by an earlier kncore, which did not say all that is known of a record now"]
    claim, notebook = CLAIMS[record["claim"]], find_notebook(record["chapter"])
    verdict = claim.verdict(estimate_of(record))
    found = {
        "the code has changed since": record["code"] != code(claim, record["family"], notebook),
        **{f"the {part} has changed since": record[part] != getattr(claim, part) for part in PARTS},
        f"the claim is of chapter {claim.chapter} now": record["chapter"] != claim.chapter,
        "the rule now gives another verdict": record["verdict"] != verdict,
        "it speaks for another side now": record["verdict"] == verdict and record["side"] != claim.side(verdict),
    }
    for name in ("kncore", *DECIDING):
        recorded, now = record["versions"].get(name), package_version(name)
        found[f"recorded with {name} {recorded}, this is {now}"] = recorded != now
    for name, recorded, now in _settings(record, notebook):
        found[f"recorded with {name} {recorded}, it is {now} now"] = recorded != now
    for name, recorded in record["data"].items():
        found[f"the data of {name} have changed since"] = recorded != _data(name)
    return [reason for reason, holds in found.items() if holds]


def _settings(record: Mapping, notebook: Path | None) -> Iterator[tuple[str, object, object]]:
    """Yield what a record was made with, and what a run would be made with now: (name, recorded, now)."""
    if record["model"] in zoo.REGISTRY:
        yield "revision", record["revision"], models.identity(record["model"])[1]
    yield "dtype", record["dtype"], str(models.resolve_device("cpu")[1]).removeprefix("torch.")
    recorded = {"seed": record["seed"], "source": record["source"], **record["parameters"]}
    defaults = _defaults(notebook, notebook.stat().st_mtime_ns) if notebook else {}
    if record["source"] == "public":
        defaults = {**defaults, "source": "public", **public.PARAMETERS.get(record["chapter"], {})}
    for name in recorded.keys() & defaults.keys():
        yield f"{name} =", recorded[name], defaults[name]


@functools.lru_cache(maxsize=64)
def _defaults(notebook: Path, changed: int) -> dict[str, object]:
    """Return the parameters of a notebook, as it was last `changed`."""
    return stored.parameters(stored.read(notebook))


@functools.cache
def _data(name: str) -> str:
    """Return the hash of a part of the package's data as it is now, see `resources`; "" where there is none."""
    try:
        relation = name.removeprefix("relation ")
        return resources.digest(tasks.describe(relation) if relation != name else resources.current(name))
    except (OSError, ValueError):
        return ""
