"""A model folder: which of its files are read, and the name and revision that stand for them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
LONGEST = 60  # characters of a folder's name that its model keeps


def identity(folder: Path) -> tuple[str, str]:
    """The name and the revision of the model in a folder; they need no weights in memory.

    The name is that of the folder, links and `..` resolved, then "@" and the first 8 digits of the revision, so that
    two folders of one name are two models, and none is a registered one. It is safe as a file name and on a page: each
    run of characters that are not ASCII letters, digits, "-", "." or "_" becomes one "-", it begins with a letter or a
    digit, and is cut to 60 characters ("folder" where nothing is left).

    Raises ValueError for a folder without config.json or weights in safetensors, OSError where it cannot be read.
    """
    found = revision(folder)
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).lstrip("-._")[:LONGEST].rstrip("-.")
    return f"{plain or 'folder'}@{found[:8]}", found


def revision(folder: Path) -> str:
    """Hash of config.json, the weights that are read, the index that leads to them, and the tokenizer's files.

    Raises ValueError for a folder without config.json or weights in safetensors, OSError where it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=8)
    config(folder)
    for path in (folder / "config.json", *weights(folder)):
        digest.update(_digest(path))
    for path in (folder / INDEX, *tokenizer(folder)):
        if path.is_file():
            digest.update(path.name.encode() + _digest(path))
    return digest.hexdigest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").digest()


def config(folder: Path) -> dict:
    """What config.json says; ValueError where there is none, or no JSON object in it."""
    return _object(folder, "config.json")


def tokenizer(folder: Path) -> list[Path]:
    """The files of the tokenizer, in order."""
    return sorted({path for pattern in TOKENIZER for path in folder.glob(pattern) if path.is_file()})


def weights(folder: Path) -> list[Path]:
    """The files that weights are read from: model.safetensors, or those that the index names, wherever they lie.

    Raises ValueError where there are none, where files disagree on which to read, or the index names one that is not
    there.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if not index.is_file():
        if single.is_file():
            return [single]
        raise ValueError(
            f"{str(folder)!r} has no weights in safetensors: expected {WEIGHTS} or {INDEX}{_instead(folder)}"
        )
    read = _object(folder, INDEX)
    named, about = read.get("weight_map"), read.get("metadata")
    whole = isinstance(named, dict) and named and all(isinstance(name, str) and name for name in named.values())
    if not whole or not isinstance(about, dict):
        raise ValueError(
            f"{INDEX} in {str(folder)!r} is damaged: expected a file for each weight under 'weight_map', and "
            "'metadata'; fetch or save it anew"
        )
    shards = sorted(set(named.values()))
    if single.is_file() and shards != [WEIGHTS]:
        raise ValueError(
            f"{str(folder)!r} has its weights twice, in {WEIGHTS} and in the {len(shards)} files of {INDEX}, which may "
            "differ; remove one of the two"
        )
    if absent := [name for name in shards if not (folder / name).is_file()]:
        raise ValueError(
            f"{INDEX} in {str(folder)!r} names {len(absent)} of {len(shards)} files that are not there "
            f"({_few(absent)}); copy or fetch them too"
        )
    return [folder / name for name in shards]


def _instead(folder: Path) -> str:
    pickled = [p.name for p in sorted(folder.glob("*")) if p.suffix in (".bin", ".pt", ".pth", ".ckpt") and p.is_file()]
    if pickled:
        return (
            f"; pickled weights ({_few(pickled)}) are refused, as reading them can run code. Where you trust them, "
            "load them with transformers and save them with `save_pretrained`"
        )
    other = [p.name for p in sorted(folder.glob("*")) if p.suffix in (".safetensors", ".gguf")]
    return f", found {_few(other)}; save the model with `save_pretrained`" if other else ""


def _object(folder: Path, name: str) -> dict:
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} is not a model folder: it has no {name}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} in {str(folder)!r} is no JSON ({error}); fetch or save it anew") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} in {str(folder)!r} holds a {type(found).__name__}, expected an object; save it anew")
    return found


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
