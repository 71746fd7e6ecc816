"""Second moments of the neurons over text, C = E[k kᵀ]: what ROME and MEMIT take for the keys that are to stay.

Streamed over pieces of text and stopped at the block in question; stored under everything it depends on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kncore import arch, cache, tokens, words
from kncore.models import LM

SAMPLES, START, LENGTH = 100, 3, 128
CODE = ("arch", "covariance")


class _Reached(Exception):
    """The block is reached; nothing above it need run."""


def covariance(
    lm: LM, block: int, source: str = "samples", *, seed: int = 0, store: bool = True
) -> Float[Tensor, "neuron neuron"] | None:
    """Mean of k kᵀ over the tokens of a text, in float64, for the neurons of one block.

    source: "samples", text that the model itself goes on with from the first words of the passages (causal models);
        "text", the passages themselves; "identity" gives None; otherwise a folder with .txt files.

    Raises ValueError for a block that does not exist and for samples of a masked model, FileNotFoundError for a folder
    without text.
    """
    if not 0 <= block < len(lm.blocks):
        raise ValueError(f"block {block} does not exist; {lm.name} has blocks 0 to {len(lm.blocks) - 1}")
    if source == "identity":
        return None
    folder = cache.scores_folder() if store and not lm.touched else None
    ids = _sampled(lm, seed, folder) if source == "samples" else _read(lm, source)
    told = hashlib.sha256(repr(ids).encode()).hexdigest()
    key = cache.name(lm, {"covariance": told, "block": block}, CODE)
    found = cache.read(folder, key) if folder else None
    if found is None:
        found = {"moment": _moment(lm, block, ids)}
        if folder:
            cache.write(folder, key, found)
    return found["moment"].to(lm.device)


def _read(lm: LM, source: str) -> list[list[int]]:
    """Token ids of the passages, or of a folder's text, in pieces of at most LENGTH and of what the model can read."""
    texts = words.passages() if source == "text" else words.texts(source, "'samples', 'text' or 'identity'")
    whole = [lm.tokenizer(text, add_special_tokens=lm.spec.masked, truncation=False)["input_ids"] for text in texts]
    length = _length(lm)
    return [piece for ids in whole for i in range(0, len(ids), length) if len(piece := ids[i : i + length]) > 1]


def _length(lm: LM) -> int:
    return min(LENGTH, tokens.longest(lm) or LENGTH)


def _sampled(lm: LM, seed: int, folder: Path | None) -> list[list[int]]:
    """Token ids of SAMPLES texts of LENGTH tokens that the model goes on with, sampled from its own distribution."""
    if lm.spec.masked:
        raise ValueError(f"{lm.name} is a masked model and cannot go on with a text; use covariance 'text' or a folder")
    starts = [lm.tokenizer(text)["input_ids"][:START] for text in words.passages()[:SAMPLES]]
    key = cache.name(lm, {"samples": starts, "length": _length(lm), "seed": seed}, CODE)
    found = cache.read(folder, key) if folder else None
    if found is None:
        found = {"ids": generate(lm, torch.tensor(starts, device=lm.device), _length(lm), seed)}
        if folder:
            cache.write(folder, key, found)
    return found["ids"].tolist()


def _moment(lm: LM, block: int, ids: Sequence[Sequence[int]], batch: int = 16) -> Float[Tensor, "neuron neuron"]:
    total = torch.zeros(lm.n_neurons, lm.n_neurons, dtype=torch.float64, device=lm.device)
    count = 0
    for i in range(0, len(ids), batch):
        part = [tokens.Encoded(tuple(one), 0, ()) for one in ids[i : i + batch]]
        padded, lengths = tokens.pad(lm, part)
        real = torch.arange(padded.shape[1], device=lm.device) < lengths[:, None]
        keys = reached(lm, padded, real, block)[real].float()
        total += (keys.T @ keys).double()
        count += len(keys)
    return total / count


def reached(
    lm: LM, ids: Int[Tensor, "prompt token"], real: Bool[Tensor, "prompt token"], block: int, site: str = "neuron"
) -> Float[Tensor, "prompt token width"]:
    """What a site of one block has, at every token of padded prompts; nothing above it is run."""
    seen: list[Tensor] = []

    def see(x):
        seen.append(x)
        raise _Reached

    try:
        with torch.no_grad(), arch.at_site(lm.blocks[block], lm.spec.sites[site], see):
            lm.model.base_model(input_ids=ids, attention_mask=real.long())
    except _Reached:
        pass
    return seen[0]


def solve(
    moment: Float[Tensor, "neuron neuron"] | None, keys: Float[Tensor, "key neuron"]
) -> Float[Tensor, "key neuron"]:
    """C⁻¹k of each key, in float64; the keys themselves where there is no moment.

    Raises ValueError for a moment that is singular, or nearly.
    """
    if moment is None:
        return keys.double()
    factor, info = torch.linalg.cholesky_ex(moment.double())
    if bool(info) or not bool((factor.diagonal() > 1e-7 * factor.diagonal().max()).all()):
        raise ValueError(
            f"the covariance of {len(moment)} neurons is singular: too little text. Give more of it, or use "
            "covariance='identity'"
        )
    return torch.cholesky_solve(keys.double().T, factor).T


@torch.no_grad()
def generate(
    lm: LM,
    prompts: Int[Tensor, "prompt token"],
    length: int,
    seed: int | None = 0,
    real: Bool[Tensor, "prompt token"] | None = None,
) -> Int[Tensor, "prompt token"]:
    """Each prompt with tokens sampled after it, at temperature 1 from the whole distribution, to `length` in all; with
    seed None the most probable token each time. `real` is False for what fills up shorter prompts on the left.

    Sampled on the CPU from a generator of its own: the global state of random numbers stays as it is.
    """
    from transformers import DynamicCache

    rng = None if seed is None else torch.Generator().manual_seed(seed)
    past, ids = DynamicCache(), prompts
    step, seen = ids, torch.ones_like(ids) if real is None else real.long()
    while ids.shape[1] < length:
        place = (seen.cumsum(1) - 1).clamp_min(0)[:, -step.shape[1] :]
        options = {"attention_mask": seen, "position_ids": place, "past_key_values": past, "use_cache": True}
        hidden = lm.model.base_model(input_ids=step, **options).last_hidden_state
        logits = lm.readout(hidden[:, -1], normed=True).float().cpu()
        step = (
            logits.argmax(-1, keepdim=True) if rng is None else torch.multinomial(logits.softmax(-1), 1, generator=rng)
        )
        step = step.to(lm.device)
        ids, seen = torch.cat([ids, step], 1), torch.cat([seen, torch.ones_like(step)], 1)
    return ids
