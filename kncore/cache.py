"""The store of results on disk: content-addressed, written in one step."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kncore.models import LM, cache_folder
from kncore.tokens import Encoded

CODE = ("arch", "attribution", "replay")  # the modules whose text decides a score


def scores_folder() -> Path:
    """`$KNCORE_SCORES`, or `scores` in the user cache."""
    return Path(os.environ.get("KNCORE_SCORES") or cache_folder() / "scores")


@cache
def code_version(modules: tuple[str, ...] = CODE) -> str:
    """Hash of the text of some modules; by default of the code that computes scores."""
    texts = [Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8") for module in modules]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def key(lm: LM, encoded: Encoded, settings: dict) -> str:
    """Name of the scores of one query."""
    return name(lm, {**settings, "query": [encoded.ids, encoded.position, encoded.target]}, CODE)


def name(lm: LM, settings: dict, modules: tuple[str, ...]) -> str:
    """Name of a result: everything it depends on, hashed; `modules` are those whose text decides it."""
    told = [lm.revision, lm.spec.family, str(lm.dtype), str(lm.device.type), code_version(modules), settings]
    told += [version("torch"), version("transformers")]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def read(folder: Path, name: str) -> dict[str, Tensor] | None:
    """The stored result, or None where there is none that can be read."""
    try:
        return load_file(folder / name[:2] / f"{name}.safetensors")
    except (FileNotFoundError, SafetensorError):
        return None


def write(folder: Path, name: str, result: dict[str, Tensor]) -> None:
    """Store a result; a reader sees all of it or nothing."""
    target = folder / name[:2] / f"{name}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, scratch = tempfile.mkstemp(dir=target.parent, suffix=".part")
    os.close(descriptor)
    try:
        save_file({label: value.contiguous() for label, value in result.items()}, scratch)
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
