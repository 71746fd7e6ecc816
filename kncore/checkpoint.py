"""A model folder: which of its files are read, the name and revision that stand for them, and what is not loaded.

What would give wrong numbers later is refused here, when the model is loaded: from its files before any weight is read
(`check_files`), and from the model and the tokenizer that came of them. Each kind of fault is a line of text, given to
`refuse`, which names the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kncore import arch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = (
    "tokenizer*.json special_tokens_map.json added_tokens.json vocab.* merges.txt *.model *.tiktoken tekken.json"
).split()
ADAPTER = re.compile(
    r"adapter_config\.json|(.*[_.-])?(adapters?|lora)([_.-].*)?\.(safetensors|bin|pt|pth|npz)", re.IGNORECASE
)
QUANTISED = (  # files, and keys of config.json
    "quantize_config.json quant_config.json hf_quant_config.json quantization_config compression_config"
).split()
FLOATS = {"F64", "F32", "F16", "BF16"}
SAMPLE = "The café in Paris had 1234 guests, didn't it?"
POINTER = b"version https://git-lfs"


def identity(folder: Path) -> tuple[str, str]:
    """Return the name and the revision of the model in a folder; they need no weights in memory.

    The name is that of the folder, links and `..` resolved, then "@" and the first 8 digits of the revision, so that
    two folders of one name are two models, and none is a registered one. It is safe as a file name and on a page: each
    run of characters that are not ASCII letters, digits, "-", "." or "_" becomes one "-", it begins with a letter or a
    digit, and is cut to 60 characters ("folder" where nothing is left).

    Raises ValueError for a folder without config.json or weights in safetensors, OSError where it cannot be read.
    """
    found = revision(folder)
    return plain_name(folder.resolve().name, found), found


def plain_name(name: str, revision: str) -> str:
    """Return the name of a model of one's own, from that of its folder or file; see `identity`."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("-._")[:60].rstrip("-.")
    return f"{plain or 'folder'}@{revision[:8]}"


def revision(folder: Path) -> str:
    """Return the hash of config.json, the weights that are read, the index that leads to them, and the tokenizer's
    files; raises what `identity` raises."""
    digest = hashlib.blake2b(digest_size=8)
    _object(folder, "config.json")
    for path in (folder / "config.json", *weights(folder)):
        digest.update(_digest(path))
    for path in _beside(folder):
        digest.update(path.name.encode() + _digest(path))
    return digest.hexdigest()


def stamps(folder: Path) -> list[tuple[int, int, int]]:
    """Return where the files that `revision` hashes lie on disk, how long they are, and when they were last written."""
    found = [path.stat() for path in (folder / "config.json", *weights(folder), *_beside(folder)) if path.is_file()]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found]


