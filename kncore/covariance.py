"""Second moments of the neurons over text, C = E[k kᵀ]: what ROME and MEMIT take for the keys that are to stay.

They are summed over pieces of text, each run up to the block in question, and stored with all that they depend on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kncore import checks, prose, tokens
from kncore.generation import generate
from kncore.models import LM
from kncore.replay import record
from kncore.store import state
from kncore.store.results import stored

Moment = Float[Tensor, "neuron neuron"] | None  # C of one block, in float64; None is the identity
SAMPLES, START, LENGTH = 100, 3, 128
BATCH = 16  # texts that are run together
# The share of a neuron's variance that the others must leave unexplained. A covariance of fewer tokens than neurons is
# below 1e-13 in float64 and up to 1e-4 in float32; those of the models of this project, of enough text, above 2e-4.
SINGULAR = {torch.float64: 1e-11}
SINGULAR_ROUNDED = 1e-4


@state.computes(grad=False)
def covariance(lm: LM, block: int, source: str | Path | list[str] = "samples", *, seed: int = 0) -> Moment:
    """Return the mean of k kᵀ over the tokens of a text, in float64, for the neurons of one block.

    source: "samples", text that the model itself goes on with from the first words of the passages (causal models);
        "text", the passages themselves; "identity" gives None; otherwise a folder with .txt files, or a list of texts.

    Fewer tokens than neurons make a covariance that is singular, which `solve` refuses. Raises ValueError for a block
    that does not exist, samples of a masked model, a source that is a file, text without two tokens in a row, and
    neurons that are not finite; FileNotFoundError for a folder without text.
    """
    block, seed = checks.block(lm, block), checks.whole(seed, "seed")
    if source == "identity":
        return None
    ids = _sampled(lm, seed) if source == "samples" else _read(lm, source)
    settings = {"moment": ids, "block": block}
    (result,) = stored(lm, (_moment, generate), [settings], lambda _: [{"moment": _moment(lm, block, ids)}])
    return result["moment"].to(lm.device)


def _read(lm: LM, source: str | Path | list[str]) -> list[list[int]]:
    """Return the token ids of a source's texts, in pieces of at most LENGTH and of what the model can read."""
    texts = prose.passages() if source == "text" else _texts(source)
    texts = [text for text in texts if text.strip()]  # of an empty one a masked model would read its special tokens
    whole = [lm.tokenizer(text, add_special_tokens=lm.spec.masked, truncation=False)["input_ids"] for text in texts]
    length = _length(lm)
    pieces = [ids[i : i + length] for ids in whole for i in range(0, len(ids) - 1, length)]
    if not pieces:
        raise ValueError(f"the text of {str(source)!r} has no two tokens in a row for {lm.name}; give more of it")
    return pieces


def _texts(source: str | Path | list[str]) -> list[str]:
    if isinstance(source, list) and all(isinstance(text, str) for text in source):
        return source
    instead = "'samples', 'text' or 'identity'"
    if not isinstance(source, str | Path) or not str(source).strip():
        raise ValueError(f"the covariance must be {instead}, or a folder of text files; got {source!r}")
    if Path(source).is_file():
        raise ValueError(f"the covariance {str(source)!r} is a file; name the folder that holds it, or {instead}")
    return prose.texts(source, instead)


def _length(lm: LM) -> int:
    return min(LENGTH, tokens.longest(lm) or LENGTH)


def _sampled(lm: LM, seed: int) -> list[list[int]]:
    """Return the token ids of SAMPLES texts of LENGTH tokens, sampled from the model's own distribution."""
    if lm.spec.masked:
        raise ValueError(f"{lm.name} is a masked model and cannot go on with a text; use covariance 'text' or a folder")
    starts = [lm.tokenizer(text)["input_ids"][:START] for text in prose.passages()[:SAMPLES]]
    length, prompts = _length(lm), torch.tensor(starts, device=lm.device)
    settings = {"samples": starts, "length": length, "seed": seed}
    (result,) = stored(lm, (_moment, generate), [settings], lambda _: [{"ids": generate(lm, prompts, length, seed)}])
    return result["ids"].tolist()


def _moment(lm: LM, block: int, ids: Sequence[Sequence[int]]) -> Float[Tensor, "neuron neuron"]:
    total = torch.zeros(lm.n_neurons, lm.n_neurons, dtype=torch.float64, device=lm.device)
    count = 0
    for i in range(0, len(ids), BATCH):
        padded, lengths = tokens.pad(lm, [tokens.Encoded(tuple(piece), 0, ()) for piece in ids[i : i + BATCH]])
        states, _ = record(lm, padded, lengths, [(block, "neuron")])
        # In float32, rounding would hide that a text is too short.
        keys = states[block, "neuron"][tokens.real_tokens(padded, lengths)].double()
        total += keys.T @ keys
        count += len(keys)
    if not bool(total.isfinite().all()):
        raise ValueError(f"the neurons of block {block} of {lm.name} are not finite; check its weights and dtype")
    return total / count


class Factor(NamedTuple):
    """A moment that was factored, to be solved for many keys: the `size` of each neuron, and the Cholesky factor of the
    moment in units of these."""

    size: Float[Tensor, " neuron"]
    cholesky: Float[Tensor, "neuron neuron"]


def factor(moment: Float[Tensor, "neuron neuron"]) -> Factor:
    """Return a moment factored. Raises ValueError for one that is singular, or nearly, not finite, or not square."""
    n, shape = len(moment), tuple(moment.shape)
    if shape != (n, n):
        raise ValueError(f"a covariance of shape {shape} is not square; give the block's own")
    if not bool(moment.isfinite().all()):
        raise ValueError(f"the covariance of {n} neurons holds values that are not finite; compute it anew")
    # Each neuron in units of its own size, so that what is left of it beside the others is a share of its variance.
    size = moment.double().diagonal().clamp_min(0).sqrt()
    cholesky, info = torch.linalg.cholesky_ex(moment.double() / (size[:, None] * size))
    if bool(info) or not bool((cholesky.diagonal() ** 2 > SINGULAR.get(moment.dtype, SINGULAR_ROUNDED)).all()):
        raise ValueError(f"the covariance of {n} neurons is singular: too little text; give more, or take 'identity'")
    return Factor(size, cholesky)


def solve(moment: Moment | Factor, keys: Float[Tensor, "key neuron"]) -> Float[Tensor, "key neuron"]:
    """Return C⁻¹k of each key, in float64; the keys themselves where there is no moment.

    Raises ValueError for a moment of another width than the keys, and for what `factor` refuses.
    """
    if moment is None:
        return keys.double()
    n, shape = keys.shape[1], tuple((moment.cholesky if isinstance(moment, Factor) else moment).shape)
    if shape != (n, n):
        raise ValueError(f"a covariance of shape {shape} for keys of {n} neurons; give the block's own")
    size, cholesky = moment if isinstance(moment, Factor) else factor(moment)
    return torch.cholesky_solve((keys.double() / size).T, cholesky).T / size
