"""Second moments of the neurons over text, C = E[k kᵀ]: what ROME and MEMIT take for the keys that are to stay.

Streamed over pieces of text and stopped at the block in question; stored under everything it depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kncore import arch, cache, checks, editing, state, tokens, words
from kncore.models import LM

SAMPLES, START, LENGTH = 100, 3, 128
# The share of a neuron's variance that the others must leave unexplained. A covariance of fewer tokens than neurons is
# below 1e-13 in float64 and up to 1e-4 in float32; those of the models of this project, of enough text, above 2e-4.
SINGULAR = {torch.float64: 1e-11}
SINGULAR_ROUNDED = 1e-4


class _Reached(Exception):
    """The block is reached; nothing above it need run."""


@state.computes(grad=False)
def covariance(
    lm: LM, block: int, source: str | Path = "samples", *, seed: int = 0, store: bool = True
) -> Float[Tensor, "neuron neuron"] | None:
    """Mean of k kᵀ over the tokens of a text, in float64, for the neurons of one block.

    source: "samples", text that the model itself goes on with from the first words of the passages (causal models);
        "text", the passages themselves; "identity" gives None; otherwise a folder with .txt files.

    Fewer tokens than neurons make a covariance that is singular, which `solve` refuses. Raises ValueError for a block
    that does not exist, samples of a masked model, a source that is a file, text without two tokens in a row, and
    neurons that are not finite; FileNotFoundError for a folder without text.
    """
    block, seed = editing.block(lm, block), checks.whole(seed, "seed")
    if source == "identity":
        return None
    kept = cache.store(lm, _moment, generate) if store else None
    ids = _sampled(lm, seed, kept) if source == "samples" else _read(lm, source)
    name = kept.name({"moment": ids, "block": block}) if kept else ""
    found = kept.read(name) if kept else None
    if found is None:
        found = {"moment": _moment(lm, block, ids)}
        if kept:
            kept.write({name: found})
    return found["moment"].to(lm.device)


def _read(lm: LM, source: str) -> list[list[int]]:
    """Token ids of the passages, or of a folder's text, in pieces of at most LENGTH and of what the model can read."""
    texts = words.passages() if source == "text" else _texts(source)
    texts = [text for text in texts if text.strip()]  # of an empty one a masked model would read its special tokens
    whole = [lm.tokenizer(text, add_special_tokens=lm.spec.masked, truncation=False)["input_ids"] for text in texts]
    length = _length(lm)
    pieces = [piece for ids in whole for i in range(0, len(ids), length) if len(piece := ids[i : i + length]) > 1]
    if not pieces:
        raise ValueError(f"the text of {str(source)!r} has no two tokens in a row for {lm.name}; give more of it")
    return pieces


def _texts(source: str | Path) -> list[str]:
    instead = "'samples', 'text' or 'identity'"
    if not isinstance(source, str | Path) or not str(source).strip():
        raise ValueError(f"the covariance must be {instead}, or a folder of text files; got {source!r}")
    if Path(source).is_file():
        raise ValueError(f"the covariance {str(source)!r} is a file; name the folder that holds it, or {instead}")
    return words.texts(source, instead)


def _length(lm: LM) -> int:
    return min(LENGTH, tokens.longest(lm) or LENGTH)


def _sampled(lm: LM, seed: int, kept: cache.Store | None) -> list[list[int]]:
    """Token ids of SAMPLES texts of LENGTH tokens that the model goes on with, sampled from its own distribution."""
    if lm.spec.masked:
        raise ValueError(f"{lm.name} is a masked model and cannot go on with a text; use covariance 'text' or a folder")
    starts = [lm.tokenizer(text)["input_ids"][:START] for text in words.passages()[:SAMPLES]]
    name = kept.name({"samples": starts, "length": _length(lm), "seed": seed}) if kept else ""
    found = kept.read(name) if kept else None
    if found is None:
        found = {"ids": generate(lm, torch.tensor(starts, device=lm.device), _length(lm), seed)}
        if kept:
            kept.write({name: found})
    return found["ids"].tolist()


