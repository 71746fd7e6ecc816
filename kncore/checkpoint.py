"""A model folder: which of its files are read, the name and revision that stand for them, and what is not loaded.

What would give wrong numbers later is refused here, when the model is loaded: from its files before any weight is read
(`check_files`), and from the model and the tokenizer that came of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kncore import arch

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
ADAPTER = re.compile(
    r"adapter_config\.json|(.*[_.-])?(adapters?|lora)([_.-].*)?\.(safetensors|bin|pt|pth|npz)", re.IGNORECASE
)
QUANTISED_KEYS = ("quantization_config", "compression_config")
QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
FLOATS = {"F64", "F32", "F16", "BF16"}
SAMPLE = "The café in Paris had 1234 guests, didn't it?"
POINTER = b"version https://git-lfs"
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
    for path in beside(folder):
        digest.update(path.name.encode() + _digest(path))
    return digest.hexdigest()


def stamps(folder: Path) -> list[tuple[int, int, int]]:
    """Where the files that `revision` hashes lie on disk, how long they are, and when they were last written."""
    found = [path.stat() for path in (folder / "config.json", *weights(folder), *beside(folder)) if path.is_file()]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found]


def _digest(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").digest()


def config(folder: Path) -> dict:
    """What config.json says; ValueError where there is none, or no JSON object in it."""
    return _object(folder, "config.json")


def beside(folder: Path) -> list[Path]:
    """The index, if there is one, and the files of the tokenizer, in order."""
    found = {path for pattern in (INDEX, *TOKENIZER) for path in folder.glob(pattern) if path.is_file()}
    return sorted(found, key=lambda path: (path.name != INDEX, path.name))


def tokenizer_class(folder: Path) -> str | None:
    """The class that tokenizer_config.json names, if there is one."""
    name = "tokenizer_config.json"
    return _object(folder, name).get("tokenizer_class") if (folder / name).is_file() else None


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


# ---------------------------------------------------------------------------------------- before a weight is read


def check_files(folder: Path) -> arch.ArchSpec:
    """The family of the model in a folder, as far as its files can say it; nothing is loaded.

    Raises ValueError with the cause and what to do: for adapters, quantised weights, code of the model's own, another
    family, attention in the wrong direction, and files that are absent, empty, damaged, or do not fit each other.
    """
    where = repr(str(folder))
    if adapters := [path.name for path in sorted(folder.glob("*")) if ADAPTER.fullmatch(path.name)]:
        raise ValueError(
            f"{where} holds an adapter ({_few(adapters)}), which would be left out; merge it into the model (peft: "
            "`merge_and_unload`, then `save_pretrained` into another folder)"
        )
    said = config(folder)
    spec = arch.spec_for(said.get("model_type", "(none in config.json)"))
    for name in (*QUANTISED_FILES, *QUANTISED_KEYS):
        if said.get(name) is not None or (folder / name).is_file():
            raise ValueError(
                f"{where} is quantised ({name}), and its weights are not what is computed with; give the model that it "
                "was made of, or load it with transformers, `dequantize` it, and save it with `save_pretrained`"
            )
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and (code := _object(folder, name).get("auto_map")):
            raise ValueError(
                f"{where} asks for code of its own ('auto_map' in {name}: {str(code)[:100]}), which is not run; where "
                f"the classes of transformers compute the same, remove 'auto_map' from {name}"
            )
    if elsewhere := said.get("transformers_weights"):
        raise ValueError(
            f"config.json in {where} has its weights in {str(elsewhere)!r}; rename that to {WEIGHTS} or {INDEX} and "
            "remove 'transformers_weights' from config.json"
        )
    named, pad, rows = said.get("architectures"), said.get("pad_token_id"), said.get("vocab_size")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ValueError(f"config.json in {where}: 'architectures' is {named!r}, expected a list of names; correct it")
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        raise ValueError(
            f"config.json in {where}: 'pad_token_id' is {pad}, beyond the {rows} embeddings ('vocab_size'); set it to "
            "null, or to the tokenizer's"
        )
    turned = [name for name in ("add_cross_attention", "is_encoder_decoder") if said.get(name)]
    turned += ["is_decoder"] if spec.masked and said.get("is_decoder") else []
    turned += [] if spec.masked or said.get("is_causal", True) else ["is_causal"]
    if turned:
        kind = (
            "masked language model that reads in both directions" if spec.masked else "model that reads left to right"
        )
        raise ValueError(
            f"config.json in {where} has {', '.join(f'{name} = {said[name]!r}' for name in turned)}, expected a {kind} "
            f"of the family {spec.family}; give a checkpoint of that kind"
        )
    _check_stored(folder, spec)
    return spec


def _check_stored(folder: Path, spec: arch.ArchSpec) -> None:
    """Raises ValueError unless the weights' files are whole, agree with the index, and hold floating-point numbers."""
    where = repr(str(folder))
    if parts := [path.name for path in sorted(folder.glob("shard-*.safetensors"))]:
        raise ValueError(
            f"{where} holds parts of a distributed checkpoint ({_few(parts)}); save the whole model with "
            "`save_pretrained` into another folder"
        )
    found: dict[str, Path] = {}
    for path in weights(folder):
        with _opened(path) as file:
            for name in file.keys():
                if name in found:
                    raise ValueError(
                        f"{where} has the weight {name} twice, in {found[name].name} and in {path.name}; save the "
                        "model anew with `save_pretrained`"
                    )
                found[name] = path
                kind = file.get_slice(name).get_dtype()
                if kind not in FLOATS and not re.search(spec.spare, name):
                    raise ValueError(
                        f"{where} holds {name} as {kind}: quantised weights, or none of a {spec.family} model; give "
                        "the model with its weights as floating-point numbers"
                    )
    if (folder / INDEX).is_file():
        named = _object(folder, INDEX)["weight_map"]
        if apart := sorted(found.keys() ^ named.keys()):
            raise ValueError(
                f"{INDEX} in {where} does not fit its files: {_few(apart)} stand in one and not in the other; save the "
                "model anew with `save_pretrained`"
            )


