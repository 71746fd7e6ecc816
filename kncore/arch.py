"""Architecture as data: where a transformer keeps its blocks, its neurons and its head.

Everything that differs between model families is in the table `SPECS`. To support another family, add a row; the
row is checked against the model when it is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn


class Site(NamedTuple):
    """A place inside a block: the input or the output of the module at a dotted path ("" is the block itself)."""

    path: str
    side: str  # "input" or "output"


BUFFERS = r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias|embeddings\.(position|token_type)_ids)$"


@dataclass(frozen=True)
class ArchSpec:
    """One model family.

    `sites` names the places that can be read and changed inside a block: `neuron` (the coefficients of the value
    vectors), `published` (where the published code of Niu et al. reads them), `mlp`, `attention` (what each adds to the
    residual stream) and `residual` (what enters the block). `spare` is a pattern of the weights that a checkpoint may
    hold and no result depends on: heads for other tasks, and buffers that are computed anew.
    """

    family: str
    blocks: str
    sites: Mapping[str, Site]
    norm: str | None
    head: str
    masked: bool = False
    cache: str = "past_key_values"
    spare: str = BUFFERS


def _sites(projection: str, published: Site, mlp: str, attention: str) -> dict[str, Site]:
    return {
        "neuron": Site(projection, "input"),
        "published": published,
        "mlp": Site(mlp, "output"),
        "attention": Site(attention, "output"),
        "residual": Site("", "input"),
    }


NEURON_SITES = ("neuron", "published")  # with a state for each neuron
_LLAMA_SITES = _sites("mlp.down_proj", Site("mlp.gate_proj", "output"), "mlp", "self_attn.o_proj")
_GPT2_SITES = _sites("mlp.c_proj", Site("mlp.c_fc", "output"), "mlp", "attn.c_proj")
_NEOX_SITES = _sites("mlp.dense_4h_to_h", Site("mlp.dense_h_to_4h", "output"), "mlp", "attention.dense")
_NEOX_NORM = "gpt_neox.final_layer_norm"
# In BERT the projection is followed by dropout and a normalisation that also sees the residual stream, so what the
# MLP adds is the output of the projection itself.
_BERT_SITES = _sites("output.dense", Site("intermediate", "output"), "output.dense", "attention.output.dense")
_ROBERTA_SPARE = BUFFERS + r"|(^|\.)pooler\.dense\.(weight|bias)$"
_BERT_SPARE = _ROBERTA_SPARE + r"|^cls\.seq_relationship\.(weight|bias)$"

SPECS: dict[str, ArchSpec] = {
    spec.family: spec
    for spec in (
        ArchSpec("bert", "bert.encoder.layer", _BERT_SITES, None, "cls", masked=True, spare=_BERT_SPARE),
        ArchSpec("roberta", "roberta.encoder.layer", _BERT_SITES, None, "lm_head", masked=True, spare=_ROBERTA_SPARE),
        ArchSpec("gpt2", "transformer.h", _GPT2_SITES, "transformer.ln_f", "lm_head"),
        ArchSpec("gpt_neox", "gpt_neox.layers", _NEOX_SITES, _NEOX_NORM, "lm_head", cache="layer_past"),
        ArchSpec("llama", "model.layers", _LLAMA_SITES, "model.norm", "lm_head"),
        ArchSpec("qwen2", "model.layers", _LLAMA_SITES, "model.norm", "lm_head"),
        ArchSpec("mistral", "model.layers", _LLAMA_SITES, "model.norm", "lm_head"),
    )
}


def spec_for(model_type: str) -> ArchSpec:
    """Return the row of `SPECS` for a Hugging Face `model_type`; ValueError names the families that work."""
    if not isinstance(model_type, str) or model_type not in SPECS:
        raise ValueError(
            f"model family {model_type!r} is not supported; supported: {', '.join(SPECS)}. "
            "A family is one row of kncore.arch.SPECS."
        )
    return SPECS[model_type]


def module_at(root: nn.Module, path: str, what: str) -> nn.Module:
    """`root.path`; the ValueError says which step of the path does not exist and what is there instead."""
    module = root
    for step in path.split(".") if path else ():
        if not hasattr(module, step):
            there = ", ".join(name for name, _ in module.named_children()) or "nothing"
            raise ValueError(
                f"looked for the {what} at {path!r} in {type(root).__name__}, but {type(module).__name__} has no "
                f"{step!r} (it has {there}). Load the model with its language-model head, or correct kncore.arch.SPECS."
            )
        module = getattr(module, step)
    return module


def check(model: nn.Module, spec: ArchSpec) -> None:
    """Raise ValueError unless every module that `spec` names exists, in every block, and has the right width."""
    blocks = module_at(model, spec.blocks, "blocks")
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        raise ValueError(f"looked for a list of blocks at {spec.blocks!r}, found {type(blocks).__name__}")
    if spec.norm is not None:
        module_at(model, spec.norm, "final norm")
    module_at(model, spec.head, "language-model head")
    for block in blocks:
        for name, site in spec.sites.items():
            module_at(block, site.path, f"{name} site")
    hidden = model.config.hidden_size
    values = value_vectors(model, spec, 0)
    if values.shape[1] != hidden:
        raise ValueError(f"value vectors have width {values.shape[1]}, the residual stream {hidden}: wrong projection")


def projection(model: nn.Module, spec: ArchSpec, block: int) -> nn.Module:
    """Return the module that holds the value vectors of one block."""
    return module_at(module_at(model, spec.blocks, "blocks")[block], spec.sites["neuron"].path, "neuron site")


def value_vectors(model: nn.Module, spec: ArchSpec, block: int):
    """Return value vectors of one block, `[neuron, hidden]`: row i is what a unit of neuron i adds to the residual
    stream."""
    module = projection(model, spec, block)
    return module.weight.T if isinstance(module, nn.Linear) else module.weight  # GPT-2's Conv1D is stored transposed


@contextlib.contextmanager
def at_site(block: nn.Module, site: Site, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """While open, `see` is called with the site's state on every pass; what it returns, if not None, replaces it."""

    def pre(module, args):
        new = see(args[0])
        return None if new is None else (new, *args[1:])

    def post(module, args, out):
        new = see(out[0] if isinstance(out, tuple) else out)
        return (new, *out[1:]) if new is not None and isinstance(out, tuple) else new

    module = module_at(block, site.path, "site")
    handle = module.register_forward_pre_hook(pre) if site.side == "input" else module.register_forward_hook(post)
    try:
        yield
    finally:
        handle.remove()