def _digest(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").digest()


def _beside(folder: Path) -> list[Path]:
    """Return the index, if there is one, and the files of the tokenizer, in order."""
    found = {path for pattern in (INDEX, *TOKENIZER) for path in folder.glob(pattern) if path.is_file()}
    return sorted(found, key=lambda path: (path.name != INDEX, path.name))


def tokenizer_class(folder: Path) -> str | None:
    """Return the class that tokenizer_config.json names, if there is one."""
    name = "tokenizer_config.json"
    return _object(folder, name).get("tokenizer_class") if (folder / name).is_file() else None


def weights(folder: Path) -> list[Path]:
    """Return the files that weights are read from: model.safetensors, or those that the index names, wherever they lie.

    Raises ValueError where there are none, where files disagree on which to read, or the index names one that is not
    there.
    """
    where, single = repr(str(folder)), (folder / WEIGHTS).is_file()
    if not (folder / INDEX).is_file():
        if single:
            return [folder / WEIGHTS]
        raise ValueError(f"{where} has no weights in safetensors: expected {WEIGHTS} or {INDEX}{_instead(folder)}")
    read = _object(folder, INDEX)
    named = read.get("weight_map")
    whole = isinstance(named, dict) and named and all(isinstance(name, str) and name for name in named.values())
    if not whole or not isinstance(read.get("metadata"), dict):
        expected = "expected a file for each weight under 'weight_map', and 'metadata'"
        raise ValueError(f"{INDEX} in {where} is damaged: {expected}; fetch or save it anew")
    shards = sorted(set(named.values()))
    if single and shards != [WEIGHTS]:
        both = f"in {WEIGHTS} and in the {len(shards)} files of {INDEX}"
        raise ValueError(f"{where} has its weights twice, {both}; remove one of the two")
    if absent := [name for name in shards if not (folder / name).is_file()]:
        there = f"{len(absent)} of {len(shards)} files that are not there ({_few(absent)})"
        raise ValueError(f"{INDEX} in {where} names {there}; copy or fetch them too")
    return [folder / name for name in shards]


@contextlib.contextmanager
def quiet(transformers) -> Iterator[None]:
    """Open a context without progress bars and load reports of transformers; its settings come back afterwards."""
    logging = transformers.utils.logging
    with contextlib.ExitStack() as before:
        before.callback(logging.set_verbosity, logging.get_verbosity())
        if logging.is_progress_bar_enabled():
            before.callback(logging.enable_progress_bar)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield


def refuse(folder: Path, faults: Iterable[str]) -> None:
    """Raise ValueError for the first fault of a model folder, if there is one."""
    for fault in faults:
        raise ValueError(f"{str(folder)!r} {fault}")


def check_files(folder: Path) -> arch.ArchSpec:
    """Return the family of the model in a folder, as far as its files can say it; nothing is loaded.

    Raises ValueError with the cause and what to do: for adapters, quantised weights, code of the model's own, another
    family, attention in the wrong direction, and files that are absent, empty, damaged, or do not fit each other.
    """
    if adapters := [path.name for path in sorted(folder.glob("*")) if ADAPTER.fullmatch(path.name)]:
        merge = "merge it into the model (peft: `merge_and_unload`, then `save_pretrained` into another folder)"
        refuse(folder, [f"holds an adapter ({_few(adapters)}), which would be left out; {merge}"])
    config = _object(folder, "config.json")
    spec = arch.spec_for(config.get("model_type", "(none in config.json)"))
    refuse(folder, chain(_faults_of_config(folder, config, spec), _faults_of_weights(folder, spec)))
    return spec


def _faults_of_config(folder: Path, config: Mapping, spec: arch.ArchSpec) -> Iterator[str]:
    for name in QUANTISED:
        if config.get(name) is not None or (folder / name).is_file():
            yield f"is quantised ({name}); give the model it was made of, or `dequantize` and save it with transformers"
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and (code := _object(folder, name).get("auto_map")):
            yield (
                f"asks for code of its own ('auto_map' in {name}: {str(code)[:100]}), which is not run; where the "
                f"classes of transformers compute the same, remove 'auto_map' from {name}"
            )
    if elsewhere := config.get("transformers_weights"):
        yield (
            f"has its weights in {str(elsewhere)!r}; rename that to {WEIGHTS} or {INDEX} and remove "
            "'transformers_weights' from config.json"
        )
    named, pad, rows = (config.get(name) for name in ("architectures", "pad_token_id", "vocab_size"))
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        yield f"has a config.json whose 'architectures' is {named!r}, expected a list of names; correct it"
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        yield f"has a config.json whose 'pad_token_id' is {pad}, beyond the {rows} embeddings; set it to null"
    turned = [name for name in ("add_cross_attention", "is_encoder_decoder") if config.get(name)]
    turned += ["is_decoder"] if spec.masked and config.get("is_decoder") else []
    turned += [] if spec.masked or config.get("is_causal", True) else ["is_causal"]
    if turned:
        settings = ", ".join(f"{name} = {config[name]!r}" for name in turned)
        reads = "in both directions" if spec.masked else "from left to right"
        yield f"has {settings}, expected a {spec.family} that reads {reads}; give a checkpoint of that kind"


def _faults_of_weights(folder: Path, spec: arch.ArchSpec) -> Iterator[str]:
    if parts := [path.name for path in sorted(folder.glob("shard-*.safetensors"))]:
        yield f"holds parts of a distributed checkpoint ({_few(parts)}); `save_pretrained` the whole model elsewhere"
    found: dict[str, str] = {}
    for path in weights(folder):
        with _opened(path) as file:
            for name in file.keys():
                if name in found:
                    yield f"has the weight {name} twice, in {found[name]} and in {path.name}; save the model anew"
                found[name] = path.name
                kind = file.get_slice(name).get_dtype()
                if kind not in FLOATS and not re.search(spec.spare, name):
                    yield f"holds {name} as {kind}: quantised weights? Give the model in floating-point numbers"
    if (folder / INDEX).is_file() and (apart := sorted(found.keys() ^ _object(folder, INDEX)["weight_map"].keys())):
        yield f"has an {INDEX} that does not fit its files: {_few(apart)} stand in one alone; save the model anew"


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


def check_rotation(folder: Path, rope: object) -> None:
    """Raise ValueError for rotary embeddings that change with the longest prompt of a batch, by their parameters."""
    for part in (rope, *rope.values()) if isinstance(rope, dict) else ():
        kind = part.get("rope_type") if isinstance(part, dict) else None
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
            expected = "expected another type in 'rope_parameters' of config.json (default, linear, llama3, yarn)"
            found = f"rotary embeddings of type {kind!r}, which change with the longest prompt of a batch"
            raise ValueError(f"{str(folder)!r} has {found}; {expected}")


def check_loaded(folder: Path, tokenizer, model: nn.Module, spec: arch.ArchSpec, info: Mapping[str, object]) -> None:
    """Raise ValueError unless what transformers made of a folder is what its files hold; `info` is what it says of it.

    The weights of the files are the model's, one for one; weights that no result depends on may be there beside them
    (`ArchSpec.spare`), and so may equal copies of a weight that is tied to another. The tokenizer is a fast one, with a
    mask where one is needed, and its ids have embeddings.
    """
    refuse(folder, _faults_of_model(folder, model, spec, info))
    refuse(folder, _faults_of_tokenizer(folder, tokenizer, model, spec))


def _faults_of_model(folder: Path, model: nn.Module, spec: arch.ArchSpec, info: Mapping) -> Iterator[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_PRETRAINING_MAPPING_NAMES

    kind = type(model).__name__
    known = {kind, type(model.base_model).__name__, MODEL_FOR_PRETRAINING_MAPPING_NAMES.get(spec.family, kind)}
    if (named := model.config.architectures) and not known & set(named):
        yield (
            f"has a config.json that says {_few(named)} ('architectures'), expected one of {', '.join(sorted(known))}: "
            "the model was trained for something else. Give a language model; where it is one, correct 'architectures'"
        )
    if wrong := sorted(info["mismatched_keys"]):
        mismatches = [f"{name} of shape {tuple(there)}, expected {tuple(here)}" for name, there, here in wrong]
        yield f"holds {_few(mismatches)}: config.json is that of another model; give the two that fit"
    if missing := sorted(info["missing_keys"]):
        yield f"lacks the weights of {_few(missing)}: they would be random; use a checkpoint of {kind} with its head"
    # transformers passes over more than it says: of a name it looks at a part, such as "attn.bias" in "c_attn.bias2".
    loose, base = model._keys_to_ignore_on_load_unexpected or (), f"{model.base_model_prefix}."
    passed = {
        name for path in weights(folder) for name in _opened(path).keys() if any(re.search(p, name) for p in loose)
    }
    own = model.state_dict().keys()
    passed = {name for name in passed if not {name, base + name, name.removeprefix(base)} & own}
    if more := sorted(name for name in passed | set(info["unexpected_keys"]) if not re.search(spec.spare, name)):
        yield (
            f"holds {len(more)} weights that a {kind} of its config.json does not have ({_few(more)}), which would "
            "be left out; correct config.json (the number of blocks?), or save the model without them"
        )
    tied = model._tied_weights_keys if getattr(model.config, "tie_word_embeddings", False) else None
    for copy, source in (tied or {}).items():
        first, second = model.get_parameter(copy), model.get_parameter(source)
        if first is not second and not first.is_meta and not second.is_meta:
            yield f"ties {copy} to {source}, but both are there and differ; set 'tie_word_embeddings' to false"


def _faults_of_tokenizer(folder: Path, tokenizer, model: nn.Module, spec: arch.ArchSpec) -> Iterator[str]:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes up where there are no files
        yield "holds no tokenizer; save it there with `tokenizer.save_pretrained`"
    kind = type(tokenizer).__name__
    if not tokenizer.is_fast:
        yield f"has a tokenizer ({kind}) without a fast version (tokenizer.json), which is needed; save one there"
    if (folder / "tokenizer.json").is_file() and type(tokenizer) is not PreTrainedTokenizerFast:
        written = Tokenizer.from_file(str(folder / "tokenizer.json"))
        written.no_truncation()
        written.no_padding()
        if written.encode(SAMPLE, add_special_tokens=False).ids != tokenizer.encode(SAMPLE, add_special_tokens=False):
            yield (
                f"has a tokenizer that transformers reads as a {kind}, which splits {SAMPLE!r} otherwise than "
                "tokenizer.json does; set 'tokenizer_class' beside it to 'PreTrainedTokenizerFast' if it is right"
            )
    if spec.masked and tokenizer.mask_token is None:
        yield "is a masked language model, but its tokenizer has no mask token; save one that has"
    rows = model.get_input_embeddings().weight.shape[0]
    ids = tokenizer.get_vocab() | {"what it adds to each text": max(tokenizer("a")["input_ids"], default=0)}
    if outside := sorted((number, name) for name, number in ids.items() if number >= rows):
        number, name = outside[0]
        first = f"the first {name!r} with id {number}"
        yield f"has {len(outside)} tokens beyond the model's {rows} embeddings, {first}; remove them from the tokenizer"


@torch.no_grad()
def check_numbers(folder: Path, model: nn.Module, dtype: torch.dtype) -> None:
    """Raise ValueError for a weight or a buffer that is not finite; weights that stay on disk are read for that."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    if any(parameter.is_meta for parameter in model.parameters()):
        on_disk = ((name, tensor.to(dtype)) for name, tensor in _stored(folder) if tensor.is_floating_point())
        tensors = chain(tensors, on_disk)
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.is_meta and not _finite(tensor):
            refuse(folder, [f"cannot be used: {_infinite(folder, name, dtype)}"])


def _finite(tensor: Tensor) -> bool:
    # A sum is one fast pass; it can overflow where no number has.
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def _infinite(folder: Path, name: str, dtype: torch.dtype) -> str:
    held = next((tensor for key, tensor in _stored(folder) if name == key or name.endswith(f".{key}")), None)
    if held is None:
        return f"{name} is not finite, computed from what config.json says; correct it there"
    if not _finite(held):
        return f"{name} holds numbers that are not finite (NaN or infinity): training failed, or the file is damaged"
    most, reached = f"{torch.finfo(dtype).max:.3g}", f"{float(held.abs().max()):.3g}"
    return f"{name} reaches {reached}, more than {_short(dtype)} holds ({most}); load it as bfloat16 or float32"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in weights(folder):
        with _opened(path) as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


@torch.no_grad()
def check_direction(folder: Path, tokenizer, model: nn.Module, spec: arch.ArchSpec) -> None:
    """Raise ValueError unless a causal model's logits stay as they are when a later token changes, a masked model's do
    not, and all are finite; asked with three tokens. A model with weights on disk is not asked: it would take long.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        refuse(folder, _faults_of_logits(tokenizer, model, spec))


def _faults_of_logits(tokenizer, model: nn.Module, spec: arch.ArchSpec) -> Iterator[str]:
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
        yield f"cannot read three tokens ({reason}); correct its config.json"
        return
    if not bool(logits.isfinite().all()):
        yield "gives logits that are not finite for three tokens; correct config.json, or load it as float32"
    before = logits[:, :2].float()
    change = float((before[0] - before[1]).abs().max())
    if spec.masked and not change:
        yield "reads from left to right, and is of a family that reads both ways; give a model that does"
    rounding = torch.finfo(logits.dtype).eps ** (1 if apart else 0.5)
    if not spec.masked and change > rounding * float(before.abs().max()):
        yield f"also reads from right to left: a later token changed earlier logits by {change:.2g}; give a causal one"


def _instead(folder: Path) -> str:
    """Return what a folder without safetensors holds instead, and what to do with it."""
    names = sorted(path.name for path in folder.glob("*") if path.is_file())
    if pickled := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"; pickled weights ({_few(pickled)}) are refused, as they can run code; save them with `save_pretrained`"
        )
    if files := [name for name in names if name.endswith(".gguf")]:
        return f", found {_few(files)}; name that file itself"
    other = [name for name in names if name.endswith(".safetensors")]
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