def _opened(path: Path):
    with path.open("rb") as stream:
        start = stream.read(len(POINTER))
    if start == POINTER:
        raise ValueError(f"{str(path)!r} is a pointer of Git LFS and not the weights; fetch them with `git lfs pull`")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        why = "it is empty" if not start else error
        raise ValueError(f"{str(path)!r} is damaged ({why}); get an intact copy of it") from error


# ---------------------------------------------------------------------------------------- after it has been loaded


def check_rotation(folder: Path, rope: object) -> None:
    """Raises ValueError for rotary embeddings that change with the longest prompt of a batch; `rope` are their
    parameters in the model's configuration.
    """
    for part in (rope, *rope.values()) if isinstance(rope, dict) else ():
        kind = part.get("rope_type") if isinstance(part, dict) else None
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
            raise ValueError(
                f"{str(folder)!r} has rotary embeddings of type {kind!r}, which change with the longest prompt of a "
                "batch, so that a prompt's numbers would depend on the others; give a model whose 'rope_parameters' in "
                "config.json are of another type (default, linear, llama3, yarn)"
            )


def check_weights(folder: Path, model: nn.Module, spec: arch.ArchSpec, info: Mapping[str, object]) -> None:
    """Raises ValueError unless the weights of the files are the model's, one for one; `info` is what transformers says.

    Weights that no result depends on may be there beside them (`ArchSpec.spare`), and so may equal copies of a weight
    that is tied to another.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_PRETRAINING_MAPPING_NAMES

    where, kind = repr(str(folder)), type(model).__name__
    known = {kind, type(model.base_model).__name__, MODEL_FOR_PRETRAINING_MAPPING_NAMES.get(spec.family, kind)}
    if (named := model.config.architectures) and not known & set(named):
        raise ValueError(
            f"config.json in {where} says {_few(named)} ('architectures'), expected one of {', '.join(sorted(known))}: "
            "the model was trained for something else. Give a language model; where it is one, correct 'architectures'"
        )
    if wrong := sorted(info["mismatched_keys"]):
        told = [f"{name} of shape {tuple(there)}, expected {tuple(here)}" for name, there, here in wrong]
        raise ValueError(f"{where} holds {_few(told)}: config.json is that of another model; give the two that fit")
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{where} lacks the weights of {_few(missing)}: they would be random. Use a checkpoint of {kind}, with its "
            "language-model head."
        )
    # transformers passes over more than it says: of a name it looks at a part, such as "attn.bias" in "c_attn.bias2".
    loose, base = model._keys_to_ignore_on_load_unexpected or (), f"{model.base_model_prefix}."
    passed = {
        name for path in weights(folder) for name in _opened(path).keys() if any(re.search(p, name) for p in loose)
    }
    own = model.state_dict().keys()
    passed = {name for name in passed if not {name, base + name, name.removeprefix(base)} & own}
    if more := sorted(name for name in passed | set(info["unexpected_keys"]) if not re.search(spec.spare, name)):
        raise ValueError(
            f"{where} holds {len(more)} weights that a {kind} of its config.json does not have ({_few(more)}), and "
            "they would be left out; correct config.json (the number of blocks?), or save the model without them"
        )
    tied = model._tied_weights_keys if getattr(model.config, "tie_word_embeddings", False) else None
    for one, other in (tied or {}).items():
        first, second = model.get_parameter(one), model.get_parameter(other)
        if first is not second and not first.is_meta and not second.is_meta:
            raise ValueError(
                f"config.json in {where} ties {one} to {other}, but both are there and differ; set "
                "'tie_word_embeddings' to false if the model has a head of its own, or remove the wrong one"
            )


@torch.no_grad()
def check_numbers(folder: Path, model: nn.Module, dtype: torch.dtype) -> None:
    """Raises ValueError for a weight or a buffer that is not finite; weights that stay on disk are read for that."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and not tensor.is_meta and not _finite(tensor):
            raise ValueError(f"{str(folder)!r}: {_infinite(folder, name, dtype)}")
    if any(parameter.is_meta for parameter in model.parameters()):
        for name, tensor in _stored(folder):
            if tensor.is_floating_point() and not _finite(tensor.to(dtype)):
                raise ValueError(f"{str(folder)!r}: {_infinite(folder, name, dtype)}")


