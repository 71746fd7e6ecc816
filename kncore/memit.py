"""MEMIT: many associations at once, spread over several blocks (Meng et al. 2023, section 4).

What the residual stream must gain at the last token of each subject is searched as in ROME, at the last block of a
range. Going up the range, each block's value vectors take an equal part of what is still missing, by the least change
that leaves other keys alone: with keys K [request, neuron], missing parts R [request, hidden] and C = E[k kᵀ],

    W ← W + (λC + KᵀK)⁻¹ Kᵀ R

K holds the mean of each request's key over its prefixes, the same in both places; so does the published code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kncore import editing, tokens
from kncore.covariance import Moment, solve
from kncore.interventions import Delta, edited
from kncore.models import LM
from kncore.query import Query
from kncore.replay import record

BATCH = 64  # prompts that are run together


@dataclass(frozen=True)
class HParams(editing.Settings):
    """`first` to `last` are the blocks that are rewritten; `weight` is λ, how much the other keys count.

    Raises ValueError for a setting out of its range; of the blocks, only `check` can tell.
    """

    first: int
    last: int
    weight: float = 100.0


def memit(
    lm: LM,
    prompts: Sequence[Sequence[Query]],
    changes: Float[Tensor, "request hidden"],
    moments: Sequence[Moment],
    settings: HParams,
) -> list[Delta]:
    """Return one delta per block of the range, of rank len(prompts), that together write all requests.

    `prompts`: each request alone and after its prefixes; `changes`: what `rome.search` found for it at block
    `settings.last`; `moments`: the covariance of every block of the range (None: the identity). Raises ValueError as
    `check` does, for no requests, another number of changes or covariances, where λC + KᵀK is singular, for a key that
    is zero, and numbers that are not finite.
    """
    check(lm, settings)
    blocks, above = range(settings.first, settings.last + 1), settings.last + 1
    if len(moments) != len(blocks):
        raise ValueError(f"{len(moments)} covariances for blocks {settings.first} to {settings.last}")
    if not len(prompts) or len(prompts) != len(changes) or len({len(group) for group in prompts}) > 1:
        n = f"{len(prompts)} requests and {len(changes)} changes"
        raise ValueError(f"{n}; give one change for each, all with as many prompts")
    encoded = [tokens.encode(lm, query) for group in prompts for query in group]
    ends = [tokens.span(lm, query)[1] for group in prompts for query in group]

    def at_subjects(block: int, site: str) -> Float[Tensor, "request prompt width"]:
        parts = []
        for i in range(0, len(encoded), BATCH):
            part = encoded[i : i + BATCH]
            states, _ = record(lm, *tokens.pad(lm, part), [(block, site)])
            parts.append(states[block, site][range(len(part)), ends[i : i + BATCH]].double())
        return torch.cat(parts).unflatten(0, (len(prompts), -1))

    goal = at_subjects(above, "residual")[:, 0] + changes.double()
    deltas: list[Delta] = []
    for block, moment in zip(blocks, moments, strict=True):
        with edited(lm, *deltas) if deltas else contextlib.nullcontext():
            keys, present = at_subjects(block, "neuron").mean(1), at_subjects(above, "residual")[:, 0]
        missing = (goal - present) / (above - block)
        if not bool(keys.isfinite().all() & missing.isfinite().all()):
            raise ValueError(f"the keys of block {block}, or what is added there, are not finite; check the weights")
        if not bool(keys.any(1).all()):
            raise ValueError(f"the neurons of block {block} are zero at a subject: nothing can be stored under its key")
        base = torch.eye(keys.shape[1], dtype=torch.float64, device=lm.device) if moment is None else moment.double()
        reads = solve(settings.weight * base + keys.T @ keys, keys)
        deltas.append(Delta(block, reads.float(), missing.float()))
    return deltas


def check(lm: LM, settings: HParams) -> None:
    """Raise ValueError unless the model can be edited so: not a masked one, whose stream is normalised after every
    addition, and not at its last block."""
    if lm.spec.masked:
        raise ValueError(f"MEMIT adds to a residual stream that is normalised in {lm.name}; use a causal model")
    if not 0 <= settings.first <= settings.last < len(lm.blocks) - 1:
        raise ValueError(f"{settings}: blocks rise, from 0 to {len(lm.blocks) - 2}")