def _moment(lm: LM, block: int, ids: Sequence[Sequence[int]], batch: int = 16) -> Float[Tensor, "neuron neuron"]:
    total = torch.zeros(lm.n_neurons, lm.n_neurons, dtype=torch.float64, device=lm.device)
    count = 0
    for i in range(0, len(ids), batch):
        part = [tokens.Encoded(tuple(one), 0, ()) for one in ids[i : i + batch]]
        padded, lengths = tokens.pad(lm, part)
        real = torch.arange(padded.shape[1], device=lm.device) < lengths[:, None]
        keys = reached(lm, padded, real, block)[real].double()  # rounding would hide that a text is too short
        total += keys.T @ keys
        count += len(keys)
    if not bool(total.isfinite().all()):
        raise ValueError(
            f"the neurons of block {block} of {lm.name} are not finite; use a wider dtype or check the weights"
        )
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

    Raises ValueError for a moment that is singular, or nearly, that is not finite, or of another width than the keys.
    """
    if moment is None:
        return keys.double()
    if moment.shape != (keys.shape[1], keys.shape[1]):
        raise ValueError(
            f"a covariance of shape {tuple(moment.shape)} for keys of {keys.shape[1]} neurons; give the block's own"
        )
    if not bool(moment.isfinite().all()):
        raise ValueError(f"the covariance of {len(moment)} neurons holds values that are not finite; compute it anew")
    # Each neuron in units of its own size, so that what is left of it beside the others is a share of its variance.
    size = moment.double().diagonal().clamp_min(0).sqrt()
    factor, info = torch.linalg.cholesky_ex(moment.double() / (size[:, None] * size))
    if bool(info) or not bool((factor.diagonal() ** 2 > SINGULAR.get(moment.dtype, SINGULAR_ROUNDED)).all()):
        raise ValueError(
            f"the covariance of {len(moment)} neurons is singular: too little text. Give more of it, or use "
            "covariance='identity'"
        )
    return torch.cholesky_solve((keys.double() / size).T, factor).T / size


@state.computes(grad=False)
def generate(
    lm: LM,
    prompts: Int[Tensor, "prompt token"],
    length: int,
    seed: int | None = 0,
    real: Bool[Tensor, "prompt token"] | None = None,
) -> Int[Tensor, "prompt token"]:
    """Each prompt with tokens sampled after it, at temperature 1 from the whole distribution, to `length` in all; with
    seed None the most probable token each time. `real` is False for what fills up shorter prompts on the left.

    Sampled on the CPU from a generator of its own: the global state of random numbers stays as it is. Raises ValueError
    for more tokens than the model can read, and where its probabilities are not numbers.
    """
    from transformers import DynamicCache

    filled = 0 if real is None else int((~real).sum(1).min())
    tokens.check_length(lm, length - filled, "a prompt with what is to follow it")
    rng = None if seed is None else torch.Generator().manual_seed(seed)
    past, ids = DynamicCache(), prompts
    step, seen = ids, torch.ones_like(ids) if real is None else real.long()
    while ids.shape[1] < length:
        place = (seen.cumsum(1) - 1).clamp_min(0)[:, -step.shape[1] :]
        options = {"attention_mask": seen, "position_ids": place, "past_key_values": past, "use_cache": True}
        hidden = lm.model.base_model(input_ids=step, **options).last_hidden_state
        logits = lm.readout(hidden[:, -1], normed=True).float().cpu()
        if bool(logits.softmax(-1).isnan().any()):
            raise ValueError(f"the probabilities of {lm.name} are not numbers; use a wider dtype or check the weights")
        step = (
            logits.argmax(-1, keepdim=True) if rng is None else torch.multinomial(logits.softmax(-1), 1, generator=rng)
        )
        step = step.to(lm.device)
        ids, seen = torch.cat([ids, step], 1), torch.cat([seen, torch.ones_like(step)], 1)
    return ids
