"""All tokenisation: from a query to token ids, target ids and the position that predicts each target token."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from kncore.models import LM
from kncore.tasks import Query

MASK = "[MASK]"


@dataclass(frozen=True)
class Encoded:
    """One query as token ids.

    `ids` are the tokens of the prompt (a masked prompt holds one mask per target token), `position` the index of the
    token whose state predicts the first target token, `target` the ids of the target.
    """

    ids: tuple[int, ...]
    position: int
    target: tuple[int, ...]


def expect(query: Query) -> None:
    """Raises TypeError where something else is given for a query."""
    if not isinstance(query, Query):
        told = f"{type(query).__name__} {str(query)[:40]!r}"
        raise TypeError(f"expected a Query, got {told}; make one of prompt and target")


def encode(lm: LM, query: Query, target: str | None = None) -> Encoded:
    """Token ids of a query, or of the same prompt with another `target` (a foil, a candidate).

    Causal models: the prompt keeps the special tokens that the tokenizer puts before it (BOS), the target is what the
    text `prompt + " " + target` adds, so it carries its leading space and no BOS. Masked models: `[MASK]` becomes one
    mask token per target token; a prompt without it gets " [MASK]." appended.

    Raises ValueError where the prompt has no tokens, is longer than the model's context, or a causal model is asked
    about a mask with text after it. A target outside the vocabulary is warned of: it is asked as the unknown token.
    """
    expect(query)
    word = query.target if target is None else target
    ids, position, wanted, *_ = (_masked if lm.spec.masked else _causal)(lm, query.prompt, word)
    if not wanted:
        raise ValueError(f"target {word!r} has no tokens for {lm.name}; give a word that it can write")
    if lm.tokenizer.unk_token_id in wanted:
        warnings.warn(
            f"{word!r} is not in the vocabulary of {lm.name}: asked is {lm.tokenizer.unk_token}, any unknown word",
            stacklevel=2,
        )
    limit = longest(lm)
    length = len(ids) + (0 if lm.spec.masked else len(wanted) - 1)
    if limit is not None and length > limit:
        raise ValueError(
            f"prompt {query.prompt[:40]!r}… has {length} tokens with its target, the context of {lm.name} is {limit}; "
            "shorten it"
        )
    return Encoded(tuple(ids), position, tuple(wanted))


def longest(lm: LM) -> int | None:
    """How many tokens the model can read at once; None where no limit is known."""
    limit = getattr(lm.model.config, "max_position_embeddings", None)
    if lm.spec.family == "roberta":
        limit -= lm.model.config.pad_token_id + 1  # its positions are counted from there
    return limit


def _causal(lm: LM, prompt: str, word: str) -> tuple[list[int], int, list[int]]:
    if MASK in prompt:
        before, _, after = prompt.partition(MASK)
        if after.strip(" .") or not before.strip():
            raise ValueError(
                f"{lm.name} reads from left to right and cannot be asked {prompt!r}: the mask must come last. "
                "Use the causal form of the task, or a masked model."
            )
        prompt = before.rstrip()
    ids = lm.tokenizer(prompt)["input_ids"]
    if not ids:
        raise ValueError(f"prompt {prompt!r} has no tokens for {lm.name}; give a longer one")
    joint = lm.tokenizer(f"{prompt} {word}")["input_ids"]
    if joint[: len(ids)] != ids:
        raise ValueError(
            f"the tokens of {prompt!r} change when {word!r} follows: the end of the prompt is no token boundary for "
            f"{lm.name}. End the prompt with a whole word."
        )
    return ids, len(ids) - 1, joint[len(ids) :]


def _masked(lm: LM, prompt: str, word: str) -> tuple[list[int], int, list[int], str]:
    if MASK not in prompt:
        prompt = f"{prompt} {MASK}."
    before, _, after = prompt.partition(MASK)
    spaced = " " if before.endswith(" ") else ""
    wanted = lm.tokenizer(spaced + word, add_special_tokens=False)["input_ids"]
    text = before + lm.tokenizer.mask_token * len(wanted) + after
    ids = lm.tokenizer(text)["input_ids"]
    mask = lm.tokenizer.mask_token_id
    if ids.count(mask) != len(wanted):
        raise ValueError(f"prompt {prompt!r} holds mask tokens of its own; mark the one place with {MASK}")
    return ids, ids.index(mask) if wanted else 0, wanted, text


def span(lm: LM, query: Query, target: str | None = None) -> tuple[int, int]:
    """Positions of the first and the last token of a query's subject among the ids of `encode`.

    Where the subject occurs more than once, it is the last time. Raises ValueError for a query without a subject.
    """
    if not query.subject:
        raise ValueError(f"prompt {query.prompt!r} has no subject; give the part of it that is to be found")
    text = _masked(lm, query.prompt, query.target if target is None else target)[3] if lm.spec.masked else query.prompt
    at = text.rindex(query.subject)
    found = lm.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    inside = [i for i, (start, end) in enumerate(found) if start < at + len(query.subject) and end > at and start < end]
    return inside[0], inside[-1]


def steps(lm: LM, encoded: Encoded) -> list[Encoded]:
    """One query per target token: token k is predicted with the target's first k tokens in place."""
    out = []
    for k, token in enumerate(encoded.target):
        if lm.spec.masked:
            ids = list(encoded.ids)
            ids[encoded.position : encoded.position + k] = encoded.target[:k]
        else:
            ids = [*encoded.ids, *encoded.target[:k]]
        out.append(Encoded(tuple(ids), encoded.position + k, (token,)))
    return out


def pad(lm: LM, batch: Sequence[Encoded]) -> tuple[Int[Tensor, "query token"], Int[Tensor, " query"]]:
    """Right-padded token ids and the lengths, on the model's device."""
    lengths = torch.tensor([len(e.ids) for e in batch], device=lm.device)
    filler = lm.tokenizer.pad_token_id
    filler = 0 if filler is None else filler
    ids = torch.full((len(batch), int(lengths.max())), filler, device=lm.device)
    for row, encoded in zip(ids, batch, strict=True):
        row[: len(encoded.ids)] = torch.tensor(encoded.ids, device=lm.device)
    return ids, lengths
