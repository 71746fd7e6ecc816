"""The whole model run with hooks that are written out here: what edits are checked against."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kncore.models import LM
from kncore.query import MASK, Query

_LLAMA = ("model.layers", "mlp.down_proj")
# Where the paths below differ from the package's own table, one of the two is wrong.
PLACES = {
    "bert": ("bert.encoder.layer", "output.dense"),
    "roberta": ("roberta.encoder.layer", "output.dense"),
    "gpt2": ("transformer.h", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "mistral": _LLAMA,
}


class Asked(NamedTuple):
    """A prompt with a word: `ids` of all but the word's last token, `at` where the subject ends, `places` that predict
    the tokens `wanted`."""

    ids: list[int]
    at: int
    places: list[int]
    wanted: list[int]


def ask(lm: LM, query: Query, word: str) -> Asked:
    """For models whose tokens are words; a masked prompt holds one mask for each."""
    wanted = lm.tokenizer(word, add_special_tokens=False)["input_ids"]
    text = query.prompt.replace(MASK, " ".join([MASK] * len(wanted)))
    ids = lm.tokenizer(text)["input_ids"]
    end = text.rindex(query.subject) + len(query.subject)
    at = len(lm.tokenizer(text[:end], add_special_tokens=False)["input_ids"]) - 1 + lm.spec.masked
    if lm.spec.masked:
        return Asked(ids, at, [i for i, token in enumerate(ids) if token == lm.tokenizer.mask_token_id], wanted)
    return Asked(ids + wanted[:-1], at, [len(ids) - 1 + k for k in range(len(wanted))], wanted)


def projection(lm: LM, block: int) -> torch.nn.Module:
    blocks, path = PLACES[lm.spec.family]
    return lm.model.get_submodule(blocks)[block].get_submodule(path)


def vectors(lm: LM, block: int) -> Tensor:
    """Value vectors `[neuron, hidden]`."""
    weight = projection(lm, block).weight
    return weight if lm.spec.family == "gpt2" else weight.T


def run(lm: LM, asked: Asked, block: int, added: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[token, vocab]` with `added` put on what the block's MLP gives where the subject ends; and there, its
    neurons and what it gives itself."""
    seen = {}

    def see(module, args, out):
        seen["key"], seen["value"] = args[0][0, asked.at], out[0, asked.at]
        if added is None:
            return None
        return torch.cat([out[:, : asked.at], (out[0, asked.at] + added)[None, None], out[:, asked.at + 1 :]], 1)

    hook = projection(lm, block).register_forward_hook(see)
    try:
        logits = lm.model(torch.tensor([asked.ids])).logits[0]
    finally:
        hook.remove()
    return logits, seen["key"].detach(), seen["value"].detach()


def loss(lm: LM, asked: Asked, block: int = 0, added: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of the word's tokens, in nats."""
    logp = run(lm, asked, block, added)[0].log_softmax(-1)
    return -logp[asked.places, asked.wanted].mean()