def _finite(tensor: Tensor) -> bool:
    # A sum is one fast pass; it can overflow where no number has.
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def _infinite(folder: Path, name: str, dtype: torch.dtype) -> str:
    held = next((tensor for key, tensor in _stored(folder) if name == key or name.endswith(f".{key}")), None)
    if held is None:
        return f"{name} is not finite, computed from what config.json says; correct it there"
    if _finite(held):
        most = f"{torch.finfo(dtype).max:.3g}"
        return (
            f"{name} reaches {float(held.abs().max()):.3g}, more than {str(dtype).removeprefix('torch.')} holds "
            f"({most}); load it as bfloat16 or float32"
        )
    return f"{name} holds numbers that are not finite (NaN or infinity): training failed, or the file is damaged"


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in weights(folder):
        with _opened(path) as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def check_tokenizer(folder: Path, tokenizer, model: nn.Module, spec: arch.ArchSpec) -> None:
    """Raises ValueError unless it is a fast tokenizer, with a mask where one is needed, and ids that the model has."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    where = repr(str(folder))
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes up where there are no files
        raise ValueError(f"{where} holds no tokenizer; save it there with `tokenizer.save_pretrained`")
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {where} ({type(tokenizer).__name__}) has no fast version, which says where in a text "
            "its tokens are; save one there (`PreTrainedTokenizerFast`, a tokenizer.json)"
        )
    if (folder / "tokenizer.json").is_file() and type(tokenizer) is not PreTrainedTokenizerFast:
        written = Tokenizer.from_file(str(folder / "tokenizer.json"))
        written.no_truncation()
        written.no_padding()
        if written.encode(SAMPLE, add_special_tokens=False).ids != tokenizer.encode(SAMPLE, add_special_tokens=False):
            raise ValueError(
                f"transformers reads the tokenizer of {where} as a {type(tokenizer).__name__}, which splits {SAMPLE!r} "
                "otherwise than tokenizer.json does; set 'tokenizer_class' in tokenizer_config.json to "
                "'PreTrainedTokenizerFast' if tokenizer.json is right"
            )
    if spec.masked and tokenizer.mask_token is None:
        raise ValueError(f"{where} is a masked language model, but its tokenizer has no mask token")
    rows = model.get_input_embeddings().weight.shape[0]
    ids = tokenizer.get_vocab() | {"what it adds to each text": max(tokenizer("a")["input_ids"], default=0)}
    outside = sorted((number, name) for name, number in ids.items() if number >= rows)
    if outside:
        number, name = outside[0]
        raise ValueError(
            f"the tokenizer of {where} has {len(outside)} tokens beyond the model's {rows} embeddings, the first "
            f"{name!r} with id {number}; remove them from the tokenizer, or train the model with embeddings for them"
        )


@torch.no_grad()
def check_direction(folder: Path, tokenizer, model: nn.Module, spec: arch.ArchSpec) -> None:
    """Raises ValueError unless a causal model's logits stay as they are when a later token changes, a masked model's do
    not, and all are finite; asked with three tokens. A model with weights on disk is not asked: it would take long.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    table = model.get_input_embeddings().weight
    special = set(tokenizer.all_special_ids)
    some = [i for i in range(0, len(tokenizer), max(1, len(tokenizer) // 64)) if i not in special and i < len(table)]
    some = torch.tensor(some, device=table.device)
    first, last = some[0], some[(table[some] - table[some[0]]).abs().sum(1).argmax()]
    rows = torch.stack([first, first, first, first, first, last]).reshape(2, 3)
    # Equal numbers are computed alike to the last bit one by one; in a batch, which takes half the time, nearly so.
    apart = spec.masked or table.dtype.itemsize < 4
    try:
        parts = rows.split(1 if apart else 2)
        logits = torch.cat([model(input_ids=part, attention_mask=torch.ones_like(part)).logits for part in parts])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"the model in {str(folder)!r} cannot read three tokens ({reason}); correct its config.json"
        ) from error
    if not bool(logits.isfinite().all()):
        raise ValueError(
            f"the model in {str(folder)!r} gives logits that are not finite for three tokens, as "
            f"{str(logits.dtype).removeprefix('torch.')}; load it as float32, or correct its config.json"
        )
    before = logits[:, :2].float()
    change = float((before[0] - before[1]).abs().max())
    if spec.masked and not change:
        raise ValueError(
            f"the model in {str(folder)!r} reads from left to right, and is of a family that reads both ways"
        )
    rounding = torch.finfo(logits.dtype).eps ** (1 if apart else 0.5)
    if not spec.masked and change > rounding * float(before.abs().max()):
        raise ValueError(
            f"the model in {str(folder)!r} also reads from right to left: a later token changed the logits of an "
            f"earlier one by {change:.2g}; a {spec.family} model is used here from left to right"
        )


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
    return " ".join((", ".join(names[:4]) + (" …" if len(names) > 4 else "")).split())
