"""GGUF files, the format of llama.cpp: what is read of them, what is refused, and how they become a model folder.

transformers reads them, but passes over what it does not know, and then the numbers are others: such files are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from kncore import arch, checkpoint
from kncore.store import disk

MAGIC = b"GGUF"
ORIGINAL = "give the folder of safetensors that it was made from"
# Of the keys of a family, those that transformers makes a config of; the others must say what the model is anyway.
NEEDED = "block_count context_length embedding_length feed_forward_length attention.head_count".split()
READ = {
    "gpt2": {*NEEDED, "attention.layer_norm_epsilon"},
    **dict.fromkeys(
        ("llama", "qwen2", "mistral"),
        {*NEEDED, "attention.layer_norm_rms_epsilon", "attention.head_count_kv", "rope.freq_base", "vocab_size"},
    ),
}
OPTIONAL = {"attention.head_count_kv", "rope.freq_base", "vocab_size"}  # llama.cpp and transformers assume the same
LONG = {f"tokenizer.ggml.{name}" for name in ("merges", "scores", "token_type")}  # not looked at, and slow to read
# How byte-level tokenizers cut text before their merges, where transformers rightly cuts as GPT-2 does: SmolLM cuts
# between digits too, but has no merges of digits.
AS_GPT2 = {"gpt-2", "smollm"}


def identity(path: Path) -> tuple[str, str]:
    """Return the name and the revision of the model in a file: its name with the first digits of its hash, and 16 of
    them. Raises OSError where it cannot be read."""
    revision = disk.digest(path)[:16]
    return checkpoint.plain_name(path.resolve().stem, revision), revision


def check(path: Path) -> arch.ArchSpec:
    """Return the family of the model in a file; of its weights nothing is read.

    Raises ValueError with the cause and what to do: for a file that is no GGUF, damaged, or a part of one, and for a
    family, a setting or a tokenizer that would be passed over.
    """
    return _checked(path)[0]


def _checked(path: Path) -> tuple[arch.ArchSpec, dict[str, object], dict[str, int]]:
    """Return what `check` returns, what the file says beside its weights, and how many numbers each weight has."""
    with path.open("rb") as stream:
        start = stream.read(len(checkpoint.POINTER))
    if start == checkpoint.POINTER:
        raise ValueError(f"{str(path)!r} is a pointer of Git LFS and not the model; fetch it with `git lfs pull`")
    if not start.startswith(MAGIC):
        raise ValueError(f"{str(path)!r} is no GGUF file, whatever its name says: get an intact copy")
    fields, counts = _read(path)
    family = str(fields.get("general.architecture"))
    spec = arch.spec_for(family)
    if family not in READ:
        checkpoint.refuse(path, [f"is a {family}; of GGUF, {', '.join(READ)} are read; {ORIGINAL}"])
    checkpoint.refuse(path, _faults(fields, counts, family))
    return spec, fields, counts


def _read(path: Path) -> tuple[dict[str, object], dict[str, int]]:
    """Return what a file says beside its weights, and how many numbers each has; ValueError if it is damaged."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if name not in LONG}
        return fields, {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    except (ValueError, LookupError, ArithmeticError, MemoryError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{str(path)!r} is damaged or not whole ({reason}); get an intact copy") from error


def _faults(fields: Mapping[str, object], counts: Mapping[str, int], family: str) -> Iterator[str]:
    if (kind := fields.get("general.type", "model")) != "model":
        yield f"holds no model but: {kind}; give the model itself, with adapters merged into it"
    if (parts := fields.get("split.count") or 1) > 1:
        yield f"is one of {parts} parts; join them with llama.cpp's `llama-gguf-split --merge`"
    if absent := sorted(name for name in READ[family] - OPTIONAL if not _is_number(fields.get(f"{family}.{name}"))):
        yield f"has no number for {family}.{absent[0]}; convert the model anew"
        return
    width = fields[f"{family}.embedding_length"] // fields[f"{family}.attention.head_count"]
    implied = {"attention.key_length": width, "attention.value_length": width, "rope.dimension_count": width}
    implied |= {"rope.scaling.factor": 1, "attention.causal": True, "tensor_data_layout": "Meta AI original pth"}
    for key, value in fields.items():
        setting = key.removeprefix(f"{family}.")
        if setting != key and setting not in READ[family] and value not in (0, "none", "", implied.get(setting)):
            yield f"sets {key} = {str(value)[:50]}, which transformers does not read; {ORIGINAL}"
    if "rope_freqs.weight" in counts:
        yield f"scales its rotary embeddings (rope_freqs.weight), which transformers does not read; {ORIGINAL}"
    yield from _faults_of_tokenizer(fields)


def _is_number(value: object) -> bool:
    """Return whether a setting is one number above zero, and not a list with one for each block."""
    return isinstance(value, int | float) and value > 0


def _faults_of_tokenizer(fields: Mapping[str, object]) -> Iterator[str]:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind not in ("gpt2", "llama"):
        yield f"has a tokenizer of the kind {kind!r}, expected 'gpt2' or 'llama'; {ORIGINAL}"
    if kind == "gpt2" and pre not in AS_GPT2 | GGUF_PRE_TOKENIZER_SPLITS.keys():
        says = f"cuts text as {pre!r} does" if pre else "does not say how it cuts text (tokenizer.ggml.pre)"
        yield f"has a tokenizer that {says}, and would be read as GPT-2's; {ORIGINAL}"


def save(path: Path, target: Path) -> None:
    """Write the model of a file into a folder, in float32, with its tokenizer.

    Each number of the file is a weight of the model, and each weight comes from the file. Raises what `check` raises,
    and ValueError for a file that does not fit what it says of itself, or a tokenizer that is not that of the file.
    """
    import transformers

    _, fields, counts = _checked(path)
    options = {"gguf_file": path.name, "trust_remote_code": False}
    with checkpoint.quiet(transformers):
        try:
            loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=torch.float32, output_loading_info=True, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
            raise ValueError(f"{str(path)!r} cannot be read by transformers ({reason}); {ORIGINAL}") from error
        checkpoint.refuse(path, _faults_of_conversion(loaded, info, tokenizer, fields, counts))
        # save_pretrained refuses a model that says it is quantised; the weights no longer are.
        vars(loaded.config).pop("quantization_config", None)
        plain = type(loaded)(loaded.config)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _faults_of_conversion(model, info: Mapping, tokenizer, fields: Mapping, counts: Mapping[str, int]) -> Iterator[str]:
    if missing := sorted(info["missing_keys"]):
        yield f"lacks {', '.join(missing[:4])}, which would be random; get an intact copy"
    there, here = sum(counts.values()), sum(parameter.numel() for parameter in model.parameters())
    if there != here:
        strange = [
            name
            for name in counts
            if not re.fullmatch(r"(blk\.\d+\.\w+|token_embd|position_embd|output\w*)\.\w+", name)
        ]
        more = f" ({', '.join(strange[:4])}?)" if strange else ""
        yield f"holds {there:,} numbers, but its {type(model).__name__} has {here:,}{more}; {ORIGINAL}"
    words = fields["tokenizer.ggml.tokens"]
    read = tokenizer.convert_ids_to_tokens(list(range(len(words))))
    if wrong := [(word, other) for word, other in zip(words, read, strict=True) if word != other]:
        yield f"has {len(wrong)} tokens that transformers reads otherwise, the first {wrong[0]}; {ORIGINAL}"
    adds, first = fields.get("tokenizer.ggml.add_bos_token"), fields.get("tokenizer.ggml.bos_token_id")
    begins = tokenizer("a")["input_ids"][:1] == [first]
    if adds is not None and bool(adds) != begins:
        says = "begins" if adds else "does not begin"
        yield f"says that a text {says} with token {first}, and transformers reads it otherwise; {ORIGINAL}"
