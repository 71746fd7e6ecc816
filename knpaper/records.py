"""Records of claims on disk: one for each claim and model, sealed by a checksum."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from kncore import arch
from kncore.store import disk
from knpaper.datasets import files
from knpaper.rules import CLAIMS, SIDES, VERDICTS
from knpaper.stats import Estimate, Sample
from knpaper.stored import UNREADABLE

DECIDING = ("torch", "transformers")  # the packages whose version decides a number
DECLARED = ("chapter", "statement", "metric", "rule", "unit", "control", "exploratory")  # by the claim
# What records of earlier versions lack: they are stale.
EARLIER = {"family": next(iter(arch.SPECS)), "data": {}, "unit": "", "control": "", "exploratory": ""}
EARLIER |= {"side": "neither", "power": {}, "units": {}}


def results_folder() -> Path:
    """Return `$KNCORE_RESULTS`, else `results` in the first folder upwards with a `_toc.yml`, else `results` here."""
    if os.environ.get("KNCORE_RESULTS"):
        return Path(os.environ["KNCORE_RESULTS"])
    here = Path.cwd()
    return next((f / "results" for f in (here, *here.parents) if (f / "_toc.yml").is_file()), here / "results")


def package_version(name: str = "kncore") -> str:
    """Return the installed version of a package without its local part, e.g. 2.13.0 for 2.13.0+cpu."""
    return version(name).partition("+")[0]


def place_of(record: Mapping) -> Path:
    """Return where a record lies below the folder of results: by model, and by source where that is not the own."""
    return folder_of(record) / f"{record['claim']}.json"


def folder_of(record: Mapping) -> Path:
    """Return the folder of a record below that of results; only its `model` and `source` are read."""
    folder = record["model"].replace("/", "--")
    return Path(folder if is_own(record) else f"{folder}@{record['source']}")


def keep_table(name: str, model: str, source: str, table: pd.DataFrame) -> None:
    """Write `<name>.tsv` beside the records of a model and a source: numbers, and names of what they are of."""
    folder = results_folder() / folder_of({"model": model, "source": files.named(source)})
    disk.write(folder / f"{name}.tsv", table.to_csv(sep="\t", index=False))


def is_own(record: Mapping) -> bool:
    """Return whether a record is of this project's data: of its facts and grammars, or of its corpus."""
    return not re.fullmatch("public|folder@[0-9a-f]{8}", record["source"])


def column_of(record: Mapping) -> str:
    """Return under what name tables show a record: its model, with the data where they are not the project's own."""
    return record["model"] if is_own(record) else f"{record['model']}, {record['source']} data"


def checksum(record: Mapping) -> str:
    """Return the hash of a record: of all its fields but `checksum`, as JSON with sorted keys."""
    fields = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def says_the_same(path: Path, record: Mapping) -> bool:
    """Return whether the file is a record as it was written and says the same as `record` on whatever date."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        return old["checksum"] == checksum(old) and checksum({**old, "date": ""}) == checksum({**record, "date": ""})
    except (*UNREADABLE, KeyError):
        return False


def keep_dates(results: Path, earlier: Path) -> None:
    """Put the records below `earlier` in the place of those below `results` that say the same on another date."""
    for path in results.glob("*/*.json"):
        old = earlier / path.relative_to(results)
        if says_the_same(old, json.loads(path.read_text(encoding="utf-8"))):
            shutil.copyfile(old, path)


def estimate_of(record: Mapping) -> Estimate:
    """Return the estimate of a record."""
    low = -math.inf if record["low"] is None else record["low"]
    high = math.inf if record["high"] is None else record["high"]
    units = record.get("units")
    sample = Sample(units["kind"], tuple(np.array(group, float) for group in units["values"])) if units else None
    return Estimate(record["value"], low, high, record["n"], sample)


def _check(record: Mapping) -> None:
    """Raise KeyError, TypeError or ValueError where a field of a record is missing, or not as `record` writes it.

    A checksum says that a record was not changed, and not who wrote it: pages show no field that was not checked here.
    """
    if not isinstance(record, dict):
        raise TypeError("it is no mapping")
    json.dumps(record, ensure_ascii=False, allow_nan=False).encode()  # refuses infinity and halves of characters
    record = {**EARLIER, **record}
    texts = [*DECLARED, *"claim verdict side model revision family dtype source code".split()]
    numbers, others = "value low high n seed".split(), ["parameters", "data", "versions", "power", "units"]
    if missing := [name for name in (*texts, *numbers, *others) if name not in record]:
        raise KeyError(f"no {', '.join(missing)}")
    for name in (*texts, *({"date", "checksum", "products"} & record.keys())):
        if not isinstance(record[name], str):
            raise TypeError(f"its {name} is {record[name]!r:.80}, and text is expected")
    for name in numbers:
        value, whole = record[name], name in ("n", "seed")
        finite = type(value) in ((int,) if whole else (int, float)) and abs(value) < 1e300
        if not finite and not (value is None and name in ("low", "high")):
            raise TypeError(f"its {name} is {value!r:.80}, and a {'whole ' * whole}number is expected")
    if not all(isinstance(record[name], dict) for name in others):
        raise TypeError(f"its {', '.join(others)} are not names with values")
    if not all(isinstance(version, str) for version in (record["versions"]["kncore"], *record["versions"].values())):
        raise TypeError("its versions are not names with texts")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in record["data"]):
        raise ValueError(f"its data {list(record['data'])!r:.80} are not those of the package")
    if not re.fullmatch(r"\d\d", record["chapter"], re.ASCII) or record["family"] not in arch.SPECS:
        raise ValueError(f"its chapter is {record['chapter']!r:.80}, its family {record['family']!r:.80}")
    if record["units"] and record["units"]["kind"] not in ("mean", "difference", "share"):
        raise ValueError(f"its units are a {record['units']['kind']!r:.80}")
    CLAIMS[record["claim"]].verdict(estimate_of(record))
    VERDICTS.index(record["verdict"])
    SIDES.index(record["side"])
    for name, pair in record["power"].items():
        if name not in ("null", "threshold", "expected") or not all(0 <= x <= 1 for x in map(float, pair)):
            raise ValueError(f"its power is {record['power']!r:.80}")


def read_records(results: Path) -> list[Mapping]:
    """Return all records below a folder, in the order of `CLAIMS`; ValueError names a file that is not one."""
    found = []
    for path in sorted(results.glob("*/*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            _check(record)
            place = list(CLAIMS).index(record["claim"]), column_of(record)
            if path != results / place_of(record):
                raise ValueError(f"its place is {place_of(record).as_posix()}")
        except (*UNREADABLE, KeyError) as error:
            raise ValueError(
                f"{path} is not a record of a declared claim ({type(error).__name__}: {error}); make it anew with "
                "`make notebooks`, or delete it"
            ) from error
        found.append((place, record))
    return [record for _, record in sorted(found, key=lambda row: row[0])]


def effect(record: Mapping) -> str:
    """Return the estimate of a record with its interval, as text; `?` stands for an end that is not finite."""
    low, high = ("?" if record[end] is None else f"{record[end]:.2f}" for end in ("low", "high"))
    return f"{record['value']:.2f} [{low}, {high}]"
