"""What training seeds that do not come with this package say to the claims of chapter 9, computed once and stored.

    python -m knpaper.replicas FOLDER [FOLDER ...]

computes the values of models that `training/controlled.py` has trained (controlled-gpt2-3, …) as chapter 9 does, and
adds them to results/seeds.tsv; what is there already is not computed again.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import kncore
from kncore import zoo
from kncore.store import disk, fingerprint
from knpaper import causes
from knpaper.records import results_folder

COLUMNS = ["claim", "architecture", "seed", "sha256", "value", "low", "high", "n", "settings", "code", "command"]
NAME = re.compile(r"(controlled-(gpt2|llama|bert))-(\d+)")


def table_file() -> Path:
    """Return where the stored values lie."""
    return results_folder() / "seeds.tsv"


def read() -> pd.DataFrame:
    """Return the stored values, one row a claim and training seed; no rows where nothing is stored."""
    file = table_file()
    text = {name: str for name in ("sha256", "settings", "code")}
    return pd.read_csv(file, sep="\t", dtype=text) if file.is_file() else pd.DataFrame(columns=COLUMNS)


def code() -> str:
    """Return the hash of the code that makes the values."""
    return fingerprint.code(causes.losses, causes.rewritten, causes.claim_values)


def settings_text(n: int, every: int, seed: int) -> str:
    """Return what the values depend on besides the model, as it is stored."""
    return f"n={n} every={every} seed={seed}"


def joined(architectures: Sequence[str], n: int, every: int, seed: int) -> tuple[pd.DataFrame, list[str]]:
    """Return the stored rows that chapter 9 may add to what it computes with these settings, and why others are not.

    Rows of other settings are not for this run. Those that other code made, and those of weights that come with this
    package and are computed anyway, are refused, with a sentence for each model.
    """
    rows = read()
    rows = rows[rows.architecture.isin(architectures) & (rows.settings == settings_text(n, every, seed))]
    shipped = {disk.digest(zoo.SHIPPED / name / "model.safetensors") for a in architectures for name in zoo.replicas(a)}
    refused, bad = [], (rows.code != code()) | rows.sha256.isin(shipped)
    for (architecture, number), part in rows[bad].groupby(["architecture", "seed"]):
        why = "its weights come with this book" if part.sha256.isin(shipped).any() else "the code has changed since"
        refused.append(f"The stored values of {architecture}-{number} are left out: {why}.")
    return rows[~bad], refused


def add(folder: Path, n: int = 40, every: int = 2, seed: int = 0) -> str:
    """Compute the values of a trained model and store them; return what was done, in words.

    Raises ValueError for a folder that is not named as a controlled model with its training seed.
    """
    if not (known := NAME.fullmatch(folder.name)):
        raise ValueError(f"{folder.name!r}: expected a folder named as controlled-gpt2-3, by architecture and seed")
    architecture, kind, number = known[1], known[2], int(known[3])
    digest, settings, table = disk.digest(folder / "model.safetensors"), settings_text(n, every, seed), read()
    same = (table.architecture == architecture) & (table.seed == number) & (table.settings == settings)
    if ((table.sha256 == digest) & (table.code == code()))[same].any():
        return f"{folder.name}: stored already"
    lms = {architecture: [kncore.load(folder)]}
    edits = {relation: causes.rewritten(lms, relation, n, seed) for relation in causes.GROUPS}
    values = causes.claim_values(causes.losses(lms, every, seed), edits, seed)
    command = f"python training/controlled.py {kind} --seed {number}"
    rows = [
        (claim, architecture, number, digest, *(f"{x:.6g}" for x in found[:3]), found.n, settings, code(), command)
        for claim, found in values.items()
        if found
    ]
    table = pd.concat([table[~same], pd.DataFrame(rows, columns=COLUMNS)]).sort_values(["architecture", "seed"])
    disk.write(table_file(), table.to_csv(sep="\t", index=False))
    return f"{folder.name}: {len(rows)} values stored"


def main() -> None:
    """Run the command of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="trained models, e.g. controlled-gpt2-3")
    for folder in parser.parse_args().folders:
        print(add(folder.resolve()), flush=True)


if __name__ == "__main__":
    main()
